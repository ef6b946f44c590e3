"""The codec's machine code, made before a round needs it.

In: settings. Out: nothing but compiled code. On a machine that never encoded or decoded before that takes a core
about ten seconds, which would otherwise be the first round's; later processes read it from the cache (`swarm.jit`).
"""

from __future__ import annotations

import numpy as np

from swarm.compress.feedback import compress_with_feedback
from swarm.compress.frame import FrameContext
from swarm.config import CodecSettings

_CONTEXT = FrameContext("", 0, bytes(32))
_SHAPES = ((2, 4096), (8, 64), (3,))
"""Of several chunks, of a part of one, and of next to nothing."""


def compile_ahead(*settings: CodecSettings) -> None:
    """Encode and decode a made frame with each of `settings`. Blocks."""
    chance = np.random.default_rng(0)
    made = {f"0/{n}": chance.standard_normal(shape, dtype=np.float32) for n, shape in enumerate(_SHAPES)}
    for each in settings:
        compress_with_feedback(made, None, each, _CONTEXT)
