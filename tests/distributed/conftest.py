"""The workers, started once for all distributed tests and gone before other tests run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.world import World


@pytest.fixture(scope="package")
def world() -> Iterator[World]:
    workers = World(8)
    yield workers
    workers.close()
