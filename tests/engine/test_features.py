"""What a request may ask of vLLM means the same under entropix: each on a real engine, mixed in one batch."""

import collections
import json
import math

import pytest
import torch
from scipy.stats import chisquare
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.engine import adapter_of, engine, generate, worker_of
from tests.support.runners import is_v2
from vllm_entropix import EntropixConfig, scores, traces
from vllm_entropix.samplers.entropix.presets import preset_names

pytestmark = [pytest.mark.engine, pytest.mark.both_runners]

PROMPTS = ["The quick brown fox", "0123456789", "a", "Once upon a time there was", "?!", "zzzzzzzzzzzzzzzzzzzz"]
OFF = {"entropix": "off"}
TRACED = {"entropix_trace": "on"}


def params(**settings):
    from vllm import SamplingParams

    return SamplingParams(**{"max_tokens": 16, "ignore_eos": True, **settings})


def tokens(outputs):
    return [list(completion.token_ids) for output in outputs for completion in output.outputs]


@pytest.fixture
def llm(tiny):
    return engine(tiny, sampler="entropix", sampler_config={"trace": {"default": False}}, max_logprobs=512)


# Parameters whose rows must come out as they do without the plugin.
UNTOUCHED = [
    {"temperature": 0.0},
    {"temperature": 0.0, "presence_penalty": 1.5, "logprobs": 5},
    {"seed": 1, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "extra_args": OFF},
    {"seed": 2, "temperature": 1.3, "logprobs": 3, "extra_args": OFF},
    {"seed": 3, "top_p": 0.5, "logit_bias": {65: 3.0}, "bad_words": ["<300>"], "extra_args": OFF},
    {"seed": 4, "top_k": 5, "repetition_penalty": 1.2, "allowed_token_ids": list(range(40, 200)), "extra_args": OFF},
]


def with_logprobs(outputs):
    return [
        [
            {token: (value.logprob, value.rank) for token, value in position.items()}
            for completion in output.outputs
            for position in (completion.logprobs or [])
        ]
        for output in outputs
    ]


@pytest.fixture(scope="module")
def without_plugin(tiny):
    llm = engine(tiny, max_logprobs=512)
    outputs = generate(llm, PROMPTS, [params(**settings) for settings in UNTOUCHED])
    return tokens(outputs), with_logprobs(outputs)


def test_opted_out_and_greedy_rows_equal_vllm_without_the_plugin(without_plugin, llm):
    mixed_prompts, mixed_params = [], []
    for index, (prompt, settings) in enumerate(zip(PROMPTS, UNTOUCHED, strict=True)):
        mixed_prompts += [PROMPTS[-index], prompt]
        mixed_params += [params(seed=100 + index), params(**settings)]
    outputs = generate(llm, mixed_prompts, mixed_params)
    assert tokens(outputs[1::2]) == without_plugin[0]
    for got, want in zip(with_logprobs(outputs[1::2]), without_plugin[1], strict=True):
        assert [list(position) for position in got] == [list(position) for position in want]
        for position, expected in zip(got, want, strict=True):
            for token, (logprob, rank) in expected.items():
                assert position[token][0] == pytest.approx(logprob, abs=2e-3)  # another batch, other rounding
                assert position[token][1] == rank
    # The rows between them were really sampled by entropix.
    alone = generate(llm, [PROMPTS[0]], [params(seed=100, extra_args=OFF)])
    assert tokens(alone) != tokens(outputs[:1])


def scores_by_hand(records):
    """The scores that a trace of drawn tokens tells."""
    entropies = [record.entropy for record in records]
    return {
        "tokens": len(records),
        "entropy_mean": math.fsum(entropies) / len(entropies),
        "entropy_max": max(entropies),
        "entropy_first": entropies[0],
        "varentropy_mean": math.fsum(record.varentropy for record in records) / len(records),
        "perplexity": math.exp(-math.fsum(record.logprob for record in records) / len(records)),
        "margin_min": min(record.margin for record in records),
        "attention_entropy_mean": math.fsum(record.attention_entropy for record in records) / len(records),
    }


MEASURED = {"samplers": "vllm", "entropix_trace": "on", "entropix_scores": "on"}


