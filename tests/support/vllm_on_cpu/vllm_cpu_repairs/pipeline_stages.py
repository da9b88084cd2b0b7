"""Pipeline stages on Model Runner V1."""

import os

import wrapt

SWITCH = "ENTROPIX_TEST_V1_PIPELINE"


def register():
    """Called by vLLM in every process."""
    if os.environ.get(SWITCH) == "1":
        wrapt.when_imported("vllm.v1.worker.cpu_model_runner")(make_buffer_after_loading)


def make_buffer_after_loading(cpu_model_runner):
    """Symptom: the first step of an eager engine dies with ``assert self.intermediate_tensors is not None``.

    A later stage receives into a buffer that V1 makes in its warm-up, and on a CPU an eager model isn't warmed up.
    """
    runner = cpu_model_runner.CPUModelRunner
    load_model = runner.load_model

    def load_model_and_make_buffer(self, *args, **kwargs):
        from vllm.distributed import get_pp_group

        load_model(self, *args, **kwargs)
        if not get_pp_group().is_first_rank:
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )

    runner.load_model = load_model_and_make_buffer
