"""Settings: presets, ways to give them, what is refused and how, and what every setting must say about itself."""

import json
import math
import re
import types
import typing
from pathlib import Path

import hypothesis
import pytest
from annotated_types import Ge, Gt, Le, Lt
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from tests.support.odd_values import LARGE, anything
from tools.real_models.catalogue import MODELS
from vllm_entropix.samplers.entropix.presets import PUBLISHED, preset_text
from vllm_entropix.samplers.entropix.settings import DEFAULT_PRESET, EntropixConfig, as_mapping
from vllm_entropix.samplers.registry import parse_request
from vllm_entropix.settings.errors import ConfigError

PRESETS = ("jax-2024-10", "torch-2024-10")
NEUTRAL = ("neutral-cool", "neutral-warm")

# SEMANTICS 3, spelled out: first the original's `SamplerConfig`, then the constants that were hard-coded beside it.
JAX_NUMBERS = {
    "base.temperature": 0.666,  # temp
    "base.top_p": 0.90,  # top_p
    "base.top_k": 27,  # top_k
    "base.min_p": 0.03,  # min_p
    "thresholds.lelv.entropy_below": 0.1,  # low_ent_thresh
    "thresholds.lelv.varentropy_below": 0.1,  # low_vent_thresh
    "thresholds.helv.entropy_above": 5.0,  # high_ent_thresh
    "thresholds.helv.varentropy_below": 0.1,  # low_vent_thresh
    "thresholds.lehv.entropy_below": 5.0,  # high_ent_thresh
    "thresholds.lehv.varentropy_above": 5.0,  # high_vent_thresh
    "thresholds.hehv.entropy_above": 3.0,  # med_ent_thresh
    "thresholds.hehv.varentropy_above": 5.0,  # high_vent_thresh
    "helv.temperature_offset": 1.3,  # helv_attn_ent_offset
    "helv.temperature_attention_entropy": 0.2,  # helv_attn_ent_coef
    "lehv.temperature_offset": 1.2,  # lehv_interaction_strength_offset
    "lehv.temperature_interaction": 0.3,  # lehv_interaction_strength_coef
    "hehv.top_p_attention_entropy": 0.2,  # hehv_attn_ent_coef
    "hehv.temperature_offset": 2.0,  # hehv_attn_vent_offset
    "hehv.temperature_attention_varentropy": 0.5,  # hehv_attn_vent_coef
    "adaptive.samples": 5,  # n_adaptive_samples
    "adaptive.temperature_offset": 1.0,  # the 1 that was added to the terms below
    "adaptive.temperature_logits": 0.3,  # ada_temp_logits
    "adaptive.temperature_attention": 0.2,  # ada_temp_attn
    "adaptive.temperature_agreement": 0.2,  # ada_temp_agree
    "adaptive.top_p_attention_varentropy": 0.1,  # ada_top_p
    "adaptive.top_k_interaction": 0.3,  # ada_top_k_int
    "adaptive.top_k_agreement": 0.2,  # ada_top_k_agree
    "adaptive.min_p": 0.03,  # min_p
    "adaptive.min_p_logits": 0.5,  # ada_min_p
    "confidence.logits_entropy": 0.1,  # ada_score_logits_ent
    "confidence.attention_entropy": 0.2,  # ada_score_attn_ent
    "confidence.logits_varentropy": 0.3,  # ada_score_logits_vent
    "confidence.attention_varentropy": 0.4,  # ada_score_attn_vent
    "confidence.agreement": 0.5,  # ada_score_agree
    "confidence.interaction": 0.6,  # ada_score_int
    "helv.temperature_max": 1.5,
    "lehv.temperature_max": 1.5,
    "lehv.top_k_disagreement": 0.5,
    "lehv.top_k_min": 5,
    "hehv.temperature_min": 2.0,
    "hehv.top_p_min": 0.5,
    "adaptive.temperature_max": 2.0,
    "adaptive.top_p_min": 0.1,
    "adaptive.top_p_max": 1.0,
    "adaptive.top_k_min": 1,
    "adaptive.top_k_max": 100,
    "adaptive.min_p_min": 0.01,
    "adaptive.min_p_max": 0.5,
}
NUMBERS = {
    "jax-2024-10": JAX_NUMBERS,
    "torch-2024-10": JAX_NUMBERS
    | {"base.min_p": 0.0, "thresholds.helv.entropy_above": 3.0, "thresholds.hehv.entropy_above": 5.0},
}


