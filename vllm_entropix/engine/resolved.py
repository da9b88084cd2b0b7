"""The sampler's settings as one process of an engine resolves them for all: they travel in ``additional_config``."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_entropix._version import __version__
from vllm_entropix.samplers import registry
from vllm_entropix.samplers.entropix.settings import EntropixConfig
from vllm_entropix.settings.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Their key, beside what the user wrote.
RESOLVED = "entropix_resolved"


@dataclass(frozen=True)
class Resolved:
    """Settings as every process of an engine uses them.

    Attributes:
        config: the validated configuration.
        clarification: ids that HELV forces, or None.
        counted: are all tokens counted for Prometheus?
    """

    config: EntropixConfig
    clarification: tuple[int, ...] | None
    counted: bool

    def to_json(self) -> dict[str, Any]:
        """Plain values for additional_config, with the version of this package."""
        return {
            "config": self.config.model_dump(mode="json", by_alias=True),
            "clarification": None if self.clarification is None else list(self.clarification),
            "counted": self.counted,
            "version": __version__,
            "samplers": list(registry.names()),
        }

    @classmethod
    def from_config(cls, vllm_config: VllmConfig, process: str) -> Resolved:
        """The settings in an engine's configuration, for a process of this engine.

        Args:
            vllm_config: as another process finalised it.
            process: what to call this one in an error.

        Raises:
            ConfigError: that process has another version of this package, or other samplers, on another node perhaps.
        """
        data = vllm_config.additional_config[RESOLVED]
        if data["version"] != __version__:
            raise ConfigError(
                f"{process} on node {platform.node()} has vllm-entropix {__version__}, but the engine was configured by "
                f"{data['version']}; install the same version on every node"
            )
        if data["samplers"] != list(registry.names()):
            raise ConfigError(
                f"{process} on node {platform.node()} has the samplers {', '.join(registry.names())}, but the engine was "
                f"configured with {', '.join(data['samplers'])}; install the same packages on every node"
            )
        clarification = data["clarification"]
        return cls(
            registry.load_server(data["config"]),
            None if clarification is None else tuple(clarification),
            data["counted"],
        )


def resolved_values(vllm_config: VllmConfig) -> Mapping[str, Any] | None:
    """The settings in an engine's configuration as the plain values that travel; None if it doesn't run entropix."""
    additional = vllm_config.additional_config
    return additional.get(RESOLVED) if isinstance(additional, dict) else None
