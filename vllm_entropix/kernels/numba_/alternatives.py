"""The strongest tokens of each row: ``torch.topk`` for a handful, which there takes longer than all else that tracing does."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_entropix.kernels.numba_.compiled import compiled
from vllm_entropix.kernels.numba_.distribute import largest_beside_nan, largest_tokens


@compiled()
def largest_of_rows(logits: Any, log_normaliser: Any, values: Any, token_ids: Any, first_row: int, last_row: int) -> None:
    """Fill ``values`` float32 and ``token_ids`` int64, both ``[rows, count]``, of rows ``first_row`` to ``last_row - 1``.

    Descending, NaN first, equal ones by ascending id. ``log_normaliser`` ``[rows]`` isn't finite where there is NaN.
    """
    count = values.shape[1]
    for row in range(first_row, last_row):
        if np.isfinite(log_normaliser[row]):
            largest_tokens(logits[row], count, np.float32(-np.inf), values[row], token_ids[row])
        else:
            largest_beside_nan(logits[row], count, values[row], token_ids[row])
