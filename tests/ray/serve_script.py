"""A Serve app with two replicas under load, while one replica and then one engine is killed; prints what clients saw.

Before that, what Ray's agent exports of their metrics, and whom the app serves.
"""

import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import ray
import yaml
from ray import serve
from ray.util.state import list_actors

from deploy.ray.serve import app
from tests.support import dashboards

PROMPT = "Once upon a time"
STREAMS = 8
KEY = "a key of this test"
FILE = yaml.safe_load(Path("deploy/ray/serve.yaml").read_text())
EXPORT_SECONDS = 60
OURS = sorted(name for name in dashboards.metric_names() if name.startswith("entropix_"))


def arguments(api_key_file: str) -> dict[str, Any]:
    """Those of deploy/ray/serve.yaml, but for what a CPU needs; a mapping, as `serve run` gives it."""
    [application] = FILE["applications"]
    assert application["import_path"] == "deploy.ray.serve:app"
    return {
        "api_key_file": api_key_file,
        **{name: application["args"][name] for name in ("sampler_config", "target_ongoing_requests")},
        "name": "demo",
        "accelerator": "cpu",
        "min_replicas": 2,
        "max_replicas": 2,
        "engine_kwargs": {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 1024,
            "kv_cache_memory_bytes": 1 << 26,
        },
    }


def replicas() -> dict[int, psutil.Process | None]:
    """Process id of each running replica → the process of its engine."""
    found = {}
    for actor in list_actors(filters=[("state", "=", "ALIVE")]):
        if "ServeReplica" in actor.class_name and "Server:" in actor.class_name:
            children = psutil.Process(actor.pid).children(recursive=True)
            engines = [child for child in children if "EngineCore" in " ".join(child.cmdline())]
            found[actor.pid] = engines[0] if engines else None
    return found


