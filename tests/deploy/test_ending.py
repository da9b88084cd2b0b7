"""A server run as a pod of the chart runs the CPU image: not as root, on a read-only root, until it has to end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from tests.support import confined, server
from tests.support.deployments import DEPLOY, environment, health_command, rendered, replica
from tests.support.engine import close_engine
from vllm_entropix.demo_model import shipped_model
from vllm_entropix.observability.tracefile import read_traces

pytestmark = pytest.mark.engine

IMAGE = DEPLOY / "docker" / "Dockerfile.cpu"
POD = {
    "model": str(shipped_model()),
    "servedModelName": "demo",
    "gpus": 0,
    # Without attention there is less to compile.
    "samplerConfig": {"attention": {"enabled": False}, "trace": {"path": "/traces/traces.jsonl", "default": True}},
    "extraArgs": ["--dtype=float32", "--enforce-eager", "--max-model-len=1024", "--kv-cache-memory-bytes=67108864"],
    "extraVolumes": [{"name": "traces", "emptyDir": {}}],
    "extraVolumeMounts": [{"name": "traces", "mountPath": "/traces"}],
    "shutdown": {"graceSeconds": 100, "drainSeconds": 1},
}
TOKENS = 1000


def ask(url, **more):
    body = {"model": "demo", "prompt": "Once upon a time", "max_tokens": TOKENS, "ignore_eos": True, **more}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=200)


def bring_machine_code(variables):
    """What other tests have compiled into the folder that a new pod's server would keep it in: that saves half a minute."""
    script = """
from vllm_entropix.kernels.numba_.machine_code import MachineCode, kept_on_disk
print(MachineCode(kept_on_disk.__wrapped__).cache_path)
"""
    here, there = (
        Path(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, env=env).stdout.strip())
        for env in (os.environ, {**os.environ, **variables})
    )
    if here.is_dir():
        shutil.copytree(here, there)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A pod's server that had to end while a stream and a plain request ran: what they got, and what is on its volumes."""
    close_engine()
    objects = rendered(POD)
    pod, container = replica(POD)
    user, group = pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsGroup"]
    # Sockets have short names.
    with tempfile.TemporaryDirectory(prefix="pod", dir="/tmp", ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]} - {"/dev/shm"}
        for place in mounts:
            (root / place[1:]).mkdir(parents=True)
        (root / "etc/vllm-entropix/sampler.json").write_text(
            objects["ConfigMap"]["data"]["sampler.json"].replace('"/traces/', f'"{root}/traces/')
        )
        prefix = confined.prefix(root, user, group)

        def here(text):
            return next((f"{root}{text}" for place in mounts if text.startswith(place)), text)

        own = {entry["name"]: entry["value"] for entry in container["env"]}
        variables = {name: here(text) for name, text in {**environment(IMAGE), **own, "TMPDIR": "/tmp"}.items()}
        bring_machine_code(variables)
        if prefix:
            for path in (root, *root.rglob("*")):
                os.chown(path, user, group)
        model, *arguments = container["args"]
        # Only here a pod would be reached from elsewhere.
        arguments = [argument for argument in arguments if argument not in ("--host=0.0.0.0", "--port=8000")]
        assert len(arguments) == len(container["args"]) - 3
        arguments = [argument.replace("=/etc/", f"={root}/etc/") for argument in arguments]
        found = {}
        log = tmp_path_factory.mktemp("pod") / "log"
        with server.serve_process(model, log, *arguments, prefix=prefix, **variables) as pod_server:
            url, process = pod_server
            processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            found["users"] = {running.uids().effective for running in processes}
            found["health"] = [
                subprocess.run(
                    [*prefix, *(word.replace("http://127.0.0.1:8000", where) for word in health_command(IMAGE))],
                    # The image has its virtual environment first in PATH.
                    env=server.environment(**variables, PATH=f"{server.VLLM.parent}:{os.environ['PATH']}"),
                    check=False,
                    capture_output=True,
                ).returncode
                for where in (url, f"http://127.0.0.1:{server.free_port()}")
            ]

            def plain():
                with ask(url, n=4) as answer:
                    found["plain"] = json.load(answer)

            asked = threading.Thread(target=plain)
            asked.start()
            events = []
            with ask(url, stream=True) as stream:
                for line in stream:
                    if not line.strip():
                        continue
                    events.append(line.decode().strip())
                    if len(events) == 5:
                        stopper = threading.Thread(target=stop, args=(container, process, found))
                        stopper.start()
                    if "signalled" in found and "before" not in found:
                        found["before"] = len(events)
            found["events"] = events
            asked.join()
            stopper.join()
            found["status"] = process.wait(60)
            found["seconds"] = time.monotonic() - found["signalled"]
        found["log"] = log.read_text()
        found["lines"] = list(read_traces(root / "traces" / "traces.jsonl"))
        yield {**found, "confined": bool(prefix), "user": user, "grace": pod["terminationGracePeriodSeconds"]}


def stop(container, process, found):
    """What the kubelet does."""
    subprocess.run(container["lifecycle"]["preStop"]["exec"]["command"], check=True)
    found["signalled"] = time.monotonic()
    process.send_signal(signal.SIGTERM)


def test_what_runs_is_finished_before_a_replica_ends(ended):
    *_, last, done = ended["events"]
    assert done == "data: [DONE]"
    assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert ended["before"] < len(ended["events"]) - 100, "the stream was over before the signal came"
    assert [choice["finish_reason"] for choice in ended["plain"]["choices"]] == ["length"] * 4
    assert ended["plain"]["usage"]["completion_tokens"] == 4 * TOKENS
    assert ended["status"] == 0, ended["log"][-3000:]
    assert ended["seconds"] < ended["grace"]


def test_traces_of_what_runs_are_on_the_volume_when_a_replica_has_ended(ended):
    assert [len(line.records) for line in ended["lines"]] == [TOKENS] * 5
    assert {line.finish_reason for line in ended["lines"]} == {"length"}


def test_a_replica_runs_as_no_root_and_writes_only_to_its_volumes(ended):
    if not ended["confined"]:
        pytest.skip("takes root, unshare and setpriv, and a Python that other users may run")
    assert ended["users"] == {ended["user"]}


def test_the_images_health_command_tells_a_server_from_none(ended):
    assert ended["health"][0] == 0
    assert ended["health"][1] != 0
