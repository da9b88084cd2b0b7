"""Where a request's settings may stand in the body of an HTTP request, and what stands elsewhere.

vLLM takes bodies with fields that it doesn't know and drops them. A setting of ours must not vanish like that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_entropix.samplers.request import PREFIX
from vllm_entropix.settings.errors import quoted

# Below these a user's own names stand: of JSON schemas, grammars and tools. Lists, such as messages, aren't searched either.
_USERS_OWN = frozenset({"response_format", "structured_outputs", "guided_json", "output_config", "text", "tool_choice"})
_DEPTH = 6


def is_ours(name: Any) -> bool:
    """Is it the name of a setting of ours, however it is spelled?"""
    return isinstance(name, str) and name.strip().lower().startswith(PREFIX)


def misplaced(body: Mapping[str, Any], place: str | None) -> str | None:
    """The first name of ours that stands where nobody reads it, as a dotted path; None if there is none.

    Args:
        body: of the request.
        place: dotted path of the table that may hold settings; None if there is none.
    """
    return _search(body, place, "", _DEPTH)


def _search(table: Mapping[str, Any], place: str | None, above: str, depth: int) -> str | None:
    for name, value in table.items():
        path = f"{above}{name}"
        if path == place:
            continue
        if is_ours(name):
            return path
        if depth and isinstance(value, Mapping) and name not in _USERS_OWN:
            found = _search(value, place, f"{path}.", depth - 1)
            if found is not None:
                return found
    return None


def refusal(path: str, place: str | None) -> str:
    """What to tell whoever put a setting there.

    Args:
        path: as :func:`misplaced` gives it.
        place: where the endpoint reads settings; None if it has no such place.
    """
    shown = quoted(path)
    if place is None:
        return f"{shown} can't be had on this endpoint, which takes no settings of entropix; leave it out"
    return f"{shown} isn't read where it stands; settings of entropix, such as entropix_trace, go into {place}"
