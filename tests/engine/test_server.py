"""`vllm serve --sampler entropix` on the shipped model, through the official OpenAI client."""

import concurrent.futures
import json
import time
import urllib.request

import openai
import pytest
import tomli_w
import yaml
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from tests.support.browser import chromium, opened
from tests.support.engine import close_engine
from tests.support.server import serve
from vllm_entropix.bench.answers import read
from vllm_entropix.cli.main import app
from vllm_entropix.client import ASK, StreamTraces, trace_of
from vllm_entropix.demo_model import shipped_model
from vllm_entropix.samplers.entropix.presets import preset_names

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    close_engine()
    folder = tmp_path_factory.mktemp("server")
    # The sampler's options stand in vLLM's own YAML file.
    config = folder / "serve.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "sampler": "entropix",
                "sampler-config": {"clarification": {"text": " ... hmm, which one?"}, "attention": {"layers": "all"}},
                "served-model-name": "demo",
                "max-model-len": 512,
                "enforce-eager": True,
                "kv-cache-memory-bytes": 1 << 28,
                "dtype": "float32",
            }
        )
    )
    with serve(shipped_model(), folder / "log", "--config", str(config)) as url:
        yield url


@pytest.fixture
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_completion_and_stream_give_the_same(client):
    ask = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 30, "seed": 5}
    whole = client.completions.create(**ask).choices[0].text
    assert whole
    assert whole == "".join(chunk.choices[0].text for chunk in client.completions.create(**ask, stream=True))
    opted_out = client.completions.create(**ask, extra_body={"vllm_xargs": {"entropix": "off"}}).choices[0].text
    assert opted_out != whole


def test_chat_and_stream_give_the_same(client):
    ask = {"model": "demo", "messages": [{"role": "user", "content": "What is 24 + 17?"}], "max_tokens": 80, "seed": 1}
    whole = client.chat.completions.create(**ask).choices[0].message.content
    assert "41" in whole
    chunks = client.chat.completions.create(**ask, stream=True)
    assert whole == "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_a_small_study_through_the_server(url, tmp_path):
    """`vllm-entropix bench` and its report: one task, 20 items, four samplers."""
    study = {
        "name": "Sums, by four samplers",
        "configurations": 2,
        "draws": 2,
        "concurrency": 16,
        "models": {"demo": {"endpoint": f"{url}/v1", "served_name": "demo"}},
        "tasks": {"sums": {"kind": "arithmetic", "tuning": 4, "test": 16, "max_tokens": 40, "options": {"operations": "+"}}},
        "samplers": {
            "greedy": {"fixed": {"temperature": 0}},
            "min_p": {"sampler": "min_p", "ranges": {"temperature": [0.2, 1.5], "min_p": [0.05, 0.3]}},
            "entropix": {"sampler": "entropix", "ranges": {"entropix_temperature": [0.2, 1.0]}},
            "forks": {"sampler": "temperature", "fixed": {"temperature": 1.0, "entropix_forks": 3, "entropix_fork_entropy": 0}},
        },
    }
    path, results = tmp_path / "study.toml", tmp_path / "results"
    path.write_text(tomli_w.dumps(study))
    ended = CliRunner().invoke(app, ["bench", str(path), "-o", str(results)])
    assert ended.exit_code == 0, ended.output
    answers = list(read(results))
    assert len(answers) == 4 * (1 + 2 + 2 + 1) + 16 * (1 + 2 + 2 + 2)
    assert all(answer.text and answer.finish_reason in ("stop", "length") for answer in answers)
    regimes = [answer.signals for answer in answers if (answer.phase, answer.sampler) == ("test", "entropix")]
    assert any(signals.get("temperature_mean", 0) > 0 for signals in regimes)
    # Tokens of answers that fork are those of all branches.
    forked = [answer for answer in answers if answer.sampler == "forks"]
    assert any(answer.signals["forks"] for answer in forked)
    assert any(answer.tokens > 40 for answer in forked if answer.signals["forks"])
    assert all(answer.tokens <= 40 for answer in forked if not answer.signals["forks"])
    # Seeds are the study's, and greedy's answer has none: asked again, they say the same.
    again = CliRunner().invoke(app, ["bench", str(path), "-o", str(tmp_path / "again"), "--sampler", "greedy"])
    assert again.exit_code == 0, again.output
    texts = {answer.key: answer.text for answer in answers}
    assert all(texts[answer.key] == answer.text for answer in read(tmp_path / "again"))
    told = CliRunner().invoke(app, ["bench", "report", str(results)])
    assert told.exit_code == 0, told.output
    with chromium() as browser, opened(browser, results / "report.html") as page:
        assert page.locator(".chart .main-svg").count() >= 3


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"entropix_colour": 1}, "unknown setting 'entropix_colour'"),
        ({"entropix": "sometimes"}, "entropix is 'sometimes', but it should be on or off"),
        ({"entropix_top_p": 1.5}, "entropix_top_p is 1.5"),
        ({"entropix_top_k": 0}, "entropix_top_k is 0"),
        ({"entropix_top_k": True}, "entropix_top_k is True, but it should be a number"),
        ({"entropix.trace": "on"}, "did you mean 'entropix_trace'?"),
        ({"entropix_preset": "x" * 1_000_000}, "entropix_preset is 'xxx"),
        ({"entropix_preset": "llama"}, ", ".join(sorted({*preset_names()} - {"signals"}))),
        ({"entropix_abstain_above": 1}, "entropix_abstain_above is given without entropix_abstain_score"),
        ({"entropix_abstain_score": "luck", "entropix_abstain_above": 1}, "entropix_abstain_score is 'luck'"),
        ({"entropix_scores": "on", "entropix": "off"}, "entropix_scores is on, but entropix is off"),
    ],
)
def test_wrong_settings_are_answered_with_400(client, settings, named):
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="demo", prompt="a", max_tokens=2, extra_body={"vllm_xargs": settings})
    assert named in refused.value.message
    assert client.completions.create(model="demo", prompt="a", max_tokens=2).choices[0].text


