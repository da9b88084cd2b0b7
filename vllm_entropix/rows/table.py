"""What is known of each running sequence: its own constants and switches, by slot."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vllm_entropix.distribution.constants import Constants
from vllm_entropix.distribution.plan import Parameters
from vllm_entropix.samplers.base import Sampler


@dataclass(frozen=True)
class Sequence:
    """Settings of one sequence, as the engine adapter reads them from a request.

    Attributes:
        constants: its sampler's numbers, in the order of :meth:`Sampler.numbers`.
        sampled: drawn by a sampler of ours (False: opted out, or greedy).
        traced: a record per token is wanted, with alternatives.
        allow_clarification: forced tokens are allowed.
        prompt_length: tokens of the prompt; what follows was generated.
        sampler: name of its sampler; None: the server's.
        base: its own temperature, top_p, top_k and min_p.
        scored: is the record per token wanted for scores of the answer?
        forks: may it fork, so that what is remembered of it goes with its records?
        state: what was remembered of the sequence that it parts from; None: it begins anew.
        parted: position under which that one remembers the token in whose place this one has another; 0 where it begins anew.
    """

    constants: list[float]
    sampled: bool
    traced: bool
    allow_clarification: bool
    prompt_length: int
    sampler: str | None = None
    base: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 0.0)
    scored: bool = False
    forks: bool = False
    state: bytes | None = None
    parted: int = 0


class Told(NamedTuple):
    """What the records of a sequence are for, beside being counted.

    Attributes:
        request_id: of the sequence.
        traced: they are returned, with alternatives.
        scored: they are summed up.
        forks: what is remembered of the sequence goes with them.
    """

    request_id: str
    traced: bool
    scored: bool = False
    forks: bool = False


@dataclass(frozen=True)
class Composition:
    """What the host knows of the sequences of a step's rows, whichever rows of theirs are in it.

    Attributes:
        any_sampled: is any of them drawn by a sampler of ours?
        all_sampled: are all?
        any_traced: is a record with alternatives made of any?
        all_traced: of all?
        any_concerned: is any of them sampled or traced?
        all_concerned: are all?
        samplers: names of the samplers of those that are sampled or traced, each once.
        most_candidates: an upper bound of top_k.
        most_drawn: an upper bound of top_k where the best of several draws is kept.
        requests: slot → what its records are for, of those that belong to a sequence.
        any_forks: does what is remembered of any sequence go with its records?
    """

    any_sampled: bool
    all_sampled: bool
    any_traced: bool
    all_traced: bool
    any_concerned: bool
    all_concerned: bool
    samplers: tuple[str, ...]
    most_candidates: int
    most_drawn: int
    requests: Mapping[int, Told]
    any_forks: bool


BASE = ("temperature", "top_p", "top_k", "min_p")
# Batches that are remembered: the parts of a step, and what they were in the steps before.
_REMEMBERED = 8


class SequenceTable:
    """Slots of the running sequences. Slot 0 belongs to none and is switched off: dummy rows point there.

    A sequence keeps its slot from its first step to its end, whatever rows or slots the engine gives it meanwhile.
    The settings are plain host arrays with a copy on the device, so a step needs no host loop and no synchronisation. Each
    sampler's numbers are a block of columns of their own.

    Args:
        samplers: by name; the index of a sampler among them is its number here.
        default: the sampler of sequences that name none.
        slots: of sequences, with slot 0.
        device: of the logits.
    """

    def __init__(self, samplers: Mapping[str, Sampler], default: str, slots: int, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.samplers = dict(samplers)
        self.default = default
        self.number = {name: number for number, name in enumerate(samplers)}
        numbers = {name: sampler.numbers() for name, sampler in samplers.items()}
        self.columns = {name: {key: column for column, (key, _) in enumerate(of)} for name, of in numbers.items()}
        # Each sampler's block of the numbers of a sequence.
        ends = np.cumsum([len(of) for of in numbers.values()]).tolist()
        self.blocks = {name: slice(end - len(of), end) for end, (name, of) in zip(ends, numbers.items(), strict=True)}
        self._slot_of: dict[str, int] = {}
        self._told: dict[int, Told] = {}
        self._free: list[int] = []
        self._changed: set[int] = set()
        # On the CPU the device tensors below share the host arrays' memory, and flush() has nothing to do.
        self.numbers = np.tile(np.array([value for of in numbers.values() for _, value in of], dtype=np.float32), (slots, 1))
        self.base = np.tile(np.array(Sequence.base, dtype=np.float32), (slots, 1))
        # Rows of these arrays: what has one type goes to the device together.
        self._integers, self._flags = np.zeros((2, slots), dtype=np.int64), np.zeros((3, slots), dtype=bool)
        self._integers[0] = self.number[default]
        # The sequence's bounds, known without asking the device.
        self.most_candidates = np.zeros(slots, dtype=np.int64)
        self.most_drawn = np.zeros(slots, dtype=np.int64)
        self._free.extend(range(slots - 1, 0, -1))
        self._compositions: dict[bytes, Composition] = {}  # by the slots' bytes
        self._mirror()

    def __len__(self) -> int:
        return len(self._slot_of)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._slot_of

    @property
    def slots(self) -> int:
        """Number of slots, used or not, with slot 0."""
        return len(self.sampled)

    def _mirror(self) -> None:
        self.sampler, self.prompt_length = self._integers
        # A scored sequence's rows are measured as a traced one's are.
        self.sampled, self.traced, self.allow_clarification = self._flags
        self.device_numbers = torch.from_numpy(self.numbers).to(self.device)
        self.device_base = torch.from_numpy(self.base).to(self.device)
        self._device_integers = torch.from_numpy(self._integers).to(self.device)
        self._device_flags = torch.from_numpy(self._flags).to(self.device)
        self.device_sampler, self.device_prompt_length = self._device_integers.unbind()
        self.device_sampled, self.device_traced, self.device_allow_clarification = self._device_flags.unbind()
        # Of a sequence's numbers, all samplers' together.
        self.width = self.numbers.shape[1]
        self._device_blocks = {name: self.device_numbers[:, block] for name, block in self.blocks.items()}

    def add(self, request_id: str, sequence: Sequence) -> int:
        """Give a sequence a slot (its old one if it is known already) and write its settings there."""
        slot = self._slot_of.get(request_id)
        if slot is None:
            if not self._free:
                self._grow()
            slot = self._slot_of[request_id] = self._free.pop()
        else:
            self._ends(slot)
        self._compositions.clear()
        name = sequence.sampler or self.default
        self.numbers[slot, self.blocks[name]] = sequence.constants
        self.base[slot] = sequence.base
        self.sampler[slot] = self.number[name]
        self.sampled[slot] = sequence.sampled
        self.traced[slot] = sequence.traced or sequence.scored
        self._told[slot] = Told(request_id, sequence.traced, sequence.scored, sequence.forks)
        self.allow_clarification[slot] = sequence.allow_clarification
        self.prompt_length[slot] = sequence.prompt_length
        numbers = dict(zip(self.columns[name], sequence.constants, strict=True))
        bounds = self.samplers[name].bounds(numbers, dict(zip(BASE, sequence.base, strict=True)))
        self.most_candidates[slot], self.most_drawn[slot] = bounds.candidates, bounds.drawn
        self._changed.add(slot)
        self.samplers[name].begins(numbers)
        return slot

    def _ends(self, slot: int) -> None:
        name = list(self.samplers)[self.sampler[slot]]
        numbers = self.numbers[slot, self.blocks[name]].tolist()
        self.samplers[name].ends(dict(zip(self.columns[name], numbers, strict=True)))

    def remove(self, request_id: str) -> int | None:
        """Free a sequence's slot; returns it, or None if the sequence isn't known."""
        slot = self._slot_of.pop(request_id, None)
        if slot is not None:
            self._ends(slot)
            self._compositions.clear()
            self.sampled[slot] = self.traced[slot] = self.allow_clarification[slot] = False
            self._changed.add(slot)
            self._free.append(slot)
            del self._told[slot]
        return slot

    def slots_of(self, request_ids: Iterable[str], count: int) -> np.ndarray:
        """int64 ``[count]``: the slot of each of ``count`` sequences, 0 for unknown ones."""
        lookup = self._slot_of.get
        return np.fromiter((lookup(request_id, 0) for request_id in request_ids), dtype=np.int64, count=count)

    def flush(self) -> None:
        """Copy what changed since the last step to the device."""
        if self.device.type == "cpu" or not self._changed:
            self._changed.clear()
            return
        self._send(np.fromiter(self._changed, dtype=np.int64, count=len(self._changed)))
        self._changed.clear()

    def _send(self, slots: np.ndarray) -> None:
        """Copy these slots to the device."""
        arrays = (slots, self._integers[:, slots], self.numbers[slots], self.base[slots], self._flags[:, slots])
        index, integers, numbers, base, flags = together_to_device(arrays, self.device)
        self._device_integers.index_copy_(1, index, integers)
        self.device_numbers.index_copy_(0, index, numbers)
        self.device_base.index_copy_(0, index, base)
        self._device_flags.index_copy_(1, index, flags)

    def of_rows(self, sampler: str, slots: Tensor) -> Constants:
        """Each row's numbers for a sampler, its own where it has it; ``slots`` int64 ``[rows]`` on the device."""
        return Constants(self._device_blocks[sampler].index_select(0, slots), self.columns[sampler])

    def host_numbers(self, sampler: str, slots: np.ndarray, name: str) -> np.ndarray:
        """One of a sampler's numbers, of those among ``slots`` that have it."""
        mine = slots[(self.sampler[slots] == self.number[sampler]) & (self.sampled[slots] | self.traced[slots])]
        numbers: np.ndarray = self.numbers[mine, self.blocks[sampler].start + self.columns[sampler][name]]
        return numbers

    def base_of_rows(self, slots: Tensor) -> Parameters:
        """Each row's own temperature, top_p, top_k and min_p, and one draw."""
        # A row's number beside the next one's, as kernels read them.
        temperature, top_p, top_k, min_p = self.device_base.T.index_select(1, slots)
        return Parameters(temperature, top_p, top_k.to(torch.int64), min_p, torch.ones_like(slots))

    def composition(self, slots: np.ndarray) -> Composition:
        """What is known of the sequences in ``slots``, int64: computed once for a batch, until a sequence begins or ends."""
        asked = slots.tobytes()
        found = self._compositions.get(asked)
        if found is None:
            if len(self._compositions) == _REMEMBERED:
                self._compositions.clear()
            found = self._compositions[asked] = self._compose(slots)
        return found

    def _compose(self, slots: np.ndarray) -> Composition:
        sampled, traced = self.sampled[slots], self.traced[slots]
        # A row that is neither drawn nor traced needs no plan, whichever sampler its slot has.
        concerned = sampled | traced
        # Never changed, since records of a step before may still be on their way.
        requests = {slot: self._told[slot] for slot in slots.tolist() if slot in self._told}
        names = list(self.samplers)
        return Composition(
            any_sampled=bool(sampled.any()),
            all_sampled=bool(sampled.all()),
            any_traced=bool(traced.any()),
            all_traced=bool(traced.all()),
            any_concerned=bool(concerned.any()),
            all_concerned=bool(concerned.all()),
            samplers=tuple(names[number] for number in np.unique(self.sampler[slots[concerned]])),
            most_candidates=int(self.most_candidates[slots].max(initial=0)),
            most_drawn=int(self.most_drawn[slots].max(initial=0)),
            requests=requests,
            any_forks=any(told.forks for told in requests.values()),
        )

    def _grow(self) -> None:
        old = self.slots
        for name in ("numbers", "base"):
            array = getattr(self, name)
            setattr(self, name, np.concatenate((array, np.tile(array[:1], (old, 1)))))
        for name in ("_integers", "_flags", "most_candidates", "most_drawn"):
            array = getattr(self, name)
            setattr(self, name, np.concatenate((array, np.zeros_like(array)), axis=-1))
        self._free.extend(range(2 * old - 1, old - 1, -1))
        self._mirror()


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """An array on a device, without waiting for it."""
    if device.type == "cpu":
        return torch.from_numpy(array)
    # Pinned, so that the copy needn't wait for the device.
    return torch.from_numpy(array).pin_memory().to(device, non_blocking=True)


def together_to_device(arrays: Collection[np.ndarray], device: torch.device) -> list[Tensor]:
    """Arrays on a device by one copy, without waiting for it: it is the copies that take the host's time, not the bytes.

    Args:
        arrays: those of wide types first, so that each begins where its type may.
        device: where to.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    return unpacked(to_device(packed(arrays), device), arrays)


def packed(arrays: Collection[np.ndarray]) -> np.ndarray:
    """The bytes of arrays, one after the other."""
    return np.concatenate([np.ascontiguousarray(array).view(np.uint8).ravel() for array in arrays])


def unpacked(sent: Tensor, arrays: Collection[np.ndarray]) -> list[Tensor]:
    """The arrays as parts of a tensor of their bytes, as :func:`packed` puts them."""
    parts = torch.split(sent, [array.nbytes for array in arrays])
    types = (torch.from_numpy(np.empty(0, array.dtype)).dtype for array in arrays)
    return [part.view(dtype).view(array.shape) for part, dtype, array in zip(parts, types, arrays, strict=True)]
