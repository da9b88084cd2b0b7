"""Answers that fork in a running engine: branches are what requests of their own are, and nothing of them is left behind."""

import asyncio
import math
from copy import copy
from itertools import product

import pytest

from tests.support.engine import engine, generate, scheduler_of
from vllm_entropix import traces
from vllm_entropix.engine.forkable import how_to_fork
from vllm_entropix.engine.forks import seed_of_branch
from vllm_entropix.forks import choice
from vllm_entropix.records.scores import scores_of_entries
from vllm_entropix.settings.errors import ConfigError

pytestmark = pytest.mark.engine

PROMPT = "once upon a time there was a"
SERVER = {"forks": {"floor": 0, "distance": 4, "inside_words": True}}
FORKS = {"entropix_forks": 4, "entropix_fork_width": 2, "entropix_fork_entropy": 0.5}


@pytest.fixture
def llm(tiny):
    return engine(tiny, sampler="entropix", sampler_config=SERVER)


@pytest.fixture
def branches(llm, monkeypatch):
    """vLLM's states and the branches of each answer that was handed out, as (states, branches)."""
    seen = []
    monkeypatch.setattr(llm.llm_engine.output_processor, "forget_branches", forgetting(llm, seen))
    return seen


def forgetting(llm, seen):
    """What is called when an answer is handed out, which notes it."""
    processor = llm.llm_engine.output_processor
    forget = processor.forget_branches

    def forget_branches(request_ids):
        answer = processor._entropix_branches[request_ids[0]].answer
        seen.append(([one.state for one in answer.sequences], answer.tree.branches))
        forget(request_ids)

    return forget_branches


@pytest.fixture
def queue(llm, monkeypatch):
    """Where the output of the next request goes, as that of one of AsyncLLM's, whose branches are sent by asyncio."""
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.output_processor import RequestOutputCollector

    collector = RequestOutputCollector(RequestOutputKind.FINAL_ONLY, "0")
    processor = llm.llm_engine.output_processor
    add = processor.add_request
    monkeypatch.setattr(processor, "add_request", lambda *request: add(*request, queue=collector))
    return collector


def params(**settings):
    from vllm import SamplingParams

    return SamplingParams(**{"max_tokens": 24, "ignore_eos": True, "seed": 5, "extra_args": FORKS, **settings})


def ids(llm, text=PROMPT):
    return llm.get_tokenizer().encode(text, add_special_tokens=False)


def prompt_of(token_ids):
    return {"prompt_token_ids": list(token_ids)}


def tokens(output):
    return list(output.outputs[0].token_ids)


def assert_nothing_left(llm):
    llm.llm_engine.step()  # which tells the worker of the last that ended
    scheduler = scheduler_of(llm)
    assert not scheduler.requests
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    processor = llm.llm_engine.output_processor
    assert not processor._entropix_branches
    assert not processor._entropix_answers
    assert not processor.request_states
    assert not processor.external_req_ids


@pytest.mark.both_runners
def test_width_one_everywhere_changes_nothing(llm):
    settings = [{"seed": 3}, {"seed": None, "temperature": 0}, {"seed": 4, "stop": ["a"], "ignore_eos": False}]
    narrow = {"entropix_forks": 8, "entropix_fork_width": 1, "entropix_fork_entropy": 0}
    plain = generate(llm, [PROMPT] * 3, [params(**{**one, "extra_args": None}) for one in settings])
    forked = generate(llm, [PROMPT] * 3, [params(**{**one, "extra_args": narrow}) for one in settings])
    for output, other in zip(forked, plain, strict=True):
        [completion], [expected] = output.outputs, other.outputs
        assert [branch.id for branch in completion.entropix_forks.branches] == [0]
        assert completion.entropix_trace is None
        for name in ("token_ids", "text", "finish_reason", "stop_reason", "cumulative_logprob", "logprobs", "index"):
            assert getattr(completion, name) == getattr(expected, name), name
        assert output.prompt_token_ids == other.prompt_token_ids
        assert output.finished


