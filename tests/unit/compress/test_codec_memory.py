"""Memory follows the shapes: the results, the frame, and a part of the contribution that does not repeat it."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from codec_cases import CONTEXT, gaussian, shapes_of

from swarm.compress import compress_with_feedback, decode, encode
from swarm.compress.codec import encode_flat, parts_of
from swarm.compress.frame import layout_of
from swarm.config import CodecSettings

SOURCE = gaussian({f"{block}/w.lora_{ab}": (8, 40_960) for block in range(4) for ab in "AB"})
CONTRIBUTION_BYTES = sum(tensor.nbytes for tensor in SOURCE.values())


def peak_bytes(work: Callable[[], object]) -> int:
    work()  # compiled, and plans and tables remembered
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("codec", "share"),
    [
        (CodecSettings(), 0.15),
        (CodecSettings(density=0.5), 0.55),
        (CodecSettings(density=1, bits=1), 0.45),
        (CodecSettings(density=1, bits=8), 1.05),
        (CodecSettings(density=0.5, random_keep=0.2), 0.3),
    ],
)
def test_scratch_is_a_part_of_the_contribution(codec: CodecSettings, share: float) -> None:
    """`share`: of the contribution, besides what is returned, for the frame and all symbols and places."""
    layout = layout_of(shapes_of(SOURCE))
    flat = np.empty(layout.elements, np.float32)
    for key, part in parts_of(flat, layout).items():
        part[...] = SOURCE[key]
    frame = encode_flat(flat, layout, codec, CONTEXT)
    assert peak_bytes(lambda: encode_flat(flat, layout, codec, CONTEXT)) < share * CONTRIBUTION_BYTES
    assert peak_bytes(lambda: decode(frame, layout.shapes, CONTEXT)) < (1 + share) * CONTRIBUTION_BYTES
    both = peak_bytes(lambda: compress_with_feedback(SOURCE, None, codec, CONTEXT))
    assert both < (2 + share) * CONTRIBUTION_BYTES


def test_importing_the_codec_does_not_load_the_compiler() -> None:
    script = "import sys, swarm.compress; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_encode_copies_once() -> None:
    assert peak_bytes(lambda: encode(SOURCE, CodecSettings(), CONTEXT)) < 1.15 * CONTRIBUTION_BYTES
