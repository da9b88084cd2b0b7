"""penalties: make tokens of the last n less likely, by their number (Keskar et al., arXiv 1909.05858; llama.cpp)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_entropix.samplers.stage import Stage, StageRows
from vllm_entropix.settings.section import Section, setting

if TYPE_CHECKING:
    from torch import Tensor


class PenaltiesSettings(Section):
    """Settings of penalties."""

    repeat_last_n: int = setting("Tokens that are looked at; -1 looks at all, 0 at none.", "tokens", default=64, ge=-1)
    repeat_penalty: float = setting("Divides positive logits, multiplies others; 1 changes nothing.", default=1.0, gt=0, le=100)
    frequency_penalty: float = setting("Taken off once per occurrence.", default=0.0, ge=-100, le=100)
    presence_penalty: float = setting("Taken off once.", default=0.0, ge=-100, le=100)


class Penalties(Stage):
    """l / r, or l·r where l ≤ 0, then l - count·frequency - presence, for the tokens among the last n."""

    name = "penalties"
    aliases = ("penalty",)
    neutral = (("repeat_penalty", 1.0, 1.0), ("frequency_penalty", 0.0, 0.0), ("presence_penalty", 0.0, 0.0))
    # koboldcpp's, and text-generation-webui's.
    setting_aliases = (
        ("rep_pen", "repeat_penalty"),
        ("rep_pen_range", "repeat_last_n"),
        ("repetition_penalty_range", "repeat_last_n"),
    )
    Settings = PenaltiesSettings
    needs_tokens = True
    window = "repeat_last_n"

    def apply(self, logits: Tensor, rows: StageRows) -> Tensor:
        """By the occurrences in each row's own tokens."""
        import torch

        from vllm_entropix.distribution.history import parts, window

        if rows.tokens is None:
            return logits
        counts = torch.zeros_like(logits)
        for part in parts(rows.tokens):
            tokens = window(rows.tokens[part], rows["repeat_last_n"][part])
            inside = (tokens >= 0) & (tokens < logits.shape[-1])
            counts[part].scatter_add_(-1, tokens.where(inside, 0), inside.to(logits.dtype))
        repeat = rows["repeat_penalty"]
        scaled = (logits / repeat).where(logits > 0, logits * repeat)
        penalised = scaled - counts * rows["frequency_penalty"] - rows["presence_penalty"]
        return penalised.where((counts > 0) & (logits > -torch.inf), logits)
