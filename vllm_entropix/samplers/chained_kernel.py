"""Rows of one chain by the CPU's kernel, where it knows the chain's stages: without a sort, and where they stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm_entropix.distribution.plan import Drawn
from vllm_entropix.kernels.chains import NUMBERS, STAGES
from vllm_entropix.samplers.request import GREEDY_BELOW
from vllm_entropix.samplers.stage import Stage, StageRows

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_entropix.samplers.base import RowView

# Nanoseconds per token of a vocabulary, roughly.
_COST = 8


class KernelPart:
    """Rows of one chain.

    Args:
        stages: the chain.
        running: those of it that change anything in the step.
        rows: all rows of the batch.
        mine: bool ``[rows]``, which are of the chain; None: all.
        tokens: of all rows, as :class:`StageRows` has them.
    """

    # No stage that the kernel knows keeps a number.
    follows = False
    index = None

    def __init__(
        self, stages: Sequence[Stage], running: Sequence[Stage], rows: RowView, mine: Tensor | None, tokens: Tensor | None
    ) -> None:
        import torch

        self.stages, self.mine = stages, mine
        count, vocabulary = rows.logits.shape
        settings = rows.settings
        self._codes = torch.tensor([STAGES.index(stage.name) for stage in running], dtype=torch.int64)
        self._numbers = torch.stack([settings[name].double() for name in NUMBERS], dim=-1)
        self._greedy = settings["temperature"] < GREEDY_BELOW
        self._log_normaliser = rows.statistics.log_normaliser
        self._places, self._penalties = torch.zeros(count, 0, dtype=torch.int64), torch.zeros(count, 0)
        self._shares = torch.zeros(count)
        dry: Any = next((stage for stage in running if stage.name == "dry"), None)
        if dry is not None:
            numbers = {name: settings[name].unsqueeze(-1) for name in dry.Settings.model_fields if name in settings.columns}
            found = dry.penalties(StageRows(numbers, tokens), vocabulary, torch.float32)
            if found is not None:
                self._places, self._penalties = found

    @staticmethod
    def runs(running: Sequence[Stage]) -> bool:
        """Does the kernel know these stages?"""
        return all(stage.name in STAGES for stage in running)

    def write(self, logits: Tensor, chosen: Tensor) -> None:
        """Overwrite those of its rows that are ``chosen``, bool ``[rows]``, of all logits."""
        import numpy as np

        from vllm_entropix.kernels.numba_.chain import chain_of_rows
        from vllm_entropix.kernels.numba_.threads import share_rows

        chosen = chosen if self.mine is None else chosen & self.mine
        arguments = (
            logits.numpy(),
            chosen.numpy(),
            self._greedy.numpy(),
            self._log_normaliser.numpy(),
            self._codes.numpy(),
            self._numbers.numpy(),
            self._places.contiguous().numpy(),
            self._penalties.contiguous().numpy(),
            self._shares.numpy(),
        )
        costs = np.where(chosen.numpy(), _COST * logits.shape[1], 1)
        share_rows(costs, lambda first, last: chain_of_rows(*arguments, first, last))

    def drawn(self, tokens: Tensor) -> Drawn:
        """What the stages tell of the drawn tokens, int64 ``[rows]``."""
        import torch

        fields = {}
        if any(stage.name == "dry" for stage in self.stages):
            mine = self._penalties.where(self._places == tokens.unsqueeze(-1), 0.0)
            fields["dry_penalty"] = torch.nn.functional.pad(mine, (0, 1)).amax(dim=-1)
        if any(stage.name == "xtc" for stage in self.stages):
            fields["xtc_share"] = self._shares
        return Drawn(None, fields)

    def spread(self, values: Tensor, over: Tensor) -> Tensor:
        """``over``, with ``values`` in the part's rows."""
        return values.to(over.dtype) if self.mine is None else values.to(over.dtype).where(self.mine, over)
