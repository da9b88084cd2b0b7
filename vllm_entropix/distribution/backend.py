"""What a step does with whole rows of logits, by the kernels for their device: chosen once, where a batch sampler is made.

The reference is PyTorch, which every device has. numba's and Triton's kernels give the same, and are held equal by tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vllm_entropix.distribution.plan import Parameters
from vllm_entropix.distribution.shape import shape
from vllm_entropix.distribution.statistics import LogitsMetrics, spread
from vllm_entropix.kernels.backend import kernels_for

if TYPE_CHECKING:
    from vllm_entropix.kernels.triton_.row_buffers import RowBuffers
    from vllm_entropix.settings.rules import Fidelity


@dataclass(frozen=True)
class Draws:
    """What replaces rows of logits.

    Attributes:
        parameters: of each row.
        order: of the filters.
        forced: int64 ``[rows]``, token forced here, or -1.
        written: bool ``[rows]``; other rows are left alone.
        log_normaliser: ``[rows]``.
        most_candidates: an upper bound of top_k, known to the host.
        most_drawn: an upper bound of top_k where the best of several draws is kept.
        everywhere: the host knows that all rows are ``written``.
        maxima: of the logits, as the backend's statistics have them.
        elsewhere: bool ``[rows]`` each: rows that their samplers write themselves, and whose candidates nobody wants here.
    """

    parameters: Parameters
    order: Fidelity
    forced: Tensor
    written: Tensor
    log_normaliser: Tensor
    most_candidates: int
    most_drawn: int
    everywhere: bool = False
    maxima: Tensor | None = None
    elsewhere: Sequence[Tensor] = ()


class Backend:
    """Plain PyTorch.

    Attributes:
        name: by which a sampler chooses among implementations of its own rule.
        decides: is there a kernel for decisions, ``rows/decision.py``?
        asks_device: may the host look at values of the device, since that costs nothing?
    """

    name = "torch"
    decides = False

    def __init__(self, device: torch.device | str) -> None:
        self.asks_device = torch.device(device).type == "cpu"

    def reserve(self, rows: int, vocabulary: int, device: torch.device | str) -> None:
        """Allocate now what steps of at most so many rows would allocate, where that is much."""

    def statistics(self, logits: Tensor, reserved: bool = False) -> LogitsMetrics:
        """Entropy, varentropy and log-normaliser of ``logits [rows, vocab]``.

        Args:
            logits: of any rows.
            reserved: use what :meth:`reserve` allocated. The maxima stay until the next call that does, so this is for the
                logits that a step writes, and for no others.
        """
        return LogitsMetrics.from_logits(logits)

    def spread(self, logits: Tensor) -> Tensor:
        """Population standard deviation of the finite logits of each row; 0 where there are none."""
        return spread(logits)

    def largest(self, logits: Tensor, log_normaliser: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The ``count`` largest logits of each row and their ids, as ``topk`` gives them.

        ``log_normaliser [rows]`` isn't finite where a row has NaN.
        """
        values, token_ids = logits.topk(count, dim=-1)
        return values, token_ids

    def write(self, logits: Tensor, draws: Draws) -> None:
        """Overwrite rows of ``logits [rows, vocab]`` with the log-probabilities of their draw."""
        parameters, forced, written = draws.parameters, draws.forced, draws.written
        for rows in draws.elsewhere:
            parameters = parameters.as_argmax(rows)  # no candidates are wanted there
        count = int(parameters.top_k.max()) if self.asks_device else draws.most_candidates
        kept, probabilities = shape(logits, parameters, draws.order, count)
        is_forced = (forced >= 0).unsqueeze(-1)
        # In a forced row every candidate is the forced token with probability 1: writes to one place must agree.
        token_ids = torch.where(is_forced, forced.unsqueeze(-1), kept.token_ids)
        log_probabilities = torch.where(is_forced, 0.0, probabilities.log()).to(logits.dtype)
        if draws.everywhere:
            logits.fill_(-torch.inf)
        else:
            # The other rows get their own logits back.
            log_probabilities = torch.where(written.unsqueeze(-1), log_probabilities, kept.logits.to(logits.dtype))
            token_ids = torch.where(written.unsqueeze(-1), token_ids, kept.token_ids)
            logits.masked_fill_(written.unsqueeze(-1), -torch.inf)
        logits.scatter_(-1, token_ids, log_probabilities)


