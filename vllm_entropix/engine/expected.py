"""What this package uses of vLLM: functions with the parameters that must be there, attributes of classes, names of modules.

``vllm_check.problems`` checks it before an engine starts. Whoever makes an adapter use something new writes it down here, and
tests/test_vllm_check.py fails until then.
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
        "RequestState.from_new_request": (
            "tokenizer",
            "request",
            "prompt",
            "parent_req",
            "request_index",
            "queue",
            "log_stats",
            "stream_interval",
        ),
        "RequestState.make_request_output": ("self", "new_token_ids", "finish_reason", "stop_reason", "kv_transfer_params"),
        "OutputProcessor.add_request": ("self", "request", "prompt", "parent_req", "request_index", "queue"),
        "OutputProcessor.process_outputs": ("self", "engine_core_outputs"),
        "OutputProcessor.abort_requests": ("self", "request_ids", "internal"),
    },
    "vllm.outputs": {
        "RequestOutput.add": ("self", "next_output"),
    },
    "vllm.v1.engine.input_processor": {
        "InputProcessor._validate_params": ("self", "params"),
    },
    "vllm.engine.arg_utils": {
        "EngineArgs.add_cli_args": ("parser",),
        "EngineArgs.create_engine_config": ("self",),
    },
    "vllm.triton_utils.dispatcher": {
        "_rebind_kernels": (),
    },
    "vllm.v1.sample.sampler": {
        "Sampler.sample": ("self", "logits", "sampling_metadata"),
        "Sampler.forward": ("self", "logits", "sampling_metadata"),
    },
    # The interface of Model Runner V2's logits processors.
    "vllm.v1.worker.gpu.sample.logits_processor.interface": {
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
    "vllm.entrypoints.openai.decisions.serving": {
        "OpenAIServingDecisions.create_decisions": ("self", "request", "raw_request"),
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

# Endpoints that came after the first version of vLLM in our range, which has no such module.
LATER = frozenset(
    {
        "vllm.entrypoints.generate.structured_decisions.serving",  # 0.32
        "vllm.entrypoints.openai.decisions.serving",  # 0.33
    }
)

# Module → names that are imported from it, or looked up in it.
NAMES: Mapping[str, tuple[str, ...]] = {
    "vllm": ("LLM", "SamplingParams"),
    "vllm.config": ("ModelConfig", "VllmConfig", "set_current_vllm_config"),
    "vllm.distributed.parallel_state": ("get_pp_group", "get_tp_group"),
    "vllm.engine.arg_utils": ("EngineArgs", "AsyncEngineArgs"),
    "vllm.entrypoints.anthropic.api_router": ("JSONResponse",),
    "vllm.entrypoints.openai.chat_completion.api_router": ("JSONResponse",),
    "vllm.entrypoints.openai.completion.api_router": ("JSONResponse",),
    "vllm.entrypoints.openai.responses.api_router": ("JSONResponse",),
    "vllm.entrypoints.scale_out.token_in_token_out.api_router": ("JSONResponse",),
    "vllm.envs": ("VLLM_USE_RUST_FRONTEND",),
    "vllm.exceptions": ("VLLMValidationError",),
    "vllm.logger": ("init_logger",),
    "vllm.outputs": ("CompletionOutput",),
    "vllm.sampling_params": ("RequestOutputKind", "SamplingParams"),
    "vllm.sequence": ("IntermediateTensors",),
    "vllm.tokenizers": ("cached_tokenizer_from_config",),
    "vllm.utils.argparse_utils": ("FlexibleArgumentParser",),
    "vllm.utils.platform_utils": ("is_uva_available",),
    "vllm.v1.attention.selector": ("get_attn_backend",),
    "vllm.v1.engine": ("FinishReason",),
    "vllm.v1.engine.async_llm": ("AsyncLLM",),
    "vllm.v1.engine.llm_engine": ("LLMEngine",),
    "vllm.v1.engine.output_processor": ("RequestState",),
    "vllm.v1.worker.gpu.buffer_utils": ("UvaBackedTensor", "UvaBuffer"),
    "vllm.v1.worker.gpu.sample.logits_processor": ("LogitsContext", "LogitsProcessor"),
}

# What branches of answers take to share blocks that are copied on write. Where it isn't there, the prefix cache does.
COPY_ON_WRITE: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "vllm.v1.core.kv_cache_manager": {
        "KVCacheManager": ("coordinator", "create_kv_cache_blocks", "get_computed_blocks", "take_kv_cache_block_copies"),
    },
    "vllm.v1.core.kv_cache_coordinator": {
        "KVCacheCoordinator": ("single_type_managers",),
    },
    "vllm.v1.core.single_type_kv_cache_manager": {
        "SingleTypeKVCacheManager": ("_apply_cow", "_has_partial_local_hit", "block_size", "req_to_blocks"),
        "FullAttentionManager": (),
    },
    "vllm.v1.core.kv_cache_utils": {
        "KVCacheBlock": ("is_null",),
    },
    "vllm.v1.core.sched.output": {
        "SchedulerOutput": ("kv_cache_block_copies",),
    },
    "vllm.v1.core.sched.scheduler": {
        "Scheduler": ("connector", "kv_cache_manager", "requests"),
    },
    "vllm.v1.request": {
        "Request": ("num_computed_tokens", "num_preemptions", "num_tokens", "request_id", "sampling_params"),
    },
}

# Module → class → attributes.
ATTRIBUTES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "vllm.config.vllm": {
        "VllmConfig": (
            "additional_config",
            "cache_config",
            "kv_transfer_config",
            "model_config",
            "num_speculative_tokens",
            "parallel_config",
            "scheduler_config",
            "speculative_config",
            "use_v2_model_runner",
            "watermark_config",
        ),
    },
    "vllm.config.cache": {
        "CacheConfig": ("cache_dtype", "enable_prefix_caching", "gpu_memory_utilization"),
    },
    "vllm.config.model": {
        "ModelConfig": (
            "architectures",
            "dtype",
            "enable_trace_replay",
            "get_head_size",
            "get_total_num_hidden_layers",
            "get_vocab_size",
            "is_attention_free",
            "is_diffusion",
            "logits_processors",
            "max_model_len",
            "model",
            "quantization",
            "revision",
            "rswa_window",
            "runner_type",
            "served_model_name",
            "skip_tokenizer_init",
            "tokenizer",
            "tokenizer_revision",
            "trust_remote_code",
            "try_get_generation_config",
            "use_mla",
        ),
    },
    "vllm.config.parallel": {
        "ParallelConfig": (
            "_api_process_count",
            "_api_process_rank",
            "data_parallel_size",
            "decode_context_parallel_size",
            "enable_batch_sharded_sampling",
            "enable_dbo",
            "prefill_context_parallel_size",
            "tensor_parallel_size",
            "ubatch_size",
            "worker_cls",
        ),
    },
    "vllm.config.scheduler": {
        "SchedulerConfig": ("async_scheduling", "get_scheduler_cls", "max_num_seqs", "scheduler_cls"),
    },
    "vllm.config.speculative": {
        "SpeculativeConfig": ("rejection_sample_method",),
    },
    "vllm.distributed.parallel_state": {
        "GroupCoordinator": ("all_gather", "cpu_group", "device_group", "is_last_rank", "rank_in_group", "world_size"),
    },
    "vllm.engine.arg_utils": {
        "EngineArgs": ("additional_config", "disable_log_stats"),
    },
    "vllm.logger": {
        "_VllmLogger": ("warning_once",),
    },
    "vllm.entrypoints.generate.base.serving": {
        "GenerateBaseServing": ("_with_kv_transfer_rejection_cleanup", "engine_client"),
    },
    "vllm.entrypoints.serve.engine.serving": {
        "BaseServing": ("create_error_response",),
    },
    "vllm.entrypoints.llm": {
        "LLM": ("llm_engine",),
    },
    "vllm.v1.engine.llm_engine": {
        "LLMEngine": (
            "add_request",
            "engine_core",
            "get_tokenizer",
            "has_unfinished_requests",
            "output_processor",
            "step",
            "vllm_config",
        ),
    },
    "vllm.v1.engine.async_llm": {
        "AsyncLLM": ("engine_core", "output_processor", "vllm_config"),
    },
    "vllm.v1.engine.core_client": {
        "EngineCoreClient": ("add_request", "add_request_async"),
        "DPLBAsyncMPClient": ("reqs_in_flight",),
        "MPClient": ("core_engines",),
    },
    "vllm.outputs": {
        "CompletionOutput": ("finish_reason", "index", "stop_reason", "token_ids"),
        "RequestOutput": ("finished", "num_cached_tokens", "outputs"),
    },
    "vllm.sampling_params": {
        "RequestOutputKind": ("DELTA", "FINAL_ONLY"),
        "SamplingParams": (
            "clone",
            "eos_token_id",
            "extra_args",
            "logprobs",
            "max_tokens",
            "min_p",
            "n",
            "output_kind",
            "seed",
            "stop_token_ids",
            "temperature",
            "top_k",
            "top_p",
        ),
    },
    "vllm.sequence": {
        "IntermediateTensors": ("tensors", "items"),
    },
    "vllm.v1.core.sched.scheduler": {
        "Scheduler": ("requests", "vllm_config"),
    },
    "vllm.v1.request": {
        "Request": ("sampling_params",),
    },
    "vllm.v1.core.sched.output": {
        "SchedulerOutput": ("finished_req_ids", "scheduled_new_reqs", "total_num_scheduled_tokens"),
        "NewRequestData": ("req_id", "sampling_params", "prompt_len", "prompt_token_ids"),
    },
    "vllm.v1.engine": {
        "EngineCoreOutput": ("request_id", "new_token_ids", "kv_transfer_params"),
        "EngineCoreOutputs": ("outputs",),
        "EngineCoreRequest": (
            "data_parallel_rank",
            "external_req_id",
            "mm_features",
            "prompt_embeds",
            "prompt_token_ids",
            "request_id",
            "resumable",
            "sampling_params",
        ),
        "FinishReason": ("ERROR", "LENGTH", "STOP"),
    },
    "vllm.v1.engine.detokenizer": {
        "IncrementalDetokenizer": ("num_output_tokens", "output_token_ids", "update"),
        "BaseIncrementalDetokenizer": ("stop",),
        "FastIncrementalDetokenizer": ("tokenizer",),
    },
    "vllm.v1.engine.input_processor": {
        "InputProcessor": ("vllm_config",),
    },
    "vllm.v1.engine.output_processor": {
        "OutputProcessor": ("_finish_request", "request_states", "stream_interval", "tokenizer"),
        "OutputProcessorOutput": ("reqs_to_abort", "request_outputs"),
        "RequestOutputCollector": ("put",),
        "RequestState": (
            "detokenizer",
            "external_req_id",
            "num_cached_tokens",
            "output_kind",
            "parent_req",
            "prompt",
            "prompt_token_ids",
            "request_index",
            "stats",
        ),
    },
    "vllm.v1.executor.ray_executor_v2": {
        "RayExecutorV2": ("_init_executor",),
    },
    "vllm.v1.outputs": {
        "AsyncModelRunnerOutput": ("get_output",),
    },
    "vllm.v1.worker.worker_base": {
        "WorkerBase": ("model_runner", "rank", "vllm_config"),
    },
    "vllm.v1.worker.utils": {
        "AttentionGroup": ("backend", "layer_names", "metadata_builders"),
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
        "AttentionBackend": ("get_name",),
        "AttentionMetadataBuilder": ("build", "update_block_table"),
    },
    "vllm.v1.attention.backends.cpu_attn": {
        "CPUAttentionBackendImpl": ("alibi_slopes", "forward", "logits_soft_cap", "scale", "sinks"),
        "CPUAttentionMetadataBuilder": ("isa",),  # which it gives its layers
    },
    "vllm.v1.attention.backends.flash_attn": {
        "FlashAttentionImpl": ("alibi_slopes", "forward", "logits_soft_cap", "scale", "sinks"),
    },
    "vllm.v1.attention.backends.triton_attn": {
        "TritonAttentionImpl": ("alibi_slopes", "chunk_lookback", "forward", "logits_soft_cap", "scale", "sinks"),
    },
    "vllm.model_executor.layers.attention.attention": {
        "Attention": (
            "impl",
            "kv_cache",
            "attn_backend",
            "attn_type",
            "kv_cache_dtype",
            "layer_name",
            "sliding_window",
            "use_alibi_sqrt",
            "num_heads",
            "head_size",
            "query_quant",
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
            "_dummy_sampler_run",
        ),
    },
    "vllm.v1.worker.gpu_input_batch": {
        "InputBatch": ("generators", "logitsprocs", "num_reqs", "num_tokens_no_spec", "req_ids"),
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
            "sample",
            "_dummy_sampler_run",
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
    "vllm.v1.worker.gpu.sample.output": {
        "SamplerOutput": ("sampled_token_ids",),
    },
    "vllm.v1.worker.gpu.states": {
        "RequestState": ("all_token_ids", "index_to_req_id", "prefill_len"),
    },
    "vllm.v1.worker.gpu.buffer_utils": {
        "StagedWriteTensor": ("gpu",),
        "UvaBackedTensor": ("np", "gpu", "copy_to_uva"),
        "UvaBuffer": ("uva",),
    },
    "vllm.v1.worker.gpu.sample.sampler": {
        "Sampler": ("logits_processors", "apply_sampling_params"),
    },
    "vllm.v1.worker.gpu.sample.logits_processor.interface": {
        "LogitsContext": (
            "expanded_idx_mapping",
            "expanded_local_pos",
            "idx_mapping_np",
            "input_ids",
            "pos",
            "seq_lens_upper_bound_np",
        ),
    },
}

MODULES = frozenset({*FUNCTIONS, *FUNCTIONS_OF_SERVERS, *NAMES, *ATTRIBUTES})
