"""Attention backend → reader of its keys: the table of what can be observed, which ``vllm-entropix doctor`` asks, too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from vllm_entropix.attention.paged_keys import CpuAmxKeys, CpuVectorKeys, KeyReader, PlainKeys, UnsupportedAttentionError


def _plain_keys(layer: Any) -> KeyReader:
    """A cache ``[blocks, kv_heads, block_size, head_dim + value_dim]``, keys first, of any strides."""
    # The kernels read 16 bytes at a time. No cache of vLLM's begins anywhere else.
    if layer.kv_cache.data_ptr() % 16:
        raise UnsupportedAttentionError(f"the key cache of layer {layer.layer_name} isn't aligned to 16 bytes")
    dtype = str(layer.kv_cache_dtype)
    if dtype in ("fp8", "fp8_e4m3", "fp8_e5m2"):
        cache = layer.kv_cache.view(torch.float8_e5m2 if dtype == "fp8_e5m2" else torch.float8_e4m3fn)
        return PlainKeys(cache, layer.head_size, layer._k_scale)
    if layer.kv_cache.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UnsupportedAttentionError(f"a key cache of type {dtype} is packed")
    return PlainKeys(layer.kv_cache, layer.head_size)


def _cpu_keys(layer: Any) -> KeyReader:
    """A cache that is packed for the CPU's instruction set."""
    if str(layer.kv_cache_dtype).startswith("fp8"):
        raise UnsupportedAttentionError("the CPU backend's fp8 key cache is packed")
    isa = getattr(layer, "isa", None)
    if isa in ("vec", "vec16"):
        return CpuVectorKeys(layer.kv_cache)
    if isa == "amx":
        return CpuAmxKeys(layer.kv_cache)
    raise UnsupportedAttentionError(f"the CPU backend packs keys for {isa}")


# By the name that vLLM's backend gives itself.
READERS: Mapping[str, Callable[[Any], KeyReader]] = MappingProxyType(
    {
        "FLASH_ATTN": _plain_keys,
        "TRITON_ATTN": _plain_keys,
        "FLASHINFER": _plain_keys,
        "FLEX_ATTENTION": _plain_keys,
        "CPU_ATTN": _cpu_keys,
    }
)


def key_reader(layer: Any) -> KeyReader:
    """Return the reader of an attention layer's cache.

    Args:
        layer: vLLM's ``Attention`` module, after its cache was bound.

    Raises:
        UnsupportedAttentionError: no reader knows how the cache is packed, or the backend attends to other positions than the
            layer's own settings say.
    """
    refuse_altered(layer.attn_backend)
    backend = layer.attn_backend.get_name()
    if backend not in READERS:
        raise UnsupportedAttentionError(f"attention backend {backend} keeps its keys in a form of its own")
    return READERS[backend](layer)


def refuse_altered(backend: Any) -> None:
    """Refuse a backend that hands another one's kernels positions or queries of its own choice.

    vLLM makes such backends (chunked local attention, static sinks, fast prefill of shared caches) as subclasses that keep
    the other one's name.

    Args:
        backend: vLLM's backend class, of a layer or of a group of layers.

    Raises:
        UnsupportedAttentionError: the class doesn't name itself.
    """
    if "get_name" not in vars(backend):
        raise UnsupportedAttentionError(f"{backend.__name__} chooses by itself what {backend.get_name()} attends to")
