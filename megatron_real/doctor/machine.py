"""One node: its GPUs, memory, limits, and the file system that the run writes to."""

from __future__ import annotations

import os
import resource
import shutil
import time
import uuid
from pathlib import Path

from megatron_real.doctor.finding import Finding, Verdict
from megatron_real.runs.disk_needs import DiskNeeds

PROBE_BYTES = 256 << 20
"""Written and read by the disk test."""
SLOW_DISK_MB = 100.0
"""MB/s below which a checkpoint of 100 GB takes a quarter of an hour."""
FREE_BYTES = 50 << 30
"""A 7B model's checkpoint is 107 GB; less than this holds not even one of 3B."""
OPEN_FILES = 1024
"""Descriptors of a process that do not depend on the number of ranks: libraries, weights, the
engine, verifiers."""
OPEN_FILES_PER_RANK = 6
"""gloo connects every pair of ranks of a group, in each of its groups: about 330 sockets in a
process of 64 ranks."""


def existing_folder(run_dir: Path) -> Path:
    """The run directory, or the nearest one above it that is there: looking makes no directories."""
    folders = (run_dir.absolute(), *run_dir.absolute().parents)
    return next(folder for folder in folders if folder.exists())


def machine(run_dir: Path, needs: DiskNeeds | None = None) -> list[Finding]:
    """This node's findings.

    Writes and removes one file in `run_dir`, or above it where it is not there yet.

    Args:
        needs: of the run that would write there, where it is known.
    """
    return [
        gpus(local_world=int(os.environ.get("LOCAL_WORLD_SIZE", "1"))),
        _host_memory(),
        _shared_memory(),
        *_limits(),
        _infiniband(),
        file_system(run_dir),
        _free(run_dir, needs),
        disk_speed(run_dir),
    ]


def gpus(*, local_world: int, driver: Path = Path("/proc/driver/nvidia")) -> Finding:
    """The GPUs that torch sees, against the processes on this node."""
    import torch

    if not torch.cuda.is_available():
        if driver.exists():
            why = (
                "torch is a CPU build"
                if torch.version.cuda is None
                else f"torch wants CUDA {torch.version.cuda}"
            )
            remedy = f"{why}: take a torch build for this driver, and ask for GPUs (sbatch --gpus-per-node)"
            return Finding(
                "fail", "GPU", "an NVIDIA driver is loaded, but torch sees no GPU", remedy
            )
        return Finding("warn", "GPU", "none: megatron-core runs on the CPU", "start on a GPU node")
    count, of = torch.cuda.device_count(), torch.cuda.get_device_properties(0)
    found = f"{count} x {of.name}, {of.total_memory / 2**30:.1f} GiB, compute capability {of.major}.{of.minor}"
    if count < local_world:
        remedy = f"start {count} processes a node, or ask Slurm for {local_world} GPUs a node"
        return Finding("fail", "GPU", f"{found}, for {local_world} processes on this node", remedy)
    return Finding("ok", "GPU", found)


def _host_memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    found = f"{memory.available / 2**30:.0f} of {memory.total / 2**30:.0f} GiB free, {os.cpu_count()} CPUs"
    if memory.available < 0.1 * memory.total:
        return Finding("warn", "host memory", found, "end what else runs on this node")
    return Finding("ok", "host memory", found)


def _shared_memory() -> Finding:
    size = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    found = f"{size / 2**30:.2f} GiB in /dev/shm"
    if size < 1 << 30:
        return Finding(
            "fail", "shared memory", found, "start the container with --ipc=host or --shm-size=16g"
        )
    return Finding("ok", "shared memory", found)


def _limits() -> list[Finding]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    findings = [open_files(files, world=int(os.environ.get("WORLD_SIZE", "1")))]
    if _adapters() and locked != resource.RLIM_INFINITY:
        remedy = (
            "ulimit -l unlimited, or docker run --ulimit memlock=-1: InfiniBand registers memory"
        )
        findings.append(Finding("fail", "locked memory", _limit(locked), remedy))
    else:
        findings.append(Finding("ok", "locked memory", _limit(locked)))
    return findings


def open_files(limit: int, *, world: int) -> Finding:
    """The limit of open files against what a process of so many ranks opens; -1 is no limit."""
    needed = OPEN_FILES + OPEN_FILES_PER_RANK * world
    if limit == resource.RLIM_INFINITY or limit >= needed:
        return Finding("ok", "open files", _limit(limit))
    found = f"{_limit(limit)}, and a process among {world:,} ranks opens up to {needed:,}"
    # Without the sockets of all pairs no group of all ranks can be made.
    verdict: Verdict = "fail" if limit < OPEN_FILES_PER_RANK * world else "warn"
    return Finding(verdict, "open files", found, f"ulimit -n {max(needed, 65536)}")


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value:,}"


