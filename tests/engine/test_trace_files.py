"""Traces on disk of real engines: offline, over HTTP, on a disk that is full."""

import concurrent.futures
import copy
import dataclasses
import json
import pickle
import resource
import stat
import subprocess
import sys
import time
import tracemalloc
import urllib.request

import cloudpickle
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoTokenizer

from tests.support.dashboards import metric_names
from tests.support.engine import close_engine, engine, generate, scheduler_of
from tests.support.server import generate_in_process, serve
from vllm_entropix.client import ASK, StreamTraces, trace_of
from vllm_entropix.demo_model import shipped_model
from vllm_entropix.observability import disk
from vllm_entropix.observability.tracefile import read_traces
from vllm_entropix.records.fields import names
from vllm_entropix.records.line import prompt_hash
from vllm_entropix.settings.errors import ConfigError

pytestmark = pytest.mark.engine

TRACED = {"entropix_trace": "on"}


def written(path):
    """Lines of a file, once everything that finished has been written."""
    for writer in disk.writers():
        writer.flush()
    return list(read_traces(path))


@pytest.fixture(scope="module")
def traced(tiny, tmp_path_factory):
    """An engine that writes traces, and where."""
    path = tmp_path_factory.mktemp("traces") / "traces.jsonl"
    return engine(
        tiny, sampler="entropix", sampler_config={"trace": {"path": str(path), "max_tokens": 20, "prompts": True}}
    ), path


def test_a_line_per_traced_sequence(traced):
    from vllm import SamplingParams

    llm, path = traced
    shared = {"max_tokens": 8, "ignore_eos": True, "seed": 3}
    params = [
        SamplingParams(**shared, extra_args=TRACED),
        SamplingParams(**shared),
        SamplingParams(**shared, n=2, extra_args={**TRACED, "entropix_preset": "torch-2024-10"}),
        SamplingParams(**{**shared, "max_tokens": 30}, extra_args=TRACED),
        SamplingParams(**shared, detokenize=False, extra_args=TRACED),
    ]
    outputs = generate(llm, ["The quick brown fox", "a", "0123", "long", "no texts"], params)
    lines = {(line.request_id, line.index): line for line in written(path)}
    sequences = [(output, completion) for number, output in enumerate(outputs) if number != 1 for completion in output.outputs]
    assert set(lines) == {(output.request_id, completion.index) for output, completion in sequences}
    for output, completion in sequences:
        line = lines[output.request_id, completion.index]
        assert line.token_ids == list(completion.token_ids)
        assert line.finish_reason == completion.finish_reason == "length"
        assert line.prompt_hash == prompt_hash(output.prompt_token_ids)
        assert line.prompt_tokens == len(output.prompt_token_ids)
        assert line.prompt == output.prompt
        assert [entry.model_dump() for entry in line.records] == [
            {**record.to_dict(), "token_id": token, "alternatives": list(record.alternatives)}
            for token, record in zip(completion.token_ids, completion.entropix_trace, strict=False)
        ]
        if output is not outputs[4]:
            # vLLM keeps the bytes of an unfinished character back.
            assert "".join(line.texts).removesuffix("\ufffd") == completion.text
    assert lines[outputs[2].request_id, 1].sampler.preset == "torch-2024-10"
    assert lines[outputs[2].request_id, 1].sampler.thresholds.helv.entropy_above == 3.0
    assert lines[outputs[0].request_id, 0].sampler.preset == "jax-2024-10"
    assert lines[outputs[3].request_id, 0].not_kept == 10
    assert set(lines[outputs[4].request_id, 0].texts) == {""}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_line_per_branch_of_an_answer_that_forked(traced):
    from vllm import SamplingParams

    llm, path = traced
    written(path)
    before = len(list(read_traces(path, branches=True)))
    forks = {"entropix_forks": 3, "entropix_fork_entropy": 0.3, "entropix_fork_horizon": 4}
    params = SamplingParams(max_tokens=18, ignore_eos=True, seed=3, extra_args={**TRACED, **forks})
    [output] = generate(llm, ["Once upon a time"], [params])
    answer = written(path)[-1]
    lines = list(read_traces(path, branches=True))[before:]
    tree = output.outputs[0].entropix_forks.branches
    assert len(tree) > 1
    assert [line.branch for line in lines] == tree
    assert {(line.request_id, line.index) for line in lines} == {(output.request_id, 0)}
    assert [line for line in lines if line.is_answer] == [answer]
    assert answer.forks == tree
    assert answer.token_ids == list(output.outputs[0].token_ids)
    assert answer.finish_reason == "length"
    for line in lines:
        branch = line.branch
        assert len(line.token_ids) == branch.position + branch.tokens
        assert (line.finish_reason == "pruned") == (branch.pruned_at is not None)
        assert len(line.records) == len(line.token_ids)
        if branch.parent is not None:
            assert line.token_ids[branch.position] == branch.token
            assert line.token_ids[: branch.position] == lines[branch.parent].token_ids[: branch.position]


