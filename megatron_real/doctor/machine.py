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
engine, verifiers, and the 17 sockets of the lifeline."""
OPEN_FILES_PER_RANK = 6
"""Sockets of a process for each rank: one in each gloo group. Two groups of all ranks are ours, one
is vLLM's, and three of megatron-core are of data-parallel ranks, which are all of them at most."""


def existing_folder(run_dir: Path) -> Path:
    """Returns the run directory, or the nearest one above it that is there.

    Looking makes no directories.
    """
    folders = (run_dir.absolute(), *run_dir.absolute().parents)
    return next(folder for folder in folders if folder.exists())


def machine(run_dir: Path, needs: DiskNeeds | None = None) -> list[Finding]:
    """Returns this node's findings.

    Writes and removes one file in `run_dir`, or above it where it is not there yet.

    Args:
        run_dir: where the run would write.
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
    """Compares the GPUs that torch sees with the processes on this node.

    Args:
        local_world: processes on this node.
        driver: is there where an NVIDIA driver is loaded.
    """
    import torch

    if not torch.cuda.is_available():
        if not driver.exists():
            nothing = "none: megatron-core runs on the CPU"
            return Finding("warn", "GPU", nothing, "start on a GPU node")
        # The driver is there: it is torch that does not fit it, or a job that asked for no GPU.
        why = f"torch wants CUDA {torch.version.cuda}"
        if torch.version.cuda is None:
            why = "torch is a CPU build"
        return Finding(
            "fail",
            "GPU",
            "an NVIDIA driver is loaded, but torch sees no GPU",
            f"{why}: take a torch build for this driver, and ask for GPUs (sbatch --gpus-per-node)",
        )

    # The GPUs of a node are taken to be alike.
    count = torch.cuda.device_count()
    first = torch.cuda.get_device_properties(0)
    description = (
        f"{count} x {first.name}, {first.total_memory / 2**30:.1f} GiB, compute capability "
        f"{first.major}.{first.minor}"
    )
    if count < local_world:
        return Finding(
            "fail",
            "GPU",
            f"{description}, for {local_world} processes on this node",
            f"start {count} processes a node, or ask Slurm for {local_world} GPUs a node",
        )

    return Finding("ok", "GPU", description)


def _host_memory() -> Finding:
    """Compares the free memory of this node with all of it."""
    import psutil

    memory = psutil.virtual_memory()
    description = (
        f"{memory.available / 2**30:.0f} of {memory.total / 2**30:.0f} GiB free, "
        f"{os.cpu_count()} CPUs"
    )
    if memory.available < 0.1 * memory.total:
        return Finding("warn", "host memory", description, "end what else runs on this node")
    return Finding("ok", "host memory", description)


def _shared_memory() -> Finding:
    """Returns the size of /dev/shm, which NCCL and vLLM use; a container's default is 64 MB."""
    size = 0
    if Path("/dev/shm").is_dir():
        size = shutil.disk_usage("/dev/shm").total
    description = f"{size / 2**30:.2f} GiB in /dev/shm"
    if size < 1 << 30:
        remedy = "start the container with --ipc=host or --shm-size=16g"
        return Finding("fail", "shared memory", description, remedy)
    return Finding("ok", "shared memory", description)


def _limits() -> list[Finding]:
    """Compares this process's limits with what a run needs: open files and locked memory."""
    # The soft limits, which are those that hold; a process may raise them up to the hard ones.
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
    """Compares the limit of open files with what a process of so many ranks opens.

    Args:
        limit: descriptors of a process; -1 is no limit.
        world: ranks.
    """
    needed = OPEN_FILES + OPEN_FILES_PER_RANK * world
    if limit == resource.RLIM_INFINITY or limit >= needed:
        return Finding("ok", "open files", _limit(limit))

    # Without the sockets of all pairs no group of all ranks can be made.
    verdict: Verdict = "warn"
    if limit < OPEN_FILES_PER_RANK * world:
        verdict = "fail"
    description = f"{_limit(limit)}, and a process among {world:,} ranks opens up to {needed:,}"
    return Finding(verdict, "open files", description, f"ulimit -n {max(needed, 65536)}")


def _limit(value: int) -> str:
    if value == resource.RLIM_INFINITY:
        return "unlimited"
    return f"{value:,}"


def _adapters() -> list[str]:
    """Returns the names of this node's InfiniBand adapters."""
    folder = Path("/sys/class/infiniband")
    if not folder.is_dir():
        return []
    return sorted(adapter.name for adapter in folder.iterdir())


