"""Fused versions of functions that exist in plain PyTorch too, one small file each, chosen by device."""