def test_thirty_two_at_once_with_mixed_settings(client):
    settings = [
        {},
        {"entropix": "off"},
        {"entropix_preset": "torch-2024-10"},
        {"entropix_base": "request"},
        {"entropix_clarification": 0},
        {"entropix_trace": 1},
        {"entropix_temperature": 0.3, "entropix_top_k": 10},
        {"entropix_nonsense": 1},
    ]

    def one(index):
        ask = {
            "model": "demo",
            "prompt": f"Once upon a time there was a fox. Number {index}",
            "max_tokens": 24,
            "seed": index,
            "temperature": 0.0 if index % 5 == 0 else 0.8,
            "stream": index % 2 == 1,
            "extra_body": {"vllm_xargs": settings[index % len(settings)]},
        }
        try:
            answer = client.completions.create(**ask)
            if ask["stream"]:
                chunks = list(answer)
                return "".join(chunk.choices[0].text for chunk in chunks), chunks[-1].choices[0].finish_reason
        except openai.APIError as error:  # with status 400, or as an event in a stream
            return error
        return answer.choices[0].text, answer.choices[0].finish_reason

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        first = list(pool.map(one, range(32)))
    for index, result in enumerate(first):
        if index % len(settings) == 7:
            assert isinstance(result, openai.APIError), index
            assert "entropix_nonsense" in result.message
        else:
            text, reason = result
            assert text, index
            assert reason in ("stop", "length"), index
    # Seeded requests give the same in another crowd.
    assert one(2) == first[2]


TOLD = {"entropy", "varentropy", "attention_entropy", "attention_varentropy", "agreement", "interaction_strength"}


def numbers(trace):
    return [(entry.token_id, entry.regime, entry.forced, entry.temperature) for entry in trace.tokens]


def test_traces_of_completions(client):
    ask = {"model": "demo", "prompt": "What is in the sealed box?", "max_tokens": 12, "seed": 1, "n": 2, "extra_body": ASK}
    answer = client.completions.create(**ask, logprobs=1)
    plain = client.completions.create(**{**ask, "extra_body": {}}, logprobs=1)
    for choice, untraced in zip(answer.choices, plain.choices, strict=True):
        trace = trace_of(choice)
        assert trace_of(untraced) is None
        assert choice.text == untraced.text
        assert len(trace.tokens) == len(choice.logprobs.tokens)
        assert trace.not_kept == 0
        for entry in trace.tokens:
            assert all(getattr(entry, metric) is not None for metric in TOLD)
            assert len(entry.alternatives) == 5
            assert entry.alternatives[0][1] >= entry.alternatives[1][1]
    streamed = StreamTraces()
    for chunk in client.completions.create(**ask, stream=True):
        streamed.add(chunk)
    for index, choice in enumerate(answer.choices):
        assert numbers(streamed[index]) == numbers(trace_of(choice))


def test_traces_of_chats(client):
    ask = {
        "model": "demo",
        "messages": [{"role": "user", "content": "What is 24 + 17?"}],
        "max_tokens": 60,
        "seed": 2,
        "n": 2,
        "extra_body": ASK,
    }
    answer = client.chat.completions.create(**ask)
    streamed = StreamTraces()
    for chunk in client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        streamed.add(chunk)
        usage = chunk.usage
    lengths = [len(trace_of(choice).tokens) for choice in answer.choices]
    assert sum(lengths) == answer.usage.completion_tokens == usage.completion_tokens
    for index, choice in enumerate(answer.choices):
        assert numbers(streamed[index]) == numbers(trace_of(choice))


