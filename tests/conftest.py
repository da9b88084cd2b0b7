"""What every test process needs before vLLM is imported, which tests run first, and which may start an engine."""

import functools
import os
import tempfile

import hypothesis
import pytest

from tests.support import collector, fast, runners

# Model Runner V2 with ENTROPIX_TEST_RUNNER=v2.
runners.choose()
fast.prepare()
collector.prepare()

# In process: the tests look into the engine, and three imports less per engine.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
# The first compilation stalls for up to 25 s; numerics are the same.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# Engines of tests run with no calibration that somebody keeps of their models.
os.environ["ENTROPIX_CALIBRATIONS"] = tempfile.mkdtemp(prefix="entropix-calibrations-")

if "PYTEST_XDIST_WORKER" in os.environ:
    # A thread for each of the tests that run side by side; vLLM would bind those of all engines to the same core.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


# How long an example takes says nothing beside other tests.
hypothesis.settings.register_profile("beside_others", deadline=None)
hypothesis.settings.load_profile("beside_others")

# Begun late they would keep one core busy when the others have nothing left to do.
LONGEST = (
    "test_speculation.py",
    "test_serve.py",
    "test_smollm2.py",
    "test_gemma.py",
    "test_triton.py",
    "test_routes.py",
    "test_gpu_benchmark.py",
)

# Marks that a pass of `make test` or `make test-fast` selects, each in the file of its tests as pytest.mark.NAME.
PASSES = ("alone", "both_runners")


@functools.cache
def names(path, mark):
    """Does a file with tests name a mark?"""
    return f"pytest.mark.{mark}" in path.read_text(encoding="utf-8")


def pytest_ignore_collect(collection_path, config):
    # To import the other files, too, would take each worker of the pass some 12 s of its core.
    mark, _, _ = config.option.markexpr.partition(" and ")
    if mark in PASSES and collection_path.suffix == ".py":
        return not names(collection_path, mark) or None
    return None


def pytest_collection_modifyitems(items):
    for item in items:
        unnamed = [mark for mark in PASSES if item.get_closest_marker(mark) and not names(item.path, mark)]
        if unnamed:
            raise pytest.UsageError(f"{item.nodeid} wouldn't run: its file doesn't say pytest.mark.{unnamed[0]}")
    # Files with engines are long; the others fill in at the end what is left of the cores.
    long = {item.path for item in items if fast.may_start_an_engine(item)}
    items.sort(key=lambda item: (item.path.name not in LONGEST, item.path not in long))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    fast.refuse_engines(not fast.may_start_an_engine(item))
