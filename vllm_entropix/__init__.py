"""Entropix sampling inside vLLM.

Importing this package pulls in neither torch nor vLLM: vLLM loads plugins in every process it starts.
"""

from typing import TYPE_CHECKING, Any

from vllm_entropix._version import __version__
from vllm_entropix.engine.plugin import register as _register

if TYPE_CHECKING:
    from vllm_entropix.records.scores import AnswerScores, scores
    from vllm_entropix.records.trace import TokenRecord, TokenTrace, traces
    from vllm_entropix.samplers.entropix.settings import EntropixConfig
    from vllm_entropix.settings.errors import ConfigError

__all__ = [
    "AnswerScores",
    "ConfigError",
    "EntropixConfig",
    "TokenRecord",
    "TokenTrace",
    "__version__",
    "scores",
    "traces",
]

# So that `LLM(model, sampler="entropix")` works after this import; patches wait until vLLM is imported.
_register()


def __getattr__(name: str) -> Any:
    # Lazily, so that a process that only loads the plugin doesn't pay for pydantic's models.
    if name in ("ConfigError", "EntropixConfig"):
        from vllm_entropix import config

        return getattr(config, name)
    if name in ("TokenRecord", "TokenTrace", "traces"):
        from vllm_entropix.records import trace
        from vllm_entropix.samplers import registry

        registry.known()

        return getattr(trace, name)
    if name in ("AnswerScores", "scores"):
        from vllm_entropix.records import scores

        return getattr(scores, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
