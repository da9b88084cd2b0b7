"""What a sampler is: it looks at a step's rows and plans their distributions. vLLM draws from them.

A sampler is one class in one file of this folder, or one that another package registers as an entry point. Its module must not
import torch when it is loaded: a process that reads settings alone loads it, too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_entropix.distribution.plan import Parameters, Plan
from vllm_entropix.records.line import SamplerPart
from vllm_entropix.settings.section import Section, numbers_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from vllm_entropix.distribution.attention import AttentionStatistics
    from vllm_entropix.distribution.backend import Backend
    from vllm_entropix.distribution.constants import Constants
    from vllm_entropix.distribution.statistics import LogitsMetrics
    from vllm_entropix.records.fields import Field
    from vllm_entropix.samplers.request import RequestSettings
    from vllm_entropix.settings.rules import Fidelity
    from vllm_entropix.settings.server import ServerSettings

__all__ = ["Bounds", "KernelRule", "Parameters", "Plan", "RowView", "Sampler", "Sequences"]


@dataclass(frozen=True)
class Sequences:
    """What is known of the sequences that a step's rows belong to.

    Attributes:
        host_numbers: name of one of the sampler's numbers → its values in the step's sequences of this sampler, on the host.
        input_ids: int64 ``[rows]``, the token that was fed at the row, negative where there is none.
        state: gives ``[rows]``, the number kept under the position before the row's; NaN where none is known.
        text: at most so many last tokens, or None for all → int64 ``[rows, length]``, aligned to the right, up to and with
            ``input_ids``; -1 stands before the first. None: the engine has none.
        draft_index: ``[rows]``, a row's index among its sequence's, whose rows follow one another; None if each has one row.
        draft_rows: the most rows that a sequence can have.
    """

    host_numbers: Callable[[str], np.ndarray]
    input_ids: Tensor
    state: Callable[[], Tensor]
    text: Callable[[int | None], Tensor] | None = None
    draft_index: Tensor | None = None
    draft_rows: int = 1


@dataclass(frozen=True)
class RowView:
    """What a sampler may look at. What it doesn't ask for isn't computed.

    Attributes:
        logits: ``[rows, vocab]``, masked and penalised, before temperature and filters.
        statistics: entropy, varentropy and log-normaliser of each row.
        settings: the sampler's numbers, of each row's request.
        backend: what there is for whole rows of logits.
        own: gives :attr:`base`.
        measure: gives :meth:`attention`.
        mine: bool ``[rows]``, the rows that the plan is made for; None: all. Others may be planned anyhow.
        sequences: what is known of the rows' sequences.
    """

    logits: Tensor
    statistics: LogitsMetrics
    settings: Constants
    backend: Backend
    own: Callable[[], Parameters]
    measure: Callable[[Tensor], AttentionStatistics | None]
    mine: Tensor | None = None
    sequences: Sequences | None = None

    def attention(self, wanted: Tensor) -> AttentionStatistics | None:
        """Attention statistics of the rows of the bool mask ``wanted``; None if the engine observes no attention."""
        return self.measure(wanted)

    @cached_property
    def base(self) -> Parameters:
        """The requests' own temperature, top_p, top_k and min_p, and one draw."""
        return self.own()

    @cached_property
    def spread(self) -> Tensor:
        """Population standard deviation of each row's finite logits, ``[rows]``."""
        return self.backend.spread(self.logits)


@dataclass(frozen=True)
class KernelRule:
    """A plan as functions that Triton compiles into the step's decision kernel, ``rows/decision.py``.

    It saves the launches of the plan's operations. Of samplers without one the kernel reads what :meth:`Sampler.plan` made.

    Attributes:
        plan: pointers to the rows' numbers and to their own temperature, top_p, top_k and min_p, entropy, varentropy, spread,
            which rows' attention was measured, its four numbers, pointers to the sampler's own fields in the rows' records,
            which rows have one → temperature, top_p, top_k, min_p, samples, and which rows ask for the clarification.
        order: as of :class:`Plan`.
        reads_attention: pointers to the rows' numbers, entropy, varentropy → the rows whose plan reads attention; None: none.
        reads_spread: does the plan read :attr:`RowView.spread`? What stands in its place otherwise means nothing.
    """

    plan: Any
    order: Fidelity = "corrected"
    reads_attention: Any = None
    reads_spread: bool = False


