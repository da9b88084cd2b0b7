"""Every endpoint of vLLM's server that draws tokens: traces come back, and settings are read or refused.

Through the clients that people use: openai, anthropic and litellm.
"""

import json
import os
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import anthropic
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.engine import close_engine, engine
from tests.support.server import run_vllm, serve
from vllm_entropix.client import ASK, StreamTraces, trace_of
from vllm_entropix.demo_model import shipped_model
from vllm_entropix.observability.tracefile import read_traces

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # read when it is imported; otherwise it asks the network for prices
import litellm

pytestmark = pytest.mark.engine

MESSAGES = [{"role": "user", "content": "What is 24 + 17?"}]
BOUND = 150
OPTIONS = ("--sampler", "entropix", "--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(1 << 28))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("endpoints")


@pytest.fixture(scope="module")
def url(folder):
    close_engine()
    settings = {"trace": {"path": str(folder / "traces.jsonl"), "response_tokens": BOUND}}
    own = ("--served-model-name", "demo", "--max-model-len", "512", "--enable-scale-out")
    options = (*own, "--logprobs-mode", "processed_logprobs", "--sampler-config", json.dumps(settings))
    with serve(shipped_model(), folder / "log", *OPTIONS, *options) as url:
        yield url


@pytest.fixture
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def claude(url):
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)


def post(url, path, body):
    """(status, text) of what a server answers to JSON."""
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def ids(trace):
    return [entry.token_id for entry in trace.tokens]


def test_batches_of_chats(url):
    questions = [MESSAGES, [{"role": "user", "content": "Hi"}]]
    status, text = post(url, "/v1/chat/completions/batch", {"messages": questions, "max_tokens": 20, "seed": 1, **ASK})
    choices = json.loads(text)["choices"]
    alone = [
        json.loads(post(url, "/v1/chat/completions", {"messages": one, "max_tokens": 20, "seed": 1, **ASK})[1])["choices"][0]
        for one in questions
    ]
    assert status == 200
    assert [ids(trace_of(choice)) for choice in choices] == [ids(trace_of(choice)) for choice in alone]
    assert [choice["message"]["content"] for choice in choices] == [choice["message"]["content"] for choice in alone]


def test_responses_plain_and_streamed(client):
    ask = {"model": "demo", "input": "What is 24 + 17?", "max_output_tokens": 40, "extra_body": {**ASK, "seed": 1}}
    answer = client.responses.create(**ask)
    trace = trace_of(answer)
    assert len(trace.tokens) == answer.usage.output_tokens
    streamed, usage = StreamTraces(), None
    for event in client.responses.create(**ask, stream=True):
        streamed.add(event)
        usage = event.response.usage if event.type in ("response.completed", "response.incomplete") else usage
    assert ids(streamed[0]) == ids(trace)
    assert usage.output_tokens == len(trace.tokens)


def test_messages_plain_and_streamed(claude):
    ask = {"model": "demo", "messages": MESSAGES, "max_tokens": 40, "extra_body": {**ASK, "top_k": 1}}
    answer = claude.messages.create(**ask)
    trace = trace_of(answer)
    assert len(trace.tokens) == answer.usage.output_tokens
    streamed = StreamTraces()
    for event in claude.messages.create(**ask, stream=True):
        streamed.add(event)
    assert len(streamed[0].tokens) > 0
    assert "entropix" not in answer.content[0].text


@pytest.mark.parametrize("n", [1, 2])
def test_generate_plain_and_streamed(url, n):
    tokens = {"token_ids": [894, 895], "model": "demo"}
    sampled = {"max_tokens": 12, "seed": 3, "n": n, "ignore_eos": True, "extra_args": {"entropix_trace": 1}}
    status, text = post(url, "/inference/v1/generate", {**tokens, "sampling_params": sampled})
    assert status == 200, text
    choices = json.loads(text)["choices"]
    assert [ids(trace_of(choice)) for choice in choices] == [choice["token_ids"] for choice in choices]
    status, text = post(url, "/inference/v1/generate", {**tokens, "sampling_params": sampled, "stream": True})
    streamed = StreamTraces()
    for line in text.splitlines():
        if line.startswith("data: {"):
            streamed.add(json.loads(line.removeprefix("data: ")))
    assert [ids(streamed[index]) for index in range(n)] == [choice["token_ids"] for choice in choices]


