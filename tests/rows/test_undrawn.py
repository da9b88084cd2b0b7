"""What a record tells of the token that was drawn: completed after the draw, of the logits that the sampler has overwritten."""

import numpy as np
import pytest
import torch

from vllm_entropix.records.fields import column, names
from vllm_entropix.rows.batch import BatchSampler
from vllm_entropix.rows.rows import Rows
from vllm_entropix.rows.table import Sequence
from vllm_entropix.rows.undrawn import room
from vllm_entropix.samplers.entropix.settings import EntropixConfig
from vllm_entropix.samplers.observed import VLLM

VOCABULARY = 40
BASE = (0.7, 0.9, float(VOCABULARY), 0.0)


def step(*sequences, alternatives=3, counted=False, lent=()):
    """Logits before and after a step with a row for each of these settings of a sequence, its records, and the batch."""
    config = EntropixConfig.from_dict({"trace": {"alternatives": alternatives}})
    batch = BatchSampler(config, 8, None, "cpu", counted=counted)
    batch.lent = tuple(lent)
    for index, settings in enumerate(sequences):
        name = settings.get("sampler", "entropix")
        numbers = [value for _, value in batch.samplers[name].numbers()]
        given = {"sampled": True, "traced": True, "allow_clarification": False, "prompt_length": 1, "base": BASE, **settings}
        batch.add(str(index), Sequence(numbers, **given))
    rows = len(sequences)
    slots = batch.sequences.slots_of(map(str, range(rows)), rows)
    here = torch.arange(rows)
    described = Rows(torch.from_numpy(slots), slots, here + 5, here, here >= 0, here)
    logits = torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 2
    logits[0, 3] = -torch.inf
    written = logits.clone()
    return logits, written, batch.apply(written, described, None), batch


def told(records, name):
    return records[:, 1 + column(name)].tolist()


def tell(batch, drawn, number=None):
    """Tell the batch which token each row drew."""
    batch.drawn(drawn.unsqueeze(-1), number)


@pytest.mark.parametrize("alternatives", [0, 1, 3, 20])
def test_log_probability_and_margin_are_those_of_the_model(alternatives):
    logits, written, records, batch = step({}, {"sampler": "min_p"}, {"sampled": False}, alternatives=alternatives)
    expected = logits.double().log_softmax(dim=-1)
    assert np.isnan(told(records, "logprob")).all(), "nothing is drawn yet"
    drawn = torch.tensor([7, 0, 39], dtype=torch.int32)  # also tokens that the sampler left out
    tell(batch, drawn)
    assert told(records, "logprob") == pytest.approx([float(expected[row, token]) for row, token in enumerate(drawn)], abs=1e-5)
    first, second = expected.exp().topk(2, dim=-1).values.unbind(-1)
    assert told(records, "margin") == pytest.approx((first - second).tolist(), abs=1e-6)
    assert records.shape[1] == 1 + len(names()) + 2 * alternatives
    assert not torch.equal(written[0], logits[0])


def test_a_token_that_is_excluded_has_no_finite_log_probability():
    _, _, records, batch = step({})
    tell(batch, torch.tensor([3]))
    assert told(records, "logprob") == [-np.inf]


@pytest.mark.parametrize("token", [-1, VOCABULARY, 2**31 - 1])
def test_a_row_without_a_token_is_told_nothing(token):
    _, _, records, batch = step({}, {})
    tell(batch, torch.tensor([5, token]), number=torch.tensor([1, 0]))
    assert np.isfinite(told(records, "logprob")).tolist() == [True, False]


def test_rows_that_are_only_counted_have_neither_and_nothing_is_kept_of_them():
    _, _, records, batch = step({"traced": False}, {}, {"traced": False}, {"traced": False, "scored": True}, counted=True)
    [(_, undrawn)] = batch._waiting[0].after_draw
    assert [len(part) for part in undrawn.logits] == [2]
    tell(batch, torch.tensor([1, 2, 3, 4]))
    for name in ("logprob", "margin"):
        assert np.isfinite(told(records, name)).tolist() == [False, True, False, True]
    _, _, records, batch = step({"traced": False}, counted=True)
    assert not batch.waits_for_draw
    assert records is not None


