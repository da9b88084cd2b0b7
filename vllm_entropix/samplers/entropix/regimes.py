"""Which kind of uncertainty a row is in (SEMANTICS 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_entropix.distribution.constants import Constants
from vllm_entropix.records.regimes import Regime


def classify(entropy: Tensor, varentropy: Tensor, constants: Constants) -> Tensor:
    """The regime of each row, int64 ``[rows]``, from entropy (bits) and varentropy (bits²).

    Inequalities are strict and the first match wins. A metric that isn't finite matches none and gives ADAPTIVE.
    """
    finite = entropy.isfinite() & varentropy.isfinite()
    low_varentropy = varentropy < constants["thresholds.lelv.varentropy_below"]
    lelv = finite & low_varentropy & (entropy < constants["thresholds.lelv.entropy_below"])
    helv = (
        finite
        & (entropy > constants["thresholds.helv.entropy_above"])
        & (varentropy < constants["thresholds.helv.varentropy_below"])
    )
    lehv = (
        finite
        & (entropy < constants["thresholds.lehv.entropy_below"])
        & (varentropy > constants["thresholds.lehv.varentropy_above"])
    )
    hehv = (
        finite
        & (entropy > constants["thresholds.hehv.entropy_above"])
        & (varentropy > constants["thresholds.hehv.varentropy_above"])
    )
    regime = torch.full_like(entropy, Regime.ADAPTIVE, dtype=torch.int64)
    # Written last to first, so that the first match stands.
    for value, matches in ((Regime.HEHV, hehv), (Regime.LEHV, lehv), (Regime.HELV, helv), (Regime.LELV, lelv)):
        regime.masked_fill_(matches, int(value))
    return regime
