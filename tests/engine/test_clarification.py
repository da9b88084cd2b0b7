"""Forced clarification tokens inside a real engine: cooldown, maximum, grammars, bans, stop rules, preemption."""

import pytest

from tests.support.engine import engine, generate, scheduler_of
from vllm_entropix import traces

pytestmark = [pytest.mark.engine, pytest.mark.both_runners]

TRACED = {"entropix_trace": "on"}
# Every position is HELV: nothing is below an entropy of 0 or a varentropy of 0.
ALWAYS_LOST = {
    "lelv": {"entropy_below": 0.0},
    "helv": {"entropy_above": 0.0, "varentropy_below": 4096.0},
}
CLARIFICATION = "hm?"  # three tokens of the test models' tokenizer


def settings(**clarification):
    forks = {"floor": 0, "distance": 4, "inside_words": True}
    return {"thresholds": ALWAYS_LOST, "clarification": {"text": CLARIFICATION, **clarification}, "forks": forks}


def params(**settings):
    from vllm import SamplingParams

    return SamplingParams(**{"max_tokens": 24, "ignore_eos": True, "seed": 1, "extra_args": TRACED, **settings})


def forced(output):
    """F for each forced token, . for others."""
    return "".join("F" if record.forced else "." for record in traces(output)[0])


def ids(llm, text):
    return llm.get_tokenizer().encode(text, add_special_tokens=False)


@pytest.fixture
def llm(tiny):
    return engine(tiny, sampler="entropix", sampler_config=settings(cooldown=5, max_per_request=3))


def test_cooldown_and_maximum(llm):
    outputs = generate(llm, ["a", "bb", "ccc"], [params(seed=seed, max_tokens=32) for seed in range(3)])
    for output in outputs:
        assert forced(output) == "FFF.....FFF.....FFF............."
        tokens = list(output.outputs[0].token_ids)
        for start in (0, 8, 16):
            assert tokens[start : start + 3] == ids(llm, CLARIFICATION)


def test_branches_remember_what_was_inserted_before_them(llm, monkeypatch):
    processor = llm.llm_engine.output_processor
    forget, seen = processor.forget_branches, []

    def forget_branches(request_ids):
        seen.extend(one.state for one in processor._entropix_branches[request_ids[0]].answer.sequences)
        forget(request_ids)

    monkeypatch.setattr(processor, "forget_branches", forget_branches)
    generate(llm, ["a"], [params(max_tokens=32, extra_args={"entropix_forks": 8, "entropix_fork_entropy": 0})])
    assert len(seen) > 4
    for state in seen:
        records = state.entropix_traces[0]
        assert "".join("F" if record.forced else "." for record in records) == "FFF.....FFF.....FFF............."


def test_off_per_request_and_for_greedy_rows(llm):
    outputs = generate(
        llm,
        ["a"] * 4,
        [
            params(),
            params(extra_args={**TRACED, "entropix_clarification": "off"}),
            params(temperature=0.0),
            params(extra_args={"entropix": "off"}),
        ],
    )
    assert [("F" in forced(output)) if traces(output)[0] else None for output in outputs] == [True, False, False, None]


def test_forced_tokens_count_like_any_other(llm):
    from vllm import SamplingParams

    [cut, stopped, with_logprobs] = generate(
        llm,
        ["a"] * 3,
        [
            params(max_tokens=2),
            params(stop=["m?"]),
            SamplingParams(max_tokens=4, seed=1, logprobs=1, extra_args=TRACED),
        ],
    )
    assert (cut.outputs[0].text, cut.outputs[0].finish_reason) == ("hm", "length")
    assert (stopped.outputs[0].text, stopped.outputs[0].stop_reason) == ("h", "m?")
    assert forced(stopped) == "FFF"
    assert all(token in position for token, position in zip(ids(llm, "hm?"), with_logprobs.outputs[0].logprobs, strict=False))


def test_waits_until_the_grammar_allows_it(llm):
    from vllm.sampling_params import StructuredOutputsParams

    [waited, never] = generate(
        llm,
        ["a", "a"],
        [
            params(ignore_eos=False, structured_outputs=StructuredOutputsParams(regex=r"[a-c]{5}(hm\?|xyz)[a-c]{4}")),
            params(ignore_eos=False, structured_outputs=StructuredOutputsParams(regex=r"[a-c]{12}")),
        ],
    )
    assert waited.outputs[0].text[5:8] == "hm?"
    assert forced(waited)[:12] == ".....FFF...."
    assert len(waited.outputs[0].text) == 12
    assert (len(never.outputs[0].text), "F" in forced(never)) == (12, False)


