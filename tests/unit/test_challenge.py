"""The proof that both ends of a socket know the run's secret."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from megatron_real import challenge
from megatron_real.challenge import Doorkeeper, NotProven, connect, new_secret

SECONDS = 60.0
"""Far more than two ends need for a proof, on a busy machine too."""


def listener() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def address(door: Doorkeeper) -> tuple[str, int]:
    host, port = door._listener.getsockname()
    return str(host), int(port)


def test_two_ends_with_the_same_secret_accept_each_other() -> None:
    secret = new_secret()
    with Doorkeeper(listener(), secret, purpose="test") as door:
        ours = connect(address(door), secret, purpose="test", seconds=SECONDS)
        theirs = door.next(SECONDS)
        ours.sendall(b"hello")
        assert theirs.recv(5) == b"hello"
        ours.close()
        theirs.close()


@pytest.mark.parametrize(("secret", "purpose"), [("other", "test"), ("right", "another")])
def test_another_secret_or_purpose_is_refused(secret: str, purpose: str) -> None:
    with Doorkeeper(listener(), "right", purpose="test") as door:
        with pytest.raises(NotProven):
            connect(address(door), secret, purpose=purpose, seconds=SECONDS)
        with pytest.raises(TimeoutError):
            door.next(0.1)


@contextmanager
def impostor(answer: Callable[[socket.socket], None]) -> Iterator[tuple[str, int]]:
    """Listens on a port in place of the real listener, and answers one connection."""
    server = listener()

    def serve() -> None:
        connection, _ = server.accept()
        # The other end has left when it is not convinced.
        with connection, suppress(ConnectionError):
            answer(connection)

    thread = threading.Thread(target=serve)
    thread.start()
    host, port = server.getsockname()
    with server:
        yield str(host), int(port)
        thread.join()


def reflect(connection: socket.socket) -> None:
    """Sends back what it receives, in the hope that a proof is valid in both directions."""
    connection.sendall(bytes(32))
    received = connection.recv(64, socket.MSG_WAITALL)
    connection.sendall(received[32:])


IMPOSTORS: dict[str, Callable[[socket.socket], None]] = {
    "silent": lambda connection: None,
    "junk": lambda connection: connection.sendall(bytes(64)),
    "closes": lambda connection: connection.shutdown(socket.SHUT_WR),
    "reflects": reflect,
}


@pytest.mark.parametrize("kind", IMPOSTORS)
def test_the_listener_has_to_prove_the_secret_too(kind: str) -> None:
    heard: list[bytes] = []

    def answer(connection: socket.socket) -> None:
        IMPOSTORS[kind](connection)
        # Until the other end has left: nothing that it says is missed.
        while message := connection.recv(4096):
            heard.append(message)

    # A silent end is waited for all this time.
    seconds = 0.5 if kind == "silent" else SECONDS
    with impostor(answer) as place, pytest.raises((NotProven, ConnectionError)):
        connect(place, "right", purpose="test", seconds=seconds)
    assert b"right" not in b"".join(heard)


def test_an_end_that_was_too_slow_for_the_door_comes_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(challenge, "HANDSHAKE_SECONDS", 0.2)
    server = listener()
    doors: list[Doorkeeper] = []

    def turn_one_away_and_open() -> None:
        connection, _ = server.accept()
        time.sleep(0.3)
        connection.close()
        doors.append(Doorkeeper(server, "right", purpose="test"))

    host, port = server.getsockname()
    opener = threading.Thread(target=turn_one_away_and_open)
    opener.start()
    connect((host, port), "right", purpose="test", seconds=SECONDS).close()

    opener.join()
    doors[0].next(SECONDS).close()
    doors[0].close()


def test_a_recorded_proof_is_not_accepted_again() -> None:
    """A recorded message is sent again, to a listener with another random number."""
    recorded: list[bytes] = []

    def record(connection: socket.socket) -> None:
        connection.sendall(bytes(32))
        recorded.append(connection.recv(64, socket.MSG_WAITALL))

    with impostor(record) as place, pytest.raises((NotProven, ConnectionError)):
        connect(place, "right", purpose="test", seconds=SECONDS)

    with Doorkeeper(listener(), "right", purpose="test") as door:
        with socket.create_connection(address(door)) as replay:
            replay.sendall(recorded[0])
            replay.settimeout(SECONDS)
            # The listener sends its 32 random bytes, and closes without a proof of its own.
            answer = replay.recv(4096)
            assert answer[32:] == b"" and replay.recv(4096) == b""
        with pytest.raises(TimeoutError):
            door.next(0.1)


def test_silent_connections_do_not_block_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(challenge, "HANDSHAKE_SECONDS", 1.0)
    with Doorkeeper(listener(), "right", purpose="test") as door:
        strays = [socket.create_connection(address(door)) for _ in range(300)]
        connect(address(door), "right", purpose="test", seconds=SECONDS).close()
        door.next(SECONDS).close()
        for stray in strays:
            stray.close()