@pytest.mark.both_runners
@pytest.mark.parametrize("samplers", [{}, {"samplers": "dry;min_p;temperature", "dry_multiplier": 0.8}])
def test_a_branch_is_what_a_request_of_its_own_is(llm, branches, samplers):
    [output] = generate(llm, [PROMPT], [params(extra_args={**FORKS, **samplers})])
    [(states, tree)] = branches
    assert len(tree) >= 4
    asked, seeds = [], {tree[0]: 5}
    for branch in tree[1:]:
        prompt = [*ids(llm), *branch.token_ids[: branch.position + 1]]
        rank = [one for one in tree if (one.parent, one.position) == (branch.parent, branch.position)].index(branch)
        seeds[branch] = seed = seed_of_branch(seeds[branch.parent], branch.position, rank)
        if branch.position < 23:
            asked.append((prompt_of(prompt), params(max_tokens=24 - branch.position - 1, seed=seed, extra_args=samplers)))
    fresh = generate(llm, *map(list, zip(*asked, strict=True)))
    for branch, other in zip([one for one in tree[1:] if one.position < 23], fresh, strict=True):
        assert branch.token_ids[branch.position + 1 :] == tokens(other)
        assert branch.token_ids[: branch.position] == branch.parent.token_ids[: branch.position]
    # The first is what it would be alone.
    [alone] = generate(llm, [PROMPT], [params(extra_args=samplers)])
    assert tree[0].token_ids == tokens(alone)
    # And the answer is an ordinary one of the best.
    told = output.outputs[0].entropix_forks
    best = max(tree, key=lambda branch: branch.score)
    assert tokens(output) == best.token_ids
    assert told.chosen.id == best.id
    assert told.generated == 24 + sum(24 - branch.position for branch in tree[1:])
    text = llm.get_tokenizer().decode(best.token_ids)
    assert output.outputs[0].text == text.rstrip("\ufffd")  # a part of a character at the end isn't text yet
    assert output.prompt_token_ids == ids(llm)
    # All whole blocks of what a branch shares were found in the cache.
    for state, branch in zip(states[1:], tree[1:], strict=True):
        if branch.position == 23:  # it ended as it began
            continue
        shared = len(ids(llm)) + branch.position
        assert shared + 1 - state.num_cached_tokens <= scheduler_of(llm).block_size
    assert_nothing_left(llm)


@pytest.mark.both_runners
def test_a_number_that_follows_what_is_drawn_goes_with_a_branch(llm):
    # So great a τ excludes nothing, and all of mirostat's numbers follow from the log-probabilities that are told.
    tau, eta = 100.0, 0.1
    mirostat = {"samplers": "mirostat_v2", "mirostat_tau": tau, "mirostat_eta": eta, "entropix_fork_select": "all"}
    [output] = generate(llm, [PROMPT], [params(extra_args={**FORKS, **mirostat, "entropix_trace": "on"})])
    tree = output.outputs[0].entropix_forks.branches
    assert len(tree) > 3
    assert {branch.id for branch in tree} == {completion.entropix_forks.chosen.id for completion in output.outputs}
    for completion, trace in zip(output.outputs, traces(output), strict=True):
        parted, branch = set(), tree[completion.entropix_forks.chosen.id]
        while branch.parent is not None:
            parted.add(branch.position)
            branch = tree[branch.parent]
        mu = 2 * tau
        for position, record in enumerate(trace):
            assert record.mu == pytest.approx(mu, abs=1e-3), (completion.index, position)
            if position not in parted:  # nothing drew the token that a branch parts with
                mu -= eta * (-record.logprob / math.log(2) - tau)
    assert_nothing_left(llm)


@pytest.mark.both_runners
def test_a_branch_begins_with_its_parents_blocks(llm, branches, monkeypatch):
    # Nothing is computed again, wherever in a block the answer forks.
    settings = [params(seed=seed, max_tokens=32) for seed in range(2)]
    prompts = [PROMPT, PROMPT * 3]
    llm.reset_prefix_cache()
    outputs = generate(llm, prompts, settings)
    for states, tree in branches:
        root = len(states[0].prompt_token_ids)
        assert len(tree) > 1
        for state, branch in zip(states[1:], tree[1:], strict=True):
            if branch.position < 28:  # or its parent had ended, perhaps
                assert state.num_cached_tokens == root + branch.position
    assert_nothing_left(llm)
    # Token for token the same as by the prefix cache.
    told = sorted([branch.token_ids for branch in tree] for _, tree in branches)
    branches.clear()
    llm.reset_prefix_cache()
    monkeypatch.delattr(scheduler_of(llm).kv_cache_manager, "get_computed_blocks")  # vLLM's own is left
    others = generate(llm, prompts, settings)
    assert [tokens(output) for output in outputs] == [tokens(output) for output in others]
    assert sorted([branch.token_ids for branch in tree] for _, tree in branches) == told
    found = [state.num_cached_tokens for states, _ in branches for state in states[1:]]
    assert {number % scheduler_of(llm).block_size for number in found} == {0}


