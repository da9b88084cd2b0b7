"""Python's collector is as rare in the processes that tests start as in their own."""

import gc
import subprocess
import sys


def test_here_and_in_other_processes():
    told = subprocess.run([sys.executable, "-c", "import gc; print(gc.get_threshold()[0])"], check=True, capture_output=True)
    assert int(told.stdout) == gc.get_threshold()[0] == 50_000