FORKS = {"entropix_forks": 4, "entropix_fork_entropy": 0.3, "entropix_clarification": "off"}


def test_answers_that_fork_and_clients_that_leave(client, url):
    ask = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 60, "seed": 5}
    forked = {**ask, "extra_body": {"vllm_xargs": FORKS}}
    before = metrics(url)
    whole = client.completions.create(**forked)
    [choice] = whole.choices
    *chunks, last = client.completions.create(**forked, stream=True, stream_options={"include_usage": True})
    assert choice.text == "".join(chunk.choices[0].text for chunk in chunks)
    # The branches are told, and all their tokens counted.
    trees = [trace_of(choice).forks, trace_of(chunks[-1].choices[0]).forks]
    pruned = 0
    for told, usage in zip(trees, (whole.usage, last.usage), strict=True):
        assert len(told) > 1
        assert [branch.position + branch.tokens for branch in told if branch.chosen] == [60]
        assert usage.completion_tokens == sum(branch.tokens for branch in told)
        assert usage.completion_tokens_details.entropix_pruned_tokens == usage.completion_tokens - 60
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        pruned += usage.completion_tokens - 60
    after = metrics(url)
    grown = {name: after[name] - before.get(name, 0) for name in after if name[0].startswith("entropix_fork")}
    forks = [len({(branch.parent, branch.position) for branch in told[1:]}) for told in trees]
    assert grown[("entropix_forks_total",)] == sum(forks)
    assert grown[("entropix_fork_tokens_total", "committed")] == 2 * 60
    assert grown[("entropix_fork_tokens_total", "pruned")] == pruned
    assert after[("entropix_branches_live",)] == 0
    # All at once, beside others.
    plain = {**ask, "extra_body": {"vllm_xargs": {"entropix_clarification": "off"}}}
    alone = client.completions.create(**plain).choices[0].text
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        futures = [pool.submit(client.completions.create, **(forked if number % 2 else plain)) for number in range(16)]
        texts = [future.result().choices[0].text for future in futures]
    assert texts[::2] == [alone] * 8
    # Whoever leaves takes all branches along, a stream's reader and one who waits for all.
    long = {**forked, "max_tokens": 400}
    with client.completions.with_streaming_response.create(**long, stream=True):
        time.sleep(0.5)
        assert running(url) > 1
    assert_soon_idle(url)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).completions.create(**long)
    assert_soon_idle(url)


def assert_soon_idle(url):
    deadline = time.monotonic() + 10
    while running(url) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert running(url) == 0
    assert metrics(url)[("entropix_branches_live",)] == 0


def test_branches_that_lose_in_the_step_they_begin_in_are_never_run(client, url):
    # The first fork spends the budget: its branches are compared at once, and the engine is told of the loss of some before it
    # could be told of them.
    spent = {**FORKS, "entropix_fork_width": 5, "entropix_fork_budget": 1}
    more = {"ignore_eos": True, "vllm_xargs": spent}
    ask = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 400, "seed": 5}
    with client.completions.create(**ask, extra_body=more, stream=True) as chunks:
        for _ in range(60):  # of which some fork: see the test above
            next(chunks)
        assert running(url) == 1
    whole = client.completions.create(**{**ask, "max_tokens": 60}, extra_body=more).choices[0]
    assert len(trace_of(whole).forks) > 1
    assert_soon_idle(url)


