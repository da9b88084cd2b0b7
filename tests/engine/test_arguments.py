"""The two options on vLLM's own command line, and the ways of saying the same."""

import argparse
import contextlib
import copy
import json
import logging
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from itertools import chain, permutations
from types import SimpleNamespace

import pytest

from tests.support.engine import adapter_of, close_engine, engine, generate
from tests.support.runners import is_v2
from tests.support.server import environment, run_vllm
from vllm_entropix import ConfigError
from vllm_entropix.engine.arguments import FromCommandLine, merge_keywords
from vllm_entropix.samplers.registry import load_server, names

ON_V2 = is_v2()
SETTINGS = {"preset": "torch-2024-10", "base": {"top_k": 5}}


@pytest.fixture(scope="module")
def parser():
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))


@pytest.fixture(scope="module")
def engine_parser():
    """The parser of scripts that make an engine of what they parse: it has vLLM's engine arguments and no others."""
    from vllm import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return EngineArgs.add_cli_args(FlexibleArgumentParser(prog="script"))


def additional(parser, *arguments):
    return parser.parse_args(["--model", "m", *arguments]).additional_config


def test_without_the_option_nothing_is_added(parser):
    assert not additional(parser)
    assert not additional(parser, "--sampler", "vllm")
    assert additional(parser, "--additional-config", '{"other": 1}') == {"other": 1}


def test_preset_json_and_files_in_any_order(parser, tmp_path):
    toml, jsonfile = tmp_path / "s.toml", tmp_path / "s.json"
    toml.write_text('preset = "torch-2024-10"\n[base]\ntop_k = 5\n')
    jsonfile.write_text(json.dumps(SETTINGS))
    for given in (json.dumps(SETTINGS), str(toml), str(jsonfile)):
        assert additional(parser, "--sampler", "entropix", "--sampler-config", given) == {"entropix": SETTINGS}
        assert additional(parser, "--sampler-config", given, "--sampler", "entropix") == {"entropix": SETTINGS}
    assert additional(parser, "--sampler", "entropix") == {"entropix": {}}
    assert additional(parser, "--sampler", "entropix", "--sampler-config", "jax-2024-10") == {
        "entropix": {"preset": "jax-2024-10"}
    }


def test_any_sampler_by_name(parser, capsys):
    for name in names():
        asked = {} if name == "entropix" else {"sampler": name}
        assert additional(parser, "--sampler", name) == {"entropix": asked}
        assert additional(parser, "--sampler", "vllm", "--sampler", name) == {"entropix": asked}
    assert additional(parser, "--sampler", "min_p", "--sampler-config.min_p.min_p", "0.1") == {
        "entropix": {"sampler": "min_p", "min_p": {"min_p": 0.1}}
    }
    # The option goes before what the settings say.
    assert additional(parser, "--sampler", "entropix", "--sampler-config", '{"sampler": "min_p"}') == {
        "entropix": {"sampler": "entropix"}
    }
    with pytest.raises(SystemExit):
        additional(parser, "--sampler", "mini-p")
    assert "unknown sampler 'mini-p'; there are vllm, chain, entropix, min_p and top_n_sigma" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        additional(parser, "--sampler", "dry;mini-p")
    assert "unknown sampler 'mini-p' in the chain 'dry;mini-p'; there are adaptive_p, dry" in capsys.readouterr().err
    # Spelled as llama.cpp's users may, and one name alone.
    for given, sampler in (
        ("dry; top-n-sigma;temp", "dry;top_n_sigma;temperature"),
        ("min-p", "min_p"),
        ("xtc", "xtc"),
        ("", ""),
    ):
        assert additional(parser, "--sampler", given) == {"entropix": {"sampler": sampler}}


