"""Every patch of vLLM: why, how, what would make it unnecessary.

A patch wraps one function and passes everything through by ``*args, **kwargs``. What it installs is imported when the patched
module is, so that loading this plugin imports nothing.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

from vllm_entropix._version import __version__
from vllm_entropix.engine.patching import Patch, Wrap
from vllm_entropix.engine.switch import DISABLE, disabled


def _wrap_add_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_cli_args(parser: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_entropix.engine.arguments import add_arguments

        return add_arguments(original(parser, *args, **kwargs))

    return add_cli_args


def _wrap_load_config_file(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_config_file(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_entropix.engine.arguments import mark_as_of_file

        return mark_as_of_file(original(self, *args, **kwargs))

    return load_config_file


def _wrap_init(original: Callable[..., Any]) -> Callable[..., Any]:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.keys() & {"sampler", "sampler_config"}:
            from vllm_entropix.engine.arguments import merge_keywords

            kwargs = merge_keywords(kwargs)
        original(self, *args, **kwargs)

    return init


_SWITCHED_OFF = (
    f"The additional config asks for the sampler entropix, but {DISABLE} is set, so vLLM samples as it does without the "
    "plugin; unset the variable, or leave entropix out."
)


def _wrap_create_engine_config(original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm.logger import init_logger

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config = original(self, *args, **kwargs)
        additional = self.additional_config
        # Also keys that are only like ours, which are refused.
        if isinstance(additional, dict) and any(isinstance(key, str) and "entropix" in key.lower() for key in additional):
            if disabled():
                if additional.get("entropix") not in (None, False):
                    init_logger("vllm.plugins.entropix").warning_once(_SWITCHED_OFF)
                return vllm_config
            from vllm_entropix.engine.finalise import finalise

            return finalise(vllm_config, additional, statistics=not self.disable_log_stats)
        return vllm_config

    return create_engine_config


def _wrap_make_request_output(original: Callable[..., Any]) -> Callable[..., Any]:
    names = list(inspect.signature(original).parameters)[1:]

    def make_request_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_entropix.engine.frontend import receive_records

        # By hand: this runs for every sequence in every step, and Signature.bind takes longer than all else here.
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        return receive_records(self, arguments, lambda: original(self, **arguments))

    return make_request_output


def _wrap_validate_params(original: Callable[..., Any]) -> Callable[..., Any]:
    def validate_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_entropix.engine.admission import admit

        return admit(self, lambda: original(self, *args, **kwargs), args[0] if args else kwargs.get("params"))

    return validate_params


def _wrap_add(original: Callable[..., Any]) -> Callable[..., Any]:
    def add(self: Any, next_output: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_entropix.engine.frontend import merge_traces

        return merge_traces(self, next_output, lambda: original(self, next_output, *args, **kwargs))

    return add


def _wrap_internal(original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm_entropix.engine.internal import wrap_internal

    return wrap_internal(original)


def _wrap_generate(original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm_entropix.engine.http import wrap_generate

    return wrap_generate(original)


def _wrap_frontend(original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm_entropix.engine.resolved import resolved_values

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if resolved_values(self.vllm_config) is not None:
            from vllm_entropix.engine.forks import let_fork

            let_fork(self)

    return init


def _wrap_handler(**endpoint: Any) -> Wrap:
    def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
        from vllm_entropix.engine.http import Endpoint, wrap_handler

        return wrap_handler(original, Endpoint(**endpoint))

    return wrapped


def _wrap_json_response(original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm_entropix.engine.answers import wrap_json_response

    return wrap_json_response(original)


def _wrap_init_executor(original: Callable[..., Any]) -> Callable[..., Any]:
    def init_executor(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        except Exception as error:
            if "No module named 'vllm_entropix'" not in str(error):
                raise
            # The text of Ray's errors says where they were raised; not all of their classes have it as an attribute.
            place = re.search(r"\bip=([0-9a-fA-F.:]+)", str(error))
            node = f"Ray node {place.group(1)}" if place else "a Ray node"
            raise RuntimeError(
                f"vllm-entropix isn't installed on {node}, where a worker of this engine was started; install "
                f"version {__version__} on every node, or add it to the runtime_env"
            ) from error

    return init_executor


def _wrap_rebind_kernels(original: Callable[..., Any]) -> Callable[..., Any]:
    def rebind_kernels(*args: Any, **kwargs: Any) -> Any:
        hidden = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "llvmlite"}
        for name in hidden:
            del sys.modules[name]
        try:
            return original(*args, **kwargs)
        finally:
            sys.modules.update(hidden)

    return rebind_kernels


# Module, class and method of what serves an endpoint, and what the endpoint has for us (see ``http.Endpoint``).
_HANDLERS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("openai.completion.serving", "OpenAIServingCompletion", "create_completion", {}),
    ("openai.chat_completion.serving", "OpenAIServingChat", "create_chat_completion", {}),
    ("openai.chat_completion.batch_serving", "OpenAIServingChatBatch", "create_batch_chat_completion", {}),
    ("openai.responses.serving", "OpenAIServingResponses", "create_responses", {"has_choices": False}),
    ("anthropic.serving", "AnthropicServingMessages", "create_messages", {"has_choices": False}),
    ("scale_out.token_in_token_out.serving", "ServingTokens", "serve_tokens", {"place": "sampling_params.extra_args"}),
    ("speech_to_text.transcription.serving", "OpenAIServingTranscription", "create_transcription", {"carries_traces": False}),
    ("speech_to_text.translation.serving", "OpenAIServingTranslation", "create_translation", {"carries_traces": False}),
    ("generate.generative_scoring.serving", "ServingGenerativeScoring", "create_generative_scoring", {"place": None}),
    ("generate.structured_decisions.serving", "ServingStructuredDecisions", "create_decision", {"place": None}),
    ("openai.decisions.serving", "OpenAIServingDecisions", "create_decisions", {"place": None}),  # 0.33
)

PATCHES = (
    Patch(
        module="vllm.engine.arg_utils",
        owners=("EngineArgs",),
        attribute="add_cli_args",
        wrap=_wrap_add_cli_args,
        why="A plugin can't add options to vLLM's command line.",
        how="Adds --sampler and --sampler-config, which end in --additional-config when arguments are parsed, so that API "
        "server processes, which are started with the parsed arguments, get them too.",
        upstream="none known",
        remove_when="general plugins can register command-line options",
    ),
    Patch(
        module="vllm.utils.argparse_utils",
        owners=("FlexibleArgumentParser",),
        attribute="load_config_file",
        wrap=_wrap_load_config_file,
        why="What stands in the file of --config becomes part of the command line, so an option can't tell which of the two it "
        "came from, and `--sampler vllm` couldn't overrule a file with settings of entropix.",
        how="Marks the values of --sampler and --sampler-config in the file as the file's.",
        upstream="none known",
        remove_when="parsed options say where they came from",
    ),
    Patch(
        module="vllm.engine.arg_utils",
        owners=("EngineArgs", "AsyncEngineArgs"),
        attribute="__init__",
        wrap=_wrap_init,
        why="LLM(...) passes unknown keywords to a dataclass, which refuses them.",
        how="Moves the keywords sampler and sampler_config into additional_config.",
        upstream="none known",
        remove_when="LLM accepts keywords for plugins; additional_config={'entropix': ...} needs no patch",
    ),
    Patch(
        module="vllm.engine.arg_utils",
        owners=("EngineArgs",),
        attribute="create_engine_config",
        wrap=_wrap_create_engine_config,
        why="Every frontend makes its configuration here, and errors elsewhere look like hangs.",
        how="If additional_config asks for entropix: checks that all features in use are supported, then sets the official "
        "fields worker_cls and scheduler_cls. Where the plugin is switched off: says so.",
        upstream="none known",
        remove_when="plugins may finalise VllmConfig",
    ),
    Patch(
        module="vllm.v1.engine.input_processor",
        owners=("InputProcessor",),
        attribute="_validate_params",
        wrap=_wrap_validate_params,
        why="A bad per-request setting is a ValueError in Python. A plugin can refuse it by a logits processor alone, of which "
        "vLLM turns what it raises into a VLLMValidationError, which is none, and allows none with return_sampling_mask.",
        how="Raises an error that is both, so HTTP still answers 400. Counts admitted requests by preset.",
        upstream="none known",
        remove_when="plugins may validate requests",
    ),
    Patch(
        module="vllm.v1.engine.output_processor",
        owners=("RequestState",),
        attribute="make_request_output",
        wrap=_wrap_make_request_output,
        why="EngineCoreOutput has no field for a plugin's per-token data, and what it carries isn't collected over steps.",
        how="Takes our bytes out of kv_transfer_params, collects them per sequence and hangs them on each CompletionOutput.",
        upstream="none known",
        remove_when="engine outputs carry plugin data to RequestOutput",
    ),
    Patch(
        module="vllm.outputs",
        owners=("RequestOutput",),
        attribute="add",
        wrap=_wrap_add,
        why="Where the engine is ahead of whoever reads a stream, outputs are joined field by field; a plugin's are lost.",
        how="Joins the traces of completions that are joined.",
        upstream="none known",
        remove_when="engine outputs carry plugin data to RequestOutput",
    ),
    *(
        Patch(
            module=f"vllm.v1.engine.{module}",
            owners=(owner,),
            attribute="__init__",
            wrap=_wrap_frontend,
            why="No class of a frontend can be named in the configuration, as that of a scheduler can.",
            how="If the engine runs entropix: extends the object that makes outputs, so that an answer may come from several "
            "requests of the engine.",
            upstream="none known",
            remove_when="the class of the output processor can be configured",
        )
        for module, owner in (("llm_engine", "LLMEngine"), ("async_llm", "AsyncLLM"))
    ),
    *(
        Patch(
            module=f"vllm.entrypoints.{module}",
            owners=(owner,),
            attribute=attribute,
            wrap=_wrap_handler(**endpoint),
            why="vLLM drops fields of a request that it doesn't know, may tell of wrong settings when a stream has begun, and "
            "makes responses of fixed fields.",
            how="Answers 400 to settings of ours that are wrong or that nobody would read. For a request with entropix_trace, "
            "puts the traces into what is answered. All others get vLLM's own bytes.",
            upstream="none known",
            remove_when="plugins may check requests, and responses carry what a plugin hangs on RequestOutput",
        )
        for module, owner, attribute, endpoint in _HANDLERS
    ),
    Patch(
        module="vllm.v1.engine.async_llm",
        owners=("AsyncLLM",),
        attribute="generate",
        wrap=_wrap_generate,
        why="Endpoints make their responses of outputs in ways of their own.",
        how="While a request with entropix_trace is handled, notes the outputs as they pass.",
        upstream="none known",
        remove_when="responses carry what a plugin hangs on RequestOutput",
    ),
    *(
        Patch(
            module=f"vllm.entrypoints.{folder}.api_router",
            owners=(),
            attribute="JSONResponse",
            wrap=_wrap_json_response,
            why="The event loop makes JSON of a whole response at once and serves nobody meanwhile.",
            how="For an answer with traces, makes their JSON in a thread and sends it between vLLM's own bytes.",
            upstream="none known",
            remove_when="vLLM makes large responses off its event loop",
        )
        for folder in (
            "openai.completion",
            "openai.chat_completion",
            "openai.responses",
            "anthropic",
            "scale_out.token_in_token_out",
        )
    ),
    *(
        Patch(
            module=f"vllm.entrypoints.{module}",
            owners=(owner,),
            attribute=attribute,
            wrap=_wrap_internal,
            why="vLLM makes requests of its own, reads their log-probabilities or one token, and nobody can opt them out.",
            how="Notes that the requests made meanwhile are vLLM's own, which entropix leaves alone.",
            upstream="none known",
            remove_when="a request says that it is internal",
        )
        for module, owner, attribute in (
            ("generate.beam_search.offline", "BeamSearchOfflineMixin", "beam_search"),
            ("generate.beam_search.online", "BeamSearchOnlineMixin", "beam_search"),
            ("speech_to_text.base.serving", "SpeechToTextBaseServing", "_detect_language"),
        )
    ),
    Patch(
        module="vllm.v1.executor.ray_executor_v2",
        owners=("RayExecutorV2",),
        attribute="_init_executor",
        wrap=_wrap_init_executor,
        why="On a Ray node without this package the worker's class can't be imported, and nothing of ours can say so there.",
        how="If that is why the workers didn't start: raises an error that names the node and the cure.",
        upstream="none known",
        remove_when="vLLM names the node whose worker failed to start",
        package="ray",
    ),
    Patch(
        module="vllm.triton_utils.dispatcher",
        owners=(),
        attribute="_rebind_kernels",
        wrap=_wrap_rebind_kernels,
        why="On a CPU vLLM looks through the namespaces of all modules when an engine starts, and dies on an object of "
        "llvmlite whose __dict__ is no dictionary. Our CPU kernels import numba, hence llvmlite, so a second engine in a "
        "process would fail.",
        how="Hides llvmlite's modules, which refer to no kernel of vLLM's, while it looks.",
        upstream="none known; seen in 0.32.0",
        remove_when="the scan skips objects whose vars() isn't a dictionary",
    ),
)


def install(only: str | None = None) -> None:
    """Apply all patches, or the one of this name; harmless when done before."""
    for patch in PATCHES:
        if only in (None, patch.name):
            patch.install()
