"""Every path of a server wants the key. vLLM's own check leaves out those that change weights and caches."""

from __future__ import annotations

import os
import secrets
from typing import Any


class EveryPathWantsTheKey:
    """ASGI middleware (vLLM's --middleware): a request without `Authorization: Bearer $VLLM_API_KEY` gets 401."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self._expected = f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes a request on if it has the key."""
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        if scope["type"] == "lifespan" or secrets.compare_digest(given, self._expected):
            await self.app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})
