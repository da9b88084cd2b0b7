"""Tests that need an NVIDIA GPU: marked so, and skipped elsewhere."""

import functools
import os
from pathlib import Path

import pytest
import torch

from tests.gpu.modes import DRY_RUN, MODES
from tests.support.engine import close_engine
from tests.support.models import MILD, tiny_model

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    # Called with the items of the whole session.
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available() and DRY_RUN not in os.environ:
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """A mode → its two-layer model, with heads of a size that all backends have, mild enough for half precision and tf32."""

    @functools.cache
    def of_family(family, options):
        return tiny_model(tmp_path_factory.mktemp(family), family, **dict(options), **MILD)

    return lambda mode: of_family(mode.family, tuple(mode.model.items()))


@pytest.fixture(scope="session")
def tiny(folder_of):
    """The model of most modes."""
    return folder_of(MODES["default"])


@pytest.fixture(scope="package", autouse=True)
def _close_engine():
    yield
    close_engine()


@pytest.fixture
def compiled(monkeypatch):
    """Lets engines of this test compile, which the other tests forbid to save time."""
    import torch._dynamo.config

    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    monkeypatch.setattr(torch._dynamo.config, "disable", False)
