"""Statistics of heads that are split over tensor-parallel ranks and layers over pipeline stages, against one rank's."""

import threading

import pytest
import torch

from vllm_entropix import EntropixConfig
from vllm_entropix.attention.statistics import StageStatistics, combine_heads, mean_over_stages
from vllm_entropix.sampling.metrics import AttentionStatistics, HeadStatistics

LAYERS, ROWS, HEADS, POSITIONS = 4, 5, 6, 40
METRICS = ("attention_entropy", "attention_varentropy", "agreement", "interaction_strength")


class Ranks:
    """Tensor-parallel ranks as threads that meet in each exchange."""

    def __init__(self, number):
        self.number = number
        self.shares = [None] * number
        self.barrier = threading.Barrier(number, timeout=60)

    def gather(self, rank):
        def exchange(share):
            self.shares[rank] = share
            self.barrier.wait()
            everything = torch.cat(self.shares, dim=-1)
            self.barrier.wait()
            return everything

        return exchange

    def run(self, work):
        """``work(rank)`` on all ranks at a time; their results in order."""
        results = [None] * self.number

        def one(rank):
            results[rank] = work(rank)

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def stacked(per_layer):
    return AttentionStatistics(*(torch.stack([getattr(layer, metric) for layer in per_layer]) for metric in METRICS))


def of_heads(scores, lengths, config, gather=None):
    """Statistics of layers' scores [layers, rows, heads, positions]."""
    return stacked(
        [combine_heads(HeadStatistics.from_scores(layer, lengths, config.padded_positions), config, gather) for layer in scores]
    )


@pytest.mark.parametrize("fidelity", ["corrected", "original"])
@pytest.mark.parametrize("tensor", [1, 2, 3])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_any_layout_gives_what_one_rank_gives(tensor, stages, fidelity):
    config = EntropixConfig.from_dict({"fidelity": fidelity})
    scores = torch.randn(LAYERS, ROWS, HEADS, POSITIONS, generator=torch.Generator().manual_seed(0)) * 3
    lengths = torch.tensor([1, 7, 40, 23, 12])
    expected = of_heads(scores, lengths, config).mean_over_layers()
    ranks = Ranks(tensor)

    def all_stages_of_one_rank(rank):
        share = scores.chunk(tensor, dim=2)[rank]
        received = None
        for number, layers in enumerate(share.chunk(stages)):
            own = of_heads(layers, lengths, config, ranks.gather(rank) if tensor > 1 else None)
            if number < stages - 1:
                sums = StageStatistics.of_rows(ROWS, torch.arange(ROWS), (lengths - 1).unsqueeze(-1), own)
                received = sums.add(received)
        if received is None:
            return own.mean_over_layers()
        return mean_over_stages(received.sums(torch.arange(ROWS), lengths - 1), own, LAYERS)

    found = ranks.run(all_stages_of_one_rank)
    for metric in METRICS:
        torch.testing.assert_close(getattr(found[0], metric), getattr(expected, metric), rtol=1e-5, atol=1e-5, msg=metric)
        for other in found[1:]:
            assert torch.equal(getattr(found[0], metric), getattr(other, metric)), "ranks must agree to the bit"


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
