"""What is remembered of a sequence, by position.

What is decided for the token after position p is recorded under p, together with everything it was based on, and the decision
at p + 1 starts from the record of p. So a discarded row, a rejected draft, a preemption or a reordered batch can't corrupt it:
what is decided again is written again. A fork takes its parent's records with it, as bytes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# The position of a record that was never written.
NEVER = -(2**30)


class PositionRing:
    """The last records of each sequence, each under its position.

    Args:
        initial: a record where none is known, one number per field.
        dtype: of the numbers.
        slots: sequences to keep records for; slot 0 is scratch and belongs to none.
        draft_tokens: drafts that may be verified in one step (0 without speculative decoding).
        device: where they live.
    """

    def __init__(
        self,
        initial: tuple[float, ...],
        dtype: torch.dtype,
        slots: int,
        draft_tokens: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.initial = torch.tensor(initial, dtype=dtype, device=device)
        # Far enough back for a step whose tokens are thrown away while the next is already under way.
        self.length = 2 * (draft_tokens + 2)
        self.positions, self.records = self._empty(slots)

    def _empty(self, slots: int) -> tuple[Tensor, Tensor]:
        positions = torch.full((slots, self.length), NEVER, dtype=torch.int32, device=self.initial.device)
        return positions, self.initial.expand(slots, self.length, -1).clone()

    @property
    def slots(self) -> int:
        """Sequences that there is room for, with slot 0."""
        return len(self.positions)

    def grow(self, slots: int) -> None:
        """Make room for ``slots`` sequences in all; what is remembered stays."""
        positions, records = self._empty(slots - self.slots)
        self.positions = torch.cat((self.positions, positions))
        self.records = torch.cat((self.records, records))

    def forget(self, slot: int) -> None:
        """Begin anew in a slot."""
        self.positions[slot] = NEVER

    def read(self, slots: Tensor, positions: Tensor) -> Tensor:
        """The records ``[rows, fields]`` under ``positions``, the initial one where none is known.

        Args:
            slots: int64 ``[rows]``, the row's sequence.
            positions: int64 ``[rows]``.
        """
        index = positions % self.length
        known = self.positions[slots, index] == positions
        return self.records[slots, index].where(known.unsqueeze(-1), self.initial)

    def write(self, slots: Tensor, positions: Tensor, records: Tensor, valid: Tensor) -> None:
        """Record ``[rows, fields]`` under ``positions``, in the rows of the bool ``valid``; others leave no trace."""
        slots = torch.where(valid, slots, 0)
        index = positions % self.length
        self.positions[slots, index] = positions.to(torch.int32)
        self.records[slots, index] = records.to(self.records.dtype)

    def repeat(self, slot: int, position: int) -> None:
        """Remember under a position what is remembered under the one before it."""
        slots, here = (torch.tensor([number], device=self.positions.device) for number in (slot, position))
        self.write(slots, here, self.read(slots, here - 1), torch.ones_like(slots, dtype=torch.bool))

    @property
    def nbytes(self) -> int:
        """Bytes of all that is remembered of a sequence."""
        return self.length * (self.positions.element_size() + self.records.shape[-1] * self.records.element_size())

    def as_bytes(self, slots: Tensor) -> Tensor:
        """All that is remembered of sequences: uint8 ``[rows, nbytes]``, without waiting for the device.

        Args:
            slots: int64 ``[rows]``.
        """
        parts = (self.positions[slots], self.records[slots].flatten(1))
        return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)

    def to_bytes(self, slot: int) -> bytes:
        """The same of one sequence."""
        slots = torch.tensor([slot], device=self.positions.device)
        return bytes(self.as_bytes(slots)[0].cpu().numpy())

    def from_bytes(self, slot: int, data: bytes) -> None:
        """Begin a sequence with what was remembered of another.

        Raises:
            ValueError: it is of a ring of another length or other fields.
        """
        positions, records = self.positions[slot], self.records[slot]
        sizes = [of.numel() * of.element_size() for of in (positions, records)]
        if len(data) != sum(sizes):
            raise ValueError(f"a state of {len(data)} bytes doesn't fit a ring of {sum(sizes)}")
        for of, part in ((positions, data[: sizes[0]]), (records, data[sizes[0] :])):
            values = np.frombuffer(part, dtype=of.cpu().numpy().dtype).reshape(tuple(of.shape))
            of.copy_(torch.from_numpy(values.copy()))
