"""Running a study: every answer once, whatever stops it in the middle; what goes wrong is one sentence."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import tomli_w
from rich.console import Console
from typer.testing import CliRunner

from tests.support.openai_endpoint import chat, completion, endpoint, refusal
from vllm_entropix.bench.answers import ANSWERS, Answer, Store, read
from vllm_entropix.bench.choose import choose
from vllm_entropix.bench.run import CHOSEN, Only, read_chosen, run
from vllm_entropix.bench.study import Study
from vllm_entropix.cli.main import app
from vllm_entropix.samplers.entropix.settings import DEFAULT_PRESET
from vllm_entropix.settings.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CONSOLE = Console(quiet=True)


def described(url, **model):
    return {
        "name": "small",
        "configurations": 3,
        "draws": 2,
        "concurrency": 4,
        "models": {"stub": {"endpoint": url, "plugin": False, **model}},
        "tasks": {
            "sums": {"kind": "arithmetic", "tuning": 4, "test": 5},
            "open": {"kind": "open_prompts", "tuning": 0, "test": 2},
        },
        "samplers": {
            "greedy": {"fixed": {"temperature": 0}},
            "temperature": {"ranges": {"temperature": [0.1, 1.9]}},
            "warmer": {"as_tuned": "temperature", "fixed": {"top_p": 0.5}},
        },
    }


def study(url, **model):
    return Study.model_validate(described(url, **model))


# Tuning: 4 items by 1 and by 3 configurations. Test: 7 items, once, and twice each by two samplers.
TUNING, TEST = 4 * (1 + 3), 7 * (1 + 2 + 2)


def solve(question):
    found = re.match(r"What is ([-+* 0-9]+)\?", question)
    return str(eval(found[1])) if found else "once upon a time"


def solving(body):
    """Right where the temperature is below 1."""
    question = body["messages"][0]["content"]
    right = solve(question)
    return chat(f"Answer: {right if body['temperature'] < 1 else 'unknown'}")


def lines(folder):
    return [json.loads(line) for line in (folder / ANSWERS).read_text().splitlines()]


def keys(folder):
    return Counter(answer.key for answer in read(folder))


def test_every_answer_is_asked_for_once(tmp_path):
    with endpoint(solving) as (url, asked):
        assert run(study(url), tmp_path, CONSOLE) == TUNING + TEST
        assert len(asked) == TUNING + TEST
        assert run(study(url), tmp_path, CONSOLE) == TUNING + TEST
        assert len(asked) == TUNING + TEST
    assert set(keys(tmp_path).values()) == {1}
    by_phase = Counter((answer.phase, answer.sampler) for answer in read(tmp_path))
    assert by_phase == {
        ("tuning", "greedy"): 4,
        ("tuning", "temperature"): 12,
        ("test", "greedy"): 7,
        ("test", "temperature"): 14,
        ("test", "warmer"): 14,
    }
    assert all(answer.correct is None for answer in read(tmp_path) if answer.task == "open")
    session = json.loads((tmp_path / "sessions.jsonl").read_text().splitlines()[0])
    assert session["versions"]["vllm-entropix"]
    assert session["cores"] >= 1


def test_the_best_configuration_runs_on_the_test_split(tmp_path):
    with endpoint(solving) as (url, _):
        found = study(url)
        run(found, tmp_path, CONSOLE)
    temperatures = [one["temperature"] for one in found.parameters("temperature")]
    best = next(index for index, temperature in enumerate(temperatures) if temperature < 1)
    told = json.loads((tmp_path / CHOSEN).read_text())["stub"]
    assert told["temperature"] == {"configuration": best, "parameters": {"temperature": temperatures[best]}, "accuracy": 1.0}
    assert told["warmer"]["parameters"] == {"temperature": temperatures[best], "top_p": 0.5}
    test = [answer for answer in read(tmp_path) if answer.phase == "test" and answer.task == "sums"]
    assert {answer.configuration for answer in test if answer.sampler == "temperature"} == {best}
    assert all(answer.correct for answer in test)


def test_requests_say_what_the_study_says(tmp_path):
    with endpoint(solving) as (url, asked):
        run(study(url), tmp_path, CONSOLE)
    told = {answer.key: answer for answer in read(tmp_path)}
    assert {body["max_tokens"] for body in asked} == {128, 120}
    assert all(body["logprobs"] is True and "vllm_xargs" not in body for body in asked)
    warmer = [answer for answer in told.values() if answer.sampler == "warmer"]
    assert {answer.parameters["top_p"] for answer in warmer} == {0.5}
    assert len({answer.seed for answer in warmer}) == 14
    plain = {(a.task, a.item, a.draw): a.seed for a in told.values() if (a.sampler, a.phase) == ("temperature", "test")}
    assert {(a.task, a.item, a.draw): a.seed for a in warmer} == plain


@pytest.mark.parametrize("stopped", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_study_that_is_stopped_goes_on(tmp_path, stopped):
    def slow(body):
        time.sleep(0.05)
        return solving(body)

    with endpoint(slow) as (url, asked):
        path = tmp_path / "study.toml"
        path.write_text(tomli_w.dumps(described(url)))
        results = tmp_path / "results"
        command = [sys.executable, "-m", "vllm_entropix", "bench", str(path), "-o", str(results)]
        # A shell lets what it runs in the background ignore SIGINT, and whoever is started there inherits it.
        heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        environment = {**os.environ, "COLUMNS": "100"}
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment, preexec_fn=heeding)
        deadline = time.monotonic() + 60
        while len(asked) < 9:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(stopped)
        process.wait(30)
        before = len(lines(results))
        assert 0 < before < TUNING + TEST
        # As a process leaves it that is killed while it writes.
        with (results / ANSWERS).open("a") as file:
            file.write('{"model": "stub", "phase": "tun')
        ended = subprocess.run([*command], capture_output=True, text=True, check=False, timeout=120)
        assert ended.returncode == 0, ended.stderr
        assert f"has {TUNING + TEST} answers" in ended.stdout
        assert set(keys(results).values()) == {1}
        assert len(keys(results)) == TUNING + TEST
        # What was asked for and not written is asked for again, and nothing else.
        assert len(asked) - (TUNING + TEST) <= 4


def test_a_full_disk_is_one_sentence_and_the_study_goes_on(tmp_path, monkeypatch):
    with endpoint(solving) as (url, _):
        whole = Store.add

        def full(self, answer):
            if len(self.known) == 10:
                self._file.write(b'{"mod')
                self._file.close()
                self._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
            whole(self, answer)

        monkeypatch.setattr(Store, "add", full)
        with pytest.raises(ConfigError, match=r"can't write to .*answers.jsonl: No space left on device; make room"):
            run(study(url), tmp_path, CONSOLE)
        monkeypatch.undo()
        assert run(study(url), tmp_path, CONSOLE) == TUNING + TEST
        assert set(keys(tmp_path).values()) == {1}


def test_a_part_of_a_study(tmp_path):
    with endpoint(solving) as (url, _):
        run(study(url), tmp_path / "whole", CONSOLE)
        # A control needs the tuning of what it controls.
        run(study(url), tmp_path / "part", CONSOLE, Only(sampler="warmer", task="sums"))
    told = Counter((answer.phase, answer.sampler) for answer in read(tmp_path / "part"))
    assert told == {("tuning", "temperature"): 12, ("test", "warmer"): 10}
    chosen = read_chosen(tmp_path / "part" / CHOSEN)["stub"]
    assert chosen == read_chosen(tmp_path / "whole" / CHOSEN)["stub"] | {"greedy": chosen["greedy"]}
    assert "NaN" not in (tmp_path / "part" / CHOSEN).read_text()
    with pytest.raises(ConfigError, match="the study has no task 'prose'; there are sums, open"):
        run(study(url), tmp_path / "part", CONSOLE, Only(task="prose"))


def test_one_cell_of_a_table_by_one_command(tmp_path):
    with endpoint(solving) as (url, asked):
        run(study(url), tmp_path / "whole", CONSOLE)
        path = tmp_path / "study.toml"
        path.write_text(tomli_w.dumps(described(url)))
        asked.clear()
        chosen = ["--chosen", str(tmp_path / "whole" / CHOSEN)]
        cell = ["--sampler", "temperature", "--task", "sums", "-o", str(tmp_path / "cell")]
        ended = CliRunner().invoke(app, ["bench", str(path), *chosen, *cell])
    assert ended.exit_code == 0, ended.output
    assert len(asked) == 10
    whole = {answer.key: answer.text for answer in read(tmp_path / "whole")}
    assert all(whole[answer.key] == answer.text for answer in read(tmp_path / "cell"))


def test_another_study_in_the_same_folder_is_refused(tmp_path):
    with endpoint(solving) as (url, _):
        run(study(url), tmp_path, CONSOLE)
        other = Study.model_validate({**described(url), "seed": 7})
        with pytest.raises(ConfigError, match="has results of another study"):
            run(other, tmp_path, CONSOLE)
        with Store(tmp_path, study(url)), pytest.raises(ConfigError, match="another process writes to"):
            Store(tmp_path, study(url))


def test_an_endpoint_that_is_not_there_is_one_sentence(tmp_path):
    with endpoint(solving) as (url, _):
        pass
    with pytest.raises(ConfigError, match=r"models.stub: http://127.0.0.1:\d+/v1 doesn't answer \(.*\); start it"):
        run(study(url), tmp_path, CONSOLE)
    with endpoint(solving) as (url, _), pytest.raises(ConfigError, match=r"served_name is 'other', but .* has stub"):
        run(study(url, served_name="other"), tmp_path, CONSOLE)


def test_a_model_without_a_chat_template_is_one_sentence(tmp_path):
    def refuse(body):
        return refusal(400, "default chat template is no longer allowed, so you must provide a chat template")

    with endpoint(refuse) as (url, _), pytest.raises(ConfigError, match=r"has no chat template; set models.stub.chat = false"):
        run(study(url), tmp_path, CONSOLE)


def test_a_model_without_a_chat_template_continues_a_text(tmp_path):
    def answering(body):
        question = body["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:")
        tokens = {"text_offset": [0], "token_logprobs": [None, -0.5, -1.5], "tokens": ["a"], "top_logprobs": None}
        return completion(f" {solve(question)}", logprobs=tokens)

    with endpoint(answering) as (url, asked):
        run(study(url, chat=False), tmp_path, CONSOLE)
    assert {body["path"] for body in asked} == {"/v1/completions"}
    found = list(read(tmp_path))
    assert all(answer.correct for answer in found if answer.task == "sums")
    assert found[0].signals["perplexity"] == pytest.approx(2.718281828)


def test_what_the_endpoint_refuses_is_one_sentence(tmp_path):
    def refuse(body):
        return refusal(400, "no such parameter")

    with endpoint(refuse) as (url, _), pytest.raises(ConfigError, match=r"refuses with status 400: .*no such parameter"):
        run(study(url), tmp_path, CONSOLE)


def test_an_answer_that_hangs_its_checker_is_wrong(tmp_path):
    loop = "```python\ndef {name}(*all):\n    while True: pass\n```"

    def answering(body):
        name = re.search(r"`(\w+)\(", body["messages"][0]["content"])[1]
        return chat(loop.format(name=name))

    with endpoint(answering) as (url, _):
        data = described(url)
        data["tasks"] = {"python": {"kind": "python_functions", "tuning": 0, "test": 1}}
        data["samplers"] = {"greedy": {"fixed": {"temperature": 0}}}
        run(Study.model_validate(data), tmp_path, CONSOLE)
    assert [(answer.correct, answer.note) for answer in read(tmp_path)] == [(False, "took longer than 5 s")]


def test_a_control_of_a_mean_temperature_follows_the_tuning_split():
    data = described("http://127.0.0.1:1/v1", plugin=True)
    data["samplers"] = {
        "regimes": {"sampler": "entropix", "ranges": {"entropix_temperature": [0.1, 1], "entropix_min_p": [0.01, 0.1]}},
        "constant": {"mean_temperature_of": "regimes", "fixed": {"top_k": 27}},
    }
    found = Study.model_validate(data)
    tuned = found.parameters("regimes")[1]
    common = {"model": "stub", "phase": "tuning", "sampler": "regimes", "seed": 0, "text": "", "finish_reason": "stop"}
    told = [(0, 0, 10, 9.0, 0.0), (1, 0, 10, 1.0, 0.5), (1, 1, 15, 2.0, 0.0)]
    tuning = [
        Answer(
            **common, configuration=configuration, task="sums", item=str(item), draw=0, parameters=tuned, tokens=tokens,
            answer=None, correct=configuration == 1, seconds=1,
            signals={"temperature_mean": temperature, "share_argmax": share},
        )
        for configuration, item, tokens, temperature, share in told
    ]  # fmt: skip
    chosen = choose(found, tuning)
    assert chosen["regimes"].configuration == 1
    # 5 tokens of 1.0 and 15 of 2.0.
    assert chosen["constant"].parameters == {"min_p": tuned["entropix_min_p"], "temperature": 1.75, "top_k": 27}
    with pytest.raises(ConfigError, match="takes the mean temperature of regimes, but no answer"):
        choose(found, [answer.model_copy(update={"signals": {}}) for answer in tuning])
    assert choose(found, []) == {}


def test_a_control_by_chance_has_the_shares_of_the_tuning_split():
    data = described("http://127.0.0.1:1/v1", plugin=True)
    del data["models"]["stub"]["endpoint"]
    data["models"]["stub"]["path"] = "somewhere"
    experiments = {"constants": True, "random_regimes": True}
    data["samplers"] = {
        "regimes": {"sampler": "entropix", "ranges": {"entropix_temperature": [0.1, 1]}},
        "chance": {
            "sampler": "entropix", "as_tuned": "regimes", "with_shares": True, "server": {"experiments": experiments},
        },
    }  # fmt: skip
    found = Study.model_validate(data)
    tuned = found.parameters("regimes")[0]
    tuning = [
        Answer(
            model="stub", phase="tuning", sampler="regimes", configuration=0, task="sums", item=str(item), draw=0, seed=0,
            parameters=tuned, text="", finish_reason="stop", tokens=tokens, answer=None, correct=True, seconds=1,
            signals={"share_lelv": lelv, "share_helv": 0.0, "share_lehv": 0.5, "share_hehv": 0.0},
        )
        for item, tokens, lelv in [(0, 30, 0.1), (1, 10, 0.5)]
    ]  # fmt: skip
    chosen = choose(found, tuning)["chance"].parameters
    assert chosen.pop("entropix_constants") == (
        '{"experiments.shares.lelv": 0.2, "experiments.shares.helv": 0.0, "experiments.shares.lehv": 0.5, '
        '"experiments.shares.hehv": 0.0}'
    )
    assert chosen == tuned
    with pytest.raises(ConfigError, match="takes the shares of regimes of regimes, but no answer"):
        choose(found, [answer.model_copy(update={"signals": {}}) for answer in tuning])


def test_an_arm_that_forks_as_often_as_another_isnt_the_best_one():
    forks = {"sampler": "temperature", "fixed": {"entropix_forks": 4, "entropix_fork_entropy": 1}}
    of_study = described("http://127.0.0.1:1/v1", plugin=True)
    found = Study.model_validate(
        {
            **of_study,
            "samplers": {
                **of_study["samplers"],
                "chance": {**forks, "ranges": {"entropix_fork_share": [0.1, 1]}, "as_many_forks_as": "forks"},
                "forks": forks,
                "three": {"majority_of": "warm", "votes": 3},
                "warm": {"fixed": {"temperature": 1}, "draws": 6},
            },
        }
    )

    def answer(sampler, configuration, correct, forks):
        return Answer(
            model="stub", phase="tuning", sampler=sampler, configuration=configuration, task="sums", item="0", draw=0, seed=0,
            parameters={}, text="", finish_reason="stop", tokens=10, answer="1", correct=correct, seconds=0.1,
            signals={} if forks is None else {"forks": forks},
        )  # fmt: skip

    tuning = [answer("forks", 0, True, 2.5), answer("chance", 0, True, 1.0), answer("chance", 1, False, 3.0)]
    chosen = choose(found, [*tuning, answer("chance", 2, True, None), answer("warm", 0, True, None)])
    assert (chosen["chance"].configuration, chosen["chance"].accuracy) == (1, 0.0)
    assert chosen["chance"].parameters["entropix_fork_share"] == found.parameters("chance")[1]["entropix_fork_share"]
    assert chosen["warm"].parameters == {"temperature": 1}
    assert "three" not in chosen


def test_an_arm_that_forks_as_often_as_another_is_tuned_with_it(tmp_path):
    with endpoint(solving) as (url, _):
        of_study = described(url)
        of_study["samplers"]["often"] = {"ranges": {"temperature": [0.1, 1.9]}, "as_many_forks_as": "greedy"}
        run(Study.model_validate(of_study), tmp_path, CONSOLE, Only(sampler="often"))
    assert Counter(answer.sampler for answer in read(tmp_path) if answer.phase == "tuning") == {"greedy": 4, "often": 12}


def test_a_majority_asks_for_nothing(tmp_path):
    with endpoint(solving) as (url, asked):
        of_study = described(url)
        of_study["samplers"] |= {
            "warm": {"fixed": {"temperature": 1}, "draws": 6},
            "three": {"majority_of": "warm", "votes": 3},
        }
        found = Study.model_validate(of_study)
        assert run(found, tmp_path, CONSOLE) == len(asked) == TUNING + TEST + 4 + 6 * 7
        assert "three" not in {answer.sampler for answer in read(tmp_path)}
        with pytest.raises(ConfigError, match="three is a majority of warm's answers and asks for none; name that one"):
            run(found, tmp_path, CONSOLE, Only(sampler="three"))
    told = CliRunner().invoke(app, ["bench", "report", str(tmp_path)])
    assert told.exit_code == 0, told.output


def test_results_can_be_read_compressed(tmp_path):
    import gzip

    with endpoint(solving) as (url, _):
        run(study(url), tmp_path, CONSOLE)
    before = keys(tmp_path)
    (tmp_path / f"{ANSWERS}.gz").write_bytes(gzip.compress((tmp_path / ANSWERS).read_bytes()))
    (tmp_path / ANSWERS).unlink()
    assert keys(tmp_path) == before
    with pytest.raises(ConfigError, match="give the folder that"):
        next(read(tmp_path / "nothing"))


def test_the_size_of_a_study_is_told_without_asking(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(tomli_w.dumps(described("http://127.0.0.1:1/v1")))
    ended = CliRunner().invoke(app, ["bench", str(path), "-o", str(tmp_path / "none"), "--check"])
    assert ended.exit_code == 0, ended.output
    assert f"{TUNING + TEST} answers" in " ".join(ended.output.split())
    assert not (tmp_path / "none").exists()


SERVER = """
import json, sys, threading
from pathlib import Path
sys.path.insert(0, {root!r})
from http.server import ThreadingHTTPServer
from tests.support import openai_endpoint
arguments = sys.argv[1:]
Path({started!r}).open("a").write(json.dumps(arguments) + "\\n")
print("a line of the log", flush=True)
if "--broken" in arguments:
    sys.exit(3)
