"""Engines that are measured: vLLM alone and with entropix, of a real model's shape with random weights."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHAPE_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
}
# Small enough for a CPU, and for kernels in an interpreter.
SHAPE_TINY: dict[str, Any] = SHAPE_8B | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


# ``vllm_entropix.engine.switch.DISABLE``, which is set before anything of the package is imported.
DISABLE = "VLLM_ENTROPIX_DISABLE"


@dataclass(frozen=True)
class Side:
    """Who samples.

    Attributes:
        settings: of entropix; None for vLLM alone.
        extra: arguments of each request.
    """

    settings: Mapping[str, Any] | None
    extra: Mapping[str, str] = field(default_factory=dict)


SIDES: dict[str, Side] = {
    "vllm": Side(None),
    "last": Side({"attention": {"layers": "last"}}),
    "all": Side({"attention": {"layers": "all"}}),
    "trace": Side({"attention": {"layers": "last"}}, {"entropix_trace": "on"}),
}


def cache_bytes(shape: Mapping[str, Any], requests: int, positions: int) -> int:
    """Keys and values of all requests at their longest, in blocks of up to 256 positions, and one request more."""
    element = 4 if shape["torch_dtype"] == "float32" else 2
    per_position = 2 * element * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
    return int(per_position * (requests + 1) * (-(-positions // 256) * 256))


@contextmanager
def opened(
    side: Side, *, requests: Sequence[int], positions: int, dry: bool, layers: int | None = None, in_process: bool = False
) -> Iterator[Any]:
    """An engine of the 8B shape, the first in its process.

    Args:
        side: who samples.
        requests: numbers of requests that run at once.
        positions: of a sequence at most.
        dry: a tiny shape, on a CPU.
        layers: of the model; None for all.
        in_process: keep the engine in this process, to look into it; elsewhere it is where a server has it.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if in_process or dry else "1"
    # No other plugin on either side, and vLLM alone without a trace of ours.
    os.environ["VLLM_PLUGINS"] = "" if side.settings is None else "entropix"
    if side.settings is None:
        os.environ[DISABLE] = "1"
    shape = SHAPE_TINY if dry else SHAPE_8B
    if layers is not None and not dry:
        shape = shape | {"num_hidden_layers": layers}
    arguments: dict[str, Any] = {}
    if side.settings is not None:
        arguments["additional_config"] = {"entropix": side.settings}
    if dry:
        arguments["enforce_eager"] = True
    else:
        # Few graphs, so that the start is short: those of the batches that are measured.
        arguments["compilation_config"] = {"cudagraph_capture_sizes": sorted({1, 8, 32, *requests})}
    from vllm import LLM

    with tempfile.TemporaryDirectory(prefix="entropix-shape-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape), encoding="utf-8")
        llm = LLM(
            folder,
            dtype=shape["torch_dtype"],
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=positions,
            max_num_seqs=max(requests),
            # The same on both sides, whatever else they allocate.
            kv_cache_memory_bytes=cache_bytes(shape, max(requests), positions),
            enable_prefix_caching=False,
            disable_log_stats=True,
            seed=0,
            **arguments,
        )
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()


def parameters(side: Side, tokens: int) -> Any:
    """A request's parameters: on both sides the base parameters of the default preset."""
    from vllm import SamplingParams

    from vllm_entropix import EntropixConfig

    base = EntropixConfig().base
    return SamplingParams(
        max_tokens=tokens,
        ignore_eos=True,
        temperature=base.temperature,
        top_p=base.top_p,
        top_k=base.top_k,
        min_p=base.min_p,
        extra_args=dict(side.extra),
        detokenize=False,
    )


def prompts(requests: int, context: int) -> list[Any]:
    """Prompts of this many tokens, no two alike."""
    return [{"prompt_token_ids": [3 + (7 * i + j) % 900 for j in range(context)]} for i in range(requests)]
