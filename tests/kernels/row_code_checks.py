"""The kernels of a sampler's step compiled for a GPU as steps launch them; prints what their machine code says.

Its argument is the GPU's compute capability, 90 for an H100; of others there is one kind of step alone.
Run by ``test_machine_code_rows.py`` in a process without the interpreter. Rows are of a model's
whole vocabulary.
"""

import dataclasses
import json
import re
import sys
from unittest import mock

import torch

from tests.support.machine_code import compiling, specialising
from vllm_entropix.distribution import backend
from vllm_entropix.distribution.plan import Plan
from vllm_entropix.rows.batch import BatchSampler
from vllm_entropix.rows.rows import Rows
from vllm_entropix.rows.table import Sequence
from vllm_entropix.samplers import registry
from vllm_entropix.sampling import AttentionStatistics

SIZES = (1, 2, 15, 16, 17, 64, 100, 256, 1000, 1024)
VOCABULARY = 128256
# Of whose rows the small buffer holds all candidates, the large one does, and none does.
BASES = ({}, {"top_k": 500}, {"top_k": 2000})


def some_attention(rows, wanted):
    return AttentionStatistics(*torch.zeros(4, len(wanted)), measured=wanted)


# One whose plan reads more of the logits; one that plans in PyTorch, beside one with a rule for the kernel.
OTHERS = (("top_n_sigma",), ("entropix", "chain"))
# A server's own.
CHAIN = {"base": {}, "samplers": ("chain",), "server": "chain"}


def step(rows, base, clarification=(1, 2, 3), samplers=("entropix",), measure=some_attention, server="entropix"):
    """All kernels of a step on a server of some sampler; none of them is run."""
    config = registry.server_settings().from_dict({"base": base, "sampler": server})
    batch = BatchSampler(config, rows, clarification, "cpu", counted=True)
    if server != "chain":
        batch.samplers["chain"].plan = lambda rows: Plan(rows.base)  # whatever it plans
    own = (1.0, 1.0, float(config.base.top_k), 0.0)
    for row in range(rows):
        name = samplers[row % len(samplers)]
        numbers = [value for _, value in batch.samplers[name].numbers()]
        batch.add(
            str(row),
            Sequence(numbers, sampled=True, traced=False, allow_clarification=True, prompt_length=1, sampler=name, base=own),
        )
    slots = batch.sequences.slots_of(map(str, range(rows)), rows)
    here = torch.arange(rows)
    described = Rows(torch.from_numpy(slots), slots, here + 10, here, here >= 0, here)
    # A row that all others share: nobody looks at it.
    batch.apply(torch.empty(1, VOCABULARY).expand(rows, -1), described, measure)


def codes(capability=90):
    """What is said of each kernel."""
    found = {}
    bases = BASES if capability == 90 else BASES[-1:]
    steps = [(str(base), {"base": base}) for base in bases] + [
        *((str(names), {"base": {}, "samplers": names}) for names in OTHERS),
        ("chain", CHAIN),
    ]
    for what, settings in steps:
        with compiling(capability) as launched:
            step(64, **settings)
        for code in launched:
            told = dataclasses.asdict(code) | {
                "narrow_loads": code.narrow_loads,
                # A frame for the address that a division returns to is no spill.
                "spills": sum(re.search(r"\b(LDL|STL)\b", one) is not None for one in code.instructions),
            }
            del told["loops"], told["instructions"], told["layouts"]
            found[f"{code.name}, {what}"] = told | {"instructions": len(code.instructions)}
    return found


def variants():
    """How many variants of each kernel all sizes of a step take, whichever samplers it has, with and without attention."""
    with specialising() as found:
        for size in SIZES:
            step(size, BASES[-1])
            step(size, **CHAIN)
            backend.TritonBackend("cpu").spread(torch.empty(1, VOCABULARY).expand(size, -1))
        for samplers in (*OTHERS, ("chain",), ("min_p", "vllm")):
            for measure in (some_attention, None):
                step(SIZES[-1], BASES[-1], samplers=samplers, measure=measure)
    return {name: len(of_kernel) for name, of_kernel in found.items()}


def main():
    capability = int(sys.argv[1]) if len(sys.argv) > 1 else 90
    with mock.patch.object(backend, "kernels_for", return_value="triton"):
        print("RESULT " + json.dumps({"variants": variants() if capability == 90 else {}, "codes": codes(capability)}))


if __name__ == "__main__":
    sys.exit(main())
