"""Composes metrics, regimes, parameters and filters for a batch of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vllm_entropix.distribution import filters
from vllm_entropix.distribution.attention import AttentionStatistics, Metrics, joined
from vllm_entropix.distribution.backend import Backend, backend_for
from vllm_entropix.distribution.constants import Constants
from vllm_entropix.distribution.filters import Distribution
from vllm_entropix.distribution.plan import Parameters
from vllm_entropix.distribution.shape import shape
from vllm_entropix.distribution.statistics import LogitsMetrics
from vllm_entropix.records.regimes import Regime
from vllm_entropix.samplers.entropix.parameters import base_parameters, confidence, parameters
from vllm_entropix.samplers.entropix.regimes import classify

if TYPE_CHECKING:
    from vllm_entropix.samplers.entropix.settings import EntropixConfig
    from vllm_entropix.settings.rules import Fidelity

# PyTorch takes ten times as long to compare with a member of an enumeration as with its number.
_HELV = int(Regime.HELV)

StatisticsOfRegimes = Callable[[Tensor], AttentionStatistics | None]


@dataclass(frozen=True)
class Decision:
    """What is done with each row, and why.

    Attributes:
        regime: int64 ``[rows]``, values of :class:`Regime`.
        parameters: temperature, top_p, top_k, min_p and number of draws of each row.
        confidence: the score's constant C, ``[rows]``.
        metrics: the six metrics.
        log_normaliser: ln Σ exp(logits), ``[rows]``.
    """

    regime: Tensor
    parameters: Parameters
    confidence: Tensor
    metrics: Metrics
    log_normaliser: Tensor
    _logits: Tensor
    _fidelity: Fidelity

    @property
    def temperature(self) -> Tensor:
        """Temperature of each row, ``[rows]``; 0 is argmax."""
        return self.parameters.temperature

    @property
    def top_p(self) -> Tensor:
        """Kept probability mass of each row, ``[rows]``."""
        return self.parameters.top_p

    @property
    def top_k(self) -> Tensor:
        """Number of candidates of each row, int64 ``[rows]``."""
        return self.parameters.top_k

    @property
    def min_p(self) -> Tensor:
        """Smallest probability of each row relative to its largest, ``[rows]``."""
        return self.parameters.min_p

    def distribution(self, best_of_n: bool = True) -> Distribution:
        """The distribution of each row's draw.

        Args:
            best_of_n: fold ADAPTIVE's best of n draws in; False gives the filtered distribution alone.
        """
        return filters.compact(*self.candidates(int(self.top_k.max()), best_of_n))

    def candidates(self, count: int, best_of_n: bool = True) -> tuple[filters.Candidates, Tensor]:
        """The ``count`` largest logits of each row and their probabilities ``[rows, count]``; at least the largest top_k."""
        return shape(self._logits, self.parameters, self._fidelity, count, best_of_n)


class EntropixSampler:
    """The entropix decision for a batch of rows, in plain PyTorch.

    Rows never influence one another. float64 logits give float64 results, others float32.

    Examples:
        >>> sampler = EntropixSampler(EntropixConfig.preset("jax-2024-10"))
        >>> decision = sampler.decide(torch.randn(2, 100))
        >>> [Regime(r).name for r in decision.regime.tolist()]
        ['ADAPTIVE', 'ADAPTIVE']
    """

    # May a kernel decide what the methods below define?
    uses_kernels = True

    def __init__(self, config: EntropixConfig, kernels: bool = False) -> None:
        """``kernels``: decide by kernels where there are some for the logits' device and type."""
        self.config = config
        self.kernels = kernels

    def decide(
        self,
        logits: Tensor,
        statistics: AttentionStatistics | StatisticsOfRegimes | None = None,
        constants: Constants | None = None,
    ) -> Decision:
        """Decide for ``logits [rows, vocab]``.

        Args:
            logits: as they reach the draw: masked and penalised, before temperature and filters.
            statistics: attention statistics of the rows; None runs on the logits alone. A callable is given the regimes
                ``[rows]`` and returns the statistics, so that rows whose regime reads no attention needn't be measured.
            constants: numbers of each row's own configuration; by default this sampler's for all.
        """
        backend = backend_for(logits.device, logits.dtype) if self.kernels else Backend(logits.device)
        metrics = backend.statistics(logits)
        if constants is None:
            constants = Constants.from_config(self.config, metrics.entropy.dtype, logits.device)
        regime, attention, chosen, score = self.rule(metrics, statistics, constants, backend.name)
        return Decision(
            regime=regime,
            parameters=chosen,
            confidence=score,
            metrics=joined(metrics, attention),
            log_normaliser=metrics.log_normaliser,
            _logits=logits,
            _fidelity=self.config.fidelity,
        )

    def classified(self, metrics: LogitsMetrics, constants: Constants) -> Tensor:
        """The regime of each row, int64 ``[rows]``."""
        return classify(metrics.entropy, metrics.varentropy, constants)

    def attention(self, measured: AttentionStatistics | None) -> AttentionStatistics | None:
        """The attention that each row's parameters follow, of what was measured."""
        return measured

    def asks(self, regime: Tensor, metrics: LogitsMetrics, constants: Constants) -> Tensor:
        """Which rows ask for the clarification, bool ``[rows]``."""
        del metrics, constants
        return regime == _HELV

    def rule(
        self,
        metrics: LogitsMetrics,
        statistics: AttentionStatistics | StatisticsOfRegimes | None,
        constants: Constants,
        backend: str,
    ) -> tuple[Tensor, AttentionStatistics | None, Parameters, Tensor]:
        """Regime, attention, parameters and confidence of each row, from its metrics.

        Args:
            metrics: of the logits.
            statistics: as of :meth:`decide`.
            constants: of each row.
            backend: name of the implementation that is at hand; ``numba``'s decides as PyTorch does, to the bit.
        """
        if backend == "numba" and self.uses_kernels:
            regime, attention, chosen, score = self._by_numba(metrics, statistics, constants)
        else:
            regime = self.classified(metrics, constants)
            attention = self.attention(statistics(regime) if callable(statistics) else statistics)
            chosen = parameters(regime, metrics, attention, constants)
            score = confidence(metrics, attention, constants)
        if not self.config.regimes:
            chosen = base_parameters(metrics.entropy, constants)
        return regime, attention, chosen, score

    @staticmethod
    def _by_numba(
        metrics: LogitsMetrics, statistics: AttentionStatistics | StatisticsOfRegimes | None, constants: Constants
    ) -> tuple[Tensor, AttentionStatistics | None, Parameters, Tensor]:
        """What ``rule`` otherwise does in PyTorch."""
        from vllm_entropix.samplers.entropix import numba_rule as kernel

        numbers, rows = constants.values.numpy(), metrics.entropy.shape[0]
        entropy, varentropy = metrics.entropy.numpy(), metrics.varentropy.numpy()
        regimes = np.empty(rows, dtype=np.int64)
        kernel.classify(entropy, varentropy, numbers, regimes)
        regime = torch.from_numpy(regimes)
        attention = statistics(regime) if callable(statistics) else statistics
        attended, measured = np.zeros((4, rows), dtype=np.float32), np.zeros(rows, dtype=bool)
        if attention is not None:
            attended[0], attended[1] = attention.attention_entropy.numpy(), attention.attention_varentropy.numpy()
            attended[2], attended[3] = attention.agreement.numpy(), attention.interaction_strength.numpy()
            measured = np.ones(rows, dtype=bool) if attention.measured is None else attention.measured.numpy()
        floats, integers = np.empty((4, rows), dtype=np.float32), np.empty((2, rows), dtype=np.int64)
        (temperature, top_p, min_p, score), (top_k, samples) = floats, integers
        kernel.decide(
            *(regimes, entropy, varentropy, attended, measured, numbers),
            *(temperature, top_p, top_k, min_p, samples, score),
        )
        of_floats, of_integers = torch.from_numpy(floats).unbind(), torch.from_numpy(integers).unbind()
        chosen = Parameters(of_floats[0], of_floats[1], of_integers[0], of_floats[2], of_integers[1])
        return regime, attention, chosen, of_floats[3]