def assert_measured(outputs, settings):
    """Each has a trace with the request's own parameters, and the scores that follow from it."""
    for output, given in zip(outputs, settings, strict=True):
        [trace], [told] = traces(output), scores(output)
        assert len(trace) == len(output.outputs[0].token_ids)
        for record in trace:
            assert (record.regime, record.forced) == (None, False)
            assert record.temperature == pytest.approx(given.get("temperature", 1.0))
            assert record.alternatives[0][1] - record.alternatives[1][1] == pytest.approx(record.margin, abs=1e-6)
        for token, record in zip(output.outputs[0].token_ids, trace, strict=True):
            probability = dict(record.alternatives).get(token)
            assert probability is None or math.exp(record.logprob) == pytest.approx(probability, rel=1e-4)
        for name, value in scores_by_hand(list(trace)).items():
            assert getattr(told, name) == pytest.approx(value, rel=1e-6), name
        assert (told.share_lelv, told.abstained) == (None, None)


def test_vllms_own_draw_is_measured_and_left_as_it_is(without_plugin, llm):
    """In one batch with rows of entropix."""
    own = [{**settings, "extra_args": MEASURED} for settings in UNTOUCHED]
    mixed = [params(**settings) for index, mine in enumerate(own) for settings in ({"seed": 100 + index}, mine)]
    outputs = generate(llm, [prompt for prompt in PROMPTS for _ in range(2)], mixed)[1::2]
    assert tokens(outputs) == without_plugin[0]
    assert_measured(outputs, UNTOUCHED)


def test_a_server_with_vllms_sampler_and_signals(tiny, without_plugin):
    """Draws as without the plugin, traced and scored or not."""
    asked = [MEASURED if index % 2 else {} for index in range(len(UNTOUCHED))]
    llm = engine(tiny, sampler="vllm", sampler_config={"signals": True}, max_logprobs=512)
    settings = [{**given, "extra_args": {**extra}} for given, extra in zip(UNTOUCHED, asked, strict=True)]
    outputs = generate(llm, PROMPTS, [params(**given) for given in settings])
    assert tokens(outputs) == without_plugin[0]
    assert [traces(output) + scores(output) for output in outputs[::2]] == [[None, None]] * 3
    assert_measured(outputs[1::2], UNTOUCHED[1::2])


def test_scores_of_entropix_without_a_trace_and_an_answer_that_abstains(llm):
    asks = [
        {"entropix_trace": "on", "entropix_scores": "on"},
        {"entropix_scores": "on"},
        {"entropix_abstain_score": "entropy_mean", "entropix_abstain_above": 0.0},
        {"entropix_abstain_score": "entropy_mean", "entropix_abstain_below": 0.0},
        {},
    ]
    outputs = generate(llm, [PROMPTS[0]] * len(asks), [params(seed=5, extra_args=ask) for ask in asks])
    assert len({tuple(token_ids) for token_ids in tokens(outputs)}) == 1
    [trace], [told] = traces(outputs[0]), scores(outputs[0])
    for name, value in scores_by_hand(list(trace)).items():
        assert getattr(told, name) == pytest.approx(value, rel=1e-6), name
    shares = [told.share_lelv, told.share_helv, told.share_lehv, told.share_hehv, told.share_adaptive]
    assert sum(shares) == pytest.approx(1)
    assert traces(outputs[1]) == [None]
    assert scores(outputs[1])[0].entropy_mean == pytest.approx(told.entropy_mean, abs=1e-3)
    assert [scores(output)[0].abstained for output in outputs[:4]] == [None, None, True, False]
    ends = [(output.outputs[0].finish_reason, output.outputs[0].stop_reason) for output in outputs]
    assert ends == [("length", None)] * 2 + [("length", "entropix_abstain")] + [("length", None)] * 2
    assert scores(outputs[4]) == [None]
    [several] = generate(llm, [PROMPTS[1]], [params(seed=6, n=3, extra_args={"entropix_scores": "on"})])
    assert len({told.entropy_mean for told in scores(several)}) == 3


