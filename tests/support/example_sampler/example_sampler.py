"""A sampler of another package: the fewer bits of entropy a row has, the fewer candidates it gets."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vllm_entropix.records.fields import Field
from vllm_entropix.samplers.base import Bounds, Plan, RowView, Sampler
from vllm_entropix.settings.section import Section, setting

if TYPE_CHECKING:
    from collections.abc import Mapping


class NarrowingSettings(Section):
    """Settings of narrowing."""

    per_bit: int = setting("Candidates per bit of entropy, beside the first.", "tokens", default=2, ge=1, le=100)
    most: int = setting("Candidates at most.", "tokens", default=12, ge=1, le=100_000)


class Narrowing(Sampler):
    """The request's own parameters, on the most probable token and ``per_bit`` more for each bit of entropy."""

    name = "narrowing"
    Settings = NarrowingSettings
    fields = (Field("candidates", "int", "tokens", True, "candidates", "Candidates that the row's entropy allowed."),)

    def plan(self, rows: RowView) -> Plan:
        """top_k by entropy; 1 where the row has none."""
        # Rounded down from a little more: rows of equal tokens have whole bits, where kernels may differ.
        more = (rows.settings["per_bit"] * rows.statistics.entropy + 0.3).floor().nan_to_num(0.0)
        allowed = (1 + more).minimum(rows.settings["most"])
        top_k = rows.base.top_k.minimum(allowed.to(rows.base.top_k.dtype))
        return Plan(replace(rows.base, top_k=top_k), fields={"candidates": allowed})

    def bounds(self, numbers: Mapping[str, float], base: Mapping[str, float]) -> Bounds:
        """The setting, if the request allows as many."""
        return Bounds(int(min(numbers["most"], base["top_k"])))
