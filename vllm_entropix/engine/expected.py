"""What the adapters use of vLLM: functions with the parameters that must be there, and attributes of classes.

``compat.problems`` checks it before an engine starts. Whoever makes an adapter use something new writes it down here.
"""

from __future__ import annotations

from collections.abc import Mapping

# Module → function → parameters.
Functions = Mapping[str, Mapping[str, tuple[str, ...]]]

FUNCTIONS: Functions = {
    "vllm.utils.argparse_utils": {
        "FlexibleArgumentParser.load_config_file": ("self", "file_path"),
    },
    "vllm.v1.worker.gpu_worker": {
        "Worker.load_model": ("self",),
        "Worker.initialize_from_config": ("self", "kv_cache_config"),
        "Worker.compile_or_warm_up_model": ("self",),
        "Worker.execute_model": ("self", "scheduler_output"),
        "Worker.sample_tokens": ("self", "grammar_output"),
    },
    "vllm.v1.core.sched.scheduler": {
        "Scheduler.update_from_output": ("self", "scheduler_output", "model_runner_output"),
    },
    "vllm.v1.engine.output_processor": {
        "RequestState.make_request_output": ("self", "new_token_ids", "finish_reason", "kv_transfer_params"),
    },
    "vllm.outputs": {
        "RequestOutput.add": ("self", "next_output"),
    },
    "vllm.v1.engine.input_processor": {
        "InputProcessor._validate_params": ("self", "params"),
    },
    "vllm.v1.sample.sampler": {
        "Sampler.sample": ("self", "logits", "sampling_metadata"),
        "Sampler.forward": ("self", "logits", "sampling_metadata"),
    },
    # The interface of Model Runner V2's logits processors.
    "vllm.v1.worker.gpu.sample.logits_processor.interface": {
        "LogitsProcessor.__init__": ("self", "vllm_config", "req_states"),
        "LogitsProcessor.add_request": ("self", "req_idx", "sampling_params"),
        "LogitsProcessor.apply_staged_writes": ("self",),
        "LogitsProcessor.apply": ("self", "logits", "ctx"),
    },
}

# The same for servers: looked at only where vLLM's server is loaded.
FUNCTIONS_OF_SERVERS: Functions = {
    "vllm.entrypoints.openai.completion.serving": {
        "OpenAIServingCompletion.create_completion": ("self", "request", "raw_request"),
    },
    "vllm.entrypoints.openai.chat_completion.serving": {
        "OpenAIServingChat.create_chat_completion": ("self", "request", "raw_request"),
    },
    "vllm.entrypoints.openai.chat_completion.batch_serving": {
        "OpenAIServingChatBatch.create_batch_chat_completion": ("self", "request", "raw_request"),
    },
    "vllm.entrypoints.openai.responses.serving": {
        "OpenAIServingResponses.create_responses": ("self", "request", "raw_request"),
    },
    "vllm.entrypoints.anthropic.serving": {
        "AnthropicServingMessages.create_messages": ("self", "request", "raw_request"),
    },
    "vllm.entrypoints.scale_out.token_in_token_out.serving": {
        "ServingTokens.serve_tokens": ("self", "request", "raw_request"),
    },
    "vllm.entrypoints.speech_to_text.transcription.serving": {
        "OpenAIServingTranscription.create_transcription": ("self", "request", "raw_request"),
    },
    "vllm.entrypoints.speech_to_text.translation.serving": {
        "OpenAIServingTranslation.create_translation": ("self", "request", "raw_request"),
    },
    "vllm.entrypoints.speech_to_text.base.serving": {
        "SpeechToTextBaseServing._detect_language": ("self", "request_id"),
    },
    "vllm.entrypoints.generate.generative_scoring.serving": {
        "ServingGenerativeScoring.create_generative_scoring": ("self", "request", "raw_request"),
    },
    "vllm.entrypoints.generate.structured_decisions.serving": {
        "ServingStructuredDecisions.create_decision": ("self", "request", "raw_request"),
    },
    "vllm.entrypoints.generate.beam_search.online": {
        "BeamSearchOnlineMixin.beam_search": ("self", "params"),
    },
    "vllm.entrypoints.generate.beam_search.offline": {
        "BeamSearchOfflineMixin.beam_search": ("self", "params"),
    },
    "vllm.v1.engine.async_llm": {
        "AsyncLLM.generate": ("self", "sampling_params", "request_id"),
    },
}

