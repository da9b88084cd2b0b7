"""An OpenAI endpoint that answers what a function says: for faults that a real server can't be made to have."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What a request asks → (status, body).
Answering = Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]


def chat(text: str, finish_reason: str = "stop", **choice: Any) -> tuple[int, dict[str, Any]]:
    """A chat completion."""
    message = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text}, **choice}
    usage = {"prompt_tokens": 5, "completion_tokens": len(text.split()), "total_tokens": 5 + len(text.split())}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "stub", "choices": [message], "usage": usage}
    return 200, body


def completion(text: str, **choice: Any) -> tuple[int, dict[str, Any]]:
    """A completion of a text."""
    usage = {"prompt_tokens": 5, "completion_tokens": len(text.split()), "total_tokens": 5 + len(text.split())}
    choices = [{"index": 0, "finish_reason": "stop", "text": text, "logprobs": None, **choice}]
    return 200, {"id": "x", "object": "text_completion", "created": 0, "model": "stub", "choices": choices, "usage": usage}


def refusal(status: int, message: str) -> tuple[int, dict[str, Any]]:
    """An error as OpenAI's servers tell it."""
    return status, {"error": {"message": message, "type": "error", "code": status}}


@contextlib.contextmanager
def endpoint(answering: Answering) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(base URL, bodies of all requests so far) of an endpoint on the loopback."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def _send(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self._send(200, {"object": "list", "data": [{"id": "stub", "object": "model", "created": 0, "owned_by": "us"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({"path": self.path, **body})
            self._send(*answering(body))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
