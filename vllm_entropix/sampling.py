"""The science: metrics, regimes, parameters and filters in pure PyTorch, usable in a notebook, without vLLM."""

from vllm_entropix.distribution.attention import AttentionStatistics, HeadStatistics, Metrics
from vllm_entropix.distribution.filters import Candidates, Distribution
from vllm_entropix.distribution.plan import Parameters
from vllm_entropix.distribution.statistics import LogitsMetrics
from vllm_entropix.records.regimes import Regime
from vllm_entropix.samplers.entropix.sampler import Decision, EntropixSampler

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
