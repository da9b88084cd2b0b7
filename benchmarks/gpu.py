"""Everything that only a GPU can tell, in one command and one JSON: the GPU tests, then all benchmarks. Needs no network."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from benchmarks.common import add_out, finish

ROOT = Path(__file__).parent.parent
# Each is a process of its own: engines of one don't take memory from the next.
BENCHMARKS: dict[str, list[str]] = {
    "sampler": ["sampler", "--rows", "1,8,64,256,1024", "--vocab", "32000,128256,262144"],
    "attention-last": ["attention", "--context", "1024,8192,32768,131072", "--rows", "1,16"],
    "attention-batch": ["attention", "--context", "1024,4096", "--rows", "64,256"],
    "attention-all": ["attention", "--context", "1024", "--rows", "64,256", "--layers", "32"],
    "throughput-last": ["throughput", "--shape", "8b", "--requests", "16,64", "--context", "1024", "--modes", "last,trace"],
    "throughput-all": ["throughput", "--shape", "8b", "--requests", "16,64", "--context", "1024", "--modes", "all"],
    # Two engines with room for 256 requests take some 110 GiB.
    "throughput-last-256": ["throughput", "--shape", "8b", "--requests", "256", "--context", "1024", "--modes", "last,trace"],
    "throughput-all-256": ["throughput", "--shape", "8b", "--requests", "256", "--context", "1024", "--modes", "all"],
}


def tests(timeout: float) -> dict[str, Any]:
    """Run the GPU tests: how many passed, and what the others said."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        ended = run(command, timeout)
        if not report.exists():
            return {"returncode": ended.returncode, "output": ended.stdout[-4000:]}
        cases = list(ET.parse(report).getroot().iter("testcase"))
    outcomes: dict[str, list[dict[str, str]]] = {"failed": [], "skipped": []}
    for case in cases:
        for kind, tags in (("failed", ("failure", "error")), ("skipped", ("skipped",))):
            for found in (case.find(tag) for tag in tags):
                if found is not None:
                    said = found.get("message", "") or (found.text or "")
                    outcomes[kind].append({"test": f"{case.get('classname')}::{case.get('name')}", "said": said[:1000]})
    return {
        "returncode": ended.returncode,
        "passed": len(cases) - len(outcomes["failed"]) - len(outcomes["skipped"]),
        **outcomes,
    }


def benchmark(arguments: list[str], timeout: float) -> dict[str, Any]:
    """Run a benchmark; its JSON, or what it said when it failed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        name, *options = arguments
        ended = run([sys.executable, "-m", f"benchmarks.{name}", *options, "--out", str(out)], timeout)
        if ended.returncode or not out.exists():
            return {"returncode": ended.returncode, "output": ended.stdout[-4000:]}
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def run(command: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """A command in the repository's root to its end; one that takes too long ends with status 124."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    try:
        return subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        said = late.stdout or b""
        return subprocess.CompletedProcess(command, 124, said if isinstance(said, str) else said.decode(errors="replace"))


def main() -> None:
    """Parse, run, print."""
    parts = ("tests", *BENCHMARKS)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--only", default=",".join(parts), help=f"some of: {', '.join(parts)}")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds that each part may take (default: 3600)")
    add_out(parser)
    options = parser.parse_args()
    wanted = options.only.split(",")
    unknown = sorted(set(wanted) - set(parts))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(parts)}")
    import torch

    if not torch.cuda.is_available():
        parser.exit(1, "There is no NVIDIA GPU here; the benchmarks that a CPU can run are commands of their own.\n")
    results: dict[str, Any] = {}
    for part in (part for part in parts if part in wanted):
        start = time.monotonic()
        results[part] = tests(options.timeout) if part == "tests" else benchmark(BENCHMARKS[part], options.timeout)
        results[part]["seconds"] = round(time.monotonic() - start, 1)
        # Printed as it goes, and kept if a later part should take the machine down.
        print(f"{part}: {results[part]['seconds']} s, status {results[part].get('returncode', 0)}", file=sys.stderr, flush=True)
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.with_suffix(".partial").write_text(json.dumps(results, indent=1))
    finish("gpu", results, options.out)
    if options.out is not None:
        options.out.with_suffix(".partial").unlink()
    # A failed part is told by the exit status as well.
    sys.exit(any(result.get("returncode") for result in results.values()))


if __name__ == "__main__":
    main()