def test_vllms_own_draw_with_signals(parser, capsys):
    observed = {"entropix": {"signals": True, "sampler": "vllm"}}
    on = ["--sampler-config.signals", "true"]
    for given in (["--sampler", "vllm", *on], [*on, "--sampler", "vllm"], ["--sampler", "entropix", "--sampler", "vllm", *on]):
        assert additional(parser, *given) == observed
    # What is switched off with the other sampler doesn't come back; what is said beside the signals holds.
    other = json.dumps({"entropix": {"base": {"top_k": 5}}})
    assert additional(parser, "--additional-config", other, "--sampler", "vllm", *on) == observed
    scored = additional(parser, "--sampler", "vllm", *on, "--sampler-config.scores.default", "true")
    assert scored == {"entropix": {"signals": True, "scores": {"default": True}, "sampler": "vllm"}}
    # A file that asks for entropix is overruled with its settings.
    for off in (["--sampler-config.signals", "false"], ["--sampler-config", "jax-2024-10"]):
        with pytest.raises(SystemExit):
            additional(parser, "--sampler", "vllm", *off)
        assert "--sampler vllm, which has no settings unless signals is true" in capsys.readouterr().err
    keywords = merge_keywords({"sampler": "vllm", "sampler_config": {"signals": True}})
    assert keywords["additional_config"] == observed
    assert load_server(observed["entropix"]).sampler == "vllm"
    with pytest.raises(ConfigError, match="the sampler vllm has no settings unless signals is true"):
        load_server({"sampler": "vllm"})


DOTTED = [
    (["--sampler-config.base.top_k", "5"], {"base": {"top_k": 5}}),
    (["--sampler-config.base.top_k=5"], {"base": {"top_k": 5}}),
    (["--sampler_config.base.top_k", "5"], {"base": {"top_k": 5}}),
    (["--sampler-conf.base.top_k", "5"], {"base": {"top_k": 5}}),
    (["--sampler-config.trace.path", "t.jsonl"], {"trace": {"path": "t.jsonl"}}),
    (["--sampler-config.clarification.text", " ... wait."], {"clarification": {"text": " ... wait."}}),
    (["--sampler-config.attention.layers", "[0, 1]"], {"attention": {"layers": [0, 1]}}),
    (["--sampler-config.attention.layers+", "1"], {"attention": {"layers": ["1"]}}),
    (["--sampler-config.attention.layers+=0,1"], {"attention": {"layers": ["0", "1"]}}),
    (["--sampler-config.x=y"], {"x": "y"}),
    # A preset or a file, with settings of its own over it: wherever they stand, dotted ones come last.
    (["--sampler-config", "torch-2024-10", "--sampler-config.base.top_k", "5"], SETTINGS),
    (["--sampler-config.base.top_k", "5", "--sampler-config", "torch-2024-10"], SETTINGS),
    (["--sampler-config.preset", "torch-2024-10", "--sampler-config.base.top_k", "5"], SETTINGS),
    (
        ["--sampler-config", '{"base": {"top_k": 9, "top_p": 1}}', "--sampler-config.base.top_k", "5"],
        {"base": {"top_k": 5, "top_p": 1}},
    ),
    # The later over the earlier.
    (["--sampler-config", "jax-2024-10", "--sampler-config", json.dumps(SETTINGS)], SETTINGS),
    (["--sampler-config", '{"base": {"top_k": 5}}', "--sampler-config", "torch-2024-10"], SETTINGS),
    (["--sampler-config.base.top_k", "4", "--sampler-config.base.top_k", "5"], {"base": {"top_k": 5}}),
]


