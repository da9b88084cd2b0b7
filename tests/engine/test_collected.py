"""Traces on their way to a response, without an engine: values in parts, bounded, and the bound is told."""

import asyncio
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
from fastapi.responses import JSONResponse
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import FinishReason

from vllm_entropix.engine import patches
from vllm_entropix.engine.answers import chunk_with_traces, with_traces, wrap_json_response
from vllm_entropix.engine.carrier import ABSTAINS, COUNTED, OURS, RECORDS, SCORED, TRACED, WRITTEN
from vllm_entropix.engine.collected import Collected
from vllm_entropix.engine.frontend import merge_traces, receive_records
from vllm_entropix.engine.scheduler import EntropixSchedulerMixin
from vllm_entropix.engine.usage import PRUNED, Beside, count_pruned, count_pruned_in
from vllm_entropix.observability import disk
from vllm_entropix.records.branches import Branch, ForkTree
from vllm_entropix.records.fields import names
from vllm_entropix.records.schema import ChoiceTrace
from vllm_entropix.records.scores import AnswerScores
from vllm_entropix.records.trace import TokenTrace
from vllm_entropix.rows.table import Told

WIDTH = 4 * len(names())


def record(entropy):
    """A record that is known by its entropy."""
    values = np.zeros(len(names()), "<f4")
    values[names().index("entropy")] = entropy
    return values.tobytes()


def entropies(trace):
    return [entry.entropy for entry in trace]


def completion(index, token_ids, trace=None):
    made = CompletionOutput(index=index, text="", token_ids=token_ids, cumulative_logprob=None, logprobs=None)
    if trace is not None:
        made.entropix_trace = trace
    return made


def traced(index, token_ids, kept=None):
    """A completion whose tokens' records have the tokens as entropies; the last ones beyond the cap have none."""
    trace = TokenTrace(WIDTH)
    trace.extend(b"".join(map(record, token_ids[:kept])), len(token_ids))
    return completion(index, token_ids, trace)


def collected(*completions, choices=1, bound=100):
    """Collected from one call of the engine per list of completions."""

    async def note():
        for outputs in completions:

            async def engine(outputs=outputs):
                for one in outputs:
                    yield SimpleNamespace(outputs=[one])

            async for _ in found.noting(engine()):
                pass

    found = Collected(choices, bound)
    asyncio.run(note())
    return found


def test_choices_of_several_prompts():
    found = collected([traced(0, [1, 2]), traced(1, [3])], [traced(1, [5]), traced(0, [4])], choices=2)
    assert [found.take(number).token_ids for number in range(4)] == [[1, 2], [3], [4], [5]]
    assert found.take(4) is None


def test_what_was_told_is_not_told_again():
    found = collected([traced(0, [1, 2])])
    assert entropies(found.take(0).trace) == [1, 2]
    again = found.take(0)
    assert (again.token_ids, len(again.trace), again.trace.not_kept) == ([], 0, 0)


def test_the_bound_of_a_response_is_told_where_it_was_met():
    found = collected([traced(0, [1, 2, 3]), traced(1, [4, 5, 6])], choices=2, bound=4)
    first, second = found.take(0), found.take(1)
    assert (first.token_ids, first.trace.not_kept, first.bound) == ([1, 2, 3], 0, None)
    assert (second.token_ids, second.trace.not_kept, second.bound) == ([4], 2, "trace.response_tokens")
    told = ChoiceTrace.model_validate_json(b"".join(second.json()))
    assert (told.not_kept, told.bound) == (2, "trace.response_tokens")
    assert told.model_dump(mode="json") == json.loads(json.dumps(second.values()))


def test_the_bound_of_a_sequence_is_told_too():
    part = collected([traced(0, [1, 2, 3], kept=2)]).take(0)
    assert (part.token_ids, part.trace.not_kept, part.bound) == ([1, 2], 1, "trace.max_tokens")


