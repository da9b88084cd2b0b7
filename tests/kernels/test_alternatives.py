"""The CPU kernel of the strongest alternatives against ``torch.topk``."""

import pytest
import torch

from vllm_entropix.kernels.numba_.alternatives import largest_of_rows


def largest(logits, count):
    values, token_ids = torch.empty(len(logits), count), torch.empty(len(logits), count, dtype=torch.int64)
    largest_of_rows(logits.numpy(), logits.logsumexp(-1).numpy(), values.numpy(), token_ids.numpy(), 0, len(logits))
    return values, token_ids


@pytest.mark.parametrize(("rows", "vocabulary", "count"), [(1, 1, 1), (3, 5, 5), (8, 1000, 5), (2, 128_256, 20)])
def test_the_same_as_topk(rows, vocabulary, count):
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0))
    expected = logits.topk(count, dim=-1)
    values, token_ids = largest(logits, count)
    assert torch.equal(values, expected.values)
    assert torch.equal(token_ids, expected.indices)


def test_equal_logits_come_by_ascending_id():
    assert largest(torch.zeros(1, 50), 4)[1].tolist() == [[0, 1, 2, 3]]


def test_masked_tokens_come_last():
    logits = torch.full((1, 40), -torch.inf)
    logits[0, [7, 30]] = torch.tensor([1.0, 2.0])
    values, token_ids = largest(logits, 4)
    assert token_ids[0, :2].tolist() == [30, 7]
    assert values[0, 2:].tolist() == [-torch.inf] * 2


def test_nan_comes_first():
    values, token_ids = largest(torch.tensor([[3.0, torch.nan, -torch.inf, -torch.nan, 5.0]]), 4)
    assert values[0].isnan().tolist() == [True, True, False, False]
    assert token_ids[0].tolist() == [1, 3, 4, 0]
