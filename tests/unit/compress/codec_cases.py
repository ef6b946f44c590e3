"""Tensors, settings and contexts that the codec's tests share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from swarm.compress import FrameContext
from swarm.config import CodecSettings

Tensors = dict[str, NDArray[np.float32]]

CONTEXT = FrameContext("job-1", 7, bytes(range(32)))


def gaussian(shapes: Mapping[str, tuple[int, ...]], seed: int = 0, scale: float = 1e-3) -> Tensors:
    rng = np.random.default_rng(seed)
    return {key: np.asarray(scale * rng.standard_normal(shape), np.float32) for key, shape in shapes.items()}


def shapes_of(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {key: tensor.shape for key, tensor in tensors.items()}


def same_bits(a: Tensors, b: Tensors) -> bool:
    """Equal keys in equal order, shapes and bits; unlike ==, tells -0.0 from 0.0."""
    return list(a) == list(b) and all(
        a[key].shape == b[key].shape and a[key].tobytes() == b[key].tobytes() for key in a
    )


def arithmetic(shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """Values that no library's random numbers decide: heavy tails of a multiplicative congruence, at many scales."""
    tensors: Tensors = {}
    state = 1
    for key, shape in shapes.items():
        numbers = []
        for _ in range(int(np.prod(shape, dtype=np.int64))):
            state = state * 48271 % 0x7FFF_FFFF
            numbers.append((state - (1 << 30)) / (1 << 30))
        uniform = np.array(numbers)
        cubed = uniform * uniform * uniform * 2.0 ** (len(key) % 7 - 10)
        tensors[key] = cubed.astype(np.float32).reshape(shape)
    return tensors


def digest(tensors: Tensors) -> str:
    """Hash over keys and bits, in the order given."""
    hasher = hashlib.sha256()
    for key, tensor in tensors.items():
        hasher.update(key.encode() + tensor.astype("<f4").tobytes())
    return hasher.hexdigest()


keys = st.builds(
    "{}/{}".format,
    st.one_of(st.integers(0, 40), st.just("head")),
    st.sampled_from(["a.lora_A", "a.lora_B", "norm"]),
)
shapes = st.dictionaries(
    keys, hnp.array_shapes(min_dims=0, max_dims=3, min_side=1, max_side=24), min_size=0, max_size=5
)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def tensors(draw: st.DrawFn) -> Tensors:
    """Gaussian bulk at any scale, with a few arbitrary finite values, zeros and ties put in."""
    chosen = gaussian(draw(shapes), draw(st.integers(0, 99)), 10.0 ** draw(st.integers(-30, 30)))
    for tensor in chosen.values():
        if draw(st.booleans()):
            tensor[...] = np.sign(tensor) * np.float32(draw(finite))
        for value in draw(st.lists(finite, max_size=3)):
            tensor.reshape(-1)[draw(st.integers(0, tensor.size - 1))] = value
    return chosen


shares = st.sampled_from([0.001, 0.02, 0.0625, 0.125, 0.2, 0.3, 0.5, 0.99, 1.0])
cocktails = st.builds(
    CodecSettings,
    random_keep=shares,
    density=shares,
    bits=st.integers(1, 8),
    chunk=st.sampled_from([64, 100, 257, 4096]),
    decay=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    allocation=st.just("even"),
)
by_energy = st.builds(
    CodecSettings, random_keep=shares, density=shares, bits=st.integers(1, 8), allocation=st.just("energy")
)
by_itself = st.one_of(cocktails, st.just(CodecSettings(kind="dense")))
"""Settings under which what a tensor decodes to depends on nothing else."""
any_settings = st.one_of(by_itself, by_energy)
