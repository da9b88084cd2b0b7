"""Traces in OpenAI responses, for requests that ask for them; all others get vLLM's own bytes.

A choice of a response, or of a stream's chunk, gets a field ``entropix`` (``observability.schema.ChoiceTrace``).
"""

from __future__ import annotations

import inspect
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from vllm_entropix.config import ConfigError
from vllm_entropix.observability.schema import ChoiceTrace
from vllm_entropix.observability.trace import TokenTrace
from vllm_entropix.requests import RequestSettings

FIELD = "entropix"
_PREFIX = "data: "


def asks_for_trace(request: Any) -> bool:
    """Does an OpenAI request ask for its trace?"""
    try:
        return RequestSettings.parse(getattr(request, "vllm_xargs", None)).trace is True
    except ConfigError:
        return False  # it will be refused where requests are admitted


class _Collected:
    """Traces and token ids of a response's choices, as they come."""

    def __init__(self) -> None:
        self._traces: dict[int, TokenTrace] = {}
        self._token_ids: dict[int, list[int]] = {}
        self._sent: dict[int, int] = {}

    def add(self, choice: int, completion: Any, delta: bool) -> None:
        trace = getattr(completion, "entropix_trace", None)
        if trace is None:
            return
        self._traces[choice] = trace
        known = self._token_ids.setdefault(choice, [])
        if not delta:
            known.clear()
        known.extend(completion.token_ids)

    def next_part(self, choice: int) -> dict[str, Any] | None:
        """What hasn't been sent of a choice's trace; None if there is no trace."""
        trace = self._traces.get(choice)
        if trace is None:
            return None
        start = self._sent.get(choice, 0)
        part = ChoiceTrace.of(self._token_ids[choice], trace, start)
        self._sent[choice] = start + len(part.tokens)
        return part.model_dump(mode="json")


def wrap_full(original: Callable[..., Any], results: str) -> Callable[..., Any]:
    """A chat response's maker, which is given a stream of outputs as ``results``."""
    signature = inspect.signature(original)

    async def full(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, *args, **kwargs)
        if not asks_for_trace(call.arguments["request"]):
            return await original(*call.args, **call.kwargs)
        collected = _Collected()
        call.arguments[results] = _noting(call.arguments[results], collected, 1, delta=False)
        response = await original(*call.args, **call.kwargs)
        _attach(response, collected)
        return response

    return full


def wrap_final(original: Callable[..., Any], results: str) -> Callable[..., Any]:
    """A completion response's maker, which is given the final outputs as ``results``, one per prompt."""
    signature = inspect.signature(original)

    def final(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, *args, **kwargs)
        response = original(*call.args, **call.kwargs)
        request = call.arguments["request"]
        if asks_for_trace(request):
            collected = _Collected()
            for prompt, output in enumerate(call.arguments[results]):
                for completion in output.outputs:
                    collected.add(prompt * (request.n or 1) + completion.index, completion, delta=False)
            _attach(response, collected)
        return response

    return final


def wrap_stream(original: Callable[..., Any], results: str) -> Callable[..., Any]:
    """A stream's maker, which is given a stream of outputs as ``results``."""
    signature = inspect.signature(original)

    def stream(self: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[str, None]:
        call = signature.bind(self, *args, **kwargs)
        request = call.arguments["request"]
        if asks_for_trace(request):
            collected = _Collected()
            call.arguments[results] = _noting(call.arguments[results], collected, request.n or 1, delta=True)
            return _with_traces(original(*call.args, **call.kwargs), collected)
        made: AsyncGenerator[str, None] = original(*call.args, **call.kwargs)
        return made

    return stream


async def _noting(outputs: AsyncIterator[Any], collected: _Collected, choices: int, delta: bool) -> AsyncIterator[Any]:
    """The outputs as they are, noted on their way; those of completions come with the prompt's number."""
    async for item in outputs:
        prompt, output = item if isinstance(item, tuple) else (0, item)
        for completion in output.outputs:
            collected.add(prompt * choices + completion.index, completion, delta)
        yield item


async def _with_traces(chunks: AsyncGenerator[str, None], collected: _Collected) -> AsyncGenerator[str, None]:
    async for chunk in chunks:
        body = chunk.removeprefix(_PREFIX).strip()
        if not chunk.startswith(_PREFIX) or not body.startswith("{"):
            yield chunk
            continue
        data = json.loads(body)
        found = False
        for choice in data.get("choices") or ():
            part = collected.next_part(choice["index"])
            if part is not None and (part["tokens"] or choice.get("finish_reason")):
                choice[FIELD] = part
                found = True
        yield f"{_PREFIX}{json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n" if found else chunk


def _attach(response: Any, collected: _Collected) -> None:
    for choice in getattr(response, "choices", None) or ():  # an error has none
        part = collected.next_part(choice.index)
        if part is not None:
            setattr(choice, FIELD, part)