class Allocated(TorchDispatchMode):
    """Notes the shape of each tensor that is allocated for its own sake."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.empty.memory_format:
            self.shapes.append(tuple(result.shape))
        return result


def test_vllm_measures_room_for_the_logits_that_are_kept(llm):
    """With what its own sampler takes, before it allocates the cache."""
    runner = adapter_of(llm).runner
    model = runner.model_config
    with torch.inference_mode(), Allocated() as allocated:
        runner._dummy_sampler_run(hidden_states=torch.zeros(3, model.get_hidden_size()))
    assert (3, model.get_vocab_size()) in allocated.shapes


def test_each_sequence_has_its_own_regime_and_parameters(llm):
    outputs = generate(llm, PROMPTS, [params(seed=7, extra_args=TRACED, max_tokens=24)] * len(PROMPTS))
    steps = list(zip(*[list(traces(output)[0]) for output in outputs], strict=True))
    assert any(len({record.regime for record in step}) > 1 for step in steps)
    assert all(len({record.entropy for record in step}) == len(PROMPTS) for step in steps)


def test_a_seeded_request_gives_the_same_alone_and_in_a_crowd(llm):
    needle = params(seed=42, max_tokens=32)
    [alone] = tokens(generate(llm, [PROMPTS[0]], [needle]))
    crowd = [params(seed=i, max_tokens=8 + 5 * i) for i in range(11)] + [params(temperature=0.0), params(extra_args=OFF)]
    for place in (0, 5, 13):
        prompts = [PROMPTS[i % len(PROMPTS)] for i in range(13)]
        outputs = generate(llm, [*prompts[:place], PROMPTS[0], *prompts[place:]], [*crowd[:place], needle, *crowd[place:]])
        assert tokens(outputs)[place] == alone


def test_base_and_preset_per_request(llm):
    ask = [
        {},
        {"entropix_preset": "torch-2024-10"},
        {"entropix_base": "request"},
        {"entropix_temperature": 0.1, "entropix_top_k": 3, "entropix_top_p": 0.2, "entropix_min_p": 0.0},
    ]
    outputs = generate(
        llm, [PROMPTS[3]] * 4, [params(seed=1, temperature=0.5, top_k=7, top_p=0.8, extra_args={**TRACED, **a}) for a in ask]
    )
    first = [traces(output)[0][0] for output in outputs]
    assert {record.entropy for record in first} == {first[0].entropy}  # the same prompt, the same metrics
    server = EntropixConfig()
    assert first[0].regime == "LEHV"
    # LEHV takes top_p from the base, and scales T0 and K0.
    assert [round(record.top_p, 5) for record in first] == [0.9, 0.9, 0.8, 0.2]
    assert [round(record.min_p, 5) for record in first] == [0.03, 0.0, 0.0, 0.0]
    wide = 1 + server.lehv.top_k_disagreement * (1 - first[0].agreement)
    assert [record.top_k for record in first] == [int(27 * wide), int(27 * wide), int(7 * wide), max(5, int(3 * wide))]
    warm = server.lehv.temperature_offset + server.lehv.temperature_interaction * first[0].interaction_strength
    assert [record.temperature for record in first] == pytest.approx(
        [min(1.5, base * warm) for base in (0.666, 0.666, 0.5, 0.1)], rel=1e-5
    )


def test_wrong_settings_are_refused_and_the_engine_goes_on(llm):
    for bad, named in (
        ({"entropix_temprature": 1}, "entropix_temprature"),
        ({"entropix": "perhaps"}, "perhaps"),
        ({"entropix_top_p": 1.5}, "1.5"),
        ({"entropix_preset": "gpt"}, ", ".join(sorted({*preset_names()} - {"signals"}))),
    ):
        with pytest.raises(ValueError, match=named):
            generate(llm, ["a"], [params(extra_args=bad)])
    assert len(tokens(generate(llm, ["a"], [params()]))[0]) == 16


def test_drawn_tokens_follow_the_distribution(llm, tiny):
    """Tokens of many seeds against the distribution that the science gives for the same logits (chi-square test)."""
    from transformers import AutoModelForCausalLM

    from vllm_entropix.sampling import AttentionStatistics, EntropixSampler

    prompt = PROMPTS[3]
    outputs = generate(llm, [prompt] * 32 * 25, [params(seed=seed, max_tokens=1, extra_args=TRACED) for seed in range(32 * 25)])
    record = traces(outputs[0])[0][0]
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([outputs[0].prompt_token_ids])).logits[:, -1]
    measured = AttentionStatistics(
        *(
            torch.tensor([getattr(record, name)])
            for name in ("attention_entropy", "attention_varentropy", "agreement", "interaction_strength")
        )
    )
    ids, probabilities = EntropixSampler(EntropixConfig()).decide(logits, measured).distribution()
    expected = dict(zip(ids[0].tolist(), (probabilities[0] * len(outputs)).tolist(), strict=True))
    drawn = collections.Counter(token for [token] in tokens(outputs))
    assert set(drawn) <= set(expected)
    often = [token for token, count in expected.items() if count >= 5]
    rare = [token for token in expected if token not in often]
    observed = [drawn[token] for token in often] + [sum(drawn[token] for token in rare)] * bool(rare)
    wanted = [expected[token] for token in often] + [sum(expected[token] for token in rare)] * bool(rare)
    scale = sum(observed) / sum(wanted)
    assert len(observed) > 3
    assert chisquare(observed, [w * scale for w in wanted]).pvalue > 1e-3


MASKED = {"return_sampling_mask": True, "logprobs_mode": "processed_logprobs", "max_logprobs": 512}
ON_V2 = pytest.mark.skipif(not is_v2(), reason="vLLM has sampling masks on Model Runner V2 alone")


def masks(output):
    return [set(ids) for ids in output.outputs[0].sampling_mask.token_ids]


@ON_V2
def test_a_sampling_mask_is_the_support_of_what_was_drawn_from(tiny):
    # HELV everywhere: two forced tokens, then four rows of its own parameters; or the best of n of ADAPTIVE.
    forcing = {
        "thresholds": {"lelv": {"entropy_below": 0.0}, "helv": {"entropy_above": 0.0, "varentropy_below": 4096.0}},
        "clarification": {"text": "hm", "cooldown": 4},
    }
    best_of_n = {"thresholds": {"lelv": {"entropy_below": 0.0}}, "adaptive": {"samples": 3}}
    # vLLM wants a top_k with each request, to bound the mask; entropix has its own.
    settings = {"top_k": 2, "logprobs": 512, "extra_args": TRACED}
    plain = [
        {"seed": 1, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "extra_args": OFF},
        {"seed": 2, "top_k": 512, "min_p": 0.01, "extra_args": OFF},
    ]
    without_plugin = generate(engine(tiny, **MASKED), PROMPTS[:2], [params(**one) for one in plain])
    for config in (forcing, best_of_n):
        llm = engine(tiny, sampler="entropix", sampler_config=config, **MASKED)
        outputs = generate(llm, [*PROMPTS[:2], *PROMPTS[:3]], [params(**one) for one in (*plain, *[settings] * 3)])
        assert tokens(outputs[:2]) == tokens(without_plugin)
        assert [masks(output) for output in outputs[:2]] == [masks(output) for output in without_plugin]
        widest = 0
        for output in outputs[2:]:
            completion = output.outputs[0]
            rows = zip(masks(output), completion.token_ids, completion.logprobs, traces(output)[0], strict=True)
            for mask, token, logprobs, record in rows:
                assert token in mask
                assert mask == {token for token, value in logprobs.items() if value.logprob > -math.inf}
                assert sum(math.exp(logprobs[token].logprob) for token in mask) == pytest.approx(1.0, abs=1e-4)
                assert len(mask) <= (1 if record.forced else record.top_k)
                widest = max(widest, len(mask))
            assert [record.forced for record in traces(output)[0]][:6] == [config is forcing] * 2 + [False] * 4
        assert widest > 5


@ON_V2
def test_sampling_masks_survive_that_an_engine_process_verifies_its_config_again(tiny):
    from vllm import EngineArgs

    config = EngineArgs(str(tiny), additional_config={"entropix": {}}, **MASKED).create_engine_config()
    config.__post_init__()  # as vLLM does after the handshake


@ON_V2
def test_a_slot_without_a_request_is_left_alone(llm):
    """vLLM 0.33 fills the sampler's slots with parameters of nobody when it profiles memory on a GPU."""
    from vllm import SamplingParams

    sampler = worker_of(llm).model_runner.sampler
    sampler.add_request(3, SamplingParams.for_sampler_warmup())
    sampler.apply_staged_writes()
    assert len(tokens(generate(llm, PROMPTS[:1], [params()]))[0]) == 16


