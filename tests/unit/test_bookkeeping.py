"""What a rank keeps of a long run does not grow with its steps."""

from __future__ import annotations

import importlib
import sys
import tracemalloc

import pytest

from tests.integration.conftest import ROOT


@pytest.mark.grid
def test_memory_does_not_grow_over_ten_thousand_steps_of_64_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Memory is measured after 4,000 / 32 steps, when the expected length of every
    prompt is known.
    """
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    run = importlib.import_module("bench_bookkeeping").Bookkeeping(ranks=64, prompts=4_000)
    for _ in range(200):
        run.step()

    tracemalloc.start()
    try:
        run.step()
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(10_000 - 201):
            run.step()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    # 64 bytes a step would already be 640 kB.
    assert after - before < 200_000
