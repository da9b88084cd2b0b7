"""Processes that a test doesn't own."""

import os
import select


def ends(pid: int, seconds: float = 20) -> bool:
    """Wait until a process has ended, whether its status was asked for or not; False where it runs on."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([process], [], [], seconds)[0])
    finally:
        os.close(process)