def _adapters() -> list[str]:
    folder = Path("/sys/class/infiniband")
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


def _infiniband() -> Finding:
    adapters, nodes = (
        _adapters(),
        int(os.environ.get("WORLD_SIZE", "1")) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )
    if nodes > 1 and not adapters:
        remedy = "in a container mount /dev/infiniband and /sys/class/infiniband, else ask the cluster's support"
        return Finding(
            "warn", "InfiniBand", f"no adapter for {nodes} nodes: NCCL falls back to TCP", remedy
        )
    return Finding(
        "ok", "InfiniBand", " ".join(adapters) or "no adapter, and none needed on one node"
    )


def file_system(run_dir: Path, mounts: Path = Path("/proc/self/mounts")) -> Finding:
    """What the run directory lies on: a container's own layer and memory are lost with the job."""
    existing = existing_folder(run_dir).resolve()
    points = [line.split()[1:3] for line in mounts.read_text().splitlines()]
    _, kind = max(
        (m for m in points if existing.is_relative_to(m[0])),
        key=lambda m: len(m[0]),
        default=("/", "unknown"),
    )
    if kind in ("tmpfs", "ramfs", "overlay"):
        remedy = (
            "set trainer.run_dir to a file system that outlives the job, mounted into the container"
        )
        return Finding(
            "warn",
            "file system",
            f"{run_dir} is on {kind}, which ends with the node or container",
            remedy,
        )
    return Finding("ok", "file system", f"{run_dir} is on {kind}")


def _free(run_dir: Path, needs: DiskNeeds | None = None) -> Finding:
    """The room on the disk against what the whole run takes there."""
    free = shutil.disk_usage(existing_folder(run_dir)).free
    if needs is None:
        if free < FREE_BYTES:
            return Finding("warn", "free space", _gib(free), "make room, or keep fewer checkpoints")
        return Finding("ok", "free space", _gib(free))
    found = (
        f"{_gib(free)}, and the run takes up to {_gib(needs.total)}: {needs.num_checkpoints} checkpoints of "
        f"{_gib(needs.checkpoint)}, rollouts {_gib(needs.rollouts)}, export {_gib(needs.export)}"
    )
    if free >= needs.total:
        return Finding("ok", "free space", found)
    remedy = "make room, raise checkpoint.keep_every, or set rollout.keep_steps"
    # With less than two checkpoints' room not even the first one can be replaced.
    verdict: Verdict = "fail" if free < 2 * needs.checkpoint else "warn"
    return Finding(verdict, "free space", found, remedy)


def _gib(size: int) -> str:
    return f"{size / 2**30:.{0 if size >= 10 << 30 else 1}f} GiB"


def disk_speed(run_dir: Path) -> Finding:
    """Writes, syncs, renames and reads a file, as a checkpoint does."""
    file = existing_folder(run_dir) / f".doctor-{uuid.uuid4().hex}"
    try:
        try:
            write_mb, read_mb = _written_and_read(file)
        finally:
            for left in (file, file.with_suffix(".begun")):
                left.unlink(missing_ok=True)
    except OSError as error:
        return Finding(
            "fail",
            "disk speed",
            f"{run_dir} cannot be written: {error}",
            "set another trainer.run_dir",
        )
    found = f"write and fsync {write_mb:,.0f} MB/s, read {read_mb:,.0f} MB/s"
    if write_mb < SLOW_DISK_MB:
        return Finding(
            "warn",
            "disk speed",
            found,
            "checkpoints will be slow: use the cluster's parallel file system",
        )
    return Finding("ok", "disk speed", found)


def _written_and_read(file: Path) -> tuple[float, float]:
    """MB/s of each."""
    block, begun = (
        os.urandom(16 << 20),
        file.with_suffix(".begun"),
    )  # zeros would flatter a file system that compresses
    started = time.perf_counter()
    with open(begun, "wb") as out:
        for _ in range(PROBE_BYTES // len(block)):
            out.write(block)
        out.flush()
        os.fsync(out.fileno())
        os.posix_fadvise(
            out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED
        )  # else the page cache answers the read
    begun.rename(file)
    written = time.perf_counter()
    with open(file, "rb", buffering=0) as back:
        while back.read(len(block)):
            pass
    return PROBE_BYTES / 1e6 / (written - started), PROBE_BYTES / 1e6 / (
        time.perf_counter() - written
    )
