"""The ways in which an engine runs on a GPU, each of which must observe what transformers computes.

Imports nothing heavy: ``benchmarks.gpu`` reads the names and gives each mode a process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Set by a run that only looks for errors in this code: the modes then have the arguments of an engine on a CPU.
DRY_RUN = "ENTROPIX_GPU_DRY_RUN"

# Of relative errors: the median, 97 % and the largest. tests/support/test_dense.py says what right code and wrong code give.
Bars = tuple[float, float, float]
HALF_BARS: Bars = (0.002, 0.01, 0.1)
# vLLM's Triton attention multiplies float32 as tf32.
TF32_BARS: Bars = (1e-3, 5e-3, 3e-2)
BFLOAT16_BARS: Bars = (0.005, 0.02, 0.15)
# Keys of eight bits differ from exact ones by percents: this shows gross errors, such as a missing scale, alone.
FP8_BARS: Bars = (0.1, 0.5, 2.0)

# The only dtype that all backends have.
_HALF = {"dtype": "float16", "block_size": 16}
_COMPILED = {"enforce_eager": False, "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32]}}


def _captured(mode: str, *more_sizes: int) -> dict[str, Any]:
    # Compiled by the backend that changes no operation, so that nothing but the capture is new.
    sizes = [1, 2, 4, 8, *more_sizes]
    compilation = {"mode": 3, "backend": "eager", "cudagraph_mode": mode, "cudagraph_capture_sizes": sizes}
    return {"enforce_eager": False, "compilation_config": compilation, **_HALF}


@dataclass(frozen=True)
class Mode:
    """An engine's arguments, its model, and what its rounding allows.

    Attributes:
        arguments: of ``LLM``.
        bars: errors of the statistics at most.
        family: of the tiny model, Llama or Gemma2; the second has a window, and softcaps.
        head_dim: of the tiny model.
        backend: the attention backend that must be in use; None: whichever vLLM chooses.
        package: what the mode can't do without.
        drafts: may a request have several rows in a step, some of them for tokens that the answer doesn't keep?
    """

    arguments: dict[str, Any]
    bars: Bars = HALF_BARS
    family: str = "Llama"
    head_dim: int = 64
    backend: str | None = None
    package: str | None = None
    drafts: bool = False

    @property
    def compiled(self) -> bool:
        """Does the engine compile its model?"""
        return not self.arguments.get("enforce_eager", True)

    @property
    def model(self) -> dict[str, Any]:
        """Options of ``tests.support.models.tiny_model``."""
        if self.family == "Llama":
            return {"head_dim": self.head_dim}
        return {
            "head_dim": self.head_dim,
            "sliding_window": 24,
            "query_pre_attn_scalar": 64,
            "attn_logit_softcapping": 5.0,
            "tie_word_embeddings": True,
        }


def _of_backend(backend: str, arguments: dict[str, Any], **others: Any) -> Mode:
    return Mode({"attention_backend": backend, **arguments}, backend=backend, **others)


_NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
_CHUNKED = {"enable_prefix_caching": True, "max_num_batched_tokens": 64, "max_num_seqs": 16}

MODES: dict[str, Mode] = {
    "float32": _of_backend("TRITON_ATTN", {"block_size": 16}, bars=TF32_BARS),
    "flash-attn": _of_backend("FLASH_ATTN", {"async_scheduling": True, **_HALF}),
    "triton-attn": _of_backend("TRITON_ATTN", {"async_scheduling": False, **_HALF}),
    "flashinfer": _of_backend("FLASHINFER", _HALF, package="flashinfer"),
    "piecewise-graphs": Mode(_captured("PIECEWISE")),
    # With heads of up to 64 elements, FlashAttention 3 plans steps of one token a request in another layout than others
    # (vllm-project/flash-attention, hopper/flash_api.cpp, where causal becomes false). These graphs are captured for any
    # step, misread such a plan, and give wrong hidden states.
    "full-graphs": Mode(_captured("FULL"), head_dim=128),
    # What isn't cached of the prompts fits: requests of several tokens run from a graph, too.
    "full-graphs-of-prompts": _of_backend("TRITON_ATTN", _captured("FULL", 64)),
    "default": Mode({"async_scheduling": True, **_COMPILED, **_HALF}),
    "prefix-cache-and-chunks": Mode({**_COMPILED, **_CHUNKED, **_HALF}),
    "ngram-drafts": Mode({"speculative_config": _NGRAM, **_COMPILED, **_HALF}, drafts=True),
    # vLLM refuses float16 for this family.
    "window": Mode({**_COMPILED, "dtype": "bfloat16", "block_size": 16}, bars=BFLOAT16_BARS, family="Gemma2"),
    # FlashAttention 3 has no float16 beside keys of eight bits.
    "fp8-keys": _of_backend("FLASH_ATTN", {"kv_cache_dtype": "fp8", **_HALF, "dtype": "bfloat16"}, bars=FP8_BARS),
}
# What an engine on a CPU takes instead, in a dry run.
ON_A_CPU = Mode({"block_size": 32}, bars=TF32_BARS)
