"""One vLLM server: how it is started and ended, and how requests are made.

It is vLLM's own OpenAI server, with our worker (worker.py) and our check of the key
(door.py). The key is in the environment of both sides alone: never in a command line, a
file, a log or a request (proof.py).
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
from megatron_real.parallel.cpu import device
from megatron_real.rollout.engines.engine import EngineFailed
from megatron_real.rollout.engines.vllm import ENVIRONMENT, engine_arguments
from megatron_real.rollout.vllm_server import main as server_main
from megatron_real.rollout.vllm_server.proof import ANSWER, KeyClaim, answer_proof

_SAY_EVERY_SECONDS = 10.0
_POLL_SECONDS = 0.5
_STOP_SECONDS = 15.0
_NOT_FOR_SERVERS = {
    # The trainer's world.
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_USE_AGENT_STORE",
    # It would override the configuration.
    "VLLM_CPU_KVCACHE_SPACE",
}
_SECRETS = ("_KEY", "_TOKEN", "_SECRET", "_PASSWORD", "_CREDENTIALS")
"""Ends of the names of variables that hold other services' secrets, which no server needs."""


class KeyRefused(EngineFailed):
    """What answers at the address does not take our key, or does not know it."""


class Server:
    """A server that runs somewhere, asked over HTTP.

    Example:
        server = Server("http://127.0.0.1:8000", key)
        (worker,) = server.call("describe", timeout=60)
    """

    def __init__(self, url: str, key: str) -> None:
        self.url = url
        self._key = key
        parts = urlsplit(url)
        assert parts.hostname is not None and parts.port is not None, (
            "the configuration checks the addresses"
        )
        self.address = (parts.hostname, parts.port)
        self._encrypted = parts.scheme == "https"
        self._open: set[http.client.HTTPConnection] = set()
        """Connections whose answers are waited for."""

    def post(self, path: str, body: Mapping[str, Any] | None = None, *, timeout: float) -> Any:
        """Sends a JSON body and returns the answer's JSON.

        Raises:
            EngineFailed: there is no answer, or it is an error.
        """
        answer = self._ask("POST", path, json.dumps(body or {}), timeout)
        return json.loads(answer or "{}")

    def call(self, method: str, argument: Any = None, *, timeout: float) -> list[Any]:
        """Calls a method of our worker and returns each worker's result; raises as `post`."""
        arguments = []
        if argument is not None:
            arguments.append(json.dumps(argument))
        # door.py lets one text argument through, so that nothing is ever unpickled.
        body = {"method": method, "args": arguments}
        return list(self.post("/collective_rpc", body, timeout=timeout)["results"])

    def healthy(self) -> bool:
        """Tells whether the server serves.

        Raises:
            KeyRefused: it serves, but does not take the key, or does not know it.
        """
        try:
            self._ask("GET", "/health", None, timeout=10.0)
        except KeyRefused:
            raise
        except EngineFailed:
            return False
        return True

    def cancel(self) -> None:
        """Breaks off every request that is under way.

        vLLM stops computing answers that nobody waits for.
        """
        for connection in list(self._open):
            with suppress(AttributeError, OSError):  # it has no socket yet, or none any more
                connection.sock.shutdown(socket.SHUT_RDWR)

    def _ask(self, verb: str, path: str, text: str | None, timeout: float) -> str:
        """Returns the body of an answer with status 200; raises as `post`."""
        body = (text or "").encode()
        claim = KeyClaim.of(self._key, secrets.token_hex(16), verb, path, body)
        headers = {"Authorization": claim.header, "Content-Type": "application/json"}

        # A new connection for each request: the server may have been started again meanwhile.
        connection = self._connection(timeout)
        self._open.add(connection)
        try:
            connection.request(verb, path, body or None, headers)
            answer = connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            reason = repr(error)
            if isinstance(error, TimeoutError):
                reason = f"no answer in {timeout:g} s"
            raise EngineFailed(f"the vLLM server {self.url} failed: {reason}") from error
        finally:
            self._open.discard(connection)
            connection.close()

        shown = answer.headers.get(ANSWER, "")
        expected = answer_proof(self._key, claim.number, answer.status, content)
        is_proven = hmac.compare_digest(shown.encode(), expected.encode())
        # Before the proof is asked for: who refuses the key may not know it, and so
        # cannot prove it.
        if answer.status == 401:
            raise KeyRefused(
                f"the vLLM server {self.url} does not take the key in VLLM_API_KEY; set it as the "
                "server has it"
            )
        if answer.status == 200 and not is_proven:
            raise KeyRefused(
                f"who answers at {self.url} does not know the key in VLLM_API_KEY: it is not this "
                "run's server, or it was started by another version of this project; see which "
                "process listens there"
            )

        content_text = content.decode(errors="replace")
        # Proven or not, nothing of it is used but its text in the message.
        if answer.status != 200:
            # The sentence in an error of vLLM's, or the beginning of another text.
            try:
                message = str(json.loads(content_text)["error"]["message"])
            except (ValueError, KeyError, TypeError):
                message = content_text[:300]
            raise EngineFailed(
                f"the vLLM server {self.url} answered {path} with {answer.status}: {message}"
            )
        return content_text

    def _connection(self, timeout: float) -> http.client.HTTPConnection:
        if self._encrypted:
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(*self.address, timeout=timeout, context=context)
        return http.client.HTTPConnection(*self.address, timeout=timeout)


