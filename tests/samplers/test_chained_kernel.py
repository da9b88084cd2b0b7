"""The CPU's kernel for chains against the stages that PyTorch runs one after the other."""

import numpy as np
import pytest
import torch

from tests.samplers.test_chain import parameters_of, random_rows, random_settings
from tests.samplers.test_chained import Batch, base_of, request_of
from vllm_entropix.kernels.chains import STAGES
from vllm_entropix.kernels.numba_.on_demand import OnDemand
from vllm_entropix.samplers import Chain
from vllm_entropix.samplers.chained_kernel import KernelPart

# They go by the probability of what was drawn.
FOLLOWED = ("mirostat", "mirostat_v2", "adaptive_p")


@pytest.fixture(autouse=True)
def by_kernel(monkeypatch):
    """Calls of the kernel."""
    calls, write = [], KernelPart.write
    monkeypatch.setattr(KernelPart, "write", lambda *arguments: (calls.append(1), write(*arguments))[1])
    return calls


def random_known_chain(rng):
    found = rng.permutation(STAGES)[: rng.integers(0, len(STAGES) + 1)].tolist()
    # Behind a temperature PyTorch runs them.
    found.sort(key=lambda name: name != "penalties")
    followed = [name for name in found if name in FOLLOWED]
    if followed:  # one of them, and not behind both sides of a coin
        found = [name for name in found if name not in (*FOLLOWED, "xtc")] + followed[:1]
    # What stands alone may be a sampler that plans by itself.
    return found if len(found) != 1 else [*found, "dry"] if found != ["dry"] else found


@pytest.mark.parametrize("seed", range(40))
def test_rows_of_random_chains(seed, by_kernel):
    rng = np.random.default_rng(seed)
    vocabulary = int(rng.choice([5, 30, 140, 3000]))
    chains = [random_known_chain(rng) for _ in range(3)]
    values = [random_settings(rng) for _ in chains]
    if any({*FOLLOWED} & {*names} for names in chains):  # beside a greedy row PyTorch runs them
        values = [one | {"temperature": one["temperature"] or 1.0} for one in values]
    batch = Batch(
        [(*request_of(*one), base_of(one[1], vocabulary)) for one in zip(chains, values, strict=True)], server="dry;min_p"
    )
    texts = [rng.integers(0, min(6, vocabulary), size=rng.integers(1, 14)).tolist() for _ in chains]
    logits = torch.tensor(random_rows(rng, len(texts), vocabulary), dtype=torch.float32)
    found = batch.distributions(logits, [[text] for text in texts])
    assert by_kernel
    drawn = [int(rng.choice(vocabulary, p=(row / row.sum()).numpy())) for row in found]
    told = batch.drawn(drawn)
    for row, (names, said, text) in enumerate(zip(chains, values, texts, strict=True)):
        chain = Chain.parse(names, parameters_of(names, said) if names else {})
        run = chain.begin()
        expected = run.distribution(logits[[row]], [text])[0].double()
        if said.get("temperature") == 0:
            expected = torch.nn.functional.one_hot(expected.argmax(), vocabulary).double()
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-6, msg=f"{names} {said}")
        assert torch.isnan(told["dry_penalty"][row]) == ("dry" not in names)
        assert torch.isnan(told["xtc_share"][row]) == ("xtc" not in names)
        assert torch.isnan(told["mu"][row]) == {"mirostat", "mirostat_v2"}.isdisjoint(names)
        assert torch.isnan(told["adaptive_average"][row]) == ("adaptive_p" not in names)


@pytest.mark.parametrize("name", FOLLOWED)
@pytest.mark.parametrize("seed", range(4))
def test_rows_follow_what_is_drawn(name, seed, by_kernel):
    rng = np.random.default_rng(seed)
    vocabulary, rows = 500, 3
    said = {"mirostat_tau": 2.5, "mirostat_eta": 0.7, "temperature": 0.9, "dry_multiplier": 0.5, "min_p": 0.02}
    said |= {"adaptive_target": 0.3 if seed < 3 else -1.0, "adaptive_decay": 0.5}
    names = ["dry", "min_p", "temperature", name] if seed % 2 else [name]
    batch = Batch([(*request_of(names, said), base_of(said, vocabulary))] * rows, server="dry;min_p")
    run = Chain.parse(names, parameters_of(names, said)).begin(rows)
    texts = [[1, 2, 1]] * rows
    for step in range(12):
        logits = torch.from_numpy(rng.normal(size=(rows, vocabulary)) * rng.choice([0.0, 2, 5])).float()
        logits[0, 7] = torch.inf if step == 5 else logits[0, 7]
        found = batch.distributions(logits, [[text] for text in texts])
        torch.testing.assert_close(found, run.distribution(logits, texts).double(), rtol=1e-4, atol=1e-6)
        assert len(by_kernel) == step + 1
        drawn = [int(rng.choice(vocabulary, p=(row / row.sum()).numpy())) for row in found]
        batch.drawn(drawn)
        run.advance(drawn)
        texts = [[*text, token] for text, token in zip(texts, drawn, strict=True)]


def test_what_was_written_says_nothing_of_a_greedy_rows_token(by_kernel):
    said = {"mirostat_tau": 2.5, "temperature": 0.0}
    batch = Batch([(*request_of(["mirostat_v2"], said), base_of(said, 50))], server="dry;min_p")
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 50))).float()
    found = batch.distributions(logits, [[[1]]])
    assert not by_kernel
    before = batch.drawn([int(found.argmax())])["mu"]
    batch.distributions(logits, [[[1, 2]]])
    assert batch.drawn([3])["mu"] != before


