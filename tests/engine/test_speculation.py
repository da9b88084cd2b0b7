"""Exact under speculative decoding: what is verified is entropix's own distribution, forced tokens included."""

import collections

import pytest
from scipy.stats import chi2_contingency

from tests.support.engine import adapter_of, engine, generate, scheduler_of
from tests.support.runners import is_v2
from vllm_entropix import traces

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not is_v2(), reason="Model Runner V1 refuses speculation together with entropix (test_arguments)"),
]

TRACED = {"entropix_trace": "on"}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
SURE = {"thresholds": {"lelv": {"entropy_below": 64.0, "varentropy_below": 4096.0}}}
LOST = {"lelv": {"entropy_below": 0.0}, "helv": {"entropy_above": 0.0, "varentropy_below": 4096.0}}
# Text that repeats itself, so that the drafter finds something to propose.
PROMPTS = ["abcabcabcabcabc", "xyxyxyxyxyxy", "aaaaaaaaaa", "hello hello hello hello"]


def params(**settings):
    from vllm import SamplingParams

    return SamplingParams(**{"max_tokens": 40, "ignore_eos": True, "extra_args": TRACED, **settings})


def tokens(outputs):
    return [list(output.outputs[0].token_ids) for output in outputs]


def forced(output):
    return "".join("F" if record.forced else "." for record in traces(output)[0])


class Speculation:
    """Counts drafted and accepted tokens of an in-process engine."""

    def __init__(self, llm):
        self.drafted = self.accepted = 0
        scheduler = scheduler_of(llm)
        original = scheduler.make_spec_decoding_stats

        def count(stats, num_draft_tokens, num_accepted_tokens, *args, **kwargs):
            self.drafted += num_draft_tokens
            self.accepted += num_accepted_tokens
            return original(stats, num_draft_tokens, num_accepted_tokens, *args, **kwargs)

        scheduler.make_spec_decoding_stats = count


def both(tiny, config, prompts, asked, **arguments):
    """Outputs without and with speculation, and the counts of the latter."""
    plain = generate(engine(tiny, sampler="entropix", sampler_config=config, **arguments), prompts, asked)
    llm = engine(tiny, fresh=True, sampler="entropix", sampler_config=config, speculative_config=NGRAM, **arguments)
    counts = Speculation(llm)
    speculated = generate(llm, prompts, asked)
    assert counts.drafted > 0
    return plain, speculated, counts


def test_argmax_gives_the_same_tokens_and_traces(tiny):
    plain, speculated, counts = both(tiny, SURE, PROMPTS, [params(allowed_token_ids=list(range(64, 80)))] * len(PROMPTS))
    assert tokens(speculated) == tokens(plain)
    assert 0 < counts.accepted < counts.drafted
    for one, other in zip(plain, speculated, strict=True):
        for a, b in zip(traces(one)[0], traces(other)[0], strict=True):
            assert a.regime == b.regime == "LELV"
            assert b.entropy == pytest.approx(a.entropy, abs=1e-4)
            assert b.attention_entropy == pytest.approx(a.attention_entropy, abs=1e-4)


def test_distributions_are_the_same(tiny):
    """Frequencies of what is drawn at the first positions, with and without speculation (chi-square test)."""
    samples = 640
    asked = [params(seed=seed, max_tokens=4, allowed_token_ids=list(range(64, 70))) for seed in range(samples)]
    plain, speculated, counts = both(tiny, {}, [PROMPTS[0]] * samples, asked)
    assert counts.accepted > 50
    assert counts.drafted - counts.accepted > 50
    for position in range(4):
        drawn = [collections.Counter(ids[position] for ids in tokens(outputs)) for outputs in (plain, speculated)]
        kinds = [token for token in drawn[0] | drawn[1] if drawn[0][token] + drawn[1][token] >= 10]
        table = [[counter[token] for token in kinds] for counter in drawn]
        assert chi2_contingency(table).pvalue > 1e-3, (position, table)
    # And jointly, which a wrong conditioning on the drafts would change.
    pairs = [collections.Counter(tuple(ids[1:3]) for ids in tokens(outputs)) for outputs in (plain, speculated)]
    often = [pair for pair in pairs[0] | pairs[1] if pairs[0][pair] + pairs[1][pair] >= 10]
    assert chi2_contingency([[counter[pair] for pair in often] for counter in pairs]).pvalue > 1e-3


