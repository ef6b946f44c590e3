"""A committed round's update, added to the parameters as the coordinator added it. Pure numpy.

Reference parameters are the float32 sum of decoded updates, so whoever holds a round's start and its update has the
round's end, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from swarm.compress import FrameContext, decode
from swarm.errors import CorruptData
from swarm.optim.params import block_hash

F32 = NDArray[np.float32]


def updated_block(
    block: str, before: Mapping[str, F32], frame: bytes, job_id: str, round: int, expected: bytes
) -> dict[str, F32]:
    """One block's parameters after a round, by key; `before` is not changed. An empty frame changes nothing.

    `expected` is the block's hash after the round. Raises CodecError: the frame is damaged, or is for other parameters;
    CorruptData: what comes out has another hash.
    """
    after = dict(before)
    if frame:
        shapes = {key: value.shape for key, value in before.items()}
        decoded = decode(frame, shapes, FrameContext(job_id, round, block_hash(before)))
        after = {key: value + decoded[key] for key, value in before.items()}
    if block_hash(after) != expected:
        raise CorruptData(f"block {block} has other parameters than the coordinator after round {round}")
    return after