@pytest.mark.parametrize(
    ("arguments", "settings"), DOTTED, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_every_form_of_the_settings_in_any_place(parser, arguments, settings):
    for sampler in (["--sampler", "entropix"], ["--sampler=entropix"]):
        for given in ([*sampler, *arguments], [*arguments, *sampler], ["--sampler", "vllm", *arguments, *sampler]):
            assert additional(parser, *given) == {"entropix": settings}
    from_file = additional(parser, "--additional-config", json.dumps({"entropix": {"base": {"top_k": 1}}}), *arguments)
    assert from_file["entropix"].keys() == {"base", *settings}


# (the file of --config, the command line, the additional config; None: refused)
PRECEDENCE = [
    # one source
    ("sampler: entropix", [], {"entropix": {}}),
    ("sampler: entropix\nsampler-config:\n  base:\n    top_k: 5", [], {"entropix": {"base": {"top_k": 5}}}),
    ("sampler: entropix\nsampler_config.base.top_k: 5\nsampler_config: torch-2024-10", [], {"entropix": SETTINGS}),
    ("sampler: entropix\nsampler-config: torch-2024-10", [], {"entropix": {"preset": "torch-2024-10"}}),
    ("", ["--sampler", "vllm", "--sampler", "entropix"], {"entropix": {}}),
    ("", ["--sampler", "entropix", "--sampler", "vllm"], {}),
    ("", ["--sampler-config", "torch-2024-10"], None),
    ("", ["--sampler", "vllm", "--sampler-config", "torch-2024-10"], None),
    ("", ["--sampler", "entropix", "--sampler-config.base.top_k", "5", "--sampler", "vllm"], None),
    ("sampler-config: torch-2024-10", [], None),
    ("sampler: vllm\nsampler-config: torch-2024-10", [], None),
    # the command line over the file
    ("sampler: entropix", ["--sampler", "vllm"], {}),
    ("sampler: entropix\nsampler-config: torch-2024-10", ["--sampler", "vllm"], {}),
    ("sampler-config: torch-2024-10", ["--sampler", "vllm"], {}),
    ("sampler: vllm", ["--sampler", "entropix"], {"entropix": {}}),
    ("sampler: vllm", ["--sampler-config", "torch-2024-10"], None),
    ("sampler-config: torch-2024-10", ["--sampler", "entropix"], {"entropix": {"preset": "torch-2024-10"}}),
    ("sampler: entropix", ["--sampler-config", "torch-2024-10"], {"entropix": {"preset": "torch-2024-10"}}),
    ("sampler: entropix", ["--sampler", "vllm", "--sampler-config", "torch-2024-10"], None),
    (
        "sampler: entropix\nsampler-config.base.top_k: 4\nsampler-config.base.top_p: 1",
        ["--sampler-config", '{"base": {"top_k": 5}}'],
        {"entropix": {"base": {"top_k": 5, "top_p": 1}}},
    ),
    # both over additional_config
    ("", ["--additional-config", '{"entropix": {}, "other": 1}', "--sampler", "vllm"], {"other": 1}),
    ("", ["--additional-config", '{"entropix": false}', "--sampler", "entropix"], {"entropix": {}}),
    ("", ["--additional-config", '{"entropix": null}', "--sampler", "entropix"], {"entropix": {}}),
    (
        "",
        ["--additional-config", '{"entropix": true}', "--sampler-config", "torch-2024-10"],
        {"entropix": {"preset": "torch-2024-10"}},
    ),
    ("", ["--additional-config", '{"entropix": false}', "--sampler-config", "torch-2024-10"], None),
    (
        "",
        ["--additional-config.entropix.base.top_k", "4", "--sampler-config.base.top_k", "5"],
        {"entropix": {"base": {"top_k": 5}}},
    ),
    (
        "",
        ["--additional-config", '{"entropix": "jax-2024-10"}', "--sampler-config", json.dumps(SETTINGS)],
        {"entropix": SETTINGS},
    ),
    ("sampler: vllm", ["--additional-config", '{"entropix": {}}'], {}),
    ("additional-config:\n  entropix: {}", ["--sampler", "vllm"], {}),
    (
        "additional-config:\n  entropix:\n    base: {top_k: 4}",
        ["--sampler-config.base.top_k", "5"],
        {"entropix": {"base": {"top_k": 5}}},
    ),
    (
        "sampler: entropix",
        ["--additional-config", '{"entropix": {"base": {"top_k": 5}}}'],
        {"entropix": {"base": {"top_k": 5}}},
    ),
]


@pytest.mark.parametrize(("file", "line", "expected"), PRECEDENCE)
def test_the_command_line_goes_before_the_file_and_both_before_additional_config(
    parser, tmp_path, capsys, file, line, expected
):
    config = tmp_path / "serve.yaml"
    config.write_text(f"model: m\nseed: 3\n{file}\n")
    pairs = [line[place : place + 2] for place in range(0, len(line), 2)]
    orders = (
        [line]
        if len({option for option, _ in pairs}) < len(pairs)
        else [list(chain.from_iterable(order)) for order in permutations(pairs)]
    )
    for ours in orders:
        for arguments in (["--config", str(config), *ours], [*ours, "--config", str(config)]):
            if expected is not None:
                parsed = parser.parse_args(arguments)
                assert parsed.additional_config == expected
                assert (parsed.model, parsed.seed) == ("m", 3)
                continue
            with pytest.raises(SystemExit) as end:
                parser.parse_args(arguments)
            assert end.value.code == 1
            assert re.fullmatch(
                r"vllm serve: error: --sampler-config is given with.*; leave it out.*\n", capsys.readouterr().err
            )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--sampler", "entropix", "--sampler-config", "torch-2024-10"], {"entropix": {"preset": "torch-2024-10"}}),
        (["--sampler-config.base.top_k", "5", "--sampler", "entropix"], {"entropix": {"base": {"top_k": 5}}}),
        (["--sampler", "vllm"], {}),
        (["--additional-config", '{"entropix": {}}', "--sampler", "vllm"], {}),
        ([], {}),
    ],
)
def test_parsed_arguments_can_be_passed_on(engine_parser, tiny, arguments, expected):
    from vllm import AsyncEngineArgs, EngineArgs

    args = engine_parser.parse_args(["--model", str(tiny), *arguments])
    assert not {name for name in vars(args) if "sampler" in name}
    for passed in (
        args,
        copy.copy(args),
        copy.deepcopy(args),
        pickle.loads(pickle.dumps(args)),
        argparse.Namespace(**vars(args)),
    ):
        for made in (EngineArgs(**vars(passed)), EngineArgs.from_cli_args(passed), AsyncEngineArgs(**vars(passed))):
            assert made.additional_config == expected
            assert replace(made, seed=4).additional_config == expected
            assert replace(made, sampler="vllm").additional_config == {}
            assert replace(made, sampler="entropix").additional_config == {"entropix": {**expected.get("entropix", {})}}
            assert type(made)(**vars(made)).additional_config == expected
    # What is parsed once more into what was parsed before.
    assert engine_parser.parse_args(["--seed", "4"], namespace=args).additional_config == expected


