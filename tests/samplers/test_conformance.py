"""Every registered sampler keeps to what ``conformance`` says."""

import subprocess
import sys

import pytest

from tests.samplers.conformance import CHECKS
from vllm_entropix.samplers.registry import names


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_sampler(check, name):
    check(name)


def test_no_samplers_module_loads_torch():
    code = "import sys, vllm_entropix.samplers.registry as found; found.server_settings()(); print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout.strip() == "False"