@pytest.mark.parametrize("untraced", [set(), {1, 3}])
@pytest.mark.parametrize(
    ("sizes", "lengths"),
    [
        ((VOCABULARY,), [1, 4]),
        ((VOCABULARY + 1, VOCABULARY - 1, 3 * VOCABULARY - 1), [1, 2, 2]),
        ((2 * VOCABULARY, 9 * VOCABULARY), [2, 3]),
        ((9 * VOCABULARY, VOCABULARY), [5]),
        ((VOCABULARY - 1,), [5]),
    ],
)
def test_kept_logits_lie_in_lent_memory_as_far_as_there_is_room(sizes, lengths, untraced):
    lent = [torch.full((size,), torch.nan) for size in sizes]
    rows = [{"traced": row not in untraced} for row in range(5 + len(untraced))]
    logits, _, records, batch = step(*rows, lent=lent)
    [(_, undrawn)] = batch._waiting[0].after_draw
    assert [len(part) for part in undrawn.logits] == lengths
    beside = len(room(sum(lengths), VOCABULARY, "cpu", lent))
    owners = {memory.untyped_storage().data_ptr() for memory in lent}
    own = [part for part in undrawn.logits if part.untyped_storage().data_ptr() not in owners]
    assert sum(map(len, own)) == beside, "what is measured beforehand is what is allocated"
    tell(batch, torch.arange(len(rows)))
    expected = logits.double().log_softmax(dim=-1)
    for row, got in enumerate(told(records, "logprob")):
        assert np.isnan(got) if row in untraced else got == pytest.approx(float(expected[row, row]), abs=1e-5)


def test_rows_of_nobody_stand_between():
    """On a CPU the rows concerned are worked on apart from the others."""
    logits, written, records, batch = step({}, {"sampled": False, "traced": False}, {})
    assert records.shape[0] == 2
    tell(batch, torch.tensor([4, 5, 6]))
    expected = logits.log_softmax(dim=-1)
    assert told(records, "logprob") == pytest.approx([float(expected[0, 4]), float(expected[2, 6])], abs=1e-5)
    assert torch.equal(written[1], logits[1])


def test_what_vllm_draws_is_left_alone_and_told_of():
    """With rows of other samplers beside it, and alone."""
    for others in ([], [{}, {"sampler": "min_p"}]):
        logits, written, records, batch = step(
            {"sampler": VLLM, "sampled": False}, {"sampler": VLLM, "sampled": False, "base": (0.0, 1.0, 40.0, 0.0)}, *others
        )
        assert torch.equal(written[:2], logits[:2])
        assert [told(records, name)[0] for name in ("temperature", "top_p", "top_k")] == pytest.approx([0.7, 0.9, VOCABULARY])
        assert [told(records, name)[1] for name in ("temperature", "top_p", "top_k")] == [0, 1, 1]
        assert np.isnan([told(records, name)[0] for name in ("regime", "confidence")]).all()
        entropy = torch.distributions.Categorical(logits=logits[0]).entropy() / np.log(2)
        assert told(records, "entropy")[0] == pytest.approx(float(entropy), abs=1e-4)
        tell(batch, torch.full((2 + len(others),), 9))
        assert np.isfinite(told(records, "logprob")).all()


def test_nothing_is_written_where_vllm_draws_all(monkeypatch):
    batch = BatchSampler(EntropixConfig(), 8, None, "cpu")
    monkeypatch.setattr(type(batch.backend), "write", lambda *_: pytest.fail("there is nothing to write"))
    numbers = [value for _, value in batch.samplers[VLLM].numbers()]
    batch.add("a", Sequence(numbers, False, True, False, 1, sampler=VLLM, base=BASE))
    slots = batch.sequences.slots_of(["a"], 1)
    zero = torch.zeros(1, dtype=torch.int64)
    rows = Rows(torch.from_numpy(slots), slots, zero + 5, zero, zero == 0, zero)
    assert batch.apply(torch.randn(1, VOCABULARY), rows, None) is not None
