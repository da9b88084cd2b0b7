"""Counters and histograms on vLLM's own ``/metrics``: tokens by regime, entropies, scores, forks, requests by preset and more.

They live in the frontend's processes, whose registry vLLM exports (and merges, if there are several API servers). What arrives
with tokens is gathered and counted a few times a second by a thread of its own, so that no request waits for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from functools import cache
from threading import Lock
from typing import Any

import numpy as np

from vllm_entropix.observability import ray_metrics
from vllm_entropix.observability.background import Background
from vllm_entropix.observability.hints import Watch
from vllm_entropix.records.fields import Field, all_fields, column
from vllm_entropix.records.regimes import Regime
from vllm_entropix.records.scores import SCORES

FLUSH_SECONDS = 0.2
# Stands for the regime of tokens whose sampler has none.
NO_REGIME = "none"
# Tokens that became the answer, and those of branches beside it.
COMMITTED, PRUNED = "committed", "pruned"


class _Metrics:
    """The metrics of this process, made when the first is needed: by then vLLM has chosen its multi-process mode."""

    def __init__(self) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        self.tokens = Counter("entropix_tokens", "Generated tokens by regime.", ["regime"])
        self.forced = Counter("entropix_forced_tokens", "Tokens forced as part of a clarification.")
        self.logits_only = Counter("entropix_logits_only_tokens", "Tokens sampled on logits alone, attention unmeasured.")
        self.requests = Counter(
            "entropix_requests",
            "Admitted requests by preset (off: opted out), and whether they are greedy, which no sampler changes.",
            ["preset", "greedy"],
        )
        self.lines_written = Counter("entropix_trace_lines_written", "Traced sequences written to disk.")
        self.lines_dropped = Counter("entropix_trace_lines_dropped", "Traced sequences that couldn't be written to disk.")
        self.abstained = Counter("entropix_abstained_answers", "Answers beyond the bound that their request abstains by.")
        self.answers = {score.name: Histogram(score.metric_name, score.described, buckets=score.buckets) for score in SCORES}
        self.forks = Counter("entropix_forks", "Tokens at which an answer parted into branches.")
        # Of several API servers each has branches of its own.
        self.branches = Gauge(
            "entropix_branches_live", "Branches of answers that fork, which are generated now.", multiprocess_mode="livesum"
        )
        self.fork_tokens = Counter(
            "entropix_fork_tokens", "Tokens of answers that fork: those of the answer, and those beside it.", ["kind"]
        )
        self._histograms: dict[str, Any] = {}
        # Present from the start, so that rates have a beginning.
        for regime in Regime:
            self.tokens.labels(regime.name)
        for kind in (COMMITTED, PRUNED):
            self.fork_tokens.labels(kind)
        for field in all_fields():
            self._histogram(field)

    def _histogram(self, field: Field) -> Any:
        """The histogram of a field, None if it is to have none; of one that was registered since, it is made now."""
        from prometheus_client import Histogram

        if field.buckets and field.name not in self._histograms:
            self._histograms[field.name] = Histogram(field.metric_name, field.described, buckets=field.buckets)
        return self._histograms.get(field.name)

    def count(self, records: np.ndarray) -> None:
        """Count ``records [tokens, fields]``."""
        regimes, forced, attention = (_column(records, name) for name in ("regime", "forced", "attention_entropy"))
        for regime in Regime:
            if number := int((regimes == regime).sum()):
                self.tokens.labels(regime.name).inc(number)
        if number := int(np.isnan(regimes).sum()):
            self.tokens.labels(NO_REGIME).inc(number)
        if number := int((forced > 0).sum()):
            self.forced.inc(number)
        # LELV reads no attention, so there it isn't missed; nor is it where there are no regimes.
        if missed := int((~np.isfinite(attention) & (regimes > Regime.LELV)).sum()):
            self.logits_only.inc(missed)
        for index, field in enumerate(all_fields()):
            histogram = self._histogram(field)
            if histogram is not None:
                _observe(histogram, records[:, index])


def _column(records: np.ndarray, name: str) -> np.ndarray:
    """A field of all records; NaN if no sampler has registered it."""
    index = column(name)
    return np.full(len(records), np.nan, np.float32) if index is None else records[:, index]


def _observe(histogram: Any, values: np.ndarray) -> None:
    """Observe many values at a time; ``Histogram.observe`` takes them one by one."""
    values = values[np.isfinite(values)]
    if not len(values):
        return
    buckets = np.bincount(np.searchsorted(histogram._upper_bounds, values), minlength=len(histogram._buckets))
    histogram._sum.inc(float(values.sum()))
    for bucket, number in zip(histogram._buckets, buckets.tolist(), strict=True):
        if number:
            bucket.inc(number)


class _Counting:
    """Gathers records and counts them every FLUSH_SECONDS while some arrive."""

    def __init__(self) -> None:
        self.metrics = _Metrics()
        self.watch, self.watched = Watch(), False
        self._waiting: deque[tuple[bytes, int]] = deque()
        self._lock = Lock()
        self.background = Background("entropix-metrics", self.flush, FLUSH_SECONDS)
        ray_metrics.start_in_actors()

    def add(self, records: bytes, tokens: int) -> None:
        self._waiting.append((records, tokens))  # atomic, as is popleft
        self.background.ask()

    def flush(self) -> None:
        with self._lock:
            rows = []
            while self._waiting:
                records, tokens = self._waiting.popleft()
                rows.append(np.frombuffer(records, dtype="<f4").reshape(tokens, -1)[:, : len(all_fields())])
            if rows:
                counted = np.concatenate(rows)
                self.metrics.count(counted)
                if self.watched:
                    self.watch.see(counted)


@cache
def _counting() -> _Counting:
    return _Counting()


def count(records: bytes, tokens: int) -> None:
    """Count the records of ``tokens`` tokens, soon."""
    _counting().add(records, tokens)


def count_request(preset: str, greedy: bool) -> None:
    """Count an admitted request; ``greedy``: its temperature is 0."""
    _counting().metrics.requests.labels(preset, "yes" if greedy else "no").inc()


def watch_clarification() -> None:
    """From now on see whether the clarification that is set is ever inserted."""
    _counting().watched = True


def count_answer(scores: Mapping[str, Any]) -> None:
    """Count a finished answer.

    Args:
        scores: as :class:`~vllm_entropix.records.scores.AnswerScores` describes them.
    """
    metrics = _counting().metrics
    for name, histogram in metrics.answers.items():
        if scores[name] is not None:
            histogram.observe(scores[name])
    if scores["abstained"]:
        metrics.abstained.inc()


def count_fork() -> None:
    """Count a token at which an answer parted into branches."""
    _counting().metrics.forks.inc()


def count_live_branches(more: int) -> None:
    """There are so many more branches that are generated now; fewer if it is negative."""
    _counting().metrics.branches.inc(more)


def count_forked_answer(committed: int, pruned: int) -> None:
    """Count the tokens of an answer that could fork, and those of its branches beside it."""
    tokens = _counting().metrics.fork_tokens
    tokens.labels(COMMITTED).inc(committed)
    tokens.labels(PRUNED).inc(pruned)


def count_trace_lines(written: int = 0, dropped: int = 0) -> None:
    """Count traced sequences that were, or couldn't be, written to disk."""
    metrics = _counting().metrics
    metrics.lines_written.inc(written)
    metrics.lines_dropped.inc(dropped)


def flush() -> None:
    """Count everything that has arrived, now."""
    if _counting.cache_info().currsize:
        _counting().flush()