class ServerProcess:
    """A server that this process starts, and that ends with it."""

    def __init__(self, config: Config, *, number: int, key: str) -> None:
        """Starts the server and does not wait for it.

        Its output goes to servers/server-NUMBER.log in the run directory.
        """
        self._config = config
        self._number = number
        self._key = key
        run_dir = Path(config.trainer.run_dir or ".")
        self.log = run_dir / "servers" / f"server-{number}.log"
        self.start()
        atexit.register(self.stop)

    def start(self) -> None:
        """Starts the server, again if it has ended; each time on another port."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        host = self._config.rollout.server_host
        with socket.socket() as probe:
            # Free just now: another process may take it before the server does, which then ends
            # and says so.
            probe.bind((host, 0))
            port = int(probe.getsockname()[1])

        guard = [sys.executable, str(Path(__file__).with_name("guard.py"))]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*guard, *command(self._config, host=host, port=port)],
                # However this process ends, the pipe closes, and the guard ends the server then.
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(self._config, self._key, gpus=self._gpus()),
                # A process group of its own, which the guard ends as a whole.
                start_new_session=True,
            )

        self.server = Server(f"http://{host}:{port}", self._key)

    @property
    def pid(self) -> int:
        """The process number of the guard, which leads the server's process group."""
        return self._process.pid

    def ended(self) -> bool:
        """Tells whether the server has ended."""
        return self._process.poll() is not None

    def stop(self) -> None:
        """Ends the server, and waits until its memory is free."""
        assert self._process.stdin is not None
        # The guard's sign to end the server, as if this process had gone.
        self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_SECONDS)
        # Where the guard alone was killed, or is too slow, the rest of its group still runs.
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def wait(self, say: Callable[[str], None]) -> None:
        """Waits until the server serves.

        Raises:
            EngineFailed: it ended, or was not ready in rollout.server_start_seconds.
        """

        def why_ended() -> str:
            if not self.ended():
                return ""
            lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            last = lines[-1] if lines else "nothing"
            return f"it ended and said {last!r}; all of it is in {self.log}"

        seconds = self._config.rollout.server_start_seconds
        wait_until_healthy(self.server, seconds, say, ended=why_ended)

    def _gpus(self) -> list[str]:
        """Returns this machine's GPUs after the training processes' own; none on a CPU.

        Raises:
            ValueError: there are too few.
        """
        if device().type == "cpu":
            return []

        tp = self._config.rollout.tp
        num_trainers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        # The trainers have the first GPUs; then each rank of the machine has `tp` for its server.
        first = num_trainers + int(os.environ.get("LOCAL_RANK", "0")) * tp

        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible:
            gpus = visible.split(",")
        else:
            gpus = [str(i) for i in range(torch.cuda.device_count())]

        if first + tp > len(gpus):
            raise ValueError(
                f"vLLM server {self._number} wants the GPUs {first} to {first + tp - 1}, after "
                f"those of the {num_trainers} training processes of this machine, which has "
                f"{len(gpus)}; start fewer processes or servers, or start servers elsewhere and "
                "give their addresses (rollout.servers)"
            )
        return gpus[first : first + tp]


