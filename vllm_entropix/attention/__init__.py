"""Observing paged attention: which rows, which layers, which keys. Knows nothing of vLLM's classes but their shape."""

from vllm_entropix.attention.layers import LayerAttention
from vllm_entropix.attention.observer import AttentionObserver, find_attention_layers, select_layers
from vllm_entropix.attention.paged_keys import UnsupportedAttentionError
from vllm_entropix.attention.statistics import measure_layer

__all__ = [
    "AttentionObserver",
    "LayerAttention",
    "UnsupportedAttentionError",
    "find_attention_layers",
    "measure_layer",
    "select_layers",
]
