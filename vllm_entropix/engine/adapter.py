"""What the adapters of both model runners share: requests in, trace records out, the observer in between."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.logger import init_logger

from vllm_entropix.attention import AttentionObserver, UnsupportedAttentionError, find_attention_layers, select_layers
from vllm_entropix.attention.layouts import refuse_altered
from vllm_entropix.distribution.attention import AttentionStatistics
from vllm_entropix.engine.carrier import StepRecords, attach_to_step
from vllm_entropix.engine.clarification import clarification_places
from vllm_entropix.engine.forkable import BRANCH
from vllm_entropix.engine.pipeline import PipelineLink, of_all_stages
from vllm_entropix.kernels.backend import kernels_for
from vllm_entropix.kernels.ranks import RankGroup
from vllm_entropix.rows.batch import BatchSampler
from vllm_entropix.rows.forcing import ANYWHERE
from vllm_entropix.rows.rows import Rows
from vllm_entropix.rows.table import Composition, Sequence
from vllm_entropix.rows.undrawn import room
from vllm_entropix.samplers.observed import VLLM
from vllm_entropix.samplers.registry import is_off, parse_request, sampler_of
from vllm_entropix.samplers.request import GREEDY_BELOW

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

    from vllm_entropix.engine.resolved import Resolved

# Under vLLM's own logger, whose handlers are set up in every process.
logger = init_logger("vllm.plugins.entropix")


class RunnerAdapter(ABC):
    """Connects one model runner with the batch sampler and the attention observer.

    Args:
        runner: vLLM's model runner, its model loaded.
        vllm_config: the engine's configuration.
        resolved: our settings in it.
    """

    def __init__(self, runner: Any, vllm_config: VllmConfig, resolved: Resolved) -> None:
        self.runner = runner
        self.config = resolved.config
        self.vllm_config = vllm_config
        self.vocabulary = vllm_config.model_config.get_vocab_size()
        self.max_requests = vllm_config.scheduler_config.max_num_seqs
        self.device = runner.device
        pipeline = get_pp_group()
        # The last stage has the logits; the others only measure attention.
        self.samples = pipeline.is_last_rank
        # A sequence has a row per draft and one more.
        self.rows_per_request = 1 + vllm_config.num_speculative_tokens
        self.batch = BatchSampler(
            resolved.config,
            self.max_requests,
            resolved.clarification,
            self.device,
            self.rows_per_request - 1,
            resolved.counted,
            clarification_places(vllm_config, resolved.config) if self.samples and resolved.clarification else ANYWHERE,
        )
        self.observer: AttentionObserver | None = None
        self._reserved: AttentionObserver | None = None
        self._records: list[StepRecords] = []
        # Records that lack what is known after the draw, and whose they are.
        self._undrawn: list[tuple[Composition, Tensor]] = []
        self.link = PipelineLink(runner, self._concerned) if pipeline.world_size > 1 else None
        if self.samples:
            self.hook()
            self._leave_room()
            self._say_order()

    @abstractmethod
    def hook(self) -> None:
        """Put :meth:`transform` between the runner's logits and its draw."""

    def _leave_room(self) -> None:
        """Have vLLM measure what is kept of logits until the draw, beside what attention lends, with what its sampler takes."""
        original = self.runner._dummy_sampler_run

        def dummy_sampler_run(hidden_states: Tensor) -> Any:
            kept = room(len(hidden_states) * self.rows_per_request, self.vocabulary, self.device, self.batch.lent)
            result = original(hidden_states)
            del kept
            return result

        self.runner._dummy_sampler_run = dummy_sampler_run

    @abstractmethod
    def processors(self) -> tuple[list[Any], list[Any]]:
        """Logits processors, vLLM's own among them, that run before and after :meth:`transform`, in their order."""

    def others(self) -> tuple[list[Any], list[Any]]:
        """The same without vLLM's own and ours."""
        before, after = self.processors()
        return [one for one in before if _is_others(one)], [one for one in after if _is_others(one)]

    def _say_order(self) -> None:
        before, after = self.others()
        if (before or after) and get_tp_group().rank_in_group == 0:
            order = [*map(_name_of, before), "entropix", *map(_name_of, after)]
            logger.warning(
                "entropix: other logits processors run beside it, in this order: %s. Its metrics are those of what it is "
                "given, and what runs after it changes its distributions.",
                ", ".join(order),
            )

    def reserve(self) -> None:
        """Allocate what a GPU's steps need, before vLLM measures how much memory is left for keys."""
        if self.samples:
            self.batch.reserve(self.max_requests * self.rows_per_request, self.vocabulary)
        if not self.config.attention.enabled:
            return
        try:
            observer, _ = self._choose()
        except UnsupportedAttentionError:  # which is told when layers are observed
            return
        model = self.vllm_config.model_config
        observer.reserve(model.dtype, self.device, model.max_model_len)
        self._reserved = observer
        self._lend(observer)

    def _lend(self, observer: AttentionObserver | None) -> None:
        """Have rows kept until the draw where attention is measured, if it is once in a step: drafts may come in parts."""
        self.batch.lent = () if observer is None or self.rows_per_request > 1 else observer.idle_memory()

    def _choose(self) -> tuple[AttentionObserver, int]:
        """An observer of this stage's layers among those that the settings name, and how many all stages have."""
        found = find_attention_layers(self.runner.get_model())
        everywhere = {index: None for layers in of_all_stages(sorted(found)) for index in layers}
        chosen = select_layers({**everywhere, **found}, self.config)
        layers = {index: layer for index, layer in chosen.items() if index in found}
        return AttentionObserver(layers, self.config, self.max_requests, self.rows_per_request, _ranks()), len(chosen)

    def observe(self) -> None:
        """Attach the observer to the attention layers; says once why, if there is nothing to observe."""
        if not self.config.attention.enabled:
            return
        self._lend(None)
        if self.observer is not None:
            self.observer.detach()
            self.observer = None
        problem = None
        try:
            observer, number = self._choose()
            # The layers are the same, unless they were chosen anew since then.
            if self._reserved is not None and self._reserved.layers == observer.layers:
                observer = self._reserved
            self._refuse_what_attends_to_less(observer.layers)
            for index in observer.layers:
                observer._layer(index)  # refuses a cache that can't be read now rather than in the first step
        except UnsupportedAttentionError as reason:
            problem = str(reason)
        # What one stage can't measure, none does: the mean over fewer layers would be another number.
        problem = next((reason for reason in of_all_stages(problem) if reason is not None), None)
        self._reserved = None
        if problem is not None:
            if self.samples:
                logger.warning_once("entropix runs on the logits alone: %s.", problem)
            if self.link is not None:
                self.link.connect(None, 0)
            return
        observer.attach(self._builders())
        self.observer = observer
        self._lend(observer)
        if self.link is not None:
            self.link.connect(observer, number)

    def _refuse_what_attends_to_less(self, layers: Mapping[int, Any]) -> None:
        """Refuse layers whose rows attend to other positions than a layer's own window says."""
        if self.vllm_config.model_config.rswa_window is not None:
            raise UnsupportedAttentionError("the model slides its window over the answer alone (R-SWA)")
        names = {layer.layer_name for layer in layers.values()}
        for groups in self.runner.attn_groups:
            for group in groups:
                if names.intersection(group.layer_names):
                    refuse_altered(group.backend)

    def _builders(self) -> Iterator[tuple[Any, list[str]]]:
        for groups in self.runner.attn_groups:
            for group in groups:
                for builder in group.metadata_builders:
                    yield builder, list(group.layer_names)

    def warm_up(self) -> None:
        """Compile the CPU's kernels, or load them from disk, so that no request waits for it.

        A GPU's are compiled when vLLM's own warm-up runs requests (``vllm/v1/worker/gpu/warmup.py:218``); a CPU has none.
        """
        if kernels_for(self.device) != "numba":
            return
        from vllm_entropix.kernels.numba_.machine_code import kept_on_disk

        start = time.monotonic()
        if self.samples:
            self.batch.warm_up(self.vocabulary, get_tp_group().world_size)
        if self.observer is not None:
            self.observer.warm_up()
        kept = "" if kept_on_disk() else " No folder can keep them for the next start: set NUMBA_CACHE_DIR."
        logger.info("entropix: kernels are ready after %.1f s.%s", time.monotonic() - start, kept)

    def begin_step(self, scheduler_output: Any) -> None:
        """Take note of requests that begin or ended with this step, and neutralise vLLM's own parameters of ours.

        The request's parameters are copied before they are changed: in process they are the scheduler's own.
        """
        for request_id in scheduler_output.finished_req_ids:
            self.batch.remove(request_id)
        for request in scheduler_output.scheduled_new_reqs:
            if request.sampling_params is None:
                continue
            sequence = self._sequence(request.sampling_params, request.prompt_len)
            if sequence is None:
                self.batch.remove(request.req_id)
                continue
            self.batch.add(request.req_id, sequence)
            if self.samples and self._reads_text(sequence):
                self.keep_prompt(request)
            if sequence.sampled:
                neutral = request.sampling_params.clone()
                neutral.temperature, neutral.top_p, neutral.top_k, neutral.min_p = 1.0, 1.0, 0, 0.0
                request.sampling_params = neutral
        self.batch.begin_step()
        self._records, self._undrawn = [], []

    def _reads_text(self, sequence: Sequence) -> bool:
        name = sequence.sampler or self.batch.sequences.default
        numbers = dict(zip(self.batch.sequences.columns[name], sequence.constants, strict=True))
        return self.batch.samplers[name].reads_text(numbers)

    def keep_prompt(self, request: Any) -> None:  # noqa: B027  (Model Runner V2 keeps all tokens on the device)
        """Keep the prompt of a new request, vLLM's NewRequestData, whose sampler looks at the text."""

    def _sequence(self, params: SamplingParams, prompt_length: int) -> Sequence | None:
        """The settings of a request, or None if entropix has nothing to do with it."""
        if is_off(params.extra_args):
            return None
        settings = parse_request(params.extra_args, self.config)
        sampler = sampler_of(settings, self.config)
        # What nobody of ours draws is measured alone, where it is to be told of.
        sampled = sampler != VLLM and (params.temperature >= GREEDY_BELOW or self.batch.samplers[sampler].plans_greedy)
        traced = self.config.trace.default if settings.trace is None else settings.trace
        scored = settings.is_scored(self.config.scores.default)
        if not (sampled or traced or scored):
            return None
        top_k = params.top_k if params.top_k > 0 else self.vocabulary
        own = {"temperature": params.temperature, "top_p": params.top_p, "top_k": top_k, "min_p": params.min_p}
        branch = (params.extra_args or {}).get(BRANCH)
        branches = settings.forks_of(self.config.forks).branches
        remembers = self.batch.clarification is not None or (settings.chain is not None and settings.chain.remembers)
        return Sequence(
            constants=self.batch.samplers[sampler].numbers_of_request(settings, own),
            sampled=sampled,
            traced=traced,
            scored=scored,
            allow_clarification=settings.clarification is not False,
            # A branch's prompt holds what its answer shares with others.
            prompt_length=prompt_length if branch is None else branch["prompt_length"],
            sampler=sampler,
            base=(params.temperature, params.top_p, top_k, params.min_p),
            # Where nothing is remembered, nothing goes with the records.
            forks=branches > 1 and remembers,
            state=None if branch is None else branch.get("state"),
            # Its prompt ends with the token that it parts with, and the row before that one's drew another.
            parted=0 if branch is None else prompt_length - 2,
        )

    def after_forward(self) -> None:  # noqa: B027  (V1 needs nothing here)
        """Called between the model's run and the draw."""

    @abstractmethod
    def batch_of_step(self) -> tuple[list[str], np.ndarray]:
        """After the forward pass: the batch's request ids, and for which of them (bool) a token is drawn and kept."""

    def _concerned(self) -> tuple[int, Tensor]:
        request_ids, drawn = self.batch_of_step()
        slots = self.batch.sequences.slots_of(request_ids, len(request_ids))
        indices = np.flatnonzero(drawn & (slots > 0))
        return len(request_ids), torch.from_numpy(indices).to(self.device, non_blocking=True)

    def apply(self, logits: Tensor, rows: Rows) -> None:
        """Turn rows of the step's logits into final distributions, in place, and keep their trace records."""
        records = self.batch.apply(logits, rows, self.measure if self.observer is not None else None)
        if records is not None:
            self._undrawn.append((self.batch.sequences.composition(rows.host_slots), records))

    def drawn(self, token_ids: Tensor, number: Tensor | None = None) -> None:
        """Complete and send the records that wait for the step's tokens.

        Args:
            token_ids: integers ``[requests, tokens]``, of each request of the batch that the model ran.
            number: ``[requests]``, how many of them were drawn; None: one each.
        """
        self.batch.drawn(token_ids, number)
        for present, records in self._undrawn:
            states = self.batch.states(records[:, 0].long()) if present.any_forks else None
            self._records.append(StepRecords.from_device(present.requests, records, states))
        self._undrawn = []

    def measure(self, rows: Rows, wanted: Tensor) -> AttentionStatistics | None:
        """Attention statistics of the wanted rows, NaN for the others; None if no row wants them."""
        assert self.observer is not None
        # A GPU isn't asked: its kernels leave unwanted rows out by themselves.
        if self.batch.backend.asks_device and not wanted.any():
            return None
        measured_by = self.link or self.observer
        return replace(measured_by.statistics(rows.batch, rows.positions, wanted), measured=wanted)

    def with_records(self, output: Any) -> Any:
        """The runner's output with this step's trace records attached, once it is complete."""
        records, self._records = self._records, []
        return attach_to_step(output, records) if records and output is not None else output


def _ranks() -> RankGroup | None:
    """The tensor-parallel ranks that heads are split over; None if there is one."""
    group = get_tp_group()
    if group.world_size == 1:
        return None
    size, rank = group.world_size, group.rank_in_group

    def complete(everything: Tensor) -> None:
        # vLLM's own gathering allocates what it fills. Output and input may be one tensor, as NCCL has it.
        torch.distributed.all_gather_into_tensor(everything.view(-1), everything[rank], group=group.device_group)

    return RankGroup(size, rank, lambda share: group.all_gather(share, dim=0).view(size, -1), complete)


def _is_others(processor: Any) -> bool:
    """Is a logits processor neither vLLM's own nor ours?"""
    return type(processor).__module__.partition(".")[0] not in ("vllm", "vllm_entropix")


def _name_of(processor: Any) -> str:
    return f"{type(processor).__module__}.{type(processor).__qualname__}"
