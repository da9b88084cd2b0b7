"""``python -m vllm_entropix``: the ``vllm-entropix`` command."""

from vllm_entropix.cli.main import main

main()
