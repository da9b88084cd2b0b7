"""Token ids → the piece of text that each contributes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

_REPLACEMENT = "\ufffd"
# A character has at most four bytes, each of which may be a token.
_MAX_PIECES = 4


def token_texts(tokenizer: Any, token_ids: Sequence[int]) -> Iterator[str]:
    """The text of each token; of a character that is split over tokens, all of it stands with the last of them."""
    pending: list[int] = []
    for index, token in enumerate(token_ids, 1):
        pending.append(token)
        text = tokenizer.decode(pending)
        if _REPLACEMENT in text and len(pending) < _MAX_PIECES and index < len(token_ids):
            yield ""
        else:
            yield text
            pending = []
