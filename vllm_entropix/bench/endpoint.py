"""Asking an OpenAI endpoint, and serving a model where there is none."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_entropix.bench.study import REQUEST_PARAMETERS, ModelSettings, Value
from vllm_entropix.client import trace_of
from vllm_entropix.records.schema import ChoiceTrace
from vllm_entropix.samplers.entropix import calibrations
from vllm_entropix.samplers.entropix.settings import DEFAULT_PRESET
from vllm_entropix.settings.errors import ConfigError, cut, quoted

if TYPE_CHECKING:
    import openai

_STANDARD = ("temperature", "top_p", "frequency_penalty", "presence_penalty")  # what the client's methods have arguments for
_SERVE = (str(Path(sys.executable).with_name("vllm")), "serve")
_PDEATHSIG = 1  # PR_SET_PDEATHSIG of linux/prctl.h
_PRCTL = getattr(ctypes.CDLL(None), "prctl", None)
START_SECONDS = 900
_CONTINUED = "Question: {question}\nAnswer:"
_NEXT = "\nQuestion:"


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back.

    Attributes:
        text: of the model.
        finish_reason: as the endpoint says it.
        tokens: of the text.
        signals: numbers of the whole answer; none from an endpoint that measures nothing.
    """

    text: str
    finish_reason: str
    tokens: int
    signals: dict[str, float]


class Endpoint:
    """A model at an OpenAI endpoint.

    Args:
        name: of the model in the study, for messages.
        settings: of the model.
        url: base URL.
        timeout_seconds: of an answer.

    Raises:
        ConfigError: the endpoint doesn't answer, or hasn't this model.
    """

    def __init__(self, name: str, settings: ModelSettings, url: str, timeout_seconds: float) -> None:
        try:
            import openai
        except ImportError:
            raise ConfigError("asking an endpoint needs the package openai; pip install vllm-entropix[bench]") from None
        self._name, self._settings, self._url = name, settings, url
        key = os.environ.get(settings.api_key_variable, "none")
        self._client = openai.OpenAI(base_url=url, api_key=key, max_retries=2, timeout=timeout_seconds)
        with self._one_sentence():
            served = [model.id for model in self._client.models.list()]
        if not served or (settings.served_name is not None and settings.served_name not in served):
            raise ConfigError(
                f"models.{name}.served_name is {settings.served_name!r}, but {url} has {', '.join(served) or 'no model'}"
            )
        self._served = settings.served_name or served[0]

    def ask(self, question: str, parameters: Mapping[str, Value], sampler: str, tokens: int, seed: int, traced: bool) -> Reply:
        """An answer.

        Args:
            question: what is asked.
            parameters: of the request and of the sampler.
            sampler: vllm, or a sampler of ours.
            tokens: of the answer at most.
            seed: of the draws.
            traced: also tell the mean temperature.

        Raises:
            ConfigError: the endpoint refuses, or doesn't answer.
        """
        arguments: dict[str, Any] = {name: parameters[name] for name in _STANDARD if name in parameters}
        body: dict[str, Any] = {
            name: value for name, value in parameters.items() if name in REQUEST_PARAMETERS and name not in _STANDARD
        }
        if self._settings.plugin:
            own = {name: value for name, value in parameters.items() if name not in REQUEST_PARAMETERS}
            body["vllm_xargs"] = {**_asked(sampler, traced), **own}
        arguments |= {"model": self._served, "max_tokens": tokens, "seed": seed, "extra_body": body}
        measured_by_logprobs = not self._settings.plugin
        with self._one_sentence():
            if self._settings.chat:
                messages: Any = [{"role": "user", "content": question}]
                extra: dict[str, Any] = {"logprobs": True} if measured_by_logprobs else {}
                answer: Any = self._client.chat.completions.create(messages=messages, **extra, **arguments)
                choice = answer.choices[0]
                text = choice.message.content or ""
                told = [one.logprob for one in choice.logprobs.content or []] if choice.logprobs else []
            else:
                extra = {"logprobs": 0} if measured_by_logprobs else {}
                prompt = _CONTINUED.format(question=question)
                answer = self._client.completions.create(prompt=prompt, stop=[_NEXT], **extra, **arguments)
                choice = answer.choices[0]
                text = choice.text
                told = [one for one in choice.logprobs.token_logprobs or [] if one is not None] if choice.logprobs else []
        trace = trace_of(choice)
        signals = _signals(trace) if trace is not None else _of_logprobs(told)
        used = answer.usage.completion_tokens if answer.usage is not None else len(told)
        return Reply(text, choice.finish_reason or "", used, signals)

    @contextlib.contextmanager
    def _one_sentence(self) -> Iterator[None]:
        import openai

        try:
            yield
        except openai.APITimeoutError:
            raise ConfigError(
                f"models.{self._name}: {self._url} gave no answer in time; raise timeout_seconds or lower concurrency, "
                "and the same command goes on from here"
            ) from None
        except openai.APIConnectionError as error:
            reason = cut(str(error.__cause__ or error))
            raise ConfigError(
                f"models.{self._name}: {self._url} doesn't answer ({reason}); start it, and the same command goes on from here"
            ) from None
        except openai.APIStatusError as error:
            told = cut(_message(error), 300)
            if "chat template" in told and self._settings.chat:
                raise ConfigError(f"models.{self._name} has no chat template; set models.{self._name}.chat = false") from None
            raise ConfigError(f"models.{self._name}: {self._url} refuses with status {error.status_code}: {told}") from None