def running(url):
    """Sequences that the engine runs."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return next(family.samples[0].value for family in families if family.name == "vllm:num_requests_running")


def test_several_prompts_in_one_request(client):
    answer = client.completions.create(
        model="demo", prompt=["Once upon", "What is 2 + 3?"], max_tokens=5, n=2, seed=3, logprobs=1, extra_body=ASK
    )
    assert [len(trace_of(choice).tokens) for choice in answer.choices] == [len(c.logprobs.tokens) for c in answer.choices]


SCORED = {"entropix_scores": "on"}


def test_scores_of_completions_and_chats_streamed_or_not(client):
    completion = {"model": "demo", "prompt": "What is in the sealed box?", "max_tokens": 12, "seed": 1, "n": 2}
    chat = {"model": "demo", "messages": [{"role": "user", "content": "What is 24 + 17?"}], "max_tokens": 20, "seed": 2}
    for create, ask in ((client.completions.create, completion), (client.chat.completions.create, chat)):
        traced = create(**ask, extra_body={"vllm_xargs": {**SCORED, "entropix_trace": 1}}).choices
        scored = create(**ask, extra_body={"vllm_xargs": SCORED}).choices
        streamed, chunks = StreamTraces(), list(create(**ask, stream=True, extra_body={"vllm_xargs": SCORED}))
        for chunk in chunks:
            streamed.add(chunk)
            for choice in chunk.choices:
                # Where the choice ends, and nowhere else: all other chunks are vLLM's own.
                assert (trace_of(choice) is not None) == (choice.finish_reason is not None)
        for index, (with_trace, alone) in enumerate(zip(traced, scored, strict=True)):
            tokens = [entry for entry in trace_of(with_trace).tokens if not entry.forced]
            told = trace_of(with_trace).scores
            assert told.tokens == len(tokens)
            assert told.entropy_mean == pytest.approx(sum(entry.entropy for entry in tokens) / len(tokens), rel=1e-5)
            assert told.perplexity >= 1
            for other in (trace_of(alone), streamed[index]):
                assert other.tokens == []
                assert other.scores.entropy_mean == pytest.approx(told.entropy_mean, rel=1e-4)
                assert other.scores.abstained is None


def test_an_answer_that_abstains_says_so_in_three_places(client, url):
    ask = {"model": "demo", "prompt": "What is in the sealed box?", "max_tokens": 8, "seed": 1}
    time.sleep(0.5)
    before = metrics(url)
    for bound, abstains in ((0.0, True), (1000, False)):
        settings = {"entropix_abstain_score": "entropy_max", "entropix_abstain_above": bound}
        raw = client.completions.with_raw_response.create(**ask, extra_body={"vllm_xargs": settings})
        [choice] = raw.parse().choices
        assert raw.headers["x-entropix-abstained"] == ("true" if abstains else "false")
        assert choice.stop_reason == ("entropix_abstain" if abstains else None)
        assert choice.finish_reason == "length"
        assert trace_of(choice).scores.abstained is abstains
        *_, last = client.completions.create(**ask, stream=True, extra_body={"vllm_xargs": settings})
        assert last.choices[0].stop_reason == ("entropix_abstain" if abstains else None)
    plain = client.completions.with_raw_response.create(**ask, extra_body={"vllm_xargs": SCORED})
    assert "x-entropix-abstained" not in plain.headers
    after = metrics(url)
    assert after[("entropix_abstained_answers_total",)] - before[("entropix_abstained_answers_total",)] == 2
    name = ("entropix_answer_entropy_max_bits_count",)
    assert after[name] - before.get(name, 0) == 5


def metrics(url):
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    values = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("entropix_"):
                values[(sample.name, *sorted(sample.labels.values()))] = sample.value
    return values


def test_metrics_equal_the_sum_of_the_traces(client, url):
    """Under 64 concurrent streams, what /metrics counts is what the traces say."""
    time.sleep(0.5)
    before = metrics(url)

    def one(index):
        traces = StreamTraces()
        settings = {"entropix_trace": 1} if index % 4 else {"entropix_trace": 1, "entropix_preset": "torch-2024-10"}
        for chunk in client.completions.create(
            model="demo",
            prompt=f"What is in the sealed box? {index}",
            max_tokens=20,
            seed=index,
            stream=True,
            extra_body={"vllm_xargs": settings},
        ):
            traces.add(chunk)
        return traces[0].tokens

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        entries = [entry for tokens in pool.map(one, range(64)) for entry in tokens]
    off = {"model": "demo", "prompt": "a", "max_tokens": 3, "extra_body": {"vllm_xargs": {"entropix": "off"}}}
    client.completions.create(**off)
    client.completions.create(**off, temperature=0)
    time.sleep(0.6)  # counted a few times a second
    after = metrics(url)

    def grown(*name):
        return after[name] - before.get(name, 0)

    for regime in ("LELV", "HELV", "LEHV", "HEHV", "ADAPTIVE"):
        assert grown("entropix_tokens_total", regime) == sum(entry.regime == regime for entry in entries), regime
    assert grown("entropix_forced_tokens_total") == sum(entry.forced for entry in entries)
    assert grown("entropix_entropy_bits_count") == len(entries)
    assert grown("entropix_entropy_bits_sum") == pytest.approx(sum(entry.entropy for entry in entries), rel=1e-4)
    assert grown("entropix_varentropy_bits2_count") == len(entries)
    assert grown("entropix_attention_entropy_bits_count") == len(entries)
    assert grown("entropix_logits_only_tokens_total") == 0
    # by preset, and by whether the request is greedy
    assert grown("entropix_requests_total", "no", "torch-2024-10") == 16
    assert grown("entropix_requests_total", "jax-2024-10", "no") == 48
    assert grown("entropix_requests_total", "no", "off") == grown("entropix_requests_total", "off", "yes") == 1


def test_without_a_trace_the_body_is_vllms_own(client):
    raw = client.completions.with_raw_response.create(model="demo", prompt="a", max_tokens=2).http_response.text
    assert "entropix" not in raw
    assert json.loads(raw)["kv_transfer_params"] is None
