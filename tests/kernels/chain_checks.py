"""The Triton kernel of chains against the stages that PyTorch runs one after the other; see ``triton_checks``."""

from unittest import mock

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.kernels.reads import Reads
from vllm_entropix.distribution import backend
from vllm_entropix.kernels.chains import STAGES, stages_of
from vllm_entropix.kernels.triton_.chain import launch
from vllm_entropix.kernels.triton_.chain.codes import NUMBERS
from vllm_entropix.kernels.triton_.chain.launch import _CAPACITY, chain_of_rows
from vllm_entropix.kernels.triton_.logits_metrics import logits_metrics
from vllm_entropix.rows.batch import BatchSampler
from vllm_entropix.rows.rows import Rows
from vllm_entropix.rows.table import BASE, Sequence
from vllm_entropix.rows.text import RowText
from vllm_entropix.samplers import chain, registry
from vllm_entropix.samplers.chained_kernel import KernelPart
from vllm_entropix.samplers.stage import Stage, StageRows

# Settings of rows in turn: all on, sharply, and off.
SETTINGS = (
    (0.7, 0.4, 1.2, 40, 0.9, 0.02, 1.5, 0.8, 0.5, 0.05),
    (1.3, 0.0, 1.0, 3, 0.3, 0.3, 0.4, 0.3, 0.9, 0.01),
    (1.0, 0.0, 1.0, 0, 1.0, 0.0, -1.0, 1.0, 0.0, 0.1),
    (0.5, 1.0, 0.0, 700, 0.99, 0.001, 3.0, 0.95, 1.0, 0.2),
)
CHAINS = (
    (),
    *((name,) for name in stages_of("triton")),
    ("top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"),
    ("temperature", "typ_p", "top_k"),
    ("dynatemp", "xtc", "min_p"),
    ("top_p", "xtc", "min_p", "dynatemp"),
    ("top_k", "xtc", "temperature", "min_p"),
    ("xtc", "top_n_sigma", "top_p", "temperature"),
    ("top_p", "dry", "xtc", "typ_p", "dynatemp", "min_p"),
    ("temperature", "xtc", "dry", "top_k"),
    ("min_p", "xtc", "typ_p", "dry"),
)


def some_logits(rows, vocabulary, seed):
    """Rows from flat to peaked, every third of them with many equal logits, and some of what was masked."""
    generator = torch.Generator().manual_seed(seed)
    logits = (
        torch.randn(rows, vocabulary, generator=generator, device="cpu") * torch.linspace(1, 5, rows, device="cpu")[:, None]
    )
    logits[::3] = (logits[::3] * 2).round() / 2
    if vocabulary > 4:
        logits[1::3, ::4] = -torch.inf
    return logits.to(torch.get_default_device())


def by_kernel(names, logits, numbers, chosen=None, greedy=None, maxima=None, lowered=None, penalties=None, left=None):
    rows, written = torch.arange(len(logits)), logits.clone()
    shares = chain_of_rows(
        written,
        rows >= 0 if chosen is None else chosen,
        rows < 0 if greedy is None else greedy,
        tuple(map(STAGES.index, names)),
        numbers,
        maxima,
        lowered,
        penalties,
        left,
    )
    return written, shares


class Penalties(Stage):
    """DRY without a text: these penalties, of which a token's largest counts."""

    name = "dry"

    def __init__(self, tokens, penalties):
        super().__init__()
        self.found = tokens, penalties

    def apply(self, logits, rows):
        tokens, penalties = self.found
        return logits.scatter_reduce(-1, tokens, logits.gather(-1, tokens) - penalties, "amin")


