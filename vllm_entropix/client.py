"""Reading traces from the answers of a server, with the clients of openai, anthropic and litellm or any other.

Examples:
    >>> answer = client.chat.completions.create(..., extra_body={"vllm_xargs": {"entropix_trace": 1}})
    >>> for entry in trace_of(answer.choices[0]).tokens:
    ...     print(entry.regime, entry.entropy)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from vllm_entropix.records.schema import ChoiceTrace, TokenEntry
from vllm_entropix.samplers import registry

# What samplers add to records is read here, too.
registry.known()

__all__ = ["ASK", "ASK_SCORES", "ChoiceTrace", "StreamTraces", "TokenEntry", "trace_of"]

FIELD = "entropix"
# litellm keeps fields that it doesn't know in this one, unless it streams.
_OF_LITELLM = "provider_specific_fields"
# What a request adds to its body to get its trace: `extra_body=ASK` with the clients of openai, anthropic and litellm.
ASK: dict[str, Any] = {"vllm_xargs": {"entropix_trace": 1}}
# The same for the scores of the answer, which are ``trace_of(choice).scores``.
ASK_SCORES: dict[str, Any] = {"vllm_xargs": {"entropix_scores": 1}}


def trace_of(answer: Any) -> ChoiceTrace | None:
    """The trace in what carries one; None if there is none.

    Args:
        answer: a choice of a response or of a stream's chunk; where there are no choices (`/v1/responses`, `/v1/messages`), the
            response or an event of its stream. An object of a client, or the JSON object that it was made of.
    """
    data = _get(answer, FIELD)
    if data is None:
        data = _get(_get(answer, _OF_LITELLM), FIELD)
    return None if data is None else ChoiceTrace.model_validate(data)


def _get(holder: Any, name: str) -> Any:
    return holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)


class StreamTraces:
    """Gathers the traces of a stream, chunk by chunk or event by event.

    Of the helper ``client.chat.completions.stream(...)`` give it all events: what the helper itself gathers in
    ``get_final_completion()`` has the last chunk's trace only.

    Examples:
        >>> traces = StreamTraces()
        >>> for chunk in client.completions.create(..., stream=True, extra_body=ASK):
        ...     traces.add(chunk)
        >>> traces[0].tokens
    """

    def __init__(self) -> None:
        self._traces: dict[int, ChoiceTrace] = defaultdict(ChoiceTrace)

    def add(self, chunk: Any) -> None:
        """Take what a chunk or an event tells; others of a helper's events tell nothing.

        Args:
            chunk: an object of a client, or the JSON object that it was made of.
        """
        chunk = _get(chunk, "chunk") or chunk  # the helper of openai wraps each in an event
        choices = _get(chunk, "choices")
        if choices is None:
            self._add(0, chunk)
            return
        for choice in choices:
            self._add(_get(choice, "index") or 0, choice)

    def _add(self, index: int, answer: Any) -> None:
        part = trace_of(answer)
        if part is not None:
            known = self._traces[index]
            known.tokens.extend(part.tokens)
            known.sampler, known.not_kept, known.bound = part.sampler, part.not_kept, part.bound
            known.scores = part.scores or known.scores
            known.forks = part.forks or known.forks

    def __getitem__(self, index: int) -> ChoiceTrace:
        """The trace so far of a choice; of endpoints without choices, 0 is the answer's."""
        return self._traces[index]
