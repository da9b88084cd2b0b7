"""Admission of requests in the frontend: refused with an error that everybody knows how to handle, or counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.exceptions import VLLMValidationError

from vllm_entropix.engine.carrier import OURS
from vllm_entropix.engine.chains import BREAKERS, resolved_breakers
from vllm_entropix.engine.forkable import BRANCH, how_to_fork
from vllm_entropix.engine.internal import is_internal
from vllm_entropix.engine.placement import is_ours
from vllm_entropix.engine.resolved import resolved_values
from vllm_entropix.observability import prometheus
from vllm_entropix.samplers import registry
from vllm_entropix.samplers.chain import ChainRequest
from vllm_entropix.samplers.request import GREEDY_BELOW, PREFIX, RequestSettings
from vllm_entropix.settings.errors import ConfigError, quoted


class RequestSettingsError(VLLMValidationError, ValueError):  # type: ignore[misc]
    """A request's entropix setting is unknown or out of range: HTTP 400, and a ValueError in Python."""


def admit(processor: Any, validate: Callable[[], Any], params: Any) -> Any:
    """Validate a request's parameters: ours here, all others as vLLM does.

    A request that vLLM makes for itself is opted out, and isn't counted.

    Args:
        processor: vLLM's InputProcessor.
        validate: its own validation.
        params: of the request: SamplingParams, or those of another task.

    Raises:
        RequestSettingsError: names the setting, its value and what is allowed.
    """
    _refuse_our_names(params)
    resolved = resolved_values(processor.vllm_config)
    if resolved is None:
        _refuse_unread(getattr(params, "extra_args", None))
        return validate()
    if not hasattr(params, "extra_args"):
        return validate()
    if is_internal():
        params.extra_args = {**(params.extra_args or {}), PREFIX: "off"}
        return validate()
    settings = _settings(params.extra_args, resolved["config"])
    if settings.chain is not None and settings.enabled:
        _give_breakers(processor.vllm_config.model_config, params, settings.chain)
    try:
        how_to_fork(processor.vllm_config, params)
    except ConfigError as error:
        raise RequestSettingsError(str(error)) from None
    result = validate()
    if resolved["counted"]:
        sampler = registry.class_of(registry.sampler_of(settings, resolved["config"]))
        label = sampler.label(settings, resolved["config"])
        prometheus.count_request(label if settings.enabled else "off", greedy=params.temperature < GREEDY_BELOW)
        if resolved["clarification"] is not None:
            prometheus.watch_clarification()
    return result


def _settings(extra_args: Any, server: Any = None) -> RequestSettings:
    try:
        return registry.parse_request(extra_args, server)
    except ConfigError as error:
        raise RequestSettingsError(str(error)) from None


def _give_breakers(model: Any, params: Any, asked: ChainRequest) -> None:
    """Let the request carry token ids for DRY's breakers: whoever samples has no tokenizer."""
    try:
        ids = resolved_breakers(model, asked, asked.own_breakers)
    except ConfigError as error:
        raise RequestSettingsError(str(error)) from None
    if ids is not None:
        params.extra_args = {**(params.extra_args or {}), BREAKERS: ids}


def _refuse_unread(extra_args: Any) -> None:
    """Ask nothing of entropix where it doesn't run, but that it be off."""
    asked = next((name for name in extra_args if is_ours(name)), None) if isinstance(extra_args, dict) else None
    if asked is not None and _settings(extra_args).enabled:
        raise RequestSettingsError(
            f"{quoted(asked)} can't be had: this engine doesn't run entropix; give LLM(...) sampler='entropix', or leave it out"
        )


def _refuse_our_names(params: Any) -> None:
    """A request may not hand in what only the engine says: where traces are written is the server's business."""
    extra_args = getattr(params, "extra_args", None)
    if isinstance(extra_args, dict) and BRANCH in extra_args:
        raise RequestSettingsError(f"{BRANCH!r} is the engine's own; leave it out")
    handed_in = extra_args.get("kv_transfer_params") if isinstance(extra_args, dict) else None
    if isinstance(handed_in, dict):
        for name in handed_in.keys() & OURS:
            raise RequestSettingsError(f"kv_transfer_params has {name!r}, which is the engine's own; leave it out")