# --- presets ----------------------------------------------------------------------------------------------------------


def test_the_shipped_presets():
    others = set(EntropixConfig.preset_names()) - {*PRESETS, *NEUTRAL, "signals", "explore", "think"}
    assert PUBLISHED == PRESETS
    # All others are calibrations of models that `python -m tools.real_models` gives.
    assert others <= MODELS.keys()
    for name in others:
        text = preset_text(name)
        assert re.search(
            rf"^# vllm-entropix calibrate {re.escape(name)} .*\(\d{{4}}-\d\d-\d\d, vllm-entropix \S+\)\.$", text, re.M
        )
        assert re.search(r"^# Fingerprint: [0-9a-f]{32}$", text, re.M)


@pytest.mark.parametrize(("name", "changed"), [("explore", {"base.temperature": 1.0}), ("think", {})])
def test_presets_that_fork_are_the_default_but_for_what_they_say(name, changed):
    preset, default = EntropixConfig.preset(name), EntropixConfig()
    assert dict(preset.numbers()) == dict(default.numbers()) | changed
    assert preset.forks.branches == 4
    assert (
        preset.model_copy(update={"forks": default.forks, "base": default.base, "preset_name": default.preset_name}) == default
    )
    # A request that names one forks as it does, but for what the request says itself.
    assert parse_request({"entropix_preset": name}).forks_of(default.forks) == preset.forks
    own = parse_request({"entropix_preset": name, "entropix_forks": 2}).forks_of(default.forks)
    assert own == preset.forks.model_copy(update={"branches": 2})
    assert parse_request({"entropix_preset": PRESETS[1]}).forks_of(preset.forks) == preset.forks


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_holds_the_published_numbers(preset):
    assert dict(EntropixConfig.preset(preset).numbers()) == NUMBERS[preset]


@pytest.mark.parametrize("preset", [*NEUTRAL, "signals"])
def test_the_other_presets_take_a_request_at_its_word(preset):
    config = EntropixConfig.preset(preset)
    assert config.base.source == "request"
    assert not config.attention.enabled
    assert config.regimes == (preset != "signals")
    assert config.clarification.text is None


@pytest.mark.parametrize("preset", NEUTRAL)
def test_neutral_presets_move_the_temperature_around_the_base_and_nothing_else(preset):
    numbers = dict(EntropixConfig.preset(preset).numbers())
    warmer = preset == "neutral-warm"
    slope, offset = numbers["adaptive.temperature_logits"], numbers["adaptive.temperature_offset"]
    factors = [numbers[f"{regime}.temperature_offset"] for regime in ("lehv", "hehv")]
    assert (slope > 0, offset < 1, *(factor > 1 for factor in factors)) == (warmer,) * 4
    # The entropy + varentropy at which ADAPTIVE has the base temperature is the same of both.
    assert (1 - offset) / slope == pytest.approx(4.87, abs=0.05)
    # Wherever a token's metrics can be: 20 bits, and ADAPTIVE's varentropy.
    for metrics in (0, 20 + numbers["thresholds.hehv.varentropy_above"]):
        assert 0.1 < offset + slope * metrics < 10
    moved = {name for name, value in numbers.items() if name.startswith(("helv", "lehv", "hehv", "adaptive")) and value}
    assert moved == {
        *(f"{regime}.temperature_offset" for regime in ("helv", "lehv", "hehv", "adaptive")),
        *("adaptive.temperature_logits", "adaptive.samples", "adaptive.min_p"),
        *(name for name in numbers if name.endswith(("_max", "_min")) and name != "adaptive.min_p_min"),
    }
    assert numbers["adaptive.samples"] == 1
    assert numbers["adaptive.min_p"] == numbers["base.min_p"]


@pytest.mark.parametrize(("preset", "varentropy", "rule"), [(PRESETS[0], "heads", "ever"), (PRESETS[1], "zero", "last-token")])
def test_what_a_preset_says_of_the_original(preset, varentropy, rule):
    original = EntropixConfig.preset(preset).original
    assert original.attention_varentropy == varentropy
    assert original.clarification_rule == rule
    assert original.padded_positions == 4096
    assert original.clarification_token_ids == (2564,)


