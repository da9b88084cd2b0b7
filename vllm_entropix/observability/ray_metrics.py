"""Hands our metrics to Ray where an engine's frontend is one of its actors (Ray Serve, Ray Data), which nobody scrapes.

All numbers of Prometheus' counters and histograms only grow, so each becomes a counter of Ray's, which grows by what has come
since. Ray's own histograms wouldn't do: they make up the sum from the middles of the buckets. A gauge becomes one of Ray's.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

from vllm_entropix.observability.background import Background

PREFIX = "entropix_"
EXPORT_SECONDS = 1.0
# As vLLM calls it on the metrics that it gives to Ray, so that both can be told apart, and joined, by replica.
REPLICA = "ReplicaId"
# Ray's counters take no increase of 0; this one is lost in whatever follows.
_NOTHING = sys.float_info.min

# What Prometheus calls a number that can fall, too.
GAUGE = "gauge"
# Name of a series, and its labels.
Series = tuple[str, tuple[tuple[str, str], ...]]


def start_in_actors() -> None:
    """Export from now on, every second, if this process is an actor of Ray's."""
    if _is_actor():
        Exporter(_replica()).start()


class Exporter:
    """Gives Ray what has come to our metrics since it was last asked.

    Args:
        replica: id of the replica that this process is, or an empty text.
        make: makes a counter or a gauge from its kind, its name, its description and the names of its labels; Ray's own by
            default.
    """

    def __init__(self, replica: str, make: Callable[[str, str, str, tuple[str, ...]], Any] | None = None) -> None:
        self._replica = replica
        self._make = _of_ray if make is None else make
        self._made: dict[str, Any] = {}
        self._given: dict[Series, float] = {}

        self._background = Background("entropix-ray-metrics", self._export_and_again, EXPORT_SECONDS)

    def start(self) -> None:
        """Export every second from now on. What Ray doesn't take is given another time."""
        self._background.ask()

    def _export_and_again(self) -> None:
        self._background.ask()
        self.export()

    def export(self) -> None:
        """Export once."""
        for (name, labels), kind, description, value in _numbers():
            series = name, labels
            # Series that are there before anything is counted, so that rates have a beginning.
            more = value - self._given[series] if series in self._given else value or _NOTHING
            if kind != GAUGE and more <= 0:
                continue
            tags = {name: _ascii(value) for name, value in (*labels, (REPLICA, self._replica))}
            if name not in self._made:
                self._made[name] = self._make(kind, name, _ascii(description), tuple(tags))
            if kind == GAUGE:
                self._made[name].set(value, tags=tags)
            else:
                self._made[name].inc(more, tags=tags)
                self._given[series] = value


def _of_ray(kind: str, name: str, description: str, tag_keys: tuple[str, ...]) -> Any:
    from ray.util import metrics

    return (metrics.Gauge if kind == GAUGE else metrics.Counter)(name, description, tag_keys)


def _numbers() -> Iterator[tuple[Series, str, str, float]]:
    """Series, kind, description and value of all that this process counts for entropix."""
    from prometheus_client import REGISTRY

    for metric in REGISTRY.collect():
        if not metric.name.startswith(PREFIX):
            continue
        for sample in metric.samples:
            if not sample.name.endswith("_created"):
                # Ray appends _total to every counter.
                name = sample.name.removesuffix("_total")
                yield (name, tuple(sample.labels.items())), metric.type, metric.documentation, sample.value


def _ascii(text: str) -> str:
    """A text as Ray takes it: for anything but ASCII, as the ² of a unit or a preset's name, its counters raise an error."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "replace").decode()


def _is_actor() -> bool:
    if "ray" not in sys.modules:
        return False
    import ray

    return ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None


def _replica() -> str:
    if "ray.serve" not in sys.modules:
        return ""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        return str(serve.get_replica_context().replica_id.unique_id)
    except RayServeException:
        return ""