def test_scores_where_there_are_no_choices_and_of_token_ids(client, claude, url):
    """At the end of a stream, and of all that was drawn."""
    scored = {"vllm_xargs": {"entropix_scores": 1}}
    responses = {"model": "demo", "input": "What is 24 + 17?", "max_output_tokens": 30, "extra_body": {**scored, "seed": 1}}
    messages = {"model": "demo", "messages": MESSAGES, "max_tokens": 30, "extra_body": {**scored, "top_k": 1}}
    for create, ask in ((client.responses.create, responses), (claude.messages.create, messages)):
        answer, streamed = create(**ask), StreamTraces()
        told = trace_of(answer)
        assert (told.tokens, told.scores.tokens) == ([], answer.usage.output_tokens)
        with_scores = []
        for event in create(**ask, stream=True):
            streamed.add(event)
            with_scores += [event.type] if trace_of(event) is not None else []
        assert len(with_scores) == 1
        assert streamed[0].scores.entropy_mean == pytest.approx(told.scores.entropy_mean, rel=1e-3)
    sampled = {"max_tokens": 12, "seed": 3, "ignore_eos": True, "extra_args": {"entropix_scores": 1}}
    body = {"token_ids": [894, 895], "model": "demo", "sampling_params": sampled}
    status, text = post(url, "/inference/v1/generate", body)
    assert status == 200, text
    assert trace_of(json.loads(text)["choices"][0]).scores.tokens == 12


def test_answers_that_fork(client, claude):
    story = [{"role": "user", "content": "Tell me a story about a brave fox called Finn."}]
    forks = {"entropix_forks": 3, "entropix_fork_entropy": 0.3}
    asked, all_asked = ({"vllm_xargs": {**forks, **more}} for more in ({}, {"entropix_fork_select": "all"}))
    answer = client.responses.create(model="demo", input=story, max_output_tokens=40, extra_body=asked)
    message = claude.messages.create(model="demo", messages=story, max_tokens=40, extra_body=asked)
    for one in (answer, message):
        told = trace_of(one).forks
        assert len(told) > 1
        assert one.usage.output_tokens == sum(branch.tokens for branch in told)
    # All branches are choices, and what they share counts once.
    several = client.chat.completions.create(model="demo", messages=story, max_tokens=40, extra_body=all_asked)
    trees = [trace_of(choice).forks for choice in several.choices]
    assert len(trees) == len(trees[0]) > 1
    assert sorted(branch.id for tree in trees for branch in tree if branch.chosen) == list(range(len(trees)))
    assert several.usage.completion_tokens == sum(branch.tokens for branch in trees[0])
    assert several.usage.completion_tokens_details.entropix_pruned_tokens == 0
    for refused in (
        lambda: client.responses.create(model="demo", input=story, max_output_tokens=4, extra_body=all_asked),
        lambda: claude.messages.create(model="demo", messages=story, max_tokens=4, extra_body=all_asked),
    ):
        with pytest.raises((openai.BadRequestError, anthropic.BadRequestError), match="whose answers have no choices"):
            refused()


def test_litellm_and_the_helper_of_openai(client, url):
    ask = {"messages": MESSAGES, "max_tokens": 40, "seed": 2, "extra_body": ASK}
    expected = ids(trace_of(client.chat.completions.create(model="demo", **ask).choices[0]))
    through = {"model": "hosted_vllm/demo", "api_base": f"{url}/v1", "api_key": "none", **ask}
    assert ids(trace_of(litellm.completion(**through).choices[0])) == expected
    traces = StreamTraces()
    for chunk in litellm.completion(**through, stream=True):
        traces.add(chunk)
    assert ids(traces[0]) == expected
    helped = StreamTraces()
    with client.chat.completions.stream(model="demo", **ask) as events:
        for event in events:
            helped.add(event)
    assert ids(helped[0]) == expected


