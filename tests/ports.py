"""Ports for servers of tests."""

from __future__ import annotations

import random
import socket

# Below the range from which the kernel takes the ports of outgoing connections (32768 on): between
# the moment a port is chosen here and the moment a server listens there, nobody gets it by chance.
_RANGE = range(20_100, 32_000)


def free_port() -> int:
    """Returns a port of this machine on which nothing listens."""
    while True:
        port = random.SystemRandom().choice(_RANGE)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
