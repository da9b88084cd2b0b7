"""Finalises a VllmConfig that asks for entropix: the feature gate, the clarification's ids, and vLLM's own fields."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_entropix._version import __version__
from vllm_entropix.engine import vllm_check
from vllm_entropix.engine.arguments import KEY, FromCommandLine
from vllm_entropix.engine.subclasses import SCHEDULER, WORKER, qualified_name
from vllm_entropix.observability import disk, hints
from vllm_entropix.samplers.entropix.settings import EntropixConfig, as_mapping
from vllm_entropix.settings.errors import ConfigError, quoted
from vllm_entropix.settings.server import MAX_CLARIFICATION_TOKENS

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Under vLLM's own logger, whose handlers are set up in every process.
logger = init_logger("vllm.plugins.entropix")

# Where the resolved settings travel in additional_config, beside what the user wrote.
RESOLVED = "entropix_resolved"
# Values of vLLM's rejection_sample_method under which tokens follow the target's distribution. Others are lossy: synthetic
# accepts at given rates, fly (0.33) accepts a mismatch where the target's entropy is high.
_EXACT_VERIFICATION = ("standard", "block")


@dataclass(frozen=True)
class Resolved:
    """Settings as every process of an engine uses them.

    Attributes:
        config: the validated configuration.
        clarification: ids that HELV forces, or None.
        counted: are all tokens counted for Prometheus?
        version: of the package in the process that resolved them.
    """

    config: EntropixConfig
    clarification: tuple[int, ...] | None
    counted: bool
    version: str

    def to_json(self) -> dict[str, Any]:
        """Plain values, for additional_config."""
        return {
            "config": self.config.model_dump(mode="json", by_alias=True),
            "clarification": None if self.clarification is None else list(self.clarification),
            "counted": self.counted,
            "version": self.version,
        }

    @classmethod
    def of(cls, vllm_config: VllmConfig, process: str) -> Resolved:
        """The settings in an engine's configuration, for a process of this engine.

        Args:
            vllm_config: as another process finalised it.
            process: what to call this one in an error.

        Raises:
            ConfigError: that process has another version of this package, on another node perhaps; names both.
        """
        data = vllm_config.additional_config[RESOLVED]
        if data["version"] != __version__:
            raise ConfigError(
                f"{process} on node {platform.node()} has vllm-entropix {__version__}, but the engine was configured by "
                f"{data['version']}; install the same version on every node"
            )
        clarification = data["clarification"]
        return cls(
            EntropixConfig.from_dict(data["config"]),
            None if clarification is None else tuple(clarification),
            data["counted"],
            data["version"],
        )


def finalise(vllm_config: VllmConfig, additional: Mapping[str, Any], statistics: bool = True) -> VllmConfig:
    """Make an engine of this configuration sample by entropix, if ``additional`` asks for it.

    Everything is refused here and not later: an error in the engine's own process looks like a hang.

    Args:
        vllm_config: the engine's configuration, complete but for us.
        additional: the additional config as the user gave it.
        statistics: does the engine log statistics at all?

    Raises:
        ConfigError: a setting or a feature in use can't be had; one sentence with the way out. From a command line the
            process ends with that sentence and status 1 instead.
    """
    try:
        _refuse_odd_keys(additional)
        wanted = additional.get(KEY)
        if wanted is None or wanted is False:
            return vllm_config
        config = EntropixConfig.from_dict({} if wanted is True else as_mapping(wanted))
        _refuse_unsupported(vllm_config, config)
        counted = config.prometheus and statistics
        disk.check(config.trace)
        resolved = Resolved(config, _clarification_ids(vllm_config, config), counted, __version__)
    except ConfigError as error:
        if isinstance(additional, FromCommandLine):
            raise SystemExit(f"vllm-entropix: {error}") from None
        raise
    vllm_config.additional_config = {**additional, RESOLVED: resolved.to_json()}
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    parallel.worker_cls = qualified_name(WORKER, parallel.worker_cls)
    scheduler_class = scheduler.get_scheduler_cls()
    scheduler.scheduler_cls = qualified_name(SCHEDULER, f"{scheduler_class.__module__}.{scheduler_class.__qualname__}")
    if parallel._api_process_count == 1 or parallel._api_process_rank < 0:  # otherwise this is one of several API servers
        _say(vllm_config, config, scheduler_class)
    return vllm_config


def _say(vllm_config: VllmConfig, config: EntropixConfig, scheduler_class: type) -> None:
    """Log what nobody sees otherwise: what vLLM's own warning means, and a clarification that can't be."""
    logger.info(
        "entropix: the scheduler extends vLLM's own %s, and asynchronous scheduling is %s as without the plugin; "
        "what vLLM says of custom scheduler classes and degraded performance doesn't concern it.",
        scheduler_class.__name__,
        "on" if vllm_config.scheduler_config.async_scheduling else "off",
    )
    never = hints.never_forced(config, vllm_config.model_config.get_vocab_size())
    if never is not None:
        logger.warning("entropix: the clarification can never be inserted: %s.", never)


def _refuse_odd_keys(additional: Mapping[str, Any]) -> None:
    """ConfigError for a key that is like ours: nothing would read it."""
    for key in additional:
        if isinstance(key, str) and "entropix" in key.lower() and key not in (KEY, RESOLVED):
            raise ConfigError(
                f"additional_config has {quoted(key)}, which nothing reads; the sampler's settings stand under {KEY!r}"
            )


def _refuse_unsupported(vllm_config: VllmConfig, config: EntropixConfig) -> None:
    mismatches = vllm_check.problems()
    if mismatches:
        raise ConfigError(
            f"vllm-entropix {__version__} works with vLLM {vllm_check.SUPPORTED}, but of this one {'; '.join(mismatches)}; "
            "install a version in this range, or start without --sampler entropix"
        )
    for unsupported, feature, way_out in _gate(vllm_config):
        if unsupported:
            raise ConfigError(f"the sampler entropix doesn't work with {feature}; {way_out}")
    layers = config.attention.layers
    total = vllm_config.model_config.get_total_num_hidden_layers()
    if config.attention.enabled and isinstance(layers, tuple) and max(layers) >= total:
        raise ConfigError(f"attention.layers names layer {max(layers)}, but the model has layers 0 to {total - 1}")


def _gate(vllm_config: VllmConfig) -> list[tuple[bool, str, str]]:
    """(is it in use?, feature, the way out) for everything that can't be supported."""
    from vllm import envs

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    v2 = vllm_config.use_v2_model_runner
    speculation = vllm_config.speculative_config is not None
    verification = getattr(vllm_config.speculative_config, "rejection_sample_method", _EXACT_VERIFICATION[0])
    return [
        (
            model.runner_type == "pooling",
            "pooling models, which draw no tokens",
            "start without --sampler entropix",
        ),
        (
            bool(getattr(model, "is_diffusion", False)),
            "diffusion models",
            "start without --sampler entropix",
        ),
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            "context parallelism, which splits a sequence's keys or queries over ranks",
            "set --decode-context-parallel-size and --prefill-context-parallel-size to 1",
        ),
        (
            bool(parallel.enable_dbo) or int(getattr(parallel, "ubatch_size", 0) or 0) > 1,
            "dual-batch overlap",
            "leave out --enable-dbo and --ubatch-size",
        ),
        (
            getattr(vllm_config, "watermark_config", None) is not None,
            "watermarking, which draws tokens its own way",
            "leave out --watermark-config",
        ),
        (
            bool(getattr(model, "enable_trace_replay", False)),
            "trace replay",
            "leave out --enable-trace-replay",
        ),
        (
            bool(parallel.enable_batch_sharded_sampling),
            "batch-sharded sampling, which moves a sequence's sampling from rank to rank",
            "leave out --enable-batch-sharded-sampling",
        ),
        (
            bool(getattr(envs, "VLLM_USE_RUST_FRONTEND", False)),
            "the Rust frontend, which loads no plugins",
            "unset VLLM_USE_RUST_FRONTEND",
        ),
        (
            verification not in _EXACT_VERIFICATION,
            f"rejection_sample_method {verification!r}, which keeps drafts that the sampler's distribution rejects",
            f"set it to {' or '.join(_EXACT_VERIFICATION)} in the speculative config",
        ),
        (
            speculation and not v2,
            "speculative decoding on Model Runner V1",
            "leave out the speculative config, or set VLLM_USE_V2_MODEL_RUNNER=1",
        ),
    ]


def _clarification_ids(vllm_config: VllmConfig, config: EntropixConfig) -> tuple[int, ...] | None:
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
