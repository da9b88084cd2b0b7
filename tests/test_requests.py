"""Per-request settings: spellings, values, what is refused and how."""

import json
import math
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.odd_values import HUGE, LARGE, anything
from vllm_entropix.records.scores import Abstention
from vllm_entropix.samplers import chain
from vllm_entropix.samplers.entropix.presets import preset_names
from vllm_entropix.samplers.entropix.settings import EntropixConfig
from vllm_entropix.samplers.registry import load_server, parse_request, request_settings, sampler_of
from vllm_entropix.settings.errors import ConfigError

KEYS = [str(field.alias) for field in request_settings().model_fields.values()]

ABSTAINS = {"entropix_abstain_score": "entropy_mean", "entropix_abstain_above": 1.2}
OWN = {"temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125}


def refusal(extra_args) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_request(extra_args)
    message = str(caught.value)
    assert "\n" not in message
    # A list of all keys takes the room that it takes; the rest of its message is held to less.
    lists_all = all(known in message for known in KEYS)
    assert len(message) - len(", ".join(KEYS)) < 150 if lists_all else len(message) < 400
    return message


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    "misspell",
    [
        lambda key: key.replace("_", "."),
        lambda key: key.replace("_", "-"),
        lambda key: key.replace("_", ""),
        lambda key: key.replace("_", " "),
        str.upper,
        str.capitalize,
        lambda key: f" {key} ",
        lambda key: key.replace("trop", "trp"),
        lambda key: f"--{key}",
    ],
)
def test_an_odd_spelling_is_refused_and_the_right_one_named(key, misspell):
    odd = misspell(key)
    if odd not in KEYS:
        assert refusal({odd: 1}) == f"unknown setting {odd!r}; did you mean {key!r}?"


def test_other_unknown_names_of_ours_are_refused_with_all_there_are():
    for key in ("entropix_colour", "Entropix_Colour", "entropix_"):
        message = refusal({"entropix_trace": "on", key: 1})
        assert key in message
        assert "did you mean" in message or all(known in message for known in KEYS)


@pytest.mark.parametrize("key", ["trace", "entropy_trace", "top_k", "my_plugin", "", "min_p", "anthropic", "x" * 1000])
def test_other_plugins_names_are_left_alone(key):
    assert parse_request({key: HUGE}) == request_settings()()


def test_nothing_given_is_nothing_said():
    assert parse_request(None) == parse_request({}) == request_settings()()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({1: 2}, ["the key 1", "text"]),
        ({HUGE: 2}, ["the key <a number of thousands of digits>"]),
        ({("entropix_trace",): 1}, ["entropix_trace", "text"]),
        ({b"entropix_trace": 1}, ["b'entropix_trace'", "text"]),
        ([1], ["[1]", "table"]),
        ("entropix_trace", ["table"]),
        ({"entropix_top_k": True}, ["entropix_top_k is True", "number"]),
        ({"entropix_min_p": False}, ["entropix_min_p is False", "number"]),
        ({"entropix_top_k": HUGE}, ["entropix_top_k is <a number of thousands of digits>", "100000"]),
        ({"entropix_temperature": HUGE}, ["entropix_temperature is <a number"]),
        ({"entropix_trace": HUGE}, ["entropix_trace is <a number", "on or off"]),
        ({"entropix_preset": "signals"}, ["entropix_preset is 'signals'", "switches regimes off does so for a whole server"]),
        ({"entropix_preset": HUGE}, ["entropix_preset is <a number", "jax-2024-10"]),
        ({"entropix_top_k": [[HUGE]]}, ["entropix_top_k is [[<a number"]),
        ({"entropix_temperature": 1e400}, ["entropix_temperature is inf"]),
        ({"entropix_temperature": "1e400"}, ["entropix_temperature is '1e400'"]),
        ({"entropix_temperature": "nan"}, ["entropix_temperature is 'nan'"]),
        ({"entropix_temperature": math.nan}, ["entropix_temperature is nan"]),
        ({"entropix_top_k": 2.5}, ["entropix_top_k is 2.5", "integer"]),
        ({"entropix_trace": math.nan}, ["entropix_trace is nan"]),
        ({"entropix_trace": [1]}, ["entropix_trace is [1]"]),
        ({"entropix": None}, ["entropix is None"]),
        ({"entropix_base": "server"}, ["entropix_base is 'server'", "preset", "request"]),
        ({"entropix_abstain_score": "entropy"}, ["entropix_abstain_score is 'entropy'", "such as entropy_mean"]),
        ({"entropix_abstain_score": ["entropy_mean"]}, ["entropix_abstain_score is ['entropy_mean']", "such as entropy_mean"]),
        (
            {"entropix_abstain_score": "perplexity"},
            ["entropix_abstain_score is 'perplexity' without a bound", "_above or _below"],
        ),
        ({"entropix_abstain_above": 1}, ["entropix_abstain_above is given without entropix_abstain_score"]),
        ({"entropix_abstain_below": 1}, ["entropix_abstain_below is given without entropix_abstain_score"]),
        ({**ABSTAINS, "entropix_abstain_above": True}, ["entropix_abstain_above is True", "number"]),
        ({**ABSTAINS, "entropix_abstain_above": math.inf}, ["entropix_abstain_above is inf", "finite"]),
        ({**ABSTAINS, "entropix_abstain_above": "nan"}, ["entropix_abstain_above is 'nan'", "finite"]),
        ({"entropix_constants": "{"}, ["entropix_constants is '{'", "isn't JSON"]),
        ({"entropix_constants": [1]}, ["entropix_constants is [1]", "JSON object"]),
        ({"entropix_constants": {"base": {"top_k": 1}}}, ["entropix_constants is", "unknown constant 'base'"]),
        ({"entropix_constants": {HUGE: 1}}, ["unknown constant <a number of thousands of digits>"]),
        ({"entropix_constants": {"base.temperature": 99}}, ["entropix_constants is", "base.temperature is 99", "10"]),
        ({"entropix_constants": {"base.temperature": True}}, ["base.temperature is True", "number"]),
        ({**ABSTAINS, "entropix_scores": "off"}, ["entropix_abstain_score is given, but entropix_scores is off"]),
    ],
    ids=lambda value: str(type(value)) if isinstance(value, dict) else "",
)
def test_a_value_that_cannot_be_is_refused_in_one_sentence(given, words):
    message = refusal(given)
    for word in words:
        assert word in message


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", LARGE, ids=["text", "list", "table", "bytes", "number"])
def test_an_error_repeats_no_more_than_a_hundred_characters_of_a_value(key, value):
    message = refusal({key: value})
    assert message.startswith((f"{key} is ", "unknown sampler 'y") if key == "samplers" else f"{key} is ")
    # What there is to choose from is listed.
    listed = {"samplers": chain.names(), "entropix_preset": sorted({*preset_names()} - {"signals"})}.get(key, [])
    assert len(message.replace(", ".join(listed), "")) < 100 + 150


