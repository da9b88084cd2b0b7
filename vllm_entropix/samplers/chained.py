"""Chains in the engine: rows of a batch, each through its own request's chain, and what is kept of them after the draw.

``chain`` says what a chain is. Here are its rows' settings, its state by position and its fields of a record.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_entropix.distribution.plan import Drawn, Parameters, Plan
from vllm_entropix.kernels.chains import numbers_of
from vllm_entropix.records.fields import Field
from vllm_entropix.records.line import SamplerPart
from vllm_entropix.samplers import chain
from vllm_entropix.samplers.base import RowView, Sampler, Sequences
from vllm_entropix.samplers.chained_kernel import KernelPart
from vllm_entropix.samplers.numbered import Numbered
from vllm_entropix.samplers.request import GREEDY_BELOW, RequestSettings
from vllm_entropix.samplers.stage import Stage, StageRows, StatefulStage
from vllm_entropix.settings.errors import ConfigError, quoted
from vllm_entropix.settings.load import parse
from vllm_entropix.settings.section import Section
from vllm_entropix.settings.server import BaseParameters

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from vllm_entropix.distribution.attention import AttentionStatistics
    from vllm_entropix.distribution.constants import Constants
    from vllm_entropix.kernels.numba_.on_demand import OnDemand
    from vllm_entropix.settings.server import ServerSettings

NAME = "chain"
# llama.cpp's, which `--sampler chain` asks for.
DEFAULT = ("penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature")
# What a request says of these are fields of its own.
OF_REQUEST = frozenset(BaseParameters.model_fields)
_ENTROPIX = "entropix"
_BREAKERS = "dry_sequence_breakers"
_REPEAT = "repeat_penalty"
# Token ids of each of DRY's breakers.
_Breakers = tuple[tuple[int, ...], ...]


def request_names() -> frozenset[str]:
    """What a request may call settings of a chain's samplers."""
    return frozenset(name for name in chain.setting_names() if chain.proper_name(name) not in OF_REQUEST)


def names_of(text: Any, server: Any = None) -> tuple[str, ...]:
    """Names of a chain's samplers.

    Args:
        text: as users write it; ``chain`` is the server's, or else llama.cpp's default.
        server: what the server's ``sampler`` is.

    Raises:
        ConfigError: it is no chain.
    """
    if text == NAME:
        return DEFAULT if server is None or not is_chain(server) or server == NAME else chain.parse_names(server)
    return chain.parse_names(text)


def is_chain(text: Any) -> bool:
    """Is it a chain? A single sampler that plans by itself, such as min_p, is none."""
    try:
        found = names_of(text)
    except ConfigError:
        return False
    if text == NAME or len(found) != 1:
        return True
    return found[0] != _ENTROPIX and not issubclass(chain.stages()[found[0]], Sampler)


def read(text: Any, given: Mapping[str, Any], server: Mapping[str, Any] | ServerSettings) -> chain.ChainRequest:
    """The chain of a request, or of the server.

    Args:
        text: names of the samplers.
        given: what the request says of their settings.
        server: its settings, as an object or as plain values.

    Raises:
        ConfigError: a name or a setting is unknown, contradictory, of a sampler that isn't in the chain, or out of range.
    """
    own = next((key for key in given if chain.proper_name(key) in OF_REQUEST), None)
    if own is not None:
        raise ConfigError(f"{quoted(own)} is a field of the request's own; give it there")
    found = chain.as_asked(names_of(text, _of(server, "sampler")), given)
    said = {chain.proper_name(key) for key, value in given.items() if value is not None}
    checked = chain.values_of(found, given)
    values = {}
    for name in found:
        stage = chain.stages()[name]
        section, usual = _of(server, name), dict(stage.chain_defaults)
        for setting, info in stage.Settings.model_fields.items():
            if setting in OF_REQUEST:
                continue
            value = checked[setting]
            if setting not in said and section is not None:
                of_server = _of(section, setting)
                # A section that says nothing leaves llama.cpp's default in force.
                value = of_server if of_server != info.default or setting not in usual else usual[setting]
            values[setting] = value
    return chain.ChainRequest(found, values, _BREAKERS in said)


