"""Chains: published numbers, random chains by a literal definition, states by a literal loop, and what is refused."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.samplers import chain_definitions
from tests.samplers.drawn import logits_of
from vllm_entropix import ConfigError, demo_model
from vllm_entropix.samplers import Chain, names
from vllm_entropix.samplers.chain import stages, without_what_is_off
from vllm_entropix.samplers.entropix.sampler import EntropixSampler
from vllm_entropix.samplers.entropix.settings import EntropixConfig

# Of entropix's distributions there is a definition elsewhere.
DEFINED = [name for name in names() if name != "entropix"]
TENTHS = [0.1, 0.2, 0.3, 0.4]
THREE, TWO, ONE = [0, 2 / 9, 3 / 9, 4 / 9], [0, 0, 3 / 7, 4 / 7], [0, 0, 0, 1]
DRY = {"dry_multiplier": 1, "dry_base": 1.1}
PUBLISHED = [
    ("temperature", {"temperature": 1}, TENTHS, TENTHS),
    ("temperature", {"temperature": 0}, TENTHS, ONE),
    ("temperature", {"temperature": -1}, TENTHS, ONE),
    *(("top_k", {"top_k": k}, TENTHS, expected) for k, expected in ((1, ONE), (3, THREE), (0, TENTHS), (-1, TENTHS))),
    *(("top_p", {"top_p": p}, TENTHS, e) for p, e in ((0, ONE), (0.7, TWO), (0.8, THREE), (1, TENTHS))),
    *(
        ("min_p", {"min_p": p}, TENTHS, e)
        for p, e in ((0, TENTHS), (0.24, TENTHS), (0.26, THREE), (0.49, THREE), (0.51, TWO), (0.74, TWO), (0.76, ONE), (1, ONE))
    ),
    *(
        ("xtc", {"xtc_probability": 1, "xtc_threshold": t}, TENTHS, e)
        for t, e in (
            (0.09, [1, 0, 0, 0]),
            (0.19, [1 / 3, 2 / 3, 0, 0]),
            (0.29, [1 / 6, 2 / 6, 3 / 6, 0]),
            (0.39, TENTHS),
            (0.51, TENTHS),
        )
    ),
    ("xtc", {"xtc_probability": 0.5, "xtc_threshold": 0.09}, TENTHS, [0.55, 0.1, 0.15, 0.2]),
    ("typ_p", {"typ_p": 0.5}, [0.97, 0.01, 0.01, 0.01], [1, 0, 0, 0]),
    ("typ_p", {"typ_p": 0.5}, [0.4, 0.2, 0.2, 0.2], [0, 1 / 3, 1 / 3, 1 / 3]),
    *(("top_n_sigma", {"top_n_sigma": n}, TENTHS, e) for n, e in ((1, TWO), (0, TENTHS), (3, TENTHS), (-1, TENTHS))),
    ("p_less", {}, [0.1, 0.15, 0.2, 0.25, 0.3], [0, 0, 0, 0.25 / 0.55, 0.3 / 0.55]),
    ("p_less", {}, [1 / 3] * 3, [1 / 3] * 3),
    ("", {}, TENTHS, TENTHS),
]
REPEATED = [
    (DRY, [0, 1], [0.25] * 4),
    (DRY, [0, 1, 2, 0, 1], [0.296923, 0.296923, 0.109232, 0.296923]),
    (DRY | {"dry_sequence_breakers": [3]}, [0, 1, 3, 4, 0, 1], [0.2] * 5),
    (DRY | {"dry_multiplier": 2}, [0, 1, 3, 4, 0, 1], [*[0.241818] * 3, 0.032727, 0.241818]),
    (DRY | {"dry_allowed_length": 4}, [0, 1, 3, 4, 0, 1], [0.2] * 5),
    (DRY | {"dry_penalty_last_n": 0}, [0, 1, 2, 0, 1], [0.25] * 4),
    (DRY | {"dry_penalty_last_n": 4}, [0, 1, 2, 0, 1], [0.25] * 4),
    # A breaker of two tokens ends the suffix after its last one.
    (DRY | {"dry_sequence_breakers": [(2, 0)]}, [0, 1, 2, 0, 1], [0.25] * 4),
]


def distribution(text, parameters, logits, histories=None):
    return Chain.parse(text, parameters).begin(len(logits)).distribution(logits, histories)


@pytest.mark.parametrize(("text", "parameters", "given_probabilities", "expected"), PUBLISHED)
def test_published_numbers(text, parameters, given_probabilities, expected):
    found = distribution(text, parameters, logits_of(*given_probabilities))
    assert found[0].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("parameters", "tokens", "expected"), REPEATED)
def test_published_numbers_of_dry(parameters, tokens, expected):
    found = distribution("dry", parameters, torch.zeros(1, len(expected)).double(), [tokens])
    assert found[0].tolist() == pytest.approx(expected, abs=1e-5)


# --- the definition ---------------------------------------------------------------------------------------------------


def random_settings(rng):
    """A value for every setting, neutral ones among them."""
    return {
        "temperature": float(rng.choice([0.0, rng.uniform(0.2, 3)], p=[0.1, 0.9])),
        "dynatemp_range": float(rng.choice([0.0, rng.uniform(0.1, 2)])),
        "dynatemp_exponent": float(rng.uniform(0.2, 3)),
        "edt_theta": float(rng.choice([0.0, rng.uniform(0.01, 2)])),
        "top_k": int(rng.integers(-1, 12)),
        "top_p": float(rng.choice([0.0, 1.0, rng.random()], p=[0.1, 0.2, 0.7])),
        "min_p": float(rng.choice([0.0, rng.random() * 0.6])),
        "top_n_sigma": float(rng.choice([-1.0, rng.uniform(0.2, 3)])),
        "typ_p": float(rng.choice([1.0, rng.random()])),
        "xtc_probability": float(rng.choice([0.0, 1.0, rng.random()])),
        "xtc_threshold": float(rng.uniform(0.01, 0.55)),
        "dry_multiplier": float(rng.uniform(0, 3)),
        "dry_base": float(rng.choice([0.5, 1.0, rng.uniform(1.0001, 3), 40.0])),
        "dry_allowed_length": int(rng.integers(0, 4)),
        "dry_penalty_last_n": int(rng.choice([-1, 0, 3, 9, 200])),
        "dry_sequence_breakers": [(int(one),) for one in rng.integers(0, 6, size=rng.integers(0, 3))],
        "repeat_last_n": int(rng.choice([-1, 0, 4])),
        "repeat_penalty": float(rng.uniform(0.5, 2)),
        "frequency_penalty": float(rng.uniform(-1, 1)),
        "presence_penalty": float(rng.uniform(-1, 1)),
        "top_a": float(rng.random()),
        "epsilon_cutoff": float(rng.choice([0.0, rng.random() * 0.3])),
        "eta_cutoff": float(rng.choice([0.0, rng.random() * 0.3])),
        "tfs_z": float(rng.choice([1.0, rng.random()])),
        "smoothing_factor": float(rng.choice([0.0, rng.uniform(0.1, 2)])),
        "smoothing_curve": float(rng.uniform(0, 4)),
        "top_h": float(rng.choice([1.0, rng.random()])),
        "greedy_threshold": float(rng.random()),
        "mirostat_tau": float(rng.uniform(0, 4)),
        "mirostat_eta": float(rng.uniform(0, 1)),
        "adaptive_target": float(rng.choice([-1.0, rng.random()])),
        "adaptive_decay": float(rng.uniform(0, 0.99)),
    }


def random_chain(rng):
    """Names in any order, in that order as they act: what ends the chain stands behind."""
    ends = chain_definitions.STATEFUL
    found = list(rng.permutation([name for name in DEFINED if name not in ends]))[: rng.integers(0, 7)]
    last = [str(rng.choice(ends))] if rng.random() < 0.5 else []
    return [str(name) for name in found] + last


def parameters_of(chain, values):
    """The settings that the samplers of a chain have."""
    mine = {key for name in chain for key in Chain.parse(name).values}
    return {key: value for key, value in values.items() if key in mine}


def random_rows(rng, rows, vocabulary):
    """Rows with ties, masked tokens and one token that stands out."""
    logits = rng.normal(size=(rows, vocabulary)) * rng.choice([0.3, 1.0, 4.0], size=(rows, 1))
    if rng.random() < 0.3:
        logits = logits.round(1)
    logits[:, 1:][rng.random((rows, vocabulary - 1)) < rng.choice([0.0, 0.5])] = -np.inf
    return logits


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_random_chains_are_their_definition(seed):
    """Also over several draws: mirostat's μ and adaptive_p's average follow a literal loop."""
    rng = np.random.default_rng(seed)
    chain, values = random_chain(rng), random_settings(rng)
    rows, vocabulary = int(rng.integers(1, 4)), int(rng.choice([1, 2, 3, 8, 30, 140]))
    asked = parameters_of(chain, values)
    run = Chain.parse(";".join(chain), asked).begin(rows)
    literal = [chain_definitions.Sequence(chain, values) for _ in range(rows)]
    histories = [rng.integers(0, 6, size=rng.integers(0, 14)).tolist() for _ in range(rows)]
    for _ in range(4):
        logits = random_rows(rng, rows, vocabulary)
        found = run.distribution(torch.tensor(logits), histories)
        expected = [one.distribution(row, tokens) for one, row, tokens in zip(literal, logits, histories, strict=True)]
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-9, err_msg=f"{chain} {asked}")
        drawn = [int(rng.choice(vocabulary, p=row / row.sum())) for row in found.numpy()]
        run.advance(drawn)
        for one, token, tokens in zip(literal, drawn, histories, strict=True):
            one.advance(token)
            tokens.append(token)


@pytest.mark.parametrize("name", DEFINED)
def test_each_sampler_alone_is_its_definition(name):
    rng = np.random.default_rng(5)
    for _ in range(12):
        values = random_settings(rng)
        logits = random_rows(rng, 1, 40)
        history = rng.integers(0, 6, size=14).tolist()
        found = distribution(name, parameters_of([name], values), torch.tensor(logits), [history])
        expected = chain_definitions.Sequence([name], values).distribution(logits[0], history)
        np.testing.assert_allclose(found[0].numpy(), expected, rtol=0, atol=1e-9)


def test_dry_clamps_what_would_overflow():
    """base 40 overflows a float32 at the 25th power; a repetition of 40 tokens is penalised like one of 24 + 2."""
    tokens = [1, *[0] * 41]
    parameters = {"dry_multiplier": 1e-38, "dry_base": 40.0}
    logits = torch.zeros(1, 3).double()
    expected = chain_definitions.Sequence(["dry"], Chain.parse("dry", parameters).values | {"dry_sequence_breakers": []})
    found = distribution("dry", parameters, logits, [tokens])[0]
    np.testing.assert_allclose(found.numpy(), expected.distribution(logits[0].tolist(), tokens), rtol=0, atol=1e-9)
    assert 0.33 < found[1] < 1
    assert found[0] < 0.34


# --- what holds -------------------------------------------------------------------------------------------------------

LONG = "penalties;dry;top_n_sigma;top_k;typ_p;tfs;top_p;eta;min_p;xtc;temperature;adaptive_p"
SET = {"xtc_probability": 0.4, "typ_p": 0.9, "dry_multiplier": 0.8, "tfs_z": 0.97, "adaptive_target": 0.4, "top_n_sigma": 2}


def test_rows_are_their_own():
    logits = torch.tensor(random_rows(np.random.default_rng(3), 6, 50))
    histories = [[1, 2, 3, 1, 2] * n for n in range(6)]
    together = distribution(LONG, SET, logits, histories)
    for row in range(6):
        alone = distribution(LONG, SET, logits[[row]], [histories[row]])
        torch.testing.assert_close(together[[row]], alone, rtol=0, atol=0)


@pytest.mark.parametrize("text", ["", LONG, "mirostat", "temperature;mirostat_v2", "edt;top_h;p_less;top_a;epsilon;quadratic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_strange_rows_give_one_token(text, dtype):
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor([[0, nan, 1], [0, inf, nan], [2, inf, inf], [-inf] * 3, [-inf, 3, -inf], [1, 2, 3]]).to(dtype)
    found = distribution(text, {}, logits)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found[:5].argmax(-1).tolist() == [1, 2, 1, 0, 1]
    assert found[:5].amax(-1).tolist() == [1.0] * 5
    assert found.sum(-1).tolist() == pytest.approx([1.0] * 6, abs=1e-6)


def test_neutral_values_change_nothing():
    neutral = {"top_k": 0, "top_p": 1, "min_p": 0, "temperature": 1, "adaptive_target": -1}
    logits = torch.tensor(random_rows(np.random.default_rng(4), 5, 60))
    found = distribution("dry;top_n_sigma;top_k;typ_p;top_p;min_p;xtc;temperature;adaptive_p", neutral, logits, [[1, 1]] * 5)
    torch.testing.assert_close(found, logits.softmax(-1), rtol=0, atol=1e-15)


def test_equal_logits_are_taken_by_id():
    logits = torch.tensor([[0.0, 1, 1, 1, 0]]).double()
    assert distribution("top_k", {"top_k": 2}, logits)[0].tolist() == [0, 0.5, 0.5, 0, 0]
    assert distribution("top_p", {"top_p": 0.3}, logits)[0].tolist() == [0, 0.5, 0.5, 0, 0]
    assert distribution("temperature", {"temperature": 0}, logits)[0].tolist() == [0, 1, 0, 0, 0]
    left = distribution("xtc", {"xtc_probability": 1, "xtc_threshold": 0.2}, logits)[0]
    assert (left > 0).tolist() == [True, False, False, True, True]


def test_lists_and_arrays_are_as_good_as_tensors():
    logits = random_rows(np.random.default_rng(6), 2, 9)
    run = Chain.parse("dry;temperature", {"dry_multiplier": 1}).begin(2)
    expected = run.distribution(torch.tensor(logits), [[1, 2, 1], None])
    for given_logits, history in ((logits, np.array([1, 2, 1])), (logits.tolist(), torch.tensor([1, 2, 1]))):
        found = run.distribution(given_logits, [history, []])
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        run.advance(np.array([1, 2]))


def test_a_state_begins_with_each_run():
    chain = Chain.parse("mirostat_v2", {"mirostat_tau": 2, "mirostat_eta": 1})
    logits = torch.tensor([[0.0, 1, 2]]).double()
    first, second = chain.begin(), chain.begin(rows=1)
    first.distribution(logits)
    first.advance([0])
    assert first.distribution(logits).tolist() != second.distribution(logits).tolist()
    with pytest.raises(ValueError, match="ask for a distribution first"):
        chain.begin().advance([1])
    for wrong in ([1, 2], [3], [-1], [0.5]):
        with pytest.raises(ValueError, match="token_ids are"):
            second.advance(wrong)
    for shape in ((2, 3), (3,), (1, 0)):
        with pytest.raises(ValueError, match=r"but it should be \[1, vocabulary\]"):
            second.distribution(torch.zeros(shape))
    with pytest.raises(ValueError, match="2 histories, but 1 rows"):
        second.distribution(logits, [[1], [2]])


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "acts"),
    [
        ("top-k;nucleus;typical-p;temp", "top_k;top_p;typ_p;temperature"),
        ("mirostat 2", "mirostat_v2"),
        (" Top_K ; min-p;top-n-sigma", "top_k;min_p;top_n_sigma"),
        (["typ", "typical"][:1], "typ_p"),
        ("adaptive-p;temperature", "temperature;adaptive_p"),
        ("mirostat2;dynatemp", "dynatemp;mirostat_v2"),
        ("", ""),
        ([], ""),
    ],
)
def test_names_as_people_write_them(text, acts):
    assert str(Chain.parse(text)) == acts


def test_the_greatest_penalty_leaves_a_candidate():
    chain = Chain.parse("dry", {"dry_multiplier": 100, "dry_sequence_breakers": []})
    for dtype in (torch.float32, torch.float64):
        assert chain.begin().distribution(torch.ones(1, 1, dtype=dtype), [[0] * 400]).tolist() == [[1.0]]


def test_breakers_are_texts_where_a_tokenizer_is_there():
    tokenizer = AutoTokenizer.from_pretrained(Path(demo_model.__file__).parent)

    def breakers(*texts):
        parameters = {"dry_sequence_breakers": texts} if texts else {}
        return Chain.parse("dry", parameters, tokenizer=tokenizer).stages[0].breakers

    for text in ("\n", ":"):
        singles = [one for one in breakers(text) if len(one) == 1]
        assert singles
        assert all(text in tokenizer.decode(list(one)) for one in singles)
    assert set(breakers()) >= {*breakers("\n"), *breakers("*")}
    several = breakers("zq:")
    assert tokenizer.decode(list(several[-1])) == "zq:"
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "?": 1}, unk_token="?")), unk_token="?")
    assert Chain.parse("dry", {}, tokenizer=words).stages[0].breakers == ()  # the defaults that it can't give are left out
    with pytest.raises(ConfigError, match=r"^dry_sequence_breakers has 'b', which the tokenizer can't give; leave it out$"):
        Chain.parse("dry", {"dry_sequence_breakers": ["b"]}, tokenizer=words)
    assert breakers(7, (8, 9), 7) == ((7,), (8, 9))


def test_llama_cpps_switches():
    assert str(Chain.parse("top_k;min_p;temperature", {"mirostat": 2, "mirostat_tau": 3})) == "temperature;mirostat_v2"
    assert str(Chain.parse("top_k", {"mirostat_mode": 1})) == "temperature;mirostat"
    assert str(Chain.parse("top_k", {"mirostat": 0})) == "top_k"
    assert Chain.parse("temperature", {"dynatemp_range": 0.5, "temp": 0.7}).values["temperature"] == 0.7
    assert str(Chain.parse("min_p;temperature", {"dynatemp_range": 0.5})) == "min_p;dynatemp"
    assert Chain.parse("typ_p;tfs", {"typical_p": 0.3, "tfs": 0.2}).values == {"typ_p": 0.3, "tfs_z": 0.2}


@pytest.mark.parametrize(
    ("text", "parameters", "reason"),
    [
        ("nope", {}, "unknown sampler 'nope' in the chain 'nope'; there are adaptive_p, dry, .*xtc$"),
        ("top_k;;min_p", {}, "unknown sampler '' in the chain"),
        (["top_k", 3], {}, "unknown sampler 3 in the chain"),
        ("top_k;min_p;top-k", {}, "has top_k twice; there are adaptive_p"),
        ("mirostat;adaptive_p", {}, "mirostat and adaptive_p can't stand in one chain, .*there are adaptive_p"),
        ("mirostat;mirostat_v2", {}, "can't stand in one chain"),
        (3, {}, "a chain is 3, but"),
        ("x" * 10_000, {}, "unknown sampler"),
        ("min_p", {"min_p": 2}, "^min_p is 2, but input should be less than or equal to 1$"),
        ("min_p", {"min_p": float("nan")}, "^min_p is nan, but"),
        ("min_p", {"min_p": True}, "^min_p is True, but it should be a number$"),
        ("min_p", {"min_p": "many"}, "^min_p is 'many', but"),
        ("top_k", {"top_k": 1.5}, "^top_k is 1.5, but"),
        ("min_p", {"dry_multiplier": 1}, "^dry_multiplier is a setting of dry, which isn't in the chain 'min_p'; put it there"),
        ("min_p", {"level": 1}, "^unknown setting 'level' of the chain 'min_p'; here are min_p$"),
        ("min_p", {3: 1}, "^unknown setting 3 of the chain"),
        ("min_p", 7, "a chain's settings are 7, but they should be a table"),
        ("typ_p", {"typ_p": 0.5, "typical_p": 0.5}, "another name of typ_p"),
        ("top_k", {"mirostat": 3}, "^mirostat is 3, but it should be 0, 1 or 2$"),
        ("dry", {"dry_sequence_breakers": ["\n"]}, "no tokenizer is there to encode it; give token ids$"),
        ("dry", {"dry_sequence_breakers": "\n"}, "should be a list of texts or token ids$"),
        ("dry", {"dry_base": -1}, "^dry_base is -1, but"),
        *(
            (
                "dry",
                {"dry_sequence_breakers": [7, one]},
                "^dry_sequence_breakers is .*, but it has .*, which is no text of 1 to 100 characters, no token id and no list",
            )
            for one in (True, 1.5, "", [], ["a"], [True], None, -1, [2**31])
        ),
    ],
)
def test_what_is_refused(text, parameters, reason):
    with pytest.raises(ConfigError, match=reason) as refused:
        Chain.parse(text, parameters)
    assert len(str(refused.value)) < 600
    assert "\n" not in str(refused.value)


def test_neither_torch_nor_vllm_is_loaded_before_it_is_needed():
    code = (
        "import sys; from vllm_entropix.samplers import Chain, names; Chain.parse(';'.join(names()[:3])); "
        "print('torch' in sys.modules, 'vllm' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout.split() == ["False", "False"]


def test_a_neutral_value_switches_a_sampler_off():
    logits = torch.tensor(random_rows(np.random.default_rng(8), 5, 60))
    plain = distribution("temperature", {"temperature": 1.0}, logits)
    switched = [stage for stage in stages().values() if stage.neutral]
    assert len(switched) >= 14
    for stage in switched:
        for end in range(2):
            settings_of_stage = {name: ends[end] for name, *ends in stage.neutral}
            rest = {"temperature": 1.0} if "temperature" in stage.Settings.model_fields else {}
            found = distribution(stage.name, settings_of_stage | rest, logits, [[1, 2, 1, 2]] * 5)
            torch.testing.assert_close(found, plain, rtol=0, atol=1e-15, msg=stage.name)
            assert stage.is_off(Chain.parse(stage.name, settings_of_stage | rest).values)
    assert not stages()["xtc"].is_off({"xtc_probability": 0.5})
    assert not stages()["mirostat"].is_off({})


def test_what_clients_send_with_each_request_is_left_out_where_it_is_off():
    sent = {
        "dry_multiplier": 0,
        "dry_base": 1.75,
        "typical_p": 1,
        "tfs": 1,
        "mirostat_tau": 5,
        "top_a": 0,
        "xtc_threshold": 0.1,
    }
    assert without_what_is_off(("min_p",), sent) == {}
    assert without_what_is_off(("dry", "xtc"), sent) == {
        key: sent[key] for key in ("dry_multiplier", "dry_base", "xtc_threshold")
    }
    assert without_what_is_off(("min_p",), {"top_a": 0.2, "nobodys": 3, "tfs": None}) == {
        "top_a": 0.2,
        "nobodys": 3,
        "tfs": None,
    }
    with pytest.raises(ConfigError, match=r"^top_a is 7, but"):
        without_what_is_off(("min_p",), {"top_a": 7})


def test_entropix_stands_in_the_place_of_a_temperature():
    logits = torch.tensor(random_rows(np.random.default_rng(9), 4, 50))
    histories = [[1, 2, 3, 1, 2]] * 4
    parameters = {"dry_multiplier": 5, "dry_allowed_length": 1}
    found = distribution("dry;entropix", parameters, logits, histories)
    left = distribution("dry", parameters, logits, histories).log()
    expected = torch.zeros_like(left)
    [kept] = [EntropixSampler(EntropixConfig()).decide(left).distribution()]
    expected.scatter_add_(-1, kept.token_ids, kept.probabilities)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
