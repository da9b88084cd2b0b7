"""What entropix adds to a decoding step of Model Runner V2: launches of Triton kernels, torch operations, new tensors.

Times in Triton's interpreter mean nothing, but counts do. They must not grow with the batch: one that does is a loop over rows.
"""

import contextlib
from dataclasses import astuple, dataclass

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.engine import adapter_of, engine
from tests.support.runners import is_v2
from vllm_entropix.distribution.backend import backend_for

pytestmark = [
    pytest.mark.engine,
    pytest.mark.both_runners,
    pytest.mark.skipif(not is_v2(), reason="counts what is added to Model Runner V2's step"),
]

# Nothing is below these: every row may be forced a token, is measured, and is drawn by parameters of its own.
CONFIG = {
    "thresholds": {"lelv": {"entropy_below": 0.0}, "helv": {"entropy_above": 0.0, "varentropy_below": 4096.0}},
    "clarification": {"text": "hm?", "cooldown": 2},
}
FEW, MANY = 2, 8


@dataclass
class Costs:
    launches: int = 0
    operations: int = 0
    tensors: int = 0

    def __sub__(self, other):
        return Costs(*(mine - theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


class Counting(TorchDispatchMode):
    """Counts operations, and those that make a tensor with memory of its own."""

    def __init__(self, costs):
        super().__init__()
        self.costs = costs

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.costs.operations += 1
        returns = function._schema.returns
        if any(one.alias_info is None and "Tensor" in str(one.type) for one in returns):
            self.costs.tensors += 1
        return result


@contextlib.contextmanager
def counted():
    from triton.runtime.interpreter import GridExecutor

    costs, launch = Costs(), GridExecutor.__call__

    def count(self, *args, **kwargs):
        costs.launches += 1
        return launch(self, *args, **kwargs)

    GridExecutor.__call__ = count
    try:
        with Counting(costs):
            yield costs
    finally:
        GridExecutor.__call__ = launch


def decoding_step(llm, rows, **extra_args):
    """Costs of a step in which this many requests get a token each."""
    from vllm import SamplingParams

    running = llm.llm_engine
    for row in range(rows):
        params = SamplingParams(max_tokens=20, ignore_eos=True, seed=row, extra_args=extra_args)
        running.add_request(str(row), {"prompt_token_ids": [row, 5, 6]}, params)
    for _ in range(4):
        running.step()
    with counted() as costs:
        running.step()
    running.abort_request([str(row) for row in range(rows)])
    running.step()
    return costs


@pytest.fixture(scope="module")
def vllm_alone(tiny):
    """The same steps without entropix."""
    llm = engine(tiny)
    return {rows: decoding_step(llm, rows) for rows in (FEW, MANY)}


@pytest.fixture
def kernels(request, monkeypatch):
    """Makes entropix use these kernels, whatever the device: Triton's are interpreted here as vLLM's are.

    Gives the implementation that a batch sampler would have chosen when it was made.
    """
    for module in (
        "distribution.backend",
        "attention.statistics",
        "attention.launches",
    ):
        monkeypatch.setattr(f"vllm_entropix.{module}.kernels_for", lambda device: request.param)
    return backend_for("cpu")


# Launches of Triton's: two for the metrics, one for the distribution; the keys of a CPU's cache, packed, are read by others.
# Operations are bounded, about a tenth above those of torch 2.13 (247, 343, 179, 217), because it may split one in two.
@pytest.mark.parametrize(
    ("kernels", "trace", "most"),
    [
        ("numba", "off", Costs(0, 280, 112)),
        ("numba", "on", Costs(0, 365, 124)),
        ("triton", "off", Costs(5, 200, 145)),
        ("triton", "on", Costs(5, 238, 150)),
    ],
    indirect=["kernels"],
)
def test_costs_are_constant_in_the_batch(tiny, vllm_alone, kernels, trace, most, monkeypatch):
    llm = engine(tiny, sampler="entropix", sampler_config=CONFIG)
    monkeypatch.setattr(adapter_of(llm).batch, "backend", kernels)
    few, many = (decoding_step(llm, rows, entropix_trace=trace) - vllm_alone[rows] for rows in (FEW, MANY))
    assert few == many
    assert few.launches == most.launches
    assert few.operations <= most.operations
    assert few.tensors <= most.tensors


def test_a_loop_over_rows_is_seen(tiny, vllm_alone, monkeypatch):
    """The test of the test."""
    llm = engine(tiny, sampler="entropix", sampler_config=CONFIG)
    adapter = adapter_of(llm)
    original = adapter.apply

    def apply(logits, rows):
        for row in logits:
            row.add_(0)
        return original(logits, rows)

    monkeypatch.setattr(adapter, "apply", apply)
    few, many = (decoding_step(llm, rows, entropix_trace="off") - vllm_alone[rows] for rows in (FEW, MANY))
    assert many.operations - few.operations >= MANY - FEW
