"""The clarification in the served tokenizer: its tokens, and those after which it may begin."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.logger import init_logger

from vllm_entropix.rows.forcing import Places
from vllm_entropix.samplers.entropix.settings import EntropixConfig
from vllm_entropix.settings.errors import ConfigError, quoted
from vllm_entropix.settings.server import MAX_CLARIFICATION_TOKENS

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Under vLLM's own logger, whose handlers are set up in every process.
logger = init_logger("vllm.plugins.entropix")


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
    if settings.place != "anywhere" and vllm_config.model_config.skip_tokenizer_init:
        raise ConfigError(
            f"clarification.place {settings.place!r} needs the tokenizer, which --skip-tokenizer-init leaves out; "
            "set it to anywhere"
        )
    if len(ids) > MAX_CLARIFICATION_TOKENS:
        raise ConfigError(f"{source} is {len(ids)} tokens long; at most {MAX_CLARIFICATION_TOKENS} can be forced")
    outside = [token for token in ids if token >= vocabulary]
    if outside:
        raise ConfigError(
            f"{source} has token {outside[0]}, which is outside the model's vocabulary of {vocabulary}; "
            "set clarification.text, or clarification.token_ids below it"
        )
    return tuple(ids)


# How a text ends after which a sentence or a line may begin; what closes quotes and brackets may follow the mark.
_SENTENCE = re.compile(r"[.!?\u2026\u3002\uff01\uff1f][\"'\u2019\u201d\u00bb)\]*_]*\s*\Z|\n\s*\Z")
_LINE = re.compile(r"\n\s*\Z")


def clarification_places(vllm_config: VllmConfig, config: EntropixConfig) -> Places:
    """Where the clarification may begin in the texts of the served tokenizer, and what ends them."""
    settings, model = config.clarification, vllm_config.model_config
    vocabulary = model.get_vocab_size()
    after, ends = None, set[int]()
    if settings.place != "anywhere":
        tokenizer, border = _tokenizer(vllm_config), _LINE if settings.place == "lines" else _SENTENCE
        known = min(vocabulary, len(tokenizer))
        after = np.zeros(vocabulary, dtype=bool)
        after[:known] = [border.search(tokenizer.decode([token])) is not None for token in range(known)]
        if not after.any():
            logger.warning(
                "entropix: the clarification can never be inserted: no token of this model ends what clarification.place %s "
                "names; set another.",
                settings.place,
            )
    if settings.end_below < 1:
        told = model.try_get_generation_config().get("eos_token_id")
        ends.update([told] if isinstance(told, int) else told or ())
        if not model.skip_tokenizer_init and (own := getattr(_tokenizer(vllm_config), "eos_token_id", None)) is not None:
            ends.add(own)
    return Places(after, tuple(sorted(token for token in ends if 0 <= token < vocabulary)))


def _tokenizer(vllm_config: VllmConfig) -> Any:
    from vllm.tokenizers import cached_tokenizer_from_config

    return cached_tokenizer_from_config(vllm_config.model_config)


def _encode(vllm_config: VllmConfig, text: str) -> tuple[int, ...]:
    if vllm_config.model_config.skip_tokenizer_init:
        raise ConfigError(
            "clarification.text needs the tokenizer, which --skip-tokenizer-init leaves out; give clarification.token_ids"
        )
    tokenizer = _tokenizer(vllm_config)
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    unknown = getattr(tokenizer, "unk_token_id", None)
    if not ids or (unknown is not None and unknown in ids):
        raise ConfigError(
            f"the served tokenizer can't encode the clarification text {quoted(text)}; "
            "choose another, or give clarification.token_ids"
        )
    return ids
