"""Public names of the settings; they live in ``settings`` and ``samplers.entropix.settings``."""

from vllm_entropix.samplers.entropix.settings import DEFAULT_PRESET, EntropixConfig
from vllm_entropix.settings.errors import ConfigError

__all__ = ["DEFAULT_PRESET", "ConfigError", "EntropixConfig"]
