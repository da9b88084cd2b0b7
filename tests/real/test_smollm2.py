"""SmolLM2-135M in bfloat16 as users meet it: calibrated, served by what was found, asked in its chat template, shown.

Two starts for all of it: one engine in this process, which the commands are given as well, and one server.
"""

import math
import re
from pathlib import Path

import openai
import pytest
from typer.testing import CliRunner

from tests.support.engine import engine, generate
from tests.support.runners import is_v2
from tests.support.server import serve
from vllm_entropix import scores, traces
from vllm_entropix.cli.main import app
from vllm_entropix.client import StreamTraces, trace_of
from vllm_entropix.samplers.entropix import calibrations
from vllm_entropix.samplers.entropix.settings import DEFAULT_PRESET, EntropixConfig

pytestmark = pytest.mark.engine

# Each half of what a calibration asks has to give 200 tokens: these are answered at length, and side by side.
OPEN = [
    f"{what} {of}"
    for what in ("Tell me a long story about", "Describe a day in the life of", "Explain in detail what people know about")
    for of in ("a fox.", "a king.", "the sea.", "volcanoes.", "bread.", "a clock.", "the moon.", "a garden.")
]
PROMPTS = ["The capital of France is", "Once upon a time there was a fox who"]
FACT = "What is the capital of France?"
CAPITAL = {"model": "smollm2", "messages": [{"role": "user", "content": FACT}], "max_tokens": 24}
SCORED = {"entropix_scores": "on"}
ROOM = 1 << 27  # bytes of KV cache: 5800 tokens


@pytest.fixture(scope="module")
def llm(smollm2):
    """Without a preset it would take up the calibration that is made here; constants are what `calibrate` tries."""
    settings = {"preset": DEFAULT_PRESET, "experiments": {"constants": True}}
    room = {"max_model_len": 1024, "kv_cache_memory_bytes": ROOM}
    return engine(smollm2, sampler="entropix", sampler_config=settings, dtype="bfloat16", max_logprobs=5, **room)


