"""The ``vllm-entropix`` command."""
