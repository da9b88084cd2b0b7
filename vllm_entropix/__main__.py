"""``python -m vllm_entropix``: the ``vllm-entropix`` command."""

from vllm_entropix.cli.start import main

main()