def test_what_is_not_traced_is_vllms_own(url):
    for path, body in (
        ("/v1/responses", {"input": "a", "max_output_tokens": 2}),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 2, "model": "demo"}),
        ("/v1/chat/completions/batch", {"messages": [MESSAGES], "max_tokens": 2}),
        ("/inference/v1/generate", {"token_ids": [5], "sampling_params": {"max_tokens": 2}}),
    ):
        for stream in (False, True) if "batch" not in path else (False,):
            status, text = post(url, path, {**body, "stream": stream} if stream else body)
            assert status == 200, text
            assert "entropix" not in text, path


WRONG = {"entropix_top_p": 7}
BODIES = {
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/chat/completions/batch": {"messages": [MESSAGES]},
    "/v1/responses": {"input": "a"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 2, "model": "demo"},
    "/inference/v1/generate": {"token_ids": [5], "sampling_params": {"max_tokens": 2}},
    "/generative_scoring": {"query": "a", "items": ["b"], "label_token_ids": [5]},
}
STREAMS = [path for path in BODIES if path not in ("/v1/chat/completions/batch", "/generative_scoring")]


@pytest.mark.parametrize(("path", "stream"), [(path, False) for path in BODIES] + [(path, True) for path in STREAMS])
def test_settings_are_read_or_refused_with_400(url, path, stream):
    body = {**BODIES[path], **({"stream": True} if stream else {})}
    place = {"/inference/v1/generate": "sampling_params.extra_args", "/generative_scoring": "takes no settings"}
    misplaced = [
        {"entropix_trace": 1},
        {"entropix": {"trace": 1}},
        {"entropix.trace": 1},
        {"metadata": {"entropix_trace": "1"}},
        {"samplers": "min_p"},
        {"top_n_sigma": 1},
        {"extra_body": ASK},
    ]
    if path in place:
        misplaced.append(ASK)
    for wrong in misplaced:
        status, text = post(url, path, {**body, **wrong})
        assert status == 400, (wrong, text)
        message = json.loads(text)["error"]["message"]
        assert place.get(path, "vllm_xargs") in message, wrong
        assert "\n" not in message
    if path == "/inference/v1/generate":
        body["sampling_params"] = {"max_tokens": 2, "extra_args": WRONG}
    elif path != "/generative_scoring":
        body["vllm_xargs"] = WRONG
    else:
        return
    status, text = post(url, path, body)
    assert (status, "entropix_top_p is 7" in text) == (400, True), text


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"vllm_xargs": {"entropix": "off", "entropix_trace": "on"}}, "entropix is off for this request"),
        ({"use_beam_search": True, "n": 2, **ASK}, "beam search"),
        ({"use_beam_search": True, "n": 2, "vllm_xargs": {"entropix_colour": 1}}, "entropix_colour"),
    ],
)
def test_what_contradicts_itself_is_refused(url, body, told):
    status, text = post(url, "/v1/completions", {"prompt": "a", "max_tokens": 3, **body})
    assert (status, told in text) == (400, True), text


def test_a_trace_that_nobody_would_fetch_is_refused(url):
    status, text = post(url, "/v1/responses", {"input": "a", "background": True, "store": True, **ASK})
    assert (status, "entropix_trace can't be had with background" in text) == (400, True), text


