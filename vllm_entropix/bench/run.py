"""Running a study: first the tuning split, then what was chosen on the test split, each answer once."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vllm_entropix.bench.answers import Answer, Key, Store
from vllm_entropix.bench.choose import Chosen, choose
from vllm_entropix.bench.endpoint import Endpoint, Reply, served
from vllm_entropix.bench.grading import Grader
from vllm_entropix.bench.study import ModelSettings, Phase, Split, Study, Value
from vllm_entropix.bench.tasks import Item
from vllm_entropix.settings.errors import ConfigError, cut, quoted

CHOSEN, SERVER_LOG = "chosen.json", "server.log"


@dataclass(frozen=True, slots=True)
class Only:
    """What of a study is run; None each: all."""

    model: str | None = None
    sampler: str | None = None
    task: str | None = None

    def check(self, study: Study) -> None:
        """ConfigError if the study has no such thing."""
        there: Mapping[str, Mapping[str, Any]] = {"model": study.models, "sampler": study.samplers, "task": study.tasks}
        for kind, names in there.items():
            name = getattr(self, kind)
            if name is not None and name not in names:
                raise ConfigError(f"the study has no {kind} {quoted(name)}; there are {', '.join(names)}")
        other = None if self.sampler is None else study.samplers[self.sampler].majority_of
        if other is not None:
            raise ConfigError(f"the sampler {self.sampler} is a majority of {other}'s answers and asks for none; name that one")


@dataclass(frozen=True, slots=True)
class _Job:
    """An answer to ask for."""

    key: Key
    item: Item
    parameters: dict[str, Value]


def run(
    study: Study,
    folder: Path,
    console: Console,
    only: Only | None = None,
    chosen: Mapping[str, Mapping[str, Chosen]] | None = None,
) -> int:
    """Ask for every answer that isn't there, and write it; gives the number of answers that are there in the end.

    Args:
        study: to run.
        folder: of the results.
        console: that the progress is shown on.
        only: a part of the study.
        chosen: model → sampler → configuration for the test split, which leaves out the tuning split.

    Raises:
        ConfigError: something that the user can mend. What was answered stays, and the same call goes on from there.
    """
    only = only or Only()
    only.check(study)
    splits = {name: study.split(name) for name in study.tasks if only.task in (None, name)}
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    tasks = {name: study.tasks[name].task() for name in splits}
    with ExitStack() as opened:
        store = opened.enter_context(Store(folder, study))
        grader = opened.enter_context(Grader(tasks))
        servers = opened.enter_context(_Servers(folder / SERVER_LOG))
        progress = opened.enter_context(Progress(*columns, console=console))
        runner = _Runner(study, folder, splits, store, grader, servers, progress, only)
        for model in study.models:
            if only.model in (None, model):
                runner.run(model, None if chosen is None else chosen.get(model, {}))
        return len(store.known)


def read_chosen(path: Path) -> dict[str, dict[str, Chosen]]:
    """Chosen configurations, as a run wrote them; ConfigError if that isn't what the file holds."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {model: {sampler: Chosen(**one) for sampler, one in arms.items()} for model, arms in data.items()}
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} has no chosen configurations ({cut(str(error))}); give the {CHOSEN} of a study") from None


class _Servers:
    """The one server that a study has up: kept while the same is wanted, and ended before another is started.

    Args:
        log: file for what servers say.
    """

    def __init__(self, log: Path) -> None:
        self._log, self._opened = log, ExitStack()
        self._model: str | None = None
        self.config: Mapping[str, Any] = {}
        self._url = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def url(self, model: str, settings: ModelSettings, config: Mapping[str, Any]) -> str:
        """Base URL of a server of this model with these settings of the sampler."""
        if (model, config) != (self._model, self.config):
            self._opened.close()
            self._model = None  # until the next is up
            self._url = self._opened.enter_context(served(model, settings, config, self._log))
            self._model, self.config = model, config
        return self._url


