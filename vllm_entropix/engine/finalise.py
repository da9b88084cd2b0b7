"""Makes an engine's configuration sample by entropix: resolves the settings, and sets vLLM's own fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_entropix.engine import gate
from vllm_entropix.engine.arguments import KEY, FromCommandLine
from vllm_entropix.engine.calibrated import with_calibration
from vllm_entropix.engine.chains import with_breakers
from vllm_entropix.engine.clarification import clarification_ids
from vllm_entropix.engine.forkable import check_server
from vllm_entropix.engine.resolved import RESOLVED, Resolved
from vllm_entropix.engine.subclasses import SCHEDULER, WORKER, qualified_name
from vllm_entropix.observability import disk, hints
from vllm_entropix.samplers import registry
from vllm_entropix.samplers.entropix.settings import EntropixConfig
from vllm_entropix.settings.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Under vLLM's own logger, whose handlers are set up in every process.
logger = init_logger("vllm.plugins.entropix")


def finalise(vllm_config: VllmConfig, additional: Mapping[str, Any], statistics: bool = True) -> VllmConfig:
    """Make an engine of this configuration sample by entropix, if ``additional`` asks for it.

    Everything is refused here and not later: an error in the engine's own process looks like a hang.

    Args:
        vllm_config: the engine's configuration, complete but for us.
        additional: the additional config as the user gave it.
        statistics: does the engine log statistics at all?

    Raises:
        ConfigError: a setting or a feature in use can't be had; one sentence with the way out. From a command line the
            process ends with that sentence and status 1 instead.
    """
    try:
        gate.refuse_odd_keys(additional)
        wanted = additional.get(KEY)
        if wanted is None or wanted is False:
            return vllm_config
        parallel = vllm_config.parallel_config
        # Otherwise this is one of several API servers.
        says = parallel._api_process_count == 1 or parallel._api_process_rank < 0
        config = registry.load_server(with_calibration(wanted, vllm_config, says))
        gate.refuse_unsupported(vllm_config, config)
        config = with_breakers(vllm_config.model_config, config)
        counted = config.prometheus and statistics
        disk.check(config.trace)
        check_server(config.model_dump())
        resolved = Resolved(config, clarification_ids(vllm_config, config), counted)
    except ConfigError as error:
        if isinstance(additional, FromCommandLine):
            raise SystemExit(f"vllm-entropix: {error}") from None
        raise
    vllm_config.additional_config = {**additional, RESOLVED: resolved.to_json()}
    scheduler = vllm_config.scheduler_config
    parallel.worker_cls = qualified_name(WORKER, parallel.worker_cls)
    scheduler_class = scheduler.get_scheduler_cls()
    scheduler.scheduler_cls = qualified_name(SCHEDULER, f"{scheduler_class.__module__}.{scheduler_class.__qualname__}")
    if says:
        _say(vllm_config, config, scheduler_class)
    return vllm_config


def _say(vllm_config: VllmConfig, config: EntropixConfig, scheduler_class: type) -> None:
    """Log what nobody sees otherwise: what vLLM's own warning means, and a clarification that can't be."""
    logger.info(
        "entropix: the scheduler extends vLLM's own %s, and asynchronous scheduling is %s as without the plugin; "
        "what vLLM says of custom scheduler classes and degraded performance doesn't concern it.",
        scheduler_class.__name__,
        "on" if vllm_config.scheduler_config.async_scheduling else "off",
    )
    never = hints.never_forced(config, vllm_config.model_config.get_vocab_size())
    if never is not None:
        logger.warning("entropix: the clarification can never be inserted: %s.", never)
