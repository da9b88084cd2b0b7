"""The example of a sampler in a package of its own, installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("example_sampler")


def installed_example(folder: Path) -> str:
    """Install the example below a folder; gives the PYTHONPATH of processes that shall have it."""
    source, target = folder / "source", folder / "installed"
    shutil.copytree(SOURCE, source)  # building leaves files there
    install = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--offline", "--no-index", "--no-deps"]
    options = ["--no-build-isolation", "--python", sys.executable, "--target", str(target)]
    subprocess.run([*install, *options, str(source)], check=True, timeout=120)
    return os.pathsep.join(filter(None, [str(target), os.environ.get("PYTHONPATH")]))
