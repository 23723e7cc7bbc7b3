"""Where the two ends of a link exchange their addresses: a store for those who know its secret.

torch's own TCPStore admits whoever speaks its protocol, under whatever rank it claims, and the
weights would then be sent to it. A process group asks little of its store, so a small store
suffices: set, get, wait and check, over sockets whose two ends have proven themselves
(challenge.py). The host keeps the values; a guest sends its requests to the host.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import Store

from megatron_real import challenge

_PURPOSE = "link"


class Host(Store):
    """The sender's side."""

    def __init__(self, listener: socket.socket, secret: str, *, seconds: float) -> None:
        """Lets guests in. The listener belongs to the store now.

        Args:
            listener: where guests come.
            secret: what guests prove to know.
            seconds: how long a value is waited for at most.
        """
        super().__init__()
        self._seconds = seconds
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._door = challenge.Doorkeeper(listener, secret, purpose=_PURPOSE)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._let_in, name="link-store", daemon=True)
        self._thread.start()

    def set(self, key: str, value: bytes | str) -> None:
        with self._changed:
            self._values[key] = _as_bytes(value)
            self._changed.notify_all()

    def get(self, key: str) -> bytes:
        """Waits for a value and returns it.

        Raises:
            TimeoutError: it does not come in time.
        """
        self.wait([key])
        # Without the lock: a value that is there is never taken away.
        return self._values[key]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Waits until all values are there; raises as `get`."""
        seconds = _seconds_of(timeout, self._seconds)
        with self._changed:
            if not self._changed.wait_for(lambda: set(keys) <= set(self._values), seconds):
                raise TimeoutError(f"a worker has not come to the link in {seconds:g} s")

    def check(self, keys: Sequence[str]) -> bool:
        return set(keys) <= set(self._values)

    def close(self) -> None:
        """Closes the listener; guests that are in stay."""
        self._closed.set()
        self._door.close()
        self._thread.join()

    def _let_in(self) -> None:
        while not self._closed.is_set():
            # A second at a time, so that the thread sees that the store was closed.
            with suppress(TimeoutError):
                guest = self._door.next(1.0)
                # A thread for each guest: its request may wait for what another guest will set.
                threading.Thread(target=self._serve, args=(guest,), daemon=True).start()

    def _serve(self, guest: socket.socket) -> None:
        """Answers one guest until it leaves."""
        # An error of the connection ends this guest's thread alone.
        with guest, suppress(OSError), guest.makefile("rw", encoding="utf-8") as stream:
            for line in stream:
                try:
                    answer = self._answer(json.loads(line))
                except TimeoutError as error:
                    answer = {"error": str(error)}
                stream.write(json.dumps(answer) + "\n")
                stream.flush()

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Does what a guest asks for; raises as `wait`."""
        if "set" in request:
            self.set(request["set"], bytes.fromhex(request["value"]))
            return {}
        if "check" in request:
            return {"there": self.check(request["check"])}
        # A guest cannot keep a thread here for longer than the link may wait.
        seconds = min(request["seconds"], self._seconds)
        self.wait(request["keys"], timedelta(seconds=seconds))
        return {"values": [self._values[key].hex() for key in request["keys"]]}


class Guest(Store):
    """A worker's side."""

    def __init__(self, address: tuple[str, int], secret: str, *, seconds: float) -> None:
        """Connects to the host.

        Raises:
            NotProven: whoever listens there does not know the secret.
            OSError: nobody listens there, or it does not answer in `seconds`.
        """
        super().__init__()
        self._seconds = seconds
        connection = challenge.connect(address, secret, purpose=_PURPOSE, seconds=seconds)
        self._stream = connection.makefile("rw", encoding="utf-8")
        # One request at a time: answers come in the order of the requests and bear no name.
        self._asking = threading.Lock()

    def set(self, key: str, value: bytes | str) -> None:
        # JSON knows no bytes: values travel as hexadecimal text.
        self._ask({"set": key, "value": _as_bytes(value).hex()})

    def get(self, key: str) -> bytes:
        """Waits for a value and returns it; raises as `wait`."""
        return bytes.fromhex(self._wait([key], self._seconds)[0])

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Waits until all values are there.

        Raises:
            TimeoutError: they do not come in time.
            ConnectionError: the host has gone.
        """
        self._wait(keys, _seconds_of(timeout, self._seconds))

    def check(self, keys: Sequence[str]) -> bool:
        return bool(self._ask({"check": list(keys)})["there"])

    def _wait(self, keys: Sequence[str], seconds: float) -> list[str]:
        """Returns the values as hexadecimal text; raises as `wait`."""
        return list(self._ask({"keys": list(keys), "seconds": seconds})["values"])

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Returns the host's answer; raises as `wait`."""
        with self._asking:
            self._stream.write(json.dumps(request) + "\n")
            self._stream.flush()
            line = self._stream.readline()
        if not line:
            raise ConnectionError("the other end of the link has gone")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise TimeoutError(answer["error"])
        return answer


def _as_bytes(value: bytes | str) -> bytes:
    """Returns a value as the process groups mean it: some of them give text."""
    if isinstance(value, str):
        return value.encode()
    return value


def _seconds_of(timeout: timedelta | None, default: float) -> float:
    if timeout is None:
        return default
    return timeout.total_seconds()
