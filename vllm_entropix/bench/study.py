"""The study file: which models, tasks and samplers, which ranges, which splits. It is written before any answer is seen."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, ValidationError, field_validator, model_validator

from vllm_entropix.bench.tasks import KINDS, Item, Task
from vllm_entropix.samplers import chained, registry
from vllm_entropix.samplers.entropix.calibrations import without_auto
from vllm_entropix.settings.errors import ConfigError, quoted
from vllm_entropix.settings.load import read_mapping
from vllm_entropix.settings.section import Section, describe

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=64)]
Value = float | int | str
Phase = Literal["tuning", "test"]

# The endpoint's own draw, which needs nothing of ours.
PLAIN = "vllm"

# What every OpenAI endpoint takes, and vLLM's: (smallest, largest, whole number).
REQUEST_PARAMETERS: dict[str, tuple[float, float, bool]] = {
    "temperature": (0, 10, False),
    "top_p": (1e-6, 1, False),
    "top_k": (-1, 1_000_000, True),
    "min_p": (0, 1, False),
    "frequency_penalty": (-2, 2, False),
    "presence_penalty": (-2, 2, False),
    "repetition_penalty": (1e-6, 10, False),
}
# Significant digits of a drawn value: what is written is what was run.
_DIGITS = 4


class Range(Section):
    """Where a parameter's random values come from.

    ``[0.2, 1.5]`` stands for ``{low = 0.2, high = 1.5}``.
    """

    low: float | None = Field(None, allow_inf_nan=False, description="Smallest value.")
    high: float | None = Field(None, allow_inf_nan=False, description="Largest value.")
    scale: Literal["linear", "log"] = Field("linear", description="What is uniform: the value, or its logarithm.")
    choices: tuple[Value, ...] | None = Field(None, min_length=1, description="These values, each as likely, instead.")
    integer: bool = Field(False, description="Round to whole numbers.")

    @model_validator(mode="before")
    @classmethod
    def _pair(cls, data: Any) -> Any:
        if isinstance(data, (list, tuple)):
            if len(data) != 2:
                raise ValueError("it should be [low, high], or a table with low and high or with choices")
            return {"low": data[0], "high": data[1]}
        return data

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.choices is not None:
            if self.low is not None or self.high is not None:
                raise ValueError("it should have choices, or low and high, not both")
            return self
        if self.low is None or self.high is None:
            raise ValueError("it should have low and high, or choices")
        if self.low >= self.high:
            raise ValueError("low should be below high")
        if self.scale == "log" and self.low <= 0:
            raise ValueError("low should be above 0 on a logarithmic scale")
        return self

    @property
    def extremes(self) -> tuple[Value, ...]:
        """The values that must be allowed, for all to be."""
        if self.choices is not None:
            return self.choices
        assert self.low is not None
        assert self.high is not None
        return tuple(int(value) if self.integer else value for value in (self.low, self.high))

    def draw(self, rng: random.Random) -> Value:
        """A random value."""
        if self.choices is not None:
            return rng.choice(self.choices)
        assert self.low is not None
        assert self.high is not None
        if self.scale == "log":
            value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = rng.uniform(self.low, self.high)
        value = float(f"{min(max(value, self.low), self.high):.{_DIGITS}g}")
        return round(value) if self.integer else min(max(value, self.low), self.high)


class ModelSettings(Section):
    """A model: a folder or a hub's name, which is served for the study, or an endpoint that is there."""

    path: str | None = Field(None, min_length=1, description="Folder or hub name; the study serves it itself.")
    endpoint: str | None = Field(
        None, pattern=r"^https?://", description="Base URL of an OpenAI server, as in http://127.0.0.1:8000/v1."
    )
    served_name: str | None = Field(None, min_length=1, description="Its name there; unset: the first that it lists.")
    api_key_variable: str = Field("OPENAI_API_KEY", description="Environment variable with the endpoint's key.")
    chat: bool = Field(True, description="Ask by the chat template; off: continue a text.")
    plugin: bool = Field(True, description="Does the endpoint run vllm-entropix? Off: plain parameters alone, no signals.")
    arguments: tuple[str, ...] = Field((), description="Further arguments of `vllm serve`, for a path.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.endpoint is None):
            raise ValueError("it should have a path, which is served, or an endpoint, and not both")
        return self


class TaskSettings(Section):
    """A task and the sizes of its splits."""

    kind: str = Field(description="Which task.")
    tuning: int = Field(ge=0, le=100_000, description="Items that configurations are chosen on.")
    test: int = Field(ge=0, le=100_000, description="Other items, which the chosen ones run on once.")
    max_tokens: int | None = Field(None, ge=1, le=1_000_000, description="Of an answer; unset: the task's own.")
    options: dict[str, Any] = Field(default_factory=dict, description="The task's own.")

    @field_validator("kind")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in KINDS:
            raise ValueError(f"there are {', '.join(KINDS)}")
        return value

    @model_validator(mode="after")
    def _options_of_kind(self) -> Self:
        self.task()
        return self

    def task(self) -> Task[Any]:
        """The task with its options; ValueError if these don't fit."""
        kind = KINDS[self.kind]
        try:
            return kind(kind.Options.model_validate(self.options))
        except ValidationError as error:
            raise ValueError(f"of the options of {self.kind}: {describe(error, kind.Options)}") from None

    @property
    def answer_tokens(self) -> int:
        """Tokens of an answer at most."""
        return self.max_tokens or KINDS[self.kind].max_tokens


class SamplerSettings(Section):
    """One arm: a sampler, what is fixed of it, and the ranges of the rest."""

    sampler: str = Field(PLAIN, description="vllm, for the endpoint's own, or a sampler or chain of `vllm-entropix samplers`.")
    fixed: dict[str, Value] = Field(default_factory=dict, description="Parameters of every configuration.")
    ranges: dict[str, Range] = Field(default_factory=dict, description="Parameters that are drawn for each configuration.")
    server: dict[str, Any] = Field(
        default_factory=dict, description="Sampler settings that the server is started with; for models with a path alone."
    )
    as_tuned: str | None = Field(
        None, description="Take the configuration that was chosen for this other arm: a control, which isn't tuned itself."
    )
    with_shares: bool = Field(
        False,
        description="Beside as_tuned: give the shares of regimes among the other arm's tokens, for what is by chance.",
    )
    models: tuple[str, ...] = Field((), description="Models that it runs on; unset: all.")
    mean_temperature_of: str | None = Field(
        None, description="Take the mean temperature of this other arm's tokens that aren't argmax, and its top_p and min_p."
    )
    draws: int | None = Field(None, ge=1, le=1000, description="Answers to each item of the test split; unset: the study's.")
    majority_of: str | None = Field(
        None, description="Ask for nothing: each draw is the answer that most of some draws of this other arm gave."
    )
    votes: int | None = Field(None, ge=2, le=1000, description="Beside majority_of: draws that vote on each.")
    as_many_forks_as: str | None = Field(
        None,
        description="Choose the configuration whose answers fork as often as those of this other arm, and not the best one.",
    )

    @field_validator("sampler")
    @classmethod
    def _known(cls, value: str) -> str:
        return registry.check(value, (PLAIN,))

    @model_validator(mode="after")
    def _parameters_exist(self) -> Self:
        given = [name for name in ("ranges", "as_tuned", "mean_temperature_of") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"it has {given[0]} and {given[1]}; leave one of them out")
        if (self.majority_of is None) != (self.votes is None):
            raise ValueError("it should have both majority_of and votes, or neither")
        if self.majority_of is not None:
            said = [
                name
                for name, field in type(self).model_fields.items()
                if name not in ("majority_of", "votes") and getattr(self, name) != field.get_default(call_default_factory=True)
            ]
            if said:
                raise ValueError(f"it asks for nothing, as it has majority_of, so {said[0]} says nothing; leave it out")
        if self.as_many_forks_as is not None and not self.ranges:
            raise ValueError("it has as_many_forks_as without ranges, so there is nothing to choose; give it some")
        if self.with_shares and not self.as_tuned:
            raise ValueError("it has with_shares without as_tuned, so there is nobody to have them of; name the other arm")
        server = registry.load_server(without_auto(self.server))
        if self.with_shares and not server.experiments.constants:
            raise ValueError("it has with_shares, which a server takes only with experiments.constants; set it in server")
        if both := sorted(self.fixed.keys() & self.ranges.keys()):
            raise ValueError(f"{both[0]} is both fixed and drawn; leave one of them out")
        for name, value in self.fixed.items():
            self._check(f"fixed.{name}", name, value)
        for name, values in self.ranges.items():
            for value in values.extremes:
                self._check(f"ranges.{name}", name, value)
        return self

    @property
    def control_of(self) -> str | None:
        """The arm whose chosen configuration it follows; None if it is tuned itself, or has nothing to tune."""
        return self.as_tuned or self.mean_temperature_of

    @property
    def is_greedy(self) -> bool:
        """Are all draws of an item the same?"""
        return self.sampler == PLAIN and self.fixed.get("temperature") == 0

    def _check(self, key: str, name: str, value: Value) -> None:
        if name in REQUEST_PARAMETERS:
            low, high, whole = REQUEST_PARAMETERS[name]
            if isinstance(value, str) or not low <= value <= high or (whole and value != int(value)):
                kind = "a whole number" if whole else "a number"
                raise ValueError(f"its {key}, which is {quoted(value)}, should be {kind} from {low:g} to {high:g}")
            return
        own = {*registry.request_settings().names(), *chained.request_names()}
        if self.sampler == PLAIN or name not in own:
            more = "" if self.sampler == PLAIN else ", and what `vllm-entropix samplers` lists for it"
            raise ValueError(f"its {key} is no parameter of {self.sampler}; there are {', '.join(REQUEST_PARAMETERS)}{more}")
        try:
            registry.parse_request({"samplers": self.sampler, name: value}, registry.load_server(without_auto(self.server)))
        except ConfigError as error:
            raise ValueError(f"of its {key}, {error}") from None


@dataclass(frozen=True, slots=True)
class Split:
    """A task's items, each in one split.

    Attributes:
        tuning: what configurations are chosen on.
        test: what the chosen ones are judged on.
    """

    tuning: list[Item]
    test: list[Item]

    def of(self, phase: Phase) -> list[Item]:
        """The items of a phase."""
        return self.tuning if phase == "tuning" else self.test


class Study(Section):
    """A study, as its file says."""

    name: str = Field(min_length=1, max_length=200, description="Shown in the report.")
    seed: int = Field(0, ge=0, lt=2**31, description="Of items, configurations, draws and resamples.")
    configurations: int = Field(24, ge=1, le=10_000, description="Random ones of every sampler that has ranges.")
    draws: int = Field(5, ge=1, le=1000, description="Answers to each item of the test split, each with a seed of its own.")
    resamples: int = Field(10_000, ge=100, le=1_000_000, description="Of the bootstrap and of the tests.")
    concurrency: int = Field(32, ge=1, le=4096, description="Answers that are asked for at a time.")
    timeout_seconds: float = Field(600, gt=0, le=86_400, description="That one answer may take.")
    models: dict[Name, ModelSettings] = Field(min_length=1, description="By name.")
    tasks: dict[Name, TaskSettings] = Field(min_length=1, description="By name.")
    samplers: dict[Name, SamplerSettings] = Field(min_length=1, description="By name.")
    against: tuple[str, ...] = Field((), description="Samplers that each other one is compared with; unset: the first one.")
    ladder: tuple[str, ...] = Field(
        (),
        description="Samplers that buy accuracy with tokens, the cheapest first: each other one is compared with the mixture "
        "of two neighbours that generates as many tokens as it does, too.",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for name in self.against:
            if name not in self.samplers:
                raise ValueError(f"against names {quoted(name)}; there are {', '.join(self.samplers)}")
        for name in self.ladder:
            if name not in self.samplers:
                raise ValueError(f"ladder names {quoted(name)}; there are {', '.join(self.samplers)}")
        if len(self.ladder) == 1:
            raise ValueError("ladder has one sampler, and a mixture takes two; name another, or none")
        asking = [name for name, arm in self.samplers.items() if arm.majority_of is None]
        forking = [name for name in asking if self.samplers[name].control_of is self.samplers[name].as_many_forks_as is None]
        for name, arm in self.samplers.items():
            for key, others in (("majority_of", asking), ("as_many_forks_as", forking)):
                other = getattr(arm, key)
                if other is not None and other not in others:
                    raise ValueError(f"samplers.{name}.{key} is {quoted(other)}, but it should be one of {', '.join(others)}")
            if arm.votes is not None and arm.votes > self._votes_at_most(arm):
                raise ValueError(
                    f"samplers.{name}.votes is {arm.votes}, but for each of {self.draws} draws there are "
                    f"{self._votes_at_most(arm)} of {arm.majority_of}; give that one draws = {self.draws * arm.votes}"
                )
        for name, arm in self.samplers.items():
            if arm.control_of is not None:
                tuned = [one for one, settings in self.samplers.items() if settings.control_of is None]
                key = "as_tuned" if arm.as_tuned else "mean_temperature_of"
                if arm.control_of not in tuned:
                    raise ValueError(
                        f"samplers.{name}.{key} is {quoted(arm.control_of)}, but it should be one of {', '.join(tuned)}"
                    )
        for name, arm in self.samplers.items():
            for model_name in arm.models:
                if model_name not in self.models:
                    raise ValueError(f"samplers.{name}.models names {quoted(model_name)}; there are {', '.join(self.models)}")
                if arm.control_of is not None and not self.runs(arm.control_of, model_name):
                    raise ValueError(
                        f"samplers.{name} follows {arm.control_of}, which doesn't run on {model_name}; leave that out, too"
                    )
            if not arm.models and arm.control_of is not None and self.samplers[arm.control_of].models:
                raise ValueError(f"samplers.{name} follows {arm.control_of}, which has models; give it the same")
        for name in self.compared_with:
            if self.samplers[name].models:
                raise ValueError(
                    f"samplers.{name} is one that others are compared with, so it runs on all; leave its models out"
                )
        for name, model in self.models.items():
            for arm_name, arm in self.samplers.items():
                if not self.runs(arm_name, name):
                    continue
                if model.endpoint is not None and arm.server:
                    raise ValueError(
                        f"samplers.{arm_name}.server needs a server of its own, but models.{name} is an endpoint; "
                        "give it a path"
                    )
                if not model.plugin and arm.sampler != PLAIN:
                    raise ValueError(
                        f"samplers.{arm_name} is {arm.sampler}, which models.{name} can't run with plugin = false; leave it out"
                    )
        if any(arm.ranges for arm in self.samplers.values()) and not any(
            task.tuning and KINDS[task.kind].rule for task in self.tasks.values()
        ):
            raise ValueError("samplers have ranges, but no task with right answers has a tuning split; give one of them items")
        return self

    @classmethod
    def load(cls, path: Path) -> Study:
        """A study from its file; ConfigError with one sentence for the first thing wrong."""
        data = read_mapping(path, "study")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(f"{path}: {describe(error, cls)}") from None

    @property
    def compared_with(self) -> tuple[str, ...]:
        """Samplers that each other one is compared with."""
        return self.against or (next(iter(self.samplers)),)

    def _votes_at_most(self, arm: SamplerSettings) -> int:
        """Draws of the other arm for each draw of one that votes."""
        assert arm.majority_of is not None
        return self.draws_of(arm.majority_of, "test") // self.draws

    def votes_of(self, sampler: str) -> list[range]:
        """Which draws of the other arm vote on each draw of one that has ``majority_of``; none of another."""
        arm = self.samplers[sampler]
        if arm.votes is None:
            return []
        each = self._votes_at_most(arm)
        return [range(each * draw, each * draw + arm.votes) for draw in range(self.draws)]

    def runs(self, sampler: str, model: str) -> bool:
        """Does a sampler run on a model?"""
        named = self.samplers[sampler].models
        return not named or model in named

    def fingerprint(self) -> str:
        """Changes with whatever changes an answer or which answers are asked for; not with how fast they come."""
        without = {"concurrency", "timeout_seconds", "resamples", "against", "ladder", "name"}
        data = self.model_dump(mode="json", exclude=without)
        for model in data["models"].values():
            for name in ("endpoint", "api_key_variable", "arguments"):  # the same model may have moved
                del model[name]
        for arm in data["samplers"].values():
            for name in ("draws", "majority_of", "votes", "as_many_forks_as"):  # a study without them is an older one's
                if arm[name] is None:
                    del arm[name]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]

    def split(self, name: str) -> Split:
        """The items of a task; ConfigError if there aren't enough."""
        settings = self.tasks[name]
        try:
            items = settings.task().items(settings.tuning + settings.test, f"{self.seed}/{name}")
        except ConfigError as error:
            raise ConfigError(f"tasks.{name}: {error}") from None
        return Split(items[: settings.tuning], items[settings.tuning :])

    def parameters(self, sampler: str) -> list[dict[str, Value]]:
        """The configurations of a sampler: random ones of its ranges, or the only one there is.

        They depend on the study's seed and the sampler's own name and ranges: another sampler in the file changes nothing.
        """
        arm = self.samplers[sampler]
        if not arm.ranges:
            return [dict(arm.fixed)]
        found = []
        for index in range(self.configurations):
            drawn = {
                name: values.draw(random.Random(f"{self.seed}/{sampler}/{index}/{name}")) for name, values in arm.ranges.items()
            }
            found.append({**arm.fixed, **drawn})
        return found

    def draws_of(self, sampler: str, phase: Phase) -> int:
        """Answers to each item: one where configurations are compared, and of a sampler whose draws are all the same."""
        arm = self.samplers[sampler]
        return 1 if phase == "tuning" or arm.is_greedy else arm.draws or self.draws

    def is_traced(self, sampler: str, phase: Phase) -> bool:
        """Are temperatures wanted of each token?"""
        if any(arm.mean_temperature_of == sampler for arm in self.samplers.values()):
            return True
        return phase == "test" and self.samplers[sampler].sampler != PLAIN

    def draw_seed(self, task: str, item: str, draw: int) -> int:
        """The seed of a request: the same for all samplers, so that they meet the same luck where they can."""
        digest = hashlib.sha256(f"{self.seed}/{task}/{item}/{draw}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1

    def is_scored(self, task: str) -> bool:
        """Has the task right answers?"""
        return bool(KINDS[self.tasks[task].kind].rule)

    def servers(self) -> Iterator[tuple[Mapping[str, Any], list[str]]]:
        """(settings of a server, samplers that need it), those of the most common settings first."""
        groups: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
        for name, arm in self.samplers.items():
            if arm.majority_of is not None:
                continue
            groups.setdefault(json.dumps(arm.server, sort_keys=True), (arm.server, []))[1].append(name)
        yield from sorted(groups.values(), key=lambda group: -len(group[1]))
