"""The names that `swarm` offers, and that asking for none of them costs nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

import swarm


def test_every_public_name_is_there() -> None:
    for name in swarm.__all__:
        assert getattr(swarm, name).__name__ == name
    assert set(swarm.__all__) <= set(dir(swarm))
    with pytest.raises(AttributeError):
        swarm.nothing  # noqa: B018


def test_importing_swarm_loads_no_torch() -> None:
    check = "import swarm, sys; swarm.parse_join, swarm.SwarmError; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)
