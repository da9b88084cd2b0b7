"""Holds the fast tier, `make test-fast`: a test without one of these marks can't start an engine, in its process or another.

An entry point of vLLM's, in a folder on every process's path, makes a start fail while the environment says so.
"""

import os
from pathlib import Path

import pytest

from tests.support import every_process

MARKS = ("engine", "gpu")
SWITCH = "ENTROPIX_TEST_NO_ENGINE"
FOLDER = Path(__file__).with_name("no_engine")


def prepare() -> None:
    """Put the entry point on the path of this process, and of those it will start."""
    every_process.has(FOLDER)


def may_start_an_engine(item: pytest.Item) -> bool:
    """Is the test outside of the fast tier?"""
    return any(item.get_closest_marker(mark) for mark in MARKS)


def refuse_engines(refused: bool) -> None:
    """From now on, in this process and those it starts."""
    os.environ.pop(SWITCH, None)
    if refused:
        os.environ[SWITCH] = "1"
