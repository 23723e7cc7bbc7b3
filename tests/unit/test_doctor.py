"""What the doctor finds in one process, each finding in order and broken.

What several ranks find together is in tests/distributed/test_doctor.py.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
from pathlib import Path

import pytest
import torch

from megatron_real.doctor import machine
from megatron_real.doctor.finding import Finding, merged
from megatron_real.doctor.software import software
from megatron_real.runs.disk_needs import DiskNeeds
from tests import zygote

ROOT = Path(__file__).parents[2]


def doctor(run_dir: Path, *, processes: int = 1) -> tuple[int, dict[str, dict[str, str]]]:
    """Returns the exit code of the command line, and its findings by name."""
    launcher: list[str] = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command = [
        sys.executable,
        *launcher,
        "-m",
        "megatron_real",
        "doctor",
        "--json",
        "--run-dir",
        str(run_dir),
    ]
    completed = zygote.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert completed.stdout.startswith("["), completed.stderr

    return completed.returncode, {
        finding["name"]: finding for finding in json.loads(completed.stdout)
    }


def installed(folder: Path, name: str, version: str) -> None:
    """Makes pip's record of a package without the package."""
    record = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def software_finding(name: str) -> Finding:
    (finding,) = (f for f in software() if f.name == name)
    return finding


def test_the_command_line_reports_every_part(tmp_path: Path) -> None:
    code, findings = doctor(tmp_path / "run", processes=2)
    assert code == 0
    assert findings["torch"]["found"].startswith(torch.__version__)
    assert findings["all-reduce"]["found"].startswith("2 ranks, 1 node: 32 MiB in ")
    assert findings["shared directory"]["verdict"] == findings["megatron-core"]["verdict"] == "ok"
    assert all(f["remedy"] for f in findings.values() if f["verdict"] == "fail")
    assert list(tmp_path.iterdir()) == [], "to look at a run directory does not make it"


def test_a_run_directory_that_cannot_be_written_fails_the_command(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, findings = doctor(tmp_path / "file" / "run")
    assert code == 1
    assert "cannot be written" in findings["disk speed"]["found"]
    assert findings["shared directory"]["verdict"] == "fail"


def test_an_old_megatron_core_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert software_finding("megatron-core").verdict == "ok"
    installed(tmp_path, "megatron-core", "0.15.3")
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = software_finding("megatron-core")
    assert finding.verdict == "fail"
    assert "0.15.3" in finding.found


def test_an_empty_transformer_engine_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package of that name on PyPI has metadata and no code."""
    installed(tmp_path, "transformer-engine", "9.9.9")
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = software_finding("transformer-engine")
    assert finding.verdict == "fail"
    assert "9.9.9 is installed, but ModuleNotFoundError" in finding.found


def test_an_unrelated_apex_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, "apex", "0.9.10")
    (tmp_path / "apex.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = software_finding("apex")
    assert finding.verdict == "warn" and "fused Adam" in finding.found


@pytest.mark.parametrize(
    ("mount", "verdict"),
    [("lustre", "ok"), ("nfs4", "ok"), ("overlay", "warn"), ("tmpfs", "warn")],
)
def test_the_file_system_is_that_of_the_deepest_mount(
    tmp_path: Path, mount: str, verdict: str
) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        f"a / ext4 rw 0 0\nb {tmp_path} {mount} rw 0 0\nc {tmp_path}-other overlay rw 0 0\n"
    )
    finding = machine.file_system(tmp_path / "not" / "yet", mounts)
    assert (finding.verdict, mount in finding.found) == (verdict, True)


def test_disk_speed_leaves_nothing_and_fails_on_a_file(tmp_path: Path) -> None:
    finding = machine.disk_speed(tmp_path / "run" / "of" / "somebody")
    assert finding.verdict in ("ok", "warn") and "MB/s" in finding.found
    assert list(tmp_path.iterdir()) == [], "to look at a run directory does not make it"
    (tmp_path / "file").touch()
    assert machine.disk_speed(tmp_path / "file").verdict == "fail"


def test_a_full_disk_fails_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit on file sizes stands in for a full disk: the kernel refuses a write beyond it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, hard))
    try:
        finding = machine.disk_speed(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert finding.verdict == "fail" and "File too large" in finding.found
    assert list(tmp_path.iterdir()) == []


def test_a_low_limit_of_open_files_is_warned_of() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        finding = next(f for f in machine._limits() if f.name == "open files")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    measured = "1,024, and a process among 1 ranks opens up to 1,030"
    assert finding == Finding("warn", "open files", measured, "ulimit -n 65536")


@pytest.mark.parametrize(
    ("limit", "world", "verdict"),
    [
        pytest.param(1408, 64, "ok", id="64 ranks: 1,024 and 6 for each"),
        pytest.param(1407, 64, "warn", id="one less"),
        pytest.param(65536, 4096, "ok", id="the usual limit, 4,096 ranks"),
        pytest.param(16384, 4096, "fail", id="no socket for every pair"),
        pytest.param(resource.RLIM_INFINITY, 4096, "ok", id="no limit"),
    ],
)
def test_the_limit_of_open_files_is_compared_with_the_number_of_ranks(
    limit: int, world: int, verdict: str
) -> None:
    assert machine.open_files(limit, world=world).verdict == verdict


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_driver_that_torch_does_not_see_fails(tmp_path: Path) -> None:
    assert machine.gpus(local_world=1, driver=tmp_path / "none").verdict == "warn"
    finding = machine.gpus(local_world=1, driver=tmp_path)
    assert finding.verdict == "fail" and "torch is a CPU build" in finding.remedy


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_more_processes_than_gpus_fail() -> None:
    count = torch.cuda.device_count()
    assert machine.gpus(local_world=count).verdict == "ok"
    assert machine.gpus(local_world=count + 1).verdict == "fail"


def test_free_space_is_that_of_the_disk(tmp_path: Path) -> None:
    finding = machine._free(tmp_path / "not" / "yet")
    assert finding.found == f"{shutil.disk_usage(tmp_path).free / 2**30:.0f} GiB"


@pytest.mark.parametrize(("checkpoint", "verdict"), [(1, "ok"), (0.3, "warn"), (0.6, "fail")])
def test_free_space_is_compared_with_the_needs_of_the_whole_run(
    tmp_path: Path, checkpoint: float, verdict: str
) -> None:
    """Sizes are shares of the free space: ten checkpoints of 0.3 do not fit; of 0.6 not even two
    do.
    """
    free = shutil.disk_usage(tmp_path).free
    size = 1 if checkpoint == 1 else int(checkpoint * free)
    needs = DiskNeeds(checkpoint=size, num_checkpoints=10, rollouts=0, export=0)
    finding = machine._free(tmp_path, needs)
    assert finding.verdict == verdict and "10 checkpoints of" in finding.found


def test_findings_of_nodes_are_merged_in_order() -> None:
    # Two nodes agree on everything, and the one between them has another torch.
    both = [Finding("ok", "torch", "2.8"), Finding("ok", "NCCL", "2.27")]
    other = [Finding("ok", "torch", "2.7"), Finding("ok", "NCCL", "2.27")]
    lines = merged({"n1": both, "n2": other, "n3": both})
    assert [(f.found, f.nodes) for f in lines] == [
        ("2.8", ("n1", "n3")),
        ("2.7", ("n2",)),
        ("2.27", ()),
    ]
    assert str(lines[1]) == "ok    torch                 2.7 [n2]"
    assert (
        str(Finding("warn", "apex", "none", "use NGC"))
        == "warn  apex                  none; use NGC"
    )