def of_body(
    top: Mapping[str, Any], given: Mapping[str, Any], server: Mapping[str, Any], repetition_penalty: float | None = None
) -> dict[str, Any]:
    """What the top level of a request's body says of its chain, without what doesn't matter to it.

    Args:
        top: settings of chains, and ``samplers``, that stand there.
        given: what the request says of samplers elsewhere, which comes before it.
        server: the server's settings as plain values.
        repetition_penalty: the request's own, which vLLM takes.

    Raises:
        ConfigError: a value is out of range, or ``samplers`` is no chain.
    """
    said: dict[str, Any] = {}
    for name, value in top.items():
        # Some clients send one value under each name that a setting has somewhere; one of these may be vLLM's.
        if chain.proper_name(name) == _REPEAT and value == repetition_penalty:
            continue
        known = (said[other] for other in said if chain.proper_name(other) == chain.proper_name(name) is not None)
        if value is not None and name not in given and value not in known:
            said[name] = value
    breakers = said.get(_BREAKERS)
    if isinstance(breakers, str):  # as text-generation-webui has them
        said[_BREAKERS] = parse(breakers, json.loads, f"{_BREAKERS} is {quoted(breakers)}, which is no JSON list of texts")
    text = given.get("samplers", said.get("samplers"))
    asked = _of(server, "sampler") if text is None else text
    if text is not None and not is_chain(";".join(text) if isinstance(text, (list, tuple)) else text):
        return said  # which is refused, or read, by the sampler that it names
    named = names_of(asked, _of(server, "sampler"))
    found = chain.as_asked(named, said)
    # What mirostat, switched on, takes the place of is left out.
    replaced, left = (
        {name for one in names for name in chain.stages()[one].Settings.model_fields}
        for names in (set(named) - set(found), found)
    )
    rest = {name: value for name, value in said.items() if name != "samplers"}
    rest = {name: value for name, value in rest.items() if chain.proper_name(name) not in replaced - left}
    samplers = {"samplers": text} if "samplers" in said else {}
    return samplers | chain.without_what_is_off(found, rest)


def _of(table: Any, name: str) -> Any:
    return table.get(name) if isinstance(table, Mapping) else getattr(table, name, None)


@cache
def _numeric() -> dict[str, float]:
    """Each numeric setting of any stage and its default in a chain, those that are a request's own fields included."""
    found: dict[str, float] = {}
    for stage in chain.stages().values():
        usual = dict(stage.chain_defaults)
        for name, info in stage.Settings.model_fields.items():
            if info.annotation in (int, float):
                found.setdefault(name, float(usual.get(name, info.default)))
    # The kernels' first, side by side as they read them.
    return {name: found[name] for name in numbers_of("numba")} | found


def _fields() -> tuple[Field, ...]:
    """What all stages add to a record; versions of one sampler share theirs."""
    found = {field.name: field for stage in chain.stages().values() for field in stage.fields}
    return tuple(found.values())


