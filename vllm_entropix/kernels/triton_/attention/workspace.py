"""What the kernels keep between them and ranks exchange: how much, and how many rows have room in it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_entropix.kernels.triton_.attention.shares import SPLITS, TILE, splits_of

# Programs that share the work on rows without room: three for each multiprocessor of an H100. Of those that take whole rows,
# one for each will do, as keys would be read twice otherwise; but each has to have rows to take, or many wait in the end.
PROGRAMS = 396
FEWEST = PROGRAMS // 3
ROWS_EACH = 4
# All that the kernels keep between them, in float32 elements: 112 MiB. What isn't partial sums is room for scores.
WORKSPACE = 28 << 20
# What an exchange between ranks fills, in float32 elements: 32 MiB.
EXCHANGE = 8 << 20


# Sizes of steps that plans are remembered for. Rows come and go; the tiles of the longest context change every 64 tokens.
_PLANS = 64


class Parts(NamedTuple):
    """What a launch keeps, in one buffer.

    Attributes:
        offsets: int64, see ``scores._plan``.
        without: int32, how many rows of each layer have no room.
        partial: what each share says of each head.
        found: ``[layers * rows, 3, heads]``, what each head says by itself: log-normaliser, entropy, sum of absolute scores.
        deviations: ``[layers * rows, splits]``, sums over the heads.
        own: room for the tile that a program of ``deviations._deviate_again`` works on.
        scratch: the scores; all that is left.
    """

    offsets: Tensor
    without: Tensor
    partial: Tensor
    found: Tensor
    deviations: Tensor
    own: Tensor
    scratch: Tensor


@dataclass(frozen=True)
class Workspace:
    """What the kernels keep between them, allocated once.

    Attributes:
        buffer: float32, any number of elements.
    """

    buffer: Tensor

    @cached_property
    def size(self) -> int:
        """Elements of the buffer."""
        return self.buffer.numel()

    @cached_property
    def _known(self) -> dict[tuple[int, int, int, int, bool], Parts]:
        return {}

    def parts(self, layers: int, rows: int, heads: int, splits: int, whole: bool) -> Parts:
        """The buffer's parts; arguments as of :func:`sizes_of`."""
        asked = (layers, rows, heads, splits, whole)
        found = self._known.get(asked)
        if found is None:
            if len(self._known) == _PLANS:
                self._known.clear()
            found = self._known[asked] = self._cut(*asked)
        return found

    def _cut(self, layers: int, rows: int, heads: int, splits: int, whole: bool) -> Parts:
        sizes, pairs, start = sizes_of(layers, rows, heads, splits, whole), layers * rows, 0
        of: dict[str, Tensor] = {}
        for name, size in sizes.items():
            of[name] = self.buffer[start : start + size]
            start += size
        return Parts(
            of["offsets"].view(torch.int64),
            of["without"].view(torch.int32),
            of["partial"],
            of["found"][: pairs * 3 * heads].view(-1, 3, heads),
            of["deviations"][: pairs * splits].view(-1, splits),
            of["own"],
            self.buffer[start:],
        )

    @classmethod
    def for_steps(cls, layers: int, rows: int, heads: int, longest: int, device: torch.device) -> Workspace:
        """As much as steps of at most this size need, or as there may be.

        Args:
            layers: measured together.
            rows: in a step.
            heads: of a layer.
            longest: positions of a sequence.
            device: the keys' own.
        """
        return cls(torch.empty(workspace_size(layers, rows, heads, longest), dtype=torch.float32, device=device))


def workspace_size(layers: int, rows: int, heads: int, longest: int) -> int:
    """float32 elements of a workspace; arguments as of ``Workspace.for_steps``."""
    scores = layers * rows * heads * -(-longest // TILE) * TILE
    return min(WORKSPACE, sum(sizes_of(layers, rows, heads, splits_of(longest)).values()) + scores)


def rows_together(layers: int, rows: int, heads: int, longest: int, workspace: int) -> int:
    """Rows of one launch: all, unless what is kept of them beside scores needs more than the workspace has.

    Args:
        layers: measured together.
        rows: of the step.
        heads: of a layer.
        longest: positions of a sequence.
        workspace: its float32 elements.
    """
    return _rows_together(layers, rows, heads, splits_of(longest), workspace)


@lru_cache(_PLANS)
def _rows_together(layers: int, rows: int, heads: int, splits: int, workspace: int) -> int:
    parts = range(1, rows + 1)
    sizes = (-(-rows // part) for part in parts)
    return next((size for size in sizes if sum(sizes_of(layers, size, heads, splits).values()) <= workspace), 1)


def programs_for_whole_rows(layers: int, rows: int, heads: int, longest: int, workspace: int) -> int:
    """Programs that take whole rows, each with room for the scores of one; 0 where rows are better shared by programs.

    Args:
        layers: measured together.
        rows: of a launch.
        heads: of a layer.
        longest: positions of a row.
        workspace: its float32 elements.
    """
    return _programs(layers, rows, heads, -(-longest // TILE), workspace)


@lru_cache(_PLANS)
def _programs(layers: int, rows: int, heads: int, tiles: int, workspace: int) -> int:
    splits, pairs, of_one = splits_of(tiles * TILE), layers * rows, heads * tiles * TILE
    if sum(sizes_of(layers, rows, heads, splits).values()) + pairs * of_one <= workspace:
        return 0
    programs = min(PROGRAMS, (workspace - sum(sizes_of(layers, rows, heads, splits, whole=True).values())) // of_one)
    return programs if programs >= FEWEST and pairs >= ROWS_EACH * programs else 0


def exchange_size(layers: int, rows: int, longest: int, ranks: int) -> int:
    """float32 elements that exchanges of steps of at most this size fill: ``EXCHANGE`` at most, unless one row needs more.

    Args:
        layers: of a step.
        rows: of a step.
        longest: positions that a row attends to.
        ranks: how many.
    """
    of_a_row = ranks * (longest + 1)
    return min(layers * rows * of_a_row, max(EXCHANGE, of_a_row))


def exchanged_together(layers: int, rows: int, heads: int, total: int, longest: int, ranks: int, room: int) -> tuple[int, int]:
    """Layers and rows of one exchange of sums: all, unless memory for what is exchanged or kept doesn't allow that.

    Args:
        layers: of a step.
        rows: of a step.
        heads: of this rank.
        total: positions that the rows attend to.
        longest: that a row attends to.
        ranks: how many.
        room: for what all ranks send, in float32 elements.
    """
    if ranks * (total + rows) > room:
        # The host knows no more of some of the rows than that none is longer.
        return 1, max(1, min(rows, room // (ranks * (longest + 1))))
    shared = sum(sizes_of(0, 0, heads, SPLITS).values())
    per_layer = sum(sizes_of(1, rows, heads, SPLITS).values()) - shared
    return max(1, min(layers, room // (ranks * (total + rows)), (WORKSPACE - shared) // per_layer)), rows


def sizes_of(layers: int, rows: int, heads: int, splits: int, whole: bool = False) -> dict[str, int]:
    """What is kept beside scores, in float32 elements: multiples of 16 bytes each. Are whole rows taken?"""
    pairs = layers * rows
    needed = {
        "offsets": 2 * pairs,  # int64
        "without": layers,
        "partial": (PROGRAMS if whole else pairs) * splits * 4 * heads,
        "found": pairs * 3 * heads,
        "deviations": pairs * splits,
        "own": 0 if whole else PROGRAMS * heads * TILE,
    }
    return {name: -(-size // 4) * 4 for name, size in needed.items()}
