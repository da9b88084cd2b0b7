"""Settings of entropix.

Every constant of the original sampler is a named setting here, with a unit, a range and one line of description. The values
themselves live in ``presets/*.toml``: a configuration is a preset with some settings changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from vllm_entropix.samplers.entropix.presets import preset_names, read_preset
from vllm_entropix.settings.errors import ConfigError, cut, quoted
from vllm_entropix.settings.load import as_table, merge, read_mapping
from vllm_entropix.settings.rules import AttentionVarentropy, ClarificationRule, Fidelity
from vllm_entropix.settings.section import Section, TokenId, describe, numbers_of, setting
from vllm_entropix.settings.server import ServerSettings

DEFAULT_PRESET = "jax-2024-10"


class LelvThresholds(Section):
    """Low entropy, low varentropy: sure."""

    entropy_below: float = setting("LELV needs a logits entropy below this.", "bits", ge=0, le=64)
    varentropy_below: float = setting("LELV needs a logits varentropy below this.", "bits²", ge=0, le=4096)


class HelvThresholds(Section):
    """High entropy, low varentropy: evenly lost."""

    entropy_above: float = setting("HELV needs a logits entropy above this.", "bits", ge=0, le=64)
    varentropy_below: float = setting("HELV needs a logits varentropy below this.", "bits²", ge=0, le=4096)


class LehvThresholds(Section):
    """Low entropy, high varentropy: a fork."""

    entropy_below: float = setting("LEHV needs a logits entropy below this.", "bits", ge=0, le=64)
    varentropy_above: float = setting("LEHV needs a logits varentropy above this.", "bits²", ge=0, le=4096)


class HehvThresholds(Section):
    """High entropy, high varentropy: the mist."""

    entropy_above: float = setting("HEHV needs a logits entropy above this.", "bits", ge=0, le=64)
    varentropy_above: float = setting("HEHV needs a logits varentropy above this.", "bits²", ge=0, le=4096)


class Thresholds(Section):
    """Borders of the regimes in the entropy × varentropy plane.

    Inequalities are strict, and the first match of LELV, HELV, LEHV, HEHV wins.
    """

    lelv: LelvThresholds
    helv: HelvThresholds
    lehv: LehvThresholds
    hehv: HehvThresholds


class HelvParameters(Section):
    """HELV, when the clarification isn't inserted: temperature = min(max, T0·(offset + coefficient·attention entropy))."""

    temperature_offset: float = setting("Factor on T0 at attention entropy 0.", ge=0, le=10)
    temperature_attention_entropy: float = setting("Factor on T0 per bit of attention entropy.", "1/bit", ge=-10, le=10)
    temperature_max: float = setting("Cap of the temperature.", gt=0, le=100)


class LehvParameters(Section):
    """LEHV: temperature = min(max, T0·(offset + coefficient·interaction)).

    top_k = max(min, trunc(K0·(1 + disagreement·(1 - agreement)))).
    """

    temperature_offset: float = setting("Factor on T0 at interaction strength 0.", ge=0, le=10)
    temperature_interaction: float = setting("Factor on T0 per unit of interaction strength.", ge=-10, le=10)
    temperature_max: float = setting("Cap of the temperature.", gt=0, le=100)
    top_k_disagreement: float = setting("Widening of K0 at agreement 0.", ge=0, le=10)
    top_k_min: int = setting("Floor of top_k.", "tokens", ge=1, le=100_000)


class HehvParameters(Section):
    """HEHV: temperature = max(min, T0·(offset + coefficient·attention varentropy)).

    top_p = max(min, P0 - coefficient·attention entropy).
    """

    temperature_offset: float = setting("Factor on T0 at attention varentropy 0.", ge=0, le=10)
    temperature_attention_varentropy: float = setting("Factor on T0 per bit² of attention varentropy.", "1/bit²", ge=-10, le=10)
    temperature_min: float = setting("Floor of the temperature.", gt=0, le=100)
    top_p_attention_entropy: float = setting("Drop of P0 per bit of attention entropy.", "1/bit", ge=-1, le=1)
    top_p_min: float = setting("Floor of top_p.", "probability", gt=0, le=1)


