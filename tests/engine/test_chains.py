"""Chains in real engines: what is drawn follows the chain's exact joint distribution, state and drafts included."""

import itertools
import json
import math
import time
import urllib.error
import urllib.request

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoTokenizer

from tests.engine.test_speculation import NGRAM, Speculation, assert_distributed, params, tokens
from tests.support.engine import adapter_of, close_engine, engine, generate
from tests.support.models import tiny_llama
from tests.support.runners import is_v2
from tests.support.server import serve
from vllm_entropix import traces
from vllm_entropix.demo_model import shipped_model
from vllm_entropix.samplers import Chain, names
from vllm_entropix.samplers.chained import Chained

pytestmark = [pytest.mark.engine, pytest.mark.both_runners]

ALLOWED = list(range(64, 68))
LENGTH = 3
# Its repetitions suggest what is likely as often as not, to drafters and to DRY.
PROMPT = [66, 65, 66, 67, 67, 64, 64, 65, 66, 65, 65, 65]
DRY = {"dry_multiplier": 0.8, "dry_base": 1.75, "dry_allowed_length": 1}
XTC = {"xtc_probability": 0.5, "xtc_threshold": 0.15}
CHAINS = {
    "mirostat_v2": {"mirostat_tau": 1.4, "mirostat_eta": 0.9},
    "adaptive_p": {"adaptive_target": 0.3, "adaptive_decay": 0.5},
    "xtc": XTC,
    "dry": DRY,
    "dry;xtc;temperature;mirostat_v2": {**DRY, **XTC, "mirostat_tau": 1.4, "mirostat_eta": 0.9},
}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """An engine whose rows are close to even, with drafts where the runner may have some."""
    drafts = {"speculative_config": NGRAM} if is_v2() else {}
    return engine(
        tiny_llama(tmp_path_factory.mktemp("even"), logits_scale=0.5),
        sampler="dry;temperature",
        logprobs_mode="processed_logprobs",
        max_logprobs=len(ALLOWED),
        **drafts,
    )


@pytest.fixture(scope="module")
def model_rows(llm):
    """Prefix of an answer → the model's own logits after it, float64 ``[1, vocabulary]``, where all but ALLOWED are masked."""
    prefixes = [prefix for place in range(LENGTH) for prefix in itertools.product(ALLOWED, repeat=place)]
    asked = params(
        max_tokens=1, temperature=1.0, logprobs=len(ALLOWED), allowed_token_ids=ALLOWED, extra_args={"entropix": "off"}
    )
    outputs = generate(llm, [{"prompt_token_ids": [*PROMPT, *prefix]} for prefix in prefixes], [asked] * len(prefixes))
    rows = {}
    for prefix, output in zip(prefixes, outputs, strict=True):
        row = rows[prefix] = torch.full((1, 512), -torch.inf, dtype=torch.float64)
        for token, drawn in output.outputs[0].logprobs[0].items():
            row[0, token] = drawn.logprob
    return rows


def joint(model_rows, text, settings):
    """Probability of each answer of LENGTH tokens, by the chain that notebooks have."""
    neutral = {"temperature": 1.0} if "temperature" in text else {}
    breakers = {"dry_sequence_breakers": []} if "dry" in text else {}
    chain = Chain.parse(text, {**neutral, **breakers, **settings})
    found = {}
    for answer in itertools.product(ALLOWED, repeat=LENGTH):
        run, probability = chain.begin(), 1.0
        for place, token in enumerate(answer):
            given = run.distribution(model_rows[answer[:place]], [[*PROMPT, *answer[:place]]])[0]
            probability *= float(given[token])
            if probability == 0:
                break
            run.advance([token])
        found[answer] = probability
    assert math.isclose(sum(found.values()), 1.0, abs_tol=1e-6)
    return found


def test_there_is_room_for_texts_before_requests_wait(llm):
    """The server's own chain looks at them. Model Runner V2 keeps all texts itself."""
    if not is_v2():
        kept = adapter_of(llm)._text
        assert (len(kept), kept.shape[1]) == (adapter_of(llm).batch.sequences.slots, 512)


