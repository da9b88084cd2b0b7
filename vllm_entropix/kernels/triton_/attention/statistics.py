"""The statistics of layers and rows whose heads are all here."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_entropix.kernels.triton_.attention.deviations import deviate
from vllm_entropix.kernels.triton_.attention.heads import finish, merge
from vllm_entropix.kernels.triton_.attention.launch import Launch
from vllm_entropix.kernels.triton_.attention.paged import PagedLayers, PagedRows
from vllm_entropix.kernels.triton_.attention.scores import attend
from vllm_entropix.kernels.triton_.attention.whole_rows import measure_whole
from vllm_entropix.kernels.triton_.attention.workspace import Workspace, programs_for_whole_rows, rows_together


def attention_statistics(
    layers: PagedLayers, rows: PagedRows, padded: int, variance_rule: int, workspace: Workspace | None = None
) -> Tensor:
    """Entropy, varentropy over heads, agreement and interaction, float32 ``[4, layers, rows]``; NaN for rows not wanted.

    Args:
        layers: where the keys are, and how they become scores.
        rows: what is measured.
        padded: slots that count at least, with score 0 (D2); 0 for none.
        variance_rule: 0 over heads, 1 with Bessel's correction, 2 zero.
        workspace: what steps of this size need; None to allocate it.
    """
    number, many, heads, _ = rows.shape
    device = rows.lengths.device
    results = torch.empty(4, number, many, dtype=torch.float32, device=device)
    if not results.numel():
        return results
    workspace = workspace or Workspace.for_steps(number, many, heads, rows.longest, device)
    together = rows_together(number, many, heads, rows.longest, workspace.size)
    for start in range(0, many, together):
        chunk = slice(start, start + together)
        here = rows if together == many else rows.part(rows=chunk)
        programs = programs_for_whole_rows(number, here.lengths.shape[0], heads, rows.longest, workspace.size)
        launch = Launch(layers, here, padded, workspace, programs)
        if programs:
            measure_whole(launch)
        else:
            attend(launch)
            merge(launch)
            deviate(launch)
        found = finish(launch, variance_rule, results if together == many else None)
        if together < many:
            results[:, :, chunk] = found
    return results
