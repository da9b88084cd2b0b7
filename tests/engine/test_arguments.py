"""The two options on vLLM's own command line, and the ways of saying the same."""

import json
import re

import pytest

from tests.support.runners import is_v2
from tests.support.server import run_vllm
from vllm_entropix import ConfigError
from vllm_entropix.engine.arguments import FromCommandLine, merge_keywords

ON_V2 = is_v2()


@pytest.fixture(scope="module")
def parser():
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))


def additional(parser, *arguments):
    return parser.parse_args(["--model", "m", *arguments]).additional_config


SETTINGS = {"preset": "torch-2024-10", "base": {"top_k": 5}}


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


def test_dotted_options_and_yaml(parser, tmp_path):
    dotted = additional(parser, "--sampler", "entropix", "--sampler-config.base.top_k", "5")
    assert dotted == {"entropix": {"base": {"top_k": 5}}}
    config = tmp_path / "c.yaml"
    config.write_text("sampler: entropix\nsampler-config:\n  base:\n    top_k: 5\n")
    assert parser.parse_args(["--model", "m", "--config", str(config)]).additional_config == dotted


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
        (["--sampler", "enthropix"], "unknown sampler 'enthropix'; there are vllm and entropix"),
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


def test_keywords_of_llm():
    assert merge_keywords({"model": "m"}) == {"model": "m"}
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
        ("model_config", "return_sampling_mask", True, "--return-sampling-mask"),
        ("model_config", "enable_trace_replay", True, "trace replay"),
        (None, "watermark_config", object(), "watermarking"),
    ],
)
def test_what_only_a_gpu_can_have_is_refused(tiny, part, setting, value, named):
    # vLLM refuses some of these on a CPU before we are asked, so they are set on a configuration that is made already. What
    # it takes here is given by its own arguments in test_unsupported_layouts.py.
    from vllm import EngineArgs

    from vllm_entropix.engine.engine_config import finalise

    config = EngineArgs(str(tiny)).create_engine_config()
    object.__setattr__(config if part is None else getattr(config, part), setting, value)
    with pytest.raises(ConfigError, match=f"doesn't work with .*{re.escape(named)}"):
        finalise(config, {"entropix": {}})


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
