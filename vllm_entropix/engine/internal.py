"""Requests that no user made: steps of a beam search, reads of scores, the detection of a language.

vLLM makes their SamplingParams, reads log-probabilities or one token from them and throws the rest away. No user can opt them
out, so entropix leaves them alone: sampled as vLLM samples, neither traced nor counted.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from typing import Any

_INTERNAL: ContextVar[bool] = ContextVar("entropix_internal", default=False)


def is_internal() -> bool:
    """Is the request that is being made here vLLM's own?"""
    return _INTERNAL.get()


@contextmanager
def _internal() -> Iterator[None]:
    token = _INTERNAL.set(True)
    try:
        yield
    finally:
        _INTERNAL.reset(token)


def wrap_internal(original: Callable[..., Any]) -> Callable[..., Any]:
    """A function, a coroutine or an asynchronous generator that makes requests of vLLM's own."""
    if inspect.isasyncgenfunction(original):

        async def generator(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
            async with aclosing(original(*args, **kwargs)) as items:
                while True:
                    with _internal():  # not around yield: the consumer's own requests are none
                        try:
                            item = await anext(items)
                        except StopAsyncIteration:
                            return
                    yield item

        return generator
    if inspect.iscoroutinefunction(original):

        async def coroutine(*args: Any, **kwargs: Any) -> Any:
            with _internal():
                return await original(*args, **kwargs)

        return coroutine

    def function(*args: Any, **kwargs: Any) -> Any:
        with _internal():
            return original(*args, **kwargs)

    return function
