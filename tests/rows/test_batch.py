"""Which samplers are asked in a step, and what becomes of rows of several."""

from functools import partial

import numpy as np
import pytest
import torch

from vllm_entropix.rows import table
from vllm_entropix.rows.batch import BatchSampler
from vllm_entropix.rows.rows import Rows
from vllm_entropix.rows.table import Sequence
from vllm_entropix.samplers.entropix.settings import EntropixConfig

VOCABULARY = 50


def batch_of(*samplers, **settings):
    """A batch with a row per sampler; None is a row of nobody's."""
    batch = BatchSampler(EntropixConfig.from_dict(settings), 8, None, "cpu")
    for index, name in enumerate(samplers):
        if name is not None:
            numbers = [value for _, value in batch.samplers[name].numbers()]
            base = (1.0, 1.0, float(VOCABULARY), 0.0)
            batch.add(str(index), Sequence(numbers, True, False, True, 1, sampler=name, base=base))
    rows = len(samplers)
    slots = batch.sequences.slots_of(map(str, range(rows)), rows)
    here = torch.arange(rows)
    return batch, Rows(torch.from_numpy(slots), np.asarray(slots), here + 5, here, here >= 0, here)


def logits_of(rows):
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 3


def test_a_sampler_without_rows_isnt_asked(monkeypatch):
    """A row that opted out has the slot of nobody, whose sampler is the server's: no plan is made for it."""
    batch, rows = batch_of("min_p", None, "min_p")
    monkeypatch.setattr(batch.samplers["entropix"], "plan", lambda view: pytest.fail("it has no rows"))
    logits = logits_of(3)
    written = logits.clone()
    batch.apply(written, rows, None)
    assert torch.equal(written[1], logits[1])
    assert not torch.equal(written[0], logits[0])


def test_a_batch_is_looked_at_anew_when_a_sequence_begins_or_ends():
    batch, rows = batch_of("min_p", "entropix", None)
    known = partial(batch.sequences.composition, rows.host_slots)
    assert known() is known()
    assert (set(known().samplers), known().all_sampled, known().any_traced) == ({"min_p", "entropix"}, False, False)
    batch.remove("1")
    assert known().samplers == ("min_p",)
    before = known()
    batch.add("another", Sequence([], False, True, True, 1, sampler="vllm", forks=True))  # where the one was
    assert (set(known().samplers), known().any_traced, known().any_forks) == ({"min_p", "vllm"}, True, True)
    assert {told.request_id for told in known().requests.values()} == {"0", "another"}
    # Records of the step before may be on their way.
    assert {told.request_id for told in before.requests.values()} == {"0"}


def test_a_device_knows_of_each_sequence_what_the_host_knows():
    batch, _ = batch_of("min_p", "entropix", "top_n_sigma")
    known, names = batch.sequences, ("numbers", "base", "sampler", "prompt_length", "sampled", "traced", "allow_clarification")
    # A CPU's are the host's own.
    for name in ("device_numbers", "device_base", "_device_integers", "_device_flags"):
        setattr(known, name, torch.zeros_like(getattr(known, name)))
    slots = known.slots_of("012", 3)
    known._send(slots)
    known.device_sampler, known.device_prompt_length = known._device_integers
    known.device_sampled, known.device_traced, known.device_allow_clarification = known._device_flags
    for name in names:
        assert np.array_equal(getattr(known, f"device_{name}").numpy()[slots], getattr(known, name)[slots]), name


def test_arrays_that_go_to_a_device_together_arrive():
    numbers = np.arange(12, dtype=np.float32).reshape(3, 4)
    arrays = (np.array([5, -1, 2**40]), np.arange(6).reshape(3, 2).T, numbers[:, ::2], np.array([[True, False, True]]))
    for array, tensor in zip(arrays, table.unpacked(torch.from_numpy(table.packed(arrays)), arrays), strict=True):
        assert tensor.numpy().dtype == array.dtype
        assert np.array_equal(tensor.numpy(), array)


def test_each_row_is_drawn_as_its_own_sampler_says():
    names = ["min_p", "entropix", "top_n_sigma", None, "entropix"]
    batch, rows = batch_of(*names)
    logits = logits_of(len(names))
    mixed = logits.clone()
    batch.apply(mixed, rows, None)
    for index, name in enumerate(names):
        alone, its_rows = batch_of(name)
        line = logits[index : index + 1].clone()
        alone.apply(line, its_rows, None)
        assert torch.equal(mixed[index], line[0]), name


def test_rows_of_a_study_have_regimes_by_chance():
    settings = {"experiments": {"random_regimes": True, "shares": {"lelv": 1.0}}}
    batch, rows = batch_of("entropix", "min_p", "entropix", **settings)
    written = logits_of(3)
    best = written.argmax(-1)
    batch.apply(written, rows, None)
    kept = [line.isfinite().nonzero().flatten().tolist() for line in written]
    # LELV, whatever the metrics are.
    assert [kept[0], kept[2]] == [[best[0].item()], [best[2].item()]]
    assert len(kept[1]) > 1
