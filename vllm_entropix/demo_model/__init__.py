"""The shipped model: a small Llama, its settings and its prompts.

Imports no terminal, no torch and no vLLM: Ray replicas and workers ask where the model is.
"""

from pathlib import Path


def shipped_model() -> Path:
    """Return the folder of the shipped model."""
    return Path(__file__).parent
