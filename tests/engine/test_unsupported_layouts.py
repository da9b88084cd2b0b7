"""Layouts and features that vLLM takes on this machine and entropix can't be had with: refused before an engine starts."""

import re
from types import SimpleNamespace

import pytest

from tests.support.models import tiny_llama
from tests.support.runners import is_v2
from tests.support.server import run_vllm
from vllm_entropix import ConfigError

CONTEXT = ("context parallelism", "set --decode-context-parallel-size and --prefill-context-parallel-size to 1")
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
EXACT = "set it to standard or block in the speculative config"
ON_BOTH = [
    ({"tensor_parallel_size": 2, "decode_context_parallel_size": 2}, *CONTEXT),
    (
        {"ubatch_size": 2, "all2all_backend": "deepep_low_latency"},
        "dual-batch overlap",
        "leave out --enable-dbo and --ubatch-size",
    ),
]
# vLLM refuses these on Model Runner V1 itself.
ON_V2 = [
    ({"prefill_context_parallel_size": 2}, *CONTEXT),
    (
        {"tensor_parallel_size": 2, "enable_batch_sharded_sampling": True},
        "batch-sharded sampling",
        "leave out --enable-batch-sharded-sampling",
    ),
    (
        {"speculative_config": {**NGRAM, "rejection_sample_method": "synthetic", "synthetic_acceptance_length": 2.0}},
        "rejection_sample_method 'synthetic'",
        EXACT,
    ),
    ({"enable_trace_replay": True}, "trace replay", "leave out --enable-trace-replay"),
    ({"watermark_config": {"key": 1}}, "watermarking", "leave out --watermark-config"),
]


@pytest.fixture(scope="module")
def one_key_head(tmp_path_factory):
    """A model that leaves ranks without key heads of their own, which decode context parallelism asks for."""
    return tiny_llama(tmp_path_factory.mktemp("one"), num_key_value_heads=1)


@pytest.mark.both_runners
@pytest.mark.parametrize(("arguments", "feature", "way_out"), ON_BOTH + (ON_V2 if is_v2() else []))
def test_refused_where_vllm_alone_would_start(one_key_head, arguments, feature, way_out):
    from vllm import EngineArgs

    EngineArgs(str(one_key_head), **arguments).create_engine_config()
    with pytest.raises(ConfigError, match=f"^the sampler entropix doesn't work with {feature}.*; {re.escape(way_out)}$"):
        EngineArgs(str(one_key_head), **arguments, additional_config={"entropix": {}}).create_engine_config()


@pytest.mark.parametrize("method", ["fly", "yet to come"])
def test_a_lossy_verification_of_a_later_vllm_is_refused(one_key_head, method):
    from vllm import EngineArgs

    from vllm_entropix.engine.finalise import finalise

    config = EngineArgs(str(one_key_head)).create_engine_config()
    config.speculative_config = SimpleNamespace(rejection_sample_method=method)  # which this version doesn't take
    with pytest.raises(ConfigError, match=f"doesn't work with rejection_sample_method '{method}'.*; {EXACT}$"):
        finalise(config, {"entropix": {}})


def test_a_server_with_context_parallelism_ends_in_one_line(one_key_head):
    parallel = ("--tensor-parallel-size", "2", "--decode-context-parallel-size", "2")
    ended = run_vllm("serve", str(one_key_head), "--sampler", "entropix", *parallel)
    assert ended.returncode == 1
    assert ended.stderr.strip().splitlines()[-1].startswith("vllm-entropix: the sampler entropix doesn't work with context")
    assert "Traceback" not in ended.stderr
