"""Exact under speculative decoding: what is verified is entropix's own distribution, forced tokens included."""

import collections
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

import vllm_entropix
from tests.support.engine import adapter_of, engine, generate, scheduler_of, worker_of
from tests.support.models import tiny_llama
from tests.support.runners import is_v2
from vllm_entropix import traces

pytestmark = [
    pytest.mark.engine,
    pytest.mark.both_runners,
    pytest.mark.skipif(not is_v2(), reason="Model Runner V1 refuses speculation together with entropix (test_arguments)"),
]

TRACED = {"entropix_trace": "on"}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
SURE = {
    "thresholds": {"lelv": {"entropy_below": 64.0, "varentropy_below": 4096.0}},
    "forks": {"floor": 0, "inside_words": True, "distance": 4},
}
# Otherwise one continuation has nearly all of the probability, and a test of frequencies proves little.
SPREAD = {"thresholds": {"lelv": {"entropy_below": 0.0}}, "adaptive": {"samples": 2}}
LOST = {"lelv": {"entropy_below": 0.0}, "helv": {"entropy_above": 0.0, "varentropy_below": 4096.0}}
DEMO = Path(vllm_entropix.__file__).parent / "demo_model"
# Its small sibling, hardly trained (tools/demo_model/train.py --size draft): often wrong.
DRAFT = Path(__file__).parents[1] / "data" / "draft_model"
DRAFT_MODEL = {
    "method": "draft_model",
    "model": str(DRAFT),
    "num_speculative_tokens": 2,
    "draft_sample_method": "probabilistic",
}
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


def assert_argmax_alike(outputs, others):
    """The same tokens, with records that differ by the rounding of another batch at most."""
    assert tokens(outputs) == tokens(others)
    for one, other in zip(outputs, others, strict=True):
        for a, b in zip(traces(one)[0], traces(other)[0], strict=True):
            assert a.regime == b.regime == "LELV"
            assert a.entropy == pytest.approx(b.entropy, abs=1e-4)
            assert a.attention_entropy == pytest.approx(b.attention_entropy, abs=1e-4)
            # Of the token that was kept, drafted or not.
            assert a.logprob == pytest.approx(b.logprob, abs=1e-3)
            assert a.margin == pytest.approx(b.margin, abs=1e-4)


def trim_drafts(llm, monkeypatch):
    """Let the runner verify half of the drafts, those of the highest confidence, as with DSpark's drafter on a GPU.

    The device alone knows how many of each request's drafts these are; the host has the scheduled ones, or spreads them evenly.

    Returns:
        Per step, the rows of each request as the device and as the host has them.
    """
    from vllm.v1.worker.gpu.spec_decode.adaptive_verification import AdaptiveVerificationManager

    confidences = torch.Generator().manual_seed(0)
    steps = []

    class Trimming(AdaptiveVerificationManager):
        def get_num_tokens(self, *args, **kwargs):
            super().get_num_tokens(*args, **kwargs)
            drafts, others, _ = self._batch_budget
            self._batch_budget = drafts, others, sum(drafts.values()) // 2
            return sum(others.values()) + self._batch_budget[2]

        def compact_batch(self, *args, **kwargs):
            compacted = super().compact_batch(*args, **kwargs)
            self.on_host = compacted[1].tolist()
            return compacted

        def reallocate_drafts(self, *args, **kwargs):
            found = super().reallocate_drafts(*args, **kwargs)
            steps.append((found[0].tolist(), self.on_host))
            return found

        def record_confidences(self, *args, **kwargs):  # a drafter of n-grams has none
            self._confidence_probs.copy_(torch.rand(self._confidence_probs.shape, generator=confidences))

    runner = worker_of(llm).model_runner
    with monkeypatch.context() as without_cuda:
        without_cuda.setattr(torch.cuda, "Stream", lambda *args: None)
        without_cuda.setattr(torch.cuda, "Event", lambda *args, **kwargs: None)
        manager = Trimming(runner.req_states, runner.input_buffers.query_start_loc, 1, max_total_logits=1 << 20)
    manager.cost_tables = np.ones(64), np.ones(1 << 15)
    monkeypatch.setattr(runner, "adaptive_verification", manager)
    monkeypatch.setattr(runner.speculator, "draft_token_confidence_probs", None, raising=False)
    monkeypatch.setattr(runner.rejection_sampler, "enable_adaptive_verification", True)
    return steps


def test_argmax_gives_the_same_tokens_and_traces(tiny, monkeypatch):
    settings = {"max_tokens": 24, "allowed_token_ids": list(range(64, 80))}
    asked = [params(**settings)] * len(PROMPTS)
    # So many branches that no bound is met: which of them fork first doesn't matter.
    forks = {"entropix_forks": 64, "entropix_fork_entropy": 0, "entropix_fork_select": "all"}
    forked = [params(**{**settings, "max_tokens": 12}, extra_args=forks)]
    plain, speculated, counts = both(tiny, SURE, [*PROMPTS, PROMPTS[0]], [*asked, *forked])
    assert 0 < counts.accepted < counts.drafted
    branches = [sorted(list(completion.token_ids) for completion in outputs.pop().outputs) for outputs in (plain, speculated)]
    assert branches[0] == branches[1]
    assert len(branches[0]) > 4
    assert_argmax_alike(speculated, plain)

    llm = engine(tiny, sampler="entropix", sampler_config=SURE, speculative_config=NGRAM)  # the one that is open
    steps = trim_drafts(llm, monkeypatch)
    assert_argmax_alike(generate(llm, PROMPTS, asked), plain)
    assert sum(device != host for device, host in steps) > 3