def test_nothing_given_is_the_jax_preset_corrected():
    config = EntropixConfig()
    assert DEFAULT_PRESET == "jax-2024-10"
    assert (config.preset_name, config.fidelity, config.regimes) == ("jax-2024-10", "corrected", True)
    assert config == EntropixConfig.preset() == EntropixConfig.preset("jax-2024-10") == EntropixConfig.load(None)
    assert config.clarification.text is config.clarification.token_ids is None  # nothing is ever inserted
    assert (config.attention.enabled, config.attention.layers, config.trace.default) == (True, "last", False)


def test_presets_differ_and_are_values():
    assert EntropixConfig.preset(PRESETS[0]) != EntropixConfig.preset(PRESETS[1])
    assert len({EntropixConfig.preset(name) for name in (*PRESETS, *PRESETS)}) == 2


# --- fidelity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_corrected_ignores_what_the_original_did(preset):
    config = EntropixConfig.preset(preset)
    assert config.attention_varentropy == "heads"
    assert config.padded_positions is None
    assert config.clarification_rule == "cooldown"


@pytest.mark.parametrize("preset", PRESETS)
def test_original_does_what_the_original_did(preset):
    config = EntropixConfig.preset(preset, fidelity="original")
    assert config.attention_varentropy == config.original.attention_varentropy
    assert config.padded_positions == 4096
    assert config.clarification_rule == config.original.clarification_rule
    # D14: no cap. Nothing else changes.
    assert dict(config.numbers()) == NUMBERS[preset] | {"adaptive.temperature_max": math.inf}


@pytest.mark.parametrize("fidelity", ["corrected", "original"])
@pytest.mark.parametrize("rule", ["cooldown", "last-token", "ever"])
def test_a_clarification_rule_that_is_given_wins(rule, fidelity):
    config = EntropixConfig.from_dict({"fidelity": fidelity, "clarification": {"rule": rule}})
    assert config.clarification_rule == rule


def test_numbers_have_the_same_order_in_every_configuration():
    order = [name for name, _ in EntropixConfig().numbers()]
    for preset in PRESETS:
        for fidelity in ("corrected", "original"):
            assert [name for name, _ in EntropixConfig.preset(preset, fidelity=fidelity).numbers()] == order


# --- ways to give settings --------------------------------------------------------------------------------------------


def test_settings_are_merged_over_the_preset_at_every_depth():
    config = EntropixConfig.from_dict(
        {
            "preset": "torch-2024-10",
            "base": {"top_k": 40},
            "thresholds": {"helv": {"entropy_above": 4}},
            "original": {"clarification_token_ids": [1, 2]},
            "clarification": {"token_ids": [7, 8]},
        }
    )
    expected = NUMBERS["torch-2024-10"] | {"base.top_k": 40, "thresholds.helv.entropy_above": 4}
    assert dict(config.numbers()) == expected
    assert config.original.clarification_token_ids == (1, 2)
    assert config.original.padded_positions == 4096
    assert (config.clarification.token_ids, config.clarification.cooldown) == ((7, 8), 16)


def test_the_callers_mapping_is_left_alone():
    given = {"base": {"top_k": 40}}
    EntropixConfig.from_dict(given)
    EntropixConfig.load(given)
    assert given == {"base": {"top_k": 40}}
    assert EntropixConfig().base.top_k == 27


CHANGED_JSON = '{"preset": "torch-2024-10", "fidelity": "original", "base": {"top_k": 40}}'
CHANGED_TOML = 'preset = "torch-2024-10"\nfidelity = "original"\n[base]\ntop_k = 40\n'


@pytest.fixture
def changed() -> EntropixConfig:
    """What each of the two says."""
    return EntropixConfig.preset("torch-2024-10", fidelity="original", base={"top_k": 40})


@pytest.mark.parametrize("source", [CHANGED_JSON, f"\n  {CHANGED_JSON}\n", json.loads(CHANGED_JSON)])
def test_json_text_and_mappings(source, changed):
    assert EntropixConfig.load(source) == changed


def test_a_configuration_is_taken_as_it_is(changed):
    assert EntropixConfig.load(changed) is changed


