"""Signals out: trace records, and what is made of them."""

from vllm_entropix.records.trace import TokenRecord, TokenTrace, traces

__all__ = ["TokenRecord", "TokenTrace", "traces"]
