"""The trace of a response's choice as JSON: what :class:`~.schema.ChoiceTrace` describes, without building its models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic_core import to_json

from vllm_entropix.records.encoding import entries_json, entry_values
from vllm_entropix.records.fields import VERSION
from vllm_entropix.records.trace import TokenTrace


def choice_values(
    token_ids: Sequence[int],
    trace: TokenTrace,
    bound: str | None = None,
    scores: Mapping[str, Any] | None = None,
    sampler: str | None = None,
) -> dict[str, Any]:
    """What :class:`~.schema.ChoiceTrace` describes, as JSON values.

    Args:
        token_ids: at least as many as the trace has records.
        trace: of these tokens, in a stream those since the last chunk.
        bound: the setting that left tokens out.
        scores: of the answer, as JSON values.
        sampler: that drew the tokens.
    """
    tokens = entry_values(token_ids[: len(trace)], trace.values())
    return {
        "version": VERSION,
        "sampler": sampler,
        "tokens": tokens,
        "not_kept": trace.not_kept,
        "bound": bound,
        "scores": scores,
    }


def choice_json(
    token_ids: Sequence[int],
    trace: TokenTrace,
    bound: str | None = None,
    scores: Mapping[str, Any] | None = None,
    sampler: str | None = None,
) -> Iterator[bytes]:
    """The same as parts of JSON; other threads run in between.

    Args:
        token_ids: see :func:`choice_values`.
        trace: see :func:`choice_values`.
        bound: see :func:`choice_values`.
        scores: see :func:`choice_values`.
        sampler: see :func:`choice_values`.
    """
    yield b'{"version":%d,"sampler":%b,"tokens":[' % (VERSION, to_json(sampler))
    yield from entries_json(token_ids[: len(trace)], trace.values())
    yield b'],"not_kept":%d,"bound":%b,"scores":%b}' % (trace.not_kept, to_json(bound), to_json(scores))
