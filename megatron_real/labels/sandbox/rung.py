"""How well a node can contain a verifier: three rungs of a ladder, and on which this one stands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from enum import Enum

_PROBE_SECONDS = 60.0


class Rung(str, Enum):
    """What holds a worker in. The first that the node allows is taken."""

    NAMESPACES = "namespaces"
    """A file system, processes, network and users of its own, under Landlock where the kernel has
    it, and seccomp."""
    LANDLOCK = "landlock"
    """The node's own namespaces; Landlock closes its files and seccomp its network and its other
    processes."""
    LIMITS = "limits"
    """Limits of memory, time, files and processes only: what runs here can read what the user can
    read."""

    @property
    def contains(self) -> bool:
        """Whether code of a completion may run here."""
        return self is not Rung.LIMITS

    @property
    def meaning(self) -> str:
        """One sentence for the doctor and for errors."""
        return _MEANINGS[self]


_MEANINGS = {
    Rung.NAMESPACES: "verifiers see no file but the interpreter's, no network and no other process",
    Rung.LANDLOCK: (
        "verifiers read no file but the interpreter's, reach no network and signal no other process"
    ),
    Rung.LIMITS: (
        "verifiers are limited in memory and time but not contained, so code and tasks that "
        "evaluate answers are refused"
    ),
}

REMEDY = (
    "install libseccomp2, and either allow user namespaces (sysctl user.max_user_namespaces, "
    "docker run --security-opt seccomp=unconfined) or boot a kernel with Landlock (5.13 or newer, "
    "lsm=landlock,...)"
)
"""What an administrator does about the rung `limits`."""


def this_node() -> tuple[Rung, str]:
    """Builds a sandbox in a process of its own and asks it which rung it reached.

    Returns:
        The rung of this node, and why no higher one was reached.

    Raises:
        RuntimeError: the process that tries it failed in an unexpected way.
    """
    environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    probe = subprocess.run(
        [sys.executable, "-m", "megatron_real.labels.sandbox"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=_PROBE_SECONDS,
    )
    if probe.returncode:
        raise RuntimeError(
            f"the probe of the sandbox ended with {probe.returncode}: {probe.stderr}"
        )
    answer = json.loads(probe.stdout)
    return Rung(answer["rung"]), answer["why"]
