"""The bars of tests/gpu let the rounding of right code pass, and show statistics of a wrong row."""

import pytest
import torch

from tests.gpu.modes import HALF_BARS, TF32_BARS
from tests.support.dense import METRICS, Dense, assert_within, prompt, relative_errors
from tests.support.models import MILD, tiny_llama

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