CHANGED_YAML = "preset: torch-2024-10\nfidelity: original\nbase:\n  top_k: 40\n"
FILES = [
    ("my model.json", CHANGED_JSON),
    ("my.toml", CHANGED_TOML),
    ("my.yaml", CHANGED_YAML),
    ("MY.YML", CHANGED_YAML),
    ("my", CHANGED_TOML),
]


@pytest.mark.parametrize(("name", "text"), FILES)
def test_files(tmp_path, changed, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert EntropixConfig.from_file(path) == EntropixConfig.from_file(str(path)) == changed
    assert EntropixConfig.load(path) == EntropixConfig.load(str(path)) == changed


@pytest.mark.parametrize(("name", "text"), FILES)
def test_a_file_in_the_working_directory(tmp_path, changed, monkeypatch, name, text):
    (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    assert EntropixConfig.load(name) == changed


@pytest.mark.parametrize("name", ["my.conf", "my.toml.bak", "jax.ini"])
def test_a_file_of_another_kind_is_no_unknown_preset(tmp_path, monkeypatch, name):
    (tmp_path / name).write_text(CHANGED_TOML)
    monkeypatch.chdir(tmp_path)
    for given in (name, f"./{name}", str(tmp_path / name)):
        message = refusal(given)
        assert "preset" not in message
        for word in (name, ".json", ".toml", ".yaml", ".yml"):
            assert word in message


def test_a_configuration_is_a_mapping_too(changed):
    assert EntropixConfig.from_dict(as_mapping(changed)) == changed


def test_a_file_may_be_empty_and_may_speak_any_language(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text("", encoding="utf-8")
    (tmp_path / "my.yaml").write_text("# nothing\n")
    assert EntropixConfig.from_file(path) == EntropixConfig.from_file(tmp_path / "my.yaml") == EntropixConfig()
    path.write_text('[clarification]\ntext = "Überlegen… 🤔"\n', encoding="utf-8")
    assert EntropixConfig.from_file(path).clarification.text == "Überlegen… 🤔"


@pytest.mark.parametrize("preset", PRESETS)
def test_a_presets_name(preset):
    assert EntropixConfig.load(preset) == EntropixConfig.load(f" {preset}\n") == EntropixConfig.preset(preset)


@pytest.mark.parametrize("layers", ["last", "all", [0], [3, 1, 2], (0, 5)])
def test_attention_layers(layers):
    expected = layers if isinstance(layers, str) else tuple(layers)
    assert EntropixConfig.from_dict({"attention": {"layers": layers}}).attention.layers == expected


def test_numbers_in_lists_may_be_text():
    """As vLLM's command line gives them: --sampler-config.attention.layers+ 1."""
    config = EntropixConfig.from_dict({"attention": {"layers": ["1", "0"]}, "clarification": {"token_ids": ["7"]}})
    assert (config.attention.layers, config.clarification.token_ids) == ((1, 0), (7,))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"fidelity": "original", "base": {"top_k": 40}, "original": {"clarification_token_ids": []}},
        {"clarification": {"text": "Hm."}, "attention": {"layers": "all"}, "regimes": False},
        {"clarification": {"token_ids": [1, 2], "rule": "ever"}, "attention": {"layers": [4, 2]}, "trace": {"default": True}},
    ],
)
def test_a_configuration_survives_writing_and_reading(preset, settings):
    config = EntropixConfig.preset(preset, **settings)
    assert EntropixConfig.from_dict(config.model_dump(by_alias=True)) == config
    assert EntropixConfig.load(config.model_dump_json(by_alias=True)) == config


# --- what is refused --------------------------------------------------------------------------------------------------


