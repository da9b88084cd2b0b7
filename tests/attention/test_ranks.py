"""Statistics of heads that are split over tensor-parallel ranks and layers over pipeline stages, against one rank's."""

import pytest
import torch

from tests.support.ranks import Meeting
from vllm_entropix import EntropixConfig
from vllm_entropix.attention import LayerAttention, ranks
from vllm_entropix.attention.layers import LayerRows
from vllm_entropix.attention.paged_keys import PlainKeys
from vllm_entropix.attention.ranks import combine_shares, measure_over_ranks, shares_of_heads
from vllm_entropix.attention.stages import StageStatistics, mean_over_stages
from vllm_entropix.attention.statistics import measure_layer_in_pytorch
from vllm_entropix.distribution.attention import AttentionStatistics, HeadStatistics

LAYERS, ROWS, HEADS, POSITIONS = 4, 5, 6, 40
METRICS = ("attention_entropy", "attention_varentropy", "agreement", "interaction_strength")


def of_heads(scores, lengths, config, others=None):
    """Statistics of layers' scores [layers, rows, heads, positions]."""
    if others is None:
        return AttentionStatistics.stacked([AttentionStatistics.from_scores(layer, lengths, config) for layer in scores])
    parts = [HeadStatistics.from_scores(layer, lengths, config.padded_positions) for layer in scores]
    return combine_shares(shares_of_heads(parts, others), [part.counted for part in parts], others, config)


def assert_same_bits(found):
    for other in found[1:]:
        for metric in METRICS:
            assert torch.equal(getattr(found[0], metric), getattr(other, metric)), "ranks must agree to the bit"


@pytest.mark.parametrize("fidelity", ["corrected", "original"])
@pytest.mark.parametrize("tensor", [1, 2, 3])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_any_layout_gives_what_one_rank_gives(tensor, stages, fidelity):
    config = EntropixConfig.from_dict({"fidelity": fidelity})
    scores = torch.randn(LAYERS, ROWS, HEADS, POSITIONS, generator=torch.Generator().manual_seed(0)) * 3
    lengths = torch.tensor([1, 7, 40, 23, 12])
    expected = of_heads(scores, lengths, config).mean_over_layers()
    meeting = Meeting(tensor)

    def all_stages_of_one_rank(rank):
        share = scores.chunk(tensor, dim=2)[rank]
        received = None
        for number, layers in enumerate(share.chunk(stages)):
            own = of_heads(layers, lengths, config, meeting.ranks(rank))
            if number < stages - 1:
                sums = StageStatistics.of_rows(ROWS, torch.arange(ROWS), (lengths - 1).unsqueeze(-1), own)
                received = sums.add(received)
        if received is None:
            return own.mean_over_layers()
        return mean_over_stages(received.sums(torch.arange(ROWS), lengths - 1), own, LAYERS)

    found = meeting.run(all_stages_of_one_rank)
    for metric in METRICS:
        torch.testing.assert_close(getattr(found[0], metric), getattr(expected, metric), rtol=1e-5, atol=1e-5, msg=metric)
    assert_same_bits(found)


@pytest.fixture(scope="module")
def paged():
    """Layers with all heads, their queries and block tables; rows of very different lengths."""
    generator = torch.Generator().manual_seed(0)
    layers = []
    for window, sinks in ((None, None), (9, None), (None, torch.randn(HEADS, generator=generator))):
        cache = torch.randn(30, HEADS // 2, 16, 16, generator=generator)
        layer = LayerAttention(PlainKeys(cache, 8), 0.5, window=window, sinks=sinks)
        queries = torch.randn(ROWS, HEADS, 8, generator=generator)
        layers.append(LayerRows(layer, queries, torch.randint(0, 30, (ROWS + 1, 8), generator=generator)))
    return layers, torch.tensor([3, 0, 4, 1, 5]), torch.tensor([100, 1, 17, 16, 60])


def share_of(one, rank, number):
    """A layer with the heads of one rank."""
    keys = PlainKeys(one.layer.keys.cache.chunk(number, dim=1)[rank], one.layer.keys.head_dim)
    sinks = None if one.layer.sinks is None else one.layer.sinks.chunk(number)[rank]
    layer = LayerAttention(keys, one.layer.scale, window=one.layer.window, sinks=sinks)
    return LayerRows(layer, one.queries.chunk(number, dim=1)[rank], one.block_table)


def measured(paged, config, number):
    layers, requests, lengths = paged
    meeting = Meeting(number)
    shares = [[share_of(one, rank, number) for one in layers] for rank in range(number)]
    found = meeting.run(lambda rank: measure_over_ranks(shares[rank], requests, lengths, config, meeting.ranks(rank)))
    assert_same_bits(found)
    return found[0], meeting.exchanged


@pytest.mark.parametrize("fidelity", ["corrected", "original"])
def test_a_step_takes_two_exchanges(paged, fidelity, monkeypatch):
    """One as long as the contexts and one small, whatever layers and rows; more only for bounded memory."""
    config = EntropixConfig.from_dict({"fidelity": fidelity})
    layers, requests, lengths = paged
    found, exchanged = measured(paged, config, 3)
    for index, one in enumerate(layers):
        want = measure_layer_in_pytorch(one.layer, one.queries, one.block_table[requests], lengths, config)
        for metric in METRICS:
            torch.testing.assert_close(getattr(found, metric)[index], getattr(want, metric), rtol=1e-5, atol=1e-5, msg=metric)
    of_contexts, small = exchanged
    assert small == len(layers) * ROWS * (HEADS // 3 + 2)
    # A row is padded to at most twice its length and a block's worth.
    assert of_contexts <= sum(len(lengths) + int((2 * lengths + 2 * 16).sum()) for _ in layers)
    monkeypatch.setattr(ranks, "_MAX_WEIGHTS", 1)
    again, more = measured(paged, config, 3)
    assert len(more) > len(layers) + 1
    assert_same_bits([found, again])


def test_without_rows_nothing_is_exchanged(paged):
    layers, requests, lengths = paged
    none = [LayerRows(one.layer, one.queries[:0], one.block_table) for one in layers]
    found, exchanged = measured((none, requests[:0], lengths[:0]), EntropixConfig(), 2)
    assert found.agreement.shape == (len(layers), 0)
    assert exchanged == []


def test_a_row_gets_its_own_statistics_or_none():
    """Drafts have several rows of a request; rows that weren't measured, and positions of another step, give NaN."""
    positions = torch.tensor([[9, 8, 7], [4, 3, 2]])  # requests 0 and 2 of three, three rows each
    values = torch.arange(6.0)
    per_layer = AttentionStatistics(*(torch.stack([values, values + 10 * place]) for place in range(4)))
    stage = StageStatistics.of_rows(3, torch.tensor([0, 2]), positions, per_layer)
    found = stage.sums(torch.tensor([0, 0, 2, 1, 2]), torch.tensor([8, 9, 2, 5, 9]))
    assert found[0, :3].tolist() == [2.0, 0.0, 10.0]
    assert found[3, :3].tolist() == [32.0, 30.0, 40.0]
    assert found[:, 3:].isnan().all()


def test_layers_of_earlier_stages_alone():
    sums = torch.tensor([[2.0], [4.0], [6.0], [8.0]])
    found = mean_over_stages(sums, None, 2)
    assert [getattr(found, metric).item() for metric in METRICS] == [1.0, 2.0, 3.0, 4.0]
