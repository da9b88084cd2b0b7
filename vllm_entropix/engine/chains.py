"""What a chain needs of the served model: the token ids of DRY's breakers, and no window wider than the context."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_entropix.samplers import chain, chained, registry
from vllm_entropix.samplers.request import RequestSettings
from vllm_entropix.settings.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import ModelConfig

    from vllm_entropix.samplers.entropix.settings import EntropixConfig

BREAKERS = "dry_sequence_breakers"


def with_breakers(model: ModelConfig, config: EntropixConfig) -> EntropixConfig:
    """The server's settings with token ids for the breakers of its chain, if DRY is in it.

    Raises:
        ConfigError: the tokenizer can't give one that was asked for, or a window is wider than the context.
    """
    if registry.sampler_of(RequestSettings(), config) != chained.NAME:
        return config
    asked = chained.read(config.sampler, {}, config)
    section: Any = getattr(config, "dry", None)
    ids = resolved_breakers(model, asked, section is not None and BREAKERS in section.model_fields_set)
    if ids is None or section is None:
        return config
    return config.model_copy(update={"dry": section.model_copy(update={BREAKERS: tuple(ids)})})


def resolved_breakers(model: ModelConfig, asked: chain.ChainRequest, explicit: bool) -> list[Any] | None:
    """Token ids, and tuples of them, for a chain's breakers; None if no text is among them.

    Args:
        model: the served one.
        asked: the chain.
        explicit: did somebody ask for these breakers? What a tokenizer can't give is left out of the defaults.

    Raises:
        ConfigError: as of :func:`with_breakers`.
    """
    for name in asked.names:
        window = chain.stages()[name].window
        if window is not None and asked.values[window] > model.max_model_len:
            raise ConfigError(
                f"{window} is {asked.values[window]}, but the model has room for {model.max_model_len} tokens; "
                "give at most that, or -1 to look at all"
            )
    if not any(isinstance(one, str) for one in asked.breakers):
        return None
    found = chain.breakers_of(asked.breakers, _tokenizer(model), explicit)
    return [ids[0] if len(ids) == 1 else list(ids) for ids in found]


def _tokenizer(model: ModelConfig) -> Any:
    from vllm.tokenizers import cached_tokenizer_from_config

    return None if model.skip_tokenizer_init else cached_tokenizer_from_config(model)
