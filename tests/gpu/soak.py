"""Very many short requests, some of them aborted, through an engine whose cache is too small for all that run at once."""

import random
import resource
from dataclasses import dataclass

from tests.support.engine import adapter_of, scheduler_of


@dataclass(frozen=True)
class Census:
    """What was seen on the way.

    Attributes:
        finished: requests that ended by themselves.
        aborted: requests that were aborted.
        preempted: times that a request was preempted.
        memory: bytes that the engine's process held on the device (0 without one) at several points, the first warmed up.
        resident: largest resident set of the process so far at the same points, KiB.
        left: sequences that the sampler still knew of when all had ended.
    """

    finished: int
    aborted: int
    preempted: int
    memory: list[int]
    resident: list[int]
    left: int


def soak(llm, requests, *, at_once=64, tokens=48, points=10, seed=0):
    """Run this many requests, every tenth of them aborted at some time."""
    import torch
    from vllm import SamplingParams

    engine, scheduler, dice = llm.llm_engine, scheduler_of(llm), random.Random(seed)
    preempted = 0
    original = scheduler._preempt_request

    def count(*args, **kwargs):
        nonlocal preempted
        preempted += 1
        return original(*args, **kwargs)

    scheduler._preempt_request = count
    memory, resident, running = [], [], set()
    sent = finished = aborted = 0
    try:
        while sent < requests or engine.has_unfinished_requests():
            while sent < requests and len(running) < at_once:
                name = str(sent)
                ids = [dice.randrange(256) for _ in range(dice.randrange(1, 60))]
                params = SamplingParams(
                    max_tokens=dice.randrange(1, tokens),
                    ignore_eos=True,
                    temperature=dice.choice((0.0, 1.0)),
                    extra_args=dice.choice(({}, {"entropix": "off"}, {"entropix_trace": "on"})),
                )
                engine.add_request(name, {"prompt_token_ids": ids}, params)
                running.add(name)
                sent += 1
                if sent % max(1, requests // points) == 0:
                    memory.append(torch.cuda.memory_allocated() if torch.cuda.is_available() else 0)
                    resident.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
            for output in engine.step():
                if output.finished:
                    running.discard(output.request_id)
                    finished += 1
            if running and dice.random() < 0.1 * len(running) / tokens:
                name = dice.choice(sorted(running))
                engine.abort_request([name])
                running.discard(name)
                aborted += 1
    finally:
        scheduler._preempt_request = original
    # Requests that ended with the last step are forgotten with the next.
    generate_one(llm)
    return Census(finished, aborted, preempted, memory, resident, len(adapter_of(llm).batch.sequences) - 1)


def generate_one(llm):
    """One more request, whose own sequence is then the only one that is known."""
    from vllm import SamplingParams

    llm.generate(["a"], [SamplingParams(max_tokens=2, ignore_eos=True)], use_tqdm=False)