def nothing_allowed(tokenizer):
    """What a client can ask for that leaves no token a finite logit."""
    token = tokenizer.encode("a", add_special_tokens=False)[0]
    return [
        {"allowed_token_ids": [token], "bad_words": [tokenizer.decode([token])], "ignore_eos": True},
        {"allowed_token_ids": [tokenizer.eos_token_id], "min_tokens": 4},
    ]


def test_rows_without_a_finite_logit_spoil_no_file(traced):
    from vllm import SamplingParams

    llm, path = traced
    before = len(written(path))
    params = [SamplingParams(max_tokens=5, extra_args=TRACED, **asked) for asked in nothing_allowed(llm.get_tokenizer())]
    outputs = generate(llm, ["a"] * len(params), params)
    for line in path.read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=pytest.fail)
    lines = {line.request_id: line for line in written(path)[before:]}
    for output in outputs:
        [completion] = output.outputs
        first, *_ = completion.entropix_trace
        assert first.entropy is None
        assert json.loads(json.dumps(first.to_dict(), allow_nan=False))["entropy"] is None
        assert [entry.entropy for entry in lines[output.request_id].records] == [
            record.entropy for record in completion.entropix_trace
        ]
    assert all(line.records for line in lines.values())


def test_outputs_are_values(traced, tmp_path):
    """They go through pickle, copies and other processes, and what comes out is equal."""
    from vllm import SamplingParams

    llm, _ = traced
    params = SamplingParams(max_tokens=30, n=2, ignore_eos=True, seed=1, extra_args=TRACED)
    [output] = generate(llm, ["abc"], [params])
    for again in (
        pickle.loads(pickle.dumps(output)),
        cloudpickle.loads(cloudpickle.dumps(output)),
        copy.deepcopy(output),
        copy.copy(output),
    ):
        assert again.outputs == output.outputs
        for one, other in zip(again.outputs, output.outputs, strict=True):
            assert list(one.entropix_trace) == list(other.entropix_trace)
            assert (len(one.entropix_trace), one.entropix_trace.not_kept) == (20, 10)
    changed = dataclasses.replace(output.outputs[0], text="changed")
    assert changed.entropix_trace == output.outputs[0].entropix_trace
    assert changed != output.outputs[0]
    assert repr(output.outputs[0]).startswith("CompletionOutput(index=0")
    path = tmp_path / "output"
    path.write_bytes(cloudpickle.dumps(output))
    script = "import pickle, sys; [print(*c.entropix_trace, sep='\\n') for c in pickle.load(open(sys.argv[1], 'rb')).outputs]"
    told = subprocess.run([sys.executable, "-c", script, path], check=True, timeout=420, capture_output=True, text=True).stdout
    assert told.splitlines()[-40:] == [str(record) for completion in output.outputs for record in completion.entropix_trace]


def test_a_full_disk_doesnt_stop_the_engine(traced):
    from vllm import SamplingParams

    llm, path = traced
    before = len(written(path))
    [writer] = [writer for writer in disk.writers() if writer.path == path]
    params = SamplingParams(max_tokens=8, ignore_eos=True, extra_args=TRACED)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
        [output] = generate(llm, ["a"], [params])
        writer.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(output.outputs[0].entropix_trace) == 8
    assert writer.dropped == 1
    generate(llm, ["b"], [params])
    assert len(written(path)) == before + 1


def test_a_client_cant_say_where(traced):
    from vllm import SamplingParams

    llm, _ = traced
    for settings, named in (
        ({"entropix_trace_path": "/tmp/elsewhere"}, "entropix_trace_path"),
        ({"kv_transfer_params": {"entropix_written": {"trace": {"path": "/tmp/elsewhere"}}}}, "entropix_written"),
    ):
        with pytest.raises(ValueError, match=named):
            generate(llm, ["a"], [SamplingParams(max_tokens=2, extra_args={**TRACED, **settings})])


