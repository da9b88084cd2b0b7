"""Where the ``vllm-entropix`` command starts: before anything is imported that may not be installed."""

import sys


def main() -> None:
    """Run a command; a requirement of ours that is missing, as after an update of an editable install, is one sentence."""
    try:
        from vllm_entropix.cli.main import main as run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "vllm_entropix":
            raise
        sys.exit(f"vllm-entropix: {error.name} isn't installed, which all commands need; install vllm-entropix again by pip")
    run()
