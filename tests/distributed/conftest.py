"""Where the ranks of distributed tests come from."""

from __future__ import annotations

import pytest

from tests.distributed.world import World


@pytest.fixture(scope="session")
def world() -> World:
    return World()