@pytest.mark.parametrize("stream", [False, True])
def test_the_bound_of_a_response_is_told(client, stream):
    """All choices together; the tokens themselves all come."""
    ask = {"model": "demo", "prompt": "Once upon a time", "n": 4, "max_tokens": 50, "seed": 1, "stream": stream, "logprobs": 1}
    answer = client.completions.create(**ask, extra_body={**ASK, "ignore_eos": True})
    if stream:
        traces = StreamTraces()
        for chunk in answer:
            traces.add(chunk)
        found = [traces[index] for index in range(4)]
    else:
        assert [len(choice.logprobs.tokens) for choice in answer.choices] == [50] * 4
        found = [trace_of(choice) for choice in answer.choices]
    assert sum(len(trace.tokens) for trace in found) == BOUND
    assert [len(trace.tokens) + trace.not_kept for trace in found] == [50] * 4
    assert {trace.bound for trace in found if trace.not_kept} == {"trace.response_tokens"}
    assert all(trace.bound is None for trace in found if not trace.not_kept)


def metrics(url):
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(one.name, *one.labels.values()): one.value for one in samples if one.name.startswith("entropix_")}


def test_requests_that_vllm_makes_are_left_alone(url, folder):
    """With processed log-probabilities, scores and beams would otherwise be read from entropix's distributions."""
    time.sleep(0.6)  # counted, and written, a few times a second
    before, lines = metrics(url), len(list(read_traces(folder / "traces.jsonl")))
    scored = {"query": "Is this a word:", "items": [" fox", " xof"], "label_token_ids": [5, 600]}
    status, text = post(url, "/generative_scoring", scored)
    assert status == 200, text
    status, text = post(url, "/v1/completions", {"prompt": "a", "max_tokens": 5, "n": 2, "use_beam_search": True})
    assert status == 200, text
    assert len({choice["text"] for choice in json.loads(text)["choices"]}) == 2
    time.sleep(0.6)
    assert metrics(url) == before
    assert len(list(read_traces(folder / "traces.jsonl"))) == lines


def test_many_at_once_keep_their_own_traces(client):
    def one(index):
        answer = client.chat.completions.create(
            model="demo", messages=MESSAGES, max_tokens=10 + index, seed=index, logprobs=True, extra_body=ASK
        )
        return len(trace_of(answer.choices[0]).tokens), len(answer.choices[0].logprobs.content)

    with ThreadPoolExecutor(16) as pool:
        for traced, drawn in pool.map(one, range(16)):
            assert traced == drawn


def test_run_batch(tmp_path):
    body = {"model": "demo", "messages": MESSAGES, "max_tokens": 8}
    bodies = [{**body, **ASK}, {**body, "vllm_xargs": WRONG}, {**body, "entropix_trace": 1}, body]
    lines = [
        {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": one}
        for number, one in enumerate(bodies)
    ]
    asked, answered = tmp_path / "asked.jsonl", tmp_path / "answered.jsonl"
    asked.write_text("\n".join(map(json.dumps, lines)))
    options = ("--model", str(shipped_model()), "--served-model-name", "demo", "--max-model-len", "256")
    ended = run_vllm("run-batch", "-i", str(asked), "-o", str(answered), *options, *OPTIONS)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = {one["custom_id"]: one for one in map(json.loads, answered.read_text().splitlines())}
    traced = found["0"]["response"]["body"]
    assert len(trace_of(traced["choices"][0]).tokens) == traced["usage"]["completion_tokens"]
    assert "entropix_top_p is 7" in json.dumps(found["1"]["error"])
    assert "go into vllm_xargs" in json.dumps(found["2"]["error"])
    assert "entropix" not in json.dumps(found["3"])


def test_beams_are_vllms(tiny, tmp_path):
    from vllm.sampling_params import BeamSearchParams

    def beams(**options):
        llm = engine(tiny, logprobs_mode="processed_logprobs", **options)
        found = llm.beam_search([{"prompt": "The quick brown fox"}], BeamSearchParams(beam_width=3, max_tokens=6))
        return [(beam.tokens, beam.cum_logprob) for beam in found[0].sequences]

    path = tmp_path / "traces.jsonl"
    traced = {"trace": {"path": str(path), "default": True}}
    assert beams(sampler="entropix", sampler_config=traced) == beams()
    close_engine()
    assert not path.exists() or not path.read_text()
