"""One vLLM server: how it is started and ended, and how it is asked.

vLLM's own OpenAI server, with our worker (server_worker.py) and our check of the key (server_door.py). The key is in
the environment of both sides alone: never in a command line, a file, a log or a request (server_proof.py).
"""

from __future__ import annotations

import atexit
import hmac
import http.client
import json
import os
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from megatron_real.config import Config
from megatron_real.cpu import device
from megatron_real.rollout import server_main
from megatron_real.rollout.engine import EngineFailed
from megatron_real.rollout.server_proof import ANSWER, Claim, answer_proof
from megatron_real.rollout.vllm_engine import ENVIRONMENT, engine_arguments

_SAY_EVERY_SECONDS = 10.0
_POLL_SECONDS = 0.5
_STOP_SECONDS = 15.0
_NOT_FOR_SERVERS = {
    *(
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    ),  # the trainer's world
    "TORCHELASTIC_USE_AGENT_STORE",
    "VLLM_CPU_KVCACHE_SPACE",  # it would override the configuration
}
_SECRETS = ("_KEY", "_TOKEN", "_SECRET", "_PASSWORD", "_CREDENTIALS")
"""Ends of the names of variables that are other services' secrets: a server has no use for them."""


class KeyRefused(EngineFailed):
    """Somebody serves at the address, but not us, or is not who it should be."""


class Server:
    """A server that runs somewhere, asked over HTTP.

    Example:
        server = Server("http://127.0.0.1:8000", key)
        (worker,) = server.call("describe", timeout=60)
    """

    def __init__(self, url: str, key: str) -> None:
        self.url, self._key = url, key
        parts = urlsplit(url)
        assert parts.hostname is not None and parts.port is not None, (
            "the configuration checks the addresses"
        )
        self.address = parts.hostname, parts.port
        self._encrypted = parts.scheme == "https"
        self._open: set[http.client.HTTPConnection] = set()

    def post(self, path: str, body: Mapping[str, Any] | None = None, *, timeout: float) -> Any:
        """The answer's JSON.

        Raises:
            EngineFailed: there is none, or it is an error.
        """
        return json.loads(self._ask("POST", path, json.dumps(body or {}), timeout) or "{}")

    def call(self, method: str, argument: Any = None, *, timeout: float) -> list[Any]:
        """[workers] what a method of our worker returns; raises as `post`."""
        arguments = [] if argument is None else [json.dumps(argument)]
        answer = self.post(
            "/collective_rpc", {"method": method, "args": arguments}, timeout=timeout
        )
        return list(answer["results"])

    def healthy(self) -> bool:
        """Whether it serves.

        Raises:
            KeyRefused: it does, but does not take the key, or does not know it.
        """
        try:
            self._ask("GET", "/health", None, timeout=10.0)
        except KeyRefused:
            raise
        except EngineFailed:
            return False
        return True

    def cancel(self) -> None:
        """Breaks off every request that is under way; vLLM stops computing what nobody waits for."""
        for connection in list(self._open):
            with suppress(AttributeError, OSError):  # it has no socket yet, or none any more
                connection.sock.shutdown(socket.SHUT_RDWR)

    def _ask(self, verb: str, path: str, text: str | None, timeout: float) -> str:
        body = (text or "").encode()
        claim = Claim.of(self._key, secrets.token_hex(16), verb, path, body)
        headers = {"Authorization": claim.header, "Content-Type": "application/json"}
        connection = self._connection(timeout)
        self._open.add(connection)
        try:
            connection.request(verb, path, body or None, headers)
            answer = connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            reason = (
                f"no answer in {timeout:g} s" if isinstance(error, TimeoutError) else repr(error)
            )
            raise EngineFailed(f"the vLLM server {self.url} failed: {reason}") from error
        finally:
            self._open.discard(connection)
            connection.close()

        shown = answer.headers.get(ANSWER, "")
        expected = answer_proof(self._key, claim.number, answer.status, content)
        is_proven = hmac.compare_digest(shown.encode(), expected.encode())
        if answer.status == 401:
            raise KeyRefused(
                f"the vLLM server {self.url} does not take the key in VLLM_API_KEY; set it as the server has it"
            )
        if answer.status == 200 and not is_proven:
            raise KeyRefused(
                f"who answers at {self.url} does not know the key in VLLM_API_KEY: it is not this run's "
                "server, or it was started by another version of this project; see which process listens there"
            )
        content_text = content.decode(errors="replace")
        if answer.status != 200:
            raise EngineFailed(
                f"the vLLM server {self.url} answered {path} with {answer.status}: {_message(content_text)}"
            )
        return content_text

    def _connection(self, timeout: float) -> http.client.HTTPConnection:
        if self._encrypted:
            return http.client.HTTPSConnection(
                *self.address, timeout=timeout, context=ssl.create_default_context()
            )
        return http.client.HTTPConnection(*self.address, timeout=timeout)


