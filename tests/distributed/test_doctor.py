"""The doctor's checks that need several ranks, on real gloo, with and without a fault."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.distributed import doctor_jobs
from tests.distributed.world import World

pytestmark = pytest.mark.one_version


@pytest.mark.parametrize(("ahead", "verdict"), [(0.0, "ok"), (3.0, "warn"), (-3.0, "warn")])
def test_clock_skew_is_measured(world: World, ahead: float, verdict: str) -> None:
    findings = world.run(doctor_jobs.clocks, 4, nodes=2, ahead=ahead)

    assert len(set(findings)) == 1
    assert findings[0].verdict == verdict
    figures = re.findall(r"[-+]?[\d.]+(?= ms|\))", findings[0].found)
    skew_ms, error_ms = (float(figure) for figure in figures)
    # A busy machine delays a message by more than it says itself: 10 ms.
    assert skew_ms == pytest.approx(1e3 * ahead, abs=10 + error_ms)
    assert "on n1 against n0" in findings[0].found


def test_one_node_has_one_clock(world: World) -> None:
    assert {f.found for f in world.run(doctor_jobs.clocks, 2, nodes=1, ahead=0.0)} == {"one node"}


def test_a_directory_that_nodes_do_not_share_fails(world: World, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    own = tmp_path / "own"
    shared.mkdir()
    own.mkdir()

    findings = world.run(doctor_jobs.shared_directory, 2, directories=[shared, shared])
    assert {f.verdict for f in findings} == {"ok"}

    findings = world.run(doctor_jobs.shared_directory, 2, directories=[shared, own])
    assert {f.verdict for f in findings} == {"fail"}
    assert all(f.found.startswith("ranks [1] do not see") for f in findings)
    assert not list(shared.iterdir())


def test_a_wrong_sum_fails_on_every_rank(world: World) -> None:
    sound = world.run(doctor_jobs.all_reduce, 4, faulty_rank=None)
    assert {f.verdict for f in sound} == {"ok"} and "4 ranks, 2 nodes: 4 MiB" in sound[0].found

    faulty = world.run(doctor_jobs.all_reduce, 4, faulty_rank=2)
    assert {(f.verdict, f.found) for f in faulty} == {("fail", "the sum is off by 1")}


def test_the_report_is_the_same_on_every_rank(world: World, tmp_path: Path) -> None:
    findings = world.run(doctor_jobs.reported, 4, run_dir=tmp_path / "run")

    assert findings[0] == findings[1] == findings[2] == findings[3]
    by_name = {(f.name, f.nodes) for f in findings[0]}
    assert ("torch", ()) in by_name
    assert {("disk speed", ("n0",)), ("disk speed", ("n1",))} <= by_name
    assert ("InfiniBand", ()) in by_name
