"""Triton imports this module when it looks for backends: in every process, before there is any kernel."""

import wrapt
from triton.backends.compiler import BaseBackend

from interpreted_triton import interpreter, vllm_kernels

# From here rather than from a plugin of vLLM's: tests of kernels load no plugins, and VLLM_PLUGINS can leave one out.
wrapt.when_imported("triton.runtime.interpreter")(interpreter.repair)
wrapt.when_imported("vllm.v1.sample.ops.topk_topp_sampler")(vllm_kernels.filter_with_torch)


class InterpretedBackend(BaseBackend):
    """Stands for a compiler; nothing is ever compiled."""

    @staticmethod
    def supports_target(target):
        return target.backend == "cpu"

    def hash(self):
        return "interpreted"

    def get_module_map(self):
        return {}

    def _refuse(self, *args):
        raise RuntimeError("Triton kernels can only be interpreted here: set TRITON_INTERPRET=1 before Triton is imported")

    parse_options = add_stages = load_dialects = _refuse
