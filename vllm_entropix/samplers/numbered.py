"""Numbers for what a row's columns can't hold, such as a chain: given out by need, and taken back from what nobody has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Thing = TypeVar("Thing")


class Numbered(Generic[Key, Thing]):
    """Things by number.

    Args:
        idle: so many that nobody holds are kept, those asked for last. Clients may ask for ever new ones.
    """

    def __init__(self, idle: int = 16) -> None:
        self._idle = idle
        self._numbers: dict[Key, int] = {}  # in the order in which they were last asked for
        self._things: dict[int, Thing] = {}
        self._holders: Counter[int] = Counter()
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._things)

    def __getitem__(self, number: int) -> Thing:
        return self._things[number]

    def number_of(self, key: Key, make: Callable[[], Thing]) -> int:
        """A thing's number; what isn't there is made. It is good while it is held, or until others are asked for."""
        number = self._numbers.pop(key, None)
        if number is None:
            thing = make()
            self._forget_idle()
            number = self._free.pop() if self._free else len(self._things)
            self._things[number] = thing
        self._numbers[key] = number
        return number

    def hold(self, number: int) -> None:
        """Somebody has the number, once more."""
        self._holders[number] += 1

    def release(self, number: int) -> None:
        """Somebody who held the number is gone."""
        self._holders[number] -= 1
        if not self._holders[number]:
            del self._holders[number]

    def _forget_idle(self) -> None:
        """Make room for one more."""
        idle = [key for key, number in self._numbers.items() if number not in self._holders]
        for key in idle[: max(0, len(idle) + 1 - self._idle)]:
            number = self._numbers.pop(key)
            del self._things[number]
            self._free.append(number)
