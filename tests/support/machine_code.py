"""Machine code for a GPU that isn't there: what Triton's launches compile for it, and what that code says of itself.

Launches are the project's own, with tensors on the CPU, so a kernel is compiled with the specialisation that the JIT chooses
for the arguments it is given. Needs a process without Triton's interpreter.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime import driver
from triton.runtime.jit import JITFunction, create_function_from_signature

_PROGRAMS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# What a block may use of the shared memory of an A100, an H100 and a B200.
SHARED = {80: 166912, 90: 232448, 100: 232448}


class _NoDevice:
    """A driver with a device of the wanted kind, that nothing is sent to."""

    launcher_cls = SimpleNamespace

    def __init__(self, capability: int) -> None:
        self._capability = capability
        properties = {"max_shared_mem": SHARED[capability], "multiprocessor_count": 132, "warpSize": 32}
        self.utils = SimpleNamespace(get_device_properties=lambda device: properties)

    def get_current_device(self) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@dataclass(frozen=True)
class Loop:
    """Instructions between a label and the last branch back to it."""

    instructions: tuple[str, ...]

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, one) is not None for one in self.instructions)


@dataclass(frozen=True)
class MachineCode:
    """One launch's kernel."""

    name: str
    grid: tuple[int, ...]
    layouts: frozenset[str]  # of what is reduced, in Triton's own intermediate code
    registers: int
    stack: int  # bytes of a thread's memory, where registers are spilled
    shared: int  # bytes of a block's
    warps: int
    instructions: tuple[str, ...]
    loops: tuple[Loop, ...]

    @property
    def narrow_loads(self) -> list[str]:
        """Loads of less than four bytes from global memory, in any loop."""
        return sorted({one for loop in self.loops for one in loop.instructions if re.search(r"\bLDG\.\S*\b[US](8|16)\b", one)})


@contextmanager
def compiling(capability: int = 90) -> Iterator[list[MachineCode]]:
    """Compile what is launched instead of launching it; gives the list that is filled with it."""
    found: list[MachineCode] = []
    known: dict[int, MachineCode] = {}
    original = JITFunction.run

    def run(kernel, *args, grid, warmup, **kwargs):
        compiled = original(kernel, *args, grid=grid, warmup=True, **kwargs)
        if id(compiled) not in known:
            known[id(compiled)] = _read(kernel.__name__, tuple(grid), compiled)
        found.append(known[id(compiled)])
        return compiled

    driver.set_active(_NoDevice(capability))
    try:
        # The code of each variant is wanted, not of the first one that a cache knows.
        with mock.patch.object(JITFunction, "run", run), mock.patch.dict(os.environ, {"TRITON_DEFAULT_FP_FUSION": "1"}):
            yield found
    finally:
        driver._active = None


@contextmanager
def specialising(capability: int = 90) -> Iterator[dict[str, set[str]]]:
    """Ask which variants of each kernel launches would take, and launch none; gives them by the kernel's name."""
    backend = make_backend(GPUTarget("cuda", capability, 32))
    variants: dict[str, set[str]] = {}

    def run(kernel, *args, grid, warmup, **kwargs):
        _, specialised, _ = create_function_from_signature(kernel.signature, kernel.params, backend)(*args, **kwargs)
        variants.setdefault(kernel.__name__, set()).add(str([*map(str, specialised)]))

    with mock.patch.object(JITFunction, "run", run):
        yield variants


def _read(name: str, grid: tuple[int, ...], compiled) -> MachineCode:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output("cuobjdump", "-res-usage", file.name)
        lines = _output("nvdisasm", "-c", file.name).splitlines()
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert numbers is not None, usage
    instructions, labels = [], {}
    for line in lines:
        if label := re.match(r"^\s*\.(L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"^\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    loops = []
    for index, instruction in enumerate(instructions):
        target = re.search(r"\bBRA\S*\s.*\.(L_x_\d+)", instruction)
        # A branch to itself stands at the end of all code.
        if target and labels.get(target[1], len(instructions)) < index:
            loops.append(Loop(tuple(instructions[labels[target[1]] : index + 1])))
    text = compiled.asm["ttgir"]
    aliases = dict(re.findall(r"^(#\w+) = (#ttg\.\S+<.*>)$", text, re.M))
    reduced = re.findall(r"\"tt\.reduce\"\(%\w+\).*?\}\) : \(tensor<(\d+x\d+)xf32, (#\w+)>\)", text, re.S)
    return MachineCode(
        name=name,
        grid=grid,
        layouts=frozenset(f"{shape} {aliases[layout]}" for shape, layout in reduced),
        registers=int(numbers[1]),
        stack=int(numbers[2]) + int(numbers[4]),
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        instructions=tuple(instructions),
        loops=tuple(loops),
    )


def _output(program: str, *arguments: str) -> str:
    return subprocess.run([_PROGRAMS / program, *arguments], capture_output=True, text=True, check=True).stdout
