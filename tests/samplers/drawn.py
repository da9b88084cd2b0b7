"""Distributions of whole batches, for tests of single samplers."""

import torch

from tests.samplers.conformance import Request, draw


def drawn(sampler, logits, temperature=1.0, top_p=1.0, top_k=None, min_p=0.0, **said):
    """Probabilities ``[rows, vocab]`` of rows with the same request, by the CPU's kernels."""
    logits = torch.as_tensor(logits, dtype=torch.float32)
    base = (temperature, top_p, float(top_k or logits.shape[-1]), min_p)
    return draw([Request(sampler, base, said)] * len(logits), logits).double().exp()


def logits_of(*probabilities):
    """One row of logits that gives these probabilities."""
    return torch.tensor([probabilities], dtype=torch.float64).log()
