"""The bars of tests/gpu let the rounding of right code pass, and show statistics of a wrong row; drafts are told apart."""

from types import SimpleNamespace

import pytest
import torch

from tests.gpu.modes import HALF_BARS, TF32_BARS
from tests.support.dense import METRICS, Dense, assert_equal_to_dense, assert_within, of_kept_tokens, prompt, relative_errors
from tests.support.models import MILD, tiny_llama
from vllm_entropix.sampling import AttentionStatistics

PROMPTS = [prompt(length, length) for length in (15, 70, 200)]


def half(dense):
    dense.model.half()


def tf32(dense):
    """Queries and keys as tensor cores take float32: with ten bits."""

    def rounded(module, arguments, output):
        return ((output.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    for name, module in dense.model.named_modules():
        if name.endswith(("q_proj", "k_proj")):
            module.register_forward_hook(rounded)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("mild"), head_dim=64, **MILD)


@pytest.mark.parametrize(("rounding", "bars"), [(half, HALF_BARS), (tf32, TF32_BARS)])
def test_bars(folder, rounding, bars):
    exact, rounded = Dense(folder), Dense(folder)
    rounding(rounded)
    runs = [(exact.run(tokens), rounded.run(tokens)) for tokens in PROMPTS]
    for metric in METRICS:
        assert_within(torch.cat([relative_errors(got[metric], want[metric]).flatten() for want, got in runs]), bars, metric)
        of_the_row_before = [relative_errors(got[metric][:, :-1], want[metric][:, 1:]).flatten() for want, got in runs]
        with pytest.raises(AssertionError, match=metric):
            assert_within(torch.cat(of_the_row_before), bars, metric)


def test_rows_of_rejected_drafts_are_left_out(folder):
    dense, before, answer = Dense(folder), prompt(6, 1), [10, 11, 12, 13, 14]
    outputs = [SimpleNamespace(request_id="0", prompt_token_ids=before, outputs=[SimpleNamespace(token_ids=answer)])]

    def step(kept, drafts):
        """What is observed of a step's rows: the last kept token's, and one of each draft."""
        text = [*before, *answer[:kept], *drafts]
        lengths = torch.arange(len(text) - len(drafts), len(text) + 1)
        found = dense.run(text)
        return ["0-af"] * len(lengths), lengths, AttentionStatistics(*(found[metric][:, lengths - 1] for metric in METRICS))

    # None of three drafts is kept, then one of two, and then one that ends the answer.
    per_layer = [step(0, []), step(1, [90, 91, 92]), step(2, [12, 93]), step(4, [14])]
    assert assert_equal_to_dense(outputs, of_kept_tokens(outputs, per_layer), dense) == len(answer)
    with pytest.raises(AssertionError):
        assert_equal_to_dense(outputs, per_layer, dense)
    per_layer[-1][2].agreement[0, 0] += 0.01
    with pytest.raises(AssertionError, match="agreement"):
        assert_equal_to_dense(outputs, of_kept_tokens(outputs, per_layer), dense)
