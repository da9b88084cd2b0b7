"""The trace of a response's choice as JSON: what :class:`~.schema.ChoiceTrace` describes, without building its models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic_core import to_json

from vllm_entropix.records.encoding import entries_json, entry_values
from vllm_entropix.records.fields import VERSION
from vllm_entropix.records.trace import TokenTrace

# An answer's branches as JSON values, as :class:`~.branches.Branch` describes them.
Forks = Sequence[Mapping[str, Any]]


def choice_values(
    token_ids: Sequence[int],
    trace: TokenTrace,
    bound: str | None = None,
    scores: Mapping[str, Any] | None = None,
    sampler: str | None = None,
    forks: Forks | None = None,
) -> dict[str, Any]:
    """What :class:`~.schema.ChoiceTrace` describes, as JSON values.

    Args:
        token_ids: at least as many as the trace has records.
        trace: of these tokens, in a stream those since the last chunk.
        bound: the setting that left tokens out.
        scores: of the answer, as JSON values.
        sampler: that drew the tokens.
        forks: the branches of the answer; None if it can't have forked.
    """
    tokens = entry_values(token_ids[: len(trace)], trace.values())
    return {
        "version": VERSION,
        "sampler": sampler,
        "tokens": tokens,
        "not_kept": trace.not_kept,
        "bound": bound,
        "scores": scores,
        "forks": forks,
    }


def choice_json(
    token_ids: Sequence[int],
    trace: TokenTrace,
    bound: str | None = None,
    scores: Mapping[str, Any] | None = None,
    sampler: str | None = None,
    forks: Forks | None = None,
) -> Iterator[bytes]:
    """The same as parts of JSON; other threads run in between.

    Args:
        token_ids: see :func:`choice_values`.
        trace: see :func:`choice_values`.
        bound: see :func:`choice_values`.
        scores: see :func:`choice_values`.
        sampler: see :func:`choice_values`.
        forks: see :func:`choice_values`.
    """
    yield b'{"version":%d,"sampler":%b,"tokens":[' % (VERSION, to_json(sampler))
    yield from entries_json(token_ids[: len(trace)], trace.values())
    told = trace.not_kept, to_json(bound), to_json(scores), to_json(forks)
    yield b'],"not_kept":%d,"bound":%b,"scores":%b,"forks":%b}' % told
