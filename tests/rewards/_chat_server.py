"""A local server that speaks ``/v1/chat/completions``, as vLLM and its kin do."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

Reply = str | None | tuple[int, bytes]


@dataclass(frozen=True)
class Request:
    path: str
    token: str | None
    body: dict[str, Any]

    @property
    def messages(self) -> list[dict[str, Any]]:
        return self.body["messages"]

    @property
    def question(self) -> str:
        """The text of the first message."""
        return next(part["text"] for part in self.messages[0]["content"] if part["type"] == "text")

    @property
    def image(self) -> np.ndarray:
        """The picture of the first message, which must be an RGB PNG in a data URL."""
        part = next(part for part in self.messages[0]["content"] if part["type"] == "image_url")
        head, _, data = part["image_url"]["url"].partition(",")
        assert head == "data:image/png;base64"
        picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        return np.asarray(picture)


class ChatServer:
    """Answers each request on a thread of its own with ``answer(request)``: a message, or a status and raw bytes."""

    def __init__(self, answer: Callable[[Request], Reply]) -> None:
        self.requests: list[Request] = []
        self.models: tuple[int, bytes] = (404, b"")  # the answer to GET /v1/models
        chat, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                request = Request(self.path, self.headers.get("Authorization"), body)
                with lock:
                    chat.requests.append(request)
                reply = answer(request)
                self.send(*(reply if isinstance(reply, tuple) else (200, completion(reply))))

            def do_GET(self) -> None:
                self.send(*chat.models)

            def send(self, status: int, data: bytes) -> None:
                with contextlib.suppress(ConnectionError):
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing on stderr."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)


def completion(content: str | None, end: str = "stop") -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": end}
    return json.dumps({"object": "chat.completion", "choices": [choice]}).encode()
