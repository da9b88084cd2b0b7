"""``--distributed-executor-backend ray`` with two workers of a real Ray."""

import os

import pytest

from tests.support import layouts, ray_cluster
from tests.support.engine import close_engine, engine, generate
from tests.support.models import tiny_llama
from vllm_entropix import __version__

pytestmark = pytest.mark.engine

SAMPLED = {"max_tokens": 12, "ignore_eos": True, "seed": 3, "extra_args": {"entropix_trace": "on"}}
REQUESTS = [[prompt, SAMPLED] for prompt in layouts.SHORT]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("model"), layers=2, query_key_scale=2.0)


@pytest.fixture(scope="module")
def found(model, tmp_path_factory):
    close_engine()
    arguments = {"additional_config": {"entropix": {"attention": {"layers": "all"}}}}
    log = tmp_path_factory.mktemp("ray") / "log"
    first, second, *_ = sorted(os.sched_getaffinity(0))
    bound = {"VLLM_CPU_OMP_THREADS_BIND": f"{first}|{second}"}
    return ray_cluster.run(log, "executor_script", str(model), arguments, REQUESTS, **bound)


def test_two_workers_give_what_one_gives(model, found):
    from vllm import SamplingParams

    llm = engine(model, sampler="entropix", sampler_config={"attention": {"layers": "all"}})
    expected = generate(llm, layouts.SHORT, [SamplingParams(**SAMPLED)] * len(layouts.SHORT))
    for (tokens, trace), output in zip(found["outputs"], expected, strict=True):
        want_tokens, want_trace = layouts.plain(output.outputs[0])
        assert tokens == want_tokens
        for record, want in zip(trace, want_trace, strict=True):
            for metric in layouts.METRICS:
                assert record[metric] == pytest.approx(want[metric], rel=1e-5, abs=1e-5), metric


def test_when_a_worker_dies_generation_ends_and_so_does_the_other(found):
    assert found["killed"]["error"] is not None
    assert found["killed"]["seconds"] < 30
    assert found["killed"]["alive"] == 0


def test_a_node_without_the_plugin_is_named(found):
    assert "vllm-entropix isn't installed on Ray node 127.0.0.1" in found["refused"]
    assert f"install version {__version__} on every node" in found["refused"]
