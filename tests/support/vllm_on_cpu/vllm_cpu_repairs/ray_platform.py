"""A CPU that vLLM's Ray executor accepts."""

import os

SWITCH = "ENTROPIX_TEST_RAY_ON_CPU"


def register():
    """Name of the platform's class if it is asked for; called by vLLM when it first needs to know its platform.

    Symptom: "current platform cpu does not support ray". A platform has to say which of Ray's resources a worker takes,
    and that is asked before any general plugin is loaded.
    """
    return "vllm_cpu_repairs.ray_cpu.RayCpuPlatform" if os.environ.get(SWITCH) == "1" else None