@pytest.mark.parametrize("text", CHAINS)
def test_what_is_drawn_is_exact(llm, model_rows, text):
    """Three tokens are counted together, so that each position's state and text count, behind rejected drafts, too."""
    samples = 160
    expected = joint(model_rows, text, CHAINS[text])
    counts = Speculation(llm) if is_v2() else None
    said = {"samplers": text, **CHAINS[text], **({"dry_sequence_breakers": [1]} if "dry" in text else {})}
    asked = [
        params(seed=seed, max_tokens=LENGTH, temperature=1.0, allowed_token_ids=ALLOWED, extra_args=said)
        for seed in range(samples)
    ]
    outputs = generate(llm, [{"prompt_token_ids": PROMPT}] * samples, asked)
    if counts is not None:
        assert counts.accepted > 20
        assert counts.drafted - counts.accepted > 20
    assert_distributed([tuple(ids) for ids in tokens(outputs)], expected, least_cells=6)


# Sampler → a setting of it, and values of which the first that changes the distribution is drawn with.
SHARES = tuple(step / 20 for step in range(19, 0, -1))
TRIED = {
    "adaptive_p": ("adaptive_target", (0.05, 0.95)),
    "dry": ("dry_multiplier", (0.8,)),
    "dynatemp": ("dynatemp_range", (0.3, 3.0)),
    "edt": ("edt_theta", (1.0, 4.0)),
    "epsilon": ("epsilon_cutoff", SHARES[::-1]),
    "eta": ("eta_cutoff", SHARES[::-1]),
    "greedy_threshold": ("greedy_threshold", (0.99,)),
    "min_p": ("min_p", SHARES[::-1]),
    "mirostat": ("mirostat_tau", (1.0, 0.5, 0.1)),
    "mirostat_v2": ("mirostat_tau", (1.0, 0.5, 0.1)),
    "p_less": (None, (None,)),
    "penalties": ("frequency_penalty", (0.3,)),
    "quadratic": ("smoothing_factor", (0.3, 2.0)),
    "temperature": ("temperature", (0.5,)),
    "tfs": ("tfs_z", SHARES),
    "top_a": ("top_a", (*SHARES[::-1], 1.0)),
    "top_h": ("top_h", SHARES),
    "top_k": ("top_k", (3, 2)),
    "top_n_sigma": ("top_n_sigma", (1.5, 1.0, 0.5)),
    "top_p": ("top_p", SHARES),
    "typ_p": ("typ_p", SHARES),
    "xtc": ("xtc_probability", (0.6,)),
}
# Temperatures take the temperature's place; filters have more to drop from a distribution that isn't even.
TEMPERATURES = ("temperature", "dynatemp", "edt")
# Fields of a request's own.
OWN = ("temperature", "top_k", "top_p", "min_p")


def chain_that_matters(name, row):
    """(names, settings, probabilities) of a chain in which the sampler changes the distribution of a row of logits."""
    text = name if name in TEMPERATURES else f"temperature;{name}"
    breakers = {"dry_sequence_breakers": []} if name == "dry" else {}
    known, values = TRIED[name]
    plain = Chain.parse("temperature", {"temperature": 0.4}).begin().distribution(row)[0]
    for value in values:
        settings = {"temperature": 0.4, **({} if known is None else {known: value})}
        found = Chain.parse(text, {**settings, **breakers}).begin().distribution(row, [PROMPT])[0]
        if (found - plain).abs().max() > 0.02:
            return text, settings, found
    pytest.fail(f"no value of {known} changes anything")