class NumbaBackend(Backend):
    """Kernels for float32 on a CPU."""

    name = "numba"

    def statistics(self, logits: Tensor, reserved: bool = False) -> LogitsMetrics:
        """As :meth:`Backend.statistics`."""
        from vllm_entropix.kernels.numba_.metrics import metrics_of_rows
        from vllm_entropix.kernels.numba_.threads import share_equal_rows

        rows, vocabulary = logits.shape
        # Made by numpy, for whose kernels a tensor's view takes longer than all that is decided of a row.
        results = np.empty((3, rows), dtype=np.float32)
        arguments = (logits.numpy(), results[0], results[1], results[2])
        share_equal_rows(rows, vocabulary, lambda first, last: metrics_of_rows(*arguments, first, last))
        return LogitsMetrics(*torch.from_numpy(results).unbind())

    def largest(self, logits: Tensor, log_normaliser: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """As :meth:`Backend.largest`."""
        from vllm_entropix.kernels.numba_.alternatives import largest_of_rows
        from vllm_entropix.kernels.numba_.threads import share_equal_rows

        rows, vocabulary = logits.shape
        values, token_ids = logits.new_empty(rows, count), torch.empty(rows, count, dtype=torch.int64)
        arguments = logits.numpy(), log_normaliser.numpy(), values.numpy(), token_ids.numpy()
        share_equal_rows(rows, vocabulary, lambda first, last: largest_of_rows(*arguments, first, last))
        return values, token_ids

    def write(self, logits: Tensor, draws: Draws) -> None:
        """As :meth:`Backend.write`."""
        if draws.order == "original":
            super().write(logits, draws)
            return
        from vllm_entropix.kernels.numba_.distribute import distribute_rows
        from vllm_entropix.kernels.numba_.threads import share_equal_rows

        rows, vocabulary = logits.shape
        parameters = draws.parameters
        arguments = (
            logits.numpy(),
            parameters.temperature.numpy(),
            parameters.top_p.numpy(),
            parameters.top_k.numpy(),
            parameters.min_p.numpy(),
            parameters.samples.numpy(),
            draws.log_normaliser.numpy(),
            draws.forced.numpy(),
            draws.written.numpy(),
        )
        share_equal_rows(rows, 2 * vocabulary, lambda first, last: distribute_rows(*arguments, first, last))


class TritonBackend(Backend):
    """Kernels for float32 on a GPU."""

    name = "triton"
    decides = True

    def __init__(self, device: torch.device | str) -> None:
        super().__init__(device)
        self._buffers: RowBuffers | None = None

    def reserve(self, rows: int, vocabulary: int, device: torch.device | str) -> None:
        """As :meth:`Backend.reserve`."""
        from vllm_entropix.kernels.triton_.row_buffers import RowBuffers

        self._buffers = RowBuffers.for_steps(rows, vocabulary, device)

    def _room(self, logits: Tensor) -> RowBuffers | None:
        return self._buffers if self._buffers is not None and self._buffers.fit(logits) else None

    def statistics(self, logits: Tensor, reserved: bool = False) -> LogitsMetrics:
        """As :meth:`Backend.statistics`."""
        from vllm_entropix.kernels.triton_.logits_metrics import logits_metrics

        room = self._room(logits) if reserved else None
        return LogitsMetrics(*logits_metrics(logits, None if room is None else room.metrics))

    def spread(self, logits: Tensor) -> Tensor:
        """As :meth:`Backend.spread`."""
        from vllm_entropix.kernels.triton_.spread import spread

        return spread(logits)

    def write(self, logits: Tensor, draws: Draws) -> None:
        """As :meth:`Backend.write`."""
        from vllm_entropix.kernels.triton_.candidates import LIMIT, distribute
        from vllm_entropix.kernels.triton_.wide_filters import filter_wide_rows

        if draws.order == "original" or draws.most_drawn > LIMIT:
            super().write(logits, draws)
            return
        # A sampler may plan with columns of a table.
        p, forced, written = draws.parameters.packed(), draws.forced, draws.written
        assert draws.maxima is not None
        room = self._room(logits)
        arguments = (p.temperature, p.top_p, p.top_k, p.min_p, p.samples, forced, written, draws.most_candidates)
        distribute(logits, *arguments, draws.maxima, None if room is None else room.candidates)
        if draws.most_candidates > LIMIT:
            of_rows = (p.temperature, p.top_p, p.top_k, p.min_p, forced, written, draws.log_normaliser)
            filter_wide_rows(logits, *of_rows, draws.maxima, None if room is None else room.wide)


_BACKENDS: dict[str | None, type[Backend]] = {None: Backend, "numba": NumbaBackend, "triton": TritonBackend}


def backend_for(device: torch.device | str, dtype: torch.dtype = torch.float32) -> Backend:
    """The fastest implementation for logits of this device and type."""
    device = torch.device(device)
    return _BACKENDS[kernels_for(device) if dtype == torch.float32 else None](device)
