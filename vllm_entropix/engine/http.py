"""Endpoints that draw tokens: settings are read or refused, and whoever asks gets traces; all others get vLLM's own bytes.

A handler of vLLM's server is wrapped. What it asks of the engine is noted while it runs, and put as a field ``entropix``
(``records.schema.ChoiceTrace``) into each choice of its answer, or into the answer itself if that has no choices.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from vllm_entropix.engine import answers
from vllm_entropix.engine.collected import Collected
from vllm_entropix.engine.internal import wrap_internal
from vllm_entropix.engine.placement import is_ours, misplaced, refusal
from vllm_entropix.engine.resolved import resolved_values
from vllm_entropix.forks.choice import ALL
from vllm_entropix.samplers import chained
from vllm_entropix.samplers.registry import (
    name_of_sampler,
    names_for_samplers,
    parse_request,
    refuse_misspelt_of_chain,
    sampler_of,
)
from vllm_entropix.samplers.request import PREFIX, RequestSettings
from vllm_entropix.settings.errors import ConfigError
from vllm_entropix.settings.server import Forks

# The request that is being handled, for what the engine is asked meanwhile.
_COLLECTING: ContextVar[Collected | None] = ContextVar("entropix_collecting", default=None)


@dataclass(frozen=True)
class Endpoint:
    """What an endpoint of vLLM's server has for us.

    Attributes:
        place: dotted path of the table in its requests that settings are read from; None if it has none.
        carries_traces: can its answers carry a trace?
        has_choices: can they hold several answers?
    """

    place: str | None = "vllm_xargs"
    carries_traces: bool = True
    has_choices: bool = True


def wrap_handler(original: Callable[..., Any], endpoint: Endpoint) -> Callable[..., Any]:
    """A handler of an endpoint, which is given ``request`` and, by vLLM's own server, ``raw_request``."""
    signature = inspect.signature(original)
    if endpoint.place is None:  # it makes its requests itself
        original = wrap_internal(original)

    async def handler(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _COLLECTING.get() is not None:  # this handler serves another
            return await original(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs).arguments
        request, raw_request = given["request"], given.get("raw_request")
        resolved = _resolved(self)
        try:
            body = _with_settings_of_chain(request, await _body(request, raw_request), endpoint, resolved)
            told = _told(request, body, endpoint, resolved)
        except ConfigError as error:
            return await _refuse(self, error, request, raw_request)
        if told is None:
            return await original(self, *args, **kwargs)
        assert resolved is not None
        collected = Collected(getattr(request, "n", None) or 1, resolved["config"]["trace"]["response_tokens"], *told)
        with _collecting(collected):
            answer = await original(self, *args, **kwargs)
        if isinstance(answer, AsyncGenerator):
            return _stream(answer, collected)
        return await answers.with_traces(answer, collected, of_server=_is_of_server(raw_request))

    return handler


def wrap_generate(original: Callable[..., Any]) -> Callable[..., Any]:
    """The engine's ``generate``, an asynchronous generator."""

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = original(self, *args, **kwargs)
        collected = _COLLECTING.get()
        return outputs if collected is None else collected.noting(outputs)

    return generate


@contextmanager
def _collecting(collected: Collected) -> Iterator[None]:
    token = _COLLECTING.set(collected)
    try:
        yield
    finally:
        _COLLECTING.reset(token)


async def _stream(chunks: AsyncGenerator[Any, None], collected: Collected) -> AsyncGenerator[Any, None]:
    """A stream's chunks with their traces; some handlers ask the engine only when the first is wanted."""
    try:
        while True:
            with _collecting(collected):
                try:
                    chunk = await anext(chunks)
                except StopAsyncIteration:
                    return
            yield answers.chunk_with_traces(chunk, collected)
    finally:
        await chunks.aclose()


def _resolved(serving: Any) -> Mapping[str, Any] | None:
    """Our settings in the configuration of the engine that serves; None if it doesn't run entropix."""
    # vLLM 0.33 keeps the client of the decisions' endpoint further down.
    client = serving.engine_client if hasattr(serving, "engine_client") else serving.strategy.context.engine_client
    return resolved_values(client.vllm_config)


def _is_of_server(raw_request: Any) -> bool:
    """Does it come from vLLM's own server? `vllm run-batch` has none and Ray Serve makes one up."""
    return raw_request is not None and "app" in raw_request.scope


async def _body(request: Any, raw_request: Any) -> Mapping[str, Any]:
    """A request's body: as it came, if it is there and JSON; otherwise the fields that vLLM made of it."""
    if _is_of_server(raw_request) and "json" in raw_request.headers.get("content-type", ""):
        body = await raw_request.json()  # read by now, and kept
        if isinstance(body, dict):
            return body
    return {**(request.model_extra or {}), **{name: getattr(request, name) for name in request.model_fields_set}}


def _with_settings_of_chain(
    request: Any, body: Mapping[str, Any], endpoint: Endpoint, resolved: Mapping[str, Any] | None
) -> Mapping[str, Any]:
    """The body with what clients of llama.cpp and koboldcpp write at its top level in ``vllm_xargs``, as in the request.

    Raises:
        ConfigError: a value is out of range, or of a sampler that isn't in the chain; or a name is nearly one of these.
    """
    place = endpoint.place
    if place is None or "." in place or resolved is None or not hasattr(request, place):
        return body
    config = resolved["config"]
    if sampler_of(RequestSettings(), config) != chained.NAME:
        return body
    # What OpenAI's or vLLM's own request has means what it means there.
    of_vllm = type(request).model_fields
    others = [name for name in body if name not in of_vllm]
    refuse_misspelt_of_chain(others)
    top = {name: body[name] for name in others if name in names_for_samplers()}
    if not top:
        return body
    given = _table(body, place)
    moved = {**chained.of_body(top, given, config, getattr(request, "repetition_penalty", None)), **given}
    setattr(request, place, moved)
    return {**{name: value for name, value in body.items() if name not in top}, place: moved}


def _told(request: Any, body: Mapping[str, Any], endpoint: Endpoint, resolved: Any) -> tuple[str, bool] | None:
    """Whether a request's answer tells more than vLLM's own, be it the trace, scores or branches.

    Returns:
        The sampler that draws its tokens, and whether their records are told, too; None: it tells no more.

    Raises:
        ConfigError: it has a setting that is wrong, or that nobody would read.
    """
    wrong = misplaced(body, endpoint.place)
    if wrong is not None:
        raise ConfigError(refusal(wrong, endpoint.place))
    # Without entropix these names may be anybody's; frequency_penalty is also vLLM's own.
    others = [] if resolved is None else [name for name in body if name not in type(request).model_fields]
    stray = next((name for name in others if name in names_for_samplers()), None)
    if stray is not None:
        raise ConfigError(refusal(stray, endpoint.place))
    given = _table(body, endpoint.place)
    ours = [name for name in given if is_ours(name) or (resolved is not None and name in names_for_samplers())]
    if not ours:
        settings = RequestSettings()
        forks = _tells_branches(settings, request, endpoint, resolved)
        return (name_of_sampler(settings, resolved["config"]), False) if forks else None
    read = _table(request, endpoint.place)
    lost = next((name for name in ours if name not in read), None)
    if lost is not None:  # the body was of another kind than the request that was made of it
        raise ConfigError(refusal(f"{endpoint.place}.{lost}", None))
    server = None if resolved is None else resolved["config"]
    settings = parse_request(given, server)  # as it was sent: vLLM makes a number of true
    asked = f"{PREFIX}_trace" if settings.trace else f"{PREFIX}_scores" if settings.is_scored(default=False) else None
    if not settings.enabled:
        if asked is not None:
            raise ConfigError(f"{asked} is on, but {PREFIX} is off for this request; leave one of them out")
        return None
    if resolved is None:
        raise ConfigError(f"{ours[0]!r} can't be had: this server doesn't run entropix; start it with --sampler entropix")
    if getattr(request, "use_beam_search", False):
        raise ConfigError(f"{ours[0]!r} can't be had with beam search, which is vLLM's own; leave it out, or use_beam_search")
    if asked is not None and not endpoint.carries_traces:
        raise ConfigError(f"{asked} can't be had on this endpoint, whose answers have no place for it; leave it out")
    if asked is not None and getattr(request, "background", False):
        raise ConfigError(f"{asked} can't be had with background, since nobody waits for the answer; leave one of them out")
    forks = _tells_branches(settings, request, endpoint, resolved)
    return (name_of_sampler(settings, resolved["config"]), asked is not None) if asked is not None or forks else None


def _tells_branches(settings: RequestSettings, request: Any, endpoint: Endpoint, resolved: Mapping[str, Any] | None) -> bool:
    """Does an answer tell its branches? Where nothing has a place for them, it is what was asked for all the same.

    Args:
        settings: of the request.
        request: vLLM's.
        endpoint: that it came to.
        resolved: our settings in the engine's configuration; None: it doesn't run entropix.

    Raises:
        ConfigError: all branches are wanted, and there is a place for one answer.
    """
    if resolved is None or endpoint.place is None:  # vLLM's own requests don't fork
        return False
    forks = settings.forks_of(Forks.model_validate(resolved["config"]["forks"]))
    if forks.branches > 1 and forks.select == ALL and not endpoint.has_choices:
        raise ConfigError(
            f"{PREFIX}_fork_select {ALL} can't be had on this endpoint, whose answers have no choices; name another chooser"
        )
    return forks.branches > 1 and endpoint.carries_traces and not getattr(request, "background", False)


def _table(source: Any, place: str | None) -> Mapping[str, Any]:
    """The table at a dotted path of a body, or of the request that was made of it."""
    found = source
    for name in () if place is None else place.split("."):
        found = found.get(name) if isinstance(found, Mapping) else getattr(found, name, None)
    return found if isinstance(found, Mapping) and place is not None else {}


async def _refuse(serving: Any, error: ConfigError, request: Any, raw_request: Any) -> Any:
    """Answer 400; with disaggregated prefill vLLM has to release what waits for the request elsewhere, as when it refuses."""

    async def answer() -> Any:
        return serving.create_error_response(str(error))

    clean_up = getattr(serving, "_with_kv_transfer_rejection_cleanup", None)
    if clean_up is None or not hasattr(request, "kv_transfer_params"):
        return await answer()
    return await clean_up(answer(), request, raw_request)
