"""A tensor-parallel rank that dies while a stream is under way: clients are told, and the server ends as vLLM alone does.

Ranks exchange attention statistics in every step, so the one that is left may wait for the dead one in an exchange of ours.
"""

import os
import time

import httpx
import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support import runners
from tests.support.engine import close_engine
from tests.support.models import tiny_llama
from tests.support.server import serve_process
from vllm_entropix.client import ASK, StreamTraces

# On the default runner: a minute, of which most is the server's start. With ENTROPIX_TEST_RUNNER=v2 it runs on V2.
pytestmark = [pytest.mark.engine, pytest.mark.alone]

ARGUMENTS = (
    *("--tensor-parallel-size", "2", "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"),
    *("--max-model-len", "8192", "--kv-cache-memory-bytes", str(1 << 26)),
)
# The stream would take far longer than this test.
ASKED = {
    "model": "tiny",
    "prompt": "Once",
    "max_tokens": 8000,
    "seed": 1,
    "stream": True,
    "extra_body": {**ASK, "ignore_eos": True},
}
FORKED = {
    **ASKED,
    "seed": 2,
    "extra_body": {"ignore_eos": True, "vllm_xargs": {"entropix_forks": 4, "entropix_fork_entropy": 0}},
}
BEFORE = 20
TOLD_SECONDS, ENDED_SECONDS = 30, 30


def worker(processes, rank):
    """The one among these processes that vLLM gave the title of this rank."""
    [found] = [process for process in processes if f"Worker_TP{rank}" in " ".join(process.cmdline())]
    return found


def live_branches(url):
    """Branches of answers that fork, which are generated now."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    return next(family.samples[0].value for family in families if family.name == "entropix_branches_live")


def test_clients_are_told_and_nothing_is_left(tmp_path):
    close_engine()
    model = tiny_llama(tmp_path / "model", max_position_embeddings=8192)
    first, second, *_ = sorted(os.sched_getaffinity(0))
    config = '{"attention": {"layers": "all"}, "forks": {"floor": 0, "inside_words": true, "budget": 100000}}'
    sampler = ("--sampler", "entropix", "--sampler-config", config)
    env = {"VLLM_CPU_OMP_THREADS_BIND": f"{first}|{second}", **(runners.V2_ONLY if runners.is_v2() else {})}
    with serve_process(model, tmp_path / "log", *ARGUMENTS, *sampler, **env) as server:
        started = psutil.Process(server.process.pid).children(recursive=True)
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=TOLD_SECONDS)
        forked = client.completions.create(**FORKED)
        chunks, traces = client.completions.create(**ASKED), StreamTraces()
        for _ in range(BEFORE):
            traces.add(next(chunks))
        assert live_branches(server.url) > 1
        worker(started, 1).kill()
        killed = time.monotonic()
        after = []
        with pytest.raises((openai.APIError, httpx.HTTPError)):
            after.extend(chunks)
        # An answer that forks ends for its client as any other, whichever of its branches the engine ran.
        with pytest.raises((openai.APIError, httpx.HTTPError)):
            after.extend(forked)
        assert time.monotonic() - killed < TOLD_SECONDS
        assert all(choice.finish_reason is None for chunk in after for choice in chunk.choices)
        assert all(entry.attention_entropy is not None for entry in traces[0].tokens)
        server.process.wait(ENDED_SECONDS)
        _, alive = psutil.wait_procs(started, ENDED_SECONDS)
        assert alive == []
