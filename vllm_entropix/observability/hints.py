"""Whether a clarification that is set can ever be inserted: what the settings tell, and what the first tokens do."""

from __future__ import annotations

import logging
import math

import numpy as np

from vllm_entropix.records.fields import column
from vllm_entropix.records.regimes import Regime
from vllm_entropix.samplers.entropix.settings import EntropixConfig

# Tokens after which it is said that none was forced.
WATCHED = 1000
logger = logging.getLogger("vllm.plugins.entropix")


def never_forced(config: EntropixConfig, vocabulary: int) -> str | None:
    """Why the clarification that the settings name can't be inserted into any request that keeps them; None if it can.

    Args:
        config: the server's settings.
        vocabulary: tokens of the model, whose entropy is their logarithm at most.
    """
    if config.clarification.text is None and config.clarification.token_ids is None:
        return None
    helv, lelv = config.thresholds.helv, config.thresholds.lelv
    most = math.log2(vocabulary)
    if not config.regimes:
        return "regimes is off"
    if config.clarification_rule == "cooldown" and config.clarification.max_per_request == 0:
        return "clarification.max_per_request is 0"
    if helv.entropy_above >= most:
        return f"thresholds.helv.entropy_above is {helv.entropy_above}, and {vocabulary} tokens have {most:.2f} bits at most"
    if helv.varentropy_below == 0:
        return "thresholds.helv.varentropy_below is 0, and no varentropy is below that"
    if lelv.entropy_below > most and lelv.varentropy_below >= helv.varentropy_below:
        return "thresholds.lelv takes every token that thresholds.helv would"
    return None


class Watch:
    """Says once, after a thousand counted tokens, that a clarification is set and none of it was forced among them."""

    def __init__(self) -> None:
        self._tokens = self._lost = 0
        self._over = False

    def see(self, records: np.ndarray) -> None:
        """Take note of ``records [tokens, fields]``."""
        if self._over:
            return
        regime, forced = column("regime"), column("forced")
        if regime is None:
            return
        # Samplers without regimes ask for none.
        records = records[~np.isnan(records[:, regime])]
        self._tokens += len(records)
        self._lost += int((records[:, regime] == Regime.HELV).sum())
        if (records[:, forced] > 0).any():
            self._over = True
        elif self._tokens >= WATCHED:
            self._over = True
            logger.warning(
                "entropix: a clarification is set, but none was inserted into the first %d tokens, of which %d were in HELV%s.",
                self._tokens,
                self._lost,
                ": the thresholds may not suit this model, see docs/choosing-thresholds.md"
                if self._lost == 0
                else "; requests, grammars and the clarification's rule, place and end_below can keep it out",
            )
