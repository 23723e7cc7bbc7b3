"""One rank's end is every rank's end, in seconds and with its cause, instead of a collective that waits for 30 minutes.

Every rank keeps a socket to the first rank open. A process that dies, however it dies, closes it: the first rank then
tells all others who was first, and all of them write that sentence and end. Over the same socket each rank says every
few seconds which stage it is in and since when, so that a rank that hangs (its process alive, its stage never over) or
whose machine has vanished (no sign at all) is found and named too.

nvidia-resiliency-ext offers this as `ft_launcher` with a monitor process beside each rank. It replaces torchrun and
srun as the launcher and knows one timeout for each section of code; a socket serves under any launcher, needs no
package, and sees a death at once. So it is not used.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

EXIT_CODE = 1
"""Of a rank that another one's end took down."""
_GRACE_SECONDS = 2.0
"""Wait for the dead rank's own word, which may come over its socket after another's end is seen."""

Stage = Callable[[], tuple[int, str, float]]
"""(stages begun, name of the present one or "", seconds in it)."""


@dataclass
class _Peer:
    """What the first rank knows of another one."""

    rank: int
    host: str
    heard: float = field(default_factory=time.monotonic)
    begun: int = 0
    stage: str = ""
    seconds: float = 0.0
    buffer: bytes = b""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


class Lifeline:
    """This rank's end of it; see the module. A run of one process has none.

    Example:
        lifeline = Lifeline(rank, world, share=broadcast, stage=progress.at, beat_seconds=5, hang_seconds=1800)
        ...
        lifeline.say_end("ValueError: ...")  # or lifeline.close() at a good end
    """

    def __init__(
        self,
        rank: int,
        world: int,
        *,
        share: Callable[[Any], Any],
        stage: Stage,
        beat_seconds: float = 5.0,
        silent_seconds: float = 120.0,
        hang_seconds: float = 1800.0,
    ) -> None:
        """Connects all ranks.

        Args:
            share: collective; gives the first rank's address, which it passes in, to every rank.
            stage: where this rank is.
            beat_seconds: between two signs of life.
            silent_seconds: a rank without one for so long is lost. Generous: a call may keep Python from running.
            hang_seconds: a rank that stays in one stage for so long hangs.
        """
        self.rank, self.world, self._stage = rank, world, stage
        self._beat, self._silent, self._hang = beat_seconds, silent_seconds, hang_seconds
        self._closed = threading.Event()
        if world == 1:
            return
        if rank == 0:
            listener = socket.create_server(("", 0), backlog=world)
            share((os.environ.get("MASTER_ADDR", "127.0.0.1"), listener.getsockname()[1]))
            self._peers = self._accept(listener)
            target = self._watch_all
        else:
            self._socket = socket.create_connection(share(None), timeout=60)
            self._socket.settimeout(None)
            self._send({"rank": rank, "host": socket.gethostname()})
            threading.Thread(target=self._beat_on, name="lifeline-beat", daemon=True).start()
            target = self._watch_first
        threading.Thread(target=target, name="lifeline", daemon=True).start()

    def say_end(self, cause: str) -> None:
        """This rank fails: the others learn the cause and end. Returns on the failing rank."""
        if self.world == 1 or self._closed.is_set():
            return
        if self.rank == 0:
            self._tell_all(f"rank 0 on {socket.gethostname()} ended first: {cause}")
        else:
            self._send({"end": cause})
        self._closed.set()

    def close(self) -> None:
        """A good end: nobody is taken down by it."""
        if self.world == 1 or self._closed.is_set():
            return
        self._closed.set()
        if self.rank > 0:
            self._send({"bye": True})
        else:
            self._tell_all("")

    def _accept(self, listener: socket.socket) -> dict[socket.socket, _Peer]:
        listener.settimeout(60)
        peers: dict[socket.socket, _Peer] = {}
        while len(peers) < self.world - 1:
            connection, _ = listener.accept()
            connection.settimeout(60)
            hello = json.loads(connection.makefile().readline())
            peers[connection] = _Peer(hello["rank"], hello["host"])
        listener.close()
        return peers

    def _watch_all(self) -> None:
        """The first rank's thread: hears the others, and judges those it does not hear."""
        with selectors.DefaultSelector() as ready:
            for connection in self._peers:
                ready.register(connection, selectors.EVENT_READ)
            while not self._closed.is_set():
                for key, _ in ready.select(min(self._beat, 1.0)):
                    heard: Any = key.fileobj
                    if not self._hear(heard):
                        ready.unregister(heard)
                self._judge()

    def _hear(self, connection: socket.socket) -> bool:
        """Takes in what a rank said; False when it has said goodbye."""
        peer = self._peers[connection]
        try:
            data = connection.recv(65536)
        except OSError:
            data = b""
        if not data:
            self._end_all(f"{peer} ended without a word (killed, or out of memory?) in stage {peer.stage or 'none'}")
            return False
        *lines, peer.buffer = (peer.buffer + data).split(b"\n")
        peer.heard = time.monotonic()
        for line in lines:
            word = json.loads(line)
            if "end" in word:
                self._end_all(f"{peer} ended first: {word['end']}")
            if "bye" in word:
                del self._peers[connection]
                return False
            peer.begun, peer.stage, peer.seconds = word.get("at", (peer.begun, peer.stage, peer.seconds))
        return True

    def _judge(self) -> None:
        now = time.monotonic()
        for peer in self._peers.values():
            if now - peer.heard > self._silent:
                self._end_all(f"{peer} has given no sign of life for {now - peer.heard:.0f} s")
        begun, stage, seconds = self._stage()
        places = [
            (begun, -seconds, "rank 0", stage),
            *((p.begun, -p.seconds, str(p), p.stage) for p in self._peers.values()),
        ]
        _, waited, who, where = min(places)  # the one that is behind keeps the others waiting
        if where and -waited > self._hang:
            self._end_all(f"{who} hangs: it has been in stage {where} for {-waited:.0f} s, the others wait for it")

    def _end_all(self, sentence: str) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        self._tell_all(sentence)
        _end(sentence)

    def _tell_all(self, sentence: str) -> None:
        for connection in list(self._peers):
            with contextlib.suppress(OSError):  # it may be gone already
                connection.sendall(json.dumps({"first": sentence}).encode() + b"\n")

    def _watch_first(self) -> None:
        """Another rank's thread: waits for the first rank's word, or its end."""
        heard = b""
        while not heard.endswith(b"\n"):
            try:
                data = self._socket.recv(65536)
            except OSError:
                data = b""
            if not data:
                break
            heard += data
        if self._closed.is_set():
            return
        self._closed.set()
        sentence = json.loads(heard)["first"] if heard.endswith(b"\n") else "rank 0 ended without a word (killed?)"
        if sentence:
            _end(sentence)

    def _beat_on(self) -> None:
        while not self._closed.wait(self._beat):
            self._send({"at": self._stage()})

    def _send(self, word: dict[str, object]) -> None:
        with contextlib.suppress(OSError):  # the first rank may be gone: the other thread sees it too, and says so
            self._socket.sendall(json.dumps(word).encode() + b"\n")


def _end(sentence: str) -> None:
    """Ends this process at once: its main thread may be in a collective that never returns."""
    os.write(2, f"megatron-real: {sentence}; ending this rank too\n".encode())
    os._exit(EXIT_CODE)