def test_waits_while_a_ban_excludes_it(llm):
    [banned, allowed, bad_word] = generate(
        llm,
        ["a"] * 3,
        [
            params(allowed_token_ids=ids(llm, "abc")),
            params(allowed_token_ids=ids(llm, "hm?abc")),
            params(bad_words=["m"]),
        ],
    )
    assert "F" not in forced(banned)
    assert forced(allowed).startswith("FFF.....FFF")
    # The second token is banned for good: the first is placed, then it waits and nothing is forced any more.
    assert forced(bad_word) == "F" + "." * 23
    assert ids(llm, "m")[0] not in bad_word.outputs[0].token_ids


def test_min_tokens_delays_a_forced_end(tiny):
    eos = 511
    llm = engine(tiny, sampler="entropix", sampler_config={"thresholds": ALWAYS_LOST, "clarification": {"token_ids": [eos]}})
    [output] = generate(llm, ["a"], [params(min_tokens=6, ignore_eos=False)])
    assert forced(output) == "......F"
    assert output.outputs[0].finish_reason == "stop"


def test_rules_of_the_original(tiny):
    expected = {"last-token": "F.F.F.F.", "ever": "F......."}
    for rule, pattern in expected.items():
        config = {"thresholds": ALWAYS_LOST, "clarification": {"token_ids": [300], "rule": rule, "max_per_request": 1}}
        llm = engine(tiny, sampler="entropix", sampler_config=config)
        [output] = generate(llm, ["a"], [params(max_tokens=8)])
        assert forced(output) == pattern


class Preemptions:
    """Counts how often an in-process engine preempts."""

    def __init__(self, llm):
        self.count = 0
        scheduler = scheduler_of(llm)
        original = scheduler._preempt_request

        def preempt(*args, **kwargs):
            self.count += 1
            return original(*args, **kwargs)

        scheduler._preempt_request = preempt


def test_preemption_loses_and_repeats_nothing(tiny):
    """The same seeded requests with plenty of cache, and with so little that they preempt one another.

    Beside those of entropix are two of a chain that keeps a number of what it draws, and looks at the text.
    """
    prompts = ["x" * length for length in (50, 61, 33, 40, 57, 48)]
    asked = [params(seed=seed, max_tokens=100) for seed in range(6)]
    chain = {"samplers": "dry;mirostat_v2", "dry_multiplier": 0.5, "dry_sequence_breakers": [1], "mirostat_eta": 0.5}
    prompts += ["yz" * length for length in (22, 26)]
    asked += [params(seed=seed, max_tokens=100, extra_args={**TRACED, **chain}) for seed in range(2)]
    results = []
    for blocks in (None, 14):
        llm = engine(
            tiny,
            sampler="entropix",
            sampler_config=settings(cooldown=1, max_per_request=1000),
            block_size=32,
            num_gpu_blocks_override=blocks,
            max_model_len=256,
            enable_prefix_caching=False,
        )
        preemptions = Preemptions(llm)
        outputs = generate(llm, prompts, asked)
        assert (preemptions.count > 0) == (blocks is not None)
        results.append(outputs)
        for number, output in enumerate(outputs):
            assert forced(output) == (("FFF." * 25)[:100] if number < 6 else "." * 100)
            assert len(traces(output)[0]) == 100
    plenty, little = results
    assert [list(o.outputs[0].token_ids) for o in little] == [list(o.outputs[0].token_ids) for o in plenty]
    for one, other in zip(plenty, little, strict=True):
        for a, b in zip(traces(one)[0], traces(other)[0], strict=True):
            assert a.entropy == pytest.approx(b.entropy, abs=1e-3)
            assert a.attention_entropy == pytest.approx(b.attention_entropy, abs=1e-3)
            assert a.mu == (None if b.mu is None else pytest.approx(b.mu, abs=1e-3))
    assert len({record.mu for record in traces(little[-1])[0]}) > 50
