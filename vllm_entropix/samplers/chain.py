"""Chains: samplers one after the other, each on the candidates that those before it left, as llama.cpp has them.

Everything ends in one distribution per row: XTC's coin is a mixture, on whose two sides the stages after it act.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from vllm_entropix.samplers.folder import classes_of
from vllm_entropix.samplers.stage import Branch, Stage, StageRows, StatefulStage
from vllm_entropix.settings.errors import QUOTED, ConfigError, quoted
from vllm_entropix.settings.section import describe

if TYPE_CHECKING:
    from torch import Tensor

SEPARATOR = ";"
_TEMPERATURES = ("temperature", "dynatemp", "edt")
# llama.cpp's switch: 1 and 2 put that version in the place of everything but the temperature.
_MIROSTAT = {"mirostat": ("", "mirostat", "mirostat_v2"), "mirostat_mode": ("", "mirostat", "mirostat_v2")}
# Each ends the chain by a rule of its own for what is drawn.
_ONE_OF = ("mirostat", "mirostat_v2", "adaptive_p")


@cache
def stages() -> dict[str, type[Stage]]:
    """All samplers that may stand in a chain, by name."""
    return {stage.name: stage for stage in sorted(classes_of(Stage), key=lambda stage: stage.name)}


def names() -> tuple[str, ...]:
    """Names of the samplers that may stand in a chain, sorted."""
    return tuple(stages())


@cache
def _spellings() -> dict[str, str]:
    known: dict[str, str] = {}
    for name, stage in stages().items():
        known.update(dict.fromkeys((name, *(alias.replace("-", "_") for alias in stage.aliases)), name))
    return known


@cache
def _settings() -> dict[str, str]:
    """What people call a setting → its name."""
    known = {}
    for stage in stages().values():
        known.update(dict(stage.setting_aliases))
    # A setting's own name goes before another's alias.
    return known | {name: name for stage in stages().values() for name in stage.Settings.model_fields}


def parse_names(text: str | Sequence[str]) -> tuple[str, ...]:
    """Names of a chain's samplers in the order in which they act.

    Args:
        text: names or aliases with ``;`` between them, or a list of them; "" is the empty chain.

    Raises:
        ConfigError: a name is unknown or there twice, or two contradict each other.
    """
    if isinstance(text, str):
        given: list[Any] = text.split(SEPARATOR) if text.strip() else []
    elif isinstance(text, Sequence) and not isinstance(text, bytes):
        given = list(text)
    else:
        raise ConfigError(f"a chain is {quoted(text)}, but it should be names with {SEPARATOR!r} between them")
    found: list[str] = []
    for one in given:
        name = _spellings().get(one.strip().lower().replace("-", "_").replace(" ", "_")) if isinstance(one, str) else None
        if name is None:
            where = f" in the chain {quoted(text)}" if len(str(text)) <= QUOTED else ""
            raise ConfigError(f"unknown sampler {quoted(one)}{where}; there are {', '.join(names())}")
        if name in found:
            raise ConfigError(f"the chain {quoted(text)} has {name} twice; there are {', '.join(names())}, each once")
        found.append(name)
    _refuse_contradiction(found)
    return tuple(sorted(found, key=lambda name: stages()[name].last))


def _refuse_contradiction(found: Sequence[str]) -> None:
    ends = [name for name in _ONE_OF if name in found]
    if len(ends) > 1:
        raise ConfigError(
            f"{ends[0]} and {ends[1]} can't stand in one chain, since either ends it; leave one out: "
            f"there are {', '.join(names())}"
        )


@dataclass(frozen=True)
class ChainRequest:
    """A request's chain.

    Attributes:
        names: of its samplers.
        values: of all their settings, but for those that are the request's own fields.
        own_breakers: are DRY's breakers the request's?
    """

    names: tuple[str, ...]
    values: Mapping[str, Any]
    own_breakers: bool = False

    @property
    def text(self) -> str:
        """The chain as users write it."""
        return SEPARATOR.join(self.names)

    @property
    def remembers(self) -> bool:
        """Does one of its samplers keep a number of what is drawn?"""
        return any(issubclass(stages()[name], StatefulStage) for name in self.names)

    @property
    def breakers(self) -> tuple[Any, ...]:
        """DRY's: texts, token ids or tuples of token ids; none without DRY."""
        return tuple(self.values.get("dry_sequence_breakers", ()))