def test_memory_per_traced_token(traced):
    """Records stay bytes: what thousands of traced outputs hold grows by the size of a record per token."""
    from vllm import SamplingParams

    llm, _ = traced
    params = SamplingParams(max_tokens=16, ignore_eos=True, seed=1, extra_args=TRACED)

    def held(requests):
        tracemalloc.start()
        outputs = generate(llm, ["abc"] * requests, [params] * requests)
        taken = sum(sys.getsizeof(output.outputs[0].entropix_trace._data) for output in outputs)
        tracemalloc.stop()
        return taken / (16 * requests)

    record = 4 * (len(names()) + 2 * 5)
    assert record <= held(200) <= 1.5 * record
    # Nothing of requests that ended stays in the engine.
    assert len(scheduler_of(llm)._entropix_sent) <= 200
    generate(llm, ["abc"], [SamplingParams(max_tokens=2)])
    assert len(scheduler_of(llm)._entropix_sent) == 0


def test_traces_that_wait_are_written_when_the_process_ends(tiny, tmp_path):
    close_engine()
    path = tmp_path / "traces.jsonl"
    requests = [["The quick brown fox", {"max_tokens": 5, "ignore_eos": True}]] * 3
    arguments = {"additional_config": {"entropix": {"trace": {"path": str(path), "default": True}}}}
    results = generate_in_process(tiny, arguments, requests, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert [line.token_ids for line in read_traces(path)] == [result["token_ids"] for result in results]


def test_a_path_that_cant_be_written_is_refused_before_the_engine_starts(tiny):
    with pytest.raises(ConfigError, match=r"^traces can't be written to trace.path /nowhere/traces.jsonl: No such file"):
        engine(tiny, sampler="entropix", sampler_config={"trace": {"path": "/nowhere/traces.jsonl"}})


def metrics(url):
    """Samples on /metrics, by name and labels."""
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture(scope="module")
def two_servers(tmp_path_factory):
    """Two API servers in front of one engine, and the folder of their traces."""
    close_engine()
    folder = tmp_path_factory.mktemp("servers")
    (folder / "traces").mkdir()
    config = f'{{"trace": {{"path": "{folder}/traces/traces.jsonl", "default": true}}, "base": {{"source": "request"}}}}'
    arguments = ["--served-model-name", "demo", "--max-model-len", "512", "--enforce-eager", "--dtype", "float32"]
    arguments += ["--kv-cache-memory-bytes", str(1 << 28), "--api-server-count", "2"]
    arguments += ["--sampler", "entropix", "--sampler-config", config]
    with serve(shipped_model(), folder / "log", *arguments) as url:
        yield url, folder / "traces"


def test_two_api_servers_count_and_write_what_their_traces_say(two_servers):
    url, folder = two_servers

    def one(index):
        # A client each, so that connections spread over both servers.
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        traces = StreamTraces()
        ask = {"model": "demo", "prompt": f"What is in the sealed box? {index}", "max_tokens": 20, "seed": index}
        for chunk in client.completions.create(**ask, stream=True, extra_body=ASK):
            traces.add(chunk)
        return traces[0].tokens

    before = metrics(url)
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        traces = list(pool.map(one, range(48)))
    entries = [entry for tokens in traces for entry in tokens]
    time.sleep(1.5)  # written and counted a few times a second
    after = metrics(url)

    def grown(*name):
        return after[name] - before.get(name, 0)

    for regime in ("LELV", "HELV", "LEHV", "HEHV", "ADAPTIVE"):
        assert grown("entropix_tokens_total", regime) == sum(entry.regime == regime for entry in entries), regime
    assert grown("entropix_entropy_bits_count") == len(entries)
    assert grown("entropix_entropy_bits_sum") == pytest.approx(sum(entry.entropy for entry in entries), rel=1e-4)
    assert grown("entropix_attention_entropy_bits_count") == len(entries)
    assert grown("entropix_requests_total", "jax-2024-10", "no") == 48
    assert grown("entropix_trace_lines_written_total") == 48
    assert after["entropix_trace_lines_dropped_total",] == 0
    lines = [line for path in sorted(folder.iterdir()) for line in read_traces(path)]
    assert sorted(line.token_ids for line in lines) == sorted([entry.token_id for entry in tokens] for tokens in traces)
    assert {line.model for line in lines} == {"demo"}
    # Both served, each into its own file.
    assert [path.name for path in sorted(folder.iterdir()) if path.stat().st_size] == ["traces-1.jsonl", "traces.jsonl"]


def test_a_server_may_take_base_parameters_from_its_clients(two_servers):
    url, _ = two_servers
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    def drawn(temperature, top_p, **base):
        answer = client.completions.create(
            model="demo",
            prompt="What is in the sealed box? 1",
            max_tokens=20,
            seed=1,
            temperature=temperature,
            top_p=top_p,
            extra_body={"vllm_xargs": {"entropix_trace": "on", **base}},
        )
        return [(entry.token_id, round(entry.temperature, 3)) for entry in trace_of(answer.choices[0]).tokens]

    assert drawn(0.3, 0.6) == drawn(0.3, 0.6, entropix_base="request")
    assert drawn(0.3, 0.6) != drawn(0.6, 0.6)
    assert drawn(0.3, 0.6, entropix_base="preset") == drawn(1.2, 1.0, entropix_base="preset")
    assert drawn(0.3, 0.6) != drawn(0.3, 0.6, entropix_base="preset")


def test_answers_fork_behind_two_api_servers(two_servers):
    """Each server has answers of its own in the one engine: all are whole, counted in one place and written by either."""
    url, folder = two_servers
    forks = {"entropix_forks": 4, "entropix_fork_entropy": 0.3, "entropix_clarification": "off"}

    def one(index):
        # A client each, so that connections spread over both servers.
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        answer = client.completions.create(
            model="demo", prompt="Once upon a time", max_tokens=40, seed=index, extra_body={"vllm_xargs": forks}
        )
        return trace_of(answer.choices[0]).forks, answer.usage

    def sizes():
        return {path.name: path.stat().st_size for path in folder.iterdir()}

    before, written = metrics(url), sizes()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(one, range(24)))
    time.sleep(1.5)  # written and counted a few times a second
    after = metrics(url)
    for tree, usage in answers:
        assert usage.completion_tokens == sum(branch.tokens for branch in tree)
    grown = {name: after[name] - before.get(name, 0) for name in after if name[0].startswith("entropix_fork")}
    parted = [{(branch.parent, branch.position) for branch in tree[1:]} for tree, _ in answers]
    assert grown[("entropix_forks_total",)] == sum(map(len, parted)) > 0
    chosen = [branch for tree, _ in answers for branch in tree if branch.chosen]
    assert grown[("entropix_fork_tokens_total", "committed")] == sum(branch.position + branch.tokens for branch in chosen) > 0
    assert after[("entropix_branches_live",)] == 0
    assert all(size > written[name] for name, size in sizes().items())


