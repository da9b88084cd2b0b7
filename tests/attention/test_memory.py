"""What an observer allocates on a GPU, and the table of it in docs/performance.md."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vllm_entropix import EntropixConfig
from vllm_entropix.attention import AttentionObserver, observer
from vllm_entropix.kernels.triton_ import attention_statistics

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
MEBIBYTE = 2**20
# The shape of Llama-3.1-8B, at 256 rows.
ROWS, LAYERS, HEADS, HEAD_DIM, LONGEST = 256, 32, 32, 128, 131072


def allocated(monkeypatch, layers):
    """Bytes of kept queries and of the workspace, allocated where memory costs nothing."""
    backend = SimpleNamespace(get_name=lambda: "FLASH_ATTN")
    layer = SimpleNamespace(num_heads=HEADS, head_size=HEAD_DIM, query_quant=None, attn_backend=backend)
    monkeypatch.setattr(observer, "kernels_for", lambda device: "triton")
    one = AttentionObserver(dict.fromkeys(range(layers), layer), EntropixConfig(), max_requests=ROWS)
    one.reserve(torch.bfloat16, torch.device("meta"), LONGEST)
    queries = sum(kept.numel() * kept.itemsize for kept in one._queries.values())
    return queries, one._workspace.buffer.numel() * one._workspace.buffer.itemsize


def documented(label):
    """MiB in the row of the page's table that begins with this."""
    [size] = re.findall(rf"^\| {re.escape(label)}[^|]*\| ([\d.]+) MiB \|$", PAGE.read_text(), re.M)
    return float(size)


@pytest.mark.parametrize(("layers", "name"), [(LAYERS, "all 32 layers"), (1, "the last layer")])
def test_the_table_says_what_is_allocated(monkeypatch, layers, name):
    queries, workspace = allocated(monkeypatch, layers)
    assert documented(f"kept queries, {name}") == queries / MEBIBYTE
    assert documented("workspace of the attention kernels") == workspace / MEBIBYTE
    assert queries + workspace <= 180 * MEBIBYTE


def test_partial_sums_in_the_table():
    sizes = attention_statistics._sizes(LAYERS, ROWS, HEADS, attention_statistics.splits_of(1024))
    assert documented("in it, partial sums at context 1024") == pytest.approx(4 * sum(sizes.values()) / MEBIBYTE, abs=0.05)
    sizes = attention_statistics._sizes(LAYERS, ROWS, HEADS, attention_statistics.splits_of(3841))
    assert documented("in it, partial sums from 3841 positions on") == pytest.approx(
        4 * sum(sizes.values()) / MEBIBYTE, abs=0.05
    )
