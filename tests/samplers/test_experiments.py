"""Controls of studies: what is by chance has its shares, knows nothing of the metrics, and depends on no other row."""

import pytest
import torch

from vllm_entropix.distribution.attention import AttentionStatistics
from vllm_entropix.distribution.constants import Constants
from vllm_entropix.distribution.statistics import LogitsMetrics
from vllm_entropix.records.regimes import Regime
from vllm_entropix.samplers.entropix import Entropix
from vllm_entropix.samplers.entropix.experiments import ExperimentalSampler, coins
from vllm_entropix.samplers.entropix.sampler import EntropixSampler
from vllm_entropix.samplers.registry import load_server, parse_request

ROWS = 8000
SHARES = {"lelv": 0.4, "helv": 0.05, "lehv": 0.2, "hehv": 0.1}
OWN = {"temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125}


def metrics(rows=ROWS, seed=0):
    """Of rows from nearly certain to nearly even."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 50, generator=generator) * torch.exp(torch.randn(rows, 1, generator=generator))
    return LogitsMetrics.from_logits(logits)


def experimental(**experiments):
    config = load_server({"experiments": experiments})
    names, values = zip(*Entropix(config).numbers(), strict=True)
    constants = Constants(torch.tensor([values]), {name: column for column, name in enumerate(names)})
    return ExperimentalSampler(config), constants


def shares_of(regime):
    return (torch.bincount(regime, minlength=5) / len(regime)).tolist()


def test_regimes_by_chance_have_their_shares_wherever_the_metrics_are():
    sampler, constants = experimental(random_regimes=True, shares=SHARES)
    drawn = metrics()
    regime, _, parameters, _ = sampler.rule(drawn, None, constants, "numba")
    expected = [*SHARES.values(), 0.25]
    assert shares_of(regime) == pytest.approx(expected, abs=0.02)
    for wide in (drawn.entropy > drawn.entropy.median(), drawn.varentropy > drawn.varentropy.median()):
        assert shares_of(regime[wide]) == pytest.approx(expected, abs=0.03)
    # The regime is by chance, and what it does is not.
    assert torch.equal(parameters.temperature == 0, regime == Regime.LELV)


def test_chance_is_a_function_of_the_row():
    drawn = metrics(40)
    for row in range(40):
        alone = LogitsMetrics(drawn.entropy[[row]], drawn.varentropy[[row]], drawn.log_normaliser[[row]])
        assert torch.equal(coins(alone, 1), coins(drawn, 1)[[row]])
    assert not torch.equal(coins(drawn, 1), coins(drawn, 2))
    assert coins(drawn, 1).min() >= 0
    assert coins(drawn, 1).max() < 1


def test_rows_without_metrics_are_left_as_they_are():
    sampler, constants = experimental(random_regimes=True, random_clarifications=True, shares=dict.fromkeys(SHARES, 1.0))
    values = torch.tensor([torch.nan, torch.inf, 1.0])
    strange = LogitsMetrics(values, values, values)
    regime = sampler.classified(strange, constants)
    assert regime.tolist() == [Regime.ADAPTIVE, Regime.ADAPTIVE, Regime.LELV]
    assert sampler.asks(regime, strange, constants).tolist() == [False, False, True]


def test_clarifications_by_chance_leave_the_regimes():
    sampler, constants = experimental(random_clarifications=True, shares=SHARES)
    drawn = metrics()
    regime = sampler.classified(drawn, constants)
    assert torch.equal(regime, EntropixSampler(sampler.config).classified(drawn, constants))
    asks = sampler.asks(regime, drawn, constants)
    assert asks.float().mean().item() == pytest.approx(SHARES["helv"], abs=0.01)
    for sure in (drawn.entropy < drawn.entropy.median(), drawn.varentropy < drawn.varentropy.median()):
        assert asks[sure].float().mean().item() == pytest.approx(SHARES["helv"], abs=0.015)


@pytest.mark.parametrize(("measured", "source"), [(None, [3, 0, 1, 2]), ([True, False, True, True], [3, 1, 0, 2])])
def test_shuffled_attention_is_that_of_the_measured_row_before(measured, source):
    sampler, constants = experimental(shuffled_attention=True)
    own = torch.arange(1.0, 5.0)
    attention = AttentionStatistics(own, own / 10, own / 100, own, None if measured is None else torch.tensor(measured))
    drawn = metrics(4)
    _, told, parameters, _ = sampler.rule(drawn, attention, constants, "torch")
    assert told is not None
    assert told.attention_entropy.tolist() == own[source].tolist()
    want = EntropixSampler(sampler.config).rule(drawn, attention.select(torch.tensor(source)), constants, "torch")[2]
    assert torch.equal(parameters.temperature, want.temperature)


def test_shares_stand_beside_the_constants_of_servers_that_need_them_alone():
    plain = Entropix(load_server({}))
    assert plain.numbers() == list(load_server({}).numbers())
    assert type(plain._sampler) is EntropixSampler
    config = load_server({"experiments": {"constants": True, "random_regimes": True, "shares": SHARES}})
    sampler = Entropix(config)
    assert sampler.kernel_rule("triton") is None
    names = [name for name, _ in sampler.numbers()]
    assert names[-4:] == [f"experiments.shares.{name}" for name in SHARES]
    given = {"experiments.shares.helv": 0.5, "base.temperature": 0.25, "adaptive.samples": 2}
    request = parse_request({"entropix_constants": given}, config)
    numbers = dict(zip(names, sampler.numbers_of_request(request, OWN), strict=True))
    assert {name: numbers[name] for name in given} == given
    assert numbers["experiments.shares.lelv"] == SHARES["lelv"]
    assert numbers["base.top_k"] == config.base.top_k