def some_penalties(rows, vocabulary, seed):
    """Tokens that may come twice, many of them likely ones, and what is taken off them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, max(vocabulary // 8, 1), (rows, 40), generator=generator, device="cpu")
    penalties = (torch.rand(rows, 40, generator=generator, device="cpu") * 6 - 1).clamp_min(0)
    return tokens.to(torch.get_default_device()), penalties.to(torch.get_default_device())


def by_pytorch(names, logits, numbers, penalties):
    """Probabilities by the stages one after the other."""
    columns = {name: numbers[:, [column]].to(logits.dtype) for column, name in enumerate(NUMBERS)}
    stages = [Penalties(*penalties) if name == "dry" else chain.make_stages((name,))[0] for name in names]
    return chain.outcome(stages, logits, StageRows(columns)).probabilities


def chains_equal_pytorch():
    for vocabulary in (1, 1000, 4100):
        rows = 8
        logits = some_logits(rows, vocabulary, vocabulary)
        numbers = torch.tensor([SETTINGS[row // 2 % len(SETTINGS)] for row in range(rows)], dtype=torch.float64)
        penalties = some_penalties(rows, vocabulary, vocabulary)
        for names in CHAINS if vocabulary == 1000 else CHAINS[-6:]:
            want = by_pytorch(names, logits, numbers, penalties)
            got, shares = by_kernel(names, logits, numbers, penalties=penalties)
            torch.testing.assert_close(got.exp(), want, rtol=2e-4, atol=1e-6, msg=lambda told, names=names: f"{names}: {told}")
            if "xtc" not in names:
                assert not shares.any()


def what_is_gathered_first_is_enough():
    """By the groups' maxima, some of which are older than what DRY took off; with and without room for all of it."""
    rows, vocabulary = 8, 4100
    logits = some_logits(rows, vocabulary, 11)
    *_metrics, maxima = logits_metrics(logits)
    lowered = logits.topk(3).indices[:, :2]
    logits.scatter_(-1, lowered, logits.gather(-1, lowered) - 50)
    numbers = torch.tensor([SETTINGS[row % len(SETTINGS)] for row in range(rows)], dtype=torch.float64)
    numbers[:, NUMBERS.index("top_k")].clamp_(min=1)
    of_row = torch.full((rows,), 2, dtype=torch.int32)
    penalties = some_penalties(rows, vocabulary, 12)
    for names in (
        ("top_k", "typ_p", "xtc", "temperature"),
        ("min_p", "top_p", "temperature"),
        ("top_k",),
        ("top_p", "xtc"),
        ("top_k", "xtc", "dry", "top_p"),
    ):
        want = by_pytorch(names, logits, numbers, penalties)
        for capacity in (_CAPACITY, 16):
            with mock.patch.object(launch, "_CAPACITY", capacity):
                got, _shares = by_kernel(names, logits, numbers, None, None, maxima, of_row, penalties, left=700)
            torch.testing.assert_close(got.exp(), want, rtol=2e-4, atol=1e-6, msg=lambda told, names=names: f"{names}: {told}")


def rows_of_chains_are_alone():
    """Strange rows, greedy ones, and those that are left alone; a row's bits depend on nothing but the row."""
    logits = some_logits(8, 1000, 3)
    logits[2, 7], logits[4, 8], logits[6, :] = torch.nan, torch.inf, -torch.inf
    numbers = torch.tensor([SETTINGS[row % len(SETTINGS)] for row in range(8)], dtype=torch.float64)
    numbers[5, NUMBERS.index("temperature")] = 0.0
    rows = torch.arange(8)
    for names in (("top_p", "xtc", "temperature"), ("top_p", "xtc", "dynatemp", "top_n_sigma")):
        got, _shares = by_kernel(names, logits, numbers, chosen=rows != 3, greedy=rows == 5)
        assert torch.equal(got[3], logits[3])
        for row, token in ((2, 7), (4, 8), (6, 0)):
            assert got[row].exp().tolist() == [float(index == token) for index in range(1000)]
        assert got[5].exp().sum() == got[5].exp().max() == 1
        for row in (0, 1, 5, 7):
            alone, _shares = by_kernel(names, logits[[row]], numbers[[row]], greedy=rows[[row]] == 5)
            assert torch.equal(alone[0], got[row])


