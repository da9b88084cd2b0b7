"""What is added to vLLM's worker: attaches sampler and observer, and lets the runner's adapter see each step."""

from __future__ import annotations

from typing import Any

import torch

from vllm_entropix.engine.adapter import RunnerAdapter
from vllm_entropix.engine.resolved import Resolved


class EntropixWorkerMixin:
    """Mixed in front of any of vLLM's workers (see ``subclasses``)."""

    _entropix: RunnerAdapter | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        worker: Any = self
        self._entropix_resolved = Resolved.from_config(worker.vllm_config, f"worker {worker.rank}")

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, then put entropix between its logits and vLLM's draw."""
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        worker: Any = self
        runner = worker.model_runner
        adapter: type[RunnerAdapter]
        if worker.vllm_config.use_v2_model_runner:
            from vllm_entropix.engine.runner_v2 import RunnerV2

            adapter = RunnerV2
        else:
            from vllm_entropix.engine.runner_v1 import RunnerV1

            adapter = RunnerV1
        self._entropix = adapter(runner, worker.vllm_config, self._entropix_resolved)
        self._entropix.reserve()

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> Any:
        """Set the caches up, then observe the attention layers that use them."""
        result = super().initialize_from_config(*args, **kwargs)  # type: ignore[misc]
        if self._entropix is not None:
            self._entropix.observe()
        return result

    def compile_or_warm_up_model(self, *args: Any, **kwargs: Any) -> Any:
        """Warm the engine up, and the kernels of entropix with it."""
        result = super().compile_or_warm_up_model(*args, **kwargs)  # type: ignore[misc]
        if self._entropix is not None:
            with torch.inference_mode():
                self._entropix.warm_up()
        return result

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run the model on a step whose new and ended requests were noted."""
        adapter = self._entropix
        if adapter is None:
            return super().execute_model(scheduler_output)  # type: ignore[misc]
        with torch.inference_mode():
            adapter.begin_step(scheduler_output)
            output = super().execute_model(scheduler_output)  # type: ignore[misc]
            adapter.after_forward()
        return output

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Draw the step's tokens and send their trace records along."""
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        if self._entropix is None or not self._entropix.samples:
            return output
        return self._entropix.with_records(output)
