"""Triton's interpreter as the tests repair it, and vLLM's Model Runner V2 in it; each in a process of its own."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import runner_script, runners
from tests.support.engine import close_engine
from tests.support.models import tiny_llama

ROOT = Path(__file__).parents[2]
CHECKS = (
    "bfloat16_to_float32",
    "float32_to_bfloat16",
    "float32_to_bfloat16_toward_zero",
    "bfloat16_to_and_from_other_types",
    "bfloat16_arithmetic",
    "bfloat16_dot",
    "bfloat16_reductions",
    "float32_reductions",
    "masks",
    "loop_variables",
    "own_combinations_and_atomics",
    "autotuned_kernels",
    "launches_do_only_what_they_must",
    "top_k_top_p_by_torch",
)

pytestmark = pytest.mark.skipif(
    pytest.importorskip("torch").cuda.is_available(), reason="Triton's interpreter is repaired for machines without a GPU"
)


def result_of(module, *arguments, runner, **environment):
    """What a module of tests.support prints in a process for this runner."""
    ended = subprocess.run(
        [sys.executable, "-m", f"tests.support.{module}", *map(str, arguments)],
        cwd=ROOT,
        env=runners.environment(runner, **environment),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = [line for line in ended.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, ended.stderr[-3000:]
    return json.loads(lines[-1].removeprefix("RESULT "))


@pytest.fixture(scope="module")
def results():
    return result_of("kernel_checks", runner="v2")


def test_all_checks_are_listed(results):
    assert tuple(results) == CHECKS


@pytest.mark.parametrize("name", CHECKS)
def test_kernels(results, name):
    assert results[name] is None, results[name]


@pytest.mark.engine
def test_model_runner_v2_generates_what_v1_does(tmp_path):
    model = tiny_llama(tmp_path)
    here, other = ("v2", "v1") if runners.is_v2() else ("v1", "v2")
    results = {here: runner_script.greedy_tokens(model)}
    close_engine()
    results[other] = result_of("runner_script", model, runner=other)
    assert {name: result["runner"] for name, result in results.items()} == {
        "v1": "vllm.v1.worker.cpu_model_runner.CPUModelRunner",
        "v2": "vllm.v1.worker.cpu.model_runner.CPUModelRunner",
    }
    assert results["v1"]["tokens"] == results["v2"]["tokens"]
    assert [len(tokens) for tokens in results["v2"]["tokens"]] == [8, 8]
    assert results["v2"]["tokens"][0] != results["v2"]["tokens"][1]


def test_a_process_gets_only_what_it_asks_for(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    plain, v2 = runners.environment("v1"), runners.environment("v2")
    assert plain["PYTHONPATH"] == "elsewhere"
    assert not {"TRITON_INTERPRET", "VLLM_USE_V2_MODEL_RUNNER"} & set(plain)
    assert v2["PYTHONPATH"].split(":") == [str(runners.TRITON_ON_CPU), "elsewhere"]
    monkeypatch.setenv("PYTHONPATH", v2["PYTHONPATH"])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert runners.environment("v1") == plain
    with pytest.raises(ValueError, match="v1 or v2"):
        runners.environment("v3")


def test_ray_gets_a_platform_only_on_request(monkeypatch):
    monkeypatch.syspath_prepend(str(runners.VLLM_ON_CPU))
    register = importlib.import_module("vllm_cpu_repairs.ray_platform").register
    assert register() is None
    show = "from vllm.platforms import current_platform as p; print(type(p).__name__, p.device_type, p.ray_device_key)"
    ended = subprocess.run(
        [sys.executable, "-c", show],
        env=runners.environment("v1", ray=True),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert ended.stdout.splitlines()[-1] == "RayCpuPlatform cpu GPU"
