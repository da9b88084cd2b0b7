"""Logits processors of another plugin, for the model runner in use. ``Ban`` and ``Sharpen`` change nothing; what counts is when
they run. ``Spoil`` puts what no healthy model gives into rows, leaving what is masked masked."""

from typing import Any

import torch

from tests.support.runners import is_v2


def spoil(logits: torch.Tensor, step: int) -> None:
    """Change each row in another way, in place; every eighth is left as it is."""
    for row, line in enumerate(logits):
        allowed = (line > -torch.inf).nonzero().flatten()
        some = allowed[step % len(allowed)]
        kind = (step + row) % 8
        if kind in (1, 2):
            line[some] = torch.nan if kind == 1 else -torch.tensor(torch.nan)
        elif kind in (3, 4):
            line[some] = torch.inf
            line[allowed[-1]] = torch.nan if kind == 4 else torch.inf
        elif kind == 5:
            line[allowed] = torch.nan
        elif kind == 6:
            line[allowed] = -torch.inf
            line[some] = torch.nan
        elif kind == 7:
            line[allowed] = 3e38 * line[allowed].sign()


if is_v2():
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

    class Ban(LogitsProcessor):  # type: ignore[misc]
        def __init__(self, vllm_config: Any, req_states: Any) -> None:
            pass

        def add_request(self, req_idx: int, sampling_params: Any) -> bool:
            return False

        def apply_staged_writes(self) -> None:
            pass

        def apply(self, logits: Any, ctx: Any) -> Any:
            return logits

    class Sharpen(Ban):
        pass

    class Spoil(Ban):
        step = 0

        def add_request(self, req_idx: int, sampling_params: Any) -> bool:
            return True

        def apply(self, logits: Any, ctx: Any) -> Any:
            self.step += 1
            spoil(logits, self.step)
            return logits

    BEFORE, AFTER = [Ban, Sharpen], []
else:
    from vllm.v1.sample.logits_processor import LogitsProcessor

    class Ban(LogitsProcessor):  # type: ignore[misc,no-redef]
        def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
            pass

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update: Any) -> None:
            pass

        def apply(self, logits: Any) -> Any:
            return logits

    class Sharpen(Ban):  # type: ignore[no-redef]
        def is_argmax_invariant(self) -> bool:
            return True

    class Spoil(Ban):  # type: ignore[no-redef]
        step = 0

        def apply(self, logits: Any) -> Any:
            self.step += 1
            spoil(logits, self.step)
            return logits

    BEFORE, AFTER = [Ban], [Sharpen]
