"""What the frontend does with records: counts them, hangs them on outputs that are traced, sums them up, has them written.

They are collected per sequence as ``CompletionOutput.entropix_trace``, and summed up as ``entropix_scores`` when it has
finished. A finished sequence is written if the server's settings name a path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind

from vllm_entropix.engine.carrier import ABSTAINS, COUNTED, SCORED, STATE, TRACED, WRITTEN, without_ours
from vllm_entropix.observability import disk, prometheus
from vllm_entropix.records.branches import Branch, ForkTree
from vllm_entropix.records.scores import Abstention, AnswerScores, Tally
from vllm_entropix.records.trace import TokenTrace
from vllm_entropix.settings.server import Trace

# What an answer that abstains has as its stop_reason, in every form of a response; its finish_reason stays vLLM's.
ABSTAINED = "entropix_abstain"


@dataclass(repr=False)
class TracedCompletion(CompletionOutput):  # type: ignore[misc]  # vLLM isn't typed here
    """vLLM's CompletionOutput with its trace as a field, which ``dataclasses.replace`` keeps and ``==`` compares."""

    entropix_trace: TokenTrace | None = None
    entropix_forks: ForkTree | None = None
    entropix_scores: AnswerScores | None = None


@dataclass
class _Answer:
    """What is summed up of a sequence, and its scores once it has finished."""

    tally: Tally = field(default_factory=Tally)
    abstention: Abstention | None = None
    counted: bool = False
    scores: AnswerScores | None = None


def receive_records(state: Any, arguments: dict[str, Any], make: Callable[[], Any]) -> Any:
    """Collect what came with a request's new tokens, and hang it on the outputs that are made of them.

    Args:
        state: the frontend's RequestState.
        arguments: of its ``make_request_output``, by name; our bytes are taken out of them.
        make: calls it with them.
    """
    carried = arguments.get("kv_transfer_params")
    # Children of one request with n > 1 share the parent, which hands out all their outputs together.
    shared = state.parent_req or state
    collected: dict[int, TokenTrace] | None = getattr(shared, "entropix_traces", None)
    answers: dict[int, _Answer] | None = getattr(shared, "entropix_answers", None)
    if not carried and not collected and not answers:
        return make()
    tokens = len(arguments["new_token_ids"])
    traced = counted = scored = abstains = None
    if carried:
        traced, counted, scored, abstains = map(carried.get, (TRACED, COUNTED, SCORED, ABSTAINS))
        if traced or counted or scored:
            if WRITTEN in carried:
                state.entropix_label = carried[WRITTEN]
            state.entropix_state = carried.get(STATE)
            arguments["kv_transfer_params"] = without_ours(carried)
    if counted and tokens:
        prometheus.count(counted, tokens)
    if scored:
        if answers is None:
            answers = shared.entropix_answers = {}
        answer = answers.setdefault(state.request_index, _Answer())
        answer.tally.add(scored[1], scored[0])
        answer.counted = counted is not None
        if answer.abstention is None and abstains is not None:
            answer.abstention = Abstention(*abstains)
    if traced:
        if collected is None:
            collected = shared.entropix_traces = {}
        width, records = traced
        trace = collected.get(state.request_index)
        if trace is None:
            trace = collected[state.request_index] = TokenTrace(width)
        trace.extend(records, tokens)
    elif collected and state.request_index in collected:
        collected[state.request_index].extend(b"", tokens)  # beyond the cap
    finish_reason = arguments["finish_reason"]
    finished = answers.get(state.request_index) if answers and finish_reason is not None else None
    # Which branch of an answer that forks is the answer isn't known yet.
    is_branch = getattr(state, "entropix_is_branch", False)
    if finished is not None and not is_branch:
        _score(finished, arguments)
    result = make()
    if not collected and not answers:
        return result
    if finish_reason is not None and not is_branch:
        write_finished(state, str(finish_reason), finished.scores if finished is not None else None)
    if result is not None:
        for completion in result.outputs:
            _hang_on(completion, collected or {}, answers or {}, state.output_kind)
    return result


def _score(answer: _Answer, arguments: dict[str, Any]) -> None:
    """Score a sequence that has finished; where it abstains, its output says so as vLLM's own ``stop_reason``."""
    if answer.scores is None:  # a failure may end a sequence twice
        values = answer.tally.values(answer.abstention)
        answer.scores = AnswerScores.model_validate(values)
        if answer.counted:
            prometheus.count_answer(values)
    if answer.scores.abstained:
        arguments["stop_reason"] = ABSTAINED


