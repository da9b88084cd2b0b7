"""Layouts of several ranks: tokens and metrics are those of one rank. Engines of two workers, for real, on the CPU."""

import platform

import pytest

from tests.support import layouts
from tests.support.engine import close_engine
from tests.support.models import tiny_llama
from vllm_entropix import __version__
from vllm_entropix.engine import resolved

pytestmark = [pytest.mark.engine, pytest.mark.both_runners]


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory):
    """Layers 0 and 1 are on the first of two pipeline stages, 2 and 3 on the second."""
    # Attention is less peaked than in other tests: the order of the ranks' sums is a difference of 1e-7 that it would amplify.
    return tiny_llama(tmp_path_factory.mktemp("four"), layers=4, query_key_scale=2.0)


@pytest.fixture(scope="module")
def of_one_worker(four_layers):
    with pytest.MonkeyPatch.context() as patch:
        llm = layouts.layout(patch, four_layers)
        return {**layouts.results(llm), "branches": layouts.branches(llm)}


def assert_equal(found, expected):
    """The same tokens, and metrics within 1e-5."""
    for layers in layouts.LAYERS:
        for (tokens, trace), (want_tokens, want_trace) in zip(found[layers], expected[layers], strict=True):
            assert tokens == want_tokens
            assert (trace is None) == (want_trace is None)
            for record, want in zip(trace or (), want_trace or (), strict=True):
                assert record["regime"] == want["regime"]
                for metric in layouts.METRICS:
                    assert record[metric] == pytest.approx(want[metric], rel=1e-5, abs=1e-5), (layers, metric)
                assert record["mu"] == (None if want["mu"] is None else pytest.approx(want["mu"], abs=1e-4))


def test_what_is_compared_depends_on_the_layers(of_one_worker):
    entropies = [of_one_worker[layers][0][1][-1]["attention_entropy"] for layers in layouts.LAYERS]
    assert len({round(entropy, 2) for entropy in entropies}) == len(layouts.LAYERS)
    assert of_one_worker["all"][3][1] is None  # opted out
    assert len({record["mu"] for record in of_one_worker["all"][5][1]}) == 12  # a chain's


def test_tensor_parallel(monkeypatch, four_layers, of_one_worker):
    llm = layouts.layout(monkeypatch, four_layers, tensor_parallel_size=2, distributed_executor_backend="mp")
    llm.collective_rpc(layouts.keep_digests)
    llm.collective_rpc(layouts.count_exchanges)
    assert_equal(layouts.results(llm), of_one_worker)
    assert layouts.branches(llm) == of_one_worker["branches"]
    assert len(of_one_worker["branches"]) > 4
    first, second = llm.collective_rpc(layouts.digests)
    assert len(first) > 50
    assert first == second, "the ranks drew from different bits"
    # One of the contexts' length and a small one, whatever is observed; none where no row reads attention.
    for counted in llm.collective_rpc(layouts.exchanges):
        assert len(counted) > 50
        assert set(counted) <= {0, 2}
        assert 2 in counted


def test_pipeline_parallel(monkeypatch, four_layers, of_one_worker):
    llm = layouts.layout(monkeypatch, four_layers, pipeline_parallel_size=2, distributed_executor_backend="mp")
    assert_equal(layouts.results(llm), of_one_worker)
    assert layouts.branches(llm) == of_one_worker["branches"]
    close_engine()


def test_a_worker_with_another_version_is_refused(monkeypatch, capfd, four_layers):
    close_engine()
    monkeypatch.setattr(resolved, "__version__", "0.0.1")  # here, and not in the worker's process
    with pytest.raises(Exception, match="initialization failed"):
        layouts.layout(monkeypatch, four_layers, distributed_executor_backend="mp", tensor_parallel_size=2)
    told = capfd.readouterr().out
    # The first to refuse ends the others, which may not get to say it.
    refusals = [
        f"worker {rank} on node {platform.node()} has vllm-entropix {__version__}, but the engine was configured by 0.0.1; "
        "install the same version on every node"
        for rank in (0, 1)
    ]
    assert any(refusal in told for refusal in refusals)
