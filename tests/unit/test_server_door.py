"""Which requests a vLLM server answers: the door by itself, the proofs of both sides over a real
socket, and vLLM's own table of routes.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from megatron_real.config import Config, RolloutConfig
from megatron_real.rollout.engines.engine import EngineFailed
from megatron_real.rollout.vllm_server.door import WORKER_CALLS, Door
from megatron_real.rollout.vllm_server.proof import ANSWER, KeyClaim, answer_proof
from megatron_real.rollout.vllm_server.server import (
    KeyRefused,
    Server,
    environment,
    wait_until_healthy,
)

KEY = "the-key-of-this-run"
Answer = list[dict[str, Any]]


async def app(scope: Any, receive: Any, send: Any) -> None:
    """What lies behind the door: says what it was asked, in two parts."""
    body = (await receive())["body"]
    header = dict(scope["headers"])[b"authorization"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": header + b" ", "more_body": True})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> Door:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    return Door(app)


def ask(
    door: Any, path: str, *, header: str = "", body: bytes = b"", verb: str = "POST", **scope: Any
) -> Answer:
    """Returns the answer to a request."""
    sent: Answer = []

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"authorization", header.encode("latin-1"))] if header else []
    request = {"type": "http", "method": verb, "path": path, "headers": headers}
    asyncio.run(door({**request, "query_string": b"", **scope}, receive, send))
    return sent


def status(answer: Answer) -> int:
    return int(answer[0]["status"])


def claim(path: str, body: bytes, *, key: str = KEY, number: str = "n1", verb: str = "POST") -> str:
    return KeyClaim.of(key, number, verb, path, body).header


def test_a_signed_request_is_answered_with_a_signature(door: Door) -> None:
    start, content = ask(door, "/health", header=claim("/health", b"x"), body=b"x")
    assert content["body"] == f"Bearer {KEY} x".encode(), "vLLM's own check gets what it wants"
    assert dict(start["headers"])[ANSWER.lower().encode()].decode() == answer_proof(
        KEY, "n1", 200, content["body"]
    )


def test_a_signature_does_not_cover_an_added_query(door: Door) -> None:
    """Whoever sits in between could add one: /reset_prefix_cache takes settings from its query."""
    header = claim("/reset_prefix_cache", b"")
    path = "/reset_prefix_cache"
    assert status(ask(door, path, header=header, query_string=b"reset_external=true")) == 401
    assert status(ask(door, path, header=header)) == 200, "the refused one has not used it up"


def test_a_request_with_the_key_is_answered(door: Door) -> None:
    start, *_ = ask(door, "/health", header=f"Bearer {KEY}")
    assert start["status"] == 200 and not start["headers"]


HEADERS = {
    "none": "",
    "another key": "Bearer other",
    "a part of the key": f"Bearer {KEY[:-1]}",
    "the key without its scheme": KEY,
    "a claim of another key": claim("/collective_rpc", b"{}", key="other"),
    "a claim for another path": claim("/health", b"{}"),
    "a claim for another verb": claim("/collective_rpc", b"{}", verb="GET"),
    "a claim for another body": claim("/collective_rpc", b"{ }"),
    "half a claim": "Proof n1 00",
    "junk": "Proof \xff \xfe \xfd",
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_request_without_the_key_is_refused(door: Door, case: str) -> None:
    assert status(ask(door, "/collective_rpc", header=HEADERS[case], body=b"{}")) == 401


def test_a_request_that_changes_something_is_accepted_once(door: Door) -> None:
    """Whoever overhears a request cannot send it again; a completion may be requested twice,
    because it changes nothing.
    """
    again = claim("/reset_prefix_cache", b"")
    assert [status(ask(door, "/reset_prefix_cache", header=again)) for _ in range(2)] == [200, 401]
    again = claim("/v1/completions", b"")
    assert [status(ask(door, "/v1/completions", header=again)) for _ in range(2)] == [200, 200]


CALLS = {
    "a call of ours": ({"method": "describe", "args": []}, 200),
    "with a text": ({"method": "join_link", "args": ["{}"]}, 200),
    "another method of the worker": ({"method": "load_model", "args": []}, 403),
    "of Python itself": ({"method": "__reduce__"}, 403),
    "two arguments": ({"method": "describe", "args": ["a", "b"]}, 403),
    "another kind of argument": ({"method": "describe", "args": [{"a": 1}]}, 403),
    "named arguments": ({"method": "describe", "kwargs": {"a": 1}}, 403),
    "no method": ({}, 403),
    "a list": ([1], 403),
    "a method that is a list": ({"method": ["describe"]}, 403),
}


@pytest.mark.parametrize("case", CALLS)
def test_only_listed_methods_of_the_worker_can_be_called(door: Door, case: str) -> None:
    """The list holds for a request with the key too."""
    call, expected = CALLS[case]
    answer = ask(door, "/collective_rpc", header=f"Bearer {KEY}", body=json.dumps(call).encode())
    assert status(answer) == expected


def test_a_body_that_is_no_json_calls_nothing(door: Door) -> None:
    assert status(ask(door, "/collective_rpc", header=f"Bearer {KEY}", body=b"\x80\x04")) == 403


def test_a_websocket_without_the_key_is_refused(door: Door) -> None:
    (answer,) = ask(door, "/v1/realtime", type="websocket")
    assert answer["type"] == "websocket.close" and answer["code"] == 1008


class Impostor(BaseHTTPRequestHandler):
    """Answers everything with 200, as a server would, and keeps what it was sent."""

    heard: list[str]

    def do_GET(self) -> None:
        self.heard.append(str(self.headers))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def impostor() -> Iterator[str]:
    """Returns the address of an impostor that listens on the port of a server."""
    Impostor.heard = []
    server = HTTPServer(("127.0.0.1", 0), Impostor)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_an_impostor_on_the_port_is_not_believed_and_learns_nothing(impostor: str) -> None:
    with pytest.raises(KeyRefused, match="does not know the key"):
        wait_until_healthy(Server(impostor, KEY), 60.0, lambda _: None)
    (heard,) = Impostor.heard
    assert KEY not in heard and "Proof" in heard


def test_a_process_of_ours_is_asked_before_its_port(impostor: str) -> None:
    with pytest.raises(EngineFailed, match="it ended and said"):
        wait_until_healthy(
            Server(impostor, KEY), 60.0, lambda _: None, ended=lambda: "it ended and said 'no'"
        )
    assert Impostor.heard == []


def test_a_server_does_not_inherit_secrets_or_unsafe_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    monkeypatch.setenv("WANDB_API_KEY", "canary")
    monkeypatch.setenv("HF_TOKEN", "canary")
    variables = environment(Config(), KEY, gpus=[])
    assert variables["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "0"
    assert "canary" not in variables.values() and variables["VLLM_API_KEY"] == KEY


def test_addresses_may_be_encrypted() -> None:
    rollout = RolloutConfig(engine="vllm-server", servers=("https://gpu1:8000",))
    (address,) = Config(rollout=rollout).rollout.servers
    assert type(Server(address, KEY)._connection(1.0)).__name__ == "HTTPSConnection"


needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)


@needs_vllm
@pytest.mark.filterwarnings("ignore")
def test_every_route_of_vllm_is_closed_without_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is vLLM's own, of the server that a run starts, so it contains routes that a later
    version adds.
    """
    for name, value in environment(Config(), KEY, gpus=[]).items():
        monkeypatch.setenv(name, value)
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from megatron_real.rollout.vllm_server.server import command

    words = command(Config(), host="127.0.0.1", port=1)[3:]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    vllm = build_app(args, ("generate",))
    routes = [(route.path, getattr(route, "methods", None)) for route in vllm.routes]
    paths = {path for path, _ in routes}

    assert {"/health", "/collective_rpc", "/v1/completions", "/reset_prefix_cache"} <= paths
    assert len(paths) > 15

    for path, verbs in routes:
        for verb in verbs or ("GET",):
            for header in ("", "Bearer other"):
                assert status(ask(vllm, path, header=header, verb=verb, **ASGI)) == 401, path
        # As a websocket, whether the route is one or not.
        answer = ask(vllm, path, **{**ASGI, "type": "websocket", "scheme": "ws"})
        assert answer[0]["type"] == "websocket.close", path


ASGI: dict[str, Any] = {
    "http_version": "1.1", "scheme": "http", "root_path": "", "client": ("127.0.0.1", 1),
    "server": ("127.0.0.1", 1), "extensions": {},
}  # fmt: skip


@needs_vllm
def test_the_listed_methods_exist_on_the_worker() -> None:
    from megatron_real.rollout.vllm_server.worker import Worker

    own = {name for name in vars(Worker) if not name.startswith("_")} - {"load_model"}
    assert sorted(own) == list(WORKER_CALLS)