def refusal(source) -> str:
    """The message that ``source`` is refused with, one line of it."""
    with pytest.raises(ConfigError) as caught:
        EntropixConfig.load(source)
    message = str(caught.value)
    assert "\n" not in message
    assert message.strip() == message != ""
    return message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        # unknown settings: what there is instead
        ({"temperature": 1}, ["'temperature'", "unknown", "preset", "base", "thresholds", "trace"]),
        ({"base": {"temprature": 1}}, ["'base.temprature'", "unknown", "temperature", "top_p", "top_k", "min_p"]),
        ({"thresholds": {"lelv": {"entropy": 1}}}, ["'thresholds.lelv.entropy'", "entropy_below", "varentropy_below"]),
        ({"preset_name": "jax-2024-10"}, ["'preset_name'", "preset"]),
        ({"base.temperature": 1}, ["'base.temperature'", "unknown"]),
        ({"base[0]": 1}, ["'base[0]'", "unknown"]),
        ({"base": {"top\nk": 1}}, [r"'base.top\nk'", "unknown"]),
        ({1: 2}, ["1", "strings"]),
        # ranges
        ({"base": {"temperature": 0}}, ["base.temperature", " 0,", "greater than 0"]),
        ({"base": {"top_p": 1.5}}, ["base.top_p", "1.5", "less than or equal to 1"]),
        ({"base": {"top_k": 0}}, ["base.top_k", " 0,", "greater than or equal to 1"]),
        ({"thresholds": {"helv": {"entropy_above": -1}}}, ["thresholds.helv.entropy_above", "-1", "equal to 0"]),
        ({"base": {"min_p": math.nan}}, ["base.min_p", "nan"]),
        ({"lehv": {"temperature_interaction": -math.inf}}, ["lehv.temperature_interaction", "-inf", "-10"]),
        ({"adaptive": {"samples": 65}}, ["adaptive.samples", "65", "64"]),
        ({"trace": {"max_tokens": 0}}, ["trace.max_tokens", " 0,", "equal to 1"]),
        ({"clarification": {"cooldown": -1}}, ["clarification.cooldown", "-1", "equal to 0"]),
        ({"adaptive": {"top_p_min": 0.9, "top_p_max": 0.8}}, ["adaptive", "top_p_min", "0.9", "top_p_max", "0.8", "above"]),
        ({"adaptive": {"top_k_min": 101}}, ["adaptive", "top_k_min", "101", "top_k_max", "100", "above"]),
        ({"adaptive": {"min_p_max": 0}}, ["adaptive", "min_p_min", "0.01", "min_p_max", "above"]),
        # types
        ({"base": {"temperature": "hot"}}, ["base.temperature", "'hot'", "number"]),
        ({"base": {"temperature": "a\nb"}}, ["base.temperature", r"'a\nb'", "number"]),
        ({"base": {"temperature": None}}, ["base.temperature", "None", "number"]),
        ({"base": {"temperature": [1]}}, ["base.temperature", "[1]", "number"]),
        ({"base": {"top_k": 2.5}}, ["base.top_k", "2.5", "integer"]),
        ({"base": 3}, ["base", "3", "dictionary"]),
        ({"base": None}, ["base", "None", "dictionary"]),
        ({"thresholds": {"lelv": [1]}}, ["thresholds.lelv", "[1]", "dictionary"]),
        ({"regimes": "maybe"}, ["regimes", "'maybe'", "boolean"]),
        ({"fidelity": "exact"}, ["fidelity", "'exact'", "corrected", "original"]),
        ({"original": {"attention_varentropy": "layers"}}, ["attention_varentropy", "heads", "heads-unbiased", "zero"]),
        ({"original": {"clarification_token_ids": [-5]}}, ["original.clarification_token_ids.0", "-5", "equal to 0"]),
        # presets
        ({"preset": "jax"}, ["'jax'", *PRESETS]),
        ({"preset": None}, ["None", *PRESETS]),
        ({"preset": ["jax-2024-10"]}, ["['jax-2024-10']", *PRESETS]),
        # clarification
        ({"clarification": {"text": "a", "token_ids": [1]}}, ["clarification", "'a'", "[1]", "not both"]),
        ({"clarification": {"text": ""}}, ["clarification.text", "''", "at least 1 character"]),
        ({"clarification": {"token_ids": []}}, ["clarification.token_ids", "[]", "at least 1"]),
        ({"clarification": {"token_ids": [1] * 65}}, ["clarification.token_ids", "[1, 1", "at most 64"]),
        ({"clarification": {"token_ids": [3, -1]}}, ["clarification.token_ids.1", "-1", "equal to 0"]),
        ({"clarification": {"token_ids": 5}}, ["clarification.token_ids", "5"]),
        ({"clarification": {"rule": "never"}}, ["clarification.rule", "'never'", "cooldown", "last-token", "ever"]),
        # layers
        ({"attention": {"layers": []}}, ["attention.layers", "[]", "no layer", "attention.enabled"]),
        ({"attention": {"layers": [1, 1]}}, ["attention.layers", "[1, 1]", "twice"]),
        ({"attention": {"layers": [-1]}}, ["attention.layers", "[-1]", "'last', 'all' or a list of layer indices"]),
        ({"attention": {"layers": [True]}}, ["attention.layers", "[True]", "list of layer indices"]),
        ({"attention": {"layers": ["last"]}}, ["attention.layers", "['last']", "list of layer indices"]),
        ({"attention": {"layers": ["9" * 5000]}}, ["attention.layers", "list of layer indices"]),
        ({"attention": {"layers": ["1", "01"]}}, ["attention.layers", "twice"]),
        ({"base": {"source": "client"}}, ["base.source", "'client'", "preset", "request"]),
        ({"attention": {"layers": [0.5]}}, ["attention.layers", "[0.5]", "list of layer indices"]),
        ({"attention": {"layers": 3}}, ["attention.layers", "3", "list of layer indices"]),
        ({"attention": {"layers": "first"}}, ["attention.layers", "'first'", "'last', 'all'"]),
    ],
)
def test_a_refusal_names_the_setting_its_value_and_what_is_allowed(settings, words):
    message = refusal(settings)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("jax", ["unknown preset 'jax'", *PRESETS]),
        ("", ["unknown preset ''", *PRESETS]),
        ("[1]", ["'[1]'", "JSON"]),
        ('{"base"', ["not valid JSON", "line 1"]),
        ('{"base": {}} x', ["not valid JSON", "Extra data"]),
        ('{"base": {"top_p": NaN}}', ["base.top_p", "nan"]),
        ('{"base": {"top_k": 1e400}}', ["base.top_k", "inf"]),
        ('{"base": {"top_k": %s}}' % ("9" * 5000), ["JSON"]),
        ('{"base": ' * 100_000, ["JSON"]),
        ("no-such-file.toml", ["no-such-file.toml", "No such file"]),
        ("no/such/file", ["no/such/file", "No such file"]),
        ("a/\0/b.toml", ["can't read"]),
        (Path("no-such-file.json"), ["no-such-file.json", "No such file"]),
        (17, ["int", "JSON", "preset", "file"]),
        ([1], ["list", "JSON", "preset", "file"]),
        (b"{}", ["bytes", "JSON", "preset", "file"]),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_source_that_is_no_configuration(source, words):
    message = refusal(source)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b"{", ["not valid JSON", "line 1"]),
        ("a.json", b"", ["not valid JSON"]),
        ("a.json", b"[1]", ["holds a list", "not a table"]),
        ("a.json", b'"jax-2024-10"', ["holds a str", "not a table"]),
        ("a.json", b'{"base": {"top_k": %s}}' % (b"9" * 5000), ["JSON"]),
        ("a.toml", b"base =", ["not valid TOML"]),
        ("a.yaml", b"base: [", ["not valid YAML", "line 1"]),
        ("a.yml", b"a: !!python/object:os.system {}", ["not valid YAML"]),
        ("a.yaml", b"base: {top_k: %s}" % (b"9" * 5000), ["not valid YAML"]),
        ("a.yaml", b"- 1", ["holds a list", "not a table"]),
        ("a.yaml", b"[" * 1000, ["not valid YAML"]),
        ("a.yaml", b"\xff\xfe", ["not UTF-8"]),
        ("a.toml", b"[base]\n[base]", ["not valid TOML", "line 2"]),
        ("a.toml", b"\xff\xfe", ["not UTF-8"]),
        ("a.json", b"\xff\xfe", ["not UTF-8"]),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    for word in (str(path), *words):
        assert word in refusal(path)
        assert word in refusal(str(path))


