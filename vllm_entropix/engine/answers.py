"""Puts traces into what a handler of vLLM's server answers: objects, JSON, or a stream's chunks.

JSON of many records takes long to make. Where vLLM's server sends it, it is made in a thread and put between vLLM's own bytes:
the event loop, which serves everybody, never handles it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any
from uuid import uuid4

from fastapi.responses import JSONResponse

from vllm_entropix.engine.collected import Collected, Part
from vllm_entropix.engine.usage import count_pruned, count_pruned_in

FIELD = "entropix"
# Tells a router that reads no body whether any choice abstains, where the request says when.
HEADER = "x-entropix-abstained"
_DATA = "data: "
# Events of a stream without choices that carry what was drawn since the last; those at the end do even if that is nothing.
_LAST = frozenset({"message_delta", "response.completed", "response.incomplete", "response.failed"})
# The answer that is about to be made JSON, in the task that handles its request.
_ANSWERED: ContextVar[Collected | None] = ContextVar("entropix_answered", default=None)


async def with_traces(answer: Any, collected: Collected, of_server: bool) -> Any:
    """An answer that isn't streamed, with its traces.

    Args:
        answer: vLLM's object.
        collected: what the engine gave.
        of_server: will vLLM's server make JSON of it? Then the traces are put in there.
    """
    if of_server:
        _ANSWERED.set(collected)
        return answer
    for target, part in _places(answer, getattr(answer, "choices", None), lambda choice: choice.index, collected):
        setattr(target, FIELD, await asyncio.to_thread(part.values))
    count_pruned(answer, collected.beside)
    return answer


def chunk_with_traces(chunk: Any, collected: Collected) -> Any:
    """A stream's chunk with the traces of what was drawn since the last.

    Args:
        chunk: text in the format of server-sent events, or an event of vLLM's.
        collected: what the engine gave.
    """
    if not isinstance(chunk, str):
        part = _of_event(chunk.type, collected)
        if part is not None:
            setattr(chunk, FIELD, part.values())
        if chunk.type in _LAST:
            count_pruned(getattr(chunk, "response", chunk), collected.beside)
        return chunk
    name, _, body = chunk.partition(_DATA)
    if not body.startswith("{"):
        return chunk
    data = json.loads(body)
    found = False
    for choice in data.get("choices") or ():
        part = collected.take(choice["index"], ended=bool(choice.get("finish_reason")))
        if part is not None and (part.token_ids or choice.get("finish_reason")):
            choice[FIELD] = part.values()
            found = True
    if "choices" not in data:
        part = _of_event(data.get("type", ""), collected)
        if part is not None:
            data[FIELD] = part.values()
            found = True
    if "choices" in data or data.get("type") in _LAST:
        found = count_pruned_in(data, collected.beside) or found
    return f"{name}{_DATA}{json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n" if found else chunk


def _of_event(kind: str, collected: Collected) -> Part | None:
    if kind not in _LAST and not kind.endswith((".delta", "_block_delta")):
        return None
    part = collected.take_all(ended=kind in _LAST)
    return part if part is not None and (part.token_ids or kind in _LAST) else None


def wrap_json_response(original: Callable[..., Any]) -> Callable[..., Any]:
    """Makes an endpoint's JSON."""

    def json_response(content: Any = None, *args: Any, **kwargs: Any) -> Any:
        collected = _ANSWERED.get()
        if collected is None or not isinstance(content, dict) or kwargs.get("status_code", 200) != 200:
            return original(content, *args, **kwargs)
        _ANSWERED.set(None)
        parts = {}
        for target, part in _places(content, content.get("choices"), lambda choice: choice["index"], collected):
            target[FIELD] = mark = uuid4().hex
            parts[mark] = part
        count_pruned_in(content, collected.beside)
        plain = original(content, *args, **kwargs)
        if collected.abstains is not None:
            plain.headers[HEADER] = "true" if collected.abstains else "false"
        return _TracedResponse(plain, parts)

    return json_response


def _places(
    answer: Any, choices: list[Any] | None, number_of: Callable[[Any], int], collected: Collected
) -> Iterator[tuple[Any, Part]]:
    """(what the trace is put into, trace): the choices, or the answer itself if it has none."""
    for target in [answer] if choices is None else choices:
        part = collected.take_all() if choices is None else collected.take(number_of(target))
        if part is not None:
            yield target, part


class _TracedResponse(JSONResponse):
    """vLLM's response, with traces in the places of their marks.

    Args:
        plain: vLLM's.
        parts: mark → trace.
    """

    def __init__(self, plain: JSONResponse, parts: dict[str, Part]) -> None:
        # Not by the constructor of the class above, which would make JSON once more.
        self.status_code, self.background, self.body = plain.status_code, plain.background, plain.body
        self.raw_headers = plain.raw_headers
        self._parts = parts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        pieces = await asyncio.to_thread(lambda: list(self._pieces()))
        length = str(sum(map(len, pieces))).encode()
        headers = [(name, length if name == b"content-length" else value) for name, value in self.raw_headers]
        await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(0)  # sending into a free socket waits for nobody
        await send({"type": "http.response.body", "body": b""})
        if self.background is not None:
            await self.background()

    def _pieces(self) -> Iterator[bytes]:
        rest = bytes(self.body)
        for mark, part in self._parts.items():  # in the order of the choices
            before, _, rest = rest.partition(b'"%b"' % mark.encode())
            yield before
            yield b"".join(part.json())
        yield rest