@pytest.mark.both_runners
def test_what_a_branch_shares_may_be_evicted_before_it_begins(llm, branches, monkeypatch):
    settings = [params(seed=seed) for seed in range(2)]
    prompts = [PROMPT * 6] * 2  # longer than a block, which would be found in the cache
    assert len(ids(llm, prompts[0])) > scheduler_of(llm).block_size
    outputs = generate(llm, prompts, settings)
    told = sorted([branch.token_ids for branch in tree] for _, tree in branches)
    branches.clear()
    manager = scheduler_of(llm).kv_cache_manager

    def evict(request):
        manager.block_pool.evict_blocks(set(range(manager.block_pool.num_gpu_blocks)))
        return type(manager).get_computed_blocks(manager, request)

    monkeypatch.setattr(manager, "get_computed_blocks", evict)
    others = generate(llm, prompts, settings)
    # All is computed again, and the same.
    assert not any(state.num_cached_tokens for states, _ in branches for state in states)
    assert sorted([branch.token_ids for branch in tree] for _, tree in branches) == told
    assert [tokens(output) for output in outputs] == [tokens(output) for output in others]
    assert_nothing_left(llm)


def test_branches_are_reproducible_and_other_requests_are_left_alone(llm):
    settings = [params(), params(extra_args=None, seed=9), params(seed=6)]
    first = generate(llm, [PROMPT] * 3, settings)
    [alone] = generate(llm, [PROMPT], [settings[1]])
    again = generate(llm, [PROMPT] * 3, settings)
    for output, other in zip(first, again, strict=True):
        assert tokens(output) == tokens(other)
    assert tokens(first[1]) == tokens(alone)
    assert not hasattr(first[1].outputs[0], "entropix_forks")
    assert first[0].outputs[0].entropix_forks == again[0].outputs[0].entropix_forks


@pytest.mark.both_runners
def test_a_horizon_prunes_and_a_trace_is_of_the_answer(llm, branches):
    asked = {**FORKS, "entropix_fork_horizon": 3, "entropix_trace": "on"}
    [output] = generate(llm, [PROMPT], [params(extra_args=asked)])
    [(states, tree)] = branches
    # Of what was given up nothing is kept, but for the first branch's, which tells of the prompt.
    assert [state is None for state in states[1:]] == [branch.pruned_at is not None for branch in tree[1:]]
    [completion] = output.outputs
    kept = [branch for branch in tree if branch.pruned_at is None]
    assert [branch.id for branch in kept] == [completion.entropix_forks.chosen.id]
    pruned = [branch for branch in tree if branch.pruned_at is not None]
    assert min(len(branch.token_ids) for branch in pruned) < 24
    [trace] = traces(output)
    assert len(trace) == 24
    [winner] = kept
    assert [record.entropy for record in trace] == winner.entropies
    assert_nothing_left(llm)


def streamed(llm, settings, text=PROMPT):
    """What the engine hands out of a request, step by step."""
    running = llm.llm_engine
    running.add_request("7", prompt_of(ids(llm, text)), settings)
    found = []
    while running.has_unfinished_requests():
        found += running.step()
    return found


@pytest.mark.parametrize("kind", ["DELTA", "CUMULATIVE"])
def test_a_stream_sends_what_is_decided_and_goes_on_within_a_horizon(llm, branches, kind):
    from vllm.sampling_params import RequestOutputKind

    asked = {**FORKS, "entropix_fork_horizon": 3, "entropix_trace": "on"}
    [whole] = generate(llm, [PROMPT], [params(max_tokens=60, extra_args=asked)])
    told = streamed(llm, params(max_tokens=60, extra_args=asked, output_kind=RequestOutputKind[kind]))
    *parts, last = [output.outputs[0] for output in told]
    assert [output.finished for output in told] == [False] * len(parts) + [True]
    assert len(parts) > 5
    assert len({len(tree) for _, tree in branches}) == 1  # the same branches
    expected, trace = whole.outputs[0], traces(whole)[0]
    assert last.entropix_forks == expected.entropix_forks
    assert all(getattr(part, "entropix_forks", None) is None for part in parts)
    if kind == "DELTA":
        assert "".join(part.text for part in (*parts, last)) == expected.text
        assert [token for part in (*parts, last) for token in part.token_ids] == list(expected.token_ids)
        records = [record for part in (*parts, last) for record in part.entropix_trace]
    else:
        assert all(expected.text.startswith(part.text) for part in parts)
        assert (last.text, list(last.token_ids)) == (expected.text, list(expected.token_ids))
        records = list(last.entropix_trace)
    assert records == list(trace)
    for name in ("finish_reason", "stop_reason"):
        assert getattr(last, name) == getattr(expected, name)
    assert told[-1].num_cached_tokens == told[0].num_cached_tokens
    assert_nothing_left(llm)


