"""Tokens of an answer that forked in a response's ``usage``: all that were generated, those beside the answer told apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_entropix.samplers.request import PREFIX

# Stands beside OpenAI's own details of the generated tokens.
PRUNED = f"{PREFIX}_pruned_tokens"
# What OpenAI's endpoints call generated tokens, and what /v1/responses and Anthropic's /v1/messages do.
_GENERATED = ("completion_tokens", "output_tokens")


def with_pruned(usage: Mapping[str, Any], pruned: int) -> dict[str, Any]:
    """A response's usage that counts tokens of branches beside the answer, too.

    Args:
        usage: as JSON values; the answer's tokens are counted.
        pruned: tokens that were generated beside it.
    """
    counted = dict(usage)
    for name in _GENERATED:
        if isinstance(counted.get(name), int):
            counted[name] += pruned
            if isinstance(counted.get("total_tokens"), int):
                counted["total_tokens"] += pruned
            counted[f"{name}_details"] = {**(counted.get(f"{name}_details") or {}), PRUNED: pruned}
    return counted


def count_pruned(answer: Any, pruned: int | None) -> None:
    """Count them in vLLM's object of a response, if it has a usage; ``pruned``: None if the answer can't have forked."""
    usage = getattr(answer, "usage", None)
    if usage is not None and pruned is not None:
        answer.usage = type(usage).model_validate(with_pruned(usage.model_dump(), pruned))


def count_pruned_in(data: dict[str, Any], pruned: int | None) -> bool:
    """The same in a response's JSON values, or in an event that holds a response. Was there a usage?"""
    holder = data["response"] if isinstance(data.get("response"), dict) else data
    if pruned is None or not isinstance(holder.get("usage"), Mapping):
        return False
    holder["usage"] = with_pruned(holder["usage"], pruned)
    return True
