"""Machine code on disk is used as long as everything that it was made from is the same."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import vllm_entropix
from vllm_entropix.kernels.numba_ import machine_code
from vllm_entropix.samplers.entropix import numba_rule

PACKAGE = Path(vllm_entropix.__file__).parent

# HEHV with its own temperature of 2, in a server where each setting has a value of its own; and whether all came from disk.
DECIDE = """
import numpy as np
from vllm_entropix.config import EntropixConfig
from vllm_entropix.samplers.entropix.numba_rule import decide
names = [name for name, _ in EntropixConfig.preset().numbers()]
numbers = np.arange(10, 10 + len(names), dtype=np.float32)[None] / 100
numbers[0, names.index("hehv.temperature_min")] = 2
one, floats, integers = np.ones(1, dtype=np.float32), np.zeros((5, 1), dtype=np.float32), np.ones((3, 1), dtype=np.int64)
integers[0] = 3
decide(integers[0], one, one, np.ones((4, 1), dtype=np.float32), one > 0, numbers, floats[0], floats[1], integers[1], floats[2],
       integers[2], floats[3])
print(floats[0, 0], sum(decide.stats.cache_hits.values()))
"""
# The sum of two equal weights.
WEIGH = """
import numpy as np
from vllm_entropix.kernels.numba_.attention import _weigh
print(_weigh(np.ones(2, dtype=np.float32), np.float32(1))[0], sum(_weigh.stats.cache_hits.values()))
"""


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def printed(folder, script):
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    environment |= {"PYTHONPATH": str(folder), "HOME": str(folder)}
    ended = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return [float(number) for number in ended.stdout.split()]


def change(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def folders(copy):
    return list(copy.glob(f"**/{machine_code._FOLDER}*"))


def test_changes_of_other_files(copy):
    assert printed(copy, DECIDE + WEIGH) == [2, 0, 2, 0]
    # A setting in another place.
    config = copy / PACKAGE.name / "samplers/entropix/settings.py"
    line = next(line for line in config.read_text().splitlines() if "Floor of the temperature" in line) + "\n"
    above = '    temperature_offset: float = setting("Factor on T0 at attention varentropy 0.'
    change(config, line, "")
    change(config, above, line + above)
    # The other kernels read no settings.
    assert printed(copy, DECIDE + WEIGH) == [2, 0, 2, 1]
    assert len(folders(copy)) == 3
    # A function that a kernel calls.
    change(copy / PACKAGE.name / "kernels/numba_/elementary.py", "p)) * power", "p)) * power * np.float32(4.0)")
    assert printed(copy, DECIDE + WEIGH) == [2, 0, 8, 0]
    # Another date changes nothing.
    os.utime(copy / PACKAGE.name / "kernels/numba_/attention.py", (1, 1))
    assert printed(copy, DECIDE + WEIGH) == [2, 1, 8, 1]


def test_all_that_kernels_are_made_from_is_found():
    found = set(machine_code.sources(Path(numba_rule.__file__)))
    kernels = {path.relative_to(PACKAGE).as_posix() for path in (PACKAGE / "kernels" / "numba_").glob("*.py")}
    assert found >= kernels | {"samplers/entropix/settings.py", "samplers/entropix/numba_rule.py"}
    assert not any(name.startswith(("engine/", "cli/", "observability/")) for name in found)


def test_old_folders_are_removed(tmp_path):
    now = time.time()
    for number in range(20):
        folder = tmp_path / f"{machine_code._FOLDER}{number}"
        folder.mkdir()
        (folder / "code.nbc").write_text("")
        os.utime(folder, (now - number, now - number))
    (tmp_path / "of-others").mkdir()
    machine_code._remove_oldest(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"of-others"} | {
        f"{machine_code._FOLDER}{number}" for number in range(machine_code._KEPT)
    }


def test_a_folder_that_vanishes_does_no_harm(copy):
    """Another process cleans up, or the disk is full: what can't be kept is compiled, and it is told."""
    script = "import shutil\nfrom vllm_entropix.kernels.numba_ import machine_code\n" + (
        "def gone(*_):\n    raise OSError(28, 'No space left on device')\n"
        "machine_code._FolderOfSources.ensure_cache_path = gone\n"
    )
    assert printed(copy, script + WEIGH) == [2, 0]
    assert not folders(copy)
