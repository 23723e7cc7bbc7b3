"""A cable that is cut between two network namespaces, as between two machines.

No process gets an error or a closed connection from it.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.lifeline import start, wait_until_ready

HOST = socket.gethostname()
FIRST = "10.213.0.1"
SECOND = "10.213.0.2"


def missing() -> str:
    """Returns why this machine makes no network namespaces, or an empty string where it does."""
    for tool in ("unshare", "nsenter", "ip"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    process = subprocess.run(["unshare", "-n", "ip", "link", "show", "lo"], capture_output=True)
    return process.stderr.decode().strip()


pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


@dataclass(frozen=True)
class Machines:
    """Two network namespaces with a cable between them, each kept by a process that sleeps."""

    pids: tuple[int, int]

    def inside(self, machine: int) -> list[str]:
        """The words before a command that run it on that machine."""
        return ["nsenter", "-t", str(self.pids[machine]), "-n"]

    def run(self, machine: int, *words: str) -> None:
        subprocess.run([*self.inside(machine), *words], check=True, capture_output=True)

    def cut(self) -> None:
        self.run(1, "ip", "link", "set", "cable1", "down")


@pytest.fixture
def machines() -> Iterator[Machines]:
    with ExitStack() as stack:
        keepers = []
        for _ in range(2):
            keeper = subprocess.Popen(
                ["unshare", "-n", "sh", "-c", "echo made; exec sleep 600"], stdout=subprocess.PIPE
            )
            stack.callback(keeper.wait)
            stack.callback(keeper.kill)
            assert keeper.stdout is not None and keeper.stdout.readline() == b"made\n"
            keepers.append(keeper.pid)

        one, other = map(str, keepers)
        link = ["ip", "link", "add", "cable0", "netns", one, "type", "veth"]
        link += ["peer", "name", "cable1", "netns", other]
        process = subprocess.run(link, capture_output=True, text=True)
        if process.returncode:
            reason = process.stderr.strip()
            pytest.skip(f"this machine makes no pair of network devices: {reason}")

        pair = Machines((keepers[0], keepers[1]))
        for machine, address in enumerate((FIRST, SECOND)):
            pair.run(machine, "ip", "addr", "add", f"{address}/24", "dev", f"cable{machine}")
            pair.run(machine, "ip", "link", "set", f"cable{machine}", "up")
            # What ranks of one machine say to each other goes over its loopback device.
            pair.run(machine, "ip", "link", "set", "lo", "up")
        yield pair


def test_both_sides_of_a_cut_cable_end(machines: Machines, tmp_path: Path) -> None:
    """Each side has only the other's silence to know by: no packet tells it of an end."""
    # Rank 0 is on the first machine, ranks 1 and 2 on the second.
    ranks = [
        start(rank, "silence", tmp_path, *machines.inside(min(rank, 1)), host=FIRST)
        for rank in range(3)
    ]
    try:
        wait_until_ready(ranks)
        machines.cut()
        errors = [process.communicate(timeout=120)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.communicate()

    assert f" on {HOST} has given no sign of life for" in errors[0]
    for error in errors[1:]:
        assert f"rank 0 on {HOST} has given no sign of life for" in error
    assert [process.returncode for process in ranks] == [1] * 3
