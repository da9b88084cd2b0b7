"""A process of a run: ``python -m benchmarks.gpu.worker JOB MODULE OPTIONS RESULTS`` measures one thing.

What it raises is a finding as well.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from functools import partial
from pathlib import Path

from benchmarks.gpu.results import Results


def main() -> int:
    """Run ``measure`` of a module, with its options as JSON; the status of the process."""
    job, module, options, file = sys.argv[1:]
    add = partial(Results(Path(file)).add, job)
    start = time.monotonic()
    try:
        importlib.import_module(f"benchmarks.gpu.{module}").measure(add, **json.loads(options))
    except Exception as error:
        traceback.print_exc()
        add(error=f"{type(error).__name__}: {error}"[:1000], where=traceback.format_exc()[-2000:])
        return 1
    finally:
        add(took=round(time.monotonic() - start, 1))
    return 0


# An engine's process imports this module again, by another name.
if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # how an engine ends isn't measured
