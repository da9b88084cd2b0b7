"""Kernels of vLLM that are right in the interpreter, and too slow."""

import functools


def filter_with_torch(topk_topp_sampler):
    """Symptom: top-k and top-p double the time of a step at a vocabulary of 512, and take seconds at 32000.

    ``_topk_topp_kernel`` searches the threshold in many passes. vLLM's own version in PyTorch, the one that it uses on a
    CPU without Triton, keeps the same tokens, except that among equal logits at the threshold it may keep others.
    """
    topk_topp_sampler.apply_top_k_top_p_triton = functools.partial(
        topk_topp_sampler.apply_top_k_top_p_pytorch, allow_cpu_sync=True
    )
