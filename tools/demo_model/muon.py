"""The Muon optimizer, in a form that is fast on a CPU.

Muon replaces the update of each matrix by the nearest orthogonal one, which needs about a third fewer steps than Adam here.
``torch.optim.Muon`` does the same, but one matrix at a time and through a kernel that is slow for bfloat16 on CPUs; here all
matrices of one shape are done together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

#: Coefficients of the Newton-Schulz iteration, by Keller Jordan (https://kellerjordan.github.io/posts/muon/).
A, B, C = 3.4445, -4.7750, 2.0315
ITERATIONS = 5


def orthogonalized(matrices: Tensor) -> Tensor:
    """The orthogonal factor of each matrix of a batch, roughly."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = (matrices if wide else matrices.mT).to(torch.bfloat16)
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).contiguous()
    for _ in range(ITERATIONS):
        # For these two products single calls are several times as fast as a batched one, for the third it is the reverse.
        gram = torch.stack([one @ one.T for one in x])
        square = torch.stack([one @ one for one in gram])
        x = A * x + torch.bmm(B * gram + C * square, x)
    result: Tensor = (x if wide else x.mT).float()
    return result


class Muon(Optimizer):
    """Muon with Nesterov momentum; the update has the size that Adam's would have."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters."""
        # Many small products: on a busy machine a second thread would only be waited for.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self._update()
        torch.set_num_threads(threads)

    def _update(self) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                shapes[parameter.shape].append(parameter)
            for shape, parameters in shapes.items():
                gradient = torch.stack([parameter.grad for parameter in parameters if parameter.grad is not None])
                state = self.state[parameters[0]]
                buffer = state.setdefault("momentum", torch.zeros_like(gradient))
                buffer.mul_(group["momentum"]).add_(gradient)
                update = orthogonalized(gradient.add_(buffer, alpha=group["momentum"]))
                size = group["lr"] * 0.2 * max(shape) ** 0.5
                for parameter, change in zip(parameters, update, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(change, alpha=-size)