# What one stage leaves is another's: a band of logits, candidates at the front of the row, or both sides of XTC's coin.
PAIRS = [
    *(("typ_p", "top_p"), ("top_p", "typ_p"), ("top_p", "xtc"), ("typ_p", "xtc"), ("xtc", "typ_p"), ("top_k", "typ_p")),
    *(("typ_p", "dynatemp"), ("temperature", "top_p"), ("dry", "top_p"), ("top_p", "dry"), ("min_p", "typ_p")),
    *(("top_p", "eta"), ("epsilon", "p_less"), ("quadratic", "typ_p"), ("typ_p", "penalties"), ("penalties", "edt")),
    *(("typ_p", "top_h"), ("top_h", "top_p"), ("top_p", "mirostat"), ("top_h", "mirostat_v2"), ("xtc", "top_h")),
    *(("top_p", "adaptive_p"), ("typ_p", "tfs"), ("tfs", "top_p"), ("xtc", "tfs")),
]


@pytest.mark.parametrize("names", [*((name,) for name in STAGES), *PAIRS], ids=";".join)
@pytest.mark.parametrize("seed", range(3))
def test_rows_of_a_wide_vocabulary(names, seed, by_kernel):
    """Of which the borders are found by bins, ties among them."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(2, 50000)) * rng.choice([0.1, 2, 6])).float()
    logits[1] = (logits[1] * 2).round() / 2
    said = {**random_settings(rng), "top_p": 0.9, "typ_p": 0.8, "min_p": 0.02, "top_k": 700, "temperature": 0.7}
    said |= {"top_n_sigma": 1.5, "dynatemp_range": 0.4, "xtc_threshold": 1e-5, "xtc_probability": 0.5}
    said |= {"epsilon_cutoff": 3e-4, "eta_cutoff": 3e-4, "edt_theta": 0.5, "top_a": 0.2, "smoothing_factor": 0.2, "top_h": 0.6}
    said |= {"tfs_z": 0.9}
    names = [*names, "temperature"] if names in (("min_p",), ("top_n_sigma",)) else list(names)
    batch = Batch([(*request_of(names, said), base_of(said, 50000))] * 2, server="dry;min_p")
    text = rng.integers(0, 50, size=60).tolist()
    found = batch.distributions(logits, [[text]] * 2)
    assert by_kernel
    chain = Chain.parse(names, parameters_of(names, said)).begin(2)
    expected = chain.distribution(logits, [text] * 2).double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("z", [0.0, 0.3, 1 - 1e-6])
def test_differences_count_the_same_where_nothing_bends(z, by_kernel):
    """Of candidates that are equal, or all but: the first by their ids, or the most probable."""
    logits = torch.stack([torch.zeros(5000), torch.arange(5000) * 1e-7])
    batch = Batch([(*request_of(["tfs", "dry"], {"tfs_z": z}), base_of({}, 5000))] * 2, server="dry;min_p")
    found = batch.distributions(logits, [[[1]]] * 2)
    assert by_kernel
    kept = max(1, int(z * 4998)) if z < 0.9 else 5000
    assert [row.nonzero().flatten().tolist() for row in found] == [list(range(kept)), list(range(5000 - kept, 5000))]


def test_a_band_ends_between_float32_of_which_none_lies_between(by_kernel):
    """The more probable of two is the more typical by less than float32 tells at -1000."""
    below = torch.arange(33.0, 120.0) * 2**-14
    logits = -1000 - torch.stack([torch.zeros_like(below), below], dim=-1)
    batch = Batch([(*request_of(["typ_p"], {"typ_p": 0.3}), base_of({}, 2))] * len(logits), server="dry;min_p")
    found = batch.distributions(logits, [[[1]]] * len(logits))
    assert by_kernel
    assert found.tolist() == [[1.0, 0.0]] * len(logits)


@pytest.mark.parametrize("probability", [0.5, 1.0])
@pytest.mark.parametrize("threshold", [0.0, 1e-7, 0.1])
@pytest.mark.parametrize("names", [["xtc"], ["temperature", "xtc"]])
def test_what_xtc_leaves_at_a_chains_end(names, threshold, probability, by_kernel):
    """Next to nothing of the row's mass, where all its candidates but the least are excluded."""
    logits = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 300)) * [[8], [1]]).float()
    said = {"temperature": 0.1, "xtc_threshold": threshold, "xtc_probability": probability}
    batch = Batch([(*request_of(names, said), base_of(said, 300))] * 2, server="dry;min_p")
    found = batch.distributions(logits, [[[1]]] * 2)
    assert by_kernel
    expected = Chain.parse(names, parameters_of(names, said)).begin(2).distribution(logits.double())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_server_of_another_sampler_has_the_kernel_once_it_is_compiled(ranks, by_kernel, monkeypatch):
    """Until then PyTorch runs its chains, and for good where another rank may have it at another time."""
    compiled = []
    monkeypatch.setattr(OnDemand, "ready", lambda self: bool(compiled))
    names = ["dry", "top_p", "typ_p", "xtc", "min_p", "temperature"]
    said = {"dry_multiplier": 0.8, "typ_p": 0.9, "xtc_probability": 0.5, "temperature": 0.7, "top_p": 0.95, "min_p": 0.01}
    batch = Batch([(*request_of(names, said), base_of(said, 3000))])
    for sampler in batch.batch.samplers.values():
        sampler.started(ranks)
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 3000)) * 3).float()
    text = [1, 2, 3, 1, 2, 3, 1]
    meanwhile = batch.distributions(logits, [[text]])
    assert not by_kernel
    compiled.append(True)
    batch.batch.begin_step()
    found = batch.distributions(logits, [[text]])
    assert bool(by_kernel) == (ranks == 1)
    assert torch.equal(found > 0, meanwhile > 0)
    torch.testing.assert_close(found, meanwhile, rtol=1e-5, atol=1e-9)
