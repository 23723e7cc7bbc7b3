"""A real Slurm on one machine: its own munged, slurmctld and two slurmds,
with their own ports and directories.

Two nodes of eight GPUs that Slurm only counts (no job here asks for a device), two partitions of
which `night` preempts `main`. Everything that was started is known by its pid, and stopped.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from tests.ports import free_port

T = TypeVar("T")

NODES = ("n1", "n2")
_NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "scancel")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

_CONFIG = """\
ClusterName=private
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits until its credential has expired: 120 s unless told.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=300
KillWait=120
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{nodes}
PartitionName=main Nodes=n[1-2] Default=YES PriorityTier=1 GraceTime=60 MaxTime=INFINITE
PartitionName=night Nodes=n[1-2] PriorityTier=10 MaxTime=INFINITE
"""


def missing() -> str:
    """Returns why there can be no cluster on this machine, or an empty string where there can."""
    absent = [name for name in _NEEDED if shutil.which(name, path=_PATH) is None]
    if not absent:
        return ""
    remedy = "apt-get install slurm-wlm munge (tests/run.sh does it as root)"
    return f"no {', '.join(absent)} here: {remedy}"


class Cluster:
    """Two nodes, n1 and n2.

    Example:
        with Cluster(folder) as cluster:
            job = cluster.run("sbatch", "--parsable", "job.sh").strip()
            cluster.wait_for(lambda: cluster.state(job) == "COMPLETED", "the job's end")
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": _PATH}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        with contextlib.ExitStack() as undone:
            undone.push(self)
            self._configure()
            munge = [f"--{name}={self.folder}/munge.{name.split('-')[0]}" for name in _MUNGE_FILES]
            (self.folder / "munge.key").write_bytes(os.urandom(128))
            (self.folder / "munge.key").chmod(0o400)
            self._start("munged", "--foreground", "--force", *munge)
            self.wait_for((self.folder / "munge.socket").exists, "munged")
            self._start("slurmctld", "-D", "-i")
            for node in NODES:
                self.start_node(node)
            # Until slurmctld listens, sinfo fails.
            states = ("sinfo", "-h", "-o", "%T")
            self.wait_for(
                lambda: set(self.run(*states, check=False).split()) == {"idle"}, "idle nodes"
            )
            undone.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for job in self._jobs():
                self.run("scancel", job, check=False)
            with_deadline(lambda: not self._jobs(), 60)
        finally:
            for name in reversed(list(self._processes)):
                self.kill(name, signal.SIGTERM)

    def run(
        self, *words: str, check: bool = True, environment: Mapping[str, str] | None = None
    ) -> str:
        """Runs a command of Slurm and returns what it printed."""
        together = {**self.environment, **(environment or {})}
        done = subprocess.run(
            words, env=together, capture_output=True, text=True, timeout=120, cwd=_ROOT
        )
        assert not check or done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout

    def fields(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", job)))

    def start_node(self, node: str) -> None:
        """Starts a node's slurmd."""
        self._start("slurmd", "-D", "-N", node, name=node)

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Ends one of the daemons: munged, slurmctld, n1 or n2."""
        process = self._processes.pop(name)
        process.send_signal(number)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def wait_for(
        self, happened: Callable[[], T], what: str, *, seconds: float = 60, pause: float = 0.5
    ) -> T:
        """Returns what `happened` returns, as soon as that is true."""
        result = with_deadline(happened, seconds, pause=pause)
        if result:
            return result
        raise AssertionError(f"no {what} within {seconds:g} s\n{self.story()}")

    def story(self) -> str:
        """The queue and the last lines of the daemons' logs, for a failed test."""
        logs = [
            file.read_text(errors="replace").splitlines()[-8:]
            for file in sorted(self.folder.glob("slurm*.log"))
        ]
        queue = ""
        if (self.folder / "slurm.conf").exists():
            queue = self.run("squeue", check=False)
        return "\n".join([queue, *(line for lines in logs for line in lines)])

    def _configure(self) -> None:
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        controller, *ports = (free_port() for _ in range(1 + len(NODES)))
        nodes = "\n".join(
            f"NodeName={node} NodeHostName={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} "
            "CPUs=2 "
            "RealMemory=1000 Gres=gpu:8"
            for node, port in zip(NODES, ports, strict=True)
        )
        for number in range(8):
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n")
        (self.folder / "slurm.conf").write_text(
            _CONFIG.format(
                host=socket.gethostname().split(".")[0],
                controller=controller,
                user=pwd.getpwuid(os.getuid()).pw_name,
                folder=self.folder,
                nodes=nodes,
            )
        )

    def _start(self, program: str, *words: str, name: str = "") -> None:
        path = shutil.which(program, path=_PATH)
        assert path, f"there is no {program}"
        with (self.folder / f"{name or program}.out").open("ab") as out:
            self._processes[name or program] = subprocess.Popen(
                [path, *words],
                env=self.environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _jobs(self) -> list[str]:
        if "slurmctld" not in self._processes:
            return []
        return self.run("squeue", "-h", "-o", "%i", check=False).split()


_ROOT = Path(__file__).parents[3]
_MUNGE_FILES = ("key-file", "socket", "pid-file", "log-file", "seed-file")


def with_deadline(happened: Callable[[], T], seconds: float, *, pause: float = 0.5) -> T | None:
    """Calls `happened` until it returns something true, and returns that; None after `seconds`.

    Most questions are a process of Slurm's: ten a second would cost as much as a short run.
    """
    ends = time.monotonic() + seconds
    while True:
        result = happened()
        if result:
            return result
        if time.monotonic() >= ends:
            return None
        time.sleep(pause)
