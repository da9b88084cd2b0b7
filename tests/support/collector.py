"""Python's collector of cycles looks less often at what was made last, in this process and those it will start.

What is imported stays, and with vLLM these are hundreds of thousands of objects. By Python's own threshold the collector looks
through all of them again and again while they are made: for 1.7 s of the 12.2 s that vLLM's import takes a core, 0.5 s by this
one (`vllm serve`'s imports, 2 cores, 2026-11-27).
"""

import runpy
from pathlib import Path

from tests.support import every_process

FOLDER = Path(__file__).with_name("rare_collections")


def prepare() -> None:
    """Set the threshold here, and on the path of other processes the module that sets it when they start."""
    runpy.run_path(str(FOLDER / "sitecustomize.py"))
    every_process.has(FOLDER)
