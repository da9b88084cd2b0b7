"""The ring by position, as any sampler's state: what is decided again is written again, and a fork continues as its parent."""

import pytest
import torch

from vllm_entropix.rows.state import PositionRing


def ring(slots=4, draft_tokens=0):
    return PositionRing((0.5, -1.0), torch.float32, slots, draft_tokens)


def step(state, slot, position, valid=True):
    """A state that depends on all positions before it; what was read."""
    slots, positions = torch.tensor([slot]), torch.tensor([position])
    before = state.read(slots, positions - 1)
    state.write(slots, positions, before * 0.9 + position, torch.tensor([valid]))
    return before[0].tolist()


def test_a_state_follows_its_positions():
    state = ring()
    assert step(state, 1, 7) == [0.5, -1.0]
    assert step(state, 1, 8) == pytest.approx([0.5 * 0.9 + 7, -0.9 + 7])
    assert step(state, 2, 8) == [0.5, -1.0]


def test_what_is_decided_again_or_thrown_away_leaves_no_trace():
    state, plain = ring(draft_tokens=3), ring(draft_tokens=3)
    for position in (3, 4, 5, 6):  # 5 and 6 are drafts that are rejected
        step(state, 1, position)
    step(state, 1, 5, valid=False)
    for position in (3, 4, 5, 6):
        step(plain, 1, position)
    for position in (5, 6, 7):
        assert step(state, 1, position) == step(plain, 1, position)


def test_a_slot_begins_anew_and_the_ring_grows():
    state = ring()
    step(state, 1, 7)
    kept = state.records[1].clone()
    state.grow(9)
    assert state.slots == 9
    assert torch.equal(state.records[1], kept)
    assert step(state, 8, 3) == [0.5, -1.0]
    state.forget(1)
    assert step(state, 1, 8) == [0.5, -1.0]


def test_a_fork_continues_as_its_parent():
    parent, child = ring(), ring(slots=7)
    for position in range(3, 9):
        step(parent, 2, position)
    child.from_bytes(5, parent.to_bytes(2))
    for position in range(9, 14):
        assert step(child, 5, position) == step(parent, 2, position)


def test_a_position_may_repeat_the_one_before():
    state = ring()
    for position in (3, 4, 5):
        step(state, 1, position)
    wanted, other = state.read(torch.tensor([1]), torch.tensor([4])), state.records[2].clone()
    state.repeat(1, 5)
    assert torch.equal(state.read(torch.tensor([1]), torch.tensor([5])), wanted)
    assert torch.equal(state.read(torch.tensor([1]), torch.tensor([4])), wanted)
    assert torch.equal(state.records[2], other)
    state.repeat(1, 9)  # of whose predecessor nothing is known
    assert state.read(torch.tensor([1]), torch.tensor([9]))[0].tolist() == [0.5, -1.0]


def test_bytes_of_many_are_those_of_each():
    state = ring()
    for slot, position in ((1, 3), (1, 4), (2, 9)):
        step(state, slot, position)
    told = state.as_bytes(torch.tensor([2, 0, 1, 1]))
    assert told.shape == (4, state.nbytes)
    assert [bytes(row.numpy()) for row in told] == [state.to_bytes(slot) for slot in (2, 0, 1, 1)]


def test_bytes_of_another_ring_are_refused():
    with pytest.raises(ValueError, match="doesn't fit"):
        ring().from_bytes(1, ring(draft_tokens=1).to_bytes(1))