def test_each_sampler_draws_what_it_says(llm, model_rows):
    """One token of all of them in one batch, beside the chain that notebooks have."""
    assert {*TRIED, "entropix"} == set(names())  # entropix has tests of its own
    # vLLM takes no min_p beside the drafts that this engine has on Model Runner V2.
    tried = [name for name in TRIED if not (is_v2() and name == "min_p")]
    samples, expected, asked = 100, {}, []
    for name in tried:
        text, settings, found = chain_that_matters(name, model_rows[()])
        expected[name] = {token: float(found[token]) for token in ALLOWED}
        own = {key: value for key, value in settings.items() if key in OWN}
        said = {key: value for key, value in settings.items() if key not in OWN} | {"samplers": text}
        said |= {"dry_sequence_breakers": [1]} if name == "dry" else {}
        asked += [params(seed=seed, max_tokens=1, allowed_token_ids=ALLOWED, extra_args=said, **own) for seed in range(samples)]
    drawn = [output.outputs[0].token_ids[0] for output in generate(llm, [{"prompt_token_ids": PROMPT}] * len(asked), asked)]
    for number, name in enumerate(tried):
        mine, best = drawn[number * samples : (number + 1) * samples], max(expected[name], key=expected[name].get)
        if expected[name][best] > 0.99:  # too little of the others for a test of frequencies
            assert sum(token != best for token in mine) <= 8, name
            assert all(expected[name][token] > 0 for token in mine), name
        else:
            assert_distributed(mine, expected[name], least_cells=1)


def test_each_of_several_answers_has_its_own_state(llm):
    """vLLM gives each of n the seed that follows the last one's."""
    said = {"samplers": "dry;mirostat_v2", **DRY, "dry_sequence_breakers": [1], "mirostat_tau": 2.0, "mirostat_eta": 0.9}
    asked = params(seed=5, max_tokens=12, temperature=1.0, extra_args={"entropix_trace": "on", **said})
    prompt = {"prompt_token_ids": PROMPT}
    several, alone = asked.clone(), [asked.clone() for _ in range(3)]
    several.n = 3
    for number, one in enumerate(alone):
        one.seed += number
    [together] = generate(llm, [prompt], [several])
    separate = generate(llm, [prompt] * 3, alone)
    assert [list(one.token_ids) for one in together.outputs] == tokens(separate)
    for trace, other in zip(traces(together), separate, strict=True):
        [expected] = traces(other)
        assert [record.mu for record in trace] == pytest.approx([record.mu for record in expected], abs=1e-4)
        assert len({record.mu for record in trace}) > 6


def test_chains_stand_beside_one_another_and_tell_of_themselves(llm):
    """Each request's records follow its own chain; what opts out is drawn as without any of them."""
    asks = [
        {"samplers": "mirostat_v2", "mirostat_tau": 2.0},
        {"samplers": "dry;xtc", **DRY, **XTC},
        {"samplers": "min_p"},
        {"samplers": ""},
        {"samplers": "dry;entropix", **DRY},
        {"entropix": "off", "entropix_trace": "off"},
    ]
    asked = [params(max_tokens=12, seed=3, temperature=0.8, extra_args={"entropix_trace": "on", **said}) for said in asks]
    outputs = generate(llm, [{"prompt_token_ids": PROMPT}] * len(asked), asked)
    mirostat, dry, min_p, empty, entropix = (list(traces(output)[0]) for output in outputs[:5])
    assert traces(outputs[5]) == [None]
    assert mirostat[0].mu == 4.0
    assert len({record.mu for record in mirostat}) > 1
    for record in dry:
        assert record.dry_penalty >= 0
        assert record.xtc_share in (0.0, 0.5)
    assert {record.mu for record in (*dry, *min_p, *empty)} == {None}
    assert {record.temperature for record in empty} == {1.0}
    assert {record.dry_penalty for record in (*mirostat, *min_p, *empty)} == {None}
    assert all(record.dry_penalty is not None for record in entropix)


def test_dry_sees_the_whole_text_wherever_the_sequence_has_been(llm):
    """A huge penalty forbids each token that went on with the last one before: no pair of tokens comes twice."""
    said = {"samplers": "dry;temperature", "dry_multiplier": 100, "dry_allowed_length": 1, "dry_sequence_breakers": [1]}
    prompts = [PROMPT, PROMPT[3:], [65, 66, 64]]
    for temperature in (0.0, 1.0):
        asked = [params(max_tokens=10, temperature=temperature, seed=7, extra_args=said)] * len(prompts)
        for prompt, output in zip(prompts, generate(llm, [{"prompt_token_ids": one} for one in prompts], asked), strict=True):
            text = [*prompt, *output.outputs[0].token_ids]
            pairs = list(itertools.pairwise(text))
            assert not set(pairs[len(prompt) - 1 :]) & set(pairs[: len(prompt) - 1])
            assert len(set(pairs[len(prompt) - 1 :])) == len(output.outputs[0].token_ids)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"samplers": "dry;nope"}, "unknown sampler 'nope'"),
        ({"typ_p": 0.5}, "typ_p is a setting of typ_p, which isn't in the chain 'dry;temperature'"),
        ({"dry_penalty_last_n": 600}, "dry_penalty_last_n is 600, but the model has room for 512 tokens"),
        ({"dry_sequence_breakers": ["\udfff"]}, "it has '.udfff', which is no text of 1 to 100 characters"),
    ],
)
def test_a_request_that_cannot_be_is_refused(llm, said, reason):
    with pytest.raises(ValueError, match=reason):
        generate(llm, [{"prompt_token_ids": PROMPT}], [params(max_tokens=1, extra_args=said)])


