"""A configuration's numbers as tensor columns, one row per sequence, so that every sequence can have its own preset."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor


class HasNumbers(Protocol):
    """Settings whose numbers a step reads."""

    def numbers(self) -> Iterable[tuple[str, float]]:
        """(dotted name, value) of each, in a fixed order."""


class Constants:
    """Numbers of one or several configurations, looked up by the setting's dotted name.

    Args:
        values: ``[rows, constants]`` (or ``[1, constants]``, which then broadcasts over rows), in the order of
            :meth:`HasNumbers.numbers`.
        columns: the column of each dotted name.
    """

    def __init__(self, values: Tensor, columns: dict[str, int]) -> None:
        self.values = values
        self.columns = columns

    @classmethod
    def from_config(cls, config: HasNumbers, dtype: torch.dtype, device: torch.device | str) -> Constants:
        """The constants of one configuration, for all rows alike."""
        names, values = zip(*config.numbers(), strict=True)
        return cls(torch.tensor([values], dtype=dtype, device=device), {name: column for column, name in enumerate(names)})

    def __getitem__(self, name: str) -> Tensor:
        """The column of a setting, ``[rows]`` or ``[1]``."""
        return self.values[:, self.columns[name]]
