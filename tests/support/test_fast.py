"""A test of the fast tier can't start an engine: this is one."""

import os
import subprocess
import sys

import pytest

from tests.support import fast

START = """
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.v1.engine.core import EngineCore
EngineCore(None, None, False)
"""
REFUSED = "a test without pytest.mark.engine starts an engine"


def test_no_engine_in_this_process():
    with pytest.raises(RuntimeError, match=REFUSED):
        exec(START)


def test_no_engine_in_another_process():
    ended = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode != 0
    assert REFUSED in ended.stderr


@pytest.mark.engine
def test_others_may_start_one():
    assert fast.SWITCH not in os.environ
