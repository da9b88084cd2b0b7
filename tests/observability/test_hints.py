"""What is said of a clarification that is set and never inserted."""

import logging

import numpy as np
import pytest

from vllm_entropix.observability.hints import WATCHED, Watch, never_forced
from vllm_entropix.records.fields import names
from vllm_entropix.records.regimes import REGIMES
from vllm_entropix.samplers.entropix.settings import EntropixConfig

VOCABULARY = 512  # 9 bits
CLARIFICATION = {"text": "hm?"}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"regimes": False}, "regimes is off"),
        ({"regimes": False, "clarification": {"token_ids": [5]}}, "regimes is off"),
        ({"clarification": {**CLARIFICATION, "max_per_request": 0}}, "clarification.max_per_request is 0"),
        ({"thresholds": {"helv": {"entropy_above": 9}}}, "thresholds.helv.entropy_above is 9.0, and 512 tokens have 9.00 bits"),
        ({"thresholds": {"helv": {"varentropy_below": 0}}}, "thresholds.helv.varentropy_below is 0"),
        ({"thresholds": {"lelv": {"entropy_below": 9.5, "varentropy_below": 0.1}}}, "thresholds.lelv takes every token"),
        # These can.
        ({}, None),
        ({"thresholds": {"helv": {"entropy_above": 8.9}}}, None),
        ({"thresholds": {"lelv": {"entropy_below": 9.5, "varentropy_below": 0.05}}}, None),
        ({"clarification": {**CLARIFICATION, "max_per_request": 0, "rule": "ever"}}, None),
        ({"clarification": {**CLARIFICATION, "cooldown": 1_000_000}}, None),
        # Nothing was set.
        ({"regimes": False, "clarification": {}}, None),
        ({"regimes": False, "clarification": {}, "fidelity": "original"}, None),
    ],
)
def test_what_the_settings_tell(settings, named):
    found = never_forced(EntropixConfig.from_dict({"clarification": CLARIFICATION, **settings}), VOCABULARY)
    assert found is None if named is None else (found is not None and named in found)


def records(number: int, regime: str, forced: int = 0) -> np.ndarray:
    rows = np.zeros((number, len(names())), dtype=np.float32)
    rows[:, names().index("regime")] = REGIMES.index(regime)
    rows[:forced, names().index("forced")] = 1
    return rows


def said_of(*batches: np.ndarray) -> list[str]:
    """What is logged while these are counted, one after the other."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.plugins.entropix")
    logger.addHandler(handler)
    watch = Watch()
    try:
        for batch in batches:
            watch.see(batch)
    finally:
        logger.removeHandler(handler)
    return messages


def test_what_the_first_thousand_tokens_tell():
    assert said_of(records(WATCHED - 1, "ADAPTIVE")) == []
    [message] = said_of(*[records(WATCHED // 2, "ADAPTIVE")] * 9)
    assert "none was inserted into the first 1000 tokens, of which 0 were in HELV: the thresholds" in message
    [message] = said_of(records(7, "HELV"), records(WATCHED, "LEHV"), records(WATCHED, "HELV"))
    assert "the first 1007 tokens, of which 7 were in HELV; requests, grammars" in message
    assert said_of(records(5, "HELV", forced=1), records(2 * WATCHED, "LELV")) == []