def output_of(llm, *command):
    """What a command prints. It is given our engine: how it starts one of its own is tested with the shipped model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm.LLM", lambda *_, **__: llm)
        ended = CliRunner(env={"COLUMNS": "140"}).invoke(app, list(map(str, command)), catch_exceptions=False)
    assert ended.exit_code == 0, ended.output[-3000:]
    return ended.stdout


@pytest.fixture(scope="module")
def calibrated(llm, smollm2, tmp_path_factory):
    """The settings file that `calibrate` writes, and what it prints."""
    folder = tmp_path_factory.mktemp("calibrated")
    (folder / "prompts.txt").write_text("\n".join(OPEN))
    command = ["calibrate", smollm2, "--prompts", folder / "prompts.txt", "--max-tokens", 20]
    return folder / "found.toml", output_of(llm, *command, "-o", folder / "found.toml")


@pytest.fixture(scope="module")
def server_log(tmp_path_factory):
    return tmp_path_factory.mktemp("server") / "log"


@pytest.fixture(scope="module")
def client(smollm2, calibrated, server_log):
    """Of a server that finds by itself what was calibrated. It measures and chats, streams and scores."""
    settings = ["--sampler", "entropix", "--served-model-name", "smollm2"]
    room = ["--max-model-len", "1024", "--kv-cache-memory-bytes", str(ROOM), "--max-num-seqs", "8"]
    with serve(smollm2, server_log, *settings, *room, "--enforce-eager") as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def scored(choice):
    return trace_of(choice).scores


@pytest.mark.both_runners
def test_records_of_a_real_model(llm):
    from vllm import SamplingParams

    # V2's interpreted kernels take seconds for a token's 49152 logits.
    tokens = 2 if is_v2() else 5
    asked = {"entropix_trace": "on", "entropix_scores": "on"}
    # One of entropix, one whose draw vLLM makes, one that has nothing to do with us.
    drawn = SamplingParams(max_tokens=tokens, seed=1, ignore_eos=True, logprobs=5, extra_args=asked)
    greedy = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, logprobs=5, extra_args=asked)
    off = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, extra_args={"entropix": "off"})
    *told, plain = generate(llm, [PROMPTS[1], PROMPTS[0], PROMPTS[0]], [drawn, greedy, off])
    assert told[1].outputs[0].token_ids == plain.outputs[0].token_ids
    assert "Paris" in plain.outputs[0].text
    for output in told:
        [records], [summed], [completion] = traces(output), scores(output), output.outputs
        assert len(records) == len(completion.token_ids) == summed.tokens == tokens
        logprobs = []
        for index, (record, token, position) in enumerate(zip(records, completion.token_ids, completion.logprobs, strict=True)):
            assert record.logprob == pytest.approx(position[token].logprob, abs=2e-3)
            first, second = sorted((one.logprob for one in position.values()), reverse=True)[:2]
            assert record.margin == pytest.approx(math.exp(first) - math.exp(second), abs=2e-3)
            assert 0 <= record.attention_entropy <= math.log2(len(output.prompt_token_ids) + index) + 1e-3
            logprobs.append(record.logprob)
        assert summed.perplexity == pytest.approx(math.exp(-sum(logprobs) / tokens), rel=1e-4)
        assert summed.entropy_mean == pytest.approx(sum(record.entropy for record in records) / tokens, rel=1e-4)


def test_calibration_finds_borders_of_the_model(smollm2, calibrated):
    file, told = calibrated
    assert "Prompts go through the model's chat template." in told
    found, published = EntropixConfig.from_file(file).thresholds, EntropixConfig().thresholds
    assert found != published
    # Of a real model most tokens are sure, and by far not all.
    assert 0 < found.lelv.entropy_below < 5
    assert f"--sampler-config {file}" in re.sub(r"\s+", " ", told)
    # It is found before the one that ships.
    assert Path(calibrations.find(calibrations.fingerprint(str(smollm2)))).read_text() == file.read_text()


def test_the_demo_asks_what_can_be_checked(llm, smollm2, tmp_path):
    report = tmp_path / "demo.html"
    asked = ["--only", "France", "--only", "sum", "--max-tokens", 20]
    shown = output_of(llm, "demo", "--model", smollm2, *asked, "--report", report)
    assert re.search(r"greedy\s+✓ Paris", shown)
    # Each answer of entropix has its score beside it.
    assert len(re.findall(r"entropix\s+(?:✓|✗ not) \S+\s+mean entropy \d+\.\d\d bits", shown)) == 2
    assert report.stat().st_size > 10_000


def test_the_server_says_which_calibration_it_runs_with(smollm2, client, server_log):
    own = calibrations.fingerprint(str(smollm2))
    assert f"entropix: runs with the calibration {calibrations.find(own)} (fingerprint {own})." in server_log.read_text()


def test_questions_go_through_the_chat_template(smollm2, client):
    from transformers import AutoTokenizer

    answer = client.chat.completions.create(**CAPITAL, temperature=0)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    template = AutoTokenizer.from_pretrained(smollm2).apply_chat_template(
        CAPITAL["messages"], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert answer.usage.prompt_tokens == len(template)


def test_seeded_answers_repeat_and_stream_alike(client):
    ask = {**CAPITAL, "seed": 3}
    whole = client.chat.completions.create(**ask).choices[0].message.content
    chunks = client.chat.completions.create(**ask, stream=True)
    assert whole == "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_tokens_are_traced(client):
    answer = client.chat.completions.create(**CAPITAL, seed=1, logprobs=True, extra_body={"vllm_xargs": {"entropix_trace": 1}})
    [choice] = answer.choices
    tokens = trace_of(choice).tokens
    assert len(tokens) == answer.usage.completion_tokens
    for entry in tokens:
        assert 0 <= entry.entropy <= math.log2(49152)
        assert 0 <= entry.attention_entropy <= math.log2(1024)
        assert entry.regime is not None
        first, second = (probability for _, probability in entry.alternatives[:2])
        assert entry.margin == pytest.approx(first - second, abs=1e-3)


def test_scores_are_those_of_the_models_own_log_probabilities(client):
    ask = {**CAPITAL, "max_tokens": 16, "seed": 2, "logprobs": True, "top_logprobs": 20}
    body = {"vllm_xargs": SCORED, "ignore_eos": True}
    [choice] = client.chat.completions.create(**ask, extra_body=body).choices
    drawn = [entry.logprob for entry in choice.logprobs.content]
    told = scored(choice)
    assert told.tokens == len(drawn) == 16
    assert told.perplexity == pytest.approx(math.exp(-sum(drawn) / len(drawn)), rel=1e-3)
    margins = []
    for entry in choice.logprobs.content:
        first, second, *_ = sorted((math.exp(one.logprob) for one in entry.top_logprobs), reverse=True)
        margins.append(first - second)
    assert told.margin_min == pytest.approx(min(margins), abs=1e-4)
    assert told.entropy_max >= told.entropy_mean > 0
    shares = [told.share_lelv, told.share_helv, told.share_lehv, told.share_hehv, told.share_adaptive]
    assert sum(shares) == pytest.approx(1)
    streamed = StreamTraces()
    for chunk in client.chat.completions.create(**ask, stream=True, extra_body=body):
        streamed.add(chunk)
    assert streamed[0].scores.entropy_mean == pytest.approx(told.entropy_mean, rel=1e-4)


def test_what_nobody_knows_scores_worse_than_a_fact(client):
    """What scores are for, on the plainest case."""
    nonsense = "What did Zorblat Quindlemeyer say to the seventh glimfrit?"
    of_question = {
        text: scored(
            client.chat.completions.create(
                **{**CAPITAL, "messages": [{"role": "user", "content": text}]}, temperature=0, extra_body={"vllm_xargs": SCORED}
            ).choices[0]
        )
        for text in (FACT, nonsense)
    }
    assert of_question[nonsense].entropy_mean > of_question[FACT].entropy_mean
    assert of_question[nonsense].perplexity > of_question[FACT].perplexity
