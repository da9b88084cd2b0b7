"""What is allocated on a GPU, and the table of it in docs/performance.md."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vllm_entropix import EntropixConfig
from vllm_entropix.attention import AttentionObserver, observer
from vllm_entropix.distribution.backend import TritonBackend
from vllm_entropix.engine import runner_v1
from vllm_entropix.kernels.ranks import RankGroup
from vllm_entropix.kernels.triton_ import candidates, logits_metrics, wide_filters
from vllm_entropix.kernels.triton_.attention import shares, workspace
from vllm_entropix.rows.undrawn import room

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
MEBIBYTE = 2**20
# The shape of Llama-3.1-8B, at 256 rows.
ROWS, LAYERS, HEADS, HEAD_DIM, LONGEST = 256, 32, 32, 128, 131072
VOCABULARY = 128256


def reserved(monkeypatch, layers, ranks=None):
    """An observer that has allocated what it needs, where memory costs nothing."""
    backend = SimpleNamespace(get_name=lambda: "FLASH_ATTN")
    heads = HEADS // (ranks.size if ranks else 1)
    layer = SimpleNamespace(num_heads=heads, head_size=HEAD_DIM, query_quant=None, attn_backend=backend)
    monkeypatch.setattr(observer, "kernels_for", lambda device: "triton")
    one = AttentionObserver(dict.fromkeys(range(layers), layer), EntropixConfig(), max_requests=ROWS, ranks=ranks)
    one.reserve(torch.bfloat16, torch.device("meta"), LONGEST)
    return one


def allocated(monkeypatch, layers):
    """Bytes of kept queries and of the workspace."""
    one = reserved(monkeypatch, layers)
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


@pytest.mark.parametrize("size", [2, 8])
def test_what_ranks_exchange_is_allocated_beforehand(monkeypatch, size):
    one = reserved(monkeypatch, LAYERS, RankGroup(size, 0, all_gather=None, complete=None))
    said = documented("with tensor parallelism, what ranks exchange, allocated beforehand too")
    assert one._exchange.numel() * one._exchange.itemsize == said * MEBIBYTE
    assert reserved(monkeypatch, LAYERS)._exchange is None


def test_exchanges_fit_what_is_allocated():
    for layers, rows, longest, ranks in ((1, 1, 10, 2), (32, 256, 131072, 8), (80, 1024, 1000, 4), (1, 4, 10**7, 8)):
        room = workspace.exchange_size(layers, rows, longest, ranks)
        assert room <= max(workspace.EXCHANGE, ranks * (longest + 1))
        for total in (1, rows, rows * longest // 3, rows * longest):
            number, many = workspace.exchanged_together(layers, rows, 4, total, longest, ranks, room)
            assert 1 <= number <= layers
            assert 1 <= many <= rows
            assert ranks * number * (min(total, many * longest) + many) <= room, (layers, rows, total)


def test_partial_sums_in_the_table():
    sizes = workspace.sizes_of(LAYERS, ROWS, HEADS, shares.splits_of(1024))
    assert documented("in it, partial sums at context 1024") == pytest.approx(4 * sum(sizes.values()) / MEBIBYTE, abs=0.05)
    sizes = workspace.sizes_of(LAYERS, ROWS, HEADS, shares.splits_of(3841))
    assert documented("in it, partial sums from 3841 positions on") == pytest.approx(
        4 * sum(sizes.values()) / MEBIBYTE, abs=0.05
    )


def size_of(tensors):
    """MiB of them together."""
    return sum(one.nbytes for one in tensors) / MEBIBYTE


def tensors_of(buffers):
    """Of all kernels for rows."""
    return (*buffers.metrics, *buffers.candidates, *buffers.wide)


def test_buffers_of_rows_without_a_top_k():
    kept = wide_filters.buffers(ROWS, VOCABULARY, "meta")
    assert documented("more of them for rows of a greater `top_k` or none") == pytest.approx(size_of(kept), abs=0.05)


@pytest.mark.parametrize(
    ("layers", "label"),
    [(LAYERS, "beside what all 32 layers lend"), (1, "beside what the last layer lends"), (0, "copied logits")],
)
def test_copied_logits_lie_where_attention_was_measured(monkeypatch, layers, label):
    lent = reserved(monkeypatch, layers).idle_memory() if layers else ()
    assert all(one.dtype == torch.float32 for one in lent)
    assert sum(one.nbytes for one in lent) == (sum(allocated(monkeypatch, layers)) if layers else 0)
    size = size_of([room(ROWS, VOCABULARY, "meta", lent)])
    assert documented(label) == pytest.approx(size, abs=0.05)
    kernels = TritonBackend("meta")
    kernels.reserve(ROWS, VOCABULARY, "meta")
    assert size + size_of([*lent, *tensors_of(kernels._buffers)]) <= 200


def test_what_is_lent_is_what_was_allocated(monkeypatch):
    """Also of queries that take a byte each, and of what ranks exchange."""
    monkeypatch.setattr(observer, "kernels_for", lambda device: "triton")
    for quant, width in ((None, 2), ("fp8", 1)):
        layer = SimpleNamespace(
            num_heads=3, head_size=5, query_quant=quant, attn_backend=SimpleNamespace(get_name=lambda: "FLASH_ATTN")
        )
        ranks = RankGroup(2, 0, all_gather=None, complete=None)
        one = AttentionObserver({0: layer, 1: layer}, EntropixConfig(), max_requests=1, ranks=ranks)
        assert one.idle_memory() == ()
        one.reserve(torch.bfloat16, torch.device("cpu"), 64)
        workspace, queries, exchange = one.idle_memory()
        assert workspace.data_ptr() == one._workspace.buffer.data_ptr()
        assert queries.data_ptr() == one._queries[0].data_ptr()
        assert len(queries) == 2 * 3 * 5 * width // 4
        assert exchange.data_ptr() == one._exchange.data_ptr()


def test_buffers_of_logits():
    measured = size_of(logits_metrics.buffers(ROWS, VOCABULARY, "meta"))
    assert documented("largest logits of groups, and partial sums of the metrics") == pytest.approx(measured, abs=0.05)
    for label, capacity in zip(
        ("in them, what rows of a `top_k`", "buffers of the filters"), candidates._CAPACITIES, strict=True
    ):
        kept = candidates.buffers(ROWS, VOCABULARY, "meta", capacity)
        assert documented(label) == pytest.approx(size_of(kept), abs=0.05)


def test_what_steps_would_allocate_is_reserved():
    kernels = TritonBackend("meta")
    kernels.reserve(ROWS, VOCABULARY, "meta")
    parts = ("largest logits", "buffers of the filters", "more of them")
    size = size_of(tensors_of(kernels._buffers))
    assert size == pytest.approx(sum(map(documented, parts)), abs=0.15)


def test_texts_are_kept_in_the_hosts_memory(monkeypatch):
    """By the time a request asks for DRY, vLLM has given the rest of the GPU's memory to the KV cache."""
    taken = []

    class UvaBuffer:
        def __init__(self, size, dtype):
            taken.append((size, dtype))

        def uva(self):
            return torch.empty(taken[-1][0], dtype=taken[-1][1], device="meta")

    monkeypatch.setattr("vllm.v1.worker.gpu.buffer_utils.UvaBuffer", UvaBuffer)
    monkeypatch.setattr(runner_v1, "is_uva_available", lambda: True)
    runner = object.__new__(runner_v1.RunnerV1)
    runner.device, runner._text = torch.device("cuda"), None
    runner.batch = SimpleNamespace(sequences=SimpleNamespace(slots=ROWS + 1))
    runner.vllm_config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=LONGEST))
    assert runner._grown_text().device.type == "meta"
    assert taken == [((ROWS + 1, LONGEST), torch.int32)]


def test_all_of_it():
    everything = ("kept queries, all 32 layers", "workspace", "largest logits", "buffers of the filters", "more of them")
    total = sum(map(documented, everything))
    assert f"On one GPU that is {total:.0f} MiB at most." in PAGE.read_text()
    assert total <= 200