def test_a_stream_keeps_a_stop_string_back(llm):
    from vllm.sampling_params import RequestOutputKind

    asked = {**FORKS, "entropix_fork_horizon": 3}
    [whole] = generate(llm, [PROMPT], [params(max_tokens=60, extra_args=asked)])
    stop = whole.outputs[0].text[-12:-6]
    settings = {"max_tokens": 60, "extra_args": asked, "stop": [stop]}
    [expected] = generate(llm, [PROMPT], [params(**settings)])
    told = streamed(llm, params(**settings, output_kind=RequestOutputKind.DELTA))
    assert "".join(output.outputs[0].text for output in told) == expected.outputs[0].text
    assert stop not in expected.outputs[0].text
    assert told[-1].outputs[0].stop_reason == expected.outputs[0].stop_reason == stop


def test_without_a_horizon_a_stream_waits_at_the_first_fork(llm):
    from vllm.sampling_params import RequestOutputKind

    # The first fork is where the entropy is greatest, in an answer that doesn't begin with that.
    texts = [f"{number} {PROMPT}" for number in range(8)]
    plain = generate(llm, texts, [params(extra_args={"entropix_trace": "on"})] * 8)
    entropies = [[record.entropy for record in traces(output)[0]] for output in plain]
    text, found = next((text, of) for text, of in zip(texts, entropies, strict=True) if max(of) > of[0])
    first = found.index(max(found))
    asked = {**FORKS, "entropix_fork_entropy": (max(found[:first]) + found[first]) / 2}
    told = streamed(llm, params(extra_args=asked, output_kind=RequestOutputKind.DELTA), text)
    last = told[-1].outputs[0]
    assert {branch.position for branch in last.entropix_forks.branches[1:2]} == {first}
    assert sum(len(output.outputs[0].token_ids) for output in told[:-1]) == first
    assert len(last.token_ids) == 24 - first


def test_all_branches_may_be_the_answer(llm, branches):
    [output] = generate(llm, [PROMPT], [params(extra_args={**FORKS, "entropix_fork_select": "all"})])
    [(states, tree)] = branches
    told = [completion.entropix_forks.chosen.id for completion in output.outputs]
    assert sorted(told) == [branch.id for branch in tree]
    assert len(tree) > 2
    assert tree[told[0]].score == max(branch.score for branch in tree)
    for index, (number, completion) in enumerate(zip(told, output.outputs, strict=True)):
        assert completion.index == index
        assert list(completion.token_ids) == tree[number].token_ids
        assert completion.text == states[number].detokenizer.output_text
    assert_nothing_left(llm)


def test_branches_vote(llm, branches):
    asked = {**FORKS, "entropix_fork_select": "vote", "entropix_fork_answer": "last-line"}
    [output] = generate(llm, [PROMPT], [params(extra_args=asked)])
    [(_, tree)] = branches
    assert len(tree) > 2
    assert all(1 <= branch.score <= len(tree) + 0.5 for branch in tree)
    assert tokens(output) == max(tree, key=lambda branch: (branch.score, -branch.id)).token_ids


def test_all_branches_are_no_stream(llm):
    from vllm.sampling_params import RequestOutputKind

    asked = {**FORKS, "entropix_fork_select": "all"}
    with pytest.raises(ValueError, match="can't be had with all branches in a stream, by entropix_fork_select all"):
        streamed(llm, params(extra_args=asked, output_kind=RequestOutputKind.DELTA))
    assert_nothing_left(llm)


def test_an_answer_that_forked_is_scored_as_any_other(llm):
    asked = {**FORKS, "entropix_trace": "on", "entropix_scores": "on"}
    for settings in ({}, {"entropix_fork_horizon": 3}, {"entropix_abstain_score": "entropy_max", "entropix_abstain_above": 0}):
        [output] = generate(llm, [PROMPT], [params(extra_args={**asked, **settings})])
        [completion] = output.outputs
        expected = scores_of_entries(completion.entropix_trace).model_dump()
        told = completion.entropix_scores.model_dump()
        abstained = True if "entropix_abstain_score" in settings else None
        assert completion.stop_reason == ("entropix_abstain" if abstained else None)
        assert told.pop("abstained") is abstained
        for name, value in told.items():
            assert value == (expected[name] if expected[name] is None else pytest.approx(expected[name], rel=1e-5)), name
        assert told["tokens"] == 24


