"""A branch of an answer that forks begins with its parent's own KV blocks, the last, partly filled one copied on write.

vLLM copies a block on write where a request hits a part of it in the prefix cache. What the scheduler is told for a branch is
that all its prompt but the last token is such a hit, in the blocks that its parent holds; so nothing is computed again. Where
the parent holds none any more, or vLLM has no such copies, the prefix cache answers as for any request: by the same tokens.
"""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger

from vllm_entropix.engine import vllm_check
from vllm_entropix.engine.forkable import BRANCH

# Under vLLM's own logger, whose handlers are set up in every process.
logger = init_logger("vllm.plugins.entropix")

# The one whose blocks hold each position of a sequence for as long as it runs. Others drop or move blocks.
_HOLDS_ALL = "FullAttentionManager"


def share_blocks(scheduler: Any) -> None:
    """Let the branches of a scheduler's requests begin with their parents' blocks, where that can be had."""
    problem = _problem(scheduler)
    if problem is not None:
        logger.info("entropix: branches of answers that fork share whole blocks alone, by the prefix cache: %s.", problem)
        return
    manager = scheduler.kv_cache_manager
    original = manager.get_computed_blocks

    def get_computed_blocks(request: Any) -> Any:
        found = original(request)
        shared = _blocks_of_parent(scheduler, request)
        if shared is None:
            return found
        # What else vLLM tells of a hit concerns groups that hold less than all.
        return (*shared, *(0 for _ in found[2:]))

    manager.get_computed_blocks = get_computed_blocks


def _problem(scheduler: Any) -> str | None:
    """Why blocks can't be copied on write; None: they can."""
    missing = vllm_check.copy_on_write_problems()
    if missing:
        return f"in this vLLM {missing[0]}"
    if scheduler.connector is not None:
        return "a KV connector holds blocks, too"
    groups = scheduler.kv_cache_manager.coordinator.single_type_managers
    others = sorted({type(group).__name__ for group in groups} - {_HOLDS_ALL})
    if others:
        return f"the model's cache has groups of {', '.join(others)}"
    return None if groups else "the model has no cache of keys"


def _blocks_of_parent(scheduler: Any, request: Any) -> tuple[Any, int] | None:
    """(KVCacheBlocks, computed tokens) of what a branch shares with its parent; None: it is none, or its parent has none."""
    params = request.sampling_params
    branch = (params.extra_args or {}).get(BRANCH) if params is not None else None
    # One that was preempted has blocks of its own in the cache.
    if branch is None or request.num_preemptions:
        return None
    parent, shared = scheduler.requests.get(branch["of"]), request.num_tokens - 1
    # A parent that was preempted computes all anew.
    if parent is None or parent.num_computed_tokens < shared:
        return None
    manager = scheduler.kv_cache_manager
    blocks = []
    for group in manager.coordinator.single_type_managers:
        needed = -(-shared // group.block_size)
        of_parent = list(group.req_to_blocks.get(parent.request_id, ())[:needed])
        if len(of_parent) < needed or any(block.is_null for block in of_parent):
            return None
        blocks.append(of_parent)
    return manager.create_kv_cache_blocks(tuple(blocks)), shared