def test_a_stream_goes_on_after_the_bound():
    async def chunks():
        found = Collected(1, 2)

        async def engine():
            for token in range(4):
                yield SimpleNamespace(outputs=[traced(0, [token])])

        async for _ in found.noting(engine()):
            data = {"choices": [{"index": 0, "finish_reason": None}]}
            yield json.loads(chunk_with_traces(f"data: {json.dumps(data)}\n\n", found).removeprefix("data: "))
        data = {"choices": [{"index": 0, "finish_reason": "length"}]}
        yield json.loads(chunk_with_traces(f"data: {json.dumps(data)}\n\n", found).removeprefix("data: "))

    async def gather():
        return [chunk["choices"][0].get("entropix") async for chunk in chunks()]

    told = asyncio.run(gather())
    assert [len(part["tokens"]) if part else None for part in told] == [1, 1, None, None, 0]
    assert (told[-1]["not_kept"], told[-1]["bound"]) == (2, "trace.response_tokens")


def test_turns_of_a_conversation_follow_one_another():
    part = collected([traced(0, [1])], [traced(0, [2], kept=0)], [traced(0, [3])]).take_all()
    assert (part.token_ids, entropies(part.trace), part.trace.not_kept) == ([1, 3], [1, 3], 1)
    assert collected([completion(0, [1])]).take_all() is None


class State(SimpleNamespace):
    """What ``receive_records`` reads of vLLM's RequestState."""

    def __init__(self, kind):
        super().__init__(parent_req=None, request_index=0, output_kind=kind)

    def step(self, tokens, all_tokens, kept=None):
        """A step that draws these tokens; gives the completion that is handed out."""
        carried = {TRACED: [WIDTH, b"".join(map(record, tokens[:kept]))]}
        arguments = {"new_token_ids": tokens, "kv_transfer_params": carried, "finish_reason": None}
        shown = tokens if self.output_kind == RequestOutputKind.DELTA else all_tokens
        made = SimpleNamespace(outputs=[completion(0, shown)])
        return receive_records(self, arguments, lambda: made).outputs[0]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (RequestOutputKind.DELTA, [[1], [2, 3], [4]]),
        (RequestOutputKind.CUMULATIVE, [[1], [1, 2, 3], [1, 2, 3, 4]]),
    ],
)
def test_what_is_handed_out_goes_with_the_token_ids_and_stays(kind, expected):
    state, sofar, handed = State(kind), [], []
    for tokens in ([1], [2, 3], [4]):
        sofar = [*sofar, *tokens]
        handed.append(state.step(tokens, sofar))
    assert [entropies(one.entropix_trace) for one in handed] == expected
    assert [list(one.token_ids) for one in handed] == expected


def test_a_delta_counts_its_own_tokens_without_records():
    state = State(RequestOutputKind.DELTA)
    handed = [state.step([1, 2], None), state.step([3, 4, 5], None, kept=1), state.step([6], None, kept=0)]
    assert [(entropies(one.entropix_trace), one.entropix_trace.not_kept) for one in handed] == [
        ([1, 2], 0),
        ([3], 2),
        ([], 1),
    ]


def request_output_of_033(
    state,
    new_token_ids,
    pooling_output,
    finish_reason,
    stop_reason,
    kv_transfer_params=None,
    ec_transfer_params=None,
    error=None,
):
    """Has the signature of vLLM 0.33; makes the output of two sequences of one request, of which the second ran nothing."""
    state.calls.append((kv_transfer_params, error))
    return SimpleNamespace(outputs=[completion(0, [1, 2]), completion(1, [])]) if finish_reason else None


