"""Rows of one chain by a kernel, where it knows the chain's stages: without a sort, and where they stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm_entropix.distribution.plan import Drawn
from vllm_entropix.kernels.chains import STAGES, numbers_of, stages_of
from vllm_entropix.samplers.chain import moved_by
from vllm_entropix.samplers.request import GREEDY_BELOW
from vllm_entropix.samplers.stage import Stage, StageRows, StatefulStage

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_entropix.samplers.base import RowView

# Nanoseconds per token of a vocabulary, roughly.
_COST = 8
# After these a CPU's rows are no longer logits but for a constant, which penalties divide and multiply.
_SHIFTING = frozenset({"temperature", "dynatemp", "edt", "quadratic"})


class KernelPart:
    """Rows of one chain.

    Args:
        stages: the chain.
        running: those of it that change anything in the step.
        rows: all rows of the batch.
        mine: bool ``[rows]``, which are of the chain; None: all.
        tokens: of all rows, as :class:`StageRows` has them.
    """

    index = None

    def __init__(
        self, stages: Sequence[Stage], running: Sequence[Stage], rows: RowView, mine: Tensor | None, tokens: Tensor | None
    ) -> None:
        import torch

        self.stages, self.mine = stages, mine
        logits, settings = rows.logits, rows.settings
        self._on_gpu = rows.backend.name == "triton"
        self._codes = tuple(STAGES.index(stage.name) for stage in running)
        columns = numbers_of(rows.backend.name)
        first = settings.columns[columns[0]]
        self._numbers = settings.values[:, first : first + len(columns)].double()
        self._greedy = settings["temperature"] < GREEDY_BELOW
        self._log_normaliser, self._maxima = rows.statistics.log_normaliser, rows.statistics.maxima
        self._written, self._handed = logits, logits.new_empty(len(logits), 0)
        self._followed = next((stage for stage in running if isinstance(stage, StatefulStage)), None)
        if self._followed is not None:
            self._follow(self._followed, rows)
        if not self._on_gpu:
            state = self._numbers.new_zeros(len(logits), 1) if self._followed is None else self._state.double()
            self._numbers = torch.cat((self._numbers, state), dim=-1)
        self._left = _left_before_xtc(running, rows) if self._on_gpu else None
        self._shares = logits.new_empty(0) if self._on_gpu else logits.new_zeros(len(logits))
        self._places, self._penalties = _penalties(running, rows, tokens)
        self._tokens = self._places[:, :0]
        if tokens is not None and any(stage.name == "penalties" for stage in running):
            self._tokens = tokens

    def _follow(self, stage: StatefulStage, rows: RowView) -> None:
        """Take up each row's state: that after the token before, or the first one."""
        import torch

        settings, sequences = rows.settings, rows.sequences
        assert sequences is not None
        self._numbers_of_followed = {name: settings[name].unsqueeze(-1) for name in stage.Settings.model_fields}
        known, first = sequences.state().unsqueeze(-1), stage.initial(self._numbers_of_followed)
        self._state = known.where(~known.isnan(), first.to(known.dtype))
        if stage.follows == "before":
            self._handed = torch.empty_like(rows.logits)

    @property
    def follows(self) -> bool:
        """Does it keep a number of what is drawn?"""
        return self._followed is not None

    @staticmethod
    def runs(running: Sequence[Stage], backend: str, alone: bool = True) -> bool:
        """Does this backend's kernel know these stages, and do they come in an order that it can run?

        Args:
            running: the stages.
            backend: its name.
            alone: is each row its sequence's only one, and none greedy? Then what was written of it says how probable its
                drawn token was.
        """
        names = [stage.name for stage in running]
        if any(isinstance(stage, StatefulStage) for stage in running) and (not alone or "xtc" in names):
            return False
        known = stages_of(backend)
        if not known or not all(name in known for name in names):
            return False
        return "penalties" not in names or _SHIFTING.isdisjoint(names[: names.index("penalties")])

    def write(self, logits: Tensor, chosen: Tensor) -> None:
        """Overwrite those of its rows that are ``chosen``, bool ``[rows]``, of all logits."""
        chosen = chosen if self.mine is None else chosen & self.mine
        self._written = logits
        if self._on_gpu:
            self._write_on_gpu(logits, chosen)
            return
        import numpy as np

        from vllm_entropix.kernels.numba_.chain import chain_of_rows
        from vllm_entropix.kernels.numba_.threads import share_rows

        arguments = (
            logits.numpy(),
            chosen.numpy(),
            self._greedy.numpy(),
            self._log_normaliser.numpy(),
            np.array(self._codes, dtype=np.int64),
            self._numbers.numpy(),
            self._places.contiguous().numpy(),
            self._penalties.contiguous().numpy(),
            self._tokens.contiguous().numpy(),
            self._shares.numpy(),
            self._handed.numpy(),
        )
        costs = np.where(chosen.numpy(), _COST * logits.shape[1], 1)
        share_rows(costs, lambda first, last: chain_of_rows(*arguments, first, last))

    def _write_on_gpu(self, logits: Tensor, chosen: Tensor) -> None:
        import torch

        from vllm_entropix.kernels.triton_.chain.launch import chain_of_rows

        lowered, penalties, stages = None, None, self._codes
        is_first = bool(stages) and STAGES[stages[0]] == "dry"
        if self._places.shape[-1] and is_first:
            penalised = logits.gather(-1, self._places) - self._penalties.where(chosen.unsqueeze(-1), 0.0)
            # Of a token that followed several repetitions the longest counts.
            logits.scatter_reduce_(-1, self._places, penalised, "amin")
            lowered = (self._penalties > 0).sum(dim=-1, dtype=torch.int32)
        elif self._places.shape[-1]:
            penalties = self._places, self._penalties
        self._shares = chain_of_rows(
            *(logits, chosen, self._greedy, stages[is_first:], self._numbers, self._maxima, lowered, penalties, self._left)
        )

    def drawn(self, tokens: Tensor) -> Drawn:
        """What the stages tell of the drawn tokens, int64 ``[rows]``."""
        import torch

        fields: dict[str, Tensor] = {}
        state = None
        if self._followed is not None:
            places = tokens.unsqueeze(-1)
            after = self._followed.follows == "after"
            probability = self._written.gather(-1, places).exp() if after else self._handed.gather(-1, places)
            state = moved_by(self._followed, self._state, probability, self._numbers_of_followed).squeeze(-1)
            fields.update(self._followed.told(self._written, (), StageRows({}, state=self._state), places))
        if any(stage.name == "dry" for stage in self.stages):
            mine = self._penalties.where(self._places == tokens.unsqueeze(-1), 0.0)
            fields["dry_penalty"] = torch.nn.functional.pad(mine, (0, 1)).amax(dim=-1)
        if any(stage.name == "xtc" for stage in self.stages):
            fields["xtc_share"] = self._shares
        return Drawn(state, fields)

    def spread(self, values: Tensor, over: Tensor) -> Tensor:
        """``over``, with ``values`` in the part's rows."""
        return values.to(over.dtype) if self.mine is None else values.to(over.dtype).where(self.mine, over)