async def stream(client: openai.AsyncOpenAI, started: asyncio.Event | None = None) -> dict[str, Any]:
    """One streamed completion: its text, and how it ended."""
    text, finish = "", None
    try:
        chunks = await client.completions.create(
            model="demo", prompt=PROMPT, max_tokens=400, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        async for chunk in chunks:
            text += chunk.choices[0].text
            finish = chunk.choices[0].finish_reason or finish
            if started is not None:
                started.set()
    except openai.APIError as error:
        return {"text": text, "finish": finish, "error": f"{type(error).__name__}: {error}"}
    return {"text": text, "finish": finish, "error": None}


async def short(client: openai.AsyncOpenAI) -> dict[str, Any]:
    """One short completion: when it was asked, and how it ended."""
    asked = time.monotonic()
    try:
        answer = await client.completions.create(model="demo", prompt=PROMPT, max_tokens=3)
    except openai.APIError as error:
        return {"asked": asked, "error": str(error), "seconds": time.monotonic() - asked}
    return {"asked": asked, "error": None, "seconds": time.monotonic() - asked, "text": answer.choices[0].text}


async def while_killing(client: openai.AsyncOpenAI, kill: Any) -> dict[str, Any]:
    """Streams in flight while something is killed, and short requests from then on for ten seconds."""
    events = [asyncio.Event() for _ in range(STREAMS)]
    streams = [asyncio.create_task(stream(client, event)) for event in events]
    await asyncio.wait_for(asyncio.gather(*(event.wait() for event in events)), 60)
    kill()
    killed = time.monotonic()
    shorts = []
    while time.monotonic() < killed + 10:
        shorts.append(asyncio.create_task(short(client)))
        await asyncio.sleep(0.2)
    new = [{**result, "asked": result["asked"] - killed} for result in await asyncio.gather(*shorts)]
    return {"streams": await asyncio.gather(*streams), "new": new}


async def until_two(avoid: set[int]) -> dict[int, psutil.Process]:
    """The replicas, once there are two with engines that answer."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        status = serve.status().applications["default"]
        ready = all(deployment.status == "HEALTHY" for deployment in status.deployments.values())
        found = await asyncio.to_thread(replicas)
        if ready and len(found) == 2 and all(found.values()) and not avoid & set(found):
            return found
        await asyncio.sleep(0.5)
    raise TimeoutError(f"no two replicas: {serve.status()}")


async def until_both_serve(client: openai.AsyncOpenAI, found: dict[int, psutil.Process]) -> None:
    """Until requests go to both replicas, as the streams to come have to; an idle engine uses no time of its core."""

    def used() -> list[float]:
        return [engine.cpu_times().user for engine in found.values()]

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        before = used()
        await asyncio.gather(*(short(client) for _ in range(STREAMS)))
        if all(now > then for now, then in zip(used(), before, strict=True)):
            return
    raise TimeoutError("one of the replicas gets no requests")


async def exported() -> str:
    """What Ray's agent on this node exports, once both replicas tell all of our metrics and nothing is added any more."""
    [node] = ray.nodes()
    deadline, before = time.monotonic() + EXPORT_SECONDS, None
    async with httpx.AsyncClient() as client:
        while time.monotonic() < deadline:
            text = (await client.get(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics")).text
            lines = [line for line in text.splitlines() if line.startswith(("ray_entropix_", "ray_vllm_generation_tokens"))]
            # Ray's agent hears of a process's metrics a few at a time.
            told = [
                {line.split('ReplicaId="')[1].split('"')[0] for line in lines if line.startswith(f"ray_{name}")}
                for name in OURS
            ]
            if lines == before and all(len(replicas) == 2 for replicas in told):
                return text
            before = lines
            await asyncio.sleep(3)
    missing = [name for name, replicas in zip(OURS, told, strict=True) if len(replicas) != 2]
    raise TimeoutError(f"of two replicas not all metrics are exported, but for {missing}: {before}")


async def statuses(url: str) -> dict[str, int]:
    """What clients get that don't have the key, and one that has it."""
    headers = {"none": {}, "wrong": {"Authorization": f"Bearer {KEY}s"}, "right": {"Authorization": f"Bearer {KEY}"}}
    found = {}
    async with httpx.AsyncClient(base_url=url) as client:
        for name, sent in headers.items():
            found[name] = (await client.get("/v1/models", headers=sent)).status_code
        found["other path"] = (await client.post("/tokenize", json={"model": "demo", "prompt": PROMPT})).status_code
    return found


def addresses(port: int) -> list[str]:
    """Those that somebody listens on at a port."""
    return sorted(
        {at.laddr.ip for at in psutil.net_connections("tcp") if at.status == psutil.CONN_LISTEN and at.laddr.port == port}
    )


async def scenario(url: str) -> dict[str, Any]:
    """Everything, in order."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        expected = await stream(client)
        traced = await client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "What is 24 + 17?"}],
            max_tokens=20,
            extra_body={"vllm_xargs": {"entropix_trace": 1}},
        )
        found = await until_two(set())
        await until_both_serve(client, found)
        metrics = await exported()
        admitted = await statuses(url)
        first = next(iter(found))
        engine = await while_killing(client, lambda: found[first].send_signal(signal.SIGKILL))
        found = await until_two({first})
        await until_both_serve(client, found)
        second = next(iter(found))
        replica = await while_killing(client, lambda: os.kill(second, signal.SIGKILL))
    trace = getattr(traced.choices[0], "entropix", None)
    told = {"metrics": metrics, "statuses": admitted, "addresses": addresses(int(url.rpartition(":")[2]))}
    return {"expected": expected, "trace": trace, "engine": engine, "replica": replica, **told}


def main() -> None:
    """Start Ray and the app, run the scenario."""
    port = int(json.loads(sys.argv[1]))
    # The dashboard tells which actors there are. By default metrics are reported every ten seconds.
    quickly = {"metrics_report_interval_ms": 1000}
    ray.init(num_cpus=8, include_dashboard=True, _node_ip_address="127.0.0.1", _system_config=quickly)
    serve.start(http_options={**FILE["http_options"], "port": port})
    with tempfile.NamedTemporaryFile("w", suffix=".key") as file:
        file.write(KEY + "\n")
        file.flush()
        serve.run(app(arguments(file.name)))
        print("RESULT " + json.dumps(asyncio.run(scenario(f"http://127.0.0.1:{port}"))), flush=True)
    os._exit(0)  # what is left dies with this process's namespace


if __name__ == "__main__":
    main()