def test_a_failed_request_keeps_its_records(monkeypatch):
    written = []
    monkeypatch.setattr(disk, "write", lambda settings, counted, sequence: written.append(sequence))
    make = patches._wrap_make_request_output(request_output_of_033)
    parent = SimpleNamespace(entropix_traces=None)
    ran, rejected = State(RequestOutputKind.FINAL_ONLY), State(RequestOutputKind.FINAL_ONLY)
    for index, state in enumerate((ran, rejected)):
        vars(state).update(
            parent_req=parent, request_index=index, calls=[], external_req_id="r", prompt_token_ids=[5], prompt=None
        )
        state.detokenizer = SimpleNamespace(output_token_ids=[1, 2])
    label = {"trace": {}, "counted": False, "line": {}}
    carried = {TRACED: [WIDTH, record(1) + record(2)], WRITTEN: label, "others": 3}
    assert make(ran, [1, 2], None, None, None, carried, None, error=None) is None
    # 0.33 hands these to whoever reads no queue; for a queue it makes no output at all.
    first = make(rejected, [], None, FinishReason.ERROR, None, None, None, error="paused")
    last = make(ran, [], None, FinishReason.ERROR, None, None, None, error="lost its cache")
    assert ran.calls == [({"others": 3}, None), (None, "lost its cache")]
    assert rejected.calls == [(None, "paused")]
    for result in (first, last):
        assert entropies(result.outputs[0].entropix_trace) == [1, 2]
        assert getattr(result.outputs[1], "entropix_trace", None) is None
    assert [(one.index, one.finish_reason, entropies(one.trace)) for one in written] == [(0, "error", [1, 2])]


def test_a_request_that_failed_having_run_nothing():
    make = patches._wrap_make_request_output(request_output_of_033)
    state = State(RequestOutputKind.CUMULATIVE)
    state.calls = []
    made = make(state, [], None, FinishReason.ERROR, None, error="paused")
    assert state.calls == [(None, "paused")]
    assert [type(one) for one in made.outputs] == [CompletionOutput, CompletionOutput]


def test_the_scheduler_sends_no_records_with_a_failure():
    """What a step has computed for a request that has failed meanwhile belongs to no token."""

    class Scheduler:
        def update_from_output(self, scheduler_output, model_runner_output):
            return {0: SimpleNamespace(outputs=self.outputs)}

    class Ours(EntropixSchedulerMixin, Scheduler):
        def __init__(self):
            self._entropix_counted, self._entropix_to_disk, self._entropix_cap = True, False, 100
            self._entropix_sent, self._entropix_scored, self.requests = {"failed": 3}, {}, {}

    def output(request_id, tokens, error=None):
        return SimpleNamespace(request_id=request_id, new_token_ids=tokens, kv_transfer_params=None, error=error)

    ours = Ours()
    ours.outputs = [output("runs", [7]), output("failed", [], "lost its cache"), output("rejected", [], "paused")]
    step = SimpleNamespace(
        **{RECORDS: {name: (Told(name, True), 1, record(number)) for name, number in (("runs", 7), ("failed", 8))}}
    )
    ours.update_from_output(SimpleNamespace(finished_req_ids=set()), step)
    assert [one.kv_transfer_params for one in ours.outputs] == [{COUNTED: record(7), TRACED: [WIDTH, record(7)]}, None, None]
    ours.update_from_output(SimpleNamespace(finished_req_ids={"failed"}), SimpleNamespace())
    assert ours._entropix_sent == {"runs": 1}


def scored(entropy, abstained=None):
    return AnswerScores(tokens=2, entropy_mean=entropy, abstained=abstained)


def test_scores_come_with_the_end_of_a_stream():
    found = Collected(1, 100)

    async def stream():
        async def engine():
            yield SimpleNamespace(outputs=[completion(0, [1])])
            last = completion(0, [2])
            last.entropix_scores = scored(1.5)
            yield SimpleNamespace(outputs=[last])

        reason, told = None, []
        async for output in found.noting(engine()):
            reason = "stop" if hasattr(output.outputs[0], "entropix_scores") else None
            # A chunk may come between the engine's end and the answer's.
            for finish in dict.fromkeys((None, reason)):
                chunk = f"data: {json.dumps({'choices': [{'index': 0, 'finish_reason': finish}]})}\n\n"
                told.append(json.loads(chunk_with_traces(chunk, found).removeprefix("data: "))["choices"][0].get("entropix"))
        return told

    *before, last = asyncio.run(stream())
    assert before == [None, None]
    assert (last["tokens"], last["scores"]["entropy_mean"], last["scores"]["perplexity"]) == ([], 1.5, None)
    assert ChoiceTrace.model_validate(last).model_dump(mode="json") == last


