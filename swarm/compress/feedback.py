"""Error feedback: what a frame could not carry waits for the next one.

In: this round's delta and the residual of earlier rounds. Out: the frame, what its receivers will
decode, and the new residual, which the caller stores. What is sent plus what remains is what was
to be sent: decoded + residual == delta + decay * old residual, up to float32 rounding.

The sum is made in the memory that becomes the residual, so nothing of the contribution's size is held
besides the two results.

Sources: 1-bit SGD (Seide et al., 2014); the decay is SparseLoCo's 0.95 (Sarfi et al., 2025), which
lets stale directions fade. Never mutates its arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swarm.compress.codec import decode, encode_flat, parts_of, shapes_of
from swarm.compress.frame import FrameContext, layout_of
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
    layout = layout_of(shapes)
    flat = np.empty(layout.elements, np.float32)
    rest = parts_of(flat, layout)
    decay = np.float32(settings.decay)
    with np.errstate(over="ignore", invalid="ignore"):  # `encode_flat` refuses what is not finite, and names the key
        for key, sum_ in rest.items():
            if key in residual:
                np.multiply(residual[key], decay, out=sum_)
                np.add(sum_, delta[key], out=sum_)
            else:
                sum_[...] = delta[key]
    frame = encode_flat(flat, layout, settings, context)
    decoded = decode(frame, shapes, context)
    for key, sent in decoded.items():
        np.subtract(rest[key], sent, out=rest[key])
    return Compressed(frame, decoded, rest)