def test_additional_config_is_merged_and_not_replaced(parser):
    given = ("--additional-config", '{"other": 1, "entropix": {"base": {"top_p": 0.5, "top_k": 1}}}')
    ours = ("--sampler", "entropix", "--sampler-config", '{"base": {"top_k": 5}}')
    expected = {"other": 1, "entropix": {"base": {"top_p": 0.5, "top_k": 5}}}
    for arguments in ((*given, *ours), (*ours, *given)):
        merged = additional(parser, *arguments)
        assert merged == expected
        assert isinstance(merged, FromCommandLine)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--sampler", "enthropix"], "unknown sampler 'enthropix'; there are vllm, chain, entropix, min_p and top_n_sigma"),
        (["--sampler", "entropix", "--sampler-config", "gpt"], "unknown preset 'gpt'"),
        (["--sampler", "entropix", "--sampler-config", "{bad"], "not valid JSON"),
        (["--sampler", "entropix", "--sampler-config", "/nowhere/x.toml"], "can't read the sampler config /nowhere/x.toml"),
    ],
)
def test_mistakes_end_in_one_line_and_status_1(parser, capsys, arguments, named):
    with pytest.raises(SystemExit) as end:
        additional(parser, *arguments)
    assert end.value.code == 1
    assert named in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "command", ["serve", "run-batch", "launch render", "bench throughput", "bench latency", "bench startup"]
)
def test_every_command_with_an_engine_has_the_options(monkeypatch, command):
    """By vLLM's own modules: the parsers are made as `vllm` makes them."""
    from importlib import import_module

    from vllm.utils.argparse_utils import FlexibleArgumentParser

    name = {"serve": "serve", "run-batch": "run_batch", "launch render": "launch"}.get(command, "benchmark.main")
    monkeypatch.setattr("sys.argv", ["vllm", *command.split()])  # without the word bench its parsers aren't made
    top = FlexibleArgumentParser(prog="vllm")
    below = top.add_subparsers(dest="subparser")
    for one in import_module(f"vllm.entrypoints.cli.{name}").cmd_init():
        one.subparser_init(below)
    needed = {"run-batch": ["-i", "a", "-o", "b"]}.get(command, [])
    for given in (
        ["--sampler", "entropix", "--sampler-config.base.top_k", "5"],
        ["--sampler-config.base.top_k=5", "--sampler=entropix"],
    ):
        args = top.parse_args([*command.split(), *needed, "--model", "m", *given])
        assert args.additional_config == {"entropix": {"base": {"top_k": 5}}}
        assert not {name for name in vars(args) if "sampler" in name}
    with pytest.raises(SystemExit) as end:
        top.parse_args([*command.split(), *needed, "--model", "m", "--sampler-config", "torch-2024-10"])
    assert end.value.code == 1