def wait_until_healthy(
    server: Server,
    seconds: float,
    say: Callable[[str], None],
    *,
    ended: Callable[[], str] = lambda: "",
) -> None:
    """Waits until a server serves, and tells the user every ten seconds that it still waits.

    Args:
        server: the server.
        seconds: how long it is waited for at most.
        say: tells the user.
        ended: says why waiting is in vain; empty if it is not.

    Raises:
        EngineFailed: waiting is in vain, or the time is over.
    """
    began = time.monotonic()
    last_notice = began
    while True:
        # Our own process first: where it has ended, another one may answer at its port by now.
        reason = ended()
        if not reason and server.healthy():
            return

        now = time.monotonic()
        if not reason and now - began > seconds:
            reason = f"it is not ready after {seconds:g} s (rollout.server_start_seconds)"
        if reason:
            raise EngineFailed(f"the vLLM server {server.url} does not serve: {reason}")

        if now - last_notice >= _SAY_EVERY_SECONDS:
            say(f"waiting for the vLLM server {server.url}: {now - began:.0f} s")
            last_notice = now
        time.sleep(_POLL_SECONDS)


def command(config: Config, *, host: str, port: int) -> list[str]:
    """Returns the command line of a server that takes its weights from the trainer.

    No key and no secret is in it.
    """
    ours = {
        "host": host,
        "port": port,
        "worker_cls": "megatron_real.rollout.vllm_server.worker.Worker",
        "middleware": "megatron_real.rollout.vllm_server.door.Door",
        "disable_uvicorn_access_log": True,
    }

    secret = _secret_arguments(config)
    arguments: list[str] = []
    for name, value in {**engine_arguments(config), **ours}.items():
        if name not in secret:
            arguments += _words(name, value)

    # Secrets come by the environment, which needs our main in front of vLLM's.
    module = server_main.SERVER
    if secret:
        module = server_main.__name__
    return [sys.executable, "-m", module, *arguments]


def environment(config: Config, key: str, *, gpus: list[str]) -> dict[str, str]:
    """Returns the environment of a server's process, without the trainer's own world.

    Args:
        config: the run's configuration.
        key: what requests prove to know.
        gpus: the GPUs that the server sees; empty: it sees all.
    """
    variables = {
        name: value
        for name, value in os.environ.items()
        if name not in _NOT_FOR_SERVERS and not name.endswith(_SECRETS)
    }
    variables |= ENVIRONMENT
    if gpus:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)

    secret_words = []
    for name in sorted(_secret_arguments(config)):
        secret_words += _words(name, config.rollout.vllm[name])
    if secret_words:
        variables[server_main.VARIABLE] = json.dumps(secret_words)

    # The directory that our package lies in: vLLM imports our worker and door from there.
    package = str(Path(__file__).parents[3])
    paths = [package, os.environ.get("PYTHONPATH", "")]
    return {
        **variables,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "VLLM_API_KEY": key,
        # On a CPU: no third process beside the server's and the engine's.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Allowed, it would unpickle what a request brings.
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "0",
        # Opens the paths that change weights; they want the key as all others do.
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    }


def _secret_arguments(config: Config) -> set[str]:
    """Returns the arguments in rollout.vllm that may be secrets.

    Those are the arguments with a value, at any depth, that was given as an interpolation.
    """
    prefix = "rollout.vllm."
    paths = [path for path in config.given if path.startswith(prefix)]
    return {path.removeprefix(prefix).split(".")[0] for path in paths}


def _words(name: str, value: Any) -> list[str]:
    """Returns an argument of vLLM's as words of its command line."""
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    if isinstance(value, str):
        return [f"--{option}", value]
    return [f"--{option}", json.dumps(value)]
