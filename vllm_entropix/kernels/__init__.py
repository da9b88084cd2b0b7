"""Fused versions of functions that exist in plain PyTorch too: Triton's run on a GPU, numba's on a CPU."""