@dataclass(frozen=True)
class _Part:
    """Rows of one chain.

    Attributes:
        mine: bool ``[rows]``; None: all.
        index: int64, indices of its rows, where only they were computed.
        stages: the chain.
        running: those of it that change anything in the step.
        rows: what these were shown.
        found: what it made of the rows.
        greedy: bool ``[rows, 1]`` if some may be greedy.
    """

    mine: Tensor | None
    index: Tensor | None
    stages: tuple[Stage, ...]
    running: tuple[Stage, ...]
    rows: StageRows
    found: chain.Outcome
    greedy: Tensor | None

    @property
    def follows(self) -> bool:
        """Does it keep a number of what is drawn?"""
        return bool(self.found.states)

    def write(self, logits: Tensor, chosen: Tensor) -> None:
        """Overwrite those of its rows that are ``chosen``, bool ``[rows]``, of all logits."""
        log_probabilities = self._log_probabilities().to(logits.dtype)
        if self.index is None:
            chosen = chosen if self.mine is None else chosen & self.mine
            logits.copy_(log_probabilities.where(chosen.unsqueeze(-1), logits))
        else:
            mine = chosen[self.index].unsqueeze(-1)
            logits[self.index] = log_probabilities.where(mine, logits[self.index])

    def _log_probabilities(self) -> Tensor:
        from vllm_entropix.distribution.survivors import most_probable

        probabilities = self.found.probabilities
        if self.greedy is not None:
            probabilities = most_probable(probabilities).to(probabilities.dtype).where(self.greedy, probabilities)
        return probabilities.log()

    def drawn(self, tokens: Tensor) -> Drawn:
        """What the drawn tokens, int64 ``[rows]``, decide."""
        state = None
        for stage in self.running:
            if isinstance(stage, StatefulStage):
                state = chain.moved(
                    stage, self.found.states[stage.name], self.found.followed[stage.name], tokens, self.rows.numbers
                ).squeeze(-1)
        nothing = self.found.probabilities.new_zeros(tokens.shape)
        of_others = {field.name: nothing for stage in self.stages if stage not in self.running for field in stage.fields}
        return Drawn(state, {**of_others, **self.found.told(tokens.unsqueeze(-1))})

    def spread(self, values: Tensor, over: Tensor) -> Tensor:
        """``over``, with ``values`` in the part's rows."""
        if self.index is not None:
            over[self.index] = values.to(over.dtype)
            return over
        if self.mine is None:
            return values.to(over.dtype)
        mine = self.mine.view(-1, *[1] * (values.dim() - 1))
        return values.to(over.dtype).where(mine, over)


