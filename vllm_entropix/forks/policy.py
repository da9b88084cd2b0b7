"""Where a branch forks, and which tokens its new branches begin with."""

from __future__ import annotations

import random
from collections.abc import Callable

from vllm_entropix.records.trace import TokenRecord
from vllm_entropix.settings.server import Forks

# The token before (None: none of the answer) and a token after it → does it go on with the word?
ContinuesWord = Callable[[int | None, int], bool]


def is_fork(settings: Forks, record: TokenRecord) -> bool:
    """Is it at a token like this that an answer forks? Where a token was forced, nothing was drawn."""
    if record.forced:
        return False
    if settings.place == "random":
        return True
    regime, entropy, bound = getattr(record, "regime", None), record.entropy, settings.entropy
    if settings.place == "sure":
        sure: bool = regime == "LELV" if bound is None else entropy is not None and entropy < bound
        return sure
    torn: bool = regime == "LEHV" if bound is None else entropy is not None and entropy >= bound
    return torn and (settings.margin >= 1 or _margin(record) <= settings.margin)


def coin(seed: int | None, position: int) -> float:
    """A number from 0 to 1, below 1, that is a token's own: of the same seed and position it is the same.

    Args:
        seed: of the branch; None: it has none, and neither has the number.
        position: of the token in the answer.
    """
    return random.Random(None if seed is None else f"fork/{seed}/{position}").random()


def alternatives(
    settings: Forks, record: TokenRecord, token: int, before: int | None, continues_word: ContinuesWord | None = None
) -> list[tuple[int, float]]:
    """(token, probability) of the branches that begin beside a drawn token, most probable first; none if it is no fork.

    Args:
        settings: how the request forks.
        record: of the token.
        token: the one that was drawn.
        before: the one before it.
        continues_word: tells where words go on; None: nobody knows, so any place will do.
    """
    if not is_fork(settings, record):
        return []
    if continues_word is not None and not settings.inside_words and continues_word(before, token):
        return []
    others = [
        (other, probability)
        for other, probability in record.alternatives
        if other != token and probability is not None and probability > 0 and probability >= settings.floor
    ]
    return others[: settings.width - 1]


def _margin(record: TokenRecord) -> float:
    """Probability of the most probable token less that of the second, as far as alternatives tell; 1 if they don't."""
    first, second, *_ = [*(probability for _, probability in record.alternatives), None, None]
    return 1.0 if first is None or second is None else first - second
