"""Two ends of a socket prove to each other that they know the run's secret, which neither sends.

    listening end                                        connecting end
    n, random                                    ->
                                                 <-      m, random;
                                                         HMAC(secret, "connects" + purpose + n + m)
    HMAC(secret, "listens" + purpose + n + m)    ->

Each proof is of both numbers, so an old one is worth nothing, and names its end, so it cannot be
sent back to whom it came from. Who listens on the network learns neither the secret nor how to
prove it; what is sent afterwards is neither encrypted nor signed. Standard library only.
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
# 256 bits: no two numbers are equal, and none can be guessed.
_NUMBER_BYTES = 32
# Of SHA-256.
_PROOF_BYTES = 32
_MOST_AT_ONCE = 256
"""Proofs under way at a door; those who come then wait in the listener's queue."""


class NotProven(ConnectionError):
    """The other end does not know the secret, or says nothing that makes sense."""


def new_secret() -> str:
    """Returns 256 random bits in hexadecimal, for one run."""
    return secrets.token_hex(32)


def proof(secret: str, *words: bytes) -> bytes:
    """Returns the 32 bytes that prove knowledge of the secret, for these words (HMAC-SHA256)."""
    # With their lengths, so that no other split of the same bytes has this proof.
    lengths = b"".join(len(word).to_bytes(8, "big") for word in words)
    return hmac.digest(secret.encode(), lengths + b"".join(words), "sha256")


def connect(
    address: tuple[str, int], secret: str, *, purpose: str, seconds: float = HANDSHAKE_SECONDS
) -> socket.socket:
    """Connects to a listener that lets in by `Doorkeeper`, and has it prove itself.

    A door waits `HANDSHAKE_SECONDS` for a proof. Where this end was slower, because there are far
    more processes than cores, it comes again while there is time.

    Args:
        address: host and port of the listener.
        secret: the run's secret.
        purpose: the same word at both ends.
        seconds: time for all of it.

    Raises:
        NotProven: whoever listens there does not know the secret.
        OSError: nobody listens there.
    """
    deadline = time.monotonic() + seconds
    while True:
        began = time.monotonic()
        # At least 0.1: a timeout of 0 would make the socket non-blocking.
        connection = socket.create_connection(address, timeout=max(deadline - began, 0.1))
        try:
            _prove(connection, secret, purpose, listens=False, seconds=deadline - began)
            return connection
        except OSError:
            connection.close()
            now = time.monotonic()
            was_slow = now - began >= HANDSHAKE_SECONDS
            if not was_slow or now >= deadline:
                raise
        except BaseException:  # of whatever kind it is: the connection must not stay open
            connection.close()
            raise


def own_address(host: str, port: int) -> str:
    """Returns the address under which the other side sees this machine.

    It is the address of the network interface that leads there.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # a datagram socket sends nothing for it
        return str(probe.getsockname()[0])


class Doorkeeper:
    """Lets in, of all who connect to a listener, those who know the secret.

    The others cost a thread each, for as long as a proof may take.

    Example:
        with Doorkeeper(socket.create_server(("", 0)), secret, purpose="lifeline") as door:
            connection = door.next(seconds=60)
    """

    def __init__(self, listener: socket.socket, secret: str, *, purpose: str) -> None:
        """Takes the listener over."""
        self._listener = listener
        self._secret = secret
        self._purpose = purpose
        self._proven: queue.Queue[socket.socket] = queue.Queue()
        self._room = threading.Semaphore(_MOST_AT_ONCE)
        self._closed = threading.Event()
        threading.Thread(target=self._accept, name=f"door-{purpose}", daemon=True).start()

    def __enter__(self) -> Doorkeeper:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def next(self, seconds: float) -> socket.socket:
        """Returns the connection of the next one who has proven to know the secret.

        Raises:
            TimeoutError: nobody in that time.
        """
        try:
            # Queue.get() refuses a timeout below 0.
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
            # Before accept(): whoever finds no room waits in the listener's queue.
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
        """Has one end prove itself, in its own thread: a silent one must not hold up others."""
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
    """Does one end's part of the module's diagram; leaves the connection without a timeout.

    Raises:
        NotProven: the other end does not know the secret, or not in time.
    """
    deadline = time.monotonic() + seconds
    own_number = secrets.token_bytes(_NUMBER_BYTES)
    if listens:
        connection.sendall(own_number)
        answer = _receive(connection, _NUMBER_BYTES + _PROOF_BYTES, deadline)
        numbers = (own_number, answer[:_NUMBER_BYTES])
        other_proof = answer[_NUMBER_BYTES:]
        other_role = b"connects"
    else:
        numbers = (_receive(connection, _NUMBER_BYTES, deadline), own_number)
        own_proof = proof(secret, b"connects", purpose.encode(), *numbers)
        connection.sendall(own_number + own_proof)
        other_proof = _receive(connection, _PROOF_BYTES, deadline)
        other_role = b"listens"

    # In constant time: how long a comparison takes must not tell how much of a proof is right.
    if not hmac.compare_digest(other_proof, proof(secret, other_role, purpose.encode(), *numbers)):
        raise NotProven("the other end does not know this run's secret")

    # Only then its own: whoever does not know the secret is told nothing made of it.
    if listens:
        connection.sendall(proof(secret, b"listens", purpose.encode(), *numbers))
    connection.settimeout(None)


def _receive(connection: socket.socket, size: int, deadline: float) -> bytes:
    """Returns `size` bytes. All must come by the deadline: one byte a second is no way to stay.

    Args:
        connection: where they come from.
        size: how many.
        deadline: of time.monotonic().

    Raises:
        NotProven: they did not come.
    """
    received = b""
    while len(received) < size:
        left = deadline - time.monotonic()
        if left <= 0:
            raise NotProven("the other end did not prove itself in time")

        connection.settimeout(left)
        try:
            part = connection.recv(size - len(received))
        except TimeoutError:
            # The look at the clock above decides.
            continue
        if not part:
            raise NotProven("the other end has closed the connection")

        received += part
    return received