def test_forced_tokens_over_a_thousand_positions(tiny):
    """Cooldown and sequence are kept whatever is drafted: within forced sequences drafts are rejected, and some accepted."""
    config = {"thresholds": LOST, "clarification": {"text": "hm?", "cooldown": 2, "max_per_request": 1000}}
    llm = engine(tiny, sampler="entropix", sampler_config=config, speculative_config=NGRAM)
    counts = Speculation(llm)
    prompts = [f"hm?hm?ab{chr(97 + i)}hm?" for i in range(10)]
    asked = [
        params(seed=i, max_tokens=100, allowed_token_ids=[*range(64, 72), *llm.get_tokenizer().encode("hm?")])
        for i in range(10)
    ]
    outputs = generate(llm, prompts, asked)
    for output in outputs:
        assert forced(output) == ("FFF.." * 20)
        assert len(output.outputs[0].token_ids) == 100
    assert counts.accepted > 50
    assert counts.drafted - counts.accepted > 50


def test_maximum_is_kept(tiny):
    config = {"thresholds": LOST, "clarification": {"text": "hm?", "cooldown": 1, "max_per_request": 4}}
    llm = engine(tiny, sampler="entropix", sampler_config=config, speculative_config=NGRAM)
    outputs = generate(llm, PROMPTS, [params(seed=i, max_tokens=60) for i in range(4)])
    assert [forced(output) for output in outputs] == ["FFF." * 4 + "." * 44] * 4


def test_preemption_under_speculation(tiny):
    config = {"thresholds": LOST, "clarification": {"text": "hm?", "cooldown": 1, "max_per_request": 1000}}
    llm = engine(
        tiny,
        sampler="entropix",
        sampler_config=config,
        speculative_config=NGRAM,
        block_size=32,
        num_gpu_blocks_override=14,
        max_model_len=256,
        enable_prefix_caching=False,
    )
    preempted = []
    scheduler = scheduler_of(llm)
    original = scheduler._preempt_request
    scheduler._preempt_request = lambda *args, **kwargs: (preempted.append(1), original(*args, **kwargs))[1]
    outputs = generate(
        llm, ["hm?" * 12, "x" * 50, "hm?y" * 10, "abc" * 16, "z" * 44], [params(seed=i, max_tokens=80) for i in range(5)]
    )
    assert preempted
    assert [forced(output) for output in outputs] == ["FFF." * 20] * 5


def test_opted_out_and_greedy_rows_equal_speculation_without_the_plugin(tiny):
    asked = [
        params(temperature=0.0, extra_args={}),
        params(seed=1, top_k=5, extra_args={"entropix": "off"}),
        params(seed=2, temperature=0.7, top_p=0.8, extra_args={"entropix": "off"}),
    ]
    plain = generate(engine(tiny, speculative_config=NGRAM), PROMPTS[:3], asked)
    llm = engine(tiny, sampler="entropix", speculative_config=NGRAM)
    mixed = generate(llm, [PROMPTS[3], *PROMPTS[:3], PROMPTS[3]], [params(seed=7), *asked, params(seed=8)])
    assert tokens(mixed[1:4]) == tokens(plain)


def test_a_forced_token_waits_for_the_grammar(tiny):
    from vllm.sampling_params import StructuredOutputsParams

    config = {"thresholds": LOST, "clarification": {"text": "hm?", "cooldown": 5}}
    llm = engine(tiny, sampler="entropix", sampler_config=config, speculative_config=NGRAM)
    asked = params(ignore_eos=False, seed=1, structured_outputs=StructuredOutputsParams(regex=r"[a-c]{5}(hm\?|xyz)[a-c]{4}"))
    [output] = generate(llm, ["abcabcabc"], [asked])
    assert output.outputs[0].text[5:8] == "hm?"
    assert forced(output).startswith(".....FFF....")


def test_draft_rows_have_their_own_queries(tiny):
    llm = engine(tiny, sampler="entropix", speculative_config=NGRAM)
    assert adapter_of(llm).rows_per_request == 4
