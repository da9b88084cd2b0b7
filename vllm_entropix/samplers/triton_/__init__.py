"""Plans of samplers on a GPU: what their ``plan`` computes in PyTorch, as functions of the step's decision kernel.

Entropix's stands beside its other parts.
"""