def test_events_have_the_scores_of_the_last_turn_at_their_end():
    first, second = completion(0, [1]), completion(0, [2])
    first.entropix_scores, second.entropix_scores = scored(1), scored(2)
    found = collected([first], [second])
    kinds = ["response.output_text.delta", "response.completed"]
    told = [json.loads(chunk_with_traces(f'data: {{"type":"{kind}"}}\n\n', found).partition("data: ")[2]) for kind in kinds]
    assert "entropix" not in told[0]
    assert told[1]["entropix"]["scores"]["entropy_mean"] == 2


def forked(index, token_ids, trace=None):
    """A completion of three tokens more than it holds, on a branch that was given up."""
    made = completion(index, token_ids, trace)
    lost = Branch(id=1, parent=0, position=1, token=9, tokens=3, score=-2.5, pruned_at=4)
    made.entropix_forks = ForkTree(branches=[Branch(id=0, tokens=len(token_ids), score=-1.0, chosen=True), lost])
    return made


def test_branches_are_told_with_the_answers_end_and_count_in_its_usage():
    found = collected([forked(0, [1, 2])])
    usage = {"prompt_tokens": 5, "total_tokens": 7, "completion_tokens": 2}
    chunks = [
        {"choices": [{"index": 0, "finish_reason": None}]},
        {"choices": [{"index": 0, "finish_reason": "length"}]},
        {"choices": [], "usage": usage},
    ]
    told = [json.loads(chunk_with_traces(f"data: {json.dumps(chunk)}\n\n", found).removeprefix("data: ")) for chunk in chunks]
    assert told[0] == chunks[0]
    trace = ChoiceTrace.model_validate(told[1]["choices"][0]["entropix"])
    assert (trace.tokens, trace.scores) == ([], None)
    assert [(branch.id, branch.tokens, branch.chosen) for branch in trace.forks] == [(0, 2, True), (1, 3, False)]
    assert told[2]["usage"] == {
        "prompt_tokens": 5,
        "total_tokens": 10,
        "completion_tokens": 5,
        "completion_tokens_details": {"entropix_pruned_tokens": 3},
    }


def test_choices_that_are_branches_of_one_answer_count_what_they_share_once():
    branches = [Branch(id=0, tokens=4), Branch(id=1, parent=0, position=1, token=9, tokens=3), Branch(id=2, parent=0, tokens=2)]
    first, second, other = completion(0, [1, 2, 3, 4]), completion(1, [1, 9, 9, 9]), completion(0, [7])
    for number, one in enumerate((first, second)):
        told = [branch.model_copy(update={"chosen": branch.id == number}) for branch in branches]
        one.entropix_forks = ForkTree(branches=told)

    async def note():
        for outputs in ([first, second], [other]):

            async def engine(outputs=outputs):
                yield SimpleNamespace(outputs=outputs)

            async for _ in found.noting(engine()):
                pass

    found = Collected(1, 100)
    asyncio.run(note())
    # Branch 2 became none of them, and vLLM counts 8 tokens of the 9.
    assert found.beside == Beside(pruned=2, uncounted=1)
    assert [[branch["id"] for branch in found.take(number).forks if branch["chosen"]] for number in range(2)] == [[0], [1]]
    assert found.take(2) is None


