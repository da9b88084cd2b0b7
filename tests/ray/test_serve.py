"""deploy/ray/serve.py: two replicas under load, while an engine and then a replica is killed."""

import pytest

from tests.support import ray_cluster
from tests.support.engine import close_engine
from tests.support.server import free_port
from vllm_entropix.client import trace_of

pytestmark = pytest.mark.engine


def test_arguments_of_a_command_line():
    from deploy.ray.serve import Arguments

    given = {"max_replicas": "4", "sampler_config": "torch-2024-10", "engine_kwargs": '{"enforce_eager": true}'}
    arguments = Arguments.model_validate(given)
    assert (arguments.max_replicas, arguments.sampler_config) == (4, "torch-2024-10")
    assert arguments.engine_kwargs == Arguments.model_validate({"engine_kwargs": {"enforce_eager": True}}).engine_kwargs
    with pytest.raises(ValueError, match="engine_kwargs"):
        Arguments.model_validate({"engine_kwargs": "enforce_eager"})


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    close_engine()
    # Otherwise vLLM binds both replicas to the same CPU.
    alone = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    return ray_cluster.run(tmp_path_factory.mktemp("serve") / "log", "serve_script", free_port(), timeout=420, **alone)


def test_the_sampler_serves(seen):
    assert seen["expected"]["finish"] == "length"
    assert seen["expected"]["text"]
    assert trace_of({"entropix": seen["trace"]}).tokens


@pytest.mark.parametrize("killed", ["engine", "replica"])
def test_requests_in_flight_are_whole_or_end_in_an_error(seen, killed):
    streams = seen[killed]["streams"]
    whole = [stream for stream in streams if stream["error"] is None]
    # The other replica's went on; none was cut in silence.
    for stream in whole:
        assert stream["finish"] == "length"
        assert stream["text"] == seen["expected"]["text"]
    assert whole
    assert len(whole) < len(streams), "nothing was in flight on what was killed"
    for stream in streams:
        if stream["error"] is not None:
            assert stream["finish"] is None
            assert seen["expected"]["text"].startswith(stream["text"])


@pytest.mark.parametrize("killed", ["engine", "replica"])
def test_new_requests_are_served_within_five_seconds(seen, killed):
    failed = [request for request in seen[killed]["new"] if request["error"] is not None]
    late = [request for request in seen[killed]["new"] if request["asked"] >= 5]
    assert len(late) > 20
    assert all(request["asked"] < 5 for request in failed), failed
    assert all(request["seconds"] < 5 for request in late)
