"""Which calibration a server runs with: the one that is kept of its model, a new one that it asks for, or none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger

from vllm_entropix.samplers.entropix import calibrations
from vllm_entropix.samplers.entropix.settings import as_mapping
from vllm_entropix.settings.errors import ConfigError, cut
from vllm_entropix.settings.load import merge

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.plugins.entropix")

# A calibration at the start may take so long, weights of any size included.
SECONDS = 1800
# Tokens of an answer, and of a prompt with its answer. There are many prompts, which tell more than long answers.
_TOKENS, _CONTEXT = 40, 2048
_TWO_BYTES = ("bfloat16", "float16")


def with_calibration(wanted: Any, vllm_config: VllmConfig, says: bool) -> Any:
    """What a user wants of the sampler, over the calibration of the model.

    A calibration is looked for if entropix draws and neither a preset nor anything that a calibration finds is given. It is
    made if ``thresholds`` is ``auto``.

    Args:
        wanted: true, a table, JSON text, a preset's name or a file.
        vllm_config: of the engine, which tells the model.
        says: log which calibration it is; one of several processes does.

    Raises:
        ConfigError: a calibration is asked for and can't be had.
    """
    table = {} if wanted is True else as_mapping(wanted)
    asked = calibrations.is_auto(table)
    chosen = table.keys() & {"preset", *calibrations.SECTIONS} or table.get("sampler", "entropix") != "entropix"
    if chosen and not asked:
        return wanted
    model = vllm_config.model_config
    own = calibrations.fingerprint(model.model, model.revision)
    found = None if own is None else calibrations.find(own)
    if asked and found is None:
        if own is None:
            raise ConfigError(
                f"thresholds is auto, but the weights of {cut(model.model)} aren't on this machine yet; download them first, "
                "or leave thresholds out"
            )
        with calibrations.alone(own):
            found = calibrations.find(own) or _calibrate(vllm_config, own)
    if found is None:
        if says:
            logger.info(
                "entropix: no calibration of this model is known; `vllm-entropix calibrate %s` makes one, and so does a start "
                "with --sampler-config '%s'.",
                model.model,
                '{"thresholds": "auto"}',
            )
        return wanted
    if says:
        logger.info("entropix: runs with the calibration %s (fingerprint %s).", found, own)
    return merge(calibrations.settings_of(found), calibrations.without_auto(table))


def _calibrate(vllm_config: VllmConfig, own: str) -> str:
    """Calibrate in a process of its own, whose memory is free again when the engine starts; gives the path of the file."""
    model = vllm_config.model_config
    logger.info("entropix: calibrating %s with the prompts that are shipped, once.", model.model)
    dtype = str(model.dtype).removeprefix("torch.")
    arguments = {
        # Many CPUs are slow at types of two bytes; the command knows, and their last bits move no border.
        "dtype": None if dtype in _TWO_BYTES and not torch.cuda.is_available() else dtype,
        "max_model_len": min(model.max_model_len, _CONTEXT),
        "trust_remote_code": model.trust_remote_code,
        "tokenizer": model.tokenizer,
        "revision": model.revision,
        "tokenizer_revision": model.tokenizer_revision,
        "quantization": model.quantization,
        "tensor_parallel_size": vllm_config.parallel_config.tensor_parallel_size,
        "gpu_memory_utilization": vllm_config.cache_config.gpu_memory_utilization,
    }
    given = json.dumps({name: value for name, value in arguments.items() if value is not None})
    command = [sys.executable, "-m", "vllm_entropix", "calibrate", model.model]
    command += ["--max-tokens", str(_TOKENS), "--engine", given]
    try:
        said = _said(command, SECONDS)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"thresholds is auto, but calibrating took over {SECONDS} s; run {_by_hand(model.model)}") from None
    found = calibrations.find(own)
    if found is None:
        lines = said.strip().splitlines() or ["it said nothing"]
        raise ConfigError(
            f"thresholds is auto, but the model can't be calibrated: {cut(lines[-1], 300)}; run {_by_hand(model.model)}, "
            "or leave thresholds out"
        )
    return found


def _said(command: list[str], seconds: float) -> str:
    """Run a command, and give what it said of errors. Whatever ends the wait ends all that the command started, engines too.

    Raises:
        subprocess.TimeoutExpired: it took longer.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        return process.communicate(timeout=seconds)[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def _by_hand(model: str) -> str:
    return f"`vllm-entropix calibrate {cut(model)}` to see why"
