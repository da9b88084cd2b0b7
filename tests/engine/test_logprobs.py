"""Log-probabilities: raw ones are the model's, processed ones are the distribution that was drawn from."""

import pytest
import torch

from tests.support.engine import adapter_of, engine, generate
from vllm_entropix import traces

pytestmark = [pytest.mark.engine, pytest.mark.both_runners]

PROMPT = "The quick brown fox"
TRACED = {"entropix_trace": "on"}


def params(**settings):
    from vllm import SamplingParams

    return SamplingParams(**{"max_tokens": 16, "ignore_eos": True, **settings})


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_logprobs(tiny, mode, monkeypatch):
    llm = engine(tiny, sampler="entropix", logprobs_mode=mode, max_logprobs=512)
    # What a GPU has: memory for the logits of one row and a half, until its token is drawn.
    monkeypatch.setattr(adapter_of(llm).batch, "lent", (torch.empty(3 * 512 // 2),))
    [with_them, without] = generate(
        llm, [PROMPT] * 2, [params(seed=3, logprobs=512, extra_args=TRACED), params(seed=3, extra_args=TRACED)]
    )
    assert list(with_them.outputs[0].token_ids) == list(without.outputs[0].token_ids)
    completion = with_them.outputs[0]
    for position, record in zip(completion.logprobs, traces(with_them)[0], strict=True):
        logprobs = torch.tensor([value.logprob for value in position.values()], dtype=torch.float64)
        probabilities = logprobs.exp()
        if mode == "raw_logprobs":  # the model's own, untouched by the transform
            entropy = -(probabilities * logprobs).sum() / torch.log(torch.tensor(2.0))
            assert entropy.item() == pytest.approx(record.entropy, abs=1e-3)
        else:  # the distribution that was drawn from
            assert int((probabilities > 0).sum()) <= record.top_k
            assert probabilities.sum().item() == pytest.approx(1.0, abs=1e-4)
    if mode == "raw_logprobs":
        for token, position, record in zip(completion.token_ids, completion.logprobs, traces(with_them)[0], strict=True):
            assert position[token].logprob == pytest.approx(record.logprob, abs=1e-4)
    drawn = [position[token].logprob for position, token in zip(completion.logprobs, completion.token_ids, strict=True)]
    assert all(value > -50 for value in drawn)