def _left_before_xtc(running: Sequence[Stage], rows: RowView) -> int:
    """How many candidates any row has left at most when XTC comes, as the host knows."""
    names = [stage.name for stage in running]
    vocabulary = rows.logits.shape[-1]
    if "top_k" not in names or "xtc" not in names[names.index("top_k") :]:
        return vocabulary
    assert rows.sequences is not None
    k = rows.sequences.host_numbers("top_k")
    return min(int(k.max()), vocabulary) if (k > 0).all() else vocabulary


def _penalties(running: Sequence[Stage], rows: RowView, tokens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens, int64 ``[rows, any]``, and what DRY takes off their logits; none where it is switched off."""
    import torch

    from vllm_entropix.distribution.history import parts

    logits, settings = rows.logits, rows.settings
    dry: Any = next((stage for stage in running if stage.name == "dry"), None)
    if dry is not None and tokens is not None:
        numbers = {name: settings[name].unsqueeze(-1) for name in dry.Settings.model_fields if name in settings.columns}
        shown = StageRows(numbers, tokens)
        of_parts = [shown.with_text_of(part) for part in parts(tokens)]
        found = [dry.penalties(some, logits.shape[-1], logits.dtype) for some in of_parts]
        if None not in found:
            places, penalties = zip(*found, strict=True)
            return torch.cat(places), torch.cat(penalties)
    return logits.new_empty(len(logits), 0, dtype=torch.int64), logits.new_empty(len(logits), 0)