def test_keywords_of_llm():
    assert merge_keywords({"model": "m"}) == {"model": "m"}
    assert merge_keywords({"sampler": None, "sampler_config": None}) == {}
    asked = {"entropix": {"base": {"top_k": 1, "top_p": 1}}, "other": 1}
    assert merge_keywords({"sampler": "vllm", "additional_config": asked})["additional_config"] == {"other": 1}
    assert merge_keywords({"sampler_config": SETTINGS, "additional_config": asked})["additional_config"] == {
        "entropix": {"preset": "torch-2024-10", "base": {"top_k": 5, "top_p": 1}},
        "other": 1,
    }
    with pytest.raises(ConfigError, match="sampler_config is given with sampler='vllm', which has no settings"):
        merge_keywords({"sampler": "vllm", "sampler_config": {}})
    with pytest.raises(ConfigError, match=r"additional_config is \[1\], but it should be a table"):
        merge_keywords({"sampler": "entropix", "additional_config": [1]})
    with pytest.raises(ConfigError, match="unknown sampler 'enthropix' in the chain"):
        merge_keywords({"sampler": ["enthropix"]})
    assert merge_keywords({"sampler": ["dry", "temp"]})["additional_config"] == {"entropix": {"sampler": "dry;temperature"}}
    assert merge_keywords({"sampler": "entropix", "sampler_config": SETTINGS})["additional_config"] == {"entropix": SETTINGS}
    assert merge_keywords({"sampler": "vllm"})["additional_config"] == {}
    with pytest.raises(ConfigError, match="unknown sampler 'x'"):
        merge_keywords({"sampler": "x"})
    with pytest.raises(ConfigError, match="without sampler"):
        merge_keywords({"sampler_config": SETTINGS})


NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
REFUSED = [
    ({"base": {"top_p": 7}}, {}, "base.top_p is 7, but input should be less than or equal to 1"),
    ({"clarification": {"token_ids": [100000]}}, {}, "outside the model's vocabulary of 512"),
    ({"clarification": {"text": "much too long " * 9}}, {}, "tokens long; at most 64 can be forced"),
    ({"clarification": {"text": "a"}}, {"skip_tokenizer_init": True}, "give clarification.token_ids"),
    ({"fidelity": "original"}, {}, "the original's clarification token has token 2564"),
    ({"attention": {"layers": [0, 9]}}, {}, "layer 9, but the model has layers 0 to 1"),
    ({}, {"runner": "pooling"}, "pooling models"),
]
V1_ONLY = [({}, {"speculative_config": NGRAM}, "speculative decoding on Model Runner V1")]


@pytest.mark.parametrize(("settings", "engine_arguments", "named"), REFUSED + ([] if ON_V2 else V1_ONLY))
def test_what_cannot_be_had_is_refused_before_an_engine_starts(tiny, settings, engine_arguments, named):
    from vllm import EngineArgs

    with pytest.raises(ConfigError, match=re.escape(named)):
        EngineArgs(str(tiny), additional_config={"entropix": settings}, **engine_arguments).create_engine_config()
    with pytest.raises(SystemExit) as end:
        EngineArgs(
            str(tiny), additional_config=FromCommandLine({"entropix": settings}), **engine_arguments
        ).create_engine_config()
    assert end.value.code.startswith("vllm-entropix: ")


