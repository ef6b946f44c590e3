"""After `compile_ahead`, a round's frames compile nothing, in a process that found no compiled code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROUNDS = """
import numpy as np
from numba.core import event
from swarm.compress import FrameContext, compile_ahead, compress_with_feedback
from swarm.config import CodecSettings

settings = [
    CodecSettings(),
    CodecSettings(density=0.015625, bits=1),
    CodecSettings(density=0.125, bits=4, decay=1.0),
    CodecSettings(random_keep=0.2, density=0.1, bits=8, allocation="energy"),
    CodecSettings(kind="dense"),
]
compile_ahead(*settings)
chance = np.random.default_rng(1)
shapes = {f"{block}/w.lora_{ab}": (8, 5000) for block in range(3) for ab in "AB"}
delta = {key: chance.standard_t(3, shape).astype(np.float32) for key, shape in shapes.items()}
with event.install_recorder("numba:compile") as recorder:
    for each in settings:
        sent = compress_with_feedback(delta, None, each, FrameContext("job", 1, bytes(32)))
        compress_with_feedback(delta, sent.residual, each, FrameContext("job", 2, bytes(32)))
print(len(recorder.buffer))
"""


def test_a_round_compiles_nothing_more(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ROUNDS]
    run = subprocess.run(
        command, env={"NUMBA_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, check=True, timeout=240
    )
    assert run.stdout.split() == ["0"]
