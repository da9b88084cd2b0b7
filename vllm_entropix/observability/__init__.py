"""Signals out: trace records, and what is made of them."""

from vllm_entropix.records.trace import TokenRecord, TokenTrace, traces
from vllm_entropix.samplers import registry

# What samplers add to records is read here, too.
registry.known()

__all__ = ["TokenRecord", "TokenTrace", "traces"]