@pytest.mark.parametrize(
    ("part", "setting", "value", "named"),
    [
        ("parallel_config", "decode_context_parallel_size", 2, "context parallelism"),
        ("parallel_config", "prefill_context_parallel_size", 2, "context parallelism"),
        ("parallel_config", "enable_dbo", True, "dual-batch overlap"),
        ("parallel_config", "ubatch_size", 2, "dual-batch overlap"),
        ("parallel_config", "enable_batch_sharded_sampling", True, "batch-sharded sampling"),
        ("model_config", "enable_trace_replay", True, "trace replay"),
        (None, "watermark_config", object(), "watermarking"),
    ],
)
def test_what_only_a_gpu_can_have_is_refused(tiny, part, setting, value, named):
    # vLLM refuses some of these on a CPU before we are asked, so they are set on a configuration that is made already. What
    # it takes here is given by its own arguments in test_unsupported_layouts.py.
    from vllm import EngineArgs

    from vllm_entropix.engine.finalise import finalise

    config = EngineArgs(str(tiny)).create_engine_config()
    object.__setattr__(config if part is None else getattr(config, part), setting, value)
    with pytest.raises(ConfigError, match=f"doesn't work with .*{re.escape(named)}"):
        finalise(config, {"entropix": {}})


@pytest.mark.parametrize("key", ["Entropix", "entropix_config", "vllm_entropix", "vllm-entropix", "entropix.base.top_k"])
def test_a_key_that_nothing_reads_is_refused(tiny, key):
    from vllm import EngineArgs

    with pytest.raises(ConfigError, match=f"additional_config has '{re.escape(key)}', which nothing reads"):
        EngineArgs(str(tiny), additional_config={key: {}}).create_engine_config()
    assert EngineArgs(str(tiny), additional_config={"other": {}}).create_engine_config().additional_config == {"other": {}}


@contextlib.contextmanager
def log_of_entropix():
    """Messages that our logger, whose parents don't pass them on to pytest, gets meanwhile."""
    from vllm.config.logging import LoggingConfig
    from vllm.logger import configure_logging_if_needed

    configure_logging_if_needed(LoggingConfig())  # which takes handlers away; vLLM does it with its first configuration
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("vllm.plugins.entropix")
    logger.addHandler(handler)
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        yield messages
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)


def test_what_is_said_when_a_configuration_is_made(tiny):
    from vllm import EngineArgs

    def said(rank=0, servers=1, **settings):
        args = EngineArgs(str(tiny), additional_config={"entropix": settings}, async_scheduling=False)
        args._api_process_count, args._api_process_rank = servers, rank
        with log_of_entropix() as messages:
            args.create_engine_config()
        return messages

    calibration, scheduler = said(clarification={"text": "hm?"})
    assert "no calibration of this model is known" in calibration
    assert "extends vLLM's own Scheduler, and asynchronous scheduling is off as without the plugin" in scheduler
    hint, other = said(clarification={"text": "hm?", "max_per_request": 0}), said(regimes=False)
    assert hint[2:] == ["entropix: the clarification can never be inserted: clarification.max_per_request is 0."]
    assert other == [calibration, scheduler]
    # Several API servers say nothing; the process that starts them does.
    assert said(rank=0, servers=2) == said(rank=1, servers=2) == []
    assert said(rank=-1, servers=2) == [calibration, scheduler]


_ASK_TWICE = """
import sys
import vllm_entropix
from vllm import EngineArgs
def ask(additional):
    config = EngineArgs(sys.argv[1], additional_config=additional).create_engine_config()
    assert config.additional_config == additional and not config.model_config.logits_processors
for additional in ({}, {"entropix": None}, {"entropix": False}):
    ask(additional)
print("nobody has asked", flush=True)
for additional in ({"entropix": {}}, {"entropix": {"base": {"top_k": 5}}}):
    ask(additional)
try:
    EngineArgs(sys.argv[1], sampler="entropix")
except TypeError as error:
    print(error)
"""


