"""Reading traces from the responses of a server, with the official ``openai`` client or any other.

Example:
    >>> answer = client.chat.completions.create(..., extra_body={"vllm_xargs": {"entropix_trace": 1}})
    >>> for entry in trace_of(answer.choices[0]).tokens:
    ...     print(entry.regime, entry.entropy)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from vllm_entropix.observability.schema import ChoiceTrace, TokenEntry

__all__ = ["ASK", "ChoiceTrace", "StreamTraces", "TokenEntry", "trace_of"]

FIELD = "entropix"
# What a request adds to its body to get its trace: `extra_body=ASK` with the openai client.
ASK: dict[str, Any] = {"vllm_xargs": {"entropix_trace": 1}}


def trace_of(choice: Any) -> ChoiceTrace | None:
    """The trace in a choice of a response or of a stream's chunk; None if it has none.

    Args:
        choice: an object of the openai client, or the JSON object that it was made of.
    """
    data = choice.get(FIELD) if isinstance(choice, Mapping) else getattr(choice, FIELD, None)
    return None if data is None else ChoiceTrace.model_validate(data)


class StreamTraces:
    """Gathers the traces of a stream's choices, chunk by chunk.

    Example:
        >>> traces = StreamTraces()
        >>> for chunk in client.completions.create(..., stream=True, extra_body=ASK):
        ...     traces.add(chunk)
        >>> traces[0].tokens
    """

    def __init__(self) -> None:
        self._traces: dict[int, ChoiceTrace] = defaultdict(ChoiceTrace)

    def add(self, chunk: Any) -> None:
        """Take what a chunk (an object of the openai client, or its JSON) tells."""
        choices = chunk.get("choices", ()) if isinstance(chunk, Mapping) else chunk.choices
        for choice in choices:
            part = trace_of(choice)
            if part is not None:
                index = choice["index"] if isinstance(choice, Mapping) else choice.index
                known = self._traces[index]
                known.tokens.extend(part.tokens)
                known.not_kept = part.not_kept

    def __getitem__(self, index: int) -> ChoiceTrace:
        """The trace so far of a choice."""
        return self._traces[index]