port = int(arguments[arguments.index("--port") + 1])
openai_endpoint.ThreadingHTTPServer = lambda address, handler: ThreadingHTTPServer(("127.0.0.1", port), handler)
with openai_endpoint.endpoint(lambda body: openai_endpoint.chat("Answer: 1")):
    threading.Event().wait()
"""


def answers(port):
    """Does somebody listen there?"""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.fixture
def starts(tmp_path, monkeypatch):
    """Servers that a study starts are ours, and this gives the arguments of each."""
    script, started = tmp_path / "serve.py", tmp_path / "started.jsonl"
    script.write_text(SERVER.format(root=str(ROOT), started=str(started)))
    monkeypatch.setattr("vllm_entropix.bench.endpoint._SERVE", (sys.executable, str(script)))
    return lambda: [json.loads(line) for line in started.read_text().splitlines()]


def test_a_server_is_kept_while_the_same_is_wanted_and_ends_with_the_study(tmp_path, starts):
    data = described("http://127.0.0.1:1/v1")
    data["models"] = {"served": {"path": str(tmp_path), "arguments": ["--dtype", "bfloat16"]}}
    data["samplers"]["odd"] = {"sampler": "entropix", "server": {"regimes": False}}
    run(Study.model_validate(data), tmp_path / "results", CONSOLE)
    # Plain, odd; the test split begins with the one that is up: odd, plain.
    configs = [json.loads(arguments[arguments.index("--sampler-config") + 1]) for arguments in starts()]
    # The preset is named, or a server would run with a calibration that somebody keeps.
    plain = {"preset": DEFAULT_PRESET}
    assert configs == [plain, {**plain, "regimes": False}, plain]
    assert all(arguments[0] == str(tmp_path) and arguments[-2:] == ["--dtype", "bfloat16"] for arguments in starts())
    assert "a line of the log" in (tmp_path / "results" / "server.log").read_text()
    ports = [int(arguments[arguments.index("--port") + 1]) for arguments in starts()]
    assert not any(map(answers, ports))


HOLDING = """
import sys, time
from pathlib import Path
from vllm_entropix.bench import endpoint
from vllm_entropix.bench.study import ModelSettings
endpoint._SERVE = (sys.executable, sys.argv[1])
with endpoint.served("m", ModelSettings(path=sys.argv[2]), {}, Path(sys.argv[2]) / "log") as url:
    print(url, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("killed", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_ends_with_a_study_that_is_killed(tmp_path, starts, killed):
    command = [sys.executable, "-c", HOLDING, str(tmp_path / "serve.py"), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        port = int(process.stdout.readline().rpartition(":")[2].partition("/")[0])
        assert answers(port)
        process.send_signal(killed)
    deadline = time.monotonic() + 20
    while answers(port):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_model_that_cant_be_served_is_one_sentence(tmp_path, starts):
    def served(**model):
        return Study.model_validate({**described(""), "models": {"broken": model}})

    with pytest.raises(ConfigError, match=r"models.broken can't be served: vLLM ended with status 3; .*server.log says why"):
        run(served(path=str(tmp_path), arguments=["--broken"]), tmp_path / "results", CONSOLE)
    with pytest.raises(ConfigError, match=r"models.broken.path is '/nowhere/at/all', which isn't there; give a model's folder"):
        run(served(path="/nowhere/at/all"), tmp_path / "others", CONSOLE)
