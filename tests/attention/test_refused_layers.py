"""Layers that attend in another way than their settings say, and what an observer makes of caches with scales."""

from types import SimpleNamespace

import pytest
import torch

from vllm_entropix import EntropixConfig
from vllm_entropix.attention import AttentionObserver, UnsupportedAttentionError
from vllm_entropix.attention.layouts import refuse_altered
from vllm_entropix.attention.observer import describe_layer


def fp8_layer(**changes):
    """vLLM's attention layer with an fp8 cache, which a CPU has no backend for."""
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

    values = torch.randn(4, 2, 16, 64, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    layer = {
        "attn_backend": TritonAttentionBackend,
        "attn_type": "decoder",
        "head_size": 32,
        "impl": SimpleNamespace(scale=0.25),
        "kv_cache": values.view(torch.uint8),
        "kv_cache_dtype": "fp8",
        "layer_name": "model.layers.3.self_attn.attn",
        "query_quant": None,
        "sliding_window": None,
        "_k_scale": torch.tensor(0.5),
        "_q_scale": torch.tensor(4.0),
    }
    return SimpleNamespace(**layer | changes)


def scores(layer, queries):
    table, lengths = torch.tensor([[2, 1]]), torch.tensor([20])
    found, _ = describe_layer(layer).scores(queries, table, lengths)
    return found[0, :, :20]


@pytest.mark.parametrize("per_head", [False, True])
def test_scales_of_fp8_keys_and_queries(per_head):
    key_scale, query_scale = (torch.tensor([0.5, 3.0]), torch.tensor([4.0, 0.2])) if per_head else (0.5, 4.0)
    of_heads = torch.ones(2) * key_scale
    queries = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(1)) * 3
    layer = fp8_layer(_k_scale=torch.as_tensor(key_scale))
    keys = layer.kv_cache.view(torch.float8_e4m3fn).float()[[2, 1]][..., :32].transpose(0, 1).flatten(1, 2)[:, :20]
    keys = (keys * of_heads.view(-1, 1, 1)).repeat_interleave(2, dim=0)

    want = (queries[0].unsqueeze(1) * keys).sum(-1) * 0.25
    torch.testing.assert_close(scores(layer, queries), want, rtol=1e-4, atol=1e-4)

    # vLLM divides queries by their own scale before a backend that takes them as fp8 is called.
    divided = (torch.ones(2) * query_scale).repeat_interleave(2).unsqueeze(-1)
    quantised = (queries / divided).to(torch.float8_e4m3fn)
    layer.query_quant, layer._q_scale = object(), torch.as_tensor(query_scale)
    want = ((quantised[0].float() * divided).unsqueeze(1) * keys).sum(-1) * 0.25
    torch.testing.assert_close(scores(layer, quantised), want, rtol=1e-4, atol=1e-4)


def test_chunks_of_a_window_are_refused():
    assert describe_layer(fp8_layer(impl=SimpleNamespace(scale=1.0, chunk_lookback=-1)))
    with pytest.raises(UnsupportedAttentionError, match=r"layers\.3\..* attends to chunks of its window"):
        describe_layer(fp8_layer(impl=SimpleNamespace(scale=1.0, chunk_lookback=0)))


def test_backends_that_choose_positions_by_themselves_are_refused():
    from vllm.model_executor.layers.attention.chunked_local_attention import create_chunked_local_attention_backend
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.attention.backends.flex_attention import FlexAttentionBackend
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
    from vllm.v1.attention.backends.utils import create_fast_prefill_custom_backend

    for backend in (CPUAttentionBackend, FlexAttentionBackend, TritonAttentionBackend):
        refuse_altered(backend)
    chunked = create_chunked_local_attention_backend(TritonAttentionBackend, 128)
    with pytest.raises(UnsupportedAttentionError, match=r"^ChunkedLocalAttention_128_.* what TRITON_ATTN attends to$"):
        describe_layer(fp8_layer(attn_backend=chunked))
    with pytest.raises(UnsupportedAttentionError, match="FastPrefill"):
        refuse_altered(create_fast_prefill_custom_backend("FastPrefill", CPUAttentionBackend))


class Builder:
    """As vLLM's for FlashAttention: what one built, another may take over with a block table of its own."""

    def build(self, common_prefix_len, common_attn_metadata):
        return SimpleNamespace(block_table=common_attn_metadata.block_table_tensor)

    def update_block_table(self, metadata, blk_table, slot_mapping):
        return SimpleNamespace(block_table=blk_table)


def test_metadata_taken_over_from_a_group_that_is_not_observed():
    layer = SimpleNamespace(layer_name="observed", impl=SimpleNamespace(forward=None))
    observer = AttentionObserver({1: layer}, EntropixConfig(), max_requests=2)
    first, other, second = Builder(), Builder(), Builder()
    observer.attach([(first, ["unobserved"]), (other, ["another"]), (second, ["observed"])])
    for length in (5, 9):  # the second step must not see the first one's
        table, twin = torch.full((1, 2), length), torch.full((1, 2), length + 1)
        common = SimpleNamespace(
            query_start_loc=torch.tensor([0, 1]),
            seq_lens=torch.tensor([length]),
            block_table_tensor=table,
            num_reqs=1,
            max_seq_len=length,
        )
        metadata = first.build(0, common)
        other.build(0, SimpleNamespace(**vars(common) | {"seq_lens": torch.tensor([100])}))
        assert second.update_block_table(metadata, twin, None).block_table is twin
        step = observer._steps[1]
        assert step.seq_lens.tolist() == [length]
        assert step.block_table is twin
    observer.detach()
    assert not {"build", "update_block_table"} & (vars(first).keys() | vars(second).keys())
