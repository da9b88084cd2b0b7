"""The decision kernel against the decisions in PyTorch: the same bits under any settings, step after step.

Run by ``triton_checks`` in Triton's interpreter, and by ``tests/gpu`` compiled.
"""

import dataclasses
import types
from functools import partial
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from tests.kernels.reads import Reads
from tests.samplers.test_two_copies import KINDS, NAMES, some_attention, some_metrics, values
from vllm_entropix import EntropixConfig
from vllm_entropix.attention import AttentionObserver, LayerAttention, launches
from vllm_entropix.attention import observer as observer_module
from vllm_entropix.attention.paged_keys import PlainKeys
from vllm_entropix.distribution import backend
from vllm_entropix.distribution.backend import Backend, Draws, TritonBackend
from vllm_entropix.distribution.plan import Parameters
from vllm_entropix.distribution.statistics import LogitsMetrics
from vllm_entropix.kernels.triton_.attention.workspace import Workspace
from vllm_entropix.rows.batch import BatchSampler
from vllm_entropix.rows.forcing import Places
from vllm_entropix.rows.rows import Rows
from vllm_entropix.rows.table import Sequence

PROPERTY = settings(derandomize=True, deadline=None, max_examples=12, suppress_health_check=[HealthCheck.too_slow])
VOCABULARY = 8
HALVES = {
    **{f"thresholds.{regime}.entropy_below": -1.0 for regime in ("lelv", "lehv")},
    **{f"thresholds.{regime}.entropy_above": 1e30 for regime in ("helv", "hehv")},
    "base.top_k": 5,
    "adaptive.top_k_interaction": -0.5,
    "adaptive.top_k_min": 1,
    "adaptive.top_k_max": 50,
}
RULES = ("cooldown", "last-token", "ever")
BATCHES = (  # of samplers that have a rule for the kernel
    *(("min_p",), ("top_n_sigma",), ("entropix", "min_p"), ("min_p", "top_n_sigma"), ("entropix", "top_n_sigma", "min_p")),
    *(("vllm",), ("entropix", "vllm"), ("min_p", "vllm")),
)
EVERYBODY = ("entropix", "top_n_sigma", "min_p", "vllm")
# Those of them that plan in PyTorch all the same, as other packages' do.
WITHOUT_A_RULE = ((), (), ("min_p",), ("entropix",), ("top_n_sigma", "vllm"), ("entropix", "min_p", "top_n_sigma", "vllm"))
SEQUENCES, DRAFTS, STEPS = 16, 3, 6


def moved(tensors, device):
    """A dataclass of tensors on another device."""
    return type(tensors)(*(value.to(device) if isinstance(value, torch.Tensor) else value for value in vars(tensors).values()))


def batch_of(rng, preset, clarification, rule, regimes, counted, device, samplers):
    """A batch of sequences with settings of their own, anywhere in their ranges."""
    limits = {"cooldown": int(rng.integers(1, 4)), "max_per_request": int(rng.integers(1, 4))}
    places = Places()
    if rng.random() < 0.5:  # not anywhere, and seldom where the text may end
        limits["end_below"] = 0.3
        places = Places(rng.random(VOCABULARY) < 0.7, (0, 5))
    config = EntropixConfig.preset(preset, clarification=limits, regimes=regimes)
    batch = BatchSampler(config, SEQUENCES, clarification, device, DRAFTS - 1, counted, places)
    if batch.clarification is not None:
        batch.clarification.rule = rule
    start = dict(EntropixConfig.preset(preset).numbers())
    numbers = np.stack([values(rng, name, start[name], SEQUENCES) for name in NAMES], axis=-1)
    # Many rows ask: they are uncertain, and their thresholds are low.
    asking = rng.random(SEQUENCES) < 0.5
    for name, value in (("thresholds.helv.entropy_above", 0.0), ("thresholds.helv.varentropy_below", 100.0)):
        numbers[asking, NAMES.index(name)] = value
    # Some of the others are ADAPTIVE, and 5 candidates become 2.5 where interaction is 1 and agreement 0.
    halved = ~asking & (rng.random(SEQUENCES) < 0.5)
    for name, value in HALVES.items():
        numbers[halved, NAMES.index(name)] = value
    for index in range(SEQUENCES):
        flags = rng.random(3) < (0.8, 0.5, 0.8)
        name = samplers[index % len(samplers)]
        constants = numbers[index].tolist()
        if name != "entropix":
            constants = [value for _, value in batch.samplers[name].numbers()]
        temperature = 0.0 if name == "vllm" and index % 4 == 1 else 0.5 + index / 16
        base = (temperature, 0.9, 3.0 + index % 4, 0.05 * (index % 3))
        prompt = int(rng.integers(0, 8))
        batch.add(str(index), Sequence(constants, *map(bool, flags), prompt_length=prompt, sampler=name, base=base))
    batch.sequences.flush()
    return batch


