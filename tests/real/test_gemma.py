"""Gemma-3-270M in bfloat16: sliding windows in all but every sixth layer, and a vocabulary of 262144."""

from pathlib import Path

import pytest
import torch

from tests.support import dense as dense_attention
from tests.support.dense import METRICS, Dense, errors_to_dense, observed, statistics_of_positions
from tests.support.engine import adapter_of, engine, generate
from vllm_entropix import traces

pytestmark = pytest.mark.engine

VOCABULARY, WINDOW, TOKENS = 262144, 512, 4
# A text longer than the window.
TEXT = (Path(__file__).parents[2] / "docs" / "semantics.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def llm(gemma):
    """Observed in all layers."""
    settings = {"attention": {"layers": "all"}}
    return engine(gemma, sampler="entropix", sampler_config=settings, dtype="bfloat16", max_model_len=1024)


def test_attention_follows_windows(llm, gemma, monkeypatch):
    prompt = llm.get_tokenizer().encode(TEXT)[: WINDOW + 100]
    outputs, per_layer = observed(llm, [prompt], max_tokens=2)
    windows = [layer.sliding_window for _, layer in sorted(adapter_of(llm).observer.layers.items())]
    assert len(windows) == 18
    assert {window for window in windows if window} == {WINDOW}
    assert windows.count(None) == 3
    dense = Dense(gemma)
    errors = errors_to_dense(outputs, per_layer, dense)
    # The engine computes in bfloat16, and what is compared with in float32: layers drift apart by percents.
    for metric in METRICS:
        assert float(errors[metric].median()) < 0.05, metric
        assert float(errors[metric].quantile(0.9)) < 0.2, metric
    # Attention over all of the text is another: what was observed is farther from it.
    monkeypatch.setattr(dense_attention, "statistics_of_positions", lambda scores, _: statistics_of_positions(scores, None))
    windowed = [index for index, window in enumerate(windows) if window]
    of_all = errors_to_dense(outputs, per_layer, dense)
    assert errors["attention_entropy"][:, windowed].mean() < of_all["attention_entropy"][:, windowed].mean()


def test_a_large_vocabulary(llm):
    """Drawn by entropix, without filters, and by vLLM."""
    from vllm import SamplingParams

    traced = {"entropix_trace": "on"}
    common = {"max_tokens": TOKENS, "ignore_eos": True, "seed": 2, "logprobs": 5}
    params = [
        SamplingParams(temperature=0.7, extra_args=traced, **common),
        SamplingParams(temperature=1.0, extra_args={**traced, "samplers": "min_p"}, **common),
        SamplingParams(temperature=0.0, extra_args=traced, **common),
    ]
    outputs = generate(llm, ["The quick brown fox jumps over the lazy"] * 3, params)
    assert outputs[0].prompt_token_ids[0] == llm.get_tokenizer().bos_token_id
    assert outputs[2].outputs[0].text.startswith(" dog")
    for output in outputs:
        [records], [completion] = traces(output), output.outputs
        assert len(records) == TOKENS
        for record, token, position in zip(records, completion.token_ids, completion.logprobs, strict=True):
            assert 0 <= token < VOCABULARY
            assert record.logprob == pytest.approx(position[token].logprob, abs=2e-3)
            likeliest = sorted(position.items(), key=lambda one: -one[1].logprob)[:5]
            shown = [probability for _, probability in record.alternatives]
            assert shown == pytest.approx(torch.tensor([one.logprob for _, one in likeliest]).exp().tolist(), abs=2e-3)
