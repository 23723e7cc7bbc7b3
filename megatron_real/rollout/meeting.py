"""Where the two ends of a link exchange their addresses: a store that only those enter who know its secret.

torch's own TCPStore takes whoever speaks its protocol as whatever rank it says it is, and this rank would then be sent
the weights. A process group asks its store for little, so a little store suffices: set, get and wait, over sockets whose
two ends have proven themselves (challenge.py). The host keeps the values; a guest sends its questions to the host.
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
        """Takes the listener over. `seconds`: longest that a value is waited for."""
        super().__init__()
        self._seconds = seconds
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._door = challenge.Door(listener, secret, purpose=_PURPOSE)
        self._closed = threading.Event()
        threading.Thread(target=self._let_in, name="link-store", daemon=True).start()

    def set(self, key: str, value: bytes | str) -> None:
        with self._changed:
            self._values[key] = value.encode() if isinstance(value, str) else value
            self._changed.notify_all()

    def get(self, key: str) -> bytes:
        """The value, once it is there.

        Raises:
            TimeoutError: it does not come.
        """
        self.wait([key])
        return self._values[key]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Waits until all values are there; raises as `get`."""
        seconds = self._seconds if timeout is None else timeout.total_seconds()
        with self._changed:
            if not self._changed.wait_for(lambda: set(keys) <= set(self._values), seconds):
                raise TimeoutError(f"a worker has not come to the link in {seconds:g} s")

    def check(self, keys: Sequence[str]) -> bool:
        return set(keys) <= set(self._values)

    def close(self) -> None:
        """Lets nobody in any more."""
        self._closed.set()
        self._door.close()

    def _let_in(self) -> None:
        while not self._closed.is_set():
            with suppress(TimeoutError):
                guest = self._door.next(1.0)
                threading.Thread(target=self._serve, args=(guest,), daemon=True).start()

    def _serve(self, guest: socket.socket) -> None:
        """Answers one guest until it leaves."""
        # Whatever ends the connection ends this guest alone.
        with guest, suppress(OSError), guest.makefile("rw", encoding="utf-8") as stream:
            for line in stream:
                question = json.loads(line)
                try:
                    answer = self._answer(question)
                except TimeoutError as error:
                    answer = {"error": str(error)}
                stream.write(json.dumps(answer) + "\n")
                stream.flush()

    def _answer(self, question: dict[str, Any]) -> dict[str, Any]:
        if "set" in question:
            self.set(question["set"], bytes.fromhex(question["value"]))
            return {}
        if "check" in question:
            return {"there": self.check(question["check"])}
        seconds = timedelta(seconds=min(question["seconds"], self._seconds))
        self.wait(question["keys"], seconds)
        return {"values": [self._values[key].hex() for key in question["keys"]]}


class Guest(Store):
    """A worker's side."""

    def __init__(self, address: tuple[str, int], secret: str, *, seconds: float) -> None:
        """Connects to the host.

        Raises:
            NotProven: whoever listens there does not know the secret.
            OSError: nobody listens there.
        """
        super().__init__()
        self._seconds = seconds
        connection = challenge.connect(address, secret, purpose=_PURPOSE)
        self._stream = connection.makefile("rw", encoding="utf-8")
        self._asking = threading.Lock()

    def set(self, key: str, value: bytes | str) -> None:
        data = value.encode() if isinstance(value, str) else value
        self._ask({"set": key, "value": data.hex()})

    def get(self, key: str) -> bytes:
        """The value, once it is there; raises as `wait`."""
        return bytes.fromhex(self._wait([key], self._seconds)[0])

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Waits until all values are there.

        Raises:
            TimeoutError: they do not come.
            ConnectionError: the host has gone.
        """
        self._wait(keys, self._seconds if timeout is None else timeout.total_seconds())

    def check(self, keys: Sequence[str]) -> bool:
        return bool(self._ask({"check": list(keys)})["there"])

    def _wait(self, keys: Sequence[str], seconds: float) -> list[str]:
        return list(self._ask({"keys": list(keys), "seconds": seconds})["values"])

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        with self._asking:
            self._stream.write(json.dumps(question) + "\n")
            self._stream.flush()
            line = self._stream.readline()
        if not line:
            raise ConnectionError("the other end of the link has gone")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise TimeoutError(answer["error"])
        return answer