class _Runner:
    def __init__(
        self,
        study: Study,
        folder: Path,
        splits: Mapping[str, Split],
        store: Store,
        grader: Grader,
        servers: _Servers,
        progress: Progress,
        only: Only,
    ) -> None:
        self._study, self._folder, self._splits = study, folder, splits
        self._store, self._grader, self._servers, self._progress, self._only = store, grader, servers, progress, only

    def run(self, model: str, given: Mapping[str, Chosen] | None) -> None:
        """Both phases of a model."""
        if given is None:
            wanted = {
                name: dict(enumerate(self._study.parameters(name)))
                for name, arm in self._study.samplers.items()
                if arm.control_of is arm.majority_of is None and self._is_wanted(name) and self._study.runs(name, model)
            }
            self._phase(model, "tuning", wanted)
            tuning = (answer for answer in self._store.known.values() if (answer.model, answer.phase) == (model, "tuning"))
            given = choose(self._study, tuning)
            self._write_chosen(model, given)
        wanted = {
            name: {given[name].configuration: given[name].parameters}
            for name in self._study.samplers
            if name in given and self._only.sampler in (None, name) and self._study.runs(name, model)
        }
        self._phase(model, "test", wanted)

    def _is_wanted(self, sampler: str) -> bool:
        """Is a sampler's tuning needed, for itself or for a control?"""
        name = self._only.sampler
        if name is None:
            return True
        arm = self._study.samplers[name]
        return sampler in (name, arm.control_of, arm.as_many_forks_as)

    def _write_chosen(self, model: str, chosen: Mapping[str, Chosen]) -> None:
        path = self._folder / CHOSEN
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        known[model] = {name: asdict(one) for name, one in chosen.items()}
        path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")

    def _phase(self, model: str, phase: Phase, wanted: Mapping[str, Mapping[int, dict[str, Value]]]) -> None:
        """Ask for what is missing, with a server of the right settings for each group of samplers."""
        # Beginning with those that the server is up for.
        for sampler_config, names in sorted(self._study.servers(), key=lambda group: group[0] != self._servers.config):
            jobs = [job for name in names if name in wanted for job in self._jobs(model, phase, name, wanted[name])]
            missing = [job for job in jobs if job.key not in self._store.known]
            shown = f"{model} {phase}" + (f", server for {', '.join(names)}" if sampler_config else "")
            bar = self._progress.add_task(cut(shown, 60), total=len(jobs), completed=len(jobs) - len(missing))
            if not missing:
                continue
            settings = self._study.models[model]
            url = settings.endpoint or self._servers.url(model, settings, sampler_config)
            endpoint = Endpoint(model, settings, url, self._study.timeout_seconds)
            for answer in self._answers(endpoint, missing):
                self._store.add(answer)
                self._progress.advance(bar)

    def _jobs(self, model: str, phase: Phase, sampler: str, parameters: Mapping[int, dict[str, Value]]) -> Iterator[_Job]:
        for configuration, values in parameters.items():
            for task, split in self._splits.items():
                for item in split.of(phase):
                    for draw in range(self._study.draws_of(sampler, phase)):
                        yield _Job(Key(model, phase, sampler, configuration, task, item.id, draw), item, values)

    def _answers(self, endpoint: Endpoint, jobs: list[_Job]) -> Iterator[Answer]:
        """Answers as they come, so many asked for at a time as the study says."""
        pool = ThreadPoolExecutor(self._study.concurrency)
        asked: dict[Future[tuple[Reply, float]], _Job] = {}
        left = iter(jobs)
        try:
            while True:
                for job in left:
                    asked[pool.submit(self._ask, endpoint, job)] = job
                    if len(asked) >= self._study.concurrency:
                        break
                if not asked:
                    return
                done, _ = wait(asked, return_when=FIRST_COMPLETED)
                for future in done:
                    yield self._judged(asked.pop(future), *future.result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, endpoint: Endpoint, job: _Job) -> tuple[Reply, float]:
        key = job.key
        start = time.perf_counter()
        reply = endpoint.ask(
            job.item.question,
            job.parameters,
            self._study.samplers[key.sampler].sampler,
            self._study.tasks[key.task].answer_tokens,
            self._study.draw_seed(key.task, key.item, key.draw),
            self._study.is_traced(key.sampler, key.phase),
        )
        return reply, time.perf_counter() - start

    def _judged(self, job: _Job, reply: Reply, seconds: float) -> Answer:
        graded = self._grader.grade(job.key.task, job.item, reply.text)
        return Answer(
            **job.key._asdict(),
            seed=self._study.draw_seed(job.key.task, job.key.item, job.key.draw),
            parameters=job.parameters,
            text=reply.text,
            finish_reason=reply.finish_reason,
            tokens=reply.tokens,
            answer=graded.answer,
            correct=graded.correct,
            note=graded.note,
            signals=reply.signals,
            seconds=round(seconds, 3),
        )
