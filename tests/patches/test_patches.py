"""patches/: applied to a copy of the installed vLLM, on which the command line and an engine run with nothing replaced."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.engine import close_engine, engine, generate
from tests.support.models import tiny_llama
from tests.support.server import environment, generate_in_process, run_vllm
from vllm_entropix.engine import patches
from vllm_entropix.engine.versions import TESTED

FOLDER = Path(__file__).resolve().parents[2] / "patches"
# 0.32, say.
SERIES = TESTED.rpartition(".")[0]
PATCHES = sorted((FOLDER / SERIES).glob("*.patch"))
ROWS = dict(re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|$", (FOLDER / "README.md").read_text(), flags=re.M))
# An endpoint of 0.33, which has no source in 0.32.
OF_033 = "vllm.entrypoints.openai.decisions.serving"


def test_every_runtime_patch_has_its_source_patch():
    assert set(ROWS) == {patch.name for patch in patches.PATCHES if patch.module != OF_033}
    files = {path.name for path in PATCHES}
    assert set(ROWS.values()) | {PATCHES[0].name} == files


@pytest.mark.parametrize("path", PATCHES, ids=lambda path: path.name[:4])
def test_a_patch_says_why_and_until_when(path):
    text = path.read_text()
    for part in ("Why:", "How:", "Upstream:", "Remove when:"):
        assert re.search(rf"^{part} \S", text, flags=re.M), part


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """A folder with a copy of vLLM that has the patches; files that they don't touch are hard links."""
    import vllm

    if not vllm.__version__.startswith(f"{SERIES}."):
        pytest.skip(f"the patches are for vLLM {SERIES}, this is {vllm.__version__}")
    installed = Path(vllm.__file__).parent
    folder = tmp_path_factory.mktemp("patched")
    changed = {name for path in PATCHES for name in re.findall(r"^--- a/(\S+)", path.read_text(), flags=re.M)}

    def place(source, target):
        if str(Path(target).relative_to(folder)) in changed:
            shutil.copy2(source, target)
            return
        try:
            os.link(source, target)
        except OSError:  # another file system
            shutil.copy2(source, target)

    shutil.copytree(installed, folder / "vllm", copy_function=place, ignore=shutil.ignore_patterns("__pycache__"))
    outside = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    subprocess.run(["git", "apply", *map(str, PATCHES)], cwd=folder, env=outside, check=True)
    return folder


_NOTHING_REPLACED = f"""
import importlib
import vllm_entropix
import vllm
from vllm_entropix.engine import patches
for patch in patches.PATCHES:
    if patch.module == {OF_033!r}:
        continue
    module = importlib.import_module(patch.module)
    for name in patch.owners or (None,):
        target = getattr(module if name is None else getattr(module, name), patch.attribute)
        assert "vllm_entropix" not in target.__code__.co_filename, patch.name
        assert patch.missing() is None, patch.name
print("in", vllm.__file__)
"""


@pytest.mark.engine
def test_nothing_is_replaced_at_run_time(patched):
    ended = subprocess.run(
        [sys.executable, "-c", _NOTHING_REPLACED],
        env=environment(PYTHONPATH=str(patched)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert f"in {patched}" in ended.stdout


@pytest.mark.engine
def test_the_command_line_on_patched_sources(patched):
    ended = run_vllm("serve", "some-model", "--sampler", "nonsense", PYTHONPATH=str(patched))
    assert ended.returncode == 1
    assert "unknown sampler 'nonsense'" in ended.stderr


@pytest.mark.engine
def test_an_engine_on_patched_sources(patched, tmp_path):
    from vllm import SamplingParams

    model = tiny_llama(tmp_path)
    sampled = {"max_tokens": 16, "ignore_eos": True, "seed": 3, "extra_args": {"entropix_trace": "on"}}
    llm = engine(model, sampler="entropix", sampler_config={"clarification": {"text": "hm?"}})
    [expected] = generate(llm, ["The quick brown fox"], [SamplingParams(**sampled)])
    close_engine()
    [found] = generate_in_process(
        model,
        {"sampler": "entropix", "sampler_config": {"clarification": {"text": "hm?"}}},
        [["The quick brown fox", sampled]],
        PYTHONPATH=str(patched),
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )
    assert found["token_ids"] == list(expected.outputs[0].token_ids)
    assert len(found["trace"]) == 16
