"""The command line of a vLLM server holds no secret, and the server gets the secret all
the same.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from threading import Event
from time import sleep
from typing import Any

import pytest
import torch

from megatron_real.config import Config, Given, RolloutConfig
from megatron_real.rollout.engines.engine import EngineFailed
from megatron_real.rollout.vllm_server import main as server_main
from megatron_real.rollout.vllm_server.engine import VllmServerEngine
from megatron_real.rollout.vllm_server.link import Link
from megatron_real.rollout.vllm_server.server import Server, command, environment

CANARY = "canary-5678"


def config(*, secret: bool) -> Config:
    given = {"rollout.vllm.hf_overrides.token": Given("${oc.env:TOKEN}", CANARY)}
    arguments = {"hf_overrides": {"token": CANARY}, "enforce_eager": True}
    return Config(
        rollout=RolloutConfig(engine="vllm-server", vllm=arguments), given=given if secret else {}
    )


def test_a_secret_argument_is_in_the_servers_environment_alone() -> None:
    words = command(config(secret=True), host="127.0.0.1", port=1)
    assert CANARY not in " ".join(words) and "--enforce-eager" in words
    assert words[:3] == [sys.executable, "-m", "megatron_real.rollout.vllm_server.main"]
    variables = environment(config(secret=True), "key", gpus=[])
    assert json.loads(variables[server_main.VARIABLE]) == [
        "--hf-overrides",
        json.dumps({"token": CANARY}),
    ]


def test_without_a_secret_the_command_line_is_whole() -> None:
    words = command(config(secret=False), host="127.0.0.1", port=1)
    assert words[2] == server_main.SERVER and CANARY in " ".join(words)
    assert server_main.VARIABLE not in environment(config(secret=False), "key", gpus=[])


def test_the_server_gets_the_arguments_of_command_line_and_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "seen.json"
    (tmp_path / "some_server.py").write_text(
        "import json, os, pathlib, sys\n"
        f"pathlib.Path({str(out)!r}).write_text(json.dumps([__name__, sys.argv[1:], "
        "dict(os.environ)]))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(server_main, "SERVER", "some_server")
    monkeypatch.setattr(sys, "argv", ["server_main", "--port", "1"])
    monkeypatch.setenv(server_main.VARIABLE, json.dumps(["--hf-token", CANARY]))
    server_main.main()
    name, words, variables = json.loads(out.read_text())

    assert (name, words) == ("__main__", ["--port", "1", "--hf-token", CANARY])
    assert server_main.VARIABLE not in variables


def test_a_server_that_dies_in_a_broadcast_does_not_end_the_sender(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The link is aborted as soon as the call fails, so NCCL's watchdog finds nothing to end the
    process for.
    """
    waits = Event()
    events: list[str] = []

    class BrokenLink(Link):
        def __init__(self) -> None:
            """It has no connection."""

        def send(self, flat: torch.Tensor) -> None:
            events.append("send")
            waits.wait(30)

        def abort(self) -> None:
            events.append("abort")
            waits.set()

    class DyingServer(Server):
        def call(self, method: str, argument: Any = None, *, timeout: float) -> list[Any]:
            while not events:
                sleep(0.001)
            raise EngineFailed("the server is gone")

    link = BrokenLink()
    engine = VllmServerEngine.__new__(VllmServerEngine)
    engine._config = Config()
    engine._link = link
    engine.server = DyingServer("http://127.0.0.1:1", "key")
    monkeypatch.setattr(engine, "_linked", lambda _seconds: link)

    with pytest.raises(EngineFailed, match="is gone"):
        engine._send(iter([("w", torch.zeros(4))]))
    assert events == ["send", "abort"]
    assert engine._link is None, "the next sync makes a new one"