def as_asked(found: tuple[str, ...], parameters: Mapping[str, Any]) -> tuple[str, ...]:
    """The chain that ``parameters`` make of one, by llama.cpp's switches: mirostat's version, and dynatemp's range.

    Raises:
        ConfigError: there is no such version of mirostat.
    """
    for key, versions in _MIROSTAT.items():
        version = parameters.get(key)
        if version is None:
            continue
        if isinstance(version, bool) or version not in range(len(versions)):
            raise ConfigError(f"{key} is {quoted(version)}, but it should be 0, 1 or 2")
        if version:
            return (*([name for name in found if name in _TEMPERATURES] or ["temperature"]), versions[int(version)])
    ranged = any(parameters.get(name) is not None for name in ("dynatemp_range", "dynatemp_exponent"))
    if ranged and "dynatemp" not in found:
        found = tuple("dynatemp" if name == "temperature" else name for name in found)
    return found


def values_of(found: Sequence[str], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Values of all settings of a chain's samplers: those given, and defaults.

    Raises:
        ConfigError: a setting is unknown, of a sampler that isn't in the chain, there twice, or out of range.
    """
    given: dict[str, Any] = {}
    for key, value in parameters.items():
        if key in _MIROSTAT or value is None:
            continue
        name = _settings().get(key) if isinstance(key, str) else None
        owners = [stage for stage in stages().values() if name in stage.Settings.model_fields]
        if not any(stage.name in found for stage in owners):
            raise ConfigError(_stray(key, owners, found))
        if name in given:
            raise ConfigError(f"{quoted(key)} is another name of {name}, which is there, too; give one of them")
        given[str(name)] = value
    values: dict[str, Any] = {}
    for name in found:
        stage = stages()[name]
        mine = {key: given[key] for key in stage.Settings.model_fields if key in given}
        try:
            section = stage.Settings.model_validate(dict(stage.chain_defaults) | mine)
        except ValidationError as error:
            raise ConfigError(describe(error, stage.Settings)) from None
        values.update({key: getattr(section, key) for key in stage.Settings.model_fields})
    return values


def setting_names() -> frozenset[str]:
    """All that settings of a chain's samplers are called, and llama.cpp's switches of mirostat."""
    return frozenset({*_settings(), *_MIROSTAT})


def proper_name(key: str) -> str | None:
    """A setting's own name, by what people call it; None if it is none."""
    return _settings().get(key)


def without_what_is_off(found: Sequence[str], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """``parameters`` without those of samplers that aren't in the chain and that these very values leave off.

    Many clients send every setting that they know with each request.

    Raises:
        ConfigError: a value is out of range.
    """
    strays: dict[str, dict[str, Any]] = {}
    kept = {}
    for key, value in parameters.items():
        owners = [stage.name for stage in stages().values() if _settings().get(key) in stage.Settings.model_fields]
        if not owners or value is None or any(name in found for name in owners):
            kept[key] = value
        else:
            strays.setdefault(owners[0], {})[key] = value
    for name, given in strays.items():
        stage = stages()[name]
        # Of a sampler without a neutral value, such as mirostat, naming it is what switches it on.
        if stage.neutral and not stage.is_off(values_of((name,), given)):
            kept.update(given)
    return kept


def _stray(key: Any, owners: Iterable[type[Stage]], found: Sequence[str]) -> str:
    chain = quoted(SEPARATOR.join(found))
    wanted = " or ".join(stage.name for stage in owners)
    if wanted:
        return f"{key} is a setting of {wanted}, which isn't in the chain {chain}; put it there, or leave {key} out"
    here = sorted({key for name in found for key in stages()[name].Settings.model_fields})
    return f"unknown setting {quoted(key)} of the chain {chain}; here are {', '.join(here) or 'none'}"


@dataclass(frozen=True)
class Outcome:
    """What a chain makes of rows of logits.

    Attributes:
        probabilities: ``[rows, vocab]``.
        followed: sampler with a state → the probabilities ``[rows, vocab]``, that of the drawn token moves it.
        states: sampler with a state → ``[rows, 1]``, what each row started from.
        told: the drawn tokens, int64 ``[rows, 1]`` → what the samplers add to records, ``[rows]`` each.
    """

    probabilities: Tensor
    followed: Mapping[str, Tensor]
    states: Mapping[str, Tensor]
    told: Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Drafts:
    """Rows of which several belong to one sequence, which verifies that many tokens in one step.

    Attributes:
        index: ``[rows]``, a row's index among its sequence's, which follow one another.
        count: the most rows that a sequence has.
        input_ids: int64 ``[rows]``, the token that a row follows.
    """

    index: Tensor
    count: int
    input_ids: Tensor


def outcome(
    chain: Sequence[Stage],
    logits: Tensor,
    rows: StageRows,
    states: Mapping[str, Tensor] | None = None,
    drafts: Drafts | None = None,
) -> Outcome:
    """Run rows through a chain.

    Args:
        chain: its stages.
        logits: ``[rows, vocab]``, float32 or float64; left as they are.
        rows: what stages may look at; the state is put in here.
        states: of each stage that has one, ``[rows, 1]``. NaN stands where none is known yet.
        drafts: None: each row is the only one of its sequence. Otherwise a sequence's first row has the state of ``states``,
            and each other that which the row before it leads to by the row's token.
    """
    from vllm_entropix.distribution.survivors import softmax, without_softmax

    branches = [(logits.new_ones(len(logits), 1), without_softmax(logits))]
    followed: dict[str, Tensor] = {}
    begun: dict[str, Tensor] = {}
    passed: list[tuple[Stage, Tensor, list[Branch], StageRows]] = []
    for stage in chain:
        before, mine = branches, rows
        if isinstance(stage, StatefulStage):
            branches, mine, begun[stage.name], followed[stage.name] = _follow(stage, before, rows, states, drafts)
        else:
            branches = _through(stage, before, rows)
        if stage.fields:
            # The parts that the first part before has become.
            passed.append((stage, before[0][1], branches[: len(branches) // len(before)], mine))

    def told(drawn: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for stage, handed, parts, mine in passed:
            found.update(stage.told(handed, parts, mine, drawn))
        return found

    probabilities = softmax(branches[0][1]) if len(branches) == 1 else _mixture(branches)
    return Outcome(probabilities, followed, begun, told)


def _through(stage: Stage, before: Iterable[Branch], rows: StageRows) -> list[Branch]:
    return [(share * part, left) for share, candidates in before for part, left in stage.branches(candidates, rows)]


def _follow(
    stage: StatefulStage,
    before: list[Branch],
    rows: StageRows,
    states: Mapping[str, Tensor] | None,
    drafts: Drafts | None,
) -> tuple[list[Branch], StageRows, Tensor, Tensor]:
    """What the stage makes of each part, with what it looked at, the states of the rows, and what it follows."""
    first = stage.initial(rows.numbers)
    known = None if states is None else states.get(stage.name)
    state = first if known is None else known.where(~known.isnan(), first.to(known.dtype))
    count = 1 if drafts is None else drafts.count
    handed = _mixture(before) if stage.follows == "before" else None
    mine, branches, followed = rows, before, handed
    # A draft's row starts from the row before it, so these go one after the other. The others are computed along and thrown
    # away: which rows are whose is known on the device only.
    for draft in range(count):
        if draft:
            assert drafts is not None
            assert followed is not None
            # The row before is of the same sequence, but for first rows, which aren't a draft's.
            tokens = drafts.input_ids.clamp(0, followed.shape[-1] - 1).roll(-1, 0)
            probability = followed.gather(-1, tokens.unsqueeze(-1)).roll(1, 0)
            after = moved_by(stage, state.roll(1, 0), probability, rows.numbers)
            state = after.where((drafts.index == draft).unsqueeze(-1), state)
        if handed is None or draft == count - 1:
            mine = replace(rows, state=state.to(before[0][1].dtype))
            branches = _through(stage, before, mine)
            followed = _mixture(branches) if handed is None else handed
    assert followed is not None
    return branches, mine, state, followed


def _mixture(branches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    from vllm_entropix.distribution.survivors import softmax

    first, *others = (share * softmax(logits) for share, logits in branches)
    return sum(others, first)


class Chain:
    """A chain with its settings: ``Chain.parse("top_k;temperature", {"top_k": 20}).begin(rows=1)``.

    Args:
        found: names of its samplers, as :func:`parse_names` gives them.
        values: value of each of their settings.
        breakers: token ids of each of DRY's breakers.
    """

    def __init__(self, found: Sequence[str], values: Mapping[str, Any], breakers: Sequence[tuple[int, ...]] = ()) -> None:
        self.names = tuple(found)
        self.values = dict(values)
        self.stages = make_stages(self.names, breakers)

    @classmethod
    def parse(cls, text: str | Sequence[str], parameters: Mapping[str, Any] | None = None, tokenizer: Any = None) -> Chain:
        """A chain from what a user writes.

        Args:
            text: names with ``;`` between them; "" is the empty chain, which changes nothing.
            parameters: settings by llama.cpp's names; the others have llama.cpp's defaults.
            tokenizer: a Hugging Face tokenizer, for DRY's breakers; without one only token ids break repetitions.

        Raises:
            ConfigError: a name or a setting is unknown, there twice, contradictory, or out of range.
        """
        if parameters is not None and not isinstance(parameters, Mapping):
            raise ConfigError(f"a chain's settings are {quoted(parameters)}, but they should be a table")
        given = parameters or {}
        found = as_asked(parse_names(text), given)
        values = values_of(found, given)
        breakers = breakers_of(values.get("dry_sequence_breakers", ()), tokenizer, "dry_sequence_breakers" in given)
        return cls(found, values, breakers)

    def begin(self, rows: int = 1) -> ChainRun:
        """Begin that many sequences, which share the settings and have a state each."""
        return ChainRun(self, rows)

    def __str__(self) -> str:
        return SEPARATOR.join(self.names)

    def __repr__(self) -> str:
        return f"Chain({str(self)!r}, {self.values!r})"


def make_stages(found: Iterable[str], breakers: Sequence[tuple[int, ...]] = ()) -> tuple[Stage, ...]:
    """The stages of these names."""
    return tuple(stages()[name](breakers) for name in found)


def breakers_of(given: Sequence[Any], tokenizer: Any, asked: bool) -> list[tuple[int, ...]]:
    """Token ids of each breaker.

    A text is broken by every token that contains it, and by the tokens that it is encoded as, if these are several.

    Args:
        given: texts, token ids, or tuples of token ids.
        tokenizer: a Hugging Face tokenizer, or None.
        asked: were they asked for? What a tokenizer can't give is left out of the defaults.

    Raises:
        ConfigError: a text that was asked for has no token ids.
    """
    found: list[tuple[int, ...]] = []
    for one in given:
        if isinstance(one, int):
            found.append((one,))
        elif isinstance(one, tuple):
            found.append(one)
        elif tokenizer is not None:
            texts = _tokens_of(tokenizer, one)
            if asked and not texts:
                raise ConfigError(f"dry_sequence_breakers has {quoted(one)}, which the tokenizer can't give; leave it out")
            found += texts
        elif asked:
            raise ConfigError(
                f"dry_sequence_breakers has {quoted(one)}, but no tokenizer is there to encode it; give token ids"
            )
    return list(dict.fromkeys(found))


@lru_cache(maxsize=1024)
def _tokens_of(tokenizer: Any, text: str) -> tuple[tuple[int, ...], ...]:
    """Token ids of a breaker."""
    found: list[tuple[int, ...]] = [(token,) for token, word in _words(tokenizer).items() if text in word]
    try:
        ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    except (UnicodeError, TypeError):  # half of a surrogate pair
        ids = ()
    if len(ids) > 1 and tokenizer.decode(list(ids)) == text:
        found.append(ids)
    return tuple(found)


@lru_cache(maxsize=4)
def _words(tokenizer: Any) -> dict[int, str]:
    """The text of each token of the vocabulary."""
    ids = sorted(tokenizer.get_vocab().values())
    return dict(zip(ids, tokenizer.batch_decode([[token] for token in ids]), strict=True))


class ChainRun:
    """Sequences under a chain, a row each: a distribution, a draw by whoever asked, and so on.

    Args:
        chain: with its settings.
        rows: number of sequences.
    """

    def __init__(self, chain: Chain, rows: int) -> None:
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise ValueError(f"rows is {quoted(rows)}, but it should be a number of 1 or more")
        self.chain, self.rows = chain, rows
        self.states: dict[str, Tensor] | None = None
        self._followed: Mapping[str, Tensor] | None = None
        self._vocabulary = 0

    def distribution(self, logits: Any, histories: Sequence[Sequence[int] | None] | None = None) -> Tensor:
        """Probabilities of each row's next token, ``[rows, vocab]``, in float64 if the logits are, otherwise in float32.

        Args:
            logits: ``[rows, vocab]``; -inf excludes a token.
            histories: token ids of each row's text so far, which DRY and penalties look at; None for a row has none.

        Raises:
            ValueError: logits or histories aren't of as many rows as were begun.
        """
        import numpy as np
        import torch

        from vllm_entropix.distribution.history import aligned

        # A list's numbers are of Python's precision, which torch alone would halve.
        logits = logits if isinstance(logits, torch.Tensor) else torch.as_tensor(np.asarray(logits))
        if logits.dim() != 2 or len(logits) != self.rows or not logits.shape[1]:
            raise ValueError(f"logits have the shape {list(logits.shape)}, but it should be [{self.rows}, vocabulary]")
        if histories is not None and len(histories) != self.rows:
            raise ValueError(f"there are {len(histories)} histories, but {self.rows} rows")
        logits = logits if logits.dtype == torch.float64 else logits.to(torch.float32)
        numbers = self._numbers(logits)
        tokens = None
        if histories is not None and any(stage.needs_tokens for stage in self.chain.stages):
            tokens = aligned(histories, logits.device)
        if self.states is None:
            self.states = {
                stage.name: stage.initial(numbers).to(torch.float64)
                for stage in self.chain.stages
                if isinstance(stage, StatefulStage)
            }
        states = {name: state.to(logits) for name, state in self.states.items()}
        found = outcome(self.chain.stages, logits, StageRows(numbers, tokens), states)
        self._followed, self._vocabulary = found.followed, logits.shape[1]
        return found.probabilities

    def advance(self, token_ids: Any) -> None:
        """Tell what was drawn from the last distribution, one token id per row.

        Raises:
            ValueError: nothing was asked for since the last call, or there isn't one token of the vocabulary per row.
        """
        import torch

        if self._followed is None or self.states is None:
            raise ValueError("nothing was drawn: ask for a distribution first")
        drawn = torch.as_tensor(token_ids).reshape(-1)
        if drawn.numel() != self.rows or drawn.is_floating_point() or drawn.dtype == torch.bool:
            raise ValueError(f"token_ids are {quoted(token_ids)}, but there should be an id for each of {self.rows} rows")
        if not ((drawn >= 0) & (drawn < self._vocabulary)).all():
            raise ValueError(f"token_ids are {quoted(token_ids)}, but they should be from 0 to {self._vocabulary - 1}")
        for stage in self.chain.stages:
            if isinstance(stage, StatefulStage):
                state, followed = self.states[stage.name], self._followed[stage.name]
                self.states[stage.name] = moved(stage, state, followed, drawn, self._numbers(state))
        self._followed = None

    def _numbers(self, like: Tensor) -> dict[str, Tensor]:
        return {
            name: like.new_full((self.rows, 1), float(value))
            for name, value in self.chain.values.items()
            if isinstance(value, (int, float))
        }


def moved(stage: StatefulStage, state: Tensor, followed: Tensor, drawn: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
    """The state ``[rows, 1]`` after the tokens ``drawn [rows]``; one that the chain had excluded leaves it as it is."""
    return moved_by(stage, state, followed.gather(-1, drawn.to(followed.device).unsqueeze(-1)), numbers)


def moved_by(stage: StatefulStage, state: Tensor, probability: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
    """The same, by the followed ``probability [rows, 1]`` of the drawn tokens."""
    probability = probability.to(state.dtype)
    return stage.advance(state, probability, numbers).where(probability > 0, state)