def some_rows(rng, batch, step, forced, drafts, device):
    """Rows of the sequences that are there, some with drafts, some of whose tokens aren't used.

    Most are fed the tokens that the step before ``forced [sequences]``.
    """
    counts = rng.integers(1, DRAFTS + 1, SEQUENCES) if drafts else np.ones(SEQUENCES, dtype=int)
    sequence = np.repeat(np.arange(SEQUENCES), counts)
    index = np.concatenate([np.arange(count) for count in counts])
    slots = batch.sequences.slots_of(map(str, range(SEQUENCES)), SEQUENCES)
    slots[rng.random(SEQUENCES) < 0.1] = 0  # of nobody
    placed = (index == 0) & (forced[sequence] >= 0) & (rng.random(len(sequence)) < 0.8)
    host = {
        "slots": slots[sequence],
        # A step goes on after the first row of the one before: its drafts were rejected.
        "positions": step + sequence % 5 + index,
        "input_ids": np.where(placed, forced[sequence], rng.integers(0, 4, len(sequence))),
        "valid": rng.random(len(sequence)) < 0.9,
        "batch": sequence,
    }
    device_rows = {name: torch.from_numpy(np.asarray(value)).to(device) for name, value in host.items()}
    draft_index = torch.from_numpy(index.astype(np.int32)).to(device) if drafts else None
    return Rows(host_slots=slots, **device_rows, draft_index=draft_index, draft_rows=DRAFTS if drafts else 1)


@PROPERTY
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(EntropixConfig.preset_names()),
    st.sampled_from(KINDS),
    st.sampled_from([None, *RULES]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([True, True, True, False]),
    st.booleans(),
)
def decisions_equal_those_of_pytorch(seed, preset, kind, rule, drafts, counted, regimes, tracing):
    compare_decisions(seed, preset, kind, rule, drafts, counted, regimes, tracing, ("entropix",))


@triton.jit
def _exp(values, results, BLOCK: tl.constexpr):  # noqa: N803
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(results + index, tl.exp(tl.load(values + index)))


def exp_of_kernels(values):
    """e to these powers as kernels compute it."""
    values, results = values.contiguous(), torch.empty_like(values)
    _exp[(values.numel(),)](values, results, 1)
    return results


