"""What one engine does under another layout of ranks: tokens, traces, and the bits that each rank draws from.

Functions here that take a worker are sent to every worker of an engine.
"""

import hashlib
import os

from tests.support import runners
from tests.support.engine import engine, generate

# Layers are chosen anew in the running engine, for an engine of two workers takes half a minute to start.
LAYERS = ("last", "all", (0,), (1, 2))
LONG = [{"prompt_token_ids": [(7 * i * i + 3) % 500 for i in range(length)]} for length in (150, 70)]
SHORT = ["The quick brown fox", "0123456789", "a", "bcbcbc"]
# Keeps a number of what is drawn, and looks at the text.
CHAIN = {"samplers": "dry;xtc;mirostat_v2", "dry_multiplier": 0.5, "dry_sequence_breakers": [1], "xtc_probability": 0.5}
METRICS = ("entropy", "varentropy", "attention_entropy", "attention_varentropy", "agreement", "interaction_strength")


def layout(monkeypatch, model, **arguments):
    """An engine of several workers on this machine's CPUs, or of one without arguments."""
    if "pipeline_parallel_size" in arguments:
        # Spawned workers look for plugins where this process does.
        monkeypatch.syspath_prepend(runners.VLLM_ON_CPU)
        monkeypatch.setenv("ENTROPIX_TEST_V1_PIPELINE", "1")
    if arguments:
        # Spawned, so that workers load plugins themselves. A CPU each.
        monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        first, second, *_ = sorted(os.sched_getaffinity(0))
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{first}|{second}")
    forks = {"floor": 0, "distance": 4, "inside_words": True}
    config = {"attention": {"layers": "all"}, "clarification": {"text": "hm?"}, "forks": forks}
    return engine(model, sampler="entropix", sampler_config=config, max_num_batched_tokens=64, **arguments)


def choose_layers(worker, layers):
    """Observe other layers from now on."""
    adapter = worker._entropix
    adapter.config = adapter.config.model_copy(
        update={"attention": adapter.config.attention.model_copy(update={"layers": layers})}
    )
    adapter.observe()


def keep_digests(worker):
    """Hash what is drawn from, each time it is drawn from, on this worker."""
    adapter = worker._entropix
    adapter.digests, original = [], adapter.apply

    def apply(logits, rows):
        original(logits, rows)
        adapter.digests.append(hashlib.sha256(logits.contiguous().numpy().tobytes()).hexdigest())

    adapter.apply = apply


def digests(worker):
    """What ``keep_digests`` kept."""
    return worker._entropix.digests


def count_exchanges(worker):
    """Count what this worker exchanges with the others of its tensor-parallel group, each time attention is measured."""
    from vllm.distributed import get_tp_group

    adapter, group = worker._entropix, get_tp_group()
    adapter.exchanges, measure, gather = [], adapter.measure, group.all_gather

    def counted(*args, **kwargs):
        adapter.exchanges[-1] += 1
        return gather(*args, **kwargs)

    def counting(rows, wanted):
        adapter.exchanges.append(0)
        group.all_gather = counted
        try:
            return measure(rows, wanted)
        finally:
            del group.all_gather

    adapter.measure = counting


def exchanges(worker):
    """What ``count_exchanges`` counted."""
    return worker._entropix.exchanges


def results(llm):
    """For each choice of layers: per request its tokens, and its trace as plain values or None."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, extra_args={"entropix_trace": "on"})
    sampled = SamplingParams(max_tokens=12, ignore_eos=True, seed=3, extra_args={"entropix_trace": "on"})
    other = replace_extra(sampled, {"entropix": "off"})
    chained = replace_extra(sampled, {"entropix_trace": "on", **CHAIN})
    found = {}
    for layers in LAYERS:
        llm.collective_rpc(choose_layers, args=(layers,))
        # Apart from each other: vLLM's CPU build can't split the prompt of a seeded request.
        outputs = [*generate(llm, LONG, [greedy] * 2), *generate(llm, SHORT, [sampled, other, sampled, chained])]
        found[layers] = [plain(output.outputs[0]) for output in outputs]
    return found


def branches(llm):
    """The tokens of each branch of an answer that forks."""
    from vllm import SamplingParams

    forks = {"entropix_forks": 64, "entropix_fork_entropy": 0, "entropix_fork_select": "all"}  # no bound is met
    [output] = generate(llm, SHORT[:1], [SamplingParams(max_tokens=12, ignore_eos=True, seed=3, extra_args=forks)])
    return sorted(list(completion.token_ids) for completion in output.outputs)


def replace_extra(params, extra_args):
    """The parameters with these settings of ours instead."""
    changed = params.clone()
    changed.extra_args = extra_args
    return changed


def plain(completion):
    """Token ids and trace of a completion as plain values."""
    trace = getattr(completion, "entropix_trace", None)
    return list(completion.token_ids), None if trace is None else [record.to_dict() for record in trace]