def test_a_share_of_the_places_forks_by_the_seed(llm):
    shares = (0, 0.5, 0.5, 1)
    asked = [params(extra_args={**FORKS, "entropix_forks": 64, "entropix_fork_share": share}) for share in shares]
    none, some, again, every = (output.outputs[0].entropix_forks for output in generate(llm, [PROMPT] * 4, asked))
    assert len(none.branches) == 1
    assert some == again
    assert 1 < len(some.branches) < len(every.branches)


def test_a_chooser_that_fails_harms_nobody(llm, monkeypatch):
    monkeypatch.setitem(choice.BUILT_IN, "broken", lambda contenders: 1 / 0)
    asked = {**FORKS, "entropix_fork_select": "broken", "entropix_fork_horizon": 4}
    [output, other] = generate(llm, [PROMPT] * 2, [params(extra_args=asked), params(extra_args=None)])
    assert tokens(output) == tokens(other)  # the first branch, which came first
    assert len(output.outputs[0].entropix_forks.branches) > 1


def test_a_branch_that_the_engine_gives_up_is_pruned(llm, branches, monkeypatch):
    # As vLLM says it of a sequence whose KV cache couldn't be loaded.
    from vllm.v1.engine import FinishReason

    processor, core = llm.llm_engine.output_processor, llm.llm_engine.engine_core
    process, failed = processor.process_outputs, []

    def process_outputs(outputs, *args, **kwargs):
        for output in outputs:
            if output.request_id.endswith("-1") and not failed:
                output.finish_reason = FinishReason.ERROR
                failed.append(output.request_id)
                core.abort_requests(failed)
        return process(outputs, *args, **kwargs)

    monkeypatch.setattr(processor, "process_outputs", process_outputs)
    [output] = generate(llm, [PROMPT], [params()])
    [(_, tree)] = branches
    assert failed
    assert tree[1].pruned_at is not None
    assert len(tree) > 2
    assert output.outputs[0].finish_reason == "length"
    assert not output.outputs[0].entropix_forks.branches[1].chosen
    assert_nothing_left(llm)


def test_a_client_is_told_of_a_branch_that_cant_be_sent(llm, queue):
    inner = llm.llm_engine

    async def ask():
        inner.add_request("0", PROMPT, params())
        while queue.output is None and scheduler_of(llm).requests:
            inner.step()
            await asyncio.sleep(0)
        queue.get_nowait()

    with pytest.raises(NotImplementedError):  # this engine's client has no way to send by asyncio
        asyncio.run(ask())
    inner.abort_request(["0"])
    assert_nothing_left(llm)


def test_a_client_that_leaves_takes_branches_along_that_werent_sent_yet(llm, queue, monkeypatch):
    inner, sent = llm.llm_engine, []

    async def send(request):
        sent.append(request)

    async def leave():
        inner.add_request("0", PROMPT, params())
        while len(inner.output_processor.request_states) == 1:
            inner.step()
        inner.abort_request(["0"])
        await asyncio.sleep(0)

    monkeypatch.setattr(inner.engine_core, "add_request_async", send)
    asyncio.run(leave())
    assert sent == []
    assert_nothing_left(llm)


@pytest.mark.both_runners
def test_an_abort_ends_all_branches(llm):
    running = llm.llm_engine
    for by_name in (True, False):
        internal = running.add_request("7", prompt_of(ids(llm)), params(max_tokens=200))
        while len(scheduler_of(llm).requests) < 3:
            assert not any(output.finished for output in running.step())
        running.abort_request(["7" if by_name else internal], internal=not by_name)
        assert not running.has_unfinished_requests()
        assert_nothing_left(llm)


def test_a_stop_string_that_a_branch_shares_in_part(llm, branches):
    generate(llm, [PROMPT], [params()])
    [(_, tree)] = branches
    decode = llm.get_tokenizer().decode
    branch = next(one for one in tree[1:] if one.position)
    stop = decode(branch.token_ids[branch.position - 1 : branch.position + 1])
    branches.clear()
    generate(llm, [PROMPT], [params(stop=[stop])])
    [(states, stopped)] = branches
    same = next(one for one in stopped if one.token_ids[: branch.position + 1] == branch.token_ids[: branch.position + 1])
    assert same.token_ids == branch.token_ids[: branch.position + 1]
    assert states[same.id].detokenizer.output_text == decode(branch.token_ids[: branch.position - 1])