def test_n_stop_strings_and_min_tokens(llm):
    [several, stopped, least] = generate(
        llm,
        [PROMPTS[0]] * 3,
        [
            params(n=3, seed=5, extra_args=TRACED),
            params(seed=6, stop=["<4"], max_tokens=200, extra_args=TRACED),
            params(seed=7, min_tokens=10, ignore_eos=False, stop_token_ids=list(range(100)), max_tokens=40, extra_args=TRACED),
        ],
    )
    assert len({tuple(completion.token_ids) for completion in several.outputs}) == 3
    assert stopped.outputs[0].finish_reason == "stop"
    assert len(least.outputs[0].token_ids) >= 10
    for output in (several, stopped, least):
        for completion, trace in zip(output.outputs, traces(output), strict=True):
            assert len(trace) == len(completion.token_ids)
            assert trace.not_kept == 0


def test_masks_and_penalties_are_seen_by_the_metrics(llm):
    allowed = list(range(100, 104))
    outputs = generate(
        llm,
        [PROMPTS[1]] * 4,
        [
            params(seed=1, allowed_token_ids=allowed, extra_args=TRACED),
            params(seed=1, logit_bias={7: 100.0}, extra_args=TRACED),
            params(seed=1, bad_words=["<400>", "<401>"], max_tokens=64),
            params(seed=1, presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=1.3),
        ],
    )
    masked, biased, banned, _ = tokens(outputs)
    assert set(masked) <= set(allowed)
    assert all(record.entropy <= 2.0 for record in traces(outputs[0])[0])  # of four tokens at most 2 bits
    assert set(biased) == {7}
    assert {record.regime for record in traces(outputs[1])[0]} == {"LELV"}
    assert not {400, 401} & set(banned)


