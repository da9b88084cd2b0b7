"""Tests that need an NVIDIA GPU: marked so, and skipped elsewhere."""

from pathlib import Path

import pytest
import torch

from tests.support.engine import close_engine
from tests.support.models import MILD, tiny_llama

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    # Called with the items of the whole session.
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A two-layer Llama with heads of a size that all backends have, mild enough for half precision and tf32."""
    return tiny_llama(tmp_path_factory.mktemp("tiny"), head_dim=64, **MILD)


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
