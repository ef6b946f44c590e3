"""What every test may ask for."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from swarm.samples import smollm2_folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seeds",
        type=int,
        default=2,
        help="How many seeds every test of the marker `faults` runs on (make faults: 20).",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A crash test with an argument `seed` runs once a seed."""
    if "seed" in metafunc.fixturenames and metafunc.definition.get_closest_marker("faults"):
        metafunc.parametrize("seed", range(metafunc.config.getoption("--seeds")))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The checkpoint folder of the real model; the first test run on a machine converts it."""
    return smollm2_folder()


# A shared machine may take any time for a single example; pytest's own timeout catches what hangs.
settings.register_profile("swarm", deadline=None)
settings.load_profile("swarm")