# --- a server ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    close_engine()
    arguments = ("--max-model-len", "512", "--enforce-eager", "--kv-cache-memory-bytes", str(1 << 28), "--dtype", "float32")
    chain = ("--sampler", "dry;top_n_sigma;xtc;min_p;temperature", "--sampler-config.dry.dry_multiplier", "0.8")
    named = ("--served-model-name", "demo")
    with serve(shipped_model(), tmp_path_factory.mktemp("server") / "log", *chain, *named, *arguments) as url:
        yield url


def post(url, **body):
    """(status, answer) of a completion."""
    data = json.dumps({"model": "demo", "prompt": "Once upon a time", "max_tokens": 12, "seed": 1, **body}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


# Fields that SillyTavern (textgen-settings.js) sends to text-generation-webui, with neutral values.
SILLYTAVERN = {
    "max_new_tokens": 4,
    "temperature": 1,
    "top_p": 1,
    "top_k": 0,
    "min_p": 0,
    "typical_p": 1,
    "typical": 1,
    "sampler_seed": -1,
    "seed": -1,
    "min_length": 0,
    "min_tokens": 0,
    "num_beams": 1,
    "length_penalty": 1,
    "early_stopping": False,
    "add_bos_token": True,
    "dynamic_temperature": False,
    "dynatemp_low": 1,
    "dynatemp_high": 1,
    "dynatemp_range": 0,
    "dynatemp_exponent": 1,
    "smoothing_factor": 0,
    "smoothing_curve": 1,
    "max_tokens_second": 0,
    "stopping_strings": ["\nUser:"],
    "stop": ["\nUser:"],
    "truncation_length": 2048,
    "ban_eos_token": False,
    "ignore_eos": False,
    "skip_special_tokens": True,
    "include_reasoning": True,
    "top_a": 0,
    "tfs": 1,
    "tfs_z": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "mirostat": 0,
    "mirostat_mode": 0,
    "mirostat_tau": 5,
    "mirostat_eta": 0.1,
    "custom_token_bans": "",
    "banned_strings": [],
    "api_type": "ooba",
    "api_server": "http://127.0.0.1:5000",
    "adaptive_target": -0.01,
    "adaptive_decay": 0.9,
    "nsigma": 0,
    "top_n_sigma": 0,
    "min_keep": 0,
    "rep_pen": 1,
    "rep_pen_range": 0,
    "repetition_penalty_range": 0,
    "repetition_decay": 0,
    "repetition_penalty": 1,
    "repeat_penalty": 1,
    "repeat_last_n": 0,
    "encoder_repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "penalty_alpha": 0,
    "skew": 0,
    "temperature_last": True,
    "do_sample": True,
    "guidance_scale": 1,
    "negative_prompt": "",
    "grammar_string": "",
    "n_predict": 4,
    "num_predict": 4,
    "num_ctx": 2048,
    "sampler_priority": ["repetition_penalty", "dry", "temperature", "top_n_sigma", "top_k", "min_p", "xtc"],
    "xtc_threshold": 0.1,
    "xtc_probability": 0,
    "dry_multiplier": 0,
    "dry_allowed_length": 2,
    "dry_base": 1.75,
    "dry_penalty_last_n": 0,
    "dry_sequence_breakers": '["\\n", ":", "\\"", "*"]',
}


@pytest.mark.parametrize("stream", [False, True])
def test_a_body_of_llama_cpps_clients_is_taken(url, stream):
    if stream:
        request = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 4, "stream": True, **SILLYTAVERN}
        data = json.dumps(request | {"xtc_probability": 2}).encode()
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(
                urllib.request.Request(f"{url}/v1/completions", data, {"Content-Type": "application/json"}), timeout=60
            )
        return
    trace = {"vllm_xargs": {"entropix_trace": "on"}}
    status, answer = post(url, **SILLYTAVERN | {"xtc_probability": 0.5, "dry_multiplier": 0.9}, **trace)
    assert status == 200
    assert answer["choices"][0]["entropix"]["sampler"] == "dry;top_n_sigma;xtc;min_p;dynatemp"  # whose range is 0
    records = answer["choices"][0]["entropix"]["tokens"]
    assert {record["xtc_share"] for record in records} <= {0.0, 0.5}
    status, answer = post(url, samplers=["mirostat_v2"], mirostat_tau=2, **trace)
    assert status == 200
    [choice] = answer["choices"]
    assert (choice["entropix"]["sampler"], choice["entropix"]["tokens"][0]["mu"]) == ("mirostat_v2", 4.0)