def test_switched_off_who_asks_is_told_once(tiny):
    ended = subprocess.run(
        [sys.executable, "-c", _ASK_TWICE, str(tiny)],
        env=environment(VLLM_ENTROPIX_DISABLE="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,  # in the order in which it is written
        text=True,
        timeout=420,
        check=True,
    )
    before, _, told = ended.stdout.partition("nobody has asked")
    warning = "asks for the sampler entropix, but VLLM_ENTROPIX_DISABLE is set"
    assert warning not in before
    assert told.count(warning) == 1
    assert "unexpected keyword argument 'sampler'" in told


@pytest.mark.engine
def test_other_processors_are_named_in_their_order(tiny, tmp_path, monkeypatch):
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import cached_load_custom_logitsprocs

    from tests.support import processors

    # Another plugin, by its entry point; and one that the engine is asked for.
    package = tmp_path / "other-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[vllm.logits_processors]\nother = tests.support.processors:Ban\n")
    monkeypatch.syspath_prepend(tmp_path)
    cached_load_custom_logitsprocs.cache_clear()
    # Without regimes every token is drawn with the base parameters.
    by_request = {"regimes": False, "base": {"source": "request"}}
    with log_of_entropix() as messages:
        llm = engine(
            tiny,
            fresh=True,
            sampler="entropix",
            sampler_config=by_request,
            logits_processors=["tests.support.processors:Sharpen"],
        )
    order = [*processors.BEFORE, "entropix", *processors.AFTER]
    names = [one if isinstance(one, str) else f"tests.support.processors.{one.__qualname__}" for one in order]
    [line] = [message for message in messages if "other logits processors" in message]
    assert f"in this order: {', '.join(names)}. " in line
    # vLLM keeps output token ids for another's processor, which may want them.
    if not ON_V2:
        assert adapter_of(llm).runner.input_batch.logitsprocs_need_output_token_ids
    client_says = {"temperature": 0.4, "top_p": 0.7, "top_k": 9, "min_p": 0.02}
    asked = [
        (client_says, {}),
        (client_says, {"entropix_base": "request"}),
        (client_says, {"entropix_base": "preset"}),
        ({"temperature": 1.5}, {"entropix_base": "preset"}),
    ]
    params = [
        SamplingParams(max_tokens=12, ignore_eos=True, seed=5, extra_args={"entropix_trace": "on", **base}, **said)
        for said, base in asked
    ]
    outputs = generate(llm, ["The quick brown fox"] * len(params), params)
    drawn = [{(record.temperature, record.top_p, record.top_k) for record in o.outputs[0].entropix_trace} for o in outputs]
    for found, expected in zip(drawn, [(0.4, 0.7, 9)] * 2 + [(0.666, 0.9, 27)] * 2, strict=True):
        assert len(found) == 1
        assert found.pop() == pytest.approx(expected)
    cached_load_custom_logitsprocs.cache_clear()
    close_engine()


def test_another_vllm_is_refused_with_its_version_and_the_range(tiny, monkeypatch):
    import vllm
    from vllm import EngineArgs

    monkeypatch.setattr(vllm, "__version__", "0.29.1")
    with pytest.raises(ConfigError, match=r">=0\.31,<0\.34.*version is 0\.29\.1"):
        EngineArgs(str(tiny), additional_config={"entropix": {}}).create_engine_config()


def test_a_changed_vllm_is_refused_with_what_changed(tiny, monkeypatch):
    from vllm import EngineArgs
    from vllm.v1.sample.sampler import Sampler

    monkeypatch.delattr(Sampler, "sample")
    with pytest.raises(ConfigError, match=r"Sampler\.sample is missing"):
        EngineArgs(str(tiny), additional_config={"entropix": {}}).create_engine_config()


def test_the_process_ends_in_one_line_and_status_1(tiny):
    ended = run_vllm("serve", str(tiny), "--sampler", "entropix", "--sampler-config", '{"base": {"top_p": 7}}')
    assert ended.returncode == 1
    assert ended.stderr.strip().splitlines()[-1].startswith("vllm-entropix: sampler config: base.top_p is 7")
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("extra_args", "refused"),
    [
        ({"entropix_trace": "on"}, "'entropix_trace' can't be had: this engine doesn't run entropix"),
        ({"other": 1, "entropix_temprature": 1}, "entropix_temprature"),
        ({"entropix": "off", "other": 1}, None),
        ({"other": 1}, None),
        (None, None),
    ],
)
def test_settings_that_nobody_would_read_are_refused(extra_args, refused):
    from vllm import SamplingParams

    from vllm_entropix.engine.admission import admit

    plain = SimpleNamespace(vllm_config=SimpleNamespace(additional_config={}))
    refusal = pytest.raises(ValueError, match=re.escape(refused)) if refused else contextlib.nullcontext()
    with refusal:
        assert admit(plain, lambda: "validated", SamplingParams(extra_args=extra_args)) == "validated"
