"""Which of vLLM's model runners the engines of a process use, and what that takes on a machine without a GPU.

``ENTROPIX_TEST_RUNNER=v2 pytest tests/engine`` runs them on V2, with its kernels in Triton's interpreter. That takes vLLM's CPU
build: on a GPU V2 needs none of this.
"""

import os
import sys
from pathlib import Path

CHOICE = "ENTROPIX_TEST_RUNNER"
TRITON_ON_CPU = Path(__file__).with_name("triton_on_cpu")
VLLM_ON_CPU = Path(__file__).with_name("vllm_on_cpu")
V2_ONLY = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}


def environment(runner: str | None = None, *, v1_pipeline: bool = False, ray: bool = False) -> dict[str, str]:
    """The whole environment for a process whose engines use this runner, made from the one of this process.

    Args:
        runner: "v1" or "v2"; what this process uses by default.
        v1_pipeline: lets V1 run pipeline stages in eager mode.
        ray: lets the Ray executor have workers on the CPU; each takes one of the GPUs that Ray was told there are.
    """
    runner = runner or os.environ.get(CHOICE, "v1")
    if runner not in ("v1", "v2"):
        raise ValueError(f"{CHOICE} is {runner!r}, but it should be v1 or v2")
    needed = {
        TRITON_ON_CPU: V2_ONLY if runner == "v2" else {},
        VLLM_ON_CPU: {
            **({"ENTROPIX_TEST_V1_PIPELINE": "1"} if v1_pipeline else {}),
            **({"ENTROPIX_TEST_RAY_ON_CPU": "1"} if ray else {}),
        },
    }
    path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    path = [entry for entry in path if Path(entry) not in needed]
    made = {name: value for name, value in os.environ.items() if name not in V2_ONLY}
    made["TORCHDYNAMO_DISABLE"] = "1"  # V1: for speed. V2: interpreted kernels can't be compiled.
    for folder, variables in needed.items():
        made.update(variables)
        path = [str(folder), *path] if variables else path
    return {**made, CHOICE: runner, "PYTHONPATH": os.pathsep.join(path)}


def choose() -> None:
    """Give this process, and those it will start, the runner that its environment asks for. V1 is as it would be."""
    if os.environ.get(CHOICE, "v1") == "v1":
        return
    changed = environment()
    early = sorted({"torch", "triton", "vllm"} & set(sys.modules))
    if early:
        raise RuntimeError(f"{', '.join(early)} imported already: too late to change to Model Runner V2")
    os.environ.update(changed)
    sys.path.insert(0, str(TRITON_ON_CPU))


def is_v2() -> bool:
    """Do the engines of this process run on Model Runner V2?"""
    return os.environ.get(CHOICE) == "v2"
