"""Makes the start of an engine fail in a test of the fast tier (tests/support/fast.py)."""

import os

import wrapt

SWITCH = "ENTROPIX_TEST_NO_ENGINE"


def register():
    """Called by vLLM in every process."""
    wrapt.register_post_import_hook(_watch, "vllm.v1.engine.core")


def _watch(module):
    wrapt.wrap_function_wrapper(module, "EngineCore.__init__", _start)


def _start(start, core, args, kwargs):
    if os.environ.get(SWITCH) == "1":
        raise RuntimeError(
            "a test without pytest.mark.engine starts an engine: mark it, so that `make test-fast` leaves it out"
        )
    return start(*args, **kwargs)