def test_what_a_server_traces_by_itself_is_not_told_with_branches():
    trace = TokenTrace(WIDTH)
    trace.extend(record(1), 1)

    async def note():
        async def engine():
            yield SimpleNamespace(outputs=[forked(0, [1], trace)])

        async for _ in found.noting(engine()):
            pass

    found = Collected(1, 100, traces=False)
    asyncio.run(note())
    told = found.take(0)
    assert (told.token_ids, len(told.forks)) == ([], 2)


@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        (
            {"input_tokens": 5, "output_tokens": 2, "total_tokens": 7, "output_tokens_details": {"reasoning_tokens": 1}},
            {
                "input_tokens": 5,
                "output_tokens": 6,
                "total_tokens": 11,
                "output_tokens_details": {"reasoning_tokens": 1, "entropix_pruned_tokens": 4},
            },
        ),
        (
            {"input_tokens": 5, "output_tokens": 2},
            {"input_tokens": 5, "output_tokens": 6, "output_tokens_details": {PRUNED: 4}},
        ),
        ({"prompt_tokens": 5, "completion_tokens": None}, {"prompt_tokens": 5, "completion_tokens": None}),
    ],
)
def test_usage_of_other_endpoints(usage, counted):
    for data in ({"usage": dict(usage)}, {"response": {"usage": dict(usage)}}):
        assert count_pruned_in(data, Beside(4, 4))
        assert data.get("response", data)["usage"] == counted
        assert not count_pruned_in(data, None)
    assert not count_pruned_in({"choices": []}, Beside(4, 4))


def test_usage_in_vllms_objects():
    from vllm.entrypoints.serve.engine.protocol import UsageInfo

    answer = SimpleNamespace(usage=UsageInfo(prompt_tokens=5, completion_tokens=2, total_tokens=7))
    count_pruned(answer, None)
    assert answer.usage.completion_tokens == 2
    count_pruned(answer, Beside(4, 4))
    told = answer.usage.model_dump()
    assert (told["completion_tokens"], told["total_tokens"]) == (6, 11)
    assert told["completion_tokens_details"] == {"reasoning_tokens": 0, PRUNED: 4}


@pytest.mark.parametrize(("abstained", "header"), [(None, None), (False, b"false"), (True, b"true")])
def test_a_router_reads_in_a_header_whether_a_choice_abstains(abstained, header):
    sure, unsure = completion(0, [1]), completion(1, [2])
    sure.entropix_scores, unsure.entropix_scores = scored(0.1, None if abstained is None else False), scored(3, abstained)
    sent = []

    async def send(message):
        sent.append(message)

    async def serve():
        found = Collected(2, 100)

        async def engine():
            yield SimpleNamespace(outputs=[sure, unsure])

        async for _ in found.noting(engine()):
            pass
        await with_traces(None, found, of_server=True)
        content = {"choices": [{"index": index} for index in range(2)]}
        await wrap_json_response(JSONResponse)(content)({"type": "http"}, None, send)

    asyncio.run(serve())
    assert dict(sent[0]["headers"]).get(b"x-entropix-abstained") == header
    told = json.loads(b"".join(message.get("body", b"") for message in sent))["choices"]
    assert [choice["entropix"]["scores"]["abstained"] for choice in told] == [None if abstained is None else False, abstained]


class Scored(State):
    """The same of a request that is scored."""

    def step(self, tokens, finish_reason=None, abstains=None, counted=False, trace=False):
        """A step that draws these tokens; gives the completion that is handed out, and what vLLM is told of it."""
        data = b"".join(map(record, tokens))
        carried = {SCORED: [WIDTH, data], **({ABSTAINS: abstains} if abstains else {}), "others": 1}
        carried |= {COUNTED: data} if counted else {}
        carried |= {TRACED: [WIDTH, data]} if trace else {}
        arguments = {
            "new_token_ids": tokens,
            "kv_transfer_params": carried if tokens else None,
            "finish_reason": finish_reason,
            "stop_reason": None,
        }
        made = completion(self.request_index, tokens)
        made.finish_reason = finish_reason
        result = receive_records(self, arguments, lambda: SimpleNamespace(outputs=[made]))
        assert not OURS & (arguments["kv_transfer_params"] or {}).keys()
        return result.outputs[0], arguments["stop_reason"]


