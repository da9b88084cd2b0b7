"""Signals out: trace records, and what is made of them."""

from vllm_entropix.observability.trace import TokenRecord, TokenTrace, traces

__all__ = ["TokenRecord", "TokenTrace", "traces"]
