"""The file that all processes of a run write to: a line of JSON for each finding."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Results:
    """Lines of JSON, added by several processes at once.

    Attributes:
        file: that is made with the first line.
    """

    file: Path

    def add(self, job: str, **values: Any) -> None:
        """Write what a job has found; it is on disk when this returns."""
        line = json.dumps({"job": job, **values}, default=str) + "\n"
        # Appended by one call, so that lines of several processes don't mix.
        descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def lines(self) -> list[dict[str, Any]]:
        """All that was found so far, in its order; a last line that was cut off is left out."""
        if not self.file.exists():
            return []
        *whole, _ = self.file.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in whole]
