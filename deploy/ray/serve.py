"""Serves a model sampled by entropix with Ray Serve LLM: autoscaled replicas behind one OpenAI-compatible address.

::

    serve run deploy.ray.serve:app                                   # the model that comes with the package
    serve run deploy.ray.serve:app model=meta-llama/Llama-3.1-8B-Instruct accelerator_type=H100 tensor_parallel_size=2
    serve run deploy/ray/serve.yaml

vllm-entropix has to be installed wherever a replica may run: in the image, or through ``runtime_env``.

Beside what Ray Serve LLM does, this cures what it gets wrong when a replica or its engine dies (seen with Ray 2.60):

- A stream whose replica was killed ended as if it were complete. Here the client is sent an error.
- A replica whose engine has died went on taking requests for up to a minute, for Ray's controller was blocked while it
  imported vLLM to unpickle the engine's error. Here the replica ends itself, which Ray handles within a second.
- Ray Serve LLM asks no client for a key. Here it does with ``api_key_file=...``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Json
from ray import cloudpickle
from ray.exceptions import RayActorError
from ray.llm._internal.serve.core.configs.openai_api_models import OpenAIHTTPException
from ray.llm._internal.serve.core.ingress.ingress import OpenAiIngress
from ray.serve import Application
from ray.serve.llm import LLMConfig, build_openai_app
from ray.serve.llm.deployment import LLMServer
from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from vllm_entropix.demo_model import shipped_model

# Replicas get the classes below with their definitions, so that no node but the one that deploys needs this file.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

logger = logging.getLogger("ray.serve")

DIED = "the replica that served this request has died; ask again"
# How often a replica looks whether its engine lives, and how long one without is kept so that errors reach their clients.
CHECK_SECONDS, GRACE_SECONDS = 0.25, 0.5


# `serve run` gives every value as text.
JsonObject = dict[str, Any] | Json[dict[str, Any]]


class Arguments(BaseModel):
    """What ``serve run`` takes as ``name=value``, and the YAML file under ``args``."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str = Field(default_factory=lambda: str(shipped_model()), description="Folder or Hugging Face name.")
    name: str = Field("entropix-demo", description="What clients call the model.")
    sampler_config: dict[str, Any] | str = Field(
        default_factory=dict, description="Settings of the sampler, or the name of a preset."
    )
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(1, ge=1)
    target_ongoing_requests: int = Field(32, ge=1, description="Of a replica, beyond which another one is started.")
    accelerator: Literal["gpu", "cpu"] = "gpu"
    accelerator_type: str | None = Field(None, description="As Ray knows it: H100, A10G ...; None takes any.")
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs of a replica; its workers share a placement group.")
    replica_cpus: float = Field(1, gt=0, description="CPUs that Ray reserves for a replica.")
    engine_kwargs: JsonObject = Field(default_factory=dict, description="Further arguments of vLLM's engine.")
    api_key_file: str | None = Field(
        None, description="File on every node with the key that clients have to send as a bearer token; None asks for none."
    )
    runtime_env: JsonObject = Field(
        default_factory=dict, description="Of replicas, for instance {pip: [vllm-entropix]} where the image doesn't have it."
    )


class Server(LLMServer):
    """A replica that doesn't outlive its engine."""

    async def start(self) -> None:
        """Start the engine, then watch it."""
        await super().start()
        self._watcher = asyncio.create_task(self._leave_with_engine())

    async def _leave_with_engine(self) -> None:
        engine = self.engine
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            try:
                await engine.check_health()
            except Exception:
                logger.exception("the engine of this replica has died; the replica ends itself")
                await asyncio.sleep(GRACE_SECONDS)
                os._exit(1)

    async def check_health(self) -> None:
        """Healthy or not, by an exception that Ray's controller can unpickle without importing vLLM."""
        try:
            await super().check_health()
        except Exception as error:
            raise RuntimeError(f"unhealthy: {type(error).__name__}: {error}") from None


