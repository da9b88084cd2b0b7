"""Plans around a request's own temperature, top_p, top_k and min_p. Each number is a vector, an element a row.

All functions take the same, as :class:`~vllm_entropix.samplers.base.KernelRule` says.
"""

# Triton's compiler looks at a kernel's annotations, and knows none of Python's.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

_NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def own(numbers, base, entropy, varentropy, spread, attended, ae, av, agreement, interaction, fields, told):
    """The request's own parameters, and one draw."""
    k = tl.load(base + 2).to(tl.int64)
    return tl.load(base), tl.load(base + 1), k, tl.load(base + 3), tl.full(k.shape, 1, tl.int64), k < k


@triton.jit
def min_p(numbers, base, entropy, varentropy, spread, attended, ae, av, agreement, interaction, fields, told):
    """As ``MinP.plan``."""
    t, p, k, m, n, asks = own(
        numbers, base, entropy, varentropy, spread, attended, ae, av, agreement, interaction, fields, told
    )
    return t, p, k, tl.where(m > 0, m, tl.load(numbers)), n, asks


@triton.jit
def top_n_sigma(numbers, base, entropy, varentropy, spread, attended, ae, av, agreement, interaction, fields, told):
    """As ``TopNSigma.plan``."""
    t, p, k, m, n, asks = own(
        numbers, base, entropy, varentropy, spread, attended, ae, av, agreement, interaction, fields, told
    )
    sigmas = tl.load(numbers)
    floor = tl.where(sigmas <= 0, 0.0, tl.exp(tl.div_rn(-sigmas * spread, t)))
    return t, p, k, tl.maximum(floor, m, _NAN), n, asks