class Chained(Sampler):
    """Each row through the chain that its request asks for, or else the server's."""

    name = NAME
    # Its samplers have a section each.
    Settings = Section
    fields: ClassVar[tuple[Field, ...]] = _fields()
    plans_greedy = True
    follows_draws = True

    def __init__(self, server: ServerSettings) -> None:
        self.settings: Any = server
        self._chains: Numbered[tuple[tuple[str, ...], _Breakers | None], tuple[Stage, ...]] = Numbered()
        text = server.sampler if is_chain(server.sampler) else NAME
        self.default = read(text, {}, server)
        # If the server's sampler is a chain, the kernel is compiled when an engine starts, and not while requests wait.
        self._warmed_up = is_chain(server.sampler)
        self._on_demand: OnDemand | None = None
        # Rows without a sequence have it, too.
        self._chains.hold(self._number_of(self.default))

    def started(self, ranks: int) -> None:
        """From now on the first chain of a request has the kernel compiled, and PyTorch runs chains meanwhile."""
        # One rank may have it before another: float32's last bits could then give them different tokens.
        if ranks == 1 and not self._warmed_up:
            from vllm_entropix.kernels.numba_.on_demand import OnDemand

            self._on_demand = OnDemand("vllm_entropix.kernels.numba_.chain", "the kernel of chains", "PyTorch runs them")

    def _has_kernel(self) -> bool:
        return self._warmed_up or (self._on_demand is not None and self._on_demand.ready())

    def _number_of(self, asked: chain.ChainRequest) -> int:
        """A chain's number, under which its rows find it."""
        # The server's own breakers may be thousands, which no request should wait for.
        own = _token_ids(asked.breakers) if asked.own_breakers else None
        return self._chains.number_of((asked.names, own), lambda: chain.make_stages(asked.names, _token_ids(asked.breakers)))

    def begins(self, numbers: Mapping[str, float]) -> None:
        """Its chain is kept."""
        self._chains.hold(int(numbers[NAME]))

    def ends(self, numbers: Mapping[str, float]) -> None:
        """Its chain may be forgotten."""
        self._chains.release(int(numbers[NAME]))

    def numbers(self) -> list[tuple[str, float]]:
        """The chain's number, its samplers' settings, and entropix's constants: those of the server."""
        return list(self._of_request(self.default, {}, None).items())

    def numbers_of_request(self, request: RequestSettings, own: Mapping[str, float]) -> list[float]:
        """The same for a request."""
        return list(self._of_request(request.chain or self.default, own, request).values())

    def _of_request(self, asked: chain.ChainRequest, own: Mapping[str, float], request: Any) -> dict[str, float]:
        said = {name: float(value) for name, value in asked.values.items() if isinstance(value, (int, float))}
        entropix = self.settings.numbers()
        if request is not None and _ENTROPIX in asked.names:
            names = [name for name, _ in entropix]
            entropix = zip(names, request.constants(self.settings, own), strict=True)
        return {
            NAME: float(self._number_of(asked)),
            **_numeric(),
            **said,
            **own,
            **{f"{_ENTROPIX}.{name}": float(value) for name, value in entropix},
        }

    def reads_text(self, numbers: Mapping[str, float]) -> bool:
        """DRY and penalties do."""
        return any(stage.needs_tokens for stage in self._chains[int(numbers[NAME])])

    def described(self, request: RequestSettings) -> SamplerPart:
        """The chain and its settings."""
        asked = request.chain or self.default
        return SamplerPart(name=self.name, samplers=asked.text, **{**asked.values, _BREAKERS: len(asked.breakers)})

    def plan(self, rows: RowView) -> Plan:
        """Each chain that is in the batch, on its rows."""
        import numpy as np

        sequences = rows.sequences
        assert sequences is not None, "an engine says what it knows of the sequences"
        present = np.unique(sequences.host_numbers(NAME)).astype(int).tolist()
        number = rows.settings[NAME]
        alone = sequences.draft_rows == 1 and not _some_greedy(sequences)
        parts: list[_Part | KernelPart] = []
        for one in present:
            mine, index = rows.mine, None
            if len(present) > 1:
                mine = number == one if mine is None else mine & (number == one)
            # A single chain has all rows that the plan is made for, and others may be planned anyhow.
            of_part = mine if len(present) > 1 else None
            stages = self._chains[one]
            running = tuple(stage for stage in stages if not _changes_nothing(stage, sequences.host_numbers))
            if KernelPart.runs(running, rows.backend.name, alone) and self._has_kernel():
                parts.append(KernelPart(stages, running, rows, of_part, _text(running, sequences)))
                continue
            if mine is not None and rows.backend.asks_device:
                # It pays to work on its rows alone, where asking for their indices costs nothing.
                index = mine.nonzero().flatten()
            parts.append(self._part(stages, running, rows, of_part, index))
        parameters = rows.base
        for part in parts:
            told = _told(rows.base, [stage.name for stage in part.stages])
            parameters = told if part.mine is None else told.where(part.mine, parameters)

        def write(logits: Tensor, chosen: Tensor) -> None:
            for part in parts:
                part.write(logits, chosen)

        return Plan(parameters, write=write, after_draw=_after_draw(parts))

    def _part(
        self,
        stages: tuple[Stage, ...],
        running: tuple[Stage, ...],
        rows: RowView,
        mine: Tensor | None,
        index: Tensor | None,
    ) -> _Part:
        sequences = rows.sequences
        assert sequences is not None

        def of(values: Tensor) -> Tensor:
            return values if index is None else values[index]

        settings, logits = rows.settings, of(rows.logits)
        read = {"temperature"}.union(*(stage.Settings.model_fields for stage in running)) & _numeric().keys()
        numbers = {name: of(settings[name]).unsqueeze(-1) for name in sorted(read)}
        tokens = _text(running, sequences)
        tokens = None if tokens is None else of(tokens)
        states = None
        if followed := [stage.name for stage in running if isinstance(stage, StatefulStage)]:
            states = {name: of(sequences.state()).unsqueeze(-1) for name in followed}
        drafts = None
        if sequences.draft_index is not None and sequences.draft_rows > 1:
            drafts = chain.Drafts(of(sequences.draft_index), sequences.draft_rows, of(sequences.input_ids))
        constants = _constants_of_entropix(settings, index) if any(stage.name == _ENTROPIX for stage in running) else None
        shown = StageRows(numbers, tokens, None, constants, self.settings, _measured(rows, index))
        found = chain.outcome(running, logits, shown, states, drafts)
        greedy = numbers["temperature"] < GREEDY_BELOW if _some_greedy(sequences) else None
        return _Part(mine, index, stages, running, shown, found, greedy)


def _some_greedy(sequences: Sequences) -> bool:
    return bool((sequences.host_numbers("temperature") < GREEDY_BELOW).any())


