"""What this process and all that it will start have on their paths."""

import os
import sys
from pathlib import Path


def has(folder: Path) -> None:
    """Put a folder there."""
    sys.path.append(str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(folder)]))