def test_a_request_reads_no_file_of_a_preset(monkeypatch):
    # Reading all of them took 15 ms: in the server, and again in the engine.
    parse_request({"entropix_preset": "torch-2024-10"})
    monkeypatch.setattr(tomllib, "loads", lambda text: pytest.fail("a preset was read again"))
    assert parse_request({"entropix_preset": "torch-2024-10", "entropix_temperature": 0.7}).preset == "torch-2024-10"


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=12) | st.integers(), anything, max_size=4))
def test_whatever_is_sent_is_taken_or_refused_in_one_sentence(extra_args):
    taken, message = request_settings()(), ""
    try:
        taken = parse_request(extra_args)
    except ConfigError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 500
    assert all(math.isfinite(number) for number in taken.constants(EntropixConfig(), OWN))


def base_of(extra_args, **server) -> list[float]:
    config = EntropixConfig.from_dict(server)
    names = [name for name, _ in config.numbers()]
    numbers = dict(zip(names, parse_request(extra_args).constants(config, OWN), strict=True))
    assert numbers["adaptive.min_p"] == numbers["base.min_p"]
    return [numbers[f"base.{name}"] for name in OWN]


def test_where_base_parameters_come_from():
    preset, own = [0.666, 0.9, 27, 0.03], list(OWN.values())
    by_request = {"base": {"source": "request"}}
    assert base_of({}) == base_of({"entropix_base": None}) == base_of({"entropix_base": "preset"}) == preset
    assert base_of({"entropix_base": "request"}) == own
    assert base_of({}, **by_request) == base_of({"entropix_base": "request"}, **by_request) == own
    assert base_of({"entropix_base": "preset"}, **by_request) == preset
    # The server says where they come from, whichever preset a request names; one that it gives itself comes first.
    assert base_of({"entropix_preset": "torch-2024-10"}, **by_request) == own
    assert base_of({"entropix_temperature": 2}, **by_request) == [2, *own[1:]]


def test_constants_of_a_request_come_first_where_a_server_takes_them():
    given = {"base.temperature": 0.25, "adaptive.temperature_offset": 0}
    said = {"entropix_constants": json.dumps(given), "entropix_temperature": 2, "entropix_preset": "torch-2024-10"}
    study = load_server({"experiments": {"constants": True}})
    for server in (study, study.model_dump(mode="json", by_alias=True)):
        request = parse_request(said, server)
        numbers = dict(zip(dict(study.numbers()), request.constants(study, OWN), strict=True))
        assert numbers == dict(EntropixConfig.preset("torch-2024-10").numbers()) | given
    with pytest.raises(ConfigError, match="entropix_constants is given, but the server takes none"):
        parse_request(said, load_server({}))
    assert not parse_request({**said, "entropix": "off"}, load_server({})).enabled


def test_which_answers_are_scored_and_by_what_they_abstain():
    for said_so, by_default in (({}, False), ({}, True), ({"entropix_scores": "on"}, False), ({"entropix_scores": 0}, True)):
        said = parse_request(said_so)
        assert said.is_scored(by_default) == (by_default if not said_so else said_so == {"entropix_scores": "on"})
        assert said.abstention is None
    said = parse_request({**ABSTAINS, "entropix_abstain_below": "-1"})
    assert said.is_scored(False), "whoever is to abstain is scored"
    assert said.abstention == Abstention("entropy_mean", 1.2, -1.0)


def test_a_request_may_leave_its_draw_to_vllm():
    assert sampler_of(parse_request({"samplers": "vllm"}, EntropixConfig()), EntropixConfig()) == "vllm"
    with pytest.raises(
        ConfigError, match="entropix_temperature is a setting of the sampler entropix, but this request's is vllm"
    ):
        parse_request({"samplers": "vllm", "entropix_temperature": 1}, EntropixConfig())
