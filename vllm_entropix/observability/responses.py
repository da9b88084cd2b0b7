"""Traces in saved HTTP responses: what a file of traces would say of them, as far as a response tells it.

Bodies of /v1/completions, /v1/chat/completions, /v1/responses and /v1/messages are read, saved streams of them, and the lines
of ``vllm run-batch``. A response doesn't tell its prompt, its preset or the borders of the regimes. It tells the texts of
single tokens only if ``logprobs`` were asked for, or in a stream; otherwise all of an answer's text stands with its last token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from vllm_entropix.client import FIELD, trace_of
from vllm_entropix.records.line import SamplerPart, named
from vllm_entropix.samplers import chained

_END = "[DONE]"


def body_of(data: Any) -> Mapping[str, Any] | None:
    """The body of a response in a JSON value, None if it holds none: the value itself, or in a line of ``vllm run-batch``."""
    if not isinstance(data, Mapping):
        return None
    if FIELD in data:
        return _with_a_choice(data)
    if isinstance(data.get("response"), Mapping):
        return body_of(data["response"].get("body"))
    return data if isinstance(data.get("choices"), list) else None


def _with_a_choice(data: Mapping[str, Any]) -> dict[str, Any]:
    """What has no choices (/v1/responses, /v1/messages, an event of their streams), as if it had one."""
    delta, usage = data.get("delta"), data.get("usage")
    ended = delta if isinstance(delta, Mapping) else data
    return {
        "id": data.get("id") or "answer",
        "created": data.get("created_at"),
        "model": data.get("model"),
        "usage": {"prompt_tokens": usage.get("input_tokens")} if isinstance(usage, Mapping) else None,
        "choices": [
            {
                "text": delta if isinstance(delta, str) else _said([ended]),
                "finish_reason": ended.get("stop_reason") or data.get("status"),
                FIELD: data[FIELD],
            }
        ],
    }


def _said(parts: Any) -> str:
    """All text in parts of an answer, which may have parts themselves."""
    texts = []
    for part in parts if isinstance(parts, list) else ():
        if isinstance(part, Mapping):
            texts += [part[name] for name in ("thinking", "text") if isinstance(part.get(name), str)]
            texts += [_said(part.get(name)) for name in ("output", "content")]
    return "".join(texts)


def sequences(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The fields of ``TraceLine`` that a response tells, for each of its choices.

    Raises:
        ValueError: no choice has a trace, or one isn't a trace (also pydantic's ValidationError).
    """
    chunks = Chunks()
    chunks.add(body)
    found = list(chunks.sequences())
    if not found:
        raise ValueError("a response without a trace; ask for it with vllm_xargs entropix_trace")
    return found


class Chunks:
    """Puts the chunks of a stream together; a response that isn't streamed is a single chunk."""

    def __init__(self) -> None:
        self._choices: dict[tuple[str, int], dict[str, Any]] = {}
        # Comes with the last chunk, which has no choices.
        self._prompt_tokens: dict[str, int] = {}

    def add(self, body: Mapping[str, Any]) -> None:
        """Take a chunk; ValueError if it isn't one."""
        if isinstance(body.get("usage"), Mapping):
            self._prompt_tokens[str(body.get("id"))] = _number(body["usage"].get("prompt_tokens"))
        for choice in body["choices"]:
            if not isinstance(choice, Mapping):
                raise ValueError("choices: not objects")
            self._add(body, choice)

    def _add(self, body: Mapping[str, Any], choice: Mapping[str, Any]) -> None:
        trace = trace_of(choice)
        key = str(body.get("id")), _number(choice.get("index"))
        if trace is None and key not in self._choices:
            return
        later = dict.fromkeys(("finish", "scores", "sampler", "forks"))
        known = self._choices.setdefault(key, {"entries": [], "texts": [], "not_kept": 0, "body": body, **later})
        text = _text(choice)
        if trace is not None:
            known["entries"] += trace.tokens
            known["not_kept"], known["sampler"] = trace.not_kept, trace.sampler
            known["scores"] = trace.scores or known["scores"]
            known["forks"] = trace.forks or known["forks"]
            pieces = _pieces(choice, len(trace.tokens))
            # As in tokens.token_texts: what belongs to several tokens stands with the last of them.
            known["texts"] += pieces if pieces is not None else [""] * (len(trace.tokens) - 1) + [text] * bool(trace.tokens)
            text = "" if trace.tokens else text
        if text and known["texts"]:
            known["texts"][-1] += text
        known["finish"] = choice.get("finish_reason") or known["finish"]

    def sequences(self) -> Iterator[dict[str, Any]]:
        """The fields of ``TraceLine`` for each choice; what was added is forgotten."""
        choices, self._choices = self._choices, {}
        for (name, index), known in choices.items():
            body = known["body"]
            yield {
                "request_id": name,
                "index": index,
                "model": body.get("model"),
                "created": _time(body.get("created")),
                "sampler": _sampler(known["sampler"]),
                "prompt_tokens": self._prompt_tokens.get(name, 0),
                "token_ids": [entry.token_id for entry in known["entries"]],
                "texts": known["texts"],
                "finish_reason": known["finish"],
                "not_kept": known["not_kept"],
                "scores": known["scores"],
                "forks": known["forks"],
                "records": known["entries"],
            }


def event(line: bytes) -> bytes | None:
    """The data of a line of server-sent events, empty at the stream's end and in lines without data; None: another line."""
    name, colon, data = line.partition(b":")
    if not colon or name not in (b"data", b"event", b"id", b"retry", b""):
        return None
    data = data.strip()
    return data if name == b"data" and data != _END.encode() else b""


def _sampler(name: str | None) -> SamplerPart | None:
    """What a line tells of the sampler that a response names; a response doesn't tell its settings."""
    if name is None:
        return None
    return named(chained.NAME, samplers=name) if chained.is_chain(name) else named(name)


def _text(choice: Mapping[str, Any]) -> str:
    parts: list[Any] = [choice.get("text")]
    for place in ("message", "delta"):
        said = choice.get(place)
        if isinstance(said, Mapping):
            parts += [said.get("reasoning"), said.get("content")]
    return "".join(part for part in parts if isinstance(part, str))


def _pieces(choice: Mapping[str, Any], tokens: int) -> list[str] | None:
    """Texts of the last so many tokens by their logprobs, None if these don't tell."""
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, Mapping):
        return None
    pieces = logprobs.get("tokens")
    if not isinstance(pieces, list):
        content = logprobs.get("content")
        pieces = [part.get("token") for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []
    # Those of the prompt stand in front, if it was to be echoed.
    pieces = pieces[len(pieces) - tokens :] if len(pieces) >= tokens else []
    return pieces if len(pieces) == tokens and all(isinstance(piece, str) for piece in pieces) else None


def _number(value: Any) -> int:
    return value if isinstance(value, int) and value >= 0 else 0


def _time(seconds: Any) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    except (TypeError, ValueError, OverflowError, OSError):
        return ""
