"""Error feedback: what a frame could not carry waits for the next one.

In: this round's delta and the residual of earlier rounds. Out: the frame, what its receivers will
decode, and the new residual, which the caller stores. What is sent plus what remains is what was
to be sent: decoded + residual == delta + decay * old residual, up to float32 rounding.

Sources: 1-bit SGD (Seide et al., 2014); the decay is SparseLoCo's 0.95 (Sarfi et al., 2025), which
lets stale directions fade. Never mutates its arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swarm.compress.codec import decode, encode, shapes_of
from swarm.compress.frame import FrameContext
from swarm.config import CodecSettings
from swarm.errors import CodecError


@dataclass(frozen=True)
class Compressed:
    """A frame, the tensors it decodes to and what it left out, both float32 in key order."""

    frame: bytes
    decoded: dict[str, NDArray[np.float32]]
    residual: dict[str, NDArray[np.float32]]


def compress_with_feedback(
    delta: Mapping[str, NDArray[np.float32]],
    residual: Mapping[str, NDArray[np.float32]] | None,
    settings: CodecSettings,
    context: FrameContext,
) -> Compressed:
    """Encode `delta` plus the decayed `residual`, which counts as zero where a key is absent.

    Raises CodecError as `encode` does, and for a residual of another shape or of a key that `delta`
    lacks: dropping the residual of a lost block is the caller's decision, to be reported.
    """
    residual = residual or {}
    shapes = shapes_of(delta)
    for key, shape in shapes_of(residual).items():
        if shapes.get(key) != shape:
            raise CodecError(f"the residual of {key!r} has shape {shape}, its delta {shapes.get(key, 'is absent')}")
    decay = np.float32(settings.decay)
    corrected = dict(delta)
    for key in residual:
        with np.errstate(over="ignore"):  # `encode` refuses it, and names the key
            # asarray: arithmetic turns arrays of rank 0 into scalars.
            corrected[key] = np.asarray(delta[key] + decay * residual[key])
    frame = encode(corrected, settings, context)
    decoded = decode(frame, shapes, context)
    rest = {key: np.asarray(corrected[key] - sent) for key, sent in decoded.items()}
    return Compressed(frame, decoded, rest)