def exact_distribution(llm, prompt, allowed, length):
    """Probability of each continuation, from processed log-probabilities of first tokens, for which nothing is drafted."""
    probability = {(): 1.0}
    for place in range(length):
        prefixes = list(itertools.product(allowed, repeat=place))
        asked = params(max_tokens=1, logprobs=len(allowed), allowed_token_ids=allowed, extra_args={})
        outputs = generate(llm, [{"prompt_token_ids": [*prompt, *prefix]} for prefix in prefixes], [asked] * len(prefixes))
        for prefix, output in zip(prefixes, outputs, strict=True):
            [drawn_from] = output.outputs[0].logprobs
            for token in allowed:
                logprob = drawn_from[token].logprob if token in drawn_from else -math.inf
                probability[(*prefix, token)] = probability[prefix] * math.exp(logprob)
    return {drawn: value for drawn, value in probability.items() if len(drawn) == length}


def assert_distributed(drawn, expected, least_cells):
    """Chi-square test of what was drawn; rare outcomes count together."""
    counts, total = collections.Counter(drawn), len(drawn)
    assert sum(expected.values()) == pytest.approx(1.0, abs=1e-3)
    assert all(expected[one] > 0 for one in counts), "drawn, but impossible"
    often = [one for one, value in expected.items() if value * total >= 5]
    assert len(often) >= least_cells
    observed = [counts[one] for one in often]
    wanted = [expected[one] * total for one in often]
    if total - sum(wanted) >= 1:
        observed.append(total - sum(observed))
        wanted.append(total - sum(wanted))
    wanted = [value * sum(observed) / sum(wanted) for value in wanted]
    assert chisquare(observed, wanted).pvalue > 1e-3, list(zip(often, observed, wanted, strict=False))


def test_distribution_is_exact(tmp_path):
    """Three tokens are counted together, so that each position's conditioning on the drafts before it counts."""
    samples, length, allowed = 256, 3, list(range(64, 68))
    llm = engine(
        tiny_llama(tmp_path, logits_scale=0.5),
        sampler="entropix",
        sampler_config=SPREAD,
        speculative_config=NGRAM,
        logprobs_mode="processed_logprobs",
        max_logprobs=len(allowed),
    )
    # Its repetitions suggest what is likely as often as not.
    prompt = [66, 65, 66, 67, 67, 64, 64, 65, 66, 65, 65, 65]
    expected = exact_distribution(llm, prompt, allowed, length)
    counts = Speculation(llm)
    asked = [params(seed=seed, max_tokens=length, allowed_token_ids=allowed, extra_args={}) for seed in range(samples)]
    outputs = generate(llm, [{"prompt_token_ids": prompt}] * samples, asked)
    assert counts.accepted > 30
    assert counts.drafted - counts.accepted > 30
    assert_distributed([tuple(ids) for ids in tokens(outputs)], expected, least_cells=10)


def test_a_draft_model(monkeypatch):
    """Its drafts have probabilities of their own, which verification takes into account."""
    from triton import language
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import tldevice

    # The one function of CUDA's library in these kernels, which Triton's interpreter hasn't.
    monkeypatch.setattr(tldevice, "log1p", lambda x: language.log(1.0 + x))
    samples, length = 160, 3
    arguments = {"sampler": "entropix", "sampler_config": SPREAD, "max_model_len": 256}
    scored = {"logprobs_mode": "processed_logprobs", "max_logprobs": 4}
    prompts = ["What is 384 + 259?", "Once upon a time there was", "Who are you?"]
    greedy = [params(temperature=0.0, max_tokens=12)] * len(prompts)
    plain = generate(engine(DEMO, **arguments, **scored), prompts, greedy)
    llm = engine(DEMO, speculative_config=DRAFT_MODEL, **arguments, **scored)
    counts = Speculation(llm)
    assert tokens(generate(llm, prompts, greedy)) == tokens(plain)
    assert 0 < counts.accepted < counts.drafted

    # Both models spread over these here, and differently.
    allowed = [llm.get_tokenizer().encode(text, add_special_tokens=False)[0] for text in ",.12"]
    prompt = llm.get_tokenizer().encode("12, 1. 2, 21. 12", add_special_tokens=False)
    expected = exact_distribution(llm, prompt, allowed, length)
    counts = Speculation(llm)
    asked = [params(seed=seed, max_tokens=length, allowed_token_ids=allowed, extra_args={}) for seed in range(samples)]
    outputs = generate(llm, [{"prompt_token_ids": prompt}] * samples, asked)
    assert counts.accepted > 15
    assert counts.drafted - counts.accepted > 15
    assert_distributed([tuple(ids) for ids in tokens(outputs)], expected, least_cells=5)


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
    outputs = generate(llm, PROMPTS, [params(seed=i, max_tokens=24) for i in range(4)])
    assert [forced(output) for output in outputs] == ["FFF." * 4 + "." * 8] * 4


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
        params(temperature=0.0, max_tokens=20, extra_args={}),
        params(seed=1, top_k=5, max_tokens=20, extra_args={"entropix": "off"}),
        params(seed=2, temperature=0.7, top_p=0.8, max_tokens=20, extra_args={"entropix": "off"}),
    ]
    plain = generate(engine(tiny, speculative_config=NGRAM), PROMPTS[:3], asked)
    llm = engine(tiny, sampler="entropix", speculative_config=NGRAM)
    mixed = generate(
        llm, [PROMPTS[3], *PROMPTS[:3], PROMPTS[3]], [params(seed=7, max_tokens=20), *asked, params(seed=8, max_tokens=20)]
    )
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