def _changes_nothing(stage: Stage, host_numbers: Callable[[str], np.ndarray]) -> bool:
    """In any row of the step, as the host knows. A temperature is one, whatever else is switched off."""
    return (
        bool(stage.neutral)
        and not isinstance(stage, StatefulStage)  # whose state goes on
        and "temperature" not in stage.Settings.model_fields
        and all(_are_within(host_numbers(name), low, high) for name, low, high in stage.neutral)
    )


def _are_within(values: np.ndarray, low: float, high: float) -> bool:
    return bool(((values >= low) & (values <= high)).all())


def _token_ids(breakers: Iterable[Any]) -> _Breakers:
    """Breakers as token ids, which those of a request are. A text is a default that nobody's chain has needed yet."""
    ids = [one for one in breakers if not isinstance(one, str)]
    return tuple((one,) if isinstance(one, int) else tuple(one) for one in ids)


def _text(stages: Sequence[Stage], sequences: Sequences) -> Tensor | None:
    """The tokens that any row's stages look at; None: they look at none."""
    if sequences.text is None or not any(stage.needs_tokens for stage in stages):
        return None
    return sequences.text(_window(stages, sequences.host_numbers))


def _window(stages: Sequence[Stage], host_numbers: Callable[[str], np.ndarray]) -> int | None:
    """How many of the last tokens any row's stages look at; None: at all."""
    windows = [host_numbers(stage.window) for stage in stages if stage.window is not None]
    if any((one < 0).any() for one in windows):
        return None
    return max((int(one.max()) for one in windows), default=0)


def _constants_of_entropix(settings: Constants, index: Tensor | None) -> Constants:
    from vllm_entropix.distribution.constants import Constants

    prefix = f"{_ENTROPIX}."
    columns = [(name.removeprefix(prefix), column) for name, column in settings.columns.items() if name.startswith(prefix)]
    first, last = columns[0][1], columns[-1][1]  # they stand together
    values = settings.values[:, first : last + 1]
    return Constants(values if index is None else values[index], {name: column - first for name, column in columns})


def _measured(rows: RowView, index: Tensor | None) -> Callable[[Tensor], AttentionStatistics | None]:
    """Attention statistics of the chosen rows."""

    def measure(wanted: Tensor) -> AttentionStatistics | None:
        if index is None:
            return rows.attention(wanted if rows.mine is None else wanted & rows.mine)
        everywhere = wanted.new_zeros(len(rows.logits))
        everywhere[index] = wanted
        found = rows.attention(everywhere)
        return None if found is None else found.select(index)

    return measure


def _told(base: Parameters, names: Sequence[str]) -> Parameters:
    """What a record tells of the draw: a request's own numbers, where the chain has a stage that reads them."""
    import torch

    def one(name: str, value: Tensor, neutral: float) -> Tensor:
        return value if name in names else torch.full_like(value, neutral)

    reads_temperature = any("temperature" in chain.stages()[name].Settings.model_fields for name in names)
    temperature = base.temperature if reads_temperature else torch.ones_like(base.temperature)
    return Parameters(
        temperature.masked_fill(base.temperature < GREEDY_BELOW, 0.0),
        one("top_p", base.top_p, 1.0),
        base.top_k,
        one("min_p", base.min_p, 0.0),
        base.samples,
    )


def _after_draw(parts: Sequence[_Part | KernelPart]) -> Callable[[Tensor], Drawn] | None:
    """What the drawn tokens decide in all parts; None if they decide nothing."""
    followed = any(part.follows for part in parts)
    fields = {field.name for part in parts for stage in part.stages for field in stage.fields}
    if not followed and not fields:
        return None

    def after(tokens: Tensor) -> Drawn:
        import torch

        nothing = torch.full(tokens.shape, torch.nan, dtype=torch.float64, device=tokens.device)
        state, told = nothing.clone(), {name: nothing.clone() for name in sorted(fields)}
        for part in parts:
            drawn = part.drawn(tokens if part.index is None else tokens[part.index])
            if drawn.state is not None:
                state = part.spread(drawn.state, state)
            for name, values in drawn.fields.items():
                told[name] = part.spread(values, told[name])
        return Drawn(state if followed else None, told)

    return after
