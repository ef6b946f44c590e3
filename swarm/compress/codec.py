"""From named tensors to a frame and back.

In: float32 numpy arrays by parameter key and the settings, or a frame and the shapes it must
have. Out: a frame, or new float32 arrays, equal bit for bit wherever they are decoded.

`cocktail` keeps, chunk by chunk, the largest values of a seeded random subset at a few bits each;
the other coordinates decode to zero. `dense` sends every value as it is. Never mutates its
arguments, never allocates by a number in a frame, never lets a value through that is not finite.

The arrays of a result share one memory block, as they lie in the frame.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from swarm.compress.frame import FrameContext, Layout, Shape, layout_of, read_frame, write_frame
from swarm.config import CodecSettings
from swarm.errors import CodecError

Float32 = NDArray[np.float32]


def encode(tensors: Mapping[str, Float32], settings: CodecSettings, context: FrameContext) -> bytes:
    """One frame of `tensors`, keyed "<block>/<tensor>", any shapes.

    Raises CodecError, naming the key: not a float32 array, values that are not finite, a malformed
    key, an empty tensor.
    """
    layout = layout_of(shapes_of(tensors))
    flat = np.empty(layout.elements, np.float32)
    for key, part in parts_of(flat, layout).items():
        part[...] = tensors[key]
    return encode_flat(flat, layout, settings, context)


def encode_flat(flat: Float32, layout: Layout, settings: CodecSettings, context: FrameContext) -> bytes:
    """As `encode`, of values that lie one after the other already."""
    # numba takes a second to load: only who encodes or decodes pays for it.
    from swarm.compress import cocktail, select

    if select.count_unfinite(flat):
        _refuse_unfinite(flat, layout)
    if settings.kind == "dense":
        body = flat.astype("<f4", copy=False).tobytes()
    else:
        body = cocktail.encode(flat, layout, settings, context)
    return write_frame(settings, context, layout, body)


def decode(frame: bytes | memoryview, shapes: Mapping[str, Shape], context: FrameContext) -> dict[str, Float32]:
    """The tensors of a frame, in key order, newly allocated.

    `shapes`: exactly the keys and shapes expected. Raises FrameTooLarge for a frame, or a part of
    it, beyond what these shapes can need; CodecError, saying what is wrong, for anything else
    that is not a whole frame of exactly these tensors in exactly this context.
    """
    from swarm.compress import cocktail, select

    layout = layout_of(shapes)
    settings, body = read_frame(frame, layout, context)
    if settings.kind == "dense":
        if len(body) != 4 * layout.elements:
            raise CodecError(f"the frame holds {len(body)} bytes of values, expected are {4 * layout.elements}")
        flat = np.frombuffer(body, "<f4").astype(np.float32)
        if select.count_unfinite(flat):
            _refuse_unfinite(flat, layout)
    else:
        flat = cocktail.decode(body, layout, settings, context)
    return parts_of(flat, layout)


def parts_of(flat: Float32, layout: Layout) -> dict[str, Float32]:
    """Views of the tensors, in key order."""
    parts: dict[str, Float32] = {}
    offset = 0
    for (key, shape), size in zip(layout.shapes.items(), layout.sizes, strict=True):
        parts[key] = flat[offset : offset + size].reshape(shape)
        offset += size
    return parts


def shapes_of(tensors: Mapping[str, Float32]) -> dict[str, Shape]:
    """Raises CodecError for anything but a float32 array."""
    for key, tensor in tensors.items():
        if not isinstance(tensor, np.ndarray):
            raise CodecError(f"{key!r} is not a numpy array but {type(tensor).__name__}")
        if tensor.dtype != np.float32:
            raise CodecError(f"{key!r} is not of this machine's float32 but of dtype {tensor.dtype.str}")
    return {key: tensor.shape for key, tensor in tensors.items()}


def _refuse_unfinite(flat: Float32, layout: Layout) -> None:
    for key, part in parts_of(flat, layout).items():
        count = int(np.count_nonzero(~np.isfinite(part)))
        if count:
            raise CodecError(f"{key!r} holds {count} values that are not finite")