# Module → class → attributes.
ATTRIBUTES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "vllm.config.parallel": {
        "ParallelConfig": ("worker_cls", "_api_process_count", "_api_process_rank"),
    },
    "vllm.sequence": {
        "IntermediateTensors": ("tensors", "items"),
    },
    "vllm.v1.core.sched.output": {
        "SchedulerOutput": ("finished_req_ids", "scheduled_new_reqs", "total_num_scheduled_tokens"),
        "NewRequestData": ("req_id", "sampling_params", "prompt_len"),
    },
    "vllm.v1.engine": {
        "EngineCoreOutput": ("request_id", "new_token_ids", "kv_transfer_params"),
    },
    "vllm.v1.outputs": {
        "AsyncModelRunnerOutput": ("get_output",),
    },
    "vllm.v1.worker.utils": {
        "AttentionGroup": ("layer_names", "metadata_builders"),
    },
    "vllm.v1.attention.backend": {
        "CommonAttentionMetadata": (
            "query_start_loc",
            "seq_lens",
            "seq_lens_cpu_upper_bound",
            "max_seq_len",
            "block_table_tensor",
            "num_reqs",
        ),
        "AttentionMetadataBuilder": ("build", "update_block_table"),
    },
    "vllm.model_executor.layers.attention.attention": {
        "Attention": (
            "impl",
            "kv_cache",
            "attn_backend",
            "attn_type",
            "layer_name",
            "sliding_window",
            "num_heads",
            "head_size",
        ),
    },
    "vllm.v1.worker.gpu_model_runner": {  # V1
        "GPUModelRunner": (
            "device",
            "sampler",
            "input_batch",
            "input_ids",
            "positions",
            "query_start_loc",
            "discard_request_mask",
            "attn_groups",
            "get_model",
            "execute_model",
            "sync_and_gather_intermediate_tensors",
        ),
    },
    "vllm.v1.worker.gpu_input_batch": {
        "InputBatch": ("req_ids", "num_reqs", "logitsprocs", "logitsprocs_need_output_token_ids"),
    },
    "vllm.v1.sample.logits_processor.state": {
        "LogitsProcessors": ("argmax_invariant", "non_argmax_invariant"),
    },
    "vllm.v1.worker.gpu.model_runner": {  # V2
        "GPUModelRunner": (
            "device",
            "sampler",
            "req_states",
            "execute_model_state",
            "attn_groups",
            "get_model",
            "execute_model",
        ),
        "ExecuteModelState": ("input_batch",),
    },
    "vllm.v1.worker.gpu.input_batch": {
        "InputBatch": (
            "idx_mapping",
            "req_ids",
            "num_reqs",
            "num_computed_tokens_np",
            "num_scheduled_tokens",
            "prefill_len_np",
        ),
    },
    "vllm.v1.worker.gpu.states": {
        "RequestState": ("index_to_req_id", "prefill_len"),
    },
    "vllm.v1.worker.gpu.buffer_utils": {
        "UvaBackedTensor": ("np", "gpu", "copy_to_uva"),
    },
    "vllm.v1.worker.gpu.sample.sampler": {
        "Sampler": ("logits_processors", "apply_sampling_params"),
    },
    "vllm.v1.worker.gpu.sample.logits_processor.interface": {
        "LogitsContext": ("expanded_idx_mapping", "idx_mapping_np", "expanded_local_pos", "input_ids", "pos"),
        "LogitsProcRequestState": ("max_num_reqs", "prefill_len"),
    },
}
