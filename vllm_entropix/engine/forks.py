"""Answers that fork, made of ordinary requests: a branch is a request whose prompt is what it shares with its parent.

To the engine a branch is a new request whose prompt is the root's prompt, the answer so far and the token that it parts with;
the prefix cache holds all of it but the last block. To the frontend it is a request of the root's prompt that has this answer
already, so that its text, its stop strings, its trace and its output are those of the whole answer. All branches have the
root's external id, by which an abort ends them together.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import weakref
from collections.abc import Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any

import numpy as np
from vllm.logger import init_logger
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import FinishReason

from vllm_entropix.engine import frontend
from vllm_entropix.engine.admission import RequestSettingsError
from vllm_entropix.engine.decided import DecidedStream
from vllm_entropix.engine.forkable import BRANCH, how_to_fork
from vllm_entropix.engine.resolved import resolved_values
from vllm_entropix.forks.choice import Contender, chooser, scores_of
from vllm_entropix.forks.policy import coin
from vllm_entropix.forks.tree import Birth, Tree
from vllm_entropix.observability import prometheus
from vllm_entropix.records.branches import ForkTree
from vllm_entropix.records.fields import names
from vllm_entropix.records.scores import AnswerScores
from vllm_entropix.records.tokens import token_texts
from vllm_entropix.records.trace import TokenTrace
from vllm_entropix.samplers.registry import parse_request
from vllm_entropix.samplers.request import PREFIX
from vllm_entropix.settings.errors import ConfigError, cut
from vllm_entropix.settings.server import Forks

# Under vLLM's own logger, whose handlers are set up in every process.
logger = init_logger("vllm.plugins.entropix")

_TRACE = f"{PREFIX}_trace"
# What vLLM says of a sequence that it can't go on with, as when its KV cache couldn't be loaded.
_FAILED = str(FinishReason.ERROR)
# What a trace file says of a branch that was given up for another.
_PRUNED = "pruned"


def let_fork(engine: Any) -> None:
    """Let requests of a frontend's engine fork; ``engine``: vLLM's LLMEngine or AsyncLLM, which runs entropix."""
    processor = engine.output_processor
    cls = type(processor)
    processor.__class__ = type(f"Forking{cls.__name__}", (ForkingMixin, cls), {"__module__": __name__})
    processor.begin_forks(engine)


class ForkingMixin:
    """Mixed in front of vLLM's OutputProcessor."""

    def begin_forks(self, engine: Any) -> None:
        """Begin with no request that forks."""
        self._entropix_engine = weakref.ref(engine)  # which owns this
        # Branches of the running answers that fork, by the engine's request id; the root's until the answer is there.
        self._entropix_branches: dict[str, _Sequence] = {}
        self._entropix_answers: set[_Answer] = set()

    def add_request(
        self, request: Any, prompt: Any, parent_req: Any = None, request_index: int = 0, queue: Any = None, **more: Any
    ) -> None:
        """Take note of a request; one that forks gets its answer by way of its branches."""
        # Children of one request with n > 1 aren't asked: what can't fork was refused, or is left as it is.
        answer = self._answer_of(request, prompt, queue) if parent_req is None else None
        if answer is None:
            super().add_request(request, prompt, parent_req, request_index, queue, **more)  # type: ignore[misc]
        else:
            answer.begin()

    def _answer_of(self, request: Any, prompt: Any, queue: Any) -> _Answer | None:
        processor: Any = self
        if request.request_id in processor.request_states:  # more of a prompt that comes in pieces
            return None
        engine = self._entropix_engine()
        params = request.sampling_params
        if params is None or engine is None:
            return None
        try:
            settings = how_to_fork(engine.vllm_config, params)
            if settings is None:
                return None
            if (
                request.resumable
                or request.prompt_embeds is not None
                or request.mm_features
                or request.prompt_token_ids is None
            ):
                raise ConfigError(
                    "entropix_forks can't be had with a prompt that isn't all text at once; leave one of them out"
                )
        except ConfigError as error:
            raise RequestSettingsError(str(error)) from None
        return _Answer(processor, engine, request, prompt, queue, settings)

    def process_outputs(self, engine_core_outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        """Make outputs of what the engine gave; branches begin and are given up by it."""
        result = super().process_outputs(engine_core_outputs, *args, **kwargs)  # type: ignore[misc]
        if self._entropix_branches:
            answers: dict[_Answer, None] = {}  # in their order
            for output in engine_core_outputs:
                sequence = self._entropix_branches.get(output.request_id)
                if sequence is not None:
                    sequence.answer.note(sequence)
                    answers[sequence.answer] = None
            for answer in answers:
                answer.advance(result)
        return result

    def abort_requests(self, request_ids: Any, internal: bool) -> list[str]:
        """Abort requests; with the first branch of an answer all others end."""
        request_ids = list(request_ids)
        if not self._entropix_branches:
            return super().abort_requests(request_ids, internal)  # type: ignore[misc, no-any-return]
        known = self._entropix_branches
        if internal:
            answers = {known[request_id].answer: None for request_id in request_ids if request_id in known}
        else:
            wanted = set(request_ids)
            answers = {one.answer: None for one in known.values() if one.answer.external_id in wanted}
        for answer in answers:
            request_ids += [one for one in answer.running() if internal and one not in request_ids]
        aborted: list[str] = super().abort_requests(request_ids, internal)  # type: ignore[misc]
        for answer in answers:
            answer.abort()
        return aborted

    def drop_branches(self, request_ids: list[str]) -> list[str]:
        """End branches alone; the engine's ids of those that ran."""
        return super().abort_requests(request_ids, internal=True)  # type: ignore[misc, no-any-return]

    def add_branch(self, request: Any, prompt: Any, sequence: _Sequence) -> Any:
        """Take note of a branch; the frontend's RequestState of it."""
        super().add_request(request, prompt, None, 0, sequence)  # type: ignore[misc]
        processor: Any = self
        self._entropix_branches[request.request_id] = sequence
        self._entropix_answers.add(sequence.answer)
        sequence.state = processor.request_states[request.request_id]
        return sequence.state

    def forget_branches(self, request_ids: list[str]) -> None:
        """An answer is there."""
        for request_id in request_ids:
            sequence = self._entropix_branches.pop(request_id, None)
            if sequence is not None:
                self._entropix_answers.discard(sequence.answer)

    @property
    def spent_on_forks(self) -> int:
        """Tokens of the running answers beyond the longest branch of each."""
        return sum(answer.tree.spent for answer in self._entropix_answers)


class _Sequence:
    """A branch's place in the frontend: what vLLM has instead of the queue of a request's own.

    Attributes:
        number: of the branch.
        state: vLLM's RequestState; None once the branch was given up and nothing more is told of it.
        noted: tokens that the tree was told.
        output: what vLLM made of the finished sequence.
        seed: that it is drawn by; None: by none.
        submission: sends it to the engine; None: it was sent at once, or never will be.
    """

    def __init__(self, answer: _Answer, number: int, request_id: str) -> None:
        self.answer, self.number, self.request_id = answer, number, request_id
        self.state: Any = None
        self.noted = 0
        self.output: Any = None
        self.seed: int | None = None
        self.submission: asyncio.Task[None] | None = None

    def put(self, output: Any) -> None:
        """Called by vLLM: a RequestOutput, or the error that ended the engine."""
        if isinstance(output, Exception):
            self.answer.queue.put(output)
        else:
            self.output = output

    def submitted(self, submission: asyncio.Task[None]) -> None:
        """It was sent to the engine, or couldn't be, which whoever waits for the answer is told."""
        if not submission.cancelled() and (error := submission.exception()) is not None:
            self.answer.queue.put(error)

    def withdraw(self) -> None:
        """Don't send it to the engine any more: an abort would come there first, and the sequence run with nobody to end it."""
        if self.submission is not None:
            self.submission.cancel()  # without effect on one that was sent


class _Answer:
    """A request that forks.

    Args:
        processor: the frontend's OutputProcessor.
        engine: that it belongs to.
        request: vLLM's EngineCoreRequest, the frontend's own; what it asks is changed before it goes to the engine.
        prompt: its text.
        queue: where its output goes; None: into what the engine's step returns.
        settings: how it forks.
    """

    def __init__(self, processor: Any, engine: Any, request: Any, prompt: Any, queue: Any, settings: Forks) -> None:
        self.processor, self.engine = processor, engine
        self.request, self.prompt, self.queue = request, prompt, queue
        asked = parse_request(request.sampling_params.extra_args).trace
        resolved = resolved_values(engine.vllm_config)
        assert resolved is not None
        self.traced = resolved["config"]["trace"]["default"] if asked is None else asked
        self.external_id = request.external_req_id
        self.sequences: list[_Sequence] = []
        self.tree = Tree(
            settings,
            partial(_scores, settings.select),
            None if processor.tokenizer is None else self._continues_word,
            lambda: processor.spent_on_forks < resolved["config"]["forks"]["engine_budget"],
            lambda number: str(getattr(self.sequences[number].state.detokenizer, "output_text", "")),
            lambda token_ids: () if processor.tokenizer is None else list(token_texts(_Plain(processor.tokenizer), token_ids)),
            lambda number, position: coin(self.sequences[number].seed, position),
        )
        self._stream: DecidedStream | None = None
        self._counted: bool = resolved["counted"]
        self._live = 0  # branches, as they were counted last
        self._rank: int | None = None

    def begin(self) -> None:
        """Take note of the first branch; its records are wanted, and its output when it has ended."""
        params = self.request.sampling_params
        if params.output_kind != RequestOutputKind.FINAL_ONLY:
            request = copy(self.request)
            request.sampling_params = params.clone()
            self._stream = DecidedStream(self.processor, request, self.prompt, self.traced)
        params.extra_args = {**(params.extra_args or {}), _TRACE: "on"}
        params.output_kind = RequestOutputKind.FINAL_ONLY
        self._add(self.request).seed = params.seed
        self._count_live(len(self.tree.live))

    def _count_live(self, live: int) -> None:
        if self._counted and live != self._live:
            prometheus.count_live_branches(live - self._live)
        self._live = live

    def _add(self, request: Any) -> _Sequence:
        sequence = _Sequence(self, len(self.sequences), request.request_id)
        self.sequences.append(sequence)
        self.processor.add_branch(request, self.prompt, sequence).entropix_is_branch = True
        return sequence

    def running(self) -> list[str]:
        """Request ids of the branches that the engine runs."""
        return [one.request_id for one in self.sequences if one.request_id in self.processor.request_states]

    def note(self, sequence: _Sequence) -> None:
        """Tell the tree what was drawn on a branch, and begin those that part from it."""
        if sequence.state is None:  # the engine was still at it
            return
        self._rank = self._find_rank() if self._rank is None else self._rank
        token_ids = sequence.state.detokenizer.output_token_ids[sequence.noted :]
        collected = getattr(sequence.state, "entropix_traces", None)
        records: list[Any] = list(collected[0][sequence.noted : sequence.noted + len(token_ids)]) if collected else []
        records += [None] * (len(token_ids) - len(records))
        ended = sequence.request_id not in self.processor.request_states
        for birth in self.tree.feed(sequence.number, token_ids, records, ended):
            self._begin_branch(birth)
            if self._counted and birth.rank == 0:
                prometheus.count_fork()
        sequence.noted += len(token_ids)
        if ended and sequence.output.outputs[0].finish_reason == _FAILED:
            self.tree.fail(sequence.number)

    def advance(self, result: Any) -> None:
        """Give up branches that have lost, and hand the answer out once it is there; ``result``: of vLLM's process_outputs."""
        losers = [self.sequences[number] for number in self.tree.settle()]
        for loser in losers:
            loser.withdraw()
        result.reqs_to_abort.extend(self.processor.drop_branches([loser.request_id for loser in losers]))
        self._release(losers)
        self._count_live(len(self.tree.live))
        chosen = self.tree.choose()
        if chosen is not None:
            output = self._output(self.sequences[chosen], chosen)
            self._close()
        elif self._stream is not None:
            number, decided = self.tree.decided(self._stream.told)
            output = self._stream.go_on(self.sequences[number].state, decided, self._cached)
        else:
            output = None
        if output is None:
            return
        if self.queue is None:
            result.request_outputs.append(output)
        else:
            self.queue.put(output)

    def _release(self, losers: list[_Sequence]) -> None:
        """Keep no text and no trace of branches that were given up, unless they are written to disk: they may be thousands."""
        first = self.sequences[0]  # whose state tells of the prompt
        if getattr(first.state, "entropix_label", None) is None:
            for loser in losers:
                if loser is not first:
                    loser.state = loser.output = None

    def abort(self) -> None:
        """All branches were aborted: what the first that is left has is the answer, if anybody waits for it."""
        for one in self.sequences:
            one.withdraw()
        kept = [one for one in self.sequences if one.output is not None and self.tree.branches[one.number].pruned_at is None]
        if self.queue is not None and kept:
            self.queue.put(self._output(kept[0], kept[0].number))
        self._close()

    def _close(self) -> None:
        self._count_live(0)
        self.processor.forget_branches([one.request_id for one in self.sequences])

    def _output(self, sequence: _Sequence, chosen: int) -> Any:
        """A branch's output as the request's; of one that is streamed, the last."""
        output, state = sequence.output, sequence.state
        output.num_cached_tokens = self._cached
        [completion] = output.outputs
        if self._stream is not None:
            output = self._stream.end(state, completion, self._cached)
            [completion] = output.outputs
        numbers = self.tree.chosen(chosen)
        for index, number in enumerate(numbers[1:], 1):
            [other] = self.sequences[number].output.outputs
            other.index = index
            output.outputs.append(other)
        tree = self.tree.described(chosen)
        scores = {
            number: frontend.score_branch(self.sequences[number].state, completion)
            for number, completion in zip(numbers, output.outputs, strict=True)
        }
        if self.traced:
            self._write(tree, scores)
        if self._counted:
            beside = tree.beside(numbers)
            prometheus.count_forked_answer(tree.generated - beside, beside)
        for number, completion in zip(numbers, output.outputs, strict=True):
            frontend.tell_forks(completion, self.tree.described(number), self.traced)
        return output

    def _write(self, tree: ForkTree, chosen: Mapping[int, AnswerScores | None]) -> None:
        """Have all branches written to disk, if traces are; ``chosen``: number of one that is the answer → its scores."""
        if len(tree.branches) == 1:
            [only] = self.sequences
            frontend.write_finished(only.state, str(only.output.outputs[0].finish_reason), chosen[0])
            return
        label = getattr(self.sequences[0].state, "entropix_label", None)
        if label is None:
            return
        branches = [one.model_copy(update={"chosen": one.id in chosen}) for one in tree.branches]
        for sequence, branch in zip(self.sequences, branches, strict=True):
            # What ended as it began has been told nothing by the engine.
            sequence.state.entropix_label = label
            reason = _PRUNED if branch.pruned_at is not None else str(sequence.output.outputs[0].finish_reason)
            frontend.write_finished(sequence.state, reason, chosen.get(branch.id), branch, branches if branch.chosen else None)

    def _find_rank(self) -> int | None:
        """The data-parallel engine that runs the first branch, which has what the others share; None: there is one alone."""
        core = self.engine.engine_core
        engine = getattr(core, "reqs_in_flight", {}).get(self.request.request_id)
        return None if engine is None else core.core_engines.index(engine)  # in the order of ranks

    @property
    def _cached(self) -> int:
        """Tokens of the prompt that the root found in the cache; the others found the root's blocks."""
        return int(self.sequences[0].state.num_cached_tokens)

    def _begin_branch(self, birth: Birth) -> None:
        root = self.request.sampling_params
        parent = self.sequences[birth.parent].state
        shared = parent.detokenizer.output_token_ids[: birth.position]
        request = copy(self.request)
        request.request_id = f"{self.request.request_id}-{birth.branch}"
        sequence = self._add(request)
        state = sequence.state
        state.detokenizer.update(shared, False)
        frontend.begin_branch(state, parent, _trace_of_branch(parent.entropix_traces[0], birth))
        sequence.noted = birth.position + 1
        above = self.sequences[birth.parent].seed
        sequence.seed = None if above is None else seed_of_branch(above, birth.position, birth.rank)
        finish, reason = self._ends_with(birth)
        # As the engine's own tokens would be, by vLLM's process_outputs.
        stop = state.detokenizer.update([birth.token], finish == FinishReason.STOP)
        if stop:
            finish, reason = FinishReason.STOP, stop
        if finish is not None:
            sequence.put(state.make_request_output([], None, finish, reason))  # FINAL_ONLY gives all tokens
            self.processor._finish_request(state)
            self.tree.end(birth.branch)
            return
        params = root.clone()
        params.max_tokens = root.max_tokens - birth.position - 1
        params.seed = sequence.seed
        origin: dict[str, Any] = {
            "prompt_length": len(self.request.prompt_token_ids),
            "of": self.sequences[birth.parent].request_id,
        }
        if (remembered := getattr(parent, "entropix_state", None)) is not None:
            origin["state"] = remembered
        params.extra_args = {**root.extra_args, BRANCH: origin}
        request = copy(request)
        request.sampling_params = params
        request.prompt_token_ids = [*self.request.prompt_token_ids, *shared, birth.token]
        if self._rank is not None:
            request.data_parallel_rank = self._rank
        self._submit(sequence, request)

    def _ends_with(self, birth: Birth) -> tuple[Any, Any]:
        """Why a branch ends with the token that it begins with, and vLLM's stop_reason: as vLLM's scheduler decides it."""
        params, token = self.request.sampling_params, birth.token
        if token == params.eos_token_id:
            return FinishReason.STOP, None
        if token in (params.stop_token_ids or ()):
            return FinishReason.STOP, token
        length = len(self.request.prompt_token_ids) + birth.position + 1
        if length >= self.engine.vllm_config.model_config.max_model_len or birth.position + 1 >= params.max_tokens:
            return FinishReason.LENGTH, None
        return None, None

    def _submit(self, sequence: _Sequence, request: Any) -> None:
        core = self.engine.engine_core
        if self.queue is None:
            core.add_request(request)
        else:
            sequence.submission = asyncio.get_running_loop().create_task(core.add_request_async(request))
            sequence.submission.add_done_callback(sequence.submitted)

    def _continues_word(self, before: int | None, token: int) -> bool:
        """Does a token go on with the word of the one before it?"""
        if before is None:
            return False
        tokenizer = self.processor.tokenizer
        text = tokenizer.decode([before])
        added = tokenizer.decode([before, token]).removeprefix(text)
        return (text[-1:].isalnum() and added[:1].isalnum()) or "\ufffd" in text  # or within a character


class _Plain:
    """A tokenizer that leaves special tokens out, as the text of an answer does."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))


def _scores(name: str, contenders: Sequence[Contender]) -> list[float]:
    """A chooser's scores; if it fails all are equal, and the earliest branch is kept: others' requests are in this process."""
    try:
        return scores_of(chooser(name), contenders)
    except Exception as error:
        reason = cut(" ".join(str(error).split()) or type(error).__name__, 300)
        logger.warning_once("entropix: the chooser %s fails, so the earliest branch is kept: %s", name, reason)
        return [0.0] * len(contenders)


def seed_of_branch(seed: int, position: int, rank: int) -> int:
    """The seed of a branch: it follows from its parent's, from where it parts and from its place among those that do there.

    So it doesn't depend on which of an answer's branches come first, which other requests of the batch decide.
    """
    digest = hashlib.blake2b(f"{seed}:{position}:{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # vLLM's seeds are positive int64


def _trace_of_branch(parent: TokenTrace, birth: Birth) -> TokenTrace:
    """The parent's trace up to the fork, where the record is of the branch's own token."""
    shared = parent[: birth.position + 1]
    values = shared.values().copy()
    if "logprob" in names():
        values[-1, names().index("logprob")] = math.log(birth.probability)
    trace = TokenTrace(values.shape[1] * values.itemsize)
    trace.extend(np.ascontiguousarray(values, dtype="<f4").tobytes(), len(values))
    return trace
