"""What is known of each running sequence: its own constants and switches, by slot."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vllm_entropix.distribution.constants import Constants

if TYPE_CHECKING:
    from vllm_entropix.samplers.entropix.settings import EntropixConfig


@dataclass(frozen=True)
class Sequence:
    """Settings of one sequence, as the engine adapter reads them from a request.

    Attributes:
        constants: numbers in the order of :meth:`EntropixConfig.numbers`.
        sampled: drawn by entropix (False: opted out, or greedy).
        traced: a record per token is wanted.
        clarified: forced tokens are allowed.
        prompt_length: tokens of the prompt; what follows was generated.
    """

    constants: list[float]
    sampled: bool
    traced: bool
    clarified: bool
    prompt_length: int


class SequenceTable:
    """Slots of the running sequences. Slot 0 belongs to none and is switched off: dummy rows point there.

    A sequence keeps its slot from its first step to its end, whatever rows or slots the engine gives it meanwhile.
    The settings are plain host arrays with a copy on the device, so a step needs no host loop and no synchronisation.
    """

    def __init__(self, config: EntropixConfig, slots: int, device: torch.device | str) -> None:
        self.device = torch.device(device)
        names = [name for name, _ in config.numbers()]
        self.columns = {name: column for column, name in enumerate(names)}
        self._slot_of: dict[str, int] = {}
        self._request_of: dict[int, str] = {}
        self._free: list[int] = []
        self._changed: set[int] = set()
        # On the CPU the device tensors below share the host arrays' memory, and flush() has nothing to do.
        self.constants = np.tile(np.array([value for _, value in config.numbers()], dtype=np.float32), (slots, 1))
        self.sampled = np.zeros(slots, dtype=bool)
        self.traced = np.zeros(slots, dtype=bool)
        self.clarified = np.zeros(slots, dtype=bool)
        self.prompt_length = np.zeros(slots, dtype=np.int64)
        # The largest top_k that a regime can give the sequence: bounds the number of candidates without asking the device.
        self.largest_top_k = np.zeros(slots, dtype=np.int64)
        self._free.extend(range(slots - 1, 0, -1))
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
        self.device_constants = torch.from_numpy(self.constants).to(self.device)
        self.device_sampled = torch.from_numpy(self.sampled).to(self.device)
        self.device_traced = torch.from_numpy(self.traced).to(self.device)
        self.device_clarified = torch.from_numpy(self.clarified).to(self.device)
        self.device_prompt_length = torch.from_numpy(self.prompt_length).to(self.device)

    def add(self, request_id: str, sequence: Sequence) -> int:
        """Give a sequence a slot (its old one if it is known already) and write its settings there."""
        slot = self._slot_of.get(request_id)
        if slot is None:
            if not self._free:
                self._grow()
            slot = self._slot_of[request_id] = self._free.pop()
            self._request_of[slot] = request_id
        self.constants[slot] = sequence.constants
        self.sampled[slot] = sequence.sampled
        self.traced[slot] = sequence.traced
        self.clarified[slot] = sequence.clarified
        self.prompt_length[slot] = sequence.prompt_length
        self.largest_top_k[slot] = self._largest_top_k(self.constants[slot])
        self._changed.add(slot)
        return slot

    def _largest_top_k(self, constants: np.ndarray) -> int:
        def constant(name: str) -> float:
            return float(constants[self.columns[name]])

        base = constant("base.top_k")
        # Agreement is never negative, so LEHV widens by its slope at most.
        lehv = max(constant("lehv.top_k_min"), base * (1 + max(0.0, constant("lehv.top_k_disagreement"))))
        return int(np.ceil(max(base, lehv, constant("adaptive.top_k_max"))))

    def remove(self, request_id: str) -> int | None:
        """Free a sequence's slot; returns it, or None if the sequence isn't known."""
        slot = self._slot_of.pop(request_id, None)
        if slot is not None:
            self.sampled[slot] = self.traced[slot] = self.clarified[slot] = False
            self._changed.add(slot)
            self._free.append(slot)
            del self._request_of[slot]
        return slot

    def requests_of(self, slots: np.ndarray) -> dict[int, tuple[str, bool]]:
        """Slot → (request id, is it traced?) of those among ``slots`` that belong to a sequence."""
        known = self._request_of
        return {slot: (known[slot], bool(self.traced[slot])) for slot in slots.tolist() if slot in known}

    def slots_of(self, request_ids: Iterable[str], count: int) -> np.ndarray:
        """int64 ``[count]``: the slot of each of ``count`` sequences, 0 for unknown ones."""
        lookup = self._slot_of.get
        return np.fromiter((lookup(request_id, 0) for request_id in request_ids), dtype=np.int64, count=count)

    def flush(self) -> None:
        """Copy what changed since the last step to the device."""
        if self.device.type == "cpu" or not self._changed:
            self._changed.clear()
            return
        changed = np.fromiter(self._changed, dtype=np.int64, count=len(self._changed))
        self._changed.clear()
        index = _to_device(changed, self.device)
        for array, mirror in (
            (self.constants, self.device_constants),
            (self.sampled, self.device_sampled),
            (self.traced, self.device_traced),
            (self.clarified, self.device_clarified),
            (self.prompt_length, self.device_prompt_length),
        ):
            mirror.index_copy_(0, index, _to_device(array[changed], self.device))

    def of_rows(self, slots: Tensor) -> Constants:
        """Each row's constants; ``slots`` int64 ``[rows]`` on the device."""
        return Constants(self.device_constants[slots], self.columns)

    def _grow(self) -> None:
        old = self.slots
        self.constants = np.concatenate((self.constants, np.tile(self.constants[:1], (old, 1))))
        for name in ("sampled", "traced", "clarified", "prompt_length", "largest_top_k"):
            array = getattr(self, name)
            setattr(self, name, np.concatenate((array, np.zeros_like(array))))
        self._free.extend(range(2 * old - 1, old - 1, -1))
        self._mirror()


def _to_device(array: np.ndarray, device: torch.device) -> Tensor:
    # Pinned, so that the copy needn't wait for the device.
    return torch.from_numpy(array).pin_memory().to(device, non_blocking=True)
