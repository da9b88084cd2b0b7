"""The tokens of the clarification: ids from the settings, or their text in the served tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_entropix.samplers.entropix.settings import EntropixConfig
from vllm_entropix.settings.errors import ConfigError, quoted
from vllm_entropix.settings.server import MAX_CLARIFICATION_TOKENS

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def clarification_ids(vllm_config: VllmConfig, config: EntropixConfig) -> tuple[int, ...] | None:
    """The ids that HELV forces, from the configuration and the served tokenizer; None if there are none."""
    vocabulary = vllm_config.model_config.get_vocab_size()
    settings = config.clarification
    if settings.text is not None:
        ids = _encode(vllm_config, settings.text)
        source = f"the clarification text {quoted(settings.text)}"
    elif settings.token_ids is not None:
        ids, source = settings.token_ids, "clarification.token_ids"
    elif config.fidelity == "original" and config.original.clarification_token_ids:
        ids, source = config.original.clarification_token_ids, "the original's clarification token"
    else:
        return None
    if len(ids) > MAX_CLARIFICATION_TOKENS:
        raise ConfigError(f"{source} is {len(ids)} tokens long; at most {MAX_CLARIFICATION_TOKENS} can be forced")
    outside = [token for token in ids if token >= vocabulary]
    if outside:
        raise ConfigError(
            f"{source} has token {outside[0]}, which is outside the model's vocabulary of {vocabulary}; "
            "set clarification.text, or clarification.token_ids below it"
        )
    return tuple(ids)


def _encode(vllm_config: VllmConfig, text: str) -> tuple[int, ...]:
    from vllm.tokenizers import cached_tokenizer_from_config

    if vllm_config.model_config.skip_tokenizer_init:
        raise ConfigError(
            "clarification.text needs the tokenizer, which --skip-tokenizer-init leaves out; give clarification.token_ids"
        )
    tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    unknown = getattr(tokenizer, "unk_token_id", None)
    if not ids or (unknown is not None and unknown in ids):
        raise ConfigError(
            f"the served tokenizer can't encode the clarification text {quoted(text)}; "
            "choose another, or give clarification.token_ids"
        )
    return ids