@dataclass(frozen=True)
class Bounds:
    """What the host knows of a request's plans without asking the device.

    Attributes:
        candidates: top_k is at most this.
        drawn: where the best of several draws is kept, top_k is at most this; 0: there is no such row.
    """

    candidates: int
    drawn: int = 0


class Sampler(ABC):
    """Plans the distributions of rows.

    Attributes:
        name: by which settings, command lines and requests ask for it.
        Settings: its section of the server's settings. Its numbers may be set per request, too.
        fields: what it adds to a record.
        Part: what a line of a trace file tells of it.
        plans_greedy: does it plan rows of requests with temperature 0, too? Otherwise they are vLLM's own.
        follows_draws: may its plans ask what was drawn?
    """

    name: ClassVar[str]
    Settings: ClassVar[type[Section]]
    fields: ClassVar[tuple[Field, ...]] = ()
    Part: ClassVar[type[SamplerPart]] = SamplerPart
    plans_greedy: ClassVar[bool] = False
    follows_draws: ClassVar[bool] = False

    def __init__(self, server: ServerSettings) -> None:
        """``server``: all of the server's settings, with this sampler's section in them, or else its defaults hold."""
        self.settings: Any = getattr(server, self.name, None) or self.Settings()

    @abstractmethod
    def plan(self, rows: RowView) -> Plan:
        """What is done with each row. Rows must not influence one another."""

    def kernel_rule(self, backend: str) -> KernelRule | None:
        """What :meth:`plan` does, for the decision kernel of a backend of this name; None: the kernel reads its result."""
        return None

    def numbers(self) -> list[tuple[str, float]]:
        """(name, value) of the numbers that a row's :attr:`RowView.settings` holds, in a fixed order: the server's."""
        return [(name.removeprefix("."), value) for name, value in numbers_of("", self.settings)]

    def numbers_of_request(self, request: RequestSettings, own: Mapping[str, float]) -> list[float]:
        """The same numbers for one request.

        Args:
            request: its settings.
            own: its temperature, top_p, top_k and min_p.
        """
        said = request.of_sampler(self.name)
        return [said.get(name, value) for name, value in self.numbers()]

    def started(self, ranks: int) -> None:  # noqa: B027  (most samplers have no kernels but those of their own server)
        """An engine has started on a CPU, and a server's own sampler has its kernels. So many ranks draw the same tokens."""

    def reads_text(self, numbers: Mapping[str, float]) -> bool:
        """Does the plan of a request with these numbers look at :attr:`Sequences.text`?"""
        return False

    def begins(self, numbers: Mapping[str, float]) -> None:  # noqa: B027  (most samplers keep nothing)
        """A sequence with these numbers, as :meth:`numbers_of_request` gave them, takes part in steps from now on."""

    def ends(self, numbers: Mapping[str, float]) -> None:  # noqa: B027
        """It takes part no longer."""

    def described(self, request: RequestSettings) -> SamplerPart:
        """What a line of a trace file tells of the sampler, and of its numbers for the request."""
        return self.Part(name=self.name, **dict(self.numbers()) | request.of_sampler(self.name))

    @classmethod
    def label(cls, request: RequestSettings, server: Mapping[str, Any]) -> str:
        """What a request counts as on ``/metrics``; ``server``: the server's settings as plain values."""
        return cls.name

    def bounds(self, numbers: Mapping[str, float], base: Mapping[str, float]) -> Bounds:
        """Bounds of a request with these numbers and this temperature, top_p, top_k and min_p of its own."""
        return Bounds(int(base["top_k"]))