class ServerProcess:
    """A server that this process starts, and that ends with it."""

    def __init__(self, config: Config, *, number: int, key: str) -> None:
        """Starts it and does not wait; its output goes to servers/server-NUMBER.log in the run directory."""
        self._config, self._number, self._key = config, number, key
        run_dir = Path(config.trainer.run_dir or ".")
        self.log = run_dir / "servers" / f"server-{number}.log"
        self.start()
        atexit.register(self.stop)

    def start(self) -> None:
        """Starts it, anew if it has ended, at the same place in the run but on another port."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        host, port = self._config.rollout.server_host, _free_port(self._config.rollout.server_host)
        guard = [sys.executable, str(Path(__file__).with_name("server_guard.py"))]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*guard, *command(self._config, host=host, port=port)],
                stdin=subprocess.PIPE,  # the guard ends the server when this pipe closes, however this process ends
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(self._config, self._key, gpus=self._gpus()),
                start_new_session=True,
            )
        self.server = Server(f"http://{host}:{port}", self._key)

    @property
    def pid(self) -> int:
        """Of the process group's leader."""
        return self._process.pid

    def ended(self) -> bool:
        """Whether it has."""
        return self._process.poll() is not None

    def stop(self) -> None:
        """Ends it, and waits until its memory is free."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_SECONDS)
        with suppress(ProcessLookupError):  # whoever is left, also where the guard alone was killed
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def wait(self, say: Callable[[str], None]) -> None:
        """Waits until it serves.

        Raises:
            EngineFailed: it ended, or was not ready in rollout.server_start_seconds.
        """
        wait_until_healthy(
            self.server,
            self._config.rollout.server_start_seconds,
            say,
            ended=lambda: self.ended() and self._last_words(),
        )

    def _last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [
            "nothing"
        ]
        return f"it ended and said {lines[-1]!r}; all of it is in {self.log}"

    def _gpus(self) -> list[str]:
        """Those after the training processes' own, on this machine; none on a CPU."""
        if device().type == "cpu":
            return []
        tp, own = self._config.rollout.tp, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        first = own + int(os.environ.get("LOCAL_RANK", "0")) * tp
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        if first + tp > len(gpus):
            raise ValueError(
                f"vLLM server {self._number} wants the GPUs {first} to {first + tp - 1}, after those of the {own} "
                f"training processes of this machine, which has {len(gpus)}; start fewer processes or servers, or "
                "start servers elsewhere and give their addresses (rollout.servers)"
            )
        return gpus[first : first + tp]


def wait_until_healthy(
    server: Server,
    seconds: float,
    say: Callable[[str], None],
    *,
    ended: Callable[[], str | bool] = lambda: "",
) -> None:
    """Waits until a server serves, and says every ten seconds that it does.

    Args:
        ended: why waiting is in vain, if it is.

    Raises:
        EngineFailed: in vain, or too long.
    """
    began = said = time.monotonic()
    # The own process first: where it has ended, whoever answers at its port now is somebody else.
    while (why := ended()) or not server.healthy():
        now = time.monotonic()
        if not why and now - began > seconds:
            why = f"it is not ready after {seconds:g} s (rollout.server_start_seconds)"
        if why:
            raise EngineFailed(f"the vLLM server {server.url} does not serve: {why}")
        if now - said >= _SAY_EVERY_SECONDS:
            say(f"waiting for the vLLM server {server.url}: {now - began:.0f} s")
            said = now
        time.sleep(_POLL_SECONDS)


def command(config: Config, *, host: str, port: int) -> list[str]:
    """The command line of a server that takes its weights from the trainer; no key and no secret is in it."""
    ours = {
        "host": host,
        "port": port,
        "worker_cls": "megatron_real.rollout.server_worker.Worker",
        "middleware": "megatron_real.rollout.server_door.Door",
        "disable_uvicorn_access_log": True,
    }
    secret = _secret_arguments(config)
    words = []
    for name, value in {**engine_arguments(config), **ours}.items():
        words += [] if name in secret else _words(name, value)
    module = server_main.__name__ if secret else server_main.SERVER
    return [sys.executable, "-m", module, *words]


def environment(config: Config, key: str, *, gpus: list[str]) -> dict[str, str]:
    """What a server's process needs, and nothing of the trainer's own world."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _NOT_FOR_SERVERS and not name.endswith(_SECRETS)
    }
    package = str(Path(__file__).parents[2])
    secret_words = []
    for name in sorted(_secret_arguments(config)):
        secret_words += _words(name, config.rollout.vllm[name])
    return {
        **kept,
        **ENVIRONMENT,
        **({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}),
        **({server_main.VARIABLE: json.dumps(secret_words)} if secret_words else {}),
        "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")])),
        "VLLM_API_KEY": key,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # on a CPU, no third process beside the server's and the engine's
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "0",  # it would unpickle what a request brings
        "VLLM_SERVER_DEV_MODE": "1",  # the paths that change weights; they want the key as all others do
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    }


def _secret_arguments(config: Config) -> set[str]:
    """Arguments in rollout.vllm with a value, at any depth, that was given as an interpolation: a secret, perhaps."""
    prefix = "rollout.vllm."
    return {
        path.removeprefix(prefix).split(".")[0] for path in config.given if path.startswith(prefix)
    }


def _words(name: str, value: Any) -> list[str]:
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [option if value else f"--no-{option[2:]}"]
    return [option, value if isinstance(value, str) else json.dumps(value)]


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _message(text: str) -> str:
    """The sentence in an error of vLLM's, or the beginning of the text."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:300]
