"""What a sampler decides for each row: the numbers that shape its distribution, and what it asks for beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_entropix.distribution.attention import AttentionStatistics
    from vllm_entropix.settings.rules import Fidelity


@dataclass(frozen=True)
class Parameters:
    """Sampling parameters of each row, ``[rows]`` each.

    Attributes:
        temperature: 0 means argmax.
        top_p: kept probability mass.
        top_k: int64, number of candidates.
        min_p: smallest probability relative to the largest.
        samples: int64, draws of which the most probable is kept; 1 is a plain draw.
    """

    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    min_p: Tensor
    samples: Tensor

    def packed(self) -> Parameters:
        """The same as kernels read them: of one type each, and a row's number beside the next one's."""
        temperature, top_p, min_p = (one.float().contiguous() for one in (self.temperature, self.top_p, self.min_p))
        top_k, samples = (one.long().contiguous() for one in (self.top_k, self.samples))
        return Parameters(temperature, top_p, top_k, min_p, samples)

    def as_argmax(self, rows: Tensor) -> Parameters:
        """The same with argmax in the rows where the bool mask ``rows`` is set."""
        return Parameters(
            temperature=self.temperature.masked_fill(rows, 0.0),
            top_p=self.top_p.masked_fill(rows, 1.0),
            top_k=self.top_k.masked_fill(rows, 1),
            min_p=self.min_p.masked_fill(rows, 0.0),
            samples=self.samples.masked_fill(rows, 1),
        )

    def where(self, mask: Tensor, others: Parameters) -> Parameters:
        """These in the rows of the bool ``mask``, and ``others`` in the rest; what both share costs nothing."""

        def one(mine: Tensor, theirs: Tensor) -> Tensor:
            return mine if mine is theirs else mine.where(mask, theirs)

        return Parameters(
            temperature=one(self.temperature, others.temperature),
            top_p=one(self.top_p, others.top_p),
            top_k=one(self.top_k, others.top_k),
            min_p=one(self.min_p, others.min_p),
            samples=one(self.samples, others.samples),
        )


@dataclass(frozen=True)
class Drawn:
    """What is known of rows once their tokens are drawn.

    Attributes:
        state: ``[rows]``, the number that the next position starts from, NaN for rows that keep none; None: no row does.
        fields: of the record, ``[rows]`` each, by name; NaN for rows that tell nothing.
    """

    state: Tensor | None = None
    fields: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What a sampler decides for the rows it is shown.

    Attributes:
        parameters: the five numbers of each row.
        order: how filters follow one another: ``corrected``, or as the ``original`` has them (D4, D5).
        forces: bool ``[rows]``: would the server's clarification be forced here? None: nowhere.
        attention: what was measured for the plan; None if nothing was.
        fields: the sampler's own fields of a record, ``[rows]`` each, by name.
        write: overwrites rows of the logits ``[rows, vocab]``, those of a bool mask, with their log-probabilities, where five
            numbers can't describe them; ``parameters`` are then what a record tells. Nothing is forced in such rows.
        after_draw: told the drawn tokens, int64 ``[rows]``, gives what they decide; None: nothing. Rows whose token isn't kept
            have any token of the vocabulary.
    """

    parameters: Parameters
    order: Fidelity = "corrected"
    forces: Tensor | None = None
    attention: AttentionStatistics | None = None
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    write: Callable[[Tensor, Tensor], None] | None = None
    after_draw: Callable[[Tensor], Drawn] | None = None