class AdaptiveParameters(Section):
    """ADAPTIVE: every parameter follows the metrics, and the best of ``samples`` draws is kept (in closed form)."""

    samples: int = setting("Draws, of which the most probable is kept.", "draws", ge=1, le=64)
    temperature_offset: float = setting("Factor on T0 at metrics of 0.", ge=0, le=10)
    temperature_logits: float = setting("Factor on T0 per bit of logits entropy and bit² of varentropy.", ge=-10, le=10)
    temperature_attention: float = setting("Factor on T0 per bit of attention entropy and bit² of varentropy.", ge=-10, le=10)
    temperature_agreement: float = setting("Drop of T0's factor per unit of agreement.", ge=-10, le=10)
    temperature_max: float = setting("Cap of the temperature; the original has none (D14).", gt=0, le=100)
    top_p_attention_varentropy: float = setting("Rise of P0's factor per bit² of attention varentropy.", ge=-10, le=10)
    top_p_min: float = setting("Floor of top_p.", "probability", gt=0, le=1)
    top_p_max: float = setting("Cap of top_p.", "probability", gt=0, le=1)
    top_k_interaction: float = setting("Rise of K0's factor per unit of interaction strength.", ge=-10, le=10)
    top_k_agreement: float = setting("Drop of K0's factor per unit of agreement.", ge=-10, le=10)
    top_k_min: int = setting("Floor of top_k.", "tokens", ge=1, le=100_000)
    top_k_max: int = setting("Cap of top_k.", "tokens", ge=1, le=100_000)
    min_p: float = setting("Base of ADAPTIVE's min_p.", "ratio", ge=0, le=1)
    min_p_logits: float = setting("Drop of min_p's factor per bit of logits entropy and bit² of varentropy.", ge=-10, le=10)
    min_p_min: float = setting("Floor of min_p.", "ratio", ge=0, le=1)
    min_p_max: float = setting("Cap of min_p.", "ratio", ge=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name in ("top_p", "top_k", "min_p"):
            low, high = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
            if low > high:
                raise ValueError(f"{name}_min, which is {low}, is above {name}_max, which is {high}")
        return self


class ConfidenceWeights(Section):
    """Weights of the confidence score C that is reported with each token (SEMANTICS 3)."""

    logits_entropy: float = setting("Weight of 1 - logits entropy.", "1/bit", ge=-100, le=100)
    attention_entropy: float = setting("Weight of 1 - attention entropy.", "1/bit", ge=-100, le=100)
    logits_varentropy: float = setting("Weight of 1 - logits varentropy.", "1/bit²", ge=-100, le=100)
    attention_varentropy: float = setting("Weight of 1 - attention varentropy.", "1/bit²", ge=-100, le=100)
    agreement: float = setting("Weight of agreement.", ge=-100, le=100)
    interaction: float = setting("Weight of interaction strength.", ge=-100, le=100)


class OriginalBehaviour(Section):
    """What ``fidelity = "original"`` reproduces of the original's defects (SEMANTICS 5); without effect otherwise."""

    attention_varentropy: AttentionVarentropy = setting(
        "D3: variance over heads, with Bessel's correction, or 0 as over an axis of size 1."
    )
    padded_positions: int = setting(
        "D2: key slots that are always counted, empty ones with score 0.", "positions", ge=1, le=1_048_576
    )
    clarification_rule: ClarificationRule = setting("D10: how a repeated clarification is prevented.")
    clarification_token_ids: tuple[TokenId, ...] = setting("D11: the clarification of the Llama-3 vocabulary.", "token ids")


# Regimes whose shares are given; the rest is ADAPTIVE's.
SHARED = ("lelv", "helv", "lehv", "hehv")


class RegimeShares(Section):
    """Shares of the tokens, for regimes and clarifications by chance; what is left is ADAPTIVE's."""

    lelv: float = setting("Share of LELV.", "share", default=0.0, ge=0, le=1)
    helv: float = setting("Share of HELV, and of tokens that ask for a clarification.", "share", default=0.0, ge=0, le=1)
    lehv: float = setting("Share of LEHV.", "share", default=0.0, ge=0, le=1)
    hehv: float = setting("Share of HEHV.", "share", default=0.0, ge=0, le=1)


class Experiments(Section):
    """Controls of studies, for tests and studies alone; each costs the kernels, and none makes answers better."""

    constants: bool = Field(
        False, description="Take `entropix_constants` of requests: constants of their own.", json_schema_extra={"unit": ""}
    )
    random_regimes: bool = Field(
        False, description="Draw each token's regime by chance, with the shares below.", json_schema_extra={"unit": ""}
    )
    shuffled_attention: bool = Field(
        False, description="Give each row the attention of another row of the batch.", json_schema_extra={"unit": ""}
    )
    random_clarifications: bool = Field(
        False, description="Ask for the clarification by chance, with HELV's share.", json_schema_extra={"unit": ""}
    )
    shares: RegimeShares = Field(default_factory=lambda: RegimeShares())

    @property
    def change_rules(self) -> bool:
        """Is anything decided otherwise than by entropix's rule?"""
        return self.random_regimes or self.shuffled_attention or self.random_clarifications

    def numbers(self) -> Iterator[tuple[str, float]]:
        """(dotted name, value) of the numbers that a step reads beside a configuration's own; none if no chance is in it."""
        if self.random_regimes or self.random_clarifications:
            yield from numbers_of("experiments.shares", self.shares)


class EntropixConfig(ServerSettings):
    """All settings of a server that samples by entropix: a preset with some settings changed.

    Settings that are not given come from the preset, so ``EntropixConfig()`` is the default preset, corrected.
    """

    preset_name: str = Field(
        DEFAULT_PRESET, alias="preset", description="Preset that all other settings start from.", json_schema_extra={"unit": ""}
    )
    fidelity: Fidelity = Field(
        "corrected",
        description="`corrected`, or `original` to reproduce the original's published behaviour row by row.",
        json_schema_extra={"unit": ""},
    )
    regimes: bool = Field(
        True,
        description="Off: every token is drawn with the base parameters; metrics and regimes are still reported.",
        json_schema_extra={"unit": ""},
    )
    thresholds: Thresholds
    helv: HelvParameters
    lehv: LehvParameters
    hehv: HehvParameters
    adaptive: AdaptiveParameters
    confidence: ConfidenceWeights
    original: OriginalBehaviour
    experiments: Experiments = Field(default_factory=lambda: Experiments())

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return merge(read_preset(data.get("preset", DEFAULT_PRESET)), data)

    @classmethod
    def preset_names(cls) -> tuple[str, ...]:
        """Names of the shipped presets, sorted."""
        return preset_names()

    @classmethod
    def preset(cls, name: str = DEFAULT_PRESET, **settings: Any) -> Self:
        """The preset ``name`` with top-level ``settings`` changed; ConfigError if one is unknown or out of range."""
        return cls.from_dict({**settings, "preset": name})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "sampler config") -> Self:
        """Settings from a nested mapping; ConfigError with one line for the first thing wrong, prefixed with ``source``."""
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            raise ConfigError(f"{source}: {describe(error, cls)}") from None
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Settings from a ``.json``, ``.toml`` or ``.yaml`` file; ConfigError if it can't be read or parsed."""
        return cls.from_dict(read_mapping(Path(path)), source=str(path))

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any] | EntropixConfig | None) -> EntropixConfig:
        """Settings from whatever a user gives: nothing, a mapping, JSON text, a preset's name, or a JSON, TOML or YAML file."""
        if isinstance(source, EntropixConfig):
            return source
        return cls.from_dict(as_mapping(source))

    def numbers(self) -> Iterator[tuple[str, float]]:
        """The numeric constants that a step reads, as (dotted name, value), in a fixed order.

        With ``fidelity = "original"`` ADAPTIVE's temperature has no cap (D14).
        """
        for section in ("base", "thresholds", "helv", "lehv", "hehv", "adaptive", "confidence"):
            for name, value in numbers_of(section, getattr(self, section)):
                if self.fidelity == "original" and name == "adaptive.temperature_max":
                    value = math.inf
                yield name, value

    @classmethod
    def checked_constants(cls, given: Mapping[str, Any]) -> dict[str, float]:
        """Constants by dotted name; ConfigError if one isn't known, or isn't in the range of the setting of this name."""
        known = dict(cls.preset().numbers()) | {f"experiments.shares.{name}": 0.0 for name in SHARED}
        table: dict[str, Any] = {}
        for name, value in given.items():
            if name not in known:
                raise ConfigError(f"unknown constant {cut(quoted(name), 50)}; `vllm-entropix presets` lists them")
            *sections, last = name.split(".")
            inner = table
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[last] = value
        cls.from_dict(table, source="constants")
        return {name: float(value) for name, value in given.items()}

    @property
    def attention_varentropy(self) -> AttentionVarentropy:
        """How the variance over heads is taken (D3)."""
        return self.original.attention_varentropy if self.fidelity == "original" else "heads"

    @property
    def padded_positions(self) -> int | None:
        """Number of key slots that count whatever the context's length (D2), or None: only the real positions count."""
        return self.original.padded_positions if self.fidelity == "original" else None

    @property
    def clarification_rule(self) -> ClarificationRule:
        """The rule against repeated clarifications in force (D10)."""
        if self.clarification.rule is not None:
            return self.clarification.rule
        return self.original.clarification_rule if self.fidelity == "original" else "cooldown"


def as_mapping(source: str | Path | Mapping[str, Any] | EntropixConfig | None) -> dict[str, Any]:
    """A settings table from nothing, a mapping, JSON text, a preset's name, or the path of a JSON, TOML or YAML file."""
    if isinstance(source, EntropixConfig):
        return source.model_dump(mode="json", by_alias=True)
    return as_table(source, preset_names())