@pytest.mark.both_runners
def test_a_branch_may_begin_with_the_end(llm, branches):
    # The alternative is a stop token: the branch ends as it begins, and the one that forked goes on.
    settings = {"temperature": 0, "max_tokens": 6}
    generate(llm, [PROMPT], [params(**settings)])
    [(_, tree)] = branches
    branch = next(one for one in tree[1:] if one.token_ids[one.position] not in tree[0].token_ids)
    token = branch.token_ids[branch.position]
    branches.clear()
    [output] = generate(llm, [PROMPT], [params(**settings, stop_token_ids=[token])])
    [(states, ended)] = branches
    assert ended[0].token_ids == tree[0].token_ids
    same = next(one for one in ended if one.token_ids[: branch.position + 1] == branch.token_ids[: branch.position + 1])
    assert same.token_ids == branch.token_ids[: branch.position + 1]
    decode = llm.get_tokenizer().decode
    assert states[same.id].detokenizer.output_text == decode(branch.token_ids[: branch.position])
    [completion] = output.outputs
    chosen = completion.entropix_forks.chosen.id
    assert (completion.finish_reason, completion.stop_reason) == (("length", None) if chosen == 0 else ("stop", token))
    assert_nothing_left(llm)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"extra_args": {**FORKS, "samplers": "vllm", "entropix_fork_entropy": 1}},
            "entropix_forks can't be had with vLLM's own sampler",
        ),
        ({"n": 2}, "entropix_forks can't be had with n = 2; ask for one answer"),
        ({"min_tokens": 2}, "entropix_forks can't be had with min_tokens"),
        ({"presence_penalty": 0.5}, "can't be had with presence_penalty; leave one of them out"),
        ({"frequency_penalty": 0.5}, "can't be had with frequency_penalty"),
        ({"logprobs": 1}, "can't be had with logprobs; read entropix_trace instead"),
        ({"prompt_logprobs": 1}, "can't be had with prompt_logprobs"),
        ({"bad_words": ["a"]}, "can't be had with bad_words"),
        ({"extra_args": {"entropix_fork_width": 3}}, "entropix_fork_width is given without entropix_forks"),
        (
            {"extra_args": {**FORKS, "entropix_fork_width": 6}},
            "needs as many recorded alternatives, but trace.alternatives is 5",
        ),
        ({"extra_args": {**FORKS, "entropix_fork_select": "best"}}, "there is no chooser 'best'"),
        (
            {"extra_args": {**FORKS, "entropix_fork_select": "vote"}},
            "forks that are chosen by vote need a rule that finds the answer in a text; give one as entropix_fork_answer",
        ),
        (
            {"extra_args": {**FORKS, "entropix_fork_select": "vote", "entropix_fork_answer": "best"}},
            "there is no rule 'best' for answers",
        ),
        (
            {"extra_args": {**FORKS, "entropix_fork_select": "all", "entropix_fork_horizon": 5}},
            "so there is no horizon of 5 tokens; set entropix_fork_horizon to 0",
        ),
        ({"extra_args": {**FORKS, "entropix_forks": 65}}, "entropix_forks is 65"),
        ({"extra_args": {**FORKS, "entropix": "off"}}, "entropix_forks is given, but entropix is off"),
        (
            {"extra_args": {"entropix_forks": 2, "samplers": "min_p"}},
            "with the sampler min_p, which knows no regimes, and no entropy to fork at; give entropix_fork_entropy",
        ),
        (
            {"extra_args": {"entropix_forks": 2, "samplers": "top_k;temperature"}},
            "which knows no regimes, and no entropy to fork at; give entropix_fork_entropy",
        ),
        ({"extra_args": {"vllm_entropix_branch": {"prompt_length": 1}}}, "'vllm_entropix_branch' is the engine's own"),
    ],
)
def test_what_cant_fork_is_refused(llm, settings, message):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as refused:
        generate(llm, [PROMPT], [params(**settings)])
    assert message in str(refused.value)
    assert_nothing_left(llm)


@pytest.mark.parametrize(
    ("part", "name", "message"),
    [
        ("vllm_config", "kv_transfer_config", "can't be had with a KV connector; leave out --kv-transfer-config"),
        ("model_config", "return_sampling_mask", "can't be had with sampling masks; leave out --return-sampling-mask"),
        ("model_config", "enable_return_routed_experts", "can't be had with routed experts in the answer"),
    ],
)
def test_an_engine_whose_branches_would_differ_refuses(llm, part, name, message):
    config = copy(llm.llm_engine.vllm_config)
    config.__dict__["model_config"] = copy(config.model_config)
    (config if part == "vllm_config" else config.model_config).__dict__[name] = True
    with pytest.raises(ConfigError, match=message):
        how_to_fork(config, params())
    assert how_to_fork(config, params(extra_args=None)) is None


