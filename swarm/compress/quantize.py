"""How a kept value becomes a sign bit and a few bits of magnitude.

In: kept values, one row a chunk. Out: signs, magnitude codes and two numbers a row, `floor` and
`step`; code c stands for floor + c * step, computed in float32 as one product and one sum, which
every machine rounds alike. Both numbers are fitted to the row by least squares: one level is the
mean, two levels are the two centroids of Lloyd's algorithm (1982). With more levels they stay
evenly spaced: freely placed centroids have less error at the same `bits`, but since the codes are
entropy coded they cost more than the same error bought with more even levels (Gish and Pierce,
1968; seen on Gaussian, Student-t(3) and log-normal rows), and a table of them a chunk costs more.

Floor and step are bfloat16, not fp16: its range is float32's, so 1e-30 and 1e30 need no scale of
their own, and its rounding (at most 0.4%) goes back into the residual.

Never yields a value that is not finite.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from swarm.errors import CodecError

_LLOYD_STEPS = 6
"""From evenly spaced levels over the row's range. At density 1/16 the error is then within 5% of
convergence; dense heavy-tailed rows would gain more, and pay for it in entropy."""
_LARGEST = 2.0**126
"""Magnitudes saturate here, so that no level can round to infinity; the residual keeps the rest."""


def quantize(magnitudes_RK: NDArray[np.float32], bits: int) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """Codes [R, K] and levels [R, 1 or 2]: bfloat16 bits of floor and, beyond one level, of step."""
    # C order, so that a row's sums are taken in the same order whatever rows stand beside it.
    magnitudes = np.minimum(magnitudes_RK.astype(np.float64, order="C"), _LARGEST)
    mean = magnitudes.mean(axis=1, keepdims=True)
    last = (1 << (bits - 1)) - 1
    if last == 0:
        return np.zeros(magnitudes.shape, np.uint8), _to_bfloat16(mean)
    lowest = magnitudes.min(axis=1, keepdims=True)
    step = (magnitudes.max(axis=1, keepdims=True) - lowest) / (last + 1)
    floor = lowest + step / 2
    centered = magnitudes - mean
    for _ in range(_LLOYD_STEPS):
        codes = _nearest(magnitudes, floor, step, last)
        code_mean = codes.mean(axis=1, keepdims=True)
        codes -= code_mean
        variance = np.square(codes).mean(axis=1, keepdims=True)
        covariance = (codes * centered).mean(axis=1, keepdims=True)
        # A row whose values all fall on one level keeps its step.
        step = np.divide(covariance, variance, out=step, where=variance > 0)
        floor = np.maximum(mean - step * code_mean, 0.0)
    # Codes for the levels as the decoder will see them; then the floor takes up what the rounding
    # and the last assignment did to the row's mean.
    step_bits = _to_bfloat16(np.minimum(step, (2 * _LARGEST - floor) / last))
    step = _from_bfloat16(step_bits).astype(np.float64)
    codes = _nearest(magnitudes, floor, step, last)
    floor = np.maximum(mean - step * codes.mean(axis=1, keepdims=True), 0.0)
    return codes.astype(np.uint8), np.concatenate([_to_bfloat16(floor), step_bits], axis=1)


def dequantize(codes_RK: NDArray[np.uint8], levels_RP: NDArray[np.uint16], bits: int) -> NDArray[np.float32]:
    """[R, K] magnitudes. Raises CodecError if a level is negative or not finite."""
    levels = _from_bfloat16(levels_RP)
    floor_R1, step_R1 = levels[:, :1], levels[:, 1:]
    with np.errstate(over="ignore", invalid="ignore"):
        top = floor_R1 if bits == 1 else floor_R1 + step_R1 * np.float32((1 << (bits - 1)) - 1)
    if (levels_RP >> 15).any() or not np.isfinite(top).all():
        raise CodecError("a quantization level in the frame is negative or not finite")
    if bits == 1:
        return np.broadcast_to(floor_R1, codes_RK.shape)
    return floor_R1 + step_R1 * codes_RK.astype(np.float32)


def _nearest(
    magnitudes: NDArray[np.float64], floor: NDArray[np.float64], step: NDArray[np.float64], last: int
) -> NDArray[np.float64]:
    codes = np.divide(magnitudes - floor, step, out=np.zeros_like(magnitudes), where=step > 0)
    np.rint(codes, out=codes)
    return np.clip(codes, 0, last, out=codes)


def _to_bfloat16(values: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Upper half of the float32 bits, rounded to nearest even; values are below 2**127."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype(np.uint16)


def _from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Subnormal levels count as zero, so that a process that flushes subnormals decodes alike."""
    normal = np.where(bits & np.uint16(0x7F80), bits, np.uint16(0))
    return (normal.astype(np.uint32) << 16).view(np.float32)
