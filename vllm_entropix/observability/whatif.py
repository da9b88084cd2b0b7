"""Regimes that traced tokens would have been in under other thresholds, without running the model.

What is recomputed is the regime of each generated token, from its recorded entropy and varentropy. Another regime might have
drawn another token, after which the text would have gone on differently: that takes running the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_entropix.records.line import TraceLine
from vllm_entropix.records.regimes import REGIMES, regime_of
from vllm_entropix.samplers.entropix.settings import EntropixConfig
from vllm_entropix.settings.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Transitions:
    """How many tokens went from which regime to which.

    Attributes:
        counts: ``counts[before][after]``, in the order of REGIMES.
        without_regime: tokens that aren't counted, because their sampler has no regimes.
    """

    counts: list[list[int]] = field(default_factory=lambda: [[0] * len(REGIMES) for _ in REGIMES])
    without_regime: int = 0

    @property
    def tokens(self) -> int:
        """All tokens."""
        return sum(map(sum, self.counts))

    @property
    def before(self) -> dict[str, int]:
        """Tokens by recorded regime."""
        return {regime: sum(row) for regime, row in zip(REGIMES, self.counts, strict=True)}

    @property
    def after(self) -> dict[str, int]:
        """Tokens by recomputed regime."""
        return {regime: sum(column) for regime, column in zip(REGIMES, zip(*self.counts, strict=True), strict=True)}

    @property
    def changed(self) -> int:
        """Tokens in another regime than before."""
        return self.tokens - sum(self.counts[index][index] for index in range(len(REGIMES)))

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        rows = {regime: dict(zip(REGIMES, row, strict=True)) for regime, row in zip(REGIMES, self.counts, strict=True)}
        return {
            "tokens": self.tokens,
            "changed": self.changed,
            "without_regime": self.without_regime,
            "before": self.before,
            "after": self.after,
            "transitions": rows,
        }


def transitions(lines: Iterable[TraceLine], config: EntropixConfig) -> Transitions:
    """Recorded regimes against those by the thresholds of ``config``.

    Raises:
        ConfigError: torch, in which the rule is written, isn't installed; or there are no tokens.
    """
    try:
        import torch

        from vllm_entropix.distribution.constants import Constants
        from vllm_entropix.samplers.entropix.regimes import classify
    except ImportError as error:
        raise ConfigError(f"whatif needs torch ({error}); install vllm-entropix[cuda] or vllm-entropix[cpu]") from None
    # The engine's precision, so that a token on a border falls on the same side.
    constants = Constants.from_config(config, torch.float32, "cpu")

    def values(line: TraceLine, metric: str) -> Tensor:
        recorded = [getattr(entry, metric) for entry in line.records]
        return torch.tensor([math.nan if value is None else value for value in recorded], dtype=torch.float32)

    found = Transitions()
    for line in lines:
        after = classify(values(line, "entropy"), values(line, "varentropy"), constants).tolist()
        for entry, regime in zip(line.records, after, strict=True):
            before = regime_of(entry)
            if before is None:
                found.without_regime += 1
            else:
                found.counts[before][regime] += 1
    if not found.tokens:
        raise ConfigError("the traces have no tokens" + " with a regime" * (found.without_regime > 0))
    return found