def _asked(sampler: str, traced: bool) -> dict[str, str]:
    """What a request tells a server with this plugin: which sampler, and what to measure."""
    return {"samplers": sampler, "entropix_scores": "on", **({"entropix_trace": "on"} if traced else {})}


def _message(error: openai.APIStatusError) -> str:
    body = error.body
    return str(body["message"]) if isinstance(body, dict) and "message" in body else error.message


def _signals(trace: ChoiceTrace) -> dict[str, float]:
    """Scores of the answer, and the mean temperature of its tokens that aren't argmax, if it was traced."""
    scores = getattr(trace, "scores", None)
    told = {} if scores is None else scores.model_dump()
    found = {name: float(value) for name, value in told.items() if isinstance(value, (int, float)) and name != "tokens"}
    warm = [entry.temperature for entry in trace.tokens if not entry.forced and entry.temperature]
    if warm:
        found["temperature_mean"] = math.fsum(warm) / len(warm)
    if trace.forks is not None:
        found["forks"] = float(len({(branch.parent, branch.position) for branch in trace.forks if branch.parent is not None}))
    if trace.tokens:
        found["share_argmax"] = sum(entry.temperature == 0 for entry in trace.tokens) / len(trace.tokens)
    return found


def _of_logprobs(logprobs: list[float]) -> dict[str, float]:
    finite = [one for one in logprobs if math.isfinite(one)]
    return {"perplexity": math.exp(-math.fsum(finite) / len(finite))} if finite else {}


@contextlib.contextmanager
def served(name: str, settings: ModelSettings, sampler_config: Mapping[str, Any], log: Path) -> Iterator[str]:
    """Serve a model on a port of the loopback, for as long as this is open; gives the base URL.

    Args:
        name: of the model in the study, for messages.
        settings: of the model.
        sampler_config: settings of the sampler.
        log: file for what the server says.

    Raises:
        ConfigError: the server ends before it answers.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    assert settings.path is not None
    path = str(Path(settings.path).expanduser()) if settings.path.startswith("~") else settings.path
    if path.startswith(("/", ".")) and not Path(path).exists():
        raise ConfigError(f"models.{name}.path is {quoted(path)}, which isn't there; give a model's folder, or a hub's name")
    command = [*_SERVE, path, "--host", "127.0.0.1", "--port", str(port)]
    quiet = ["--uvicorn-log-level", "warning"]  # or the log has a line per answer
    # Without a preset it would run with the calibration that the user happens to keep of this model.
    config = dict(sampler_config) if "thresholds" in sampler_config else {"preset": DEFAULT_PRESET, **sampler_config}
    sampler = ["--sampler", "entropix", "--sampler-config", json.dumps(config)]
    environment = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", **os.environ}
    # Those that the study makes, so that they lie beside its answers.
    environment[calibrations.FOLDER] = str(log.resolve().parent / "calibrations")
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*command, *quiet, *sampler, *settings.arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
    try:
        _wait(name, process, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        if process.poll() is None:
            # Not SIGINT, which a process ignores that a shell runs in the background, and so do those that it starts.
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _end_with_parent() -> None:
    """Have the kernel end this process when its parent is killed, which ends nothing in order. Linux alone can."""
    if _PRCTL is not None:
        _PRCTL(_PDEATHSIG, signal.SIGTERM)


def _wait(name: str, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ConfigError(f"models.{name} can't be served: vLLM ended with status {process.returncode}; {log} says why")
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=2).close()
            return
        time.sleep(0.5)
    raise ConfigError(f"models.{name} can't be served: no answer within {START_SECONDS} s; {log} says more")