def begin_branch(state: Any, parent: Any, trace: TokenTrace) -> None:
    """Give a branch of an answer that forks what it has in common with its parent.

    Args:
        state: the frontend's RequestState of the branch.
        parent: that of the branch that it parts from.
        trace: of the tokens that they share, and of the one that it parts with.
    """
    state.entropix_traces = {0: trace}
    answers: dict[int, _Answer] | None = getattr(parent, "entropix_answers", None)
    if answers:
        tally = Tally()
        tally.add_values(trace.values())
        state.entropix_answers = {0: _Answer(tally, answers[0].abstention, answers[0].counted)}


def score_branch(state: Any, completion: Any) -> AnswerScores | None:
    """Score a branch that became the answer, if scores were asked for, and hang them on its output."""
    answers: dict[int, _Answer] | None = getattr(state, "entropix_answers", None)
    if not answers:
        return None
    arguments = {"stop_reason": completion.stop_reason}
    _score(answers[0], arguments)
    completion.__class__ = TracedCompletion
    completion.stop_reason, completion.entropix_scores = arguments["stop_reason"], answers[0].scores
    return answers[0].scores


def _hang_on(completion: Any, collected: dict[int, TokenTrace], answers: dict[int, _Answer], kind: RequestOutputKind) -> None:
    """Give a completion its trace and its scores, if it has some."""
    trace, answer = collected.get(completion.index), answers.get(completion.index)
    scores = answer.scores if answer is not None and completion.finish_reason is not None else None
    if trace is None and scores is None:
        return
    completion.__class__ = TracedCompletion
    completion.entropix_scores = scores
    if trace is not None:
        completion.entropix_trace = _handed_out(trace, completion, kind)


def _handed_out(trace: TokenTrace, completion: Any, kind: RequestOutputKind) -> TokenTrace:
    """The trace of the tokens that a completion holds: a value, which doesn't grow with the sequence."""
    if kind != RequestOutputKind.DELTA:
        return trace[:]
    tokens = len(completion.token_ids)
    before = len(trace) + trace.not_kept - tokens
    part = trace[before:] if before < len(trace) else trace[:0]
    part.not_kept = tokens - len(part)
    return part


def merge_traces(output: Any, following: Any, merge: Callable[[], Any]) -> Any:
    """Join the traces of two outputs of a request, whose deltas vLLM joins because nobody has read the first yet.

    Args:
        output: vLLM's RequestOutput, which gets what the other has.
        following: the other.
        merge: does so with all that vLLM knows.
    """
    before = {completion.index: completion for completion in output.outputs}
    result = merge()
    after = {completion.index: completion for completion in output.outputs}
    for completion in following.outputs:
        trace, same = getattr(completion, "entropix_trace", None), before.get(completion.index)
        of_answer = {name: getattr(completion, name, None) for name in ("entropix_scores", "entropix_forks")}
        # Otherwise it was taken over as it is: a first of its index, or one that holds all tokens so far.
        if same is None or same is not after[completion.index]:
            continue
        if trace is not None:
            same.entropix_trace.join(trace)
        for name, value in of_answer.items():
            if value is not None:
                same.__class__ = TracedCompletion
                setattr(same, name, value)
    return result


def tell_forks(completion: Any, tree: ForkTree, traced: bool) -> None:
    """Hang an answer's tree on its completion, which keeps its trace if that was asked for, too."""
    completion.__class__ = TracedCompletion
    completion.entropix_forks = tree
    if not traced:
        completion.entropix_trace = None


def write_finished(
    state: Any,
    finish_reason: str,
    scores: AnswerScores | None = None,
    branch: Branch | None = None,
    forks: Sequence[Branch] | None = None,
) -> None:
    """Have a finished sequence written to disk, if it is one that is; ``disk.Finished`` says what the others tell of it."""
    if getattr(state, "entropix_label", None) is None:
        return
    trace = (state.parent_req or state).entropix_traces[state.request_index]
    label, state.entropix_label = state.entropix_label, None
    settings = Trace.model_validate(label["trace"])
    # Children of one request with n > 1 share its prompt.
    prompt: disk.Prompt | None = getattr(state.parent_req, "entropix_prompt", None)
    if prompt is None:
        prompt = disk.Prompt.from_ids(state.prompt_token_ids or (), state.prompt, settings.prompts)
        if state.parent_req is not None:
            state.parent_req.entropix_prompt = prompt
    sequence = disk.Finished(
        label=label["line"],
        request_id=state.external_req_id,
        index=state.request_index,
        prompt=prompt,
        token_ids=disk.compact(state.detokenizer.output_token_ids),
        finish_reason=finish_reason,
        trace=trace,
        scores=None if scores is None else scores.model_dump(mode="json"),
        tokenizer=getattr(state.detokenizer, "tokenizer", None),
        branch=branch,
        forks=forks,
    )
    disk.write(settings, label["counted"], sequence)
