"""The class that ``ray_platform`` names; apart from it, because importing this imports vLLM."""

from vllm.platforms.cpu import CpuPlatform


class RayCpuPlatform(CpuPlatform):
    """A CPU whose workers each take one of the GPUs that ``ray.init(num_gpus=...)`` was told there are."""

    ray_device_key = "GPU"
