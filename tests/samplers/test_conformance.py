"""Every registered sampler keeps to what ``conformance`` says."""

import os
import subprocess
import sys

import pytest

from tests.samplers.conformance import CHECKS
from tests.support.example import installed_example
from vllm_entropix.samplers.registry import names


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_sampler(check, name):
    check(name)


def test_no_samplers_module_loads_torch():
    code = "import sys, vllm_entropix.samplers.registry as found; found.server_settings()(); print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout.strip() == "False"


def test_one_of_another_package(tmp_path):
    """The example's, installed as a user would, by the same tests."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "test_sampler and narrowing", __file__]
    env = {**os.environ, "PYTHONPATH": installed_example(tmp_path)}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout[-3000:]
    assert f"{len(CHECKS)} passed" in ended.stdout