@settings(PROPERTY, max_examples=12)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(KINDS),
    st.sampled_from([None, "cooldown"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from(BATCHES),
    st.sampled_from(WITHOUT_A_RULE),
)
def decisions_of_several_samplers(seed, kind, rule, drafts, counted, tracing, samplers, without):
    """Samplers with a rule and without one: alone, and with one another."""
    # The same numbers for both, whose last bits PyTorch's would differ in.
    spread, exp = (
        mock.patch.object(Backend, "spread", TritonBackend.spread),
        mock.patch.object(torch.Tensor, "exp", exp_of_kernels),
    )
    with spread, exp:
        compare_decisions(seed, EntropixConfig.preset_names()[0], kind, rule, drafts, counted, True, tracing, samplers, without)


def compare_decisions(seed, preset, kind, rule, drafts, counted, regimes, tracing, samplers, without=()):
    device = torch.get_default_device()
    clarification = None if rule is None else (1, 2, 3)[: 1 + seed % 3]
    settings_of = (preset, clarification, rule, regimes, counted, device, samplers)
    batches = [batch_of(np.random.default_rng(seed), *settings_of) for _ in range(2)]
    for name in without:
        batches[1].samplers[name].kernel_rule = lambda backend: None
    present = tuple(name for name in batches[0].samplers if name in samplers)
    rng, forced = np.random.default_rng(seed + 1), np.full(SEQUENCES, -1)
    for step in range(STEPS):
        rows = some_rows(rng, batches[0], step, forced, drafts, device)
        count = len(rows.slots)
        logits = torch.from_numpy(rng.normal(size=(count, VOCABULARY)).astype(np.float32)).to(device)
        logits[torch.from_numpy(rng.random(logits.shape) < 0.1).to(device)] = -torch.inf
        with torch.device("cpu"):
            metrics, attention = some_metrics(rng, count), some_attention(rng, kind, count)
        found = LogitsMetrics.from_logits(logits)
        metrics = LogitsMetrics(metrics.entropy.to(device), metrics.varentropy.to(device), found.log_normaliser)
        attention = None if attention is None else moved(attention, device)
        asked = []

        def measure(_rows, wanted, asked=asked, attention=attention):
            asked.append(wanted)
            return attention

        if attention is not None:
            attention.interaction_strength[::2], attention.agreement[::2] = 1.0, 0.0
        measure = None if kind == "none" else measure
        given = (logits, metrics, rows, measure, tracing)
        want = batches[0]._decide(Backend(device), present, *given)
        got = batches[1]._decide_by_kernel(TritonBackend(device), present, *given)
        assert len(asked) in (0, 2)
        of_pytorch, of_kernel = compared(want, asked[:1]), compared(got, asked[-1:])
        assert of_pytorch.keys() == of_kernel.keys()
        for name, value in of_pytorch.items():
            torch.testing.assert_close(
                of_kernel[name], value, rtol=0, atol=0, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
            )
        forced[rows.batch.cpu().numpy()[::-1]] = want.forced.cpu().numpy()[::-1]  # of the first row
        if rule is not None:
            # Slot 0 is nobody's, and nobody reads what stands there.
            states = [batch.clarification.state for batch in batches]
            assert torch.equal(states[0].positions[1:], states[1].positions[1:])
            assert torch.equal(states[0].records[1:], states[1].records[1:])


def compared(decisions, asked):
    """Everything that was decided, by name."""
    return {
        **vars(decisions.parameters),
        "forced": decisions.forced,
        **{f"written {order}": written for order, written in decisions.written.items()},
        **({} if decisions.records is None else {"records": decisions.records}),
        **({"asked": asked[0]} if asked else {}),
    }


# --- launches ---------------------------------------------------------------------------------------------------------

# What an operation of PyTorch takes no kernel for.
VIEWS = {
    *("alias", "as_strided", "detach", "expand", "permute", "select", "slice", "split", "squeeze", "t", "transpose"),
    *("unbind", "unsqueeze", "view", "_unsafe_view", "_reshape_alias"),
    *("empty", "empty_like", "empty_strided", "new_empty", "lift_fresh"),
    "scalar_tensor",  # on the host
}
# What the host has to wait for.
WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero"}


class Operations(TorchDispatchMode):
    """Names of the operations that launch a kernel."""

    def __init__(self):
        super().__init__()
        self.names, self.allocations = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.allocations += "empty" in name
        if name not in VIEWS:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def observer_of(config, requests):
    """Observes a last layer of keys that the kernels read."""
    layer = types.SimpleNamespace(layer_name="layers.31", kv_cache=object())
    observer = AttentionObserver({31: layer}, config, max_requests=requests, rows_per_request=DRAFTS)
    keys = PlainKeys(torch.zeros(40, 2, 16, 32), 32)
    observer._attention[31] = (layer.kv_cache, LayerAttention(keys, 0.2))
    observer._queries[31] = torch.zeros(requests, DRAFTS, 4, 32)
    lengths, table = torch.full((requests,), 20), torch.zeros(requests, 5, dtype=torch.int32)
    starts = torch.arange(requests + 1) * DRAFTS
    observer._workspace = Workspace.for_steps(1, requests * DRAFTS, 4, 20, torch.device("cpu"))
    observer._steps[31] = observer_module._Step(starts, lengths, table, requests, 20, lengths)
    return observer


def launches_of_a_step(requests, drafts, counted, clarification, base, samplers=("entropix",)):
    """Names of all kernels of a step of the sampler, with statistics of the last layer, and how often memory is allocated."""
    config = EntropixConfig.from_dict({"base": base, "sampler": "chain"})  # whose kernel is there then
    batch = BatchSampler(config, requests, clarification, "cpu", DRAFTS - 1, counted)
    batch.backend.asks_device = False
    batch.reserve(requests * DRAFTS, 5000)
    for index in range(requests):
        name = samplers[index % len(samplers)]
        numbers = [value for _, value in batch.samplers[name].numbers()]
        batch.add(
            str(index),
            Sequence(numbers, sampled=True, traced=False, allow_clarification=True, prompt_length=1, sampler=name),
        )
    slots = batch.sequences.slots_of(map(str, range(requests)), requests)
    each = DRAFTS if drafts else 1
    sequence, index = torch.arange(requests).repeat_interleave(each), torch.arange(each).repeat(requests)
    rows = Rows(
        torch.from_numpy(slots)[sequence],
        slots,
        index + 10,
        index,
        index >= 0,
        sequence,
        index.to(torch.int32) if drafts else None,
        each,
    )
    observer = observer_of(config, requests)
    launched = []

    def measure(rows, wanted):
        return dataclasses.replace(observer.statistics(rows.batch, rows.positions, wanted), measured=wanted)

    def count(executor, *args, **kwargs):
        launched.append(executor.fn.__name__)

    step = partial(batch.apply, torch.zeros(len(rows.slots), 5000), rows, measure)
    with mock.patch.object(interpreter.GridExecutor, "__call__", count):
        step()  # makes what is kept from step to step
        launched.clear()
        with Operations() as operations:
            step()
    assert not WAITS & set(operations.names), operations.names
    return launched + operations.names, operations.allocations


def a_step_takes_few_launches():
    patched = [mock.patch.object(module, "kernels_for", return_value="triton") for module in (backend, launches)]
    with patched[0], patched[1]:
        ruled = [
            *((requests, False, True, None, {}) for requests in (1, 64, 256)),
            (64, False, False, None, {}),
            (64, True, True, (1, 2, 3), {}),
            (64, False, True, None, {"top_k": 2000}),
            *((64, False, True, None, {}, samplers) for samplers in BATCHES),
            (64, True, True, (1, 2, 3), {"top_k": 2000}, EVERYBODY),
        ]
        for case in ruled:
            names, allocations = launches_of_a_step(*case)
            assert len(names) <= (LAUNCHES_RULED_WIDE if case[4] else LAUNCHES_RULED), (case, names)
            assert allocations <= ALLOCATIONS, (case, allocations)
        for base in ({}, {"top_k": 2000}):
            names, _ = launches_of_a_step(64, True, True, (1, 2, 3), base, (*EVERYBODY, "chain"))
            assert len(names) <= LAUNCHES, (base, names)


def parts_of_a_step_are_alone():
    """Rows in two calls, as Model Runner V2 may hand a step: nothing of the first waits in memory that the second writes."""
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(5))
    found = []
    with mock.patch.object(backend, "kernels_for", return_value="triton"):
        for parts in ([[0, 1, 2, 3]], [[0, 1], [2, 3]]):
            batch = BatchSampler(EntropixConfig(), 4, None, "cpu")
            batch.reserve(4, logits.shape[-1])
            numbers = [value for _, value in batch.samplers["entropix"].numbers()]
            for name in "abcd":
                batch.add(name, Sequence(numbers, sampled=True, traced=True, allow_clarification=True, prompt_length=1))
            slots = batch.sequences.slots_of("abcd", 4)
            records, lines = [], []
            for part in parts:
                index, line = torch.tensor(part), logits[part]
                rows = Rows(torch.from_numpy(slots[part]), slots[part], index + 5, index, index >= 0, index)
                records.append(batch.apply(line, rows, None))
                lines.append(line)
            batch.drawn(torch.arange(4).unsqueeze(-1))
            found.append((torch.cat(lines), torch.cat(records)))
    for whole, in_parts in zip(*found, strict=True):
        torch.testing.assert_close(in_parts, whole, rtol=0, atol=0, equal_nan=True)


