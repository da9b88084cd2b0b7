"""The science: metrics, regimes, parameters and filters in pure PyTorch, usable in a notebook, without vLLM."""

from vllm_entropix.records.regimes import Regime
from vllm_entropix.sampling.filters import Candidates, Distribution
from vllm_entropix.sampling.metrics import AttentionStatistics, HeadStatistics, LogitsMetrics, Metrics
from vllm_entropix.sampling.parameters import Parameters
from vllm_entropix.sampling.sampler import Decision, EntropixSampler

__all__ = [
    "AttentionStatistics",
    "Candidates",
    "Decision",
    "Distribution",
    "EntropixSampler",
    "HeadStatistics",
    "LogitsMetrics",
    "Metrics",
    "Parameters",
    "Regime",
]