def test_a_directory_is_no_configuration(tmp_path):
    assert str(tmp_path) in refusal(tmp_path)
    assert "directory" in refusal(str(tmp_path))


def test_a_refused_setting_of_a_file_is_reported_with_the_file(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text("[base]\ntemperature = nan\n")
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(path))}: base\.temperature is nan"):
        EntropixConfig.from_file(path)


@pytest.mark.parametrize("value", LARGE, ids=["text", "list", "table", "bytes", "number"])
def test_an_error_repeats_no_more_than_a_hundred_characters_of_a_value(value):
    for settings in (
        {"base": {"temperature": value}},
        {"base": value},
        {"preset": value},
        {"fidelity": value},
        {"attention": {"layers": value}},
        {"attention": {"layers": [value]}},
        {"clarification": {"rule": value}},
        {"clarification": {"token_ids": [-1, value]}},
        {"trace": {"default": value}},
        {"trace": {"max_tokens": value}},
    ):
        assert len(refusal(settings)) < 350
    if isinstance(value, str):
        assert len(refusal({value: 1})) < 350
        assert len(refusal({"trace": {value: 1}})) < 350
        assert len(refusal(value)) < 350
        assert len(refusal(f"{value}/x.toml")) < 350
        assert len(refusal(f"{value}.yaml")) < 350


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(st.data())
def test_whatever_is_set_is_taken_or_refused_in_one_sentence(data):
    settings = data.draw(anything)
    for part in reversed(data.draw(st.sampled_from([*SETTINGS, "base", "thresholds.lelv", "", "nonsense"])).split(".")):
        settings = {part: settings}
    message = ""
    try:
        EntropixConfig.load(settings)
    except ConfigError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 600


