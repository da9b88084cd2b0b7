"""Two independent engines behind one address: `vllm serve --data-parallel-size 2`, with one merged `/metrics`."""

import concurrent.futures
import os
import time
import urllib.request

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.engine import close_engine, engine, generate
from tests.support.models import tiny_llama
from tests.support.server import serve
from vllm_entropix.client import ASK, trace_of

# What engines do beside each other has nothing to do with their runner.
pytestmark = pytest.mark.engine

ARGUMENTS = (
    *("--sampler", "entropix", "--data-parallel-size", "2", "--served-model-name", "tiny", "--dtype", "float32"),
    *("--enforce-eager", "--max-model-len", "512", "--kv-cache-memory-bytes", str(1 << 26)),
    *("--sampler-config", '{"forks": {"floor": 0, "inside_words": true}}'),
)
FORKS = {"vllm_xargs": {"entropix_forks": 4, "entropix_fork_entropy": 0}}
PROMPT, TOKENS, SEEDS = "Once upon a time", 20, (0, 1)


def of_one_engine(model):
    """Per seed the tokens that one engine draws."""
    from vllm import SamplingParams

    params = [SamplingParams(max_tokens=TOKENS, seed=seed) for seed in SEEDS]
    outputs = generate(engine(model, sampler="entropix"), [PROMPT] * len(SEEDS), params)
    close_engine()
    return [list(output.outputs[0].token_ids) for output in outputs]


def values(url):
    """Name and labels → value."""
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    families = text_string_to_metric_families(text)
    return {(sample.name, *sorted(sample.labels.items())): sample.value for family in families for sample in family.samples}


def hits(found):
    """Tokens that were found in the prefix caches of all engines."""
    return sum(value for (name, *_), value in found.items() if name == "vllm:prefix_cache_hits_total")


def test_both_engines_answer_and_count_in_one_place(tmp_path):
    model = tiny_llama(tmp_path / "model")
    expected = of_one_engine(model)
    first, second, *_ = sorted(os.sched_getaffinity(0))
    with serve(model, tmp_path / "log", *ARGUMENTS, VLLM_CPU_OMP_THREADS_BIND=f"{first}|{second}") as url:
        # A connection each: the server ends one that is idle for five seconds, which may be when it is used again.
        alone = {"Connection": "close"}
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, default_headers=alone)

        def one(index):
            answer = client.completions.create(
                model="tiny", prompt=PROMPT, max_tokens=TOKENS, seed=SEEDS[index % 2], extra_body=ASK
            )
            return trace_of(answer.choices[0]).tokens

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            found = list(pool.map(one, range(32)))
        time.sleep(1)  # counted a few times a second
        after = values(url)

        def forked(index):
            answer = client.completions.create(
                model="tiny", prompt=f"{index} {PROMPT}", max_tokens=60, seed=index, extra_body=FORKS
            )
            return trace_of(answer.choices[0]).forks, answer.usage.prompt_tokens

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            trees = list(pool.map(forked, range(8)))
        last = values(url)
    # A branch runs on its parent's engine, which has what they share; near the end its parent may be gone.
    shared = sum(tokens + branch.position for tree, tokens in trees for branch in tree[1:] if branch.position < 50)
    assert all(len(tree) > 1 for tree, _ in trees)
    assert hits(last) - hits(after) >= 0.9 * shared
    for index, trace in enumerate(found):
        assert [token.token_id for token in trace] == expected[index % 2]
    tokens = [token for trace in found for token in trace]
    for regime in ("LELV", "HELV", "LEHV", "HEHV", "ADAPTIVE"):
        counted = after.get(("entropix_tokens_total", ("regime", regime)), 0)
        assert counted == sum(token.regime == regime for token in tokens), regime
    assert after[("entropix_entropy_bits_count",)] == len(tokens)
    # Both engines took part.
    finished = {
        dict(labels)["engine"]: value for (name, *labels), value in after.items() if name == "vllm:generation_tokens_total"
    }
    assert set(finished) == {"0", "1"}
    assert all(finished.values())
    assert sum(finished.values()) == len(tokens)
