"""Which requests a vLLM server answers, to whom, and from when on."""

from __future__ import annotations

import json
import os
import secrets
from typing import Any

from megatron_real.rollout.vllm_server.proof import ANSWER, KeyClaim, answer_proof

WORKER_CALLS = (
    "checksums",
    "describe",
    "join_link",
    "link_name",
    "pack_weights",
    "receive_bucket",
)
"""The worker's methods that a request can call by their name (/collective_rpc).

vLLM itself would call any method of the worker.
"""
_ASK_AGAIN = "/v1/"
"""Below this path the same request may come twice: it costs time and changes nothing."""
_POLICY_VIOLATION = 1008
"""WebSocket's close code of a server that refuses a client (RFC 6455, 7.4.1)."""


class Door:
    """ASGI middleware (vLLM's --middleware) in front of every path.

    Without the key in VLLM_API_KEY nothing is answered: vLLM's own check leaves out the paths that
    change weights and caches. The trainer proves that it knows the key (proof.py), and so
    does the answer; people may send the key itself as `Authorization: Bearer KEY`. Until a trainer
    has sent weights, completions get 503: a server begins with random weights, and one that was
    started again in the middle of a step would answer with them.
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        self._key = os.environ["VLLM_API_KEY"]
        self._bearer = f"Bearer {self._key}".encode()
        self._has_weights = False
        self._numbers: set[str] = set()
        """Numbers of the requests that were answered and may not come twice."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes a request on, or answers it."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)

        # ASGI gives names in lower case and everything as bytes; latin-1 decodes any byte.
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        claim = KeyClaim.parse(given.decode("latin-1"))
        if not self._knows_the_key(scope, given, claim):
            return await _refuse(scope, send, 401, "it wants the key in VLLM_API_KEY")
        if scope["type"] == "websocket":
            return await self.app(scope, receive, send)

        path = scope.get("path", "")
        if claim is not None:
            send = _proving(send, self._key, claim.number)
        if path.startswith("/v1/") and not self._has_weights:
            reason = "no trainer has sent it weights since it was started"
            return await _refuse(scope, send, 503, reason)

        # Read here, since a claim covers its digest; vLLM gets it once more below.
        parts = []
        more_follows = True
        while more_follows:
            message = await receive()
            parts.append(message.get("body", b""))
            more_follows = message.get("more_body", False)
        body = b"".join(parts)

        if claim is not None and not claim.covers(body):
            return await _refuse(scope, send, 401, "its body is another than was proven")
        if path == "/collective_rpc" and not _is_known_call(body):
            reason = f"the worker can be asked {', '.join(WORKER_CALLS)} alone"
            return await _refuse(scope, send, 403, reason)

        if path == "/reset_prefix_cache":  # the last request of a weight sync
            self._has_weights = True
        # vLLM's own check wants the key itself.
        others = [(name, value) for name, value in scope["headers"] if name != b"authorization"]
        scope = {**scope, "headers": [*others, (b"authorization", self._bearer)]}
        await self.app(scope, _again(body, receive), send)

    def _knows_the_key(self, scope: Any, given: bytes, claim: KeyClaim | None) -> bool:
        """Tells whether a request may be answered: its sender knows the key, and it is no replay.

        Args:
            scope: the request.
            given: its Authorization header.
            claim: the claim in this header, if it has one.
        """
        if claim is None:
            # In constant time: a comparison that ends at the first difference tells how far a guess
            # was right.
            return secrets.compare_digest(given, self._bearer)

        path = scope.get("path", "")
        if scope.get("query_string"):  # a claim does not cover it, and the trainer sends none
            return False
        if not claim.is_right(self._key, scope.get("method", ""), path):
            return False
        if path.startswith(_ASK_AGAIN):
            return True

        # A replay of a weight sync would set the weights back. Nothing is awaited between the look
        # and the note, so no copy of the request comes in between.
        is_new = claim.number not in self._numbers
        self._numbers.add(claim.number)
        return is_new


def _is_known_call(body: bytes) -> bool:
    """Tells whether a body calls one of WORKER_CALLS, with one text or no argument."""
    try:
        call = json.loads(body)
    except ValueError:
        return False

    if not isinstance(call, dict) or not set(call) <= {"method", "args"}:
        return False

    arguments = call.get("args", [])
    if not isinstance(arguments, list) or len(arguments) > 1:
        return False
    if not all(isinstance(argument, str) for argument in arguments):
        return False

    return call.get("method") in WORKER_CALLS


def _proving(send: Any, key: str, number: str) -> Any:
    """Returns a `send` that holds an answer back until it is whole, and adds its proof."""
    start: dict[str, Any] = {}
    parts: list[bytes] = []

    async def prove(message: Any) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
            return
        parts.append(message.get("body", b""))
        if message.get("more_body"):
            return

        body = b"".join(parts)
        proof = answer_proof(key, number, start["status"], body).encode()
        # The body stays as it is, and so does the answer's content-length.
        headers = [*start.get("headers", ()), (ANSWER.lower().encode(), proof)]
        await send({**start, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return prove


def _again(body: bytes, receive: Any) -> Any:
    """Returns a `receive` that gives the body once more.

    Then it gives whatever else comes: the end of the connection.
    """
    given = False

    async def give() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return give


async def _refuse(scope: Any, send: Any, status: int, reason: str) -> None:
    """Answers a request with an error, or closes a WebSocket."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": reason})
        return
    body = json.dumps({"error": {"message": reason}}).encode()
    length = str(len(body)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", length)]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
