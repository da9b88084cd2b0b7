"""Stages and settings as the kernel of chains numbers them."""

from __future__ import annotations

import triton.language as tl

from vllm_entropix.kernels.chains import STAGES, numbers_of

# Columns of a row's numbers.
NUMBERS = numbers_of("triton")
TEMPERATURE = tl.constexpr(STAGES.index("temperature"))
DYNATEMP = tl.constexpr(STAGES.index("dynatemp"))
TOP_K = tl.constexpr(STAGES.index("top_k"))
TOP_P = tl.constexpr(STAGES.index("top_p"))
MIN_P = tl.constexpr(STAGES.index("min_p"))
TOP_N_SIGMA = tl.constexpr(STAGES.index("top_n_sigma"))
TYP_P = tl.constexpr(STAGES.index("typ_p"))
DRY = tl.constexpr(STAGES.index("dry"))
XTC = tl.constexpr(STAGES.index("xtc"))
OWN_TEMPERATURE = tl.constexpr(NUMBERS.index("temperature"))
OWN_RANGE = tl.constexpr(NUMBERS.index("dynatemp_range"))
OWN_EXPONENT = tl.constexpr(NUMBERS.index("dynatemp_exponent"))
OWN_TOP_K = tl.constexpr(NUMBERS.index("top_k"))
OWN_TOP_P = tl.constexpr(NUMBERS.index("top_p"))
OWN_MIN_P = tl.constexpr(NUMBERS.index("min_p"))
OWN_SIGMAS = tl.constexpr(NUMBERS.index("top_n_sigma"))
OWN_TYP_P = tl.constexpr(NUMBERS.index("typ_p"))
OWN_XTC_PROBABILITY = tl.constexpr(NUMBERS.index("xtc_probability"))
OWN_XTC_THRESHOLD = tl.constexpr(NUMBERS.index("xtc_threshold"))
