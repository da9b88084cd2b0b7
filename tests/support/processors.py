"""Logits processors of another plugin, for the model runner in use. They change nothing; what counts is when they run."""

from typing import Any

from tests.support.runners import is_v2

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

    BEFORE, AFTER = [Ban], [Sharpen]
