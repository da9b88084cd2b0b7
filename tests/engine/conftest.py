"""Models that the engine tests share."""

import pytest

from tests.support.engine import close_engine
from tests.support.models import tiny_llama


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A two-layer Llama with peaked attention."""
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="package", autouse=True)
def _close_engine():
    yield
    close_engine()
