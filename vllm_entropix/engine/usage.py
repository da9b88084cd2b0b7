"""Tokens of answers that forked in a response's ``usage``: all that were generated, those beside the answers told apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from vllm_entropix.samplers.request import PREFIX

# Stands beside OpenAI's own details of the generated tokens.
PRUNED = f"{PREFIX}_pruned_tokens"
# What OpenAI's endpoints call generated tokens, and what /v1/responses and Anthropic's /v1/messages do.
_GENERATED = ("completion_tokens", "output_tokens")


class Beside(NamedTuple):
    """Tokens of answers that forked.

    Attributes:
        pruned: that became part of no answer.
        uncounted: that were generated, less those that vLLM counts, which are all of each answer; negative where several
            answers have more in common.
    """

    pruned: int
    uncounted: int


def with_pruned(usage: Mapping[str, Any], beside: Beside) -> dict[str, Any]:
    """A response's usage, as JSON values, that counts all tokens that were generated."""
    counted = dict(usage)
    for name in _GENERATED:
        if isinstance(counted.get(name), int):
            counted[name] += beside.uncounted
            if isinstance(counted.get("total_tokens"), int):
                counted["total_tokens"] += beside.uncounted
            counted[f"{name}_details"] = {**(counted.get(f"{name}_details") or {}), PRUNED: beside.pruned}
    return counted


def count_pruned(answer: Any, beside: Beside | None) -> None:
    """Count them in vLLM's object of a response, if it has a usage; ``beside``: None if no answer can have forked."""
    usage = getattr(answer, "usage", None)
    if usage is not None and beside is not None:
        answer.usage = type(usage).model_validate(with_pruned(usage.model_dump(), beside))


def count_pruned_in(data: dict[str, Any], beside: Beside | None) -> bool:
    """The same in a response's JSON values, or in an event that holds a response. Was there a usage?"""
    holder = data["response"] if isinstance(data.get("response"), dict) else data
    if beside is None or not isinstance(holder.get("usage"), Mapping):
        return False
    holder["usage"] = with_pruned(holder["usage"], beside)
    return True
