"""Attention statistics of layers on earlier pipeline stages: measured there, and sent on with the step's hidden states.

An earlier stage can't know a row's regime, so it measures every row that entropix may sample. The message is an extra entry of
the IntermediateTensors that vLLM sends from stage to stage: it arrives with the step it belongs to, or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.parallel_state import get_pp_group
from vllm.sequence import IntermediateTensors

from vllm_entropix.attention import AttentionObserver
from vllm_entropix.attention.stages import StageStatistics, mean_over_stages
from vllm_entropix.distribution.attention import AttentionStatistics

KEY = "entropix_attention"


def of_all_stages(value: Any) -> list[Any]:
    """The value that each pipeline stage passes, in the order of the stages. All of them have to call this."""
    group = get_pp_group()
    values: list[Any] = [None] * group.world_size
    if group.world_size == 1:
        return [value]
    torch.distributed.all_gather_object(values, value, group=group.cpu_group)
    return values


class PipelineLink:
    """Takes statistics from the stage before and passes them on, together with this stage's.

    Args:
        runner: the model runner; its ``execute_model`` is wrapped.
        concerned: after a forward pass, the number of requests in the batch and the indices in it, int64 on the device, of
            those that entropix samples or traces in this step.
    """

    def __init__(self, runner: Any, concerned: Callable[[], tuple[int, Tensor]]) -> None:
        self._concerned = concerned
        self._received: StageStatistics | None = None
        self._observer: AttentionObserver | None = None
        self._layers = 0
        self._wrap_runner(runner)

    def connect(self, observer: AttentionObserver | None, layers: int) -> None:
        """Measure with this observer from now on; ``layers`` are observed on all stages together."""
        self._observer, self._layers = observer, layers

    def statistics(self, requests: Tensor, positions: Tensor, wanted: Tensor) -> AttentionStatistics:
        """The mean over the observed layers of all stages, for rows as in ``AttentionObserver.statistics``."""
        assert self._observer is not None
        here = len(self._observer.layers)
        if here == self._layers:
            return self._observer.statistics(requests, positions, wanted)
        own = self._observer.statistics_per_layer(requests, positions, wanted) if here else None
        earlier = torch.full((4, len(requests)), torch.nan, device=requests.device)
        if self._received is not None:
            earlier = self._received.sums(requests, positions)
        return mean_over_stages(earlier, own, self._layers)

    def _wrap_runner(self, runner: Any) -> None:
        original = runner.execute_model

        def execute_model(
            scheduler_output: Any, intermediate_tensors: Any = None, *args: Any, dummy_run: bool = False, **kwargs: Any
        ) -> Any:
            self._received = None
            if dummy_run:
                return original(scheduler_output, intermediate_tensors, *args, dummy_run=True, **kwargs)
            output = original(scheduler_output, intermediate_tensors, *args, **kwargs)
            if intermediate_tensors is not None and KEY in intermediate_tensors.tensors:
                self._received = StageStatistics(intermediate_tensors.tensors[KEY])
            if isinstance(output, IntermediateTensors):
                sent = self._to_next_stage()
                if sent is not None:
                    # A new object: this one may be the buffer of a CUDA graph.
                    return IntermediateTensors({**output.tensors, KEY: sent.values})
            return output

        runner.execute_model = execute_model
        gather = getattr(runner, "sync_and_gather_intermediate_tensors", None)
        if gather is None:
            return

        def without_ours(number: int, received: Any, *args: Any, **kwargs: Any) -> Any:
            # Model Runner V1 has a buffer for each entry it knows, and looks one up for each it gets.
            if received is not None and KEY in received.tensors:
                received = IntermediateTensors({name: value for name, value in received.items() if name != KEY})
            return gather(number, received, *args, **kwargs)

        runner.sync_and_gather_intermediate_tensors = without_ours

    def _to_next_stage(self) -> StageStatistics | None:
        if self._observer is None or not self._observer.layers:
            return self._received
        requests, index = self._concerned()
        if not len(index):
            return None
        positions = self._observer.last_positions(index)
        rows = index.repeat_interleave(positions.shape[1])
        per_layer = self._observer.statistics_per_layer(rows, positions.flatten().clamp_min(0))
        return StageStatistics.of_rows(requests, index, positions, per_layer).add(self._received)