def test_a_grammar_is_refused(llm):
    from vllm.sampling_params import StructuredOutputsParams

    with pytest.raises(ValueError, match="can't be had with structured_outputs"):
        generate(llm, [PROMPT], [params(structured_outputs=StructuredOutputsParams(choice=["a", "b"]))])


def test_the_branches_of_five_tokens_are_all_answers(tiny, monkeypatch):
    llm = engine(tiny, sampler="entropix", sampler_config={"forks": {**SERVER["forks"], "distance": 1}})
    contenders = []

    def look(given):
        contenders.extend(given)
        return choice.confidence(given)

    monkeypatch.setitem(choice.BUILT_IN, "look", look)
    allowed = [10, 11, 12, 13, 14]
    asked = {"entropix_forks": 64, "entropix_fork_width": 5, "entropix_fork_entropy": 0, "entropix_fork_select": "look"}
    [output] = generate(llm, [PROMPT], [params(max_tokens=2, allowed_token_ids=allowed, extra_args=asked)])
    found = {tuple(one.token_ids): math.exp(sum(one.logprobs)) for one in contenders}
    assert set(found) == set(product(allowed, repeat=2))
    assert sum(found.values()) == pytest.approx(1, abs=1e-5)
    assert found[tuple(tokens(output))] == max(found.values())
    assert_nothing_left(llm)


@pytest.mark.parametrize("ends", ["eos", "stop token", "stop string", "limit", "model's length"])
def test_answers_end_on_either_side_of_a_fork_as_any_other(tiny, ends):
    """All answers of three tokens at most over an alphabet of three, each as vLLM ends it."""
    llm = engine(tiny, sampler="entropix", sampler_config={"forks": {**SERVER["forks"], "distance": 1}})
    eos, decode = llm.get_tokenizer().eos_token_id, llm.get_tokenizer().decode
    alphabet = [eos if ends == "eos" else ids(llm, "a")[0], *ids(llm, "bc")]
    asked = {
        "eos": {"ignore_eos": False},
        "stop token": {"stop_token_ids": alphabet[:1]},
        "stop string": {"stop": ["cb"]},
        "limit": {},
        "model's length": {"max_tokens": 100},
    }[ends]
    length = 512 - 3 if ends == "model's length" else 5
    forks = {"entropix_forks": 64, "entropix_fork_width": 3, "entropix_fork_entropy": 0, "entropix_fork_select": "all"}
    settings = params(**{"max_tokens": 3, "allowed_token_ids": alphabet, "extra_args": forks, **asked})
    [output] = generate(llm, [prompt_of([70 + place % 7 for place in range(length)])], [settings])
    expected = set()
    for answer in product(alphabet, repeat=3):
        text, finish, stop = decode(list(answer), skip_special_tokens=True), "length", None
        if ends in ("eos", "stop token") and alphabet[0] in answer:
            answer = answer[: answer.index(alphabet[0]) + 1]
            finish, stop = "stop", None if ends == "eos" else alphabet[0]
            text = decode(list(answer[:-1]))
        elif ends == "stop string" and "cb" in text:
            text = text.partition("cb")[0]
            answer, finish, stop = answer[: len(text) + 2], "stop", "cb"
        expected.add((answer, text, finish, stop))
    told = [(tuple(one.token_ids), one.text, one.finish_reason, one.stop_reason) for one in output.outputs]
    assert len(told) == len(set(told))
    assert set(told) == expected
    assert_nothing_left(llm)


def test_no_prompt_of_mist_takes_more_than_its_budget(tiny, monkeypatch):
    """Where every token forks, a request stays within its budget, all together within the engine's, and others are served."""
    forks = {**SERVER["forks"], "distance": 1, "engine_budget": 300}
    llm = engine(tiny, sampler="entropix", sampler_config={"forks": forks})
    mist = {"entropix_forks": 64, "entropix_fork_width": 5, "entropix_fork_entropy": 0}
    one = params(max_tokens=40, extra_args={**mist, "entropix_fork_budget": 100})
    plain = params(seed=9, extra_args=None)
    [alone] = generate(llm, [PROMPT], [plain])
    [output, other] = generate(llm, [PROMPT] * 2, [one, plain])
    told = output.outputs[0].entropix_forks
    assert len(told.branches) > 20
    # A step of all branches at most beyond the budget, and what the best had fallen behind.
    assert told.generated <= 40 + 100 + 2 * 64
    assert tokens(other) == tokens(alone)
    assert_nothing_left(llm)

    # Eight of them want 8 * 63 branches at once.
    processor, spent = llm.llm_engine.output_processor, []
    add = processor.add_branch

    def add_branch(request, prompt, sequence):
        if sequence.number:
            spent.append(processor.spent_on_forks)
        return add(request, prompt, sequence)

    monkeypatch.setattr(processor, "add_branch", add_branch)
    settings = [params(max_tokens=16, seed=seed, extra_args=mist) for seed in range(8)]
    outputs = generate(llm, [f"{seed} {PROMPT}" for seed in range(8)] + [PROMPT], [*settings, plain])
    assert len(spent) > 8
    assert max(spent) <= 300 + 5  # a branch drew a token, and four parted from it
    assert all(len(tokens(output)) == 16 for output in outputs[:8])
    assert tokens(outputs[8]) == tokens(alone)
    assert_nothing_left(llm)


