"""Settings of a server that don't depend on the sampler: base parameters, forced tokens, attention, traces."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import Field, field_validator, model_validator

from vllm_entropix.settings.rules import AttentionVarentropy, BaseSource, ClarificationRule, Place
from vllm_entropix.settings.section import Section, TokenId, refuse_truth_value, setting

MAX_CLARIFICATION_TOKENS = 64


class BaseParameters(Section):
    """Parameters before a regime changes them (SEMANTICS: T0, P0, K0)."""

    temperature: float = setting("Base temperature T0.", gt=0, le=10)
    top_p: float = setting("Base nucleus mass P0.", "probability", gt=0, le=1)
    top_k: int = setting("Base number of candidates K0; regimes scale it.", "tokens", ge=1, le=100_000)
    min_p: float = setting("Base smallest probability, relative to the largest.", "ratio", ge=0, le=1)


class Base(BaseParameters):
    """The server's base parameters, and whether a request's own come before them."""

    source: BaseSource = Field(
        "preset",
        description="Where base parameters come from if a request doesn't say `entropix_base`: from these settings (`preset`), "
        "or from the temperature, top_p, top_k and min_p of the `request`.",
        json_schema_extra={"unit": ""},
    )


class Clarification(Section):
    """Tokens that HELV forces into the text: none unless ``text`` or ``token_ids`` is given."""

    text: str | None = Field(
        None,
        min_length=1,
        max_length=4096,
        description="Text to force, encoded with the served tokenizer.",
        json_schema_extra={"unit": "text"},
    )
    token_ids: tuple[TokenId, ...] | None = Field(
        None,
        min_length=1,
        max_length=MAX_CLARIFICATION_TOKENS,
        description="Token ids to force, instead of a text.",
        json_schema_extra={"unit": "token ids"},
    )
    rule: ClarificationRule | None = Field(
        None,
        description="When to insert again: after `cooldown` tokens, unless it is the `last-token`, or unless it occurred "
        "`ever`; unset: cooldown (corrected) or the preset's own (original).",
        json_schema_extra={"unit": ""},
    )
    cooldown: int = Field(
        16,
        ge=0,
        le=1_000_000,
        description="Tokens that must follow an insertion before the next.",
        json_schema_extra={"unit": "tokens"},
    )
    place: Place = Field(
        "anywhere",
        description="Where it may begin: `anywhere`, only between `lines`, or only between `sentences` or lines.",
        json_schema_extra={"unit": ""},
    )
    end_below: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Insert it only where the text's end is less probable as the next token; 1: wherever.",
        json_schema_extra={"unit": "probability"},
    )
    max_per_request: int = Field(
        4, ge=0, le=1_000_000, description="Insertions per request at most.", json_schema_extra={"unit": "insertions"}
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.text is not None and self.token_ids is not None:
            raise ValueError("give text or token_ids, not both")
        return self


class Attention(Section):
    """Which attention is observed."""

    enabled: bool = Field(True, description="Off: the sampler runs on the logits alone.", json_schema_extra={"unit": ""})
    layers: Literal["last", "all"] | tuple[Annotated[int, Field(ge=0)], ...] = Field(
        "last",
        description="`last`, `all`, or a list of layer indices; statistics are the mean over them.",
        json_schema_extra={"unit": "layers"},
    )

    @field_validator("layers", mode="before")
    @classmethod
    def _known_layers(cls, value: Any) -> Any:
        if value in ("last", "all"):
            return value
        if isinstance(value, (list, tuple)):
            # `--sampler-config.attention.layers+ 1` gives text; no layer has a number of ten digits.
            value = [int(layer) if isinstance(layer, str) and re.fullmatch("[0-9]{1,9}", layer) else layer for layer in value]
        if not isinstance(value, (list, tuple)) or not all(type(layer) is int and 0 <= layer < 10**9 for layer in value):
            raise ValueError("it should be 'last', 'all' or a list of layer indices")
        if not value:
            raise ValueError("no layer is named; set attention.enabled = false to run on logits alone")
        if len(set(value)) != len(value):
            raise ValueError("a layer is named twice")
        return value


class Trace(Section):
    """Per-token trace records."""

    default: bool = Field(False, description="Trace every request that doesn't say otherwise.", json_schema_extra={"unit": ""})
    alternatives: int = Field(
        5,
        ge=0,
        le=20,
        description="Most probable tokens that are recorded with each token.",
        json_schema_extra={"unit": "tokens"},
    )
    max_tokens: int = Field(
        8192,
        ge=1,
        le=10_000_000,
        description="Records kept per sequence; later tokens are counted but not kept.",
        json_schema_extra={"unit": "tokens"},
    )
    # 64 answers of 1024 tokens: some 36 MB of JSON, with five alternatives per token.
    response_tokens: int = Field(
        65_536,
        ge=1,
        le=10_000_000,
        description="Records in one HTTP response, all choices together; tokens beyond have none there.",
        json_schema_extra={"unit": "tokens"},
    )
    path: str | None = Field(
        None,
        min_length=1,
        max_length=4096,
        description="File that traced sequences are written to as JSON lines; its folder must exist. Unset: none is written.",
        json_schema_extra={"unit": "path"},
    )
    max_megabytes: int = Field(
        100,
        ge=1,
        le=1_000_000,
        description="Size at which the file of traces is set aside and another begun; longer lines are dropped.",
        json_schema_extra={"unit": "MB"},
    )
    files: int = Field(
        5,
        ge=1,
        le=10_000,
        description="Files of traces that each process keeps, the one being written included.",
        json_schema_extra={"unit": "files"},
    )

    queue_megabytes: int = Field(
        64,
        ge=1,
        le=1_000_000,
        description="Finished sequences that wait to be written, in memory and per process; more are dropped and counted.",
        json_schema_extra={"unit": "MB"},
    )
    prompts: bool = Field(
        False,
        description="Write the text of prompts into traces on disk, and not only its hash.",
        json_schema_extra={"unit": ""},
    )

    @field_validator("path")
    @classmethod
    def _a_file(cls, value: str | None) -> str | None:
        if value is not None and ("\0" in value or value.endswith("/")):
            raise ValueError("it should be the path of a file")
        return value


class Scores(Section):
    """Scores of whole answers."""

    default: bool = Field(
        False, description="Score every answer whose request doesn't say otherwise.", json_schema_extra={"unit": ""}
    )


class Forks(Section):
    """Answers that fork at uncertain tokens: alternatives are followed side by side, and the best branch is the answer."""

    branches: int = Field(
        1,
        ge=1,
        le=64,
        description="Branches of a request that are generated at once, at most; 1: it never forks. Above 1, requests that "
        "can't fork and don't ask to are left as they are.",
        json_schema_extra={"unit": "branches"},
    )
    width: int = Field(
        2,
        ge=1,
        le=20,
        description="Branches that a fork makes of one, the one that goes on among them.",
        json_schema_extra={"unit": "branches"},
    )
    entropy: float | None = Field(
        None,
        ge=0,
        le=64,
        description="Fork at tokens whose entropy is at least this; unset: at those whose regime is LEHV.",
        json_schema_extra={"unit": "bits"},
    )
    margin: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Fork only where the most probable token is ahead of the second by at most this.",
        json_schema_extra={"unit": "probability"},
    )
    floor: float = Field(
        0.05,
        ge=0,
        le=1,
        description="Probability that an alternative needs to be followed, before temperature and filters.",
        json_schema_extra={"unit": "probability"},
    )
    distance: int = Field(
        8,
        ge=1,
        le=1_000_000,
        description="Tokens from a branch's fork to its next, at least.",
        json_schema_extra={"unit": "tokens"},
    )
    inside_words: bool = Field(False, description="Fork between the tokens of a word, too.", json_schema_extra={"unit": ""})
    horizon: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="Tokens after a fork at which its branches are compared and the best goes on alone; 0: all run to an end.",
        json_schema_extra={"unit": "tokens"},
    )
    budget: int = Field(
        2048,
        ge=0,
        le=10_000_000,
        description="Tokens that a request's branches may take beyond its longest one; then the best alone goes on.",
        json_schema_extra={"unit": "tokens"},
    )
    engine_budget: int = Field(
        65_536,
        ge=0,
        le=1_000_000_000,
        description="The same of all requests that run at once in a process of the frontend; then none forks.",
        json_schema_extra={"unit": "tokens"},
    )
    select: str = Field(
        "confidence",
        min_length=1,
        max_length=100,
        description="How branches are compared: `confidence`, `entropy`, `margin`, `vote`, `weighted-vote`, `all` (all are "
        "returned), or a chooser that another package has.",
        json_schema_extra={"unit": ""},
    )
    place: Literal["uncertain", "random", "sure"] = Field(
        "uncertain",
        description="Which tokens fork: `uncertain` ones, as `forks.entropy` says; as controls of studies `random`, any, and "
        "`sure`, those below that entropy, or in LELV.",
        json_schema_extra={"unit": ""},
    )
    share: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of these tokens that fork, by chance, which the request's seed decides.",
        json_schema_extra={"unit": ""},
    )
    mechanism: Literal["auto", "prefix-cache"] = Field(
        "auto",
        description="How branches share what is computed: `auto`, the parent's own blocks, copied on write, where vLLM has "
        "that; `prefix-cache`, whole blocks alone.",
        json_schema_extra={"unit": ""},
    )
    answer: str | None = Field(
        None,
        min_length=1,
        max_length=100,
        description="Where the answer stands in a text, for `vote` and `margin`: `last-number`, `boxed`, `last-line`, or "
        "`after:TEXT`; unset: `margin` is that of all tokens.",
        json_schema_extra={"unit": ""},
    )

    @field_validator("entropy", mode="before")
    @classmethod
    def _a_number(cls, value: Any) -> Any:
        return refuse_truth_value(value)


class ServerSettings(Section):
    """What a server is told whichever samplers it has; each sampler's own section stands beside these."""

    sampler: str = Field(
        "entropix",
        description="Sampler of requests that name none: `vllm-entropix samplers` lists them.",
        json_schema_extra={"unit": ""},
    )
    signals: bool = Field(
        False,
        description="With the sampler `vllm`: measure what vLLM draws, for traces and scores; all others are measured anyway.",
        json_schema_extra={"unit": ""},
    )
    prometheus: bool = Field(
        True, description="Count tokens, regimes and entropies for vLLM's /metrics.", json_schema_extra={"unit": ""}
    )
    base: Base
    clarification: Clarification = Field(default_factory=lambda: Clarification())
    attention: Attention = Field(default_factory=lambda: Attention())
    trace: Trace = Field(default_factory=lambda: Trace())
    scores: Scores = Field(default_factory=lambda: Scores())
    forks: Forks = Field(default_factory=lambda: Forks())


class AttentionRules(Protocol):
    """What attention's statistics are told by a configuration, whichever sampler reads them."""

    @property
    def attention(self) -> Attention:
        """Which layers are observed."""

    @property
    def attention_varentropy(self) -> AttentionVarentropy:
        """How the variance over heads is taken (D3)."""

    @property
    def padded_positions(self) -> int | None:
        """Number of key slots that count whatever the context's length (D2), or None: only the real positions count."""