def test_grammar(llm):
    from vllm.sampling_params import StructuredOutputsParams

    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}}, "required": ["a", "b"]}
    outputs = generate(
        llm,
        [PROMPTS[2]] * 3,
        [
            params(
                seed=1,
                max_tokens=100,
                ignore_eos=False,
                structured_outputs=StructuredOutputsParams(json=schema),
                extra_args=TRACED,
            ),
            params(seed=2, max_tokens=10, ignore_eos=False, structured_outputs=StructuredOutputsParams(choice=["yes", "no"])),
            params(seed=3),
        ],
    )
    assert outputs[1].outputs[0].text in ("yes", "no")
    parsed = outputs[0].outputs[0]
    if parsed.finish_reason == "stop":
        json.loads(parsed.text)
    assert parsed.text.lstrip().startswith("{")
    # One token was left after the brace's options: nothing to be unsure of.
    assert any(record.regime == "LELV" for record in traces(outputs[0])[0])


def test_chat_and_generate_are_sampled_alike(llm):
    [chatted] = llm.chat([{"role": "user", "content": "hi"}], params(seed=9, extra_args=TRACED), use_tqdm=False)
    [generated] = generate(llm, ["user: hi\nassistant:"], [params(seed=9, extra_args=TRACED)])
    assert chatted.prompt_token_ids == generated.prompt_token_ids
    assert tokens([chatted]) == tokens([generated])
    assert traces(chatted)[0] is not None


def test_nothing_is_traced_unless_asked_for(llm):
    [output] = generate(llm, ["a"], [params()])
    assert traces(output) == [None]
    assert output.kv_transfer_params is None


def test_a_trace_is_capped_and_says_so(tiny):
    llm = engine(tiny, sampler="entropix", sampler_config={"trace": {"default": True, "max_tokens": 10}})
    [long, short] = generate(llm, ["a", "b"], [params(max_tokens=25), params(max_tokens=10)])
    assert [(len(trace), trace.not_kept) for trace in (traces(long)[0], traces(short)[0])] == [(10, 15), (10, 0)]


def test_nothing_is_kept_of_ended_requests(llm):
    generate(llm, PROMPTS, [params(max_tokens=2)] * len(PROMPTS))
    generate(llm, ["a"], [params(max_tokens=1)])  # the engine tells of the ended ones with the next step
    table = adapter_of(llm).batch.sequences
    assert len(table) <= 1
    assert table.sampled.sum() <= 1
