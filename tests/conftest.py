"""What every test may ask for."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from swarm.samples import smollm2_folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The checkpoint folder of the real model; the first test run on a machine converts it."""
    return smollm2_folder()


# A shared machine may take any time for a single example; pytest's own timeout catches what hangs.
settings.register_profile("swarm", deadline=None)
settings.load_profile("swarm")
