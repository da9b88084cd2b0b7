"""What is refused when an engine starts: a vLLM, a feature or a setting that the sampler can't support."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_entropix._version import __version__
from vllm_entropix.engine import vllm_check
from vllm_entropix.engine.arguments import KEY
from vllm_entropix.engine.resolved import RESOLVED
from vllm_entropix.engine.versions import SUPPORTED
from vllm_entropix.samplers.entropix.settings import EntropixConfig
from vllm_entropix.settings.errors import ConfigError, quoted

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Values of vLLM's rejection_sample_method under which tokens follow the target's distribution. Others are lossy: synthetic
# accepts at given rates, fly (0.33) accepts a mismatch where the target's entropy is high.
_EXACT_VERIFICATION = ("standard", "block")


def refuse_odd_keys(additional: Mapping[str, Any]) -> None:
    """ConfigError for a key that is like ours: nothing would read it."""
    for key in additional:
        if isinstance(key, str) and "entropix" in key.lower() and key not in (KEY, RESOLVED):
            raise ConfigError(
                f"additional_config has {quoted(key)}, which nothing reads; the sampler's settings stand under {KEY!r}"
            )


def refuse_unsupported(vllm_config: VllmConfig, config: EntropixConfig) -> None:
    """ConfigError for the first thing, in one sentence with the way out.

    Args:
        vllm_config: the engine's configuration, complete but for us.
        config: the sampler's settings.
    """
    mismatches = vllm_check.problems()
    if mismatches:
        raise ConfigError(
            f"vllm-entropix {__version__} works with vLLM {SUPPORTED}, but of this one {'; '.join(mismatches)}; "
            "install a version in this range, or start without --sampler entropix"
        )
    for unsupported, feature, way_out in _features(vllm_config):
        if unsupported:
            raise ConfigError(f"the sampler entropix doesn't work with {feature}; {way_out}")
    layers = config.attention.layers
    total = vllm_config.model_config.get_total_num_hidden_layers()
    if config.attention.enabled and isinstance(layers, tuple) and max(layers) >= total:
        raise ConfigError(f"attention.layers names layer {max(layers)}, but the model has layers 0 to {total - 1}")


def _features(vllm_config: VllmConfig) -> list[tuple[bool, str, str]]:
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
