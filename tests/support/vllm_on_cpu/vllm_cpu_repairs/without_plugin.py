"""A Ray worker on a node where vllm-entropix isn't installed."""

import os
import sys

SWITCH = "ENTROPIX_TEST_RAY_WITHOUT_PLUGIN"
PACKAGE = "vllm_entropix"


def register():
    """Called by vLLM in every process: makes the package vanish from Ray's workers."""
    if os.environ.get(SWITCH) != "1" or not _is_worker():
        return
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]
    sys.meta_path.insert(0, _NotInstalled())


def _is_worker():
    import ray

    return ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE


class _NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == PACKAGE:
            raise ModuleNotFoundError(f"No module named {name.partition('.')[0]!r}", name=PACKAGE)