def rows_are_read_seldom():
    """What a row's kernels read of its logits, in whole rows, without the pass that measures it."""
    vocabulary = 2 * 4096 + 5
    logits = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(3))
    of_16_bits = (2 * logits).to(torch.bfloat16).float()
    # Without a top_k: four at most, wherever its border is, also where it cuts through equal logits.
    cases = [
        *((row, vocabulary, top_p, min_p, 4) for row in (logits, of_16_bits) for top_p in (0.9, 0.1) for min_p in (0.0, 0.1)),
        (torch.zeros_like(logits), vocabulary, 0.5, 0.0, 4),
        (logits, vocabulary, 1.0, 0.0, 2),
        (logits, vocabulary, 1.0, 0.1, 2),
        (of_16_bits, 2000, 0.9, 0.0, 7),
        (logits, 2000, 1.0, 0.0, 5),
        # A few groups of tokens.
        (logits, 27, 0.9, 0.03, 0.3),
    ]
    for row, top_k, top_p, min_p, most in cases:
        row = row.clone()
        given = [torch.tensor([value], dtype=torch.float32) for value in (0.8, top_p, min_p)]
        parameters = Parameters(given[0], given[1], torch.tensor([top_k]), given[2], torch.tensor([1]))
        kernels = TritonBackend("cpu")
        statistics = kernels.statistics(row)
        forced, written = torch.tensor([-1]), torch.tensor([True])
        draws = Draws(
            *(parameters, "corrected", forced, written, statistics.log_normaliser, top_k, 0), maxima=statistics.maxima
        )
        with Reads(row) as reads:
            kernels.write(row, draws)
        assert reads.count <= most * vocabulary, (top_k, top_p, min_p, reads.count / vocabulary)
        assert reads.count > 0


LAUNCHES = 40
# Of a batch whose samplers all have a rule, with rows of a top_k above 1024 and without, and what it allocates: the host takes
# microseconds for each.
LAUNCHES_RULED, LAUNCHES_RULED_WIDE, ALLOCATIONS = 13, 27, 8
CHECKS = (
    decisions_equal_those_of_pytorch,
    decisions_of_several_samplers,
    a_step_takes_few_launches,
    parts_of_a_step_are_alone,
    rows_are_read_seldom,
)
