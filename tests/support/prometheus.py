"""Prometheus' own programs."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def program(name: str, folder: Path) -> str:
    """One of them: the installed one, or out of Debian's package, unpacked into a folder and not installed."""
    installed = shutil.which(name)
    if installed:
        return installed

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)

    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        pytest.skip(f"{name} isn't installed, and this is no Debian to get it from")
    ended = run("apt-get", "download", "prometheus")
    if ended.returncode and os.geteuid() == 0:
        run("apt-get", "update")
        ended = run("apt-get", "download", "prometheus")
    packages = list(folder.glob("*.deb"))
    if not packages:
        pytest.skip(f"{name} isn't installed, and Debian's package can't be had: {ended.stderr.strip()[-200:]}")
    assert run("dpkg", "-x", str(packages[0]), ".").returncode == 0
    return str(folder / "usr" / "bin" / name)