def test_a_server_may_let_all_fork_that_can(tiny):
    server = {"forks": {**SERVER["forks"], "branches": 3, "entropy": 0.5, "mechanism": "prefix-cache"}}
    llm = engine(tiny, sampler="entropix", sampler_config=server)
    assert "get_computed_blocks" not in vars(scheduler_of(llm).kv_cache_manager)  # vLLM's own is left
    [forked, two] = generate(llm, [PROMPT] * 2, [params(extra_args=None), params(extra_args=None, n=2)])
    assert len(forked.outputs[0].entropix_forks.branches) > 1
    assert [hasattr(completion, "entropix_forks") for completion in two.outputs] == [False, False]
    assert_nothing_left(llm)


def test_sixty_four_that_fork_at_once_under_a_small_cache(tiny, monkeypatch):
    llm = engine(tiny, sampler="entropix", sampler_config=SERVER, num_gpu_blocks_override=11, block_size=32, max_model_len=256)
    scheduler, preempted, answers = scheduler_of(llm), [], []
    preempt = scheduler._preempt_request

    def count(request, *args, **kwargs):
        preempted.append(request.request_id)
        return preempt(request, *args, **kwargs)

    monkeypatch.setattr(scheduler, "_preempt_request", count)
    monkeypatch.setattr(llm.llm_engine.output_processor, "forget_branches", forgetting(llm, answers))
    # Each sequence begins in one block and needs a second.
    texts = [f"{number:02} {PROMPT[:24]}" for number in range(64)]
    plain = generate(llm, texts, [params(max_tokens=12, seed=seed, extra_args=None) for seed in range(64)])
    preempted.clear()
    outputs = generate(llm, texts, [params(max_tokens=12, seed=seed) for seed in range(64)])
    assert [len(tokens(output)) for output in outputs] == [12] * 64
    assert {request_id.count("-") for request_id in preempted} == {1, 2}  # first branches, and others
    trees = [tree for _, tree in sorted(answers, key=lambda one: int(one[0][0].external_req_id))]
    assert sum(map(len, trees)) > 96
    assert [tree[0].token_ids for tree in trees] == [tokens(output) for output in plain]
    # Branches were preempted, waited longer than their parents ran, and lost what they shared; they are what they are alone.
    asked, expected = [], []
    for number, (root, *others) in list(enumerate(trees))[::8]:
        seeds = {root: number}
        for branch in others:
            seeds[branch] = seed_of_branch(seeds[branch.parent], branch.position, 0)
            prompt = [*ids(llm, texts[number]), *branch.token_ids[: branch.position + 1]]
            if branch.position < 11:
                asked.append((prompt_of(prompt), params(max_tokens=11 - branch.position, seed=seeds[branch], extra_args=None)))
                expected.append(branch.token_ids[branch.position + 1 :])
    assert [tokens(output) for output in generate(llm, *map(list, zip(*asked, strict=True)))] == expected
    assert_nothing_left(llm)


@pytest.mark.parametrize(
    ("server", "arguments", "message"),
    [
        ({"forks": {"select": "best"}}, {}, "there is no chooser 'best'"),
        ({"forks": {"branches": 2, "width": 6}}, {}, "trace.alternatives is 5"),
    ],
)
def test_a_server_that_cant_fork_doesnt_start(tiny, server, arguments, message):
    with pytest.raises(ValueError, match=message):
        engine(tiny, fresh=True, sampler="entropix", sampler_config=server, **arguments)


def test_without_prefix_caching_forks_are_refused(tiny):
    llm = engine(tiny, sampler="entropix", sampler_config={"forks": {"branches": 2}}, enable_prefix_caching=False)
    with pytest.raises(ValueError, match="entropix_forks can't be had with prefix caching off"):
        generate(llm, [PROMPT], [params()])
    # Who doesn't ask isn't refused.
    [output] = generate(llm, [PROMPT], [params(extra_args=None, max_tokens=4)])
    assert len(tokens(output)) == 4