def test_an_answer_is_summed_up_token_by_token():
    state = Scored(RequestOutputKind.DELTA)
    for tokens in ([1], [2, 3]):
        made, reason = state.step(tokens)
        assert (getattr(made, "entropix_scores", None), reason) == (None, None)
    made, reason = state.step([6], "stop")
    assert (made.entropix_scores.entropy_mean, made.entropix_scores.entropy_max, made.entropix_scores.tokens) == (3, 6, 4)
    assert (made.entropix_scores.abstained, made.entropix_trace, reason) == (None, None, None)


@pytest.mark.parametrize(
    ("abstains", "abstained"),
    [(["entropy_mean", 2.9, None], True), (["entropy_mean", 3.0, None], False), (["entropy_max", None, 6.5], True),
     (["entropy_max", None, 6.0], False), (["perplexity", 1.0, None], True), (["varentropy_mean", -1.0, None], True),
     (["share_helv", 1.0, None], False)],
)  # fmt: skip
def test_an_answer_abstains_strictly_beyond_its_bound(abstains, abstained):
    state = Scored(RequestOutputKind.DELTA)
    state.step([1, 2], abstains=abstains)
    made, reason = state.step([6], "length")
    expected = abstained if abstains[0] != "perplexity" else made.entropix_scores.perplexity > 1
    assert made.entropix_scores.abstained is expected
    assert reason == ("entropix_abstain" if expected else None)


def test_an_answer_that_ends_without_a_token_is_scored_by_those_it_has():
    state = Scored(RequestOutputKind.CUMULATIVE)
    state.step([1, 3], abstains=["entropy_mean", 1.0, None])
    made, reason = state.step([], "abort")
    assert (made.entropix_scores.entropy_mean, reason) == (2, "entropix_abstain")


def test_scores_count_the_tokens_beyond_the_cap_of_the_trace():
    class Scheduler:
        def update_from_output(self, scheduler_output, model_runner_output):
            tokens = [SimpleNamespace(request_id="a", new_token_ids=[1, 2], kv_transfer_params=None)]
            return {0: SimpleNamespace(outputs=tokens)}

    class Ours(EntropixSchedulerMixin, Scheduler):
        def __init__(self):
            self._entropix_counted, self._entropix_to_disk, self._entropix_cap = False, False, 1
            params = SimpleNamespace(extra_args={"entropix_abstain_score": "perplexity", "entropix_abstain_above": 2})
            self._entropix_sent, self._entropix_scored = {}, {}
            self.requests = {"a": SimpleNamespace(sampling_params=params)}

    ours, data = Ours(), record(1) + record(2)
    step = SimpleNamespace(**{RECORDS: {"a": (Told("a", True, True), 2, data)}})
    [output] = ours.update_from_output(SimpleNamespace(finished_req_ids=set()), step)[0].outputs
    rule = ["perplexity", 2.0, None]
    assert output.kv_transfer_params == {SCORED: [WIDTH, data], ABSTAINS: rule, TRACED: [WIDTH, record(1)]}
    ours.requests.clear()  # it is known from its first record on
    [output] = ours.update_from_output(SimpleNamespace(finished_req_ids=set()), step)[0].outputs
    assert output.kv_transfer_params == {SCORED: [WIDTH, data], ABSTAINS: rule}
    ours.update_from_output(SimpleNamespace(finished_req_ids={"a"}), SimpleNamespace())
    assert ours._entropix_scored == ours._entropix_sent == {}