class KeyRequired:
    """Middleware that answers requests without the key with 401, whatever they ask for."""

    def __init__(self, app: Any, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve a request of ASGI's."""
        if scope["type"] != "http" or scope["method"] == "OPTIONS" or self._admits(scope):
            await self._app(scope, receive, send)
        else:
            error = {"message": "a valid API key is needed, as a bearer token", "type": "AuthenticationError", "code": 401}
            await JSONResponse({"error": error}, status_code=401)(scope, receive, send)

    def _admits(self, scope: Any) -> bool:
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and secrets.compare_digest(given.encode(), self._key)


class Ingress(OpenAiIngress):
    """Tells clients when their replica has died, and serves only those that have the key, if there is one.

    Args:
        api_key_file: file of the key.
        given: what Ray Serve LLM gives its ingress.
    """

    def __init__(self, *given: Any, api_key_file: str | None = None, **more: Any) -> None:
        super().__init__(*given, **more)
        # The file's name is in the application's arguments, which Ray shows and logs; the key never is.
        self._key = None if api_key_file is None else Path(api_key_file).read_text().strip()
        if self._key == "":
            raise ValueError(f"api_key_file {api_key_file} is empty")

    def _set_asgi_app(self, app: Any) -> None:
        # Ray's hook for the replica's own copy of the FastAPI app, which it makes and adds no middleware of ours to.
        if self._key is not None:
            app.add_middleware(KeyRequired, key=self._key)
        super()._set_asgi_app(app)

    async def _get_response(self, *, body: Any, call_method: str, raw_request: Any = None) -> AsyncGenerator[Any, None]:
        streamed = bool(getattr(body, "stream", False))
        begun = complete = False
        try:
            async for response in super()._get_response(body=body, call_method=call_method, raw_request=raw_request):
                begun = True
                complete = _is_done(response)
                yield response
        except Exception as error:
            if not begun:
                if isinstance(error, RayActorError):
                    # Not tried again on another replica: a request that kills engines would kill them all.
                    raise OpenAIHTTPException(status_code=503, message=DIED, type="ReplicaDied") from error
                raise
            logger.warning("a stream ends in an error: %s", error)
        if streamed and begun and not complete:
            yield f"data: {json.dumps({'error': {'message': DIED, 'type': 'ReplicaDied', 'code': 503}})}\n\n"


def _is_done(response: Any) -> bool:
    last = response[-1] if isinstance(response, list) and response else response
    return isinstance(last, str) and last.strip().endswith("data: [DONE]")


def app(given: Arguments | dict[str, Any]) -> Application:
    """The application; ``serve run deploy.ray.serve:app name=value ...`` calls this with a mapping of what is given."""
    arguments = Arguments.model_validate(given)
    config = LLMConfig(
        model_loading_config={"model_id": arguments.name, "model_source": arguments.model},
        accelerator_type=arguments.accelerator_type,
        **({"accelerator_config": {"kind": "cpu"}} if arguments.accelerator == "cpu" else {}),
        server_cls=Server,
        deployment_config={
            "autoscaling_config": {
                "min_replicas": arguments.min_replicas,
                "max_replicas": arguments.max_replicas,
                "initial_replicas": max(1, arguments.min_replicas),
                "target_ongoing_requests": arguments.target_ongoing_requests,
            },
            "health_check_period_s": 2,
            "ray_actor_options": {"num_cpus": arguments.replica_cpus},
        },
        engine_kwargs={
            "tensor_parallel_size": arguments.tensor_parallel_size,
            # On a CPU vLLM would claim nearly all memory for each replica.
            **({"kv_cache_memory_bytes": 1 << 28} if arguments.accelerator == "cpu" else {}),
            **arguments.engine_kwargs,
            # Ray refuses arguments of the engine that it doesn't know, `sampler` among them.
            "additional_config": {
                **arguments.engine_kwargs.get("additional_config", {}),
                "entropix": arguments.sampler_config or True,
            },
        },
        runtime_env=arguments.runtime_env or None,
    )
    ingress = {"ingress_cls": Ingress, "ingress_extra_kwargs": {"api_key_file": arguments.api_key_file}}
    return build_openai_app({"llm_configs": [config], "ingress_cls_config": ingress})
