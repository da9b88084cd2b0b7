"""The driver that Triton, and vLLM after it, counts as the one active device."""

import os

from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class InterpretedDriver(DriverBase):
    """A device that is always there, has one stream and takes no time."""

    @classmethod
    def is_active(cls):
        return os.environ.get("TRITON_INTERPRET") == "1"

    def map_python_to_cpp_type(self, ty):
        raise NotImplementedError("nothing is launched from C++ here")

    def get_current_target(self):
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")

    def get_device_interface(self):
        import torch

        return torch.cpu

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_benchmarker(self):
        def benchmark(kernel_call, *, quantiles=None, **_):
            # An autotuner takes the first configuration that runs: times of an interpreter mean nothing.
            kernel_call()
            return [0.0] * len(quantiles or (0.5, 0.2, 0.8))

        return benchmark
