"""Ports for servers of tests."""

from __future__ import annotations

import fcntl
import functools
import os
import random
import socket
import tempfile
import threading
from pathlib import Path

# Below the range from which the kernel takes the ports of outgoing connections (32768 on): between
# the moment a port is chosen here and the moment a server listens there, nobody gets it by chance.
_RANGE = range(20_100, 32_000)

_given: set[int] = set()
"""Ports that this process has chosen."""
_choosing = threading.Lock()


def free_port() -> int:
    """Returns a port of this machine on which nothing listens, and which no other call has returned
    to a test that still runs.
    """
    while True:
        port = random.SystemRandom().choice(_RANGE)
        with _choosing, socket.socket() as probe:
            try:
                # Of the bytes of a file that all lanes open, each stands for a port. The kernel
                # gives the byte back when this process ends.
                fcntl.lockf(_shared_file(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            # A process is never refused a byte that it has itself.
            if port not in _given:
                _given.add(port)
                return port


@functools.cache
def _shared_file() -> int:
    """Returns the descriptor of the file; closing it, or another one of it, would unlock all."""
    path = Path(tempfile.gettempdir()) / f"megatron-real-tests-{os.getuid()}.ports"
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