def test_a_configuration_is_frozen():
    config = EntropixConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.fidelity = "original"
    with pytest.raises(ValidationError, match="frozen"):
        config.base.temperature = 1.0
    with pytest.raises(ValidationError, match="frozen"):
        config.thresholds.lelv.entropy_below = 1.0


# --- what every setting says about itself -----------------------------------------------------------------------------


def all_settings(model: type[BaseModel] = EntropixConfig, prefix: str = ""):
    """(dotted name, field) of every setting; sections are walked, not listed."""
    for name, field in model.model_fields.items():
        dotted = f"{prefix}{field.alias or name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from all_settings(field.annotation, f"{dotted}.")
        else:
            yield dotted, field


SETTINGS = dict(all_settings())
NUMERIC = {name: field for name, field in SETTINGS.items() if field.annotation in (int, float)}


def given(name: str, value) -> dict:
    """The nested mapping that sets the dotted ``name``."""
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def bounds(metadata) -> tuple:
    """The lower and upper bound among a field's constraints, None where there is none."""
    lower = next((item for item in metadata if isinstance(item, (Ge, Gt))), None)
    upper = next((item for item in metadata if isinstance(item, (Le, Lt))), None)
    return lower, upper


def test_the_walk_finds_the_settings():
    assert {name for name, _ in EntropixConfig().numbers()} <= NUMERIC.keys()
    assert {"preset", "clarification.text", "attention.layers", "trace.default"} <= SETTINGS.keys()
    assert {"clarification.cooldown", "trace.max_tokens", "original.padded_positions"} <= NUMERIC.keys()


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_has_a_description_and_a_unit(name):
    field = SETTINGS[name]
    assert field.description
    assert field.description.endswith(".")
    assert "\n" not in field.description
    assert isinstance(field.json_schema_extra, dict)
    assert isinstance(field.json_schema_extra["unit"], str)


@pytest.mark.parametrize("name", NUMERIC)
def test_every_number_has_a_range_and_refuses_what_is_outside(name):
    field = NUMERIC[name]
    lower, upper = bounds(field.metadata)
    assert lower is not None
    assert upper is not None
    least = lower.ge if isinstance(lower, Ge) else lower.gt
    most = upper.le if isinstance(upper, Le) else upper.lt
    assert least < most
    outside = [least - 1, most + 1, math.nan, math.inf, -math.inf]
    outside += [least] if isinstance(lower, Gt) else []
    for value in outside:
        message = refusal(given(name, value))
        assert f"{name} is {value!r}, but " in message
    for value in ("much", None, [1], {}):
        assert f"{name} is {value!r}, but " in refusal(given(name, value))


def test_a_truth_value_is_no_number():
    for name in NUMERIC:
        assert f"{name} is True, but " in refusal(given(name, True))


@pytest.mark.parametrize("name", ["clarification.token_ids", "original.clarification_token_ids", "attention.layers"])
def test_numbers_in_lists_have_a_lower_bound(name):
    lists = [SETTINGS[name].annotation]
    if isinstance(lists[0], types.UnionType) or typing.get_origin(lists[0]) is typing.Union:
        lists = [part for part in typing.get_args(lists[0]) if typing.get_origin(part) is tuple]
    item = typing.get_args(lists[0])[0]
    lower, _ = bounds([constraint for field in item.__metadata__ for constraint in field.metadata])
    assert lower == Ge(0)
