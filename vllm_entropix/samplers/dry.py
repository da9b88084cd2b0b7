"""DRY, don't repeat yourself: make tokens less likely that would go on with a repetition (p-e-w; llama.cpp, koboldcpp)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, field_validator

from vllm_entropix.records.fields import Field as RecordField
from vllm_entropix.samplers.stage import Branch, Stage, StageRows
from vllm_entropix.settings.errors import quoted
from vllm_entropix.settings.section import Section, TokenId, setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vllm_entropix.distribution.history import Breakers

# Texts among the breakers: each becomes all tokens that contain it.
_TEXTS = 100
# ln of the largest float32.
_LARGEST = 88.7228391
Breaker = TokenId | Annotated[str, Field(min_length=1, max_length=100)] | Annotated[tuple[TokenId, ...], Field(min_length=1)]


def _is_id(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and 0 <= int(value) < 2**31


def _is_ids(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(_is_id, value))


def _is_text(value: Any) -> bool:
    # Half of a surrogate pair, which JSON may hold, is none.
    return isinstance(value, str) and 0 < len(value) <= 100 and value.encode(errors="ignore").decode() == value


FIELDS = (
    RecordField(
        *("dry_penalty", "float", "", True, "DRY's penalty", "What DRY took off the drawn token's logit; 0: no repetition."),
        buckets=(0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0),
    ),
)


class DrySettings(Section):
    """Settings of DRY."""

    dry_multiplier: float = setting("Penalty of the shortest repetition that counts; 0 has none.", default=0.0, ge=0, le=100)
    dry_base: float = setting("Factor of each further token; below 1 there is no penalty.", default=1.75, ge=0, le=100)
    dry_allowed_length: int = setting("Repetition from which on tokens are penalised.", "tokens", default=2, ge=0, lt=2**24)
    dry_penalty_last_n: int = setting("Tokens that are looked at; -1 looks at all, 0 at none.", "tokens", default=-1, ge=-1)
    dry_sequence_breakers: tuple[Breaker, ...] = Field(
        ("\n", ":", '"', "*"),
        max_length=2**20,
        description="Texts or token ids that end a repetition; at most 100 texts.",
        json_schema_extra={"unit": "texts"},
    )

    @field_validator("dry_sequence_breakers", mode="before")
    @classmethod
    def _a_list(cls, value: Any) -> Any:
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
            raise ValueError("it should be a list of texts or token ids")
        wrong = [one for one in value if not (_is_id(one) or _is_ids(one) or _is_text(one))]
        if sum(isinstance(one, str) for one in value) > _TEXTS:
            raise ValueError(f"it should have at most {_TEXTS} texts")
        if wrong:
            raise ValueError(
                f"it has {quoted(wrong[0])}, which is no text of 1 to 100 characters, no token id and no list of such"
            )
        return value


class Dry(Stage):
    """l -= multiplier·base^(len - allowed) for tokens that went on with the text's own end before, if len ≥ allowed.

    len is how much of the end stands before the token's earlier place, the longest such. A breaker ends what repeats, and is
    never penalised. The exponent stops where base^x would overflow a float32.
    """

    name = "dry"
    Settings = DrySettings
    needs_tokens = True
    window = "dry_penalty_last_n"
    neutral = (("dry_multiplier", 0.0, 0.0),)
    fields = FIELDS

    def __init__(self, breakers: Sequence[tuple[int, ...]] = ()) -> None:
        super().__init__(breakers)
        self._breakers_on: dict[torch.device, Breakers] = {}

    def apply(self, logits: Tensor, rows: StageRows) -> Tensor:
        """By each row's own tokens."""
        import torch

        from vllm_entropix.distribution.history import parts

        if rows.tokens is None:
            return logits
        found = []
        for part in parts(rows.tokens):
            penalised, left = self.penalties(rows.with_text_of(part), logits.shape[-1], logits.dtype), logits[part]
            if penalised is None:
                return logits
            places, penalties = penalised
            # Of a token that followed several repetitions the longest counts.
            found.append(left.scatter_reduce(-1, places, left.gather(-1, places) - penalties, "amin"))
        return found[0] if len(found) == 1 else torch.cat(found)

    def penalties(self, rows: StageRows, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Tokens, int64 ``[rows, any]``, and what is taken off their logits, 0 for nothing; None if there is no text.

        A token may come several times, and its greatest penalty counts.
        """
        import torch

        from vllm_entropix.distribution.history import Breakers, repetitions, since_breaker, window

        if rows.tokens is None or rows.tokens.shape[-1] < 2:
            return None
        multiplier, base, allowed = rows["dry_multiplier"], rows["dry_base"], rows["dry_allowed_length"]
        tokens = window(rows.tokens, rows["dry_penalty_last_n"])
        device = tokens.device
        breakers = self._breakers_on.get(device)
        if breakers is None:
            breakers = self._breakers_on[device] = Breakers.on(self.breakers, device)
        exponents = (_LARGEST / base.log()).floor().where(base > 1.000001, torch.inf)
        # Longer ones are penalised like this length, where the power would overflow.
        enough = (allowed + exponents).minimum(since_breaker(tokens, breakers).to(dtype))
        ends, follows = tokens[:, :-1], tokens[:, 1:]
        length = repetitions(tokens, enough).to(dtype)
        # Finite: where every candidate is penalised, one of them is drawn.
        penalty = (multiplier * base.pow((length - allowed).clamp_min(0.0))).clamp_max(torch.finfo(dtype).max / 2)
        penalised = (ends >= 0) & (length >= allowed) & (multiplier > 0) & (base >= 1)
        penalised &= (follows < vocabulary) & ~torch.isin(follows, breakers.alone)
        return follows.where(penalised, 0), penalty.where(penalised, 0.0)

    def told(self, before: Tensor, after: Sequence[Branch], rows: StageRows, drawn: Tensor) -> Mapping[str, Tensor]:
        """Of a token that was masked before, none."""
        (_, left), *_ = after
        return {"dry_penalty": (before.gather(-1, drawn) - left.gather(-1, drawn)).nan_to_num(nan=0.0).squeeze(-1)}