@pytest.mark.parametrize("stream", [False, True])
def test_answers_without_a_finite_logit_are_json(two_servers, stream):
    url, folder = two_servers
    for asked in nothing_allowed(AutoTokenizer.from_pretrained(shipped_model())):
        body = {"model": "demo", "prompt": "a", "max_tokens": 5, "stream": stream, **ASK, **asked}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        text = urllib.request.urlopen(request).read().decode()
        events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")] if stream else [text]
        answers = [json.loads(event, parse_constant=pytest.fail) for event in events]
        entries = [entry for answer in answers for choice in answer["choices"] for entry in choice["entropix"]["tokens"]]
        assert entries[0]["entropy"] is None
        saved = folder.parent / "answer"
        saved.write_text(text, encoding="utf-8")
        [line] = read_traces(saved)
        assert [entry.token_id for entry in line.records] == [entry["token_id"] for entry in entries]
    time.sleep(1.5)  # written a few times a second
    for path in folder.iterdir():
        for line in path.read_text(encoding="utf-8").splitlines():
            json.loads(line, parse_constant=pytest.fail)


def test_every_metric_of_the_dashboard_and_the_alerts_is_exported(two_servers):
    url, _ = two_servers
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    client.completions.create(model="demo", prompt="a", max_tokens=3)
    time.sleep(0.6)  # counted a few times a second
    assert metric_names() - {name for name, *_ in metrics(url)} == set()
