"""Swarms of real processes that several tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.processes import Swarm, swarm_of


@pytest.fixture(scope="module")
def serving_swarm(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    """Both topologies at once: half of the blocks on each of two nodes, and all blocks on a third."""
    nodes = {"half-a": "0:15", "half-b": "15:30", "whole": "0:30"}
    with swarm_of(tmp_path_factory.mktemp("serving"), smollm2, nodes) as swarm:
        yield swarm
