"""Who may ask a vLLM server, and from when on."""

from __future__ import annotations

import json
import os
import secrets
from typing import Any


class Door:
    """ASGI middleware (vLLM's --middleware) in front of every path.

    A request without `Authorization: Bearer $VLLM_API_KEY` gets 401: vLLM's own check leaves out the paths that change
    weights and caches. Until a trainer has sent weights, completions get 503: a server begins with random ones, and one
    that was started again in the middle of a step would answer with them.
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        self._expected = f"Bearer {os.environ['VLLM_API_KEY']}".encode()
        self._has_weights = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes a request on, or answers it."""
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        if scope["type"] != "lifespan" and not secrets.compare_digest(given, self._expected):
            return await _refuse(send, 401, "it wants the key in VLLM_API_KEY")
        path = scope.get("path", "")
        if path.startswith("/v1/") and not self._has_weights:
            return await _refuse(send, 503, "no trainer has sent it weights since it was started")
        if path == "/reset_prefix_cache":  # the last request of a weight sync
            self._has_weights = True
        return await self.app(scope, receive, send)


async def _refuse(send: Any, status: int, reason: str) -> None:
    body = json.dumps({"error": {"message": reason}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
