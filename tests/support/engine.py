"""Real engines in the test process, one at a time, and looking into them."""

import functools
import gc
import json
from typing import Any

KV_BYTES = 64 << 20
_current: tuple[str, Any] | None = None


def engine(model: Any, *, fresh: bool = False, **arguments: Any) -> Any:
    """An ``LLM`` with these arguments: the one that is open, if it has the same, otherwise a new one in its place.

    A process holds one engine at a time: vLLM's groups of ranks are global.
    """
    global _current
    settings = {
        "model": str(model),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "kv_cache_memory_bytes": KV_BYTES,
        "max_num_seqs": 32,
        "seed": 0,
        "disable_log_stats": True,
        **arguments,
    }
    key = json.dumps(settings, sort_keys=True, default=str)
    if _current is not None and _current[0] == key and not fresh:
        return _current[1]
    close_engine()
    _register_kernels_once()

    from vllm import LLM

    import vllm_entropix  # noqa: F401  (for the keywords sampler and sampler_config)

    _current = (key, LLM(**settings))
    return _current[1]


@functools.cache
def _register_kernels_once() -> None:
    """Register vLLM's kernels for CPUs with the first engine alone: for each it looks through every module, for seconds."""
    from vllm.platforms import current_platform

    register = functools.cache(current_platform.register_triton_kernel_overrides)
    current_platform.register_triton_kernel_overrides = register


def close_engine() -> None:
    """Shut the open engine down, if there is one."""
    global _current
    if _current is None:
        return
    from vllm.distributed import cleanup_dist_env_and_memory

    _current[1].llm_engine.engine_core.shutdown()
    _current = None
    gc.collect()
    cleanup_dist_env_and_memory()


def worker_of(llm: Any) -> Any:
    """The worker of an in-process engine."""
    return llm.llm_engine.model_executor.driver_worker.worker


def adapter_of(llm: Any) -> Any:
    """Our adapter in an in-process engine."""
    return worker_of(llm)._entropix


def scheduler_of(llm: Any) -> Any:
    """The scheduler of an in-process engine."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def generate(llm: Any, prompts: list[Any], params: list[Any]) -> list[Any]:
    """Outputs in the order of the prompts, without a progress bar."""
    return llm.generate(prompts, params, use_tqdm=False)
