"""Which requests can fork, and how: refused in one sentence where a branch wouldn't be what a request of its own is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_entropix.engine.resolved import resolved_values
from vllm_entropix.forks import answers, choice
from vllm_entropix.samplers import chain, registry
from vllm_entropix.samplers.observed import VLLM
from vllm_entropix.samplers.request import PREFIX, RequestSettings
from vllm_entropix.settings.errors import ConfigError
from vllm_entropix.settings.server import Forks

# The request's settings of a branch beyond the first, for whoever samples it. It doesn't begin with the prefix of settings,
# since no user may give it.
BRANCH = "vllm_entropix_branch"
_ASKED = f"{PREFIX}_forks"
# How keys begin that may make a request fork.
_MAY_ASK = (f"{PREFIX}_fork", f"{PREFIX}_preset")
# Parameters that a branch can't have, and their values that ask for nothing. They look at the tokens that were generated, of
# which the engine takes those before a branch's own for its prompt, or they ask for what the engine tells of all tokens.
_NOTHING: tuple[Any, ...] = (None, 0, False, [])
_PARAMETERS = {
    "structured_outputs": _NOTHING,
    "min_tokens": _NOTHING,
    "presence_penalty": _NOTHING,
    "frequency_penalty": _NOTHING,
    "bad_words": _NOTHING,
    "thinking_token_budget": (None,),
    "repetition_detection": (None,),
    "prompt_logprobs": (None,),
    "skip_reading_prefix_cache": _NOTHING,
}
# The same of parameters whose values don't compare.
_GIVEN = ("logprob_token_ids", "prompt_logprob_token_ids")


def check_server(config: Mapping[str, Any]) -> None:
    """ConfigError if a server's settings of forks can't be had; ``config``: its settings as plain values."""
    settings = Forks.model_validate(config["forks"])
    _check_choice(settings)
    if settings.branches > 1:
        _check_width(settings, config)


def how_to_fork(vllm_config: Any, params: Any) -> Forks | None:
    """How a request forks; None if it doesn't.

    Args:
        vllm_config: the engine's configuration.
        params: the request's parameters.

    Raises:
        ConfigError: it asks to, and can't; one sentence with the way out.
    """
    resolved = resolved_values(vllm_config)
    extra_args = getattr(params, "extra_args", None)
    if resolved is None or not hasattr(params, "extra_args"):
        return None
    config = resolved["config"]
    by_default = config["forks"]["branches"] > 1
    if not by_default and not (isinstance(extra_args, dict) and any(name.startswith(_MAY_ASK) for name in extra_args)):
        return None
    request = registry.parse_request(extra_args, config)
    given = request.fork_keys()
    if not request.enabled:
        if given:
            raise ConfigError(f"{given[0]} is given, but {PREFIX} is off for this request; leave one of them out")
        return None
    server = Forks.model_validate(config["forks"])
    settings = request.forks_of(server)
    # By itself, or by a preset that does.
    asked = settings.branches > 1 and (request.forks is not None or settings != server)
    if given and request.forks is None and settings.branches == 1:
        raise ConfigError(f"{given[0]} is given without {_ASKED}; say there how many branches may live at once")
    if settings.branches == 1:
        return None
    try:
        _check_choice(settings)
        _check_width(settings, config)
        for unsupported, what, way_out in _problems(vllm_config, params, request, settings, resolved):
            if unsupported:
                raise ConfigError(f"{_ASKED} can't be had with {what}; {way_out}")
    except ConfigError:
        if asked or given:
            raise
        return None
    return settings


def _check_choice(settings: Forks) -> None:
    """ConfigError if branches can't be compared as the settings say."""
    choice.chooser(settings.select)
    if settings.answer is not None:
        answers.rule_of(settings.answer)
    elif settings.select in choice.OF_ANSWERS:
        raise ConfigError(
            f"forks that are chosen by {settings.select} need a rule that finds the answer in a text; give one as "
            f"{PREFIX}_fork_answer or forks.answer, such as last-number"
        )
    if settings.horizon and settings.select in choice.OF_WHOLE_ANSWERS:
        raise ConfigError(
            f"forks that are chosen by {settings.select} run to their end, so there is no horizon of {settings.horizon} "
            f"tokens; set {PREFIX}_fork_horizon to 0"
        )


def _check_width(settings: Forks, config: Mapping[str, Any]) -> None:
    recorded = config["trace"]["alternatives"]
    if settings.width > recorded:
        raise ConfigError(
            f"a fork of {settings.width} branches needs as many recorded alternatives, but trace.alternatives is {recorded}; "
            f"set it to {settings.width}, or a smaller width"
        )


def _problems(
    vllm_config: Any, params: Any, request: RequestSettings, settings: Forks, resolved: Mapping[str, Any]
) -> list[tuple[bool, str, str]]:
    """(is it so?, what, the way out) for everything that a branch can't have."""
    model = vllm_config.model_config
    sampler = registry.sampler_of(request, resolved["config"])
    has_regimes = any(field.name == "regime" for field in registry.class_of(sampler).fields)
    if request.chain is not None:
        has_regimes = any(field.name == "regime" for name in request.chain.names for field in chain.stages()[name].fields)
    leave_out = "leave one of them out"
    return [
        (
            not vllm_config.cache_config.enable_prefix_caching,
            "prefix caching off, by which branches share what they have in common",
            "start without --no-enable-prefix-caching",
        ),
        (vllm_config.kv_transfer_config is not None, "a KV connector", "leave out --kv-transfer-config"),
        (bool(getattr(model, "return_sampling_mask", False)), "sampling masks", "leave out --return-sampling-mask"),
        (
            bool(getattr(model, "enable_return_routed_experts", False)),
            "routed experts in the answer",
            "leave out --enable-return-routed-experts",
        ),
        (
            settings.entropy is None and settings.place != "random" and not has_regimes,
            f"the sampler {sampler}, which knows no regimes, and no entropy to fork at",
            f"give {PREFIX}_fork_entropy",
        ),
        (sampler == VLLM, "vLLM's own sampler", "name another"),
        (
            settings.select == choice.ALL and params.output_kind.name != "FINAL_ONLY",
            f"all branches in a stream, by {PREFIX}_fork_select {choice.ALL}",
            "don't stream it",
        ),
        (params.n > 1, f"n = {params.n}", "ask for one answer"),
        (params.logprobs is not None, "logprobs", f"read {PREFIX}_trace instead"),
        *((getattr(params, name, None) not in none, name, leave_out) for name, none in _PARAMETERS.items()),
        *((getattr(params, name, None) is not None, name, leave_out) for name in _GIVEN),
    ]
