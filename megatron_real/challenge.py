"""Two ends of a socket prove to each other that they know the run's secret, which neither of them sends.

    listening end                                          connecting end
    n, random                                     ->
                                                  <-       m, random; HMAC(secret, "connects" + purpose + n + m)
    HMAC(secret, "listens" + purpose + n + m)     ->

Each proof is of both numbers, so an old one is worth nothing, and names its end, so it cannot be sent back to whom it
came from. Who listens on the network learns neither the secret nor how to prove it; what is said afterwards is neither
encrypted nor signed. Standard library only.
"""

from __future__ import annotations

import hmac
import queue
import secrets
import socket
import threading
import time
from contextlib import suppress

HANDSHAKE_SECONDS = 10.0
"""A whole proof takes at most so long: an end that stays silent is no end of ours."""
_NUMBER_BYTES = _PROOF_BYTES = 32
_MOST_AT_ONCE = 256
"""Proofs under way at a door; those who come then wait in the listener's queue."""


class NotProven(ConnectionError):
    """The other end does not know the secret, or says nothing that makes sense."""


def new_secret() -> str:
    """256 random bits, for one run."""
    return secrets.token_hex(32)


def proof(secret: str, *words: bytes) -> bytes:
    """The proof that whoever sends it knows the secret, for these words: [32 bytes], HMAC-SHA256."""
    lengths = b"".join(len(word).to_bytes(8, "big") for word in words)
    return hmac.digest(secret.encode(), lengths + b"".join(words), "sha256")


def connect(
    address: tuple[str, int], secret: str, *, purpose: str, seconds: float = HANDSHAKE_SECONDS
) -> socket.socket:
    """Connects to a listener that lets in by `Door`, and has it prove itself.

    Raises:
        NotProven: whoever listens there does not know the secret.
        OSError: nobody listens there.
    """
    connection = socket.create_connection(address, timeout=seconds)
    try:
        _prove(connection, secret, purpose, listens=False, seconds=seconds)
    except BaseException:  # of whatever kind, it is raised on; the connection must not stay open
        connection.close()
        raise
    return connection


class Door:
    """Lets in, of all who connect to a listener, those who know the secret; the others cost nothing but a thread.

    Example:
        with Door(socket.create_server(("", 0)), secret, purpose="lifeline") as door:
            connection = door.next(seconds=60)
    """

    def __init__(self, listener: socket.socket, secret: str, *, purpose: str) -> None:
        """Takes the listener over."""
        self._listener, self._secret, self._purpose = listener, secret, purpose
        self._proven: queue.Queue[socket.socket] = queue.Queue()
        self._room = threading.Semaphore(_MOST_AT_ONCE)
        self._closed = threading.Event()
        threading.Thread(target=self._accept, name=f"door-{purpose}", daemon=True).start()

    def __enter__(self) -> Door:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def next(self, seconds: float) -> socket.socket:
        """The next one who has proven to know the secret.

        Raises:
            TimeoutError: nobody in that time.
        """
        try:
            return self._proven.get(timeout=max(seconds, 0.0))
        except queue.Empty:
            raise TimeoutError(f"nobody came in {seconds:.0f} s") from None

    def close(self) -> None:
        """Lets nobody in any more."""
        self._closed.set()
        with suppress(OSError):  # wakes the thread that accepts
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            self._room.acquire()
            try:
                connection, _ = self._listener.accept()
            except OSError:
                self._room.release()
                if self._closed.wait(0.1):
                    return
                continue  # that one has gone again, or this process has too many files open
            try:
                threading.Thread(target=self._let_in, args=(connection,), daemon=True).start()
            except RuntimeError:  # no room for another thread just now: that one has to come again
                connection.close()
                self._room.release()

    def _let_in(self, connection: socket.socket) -> None:
        try:
            _prove(connection, self._secret, self._purpose, listens=True, seconds=HANDSHAKE_SECONDS)
        except OSError:
            connection.close()
        else:
            self._proven.put(connection)
        finally:
            self._room.release()


def _prove(
    connection: socket.socket, secret: str, purpose: str, *, listens: bool, seconds: float
) -> None:
    """One end's part; see the module. Leaves the connection without a timeout."""
    ends = time.monotonic() + seconds
    mine = secrets.token_bytes(_NUMBER_BYTES)
    if listens:
        connection.sendall(mine)
        answer = _receive(connection, _NUMBER_BYTES + _PROOF_BYTES, ends)
        numbers = mine, answer[:_NUMBER_BYTES]
        theirs = answer[_NUMBER_BYTES:]
    else:
        numbers = _receive(connection, _NUMBER_BYTES, ends), mine
        connection.sendall(mine + proof(secret, b"connects", purpose.encode(), *numbers))
        theirs = _receive(connection, _PROOF_BYTES, ends)

    role = b"connects" if listens else b"listens"
    if not hmac.compare_digest(theirs, proof(secret, role, purpose.encode(), *numbers)):
        raise NotProven("the other end does not know this run's secret")
    if listens:
        connection.sendall(proof(secret, b"listens", purpose.encode(), *numbers))
    connection.settimeout(None)


def _receive(connection: socket.socket, size: int, ends: float) -> bytes:
    """So many bytes, by `ends` of time.monotonic(): one byte a second is no way to stay."""
    received = b""
    while len(received) < size:
        left = ends - time.monotonic()
        if left <= 0:
            raise NotProven("the other end did not prove itself in time")
        connection.settimeout(left)
        try:
            part = connection.recv(size - len(received))
        except TimeoutError:
            continue
        if not part:
            raise NotProven("the other end has closed the connection")
        received += part
    return received