def _infiniband() -> Finding:
    """Returns the adapters by which this node reaches the others."""
    adapters = _adapters()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    num_nodes = world // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if adapters:
        return Finding("ok", "InfiniBand", " ".join(adapters))
    if num_nodes > 1:
        return Finding(
            "warn",
            "InfiniBand",
            f"no adapter for {num_nodes} nodes: NCCL falls back to TCP",
            "in a container mount /dev/infiniband and /sys/class/infiniband, else ask the "
            "cluster's support",
        )

    return Finding("ok", "InfiniBand", "no adapter, and none needed on one node")


def file_system(run_dir: Path, mounts: Path = Path("/proc/self/mounts")) -> Finding:
    """Returns what the run directory lies on.

    A container's own layer and memory are lost with the job.

    Args:
        run_dir: where the run would write.
        mounts: the kernel's table of mounts.
    """
    existing = existing_folder(run_dir).resolve()
    # The deepest mount above the folder is the one that it lies on.
    deepest = ""
    kind = "unknown"
    for line in mounts.read_text().splitlines():
        # A line is: device, mount point, kind, options and two numbers (fstab(5)).
        _, mount, mount_kind, *_ = line.split()
        if existing.is_relative_to(mount) and len(mount) > len(deepest):
            deepest = mount
            kind = mount_kind

    if kind in ("tmpfs", "ramfs", "overlay"):
        return Finding(
            "warn",
            "file system",
            f"{run_dir} is on {kind}, which ends with the node or container",
            "set trainer.run_dir to a file system that outlives the job, mounted into the "
            "container",
        )

    return Finding("ok", "file system", f"{run_dir} is on {kind}")


def _free(run_dir: Path, needs: DiskNeeds | None = None) -> Finding:
    """Compares the room on the disk with what the whole run takes there."""
    free = shutil.disk_usage(existing_folder(run_dir)).free
    if needs is None:
        if free < FREE_BYTES:
            return Finding("warn", "free space", _gib(free), "make room, or keep fewer checkpoints")
        return Finding("ok", "free space", _gib(free))

    description = (
        f"{_gib(free)}, and the run takes up to {_gib(needs.total)}: {needs.num_checkpoints} "
        f"checkpoints of {_gib(needs.checkpoint)}, rollouts {_gib(needs.rollouts)}, export "
        f"{_gib(needs.export)}"
    )
    if free >= needs.total:
        return Finding("ok", "free space", description)

    # With less than two checkpoints' room not even the first one can be replaced.
    verdict: Verdict = "warn"
    if free < 2 * needs.checkpoint:
        verdict = "fail"
    remedy = "make room, raise checkpoint.keep_every, or set rollout.keep_steps or keep_groups"
    return Finding(verdict, "free space", description, remedy)


def _gib(size: int) -> str:
    """Returns bytes as GiB, with a decimal below 10."""
    num_decimals = 1
    if size >= 10 << 30:
        num_decimals = 0
    return f"{size / 2**30:.{num_decimals}f} GiB"


def disk_speed(run_dir: Path) -> Finding:
    """Writes, syncs, renames and reads a file, as a checkpoint does."""
    # A name that no other doctor has, which may look at the same folder now.
    file = existing_folder(run_dir) / f".doctor-{uuid.uuid4().hex}"
    try:
        try:
            write_mb, read_mb = _written_and_read(file)
        finally:
            # A full disk leaves the unfinished file.
            for leftover in (file, file.with_suffix(".begun")):
                leftover.unlink(missing_ok=True)
    except OSError as error:
        return Finding(
            "fail",
            "disk speed",
            f"{run_dir} cannot be written: {error}",
            "set another trainer.run_dir",
        )

    description = f"write and fsync {write_mb:,.0f} MB/s, read {read_mb:,.0f} MB/s"
    if write_mb < SLOW_DISK_MB:
        return Finding(
            "warn",
            "disk speed",
            description,
            "checkpoints will be slow: use the cluster's parallel file system",
        )

    return Finding("ok", "disk speed", description)


def _written_and_read(file: Path) -> tuple[float, float]:
    """Returns MB/s of writing a file and of reading it."""
    block = os.urandom(16 << 20)  # zeros would flatter a file system that compresses
    unfinished = file.with_suffix(".begun")

    started = time.perf_counter()
    with open(unfinished, "wb") as out:
        for _ in range(PROBE_BYTES // len(block)):
            out.write(block)
        out.flush()
        os.fsync(out.fileno())
        # Else the page cache answers the read.
        os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    # As a checkpoint does, so that a file system without renames is found out here.
    unfinished.rename(file)
    written = time.perf_counter()

    with open(file, "rb", buffering=0) as back:
        while back.read(len(block)):
            pass
    read = time.perf_counter()
    return PROBE_BYTES / 1e6 / (written - started), PROBE_BYTES / 1e6 / (read - written)