def chains_of_a_batch_equal_pytorch():
    """With texts that DRY looks at, beside a chain that PyTorch runs."""
    config = registry.load_server({"sampler": "dry;min_p", "trace": {"alternatives": 0}})
    dry = {"dry_multiplier": 0.8, "dry_allowed_length": 1, "dry_sequence_breakers": [1]}
    said = ({**dry, "xtc_probability": 0.5}, {"tfs_z": 0.9}, {**dry, "xtc_probability": 0.3, "xtc_threshold": 0.05})
    texts = ("dry;top_n_sigma;xtc;min_p;temperature", "tfs;temperature", "top_k;min_p;dry;xtc;top_p;temperature")
    base, vocabulary, rows = (0.7, 1.0, 40.0, 0.01), 500, 6
    logits = some_logits(rows, vocabulary, 5)
    device, here = logits.device, torch.arange(rows)
    tokens = torch.tensor([2, 3, 4, 2, 3, 4, 2, 3], dtype=torch.int32).repeat(rows, 1)
    text = RowText(tokens, here, here * 0 + 7, here * 0, tokens[:, 7].long(), here, 8)
    written = []
    for kernels in (None, "triton"):
        with mock.patch.object(backend, "kernels_for", return_value=kernels):
            batch = BatchSampler(config, rows, None, device)
        for row in range(rows):
            asked = {"samplers": texts[row % 3], **said[row % 3]}
            request = registry.parse_request(asked, config)
            numbers = batch.samplers["chain"].numbers_of_request(request, dict(zip(BASE, base, strict=True)))
            batch.add(str(row), Sequence(numbers, True, False, False, 1, sampler="chain", base=base))
        batch.sequences.flush()
        slots = batch.sequences.slots_of(map(str, range(rows)), rows)
        described = Rows(torch.from_numpy(slots).to(device), slots, here * 0 + 7, text.input_ids, here >= 0, here, text=text)
        drawn = logits.clone()
        with mock.patch.object(KernelPart, "write", autospec=True, side_effect=KernelPart.write) as calls:
            batch.apply(drawn, described, None)
        assert calls.call_count == (2 if kernels else 0)
        written.append(drawn)
    torch.testing.assert_close(written[1].exp(), written[0].exp(), rtol=2e-4, atol=1e-6)


def any_settings():
    """Of a row, in the order of NUMBERS; each may be off."""
    ranges = (
        (0.3, 2.0),
        (0.0, 1.0),
        (0.0, 3.0),
        (0, 60),
        (0.05, 1.0),
        (0.0, 0.4),
        (-0.5, 2.5),
        (0.05, 1.0),
        (0.0, 1.0),
        (0.0, 0.5),
    )
    return st.tuples(
        *(
            st.integers(*one) if isinstance(one[0], int) else st.floats(*one).map(lambda value: round(value, 3))
            for one in ranges
        )
    )


@settings(max_examples=12, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(
    st.permutations(stages_of("triton")),
    st.integers(1, len(stages_of("triton"))),
    st.lists(any_settings(), min_size=3, max_size=3),
    st.sampled_from((2, 700, 4200)),
    st.integers(0, 2**31),
)
def random_chains_equal_pytorch(names, length, rows_settings, vocabulary, seed):
    """Any stages in any order, with any settings."""
    names, rows = tuple(names[:length]), len(rows_settings)
    logits, penalties = some_logits(rows, vocabulary, seed), some_penalties(rows, vocabulary, seed)
    numbers = torch.tensor(rows_settings, dtype=torch.float64)
    *_metrics, maxima = logits_metrics(logits)
    got, _shares = by_kernel(names, logits, numbers, maxima=maxima, penalties=penalties)
    want = by_pytorch(names, logits, numbers, penalties)
    torch.testing.assert_close(got.exp(), want, rtol=2e-4, atol=1e-6, msg=lambda told: f"{names}: {told}")


def chains_read_rows_twice():
    """What a chain reads of a row of few likely tokens, in whole rows, without the pass that measures it."""
    vocabulary = 2 * 4096 + 5
    logits = 3 * torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(3))
    numbers = torch.tensor([SETTINGS[0]], dtype=torch.float64)
    penalties = some_penalties(1, vocabulary, 4)
    beginnings = ("top_k", "top_p", "min_p", "top_n_sigma", "typ_p")
    cases = [
        *((names, 2) for names in ((), ("temperature",), *((one,) for one in beginnings))),
        *((("temperature", one, "dry", "xtc", "top_p"), 2) for one in beginnings),
        (("top_n_sigma", "typ_p", "min_p", "xtc", "temperature"), 2),
        # Its temperature is known when the row's entropy is.
        (("dynatemp",), 3),
        (("dynatemp", "min_p", "xtc"), 3),
    ]
    for names, most in cases:
        row = logits.clone()
        *_metrics, maxima = logits_metrics(row)
        with mock.patch.object(row, "clone", return_value=row), Reads(row) as reads:
            got, _shares = by_kernel(names, row, numbers, maxima=maxima, penalties=penalties, left=40)
        assert reads.count == most * vocabulary, (names, reads.count / vocabulary)
        want = by_pytorch(names, logits, numbers, penalties)
        torch.testing.assert_close(got.exp(), want, rtol=2e-4, atol=1e-6, msg=lambda told, names=names: f"{names}: {told}")


CHECKS = (
    chains_equal_pytorch,
    random_chains_equal_pytorch,
    chains_read_rows_twice,
    what_is_gathered_first_is_enough,
    rows_of_chains_are_alone,
    chains_of_a_batch_equal_pytorch,
)
