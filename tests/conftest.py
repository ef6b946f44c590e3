"""What every test may ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarm.samples import smollm2_folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The checkpoint folder of the real model; the first test run on a machine converts it."""
    return smollm2_folder()