def test_metrics_count_what_chains_tell(url):
    """Each field of a chain's samplers has a histogram, of the tokens that such a chain drew and of no others."""
    asks = {
        "adaptive_average": {"samplers": "adaptive_p", "adaptive_target": 0.5},
        "dry_penalty": {"samplers": "dry", "dry_multiplier": 0.8},
        "mu": {"samplers": "mirostat_v2"},
        "xtc_share": {"samplers": "xtc", "xtc_probability": 0.5},
    }
    series = {field.name: f"{field.metric_name}_count" for field in Chained.fields}
    assert asks.keys() == series.keys()

    def counted():
        time.sleep(0.6)  # counted a few times a second
        text = urllib.request.urlopen(f"{url}/metrics", timeout=60).read().decode()
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return {sample.name: sample.value for sample in samples if sample.name in series.values()}

    before, drawn = counted(), {}
    for name, said in asks.items():
        status, answer = post(url, vllm_xargs=said)
        assert status == 200
        drawn[series[name]] = answer["usage"]["completion_tokens"]
    after = counted()
    assert {name: after[name] - before[name] for name in after} == drawn


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"xtc_probability": 2}, "xtc_probability is 2, but"),
        ({"typical_p": 0.9}, "typical_p is a setting of typ_p, which isn't in the chain"),
        ({"samplers": "dry;nope"}, "unknown sampler 'nope'"),
        ({"vllm_xargs": {"samplers": "mirostat;adaptive_p"}}, "can't stand in one chain"),
        ({"vllm_xargs": {"dry_multipler": 1}}, "did you mean 'dry_multiplier'"),
        ({"dry_multiplyer": 1}, "unknown setting 'dry_multiplyer'; did you mean 'dry_multiplier'?"),
    ],
)
def test_what_a_body_may_not_say_is_answered_400(url, body, reason):
    status, answer = post(url, **body)
    assert status == 400
    message = answer["error"]["message"]
    assert reason in message
    assert "\n" not in message


def test_breakers_are_those_of_the_served_tokenizer(url):
    """Between two breakers nothing repeats, so that DRY leaves alone what a forbidding penalty would end."""
    tokenizer = AutoTokenizer.from_pretrained(shipped_model())
    assert tokenizer.encode("\n", add_special_tokens=False)
    trace = {"vllm_xargs": {"entropix_trace": "on", "dry_multiplier": 5, "dry_allowed_length": 1}}
    repeated = "a b c d a b c d a b c d a b c"
    status, free = post(url, prompt=repeated, temperature=0.3, vllm_xargs=trace["vllm_xargs"] | {"dry_sequence_breakers": [0]})
    assert status == 200
    assert any(record["dry_penalty"] is not None for record in free["choices"][0]["entropix"]["tokens"])
    status, answer = post(url, prompt=repeated, vllm_xargs=trace["vllm_xargs"] | {"dry_sequence_breakers": [" "]})
    assert status == 200
    broken = answer["choices"][0]["entropix"]["tokens"]
    assert broken[0]["dry_penalty"] == 0.0