def test_joined_outputs_keep_the_scores():
    """Of a request that isn't traced, so that the first output is vLLM's own."""

    def output(one):
        return RequestOutput(
            request_id="r", prompt=None, prompt_token_ids=[], prompt_logprobs=None, outputs=[one], finished=False
        )

    patches.install()
    joined, last = output(completion(0, [1])), completion(0, [2])
    last.entropix_scores = scored(1.5)
    joined.add(output(last), aggregate=True)
    assert joined.outputs[0].entropix_scores.entropy_mean == 1.5


@pytest.mark.parametrize("aggregate", [True, False])
def test_outputs_that_vllm_joins(aggregate):
    """A reader that is slower than the engine gets deltas joined, others the last."""

    def output(*completions):
        return RequestOutput(
            request_id="r", prompt=None, prompt_token_ids=[], prompt_logprobs=None, outputs=list(completions), finished=False
        )

    patches.install()
    joined = output(traced(0, [1, 2]))
    later = traced(0, [3])
    joined.add(output(later, traced(1, [7])), aggregate=aggregate)
    first, second = joined.outputs
    assert entropies(first.entropix_trace) == list(first.token_ids) == ([1, 2, 3] if aggregate else [3])
    assert entropies(second.entropix_trace) == [7]
    assert entropies(later.entropix_trace) == [3], "what was joined is left as it was"
    assert merge_traces(joined, output(completion(0, [9])), lambda: "merged") == "merged"


def test_chunks_without_traces_are_vllms_own_bytes():
    found = collected([completion(0, [1])])
    for chunk in ('data: {"choices": [ {"index":0} ]}\n\n', "data: [DONE]\n\n", ": keep alive\n\n", 'data: {"error":1}\n\n'):
        assert chunk_with_traces(chunk, found) is chunk


def test_events_without_choices():
    found = collected([traced(0, [1, 2])])
    kinds = ["message_start", "content_block_delta", "content_block_stop", "message_delta"]
    told = [
        json.loads(chunk_with_traces(f'event: {kind}\ndata: {{"type":"{kind}"}}\n\n', found).partition("data: ")[2])
        for kind in kinds
    ]
    assert [len(event["entropix"]["tokens"]) if "entropix" in event else None for event in told] == [None, 2, None, 0]


@pytest.mark.alone
def test_a_large_answer_leaves_the_event_loop_to_others():
    """64 choices of 900 tokens: whoever else is served waits for less than a second."""
    choices, tokens, alternatives = 64, 900, 5
    one = record(0.5) + np.arange(2 * alternatives, dtype="<f4").tobytes()
    trace = TokenTrace(len(one))
    trace.extend(one * tokens, tokens)
    gaps, sent = [], []

    async def send(message):
        sent.append(message)

    async def others(answered):
        while not answered.is_set():
            start = time.perf_counter()
            await asyncio.sleep(0.01)
            gaps.append(time.perf_counter() - start)

    async def serve():
        found = Collected(choices, choices * tokens)

        async def engine():
            outputs = [completion(index, list(range(tokens)), trace[:]) for index in range(choices)]
            yield SimpleNamespace(outputs=outputs)

        async for _ in found.noting(engine()):
            pass
        answered = asyncio.Event()
        watch = asyncio.create_task(others(answered))
        await with_traces(None, found, of_server=True)
        content = {"choices": [{"index": index, "text": ""} for index in range(choices)]}
        await wrap_json_response(JSONResponse)(content)({"type": "http"}, None, send)
        answered.set()
        await watch

    asyncio.run(serve())
    body = b"".join(message.get("body", b"") for message in sent)
    assert dict(sent[0]["headers"])[b"content-length"] == str(len(body)).encode()
    told = json.loads(body)["choices"]
    assert [len(choice["entropix"]["tokens"]) for choice in told] == [tokens] * choices
    assert told[5]["entropix"]["tokens"][7]["alternatives"][1] == [1, 6.0]
    assert max(gaps) < 1, max(gaps)
