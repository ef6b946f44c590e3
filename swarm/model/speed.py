"""How fast each scheme multiplies on this device, and which scheme a node should therefore hold.

`measure` times real products over weights that no cache holds, in less than a second. `pick_scheme` is
pure: bytes and speeds in, scheme out. Neither looks at a model's quality under a scheme; the order from exact
to coarse is fixed here and rests on docs/experiments.md.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from swarm.compute import settle
from swarm.errors import OutOfMemory
from swarm.model.kernels import int4
from swarm.model.kernels.traits import traits
from swarm.model.quantize import GROUP, SCHEMES, QuantizedWeight, Scheme

_SHAPE = (1024, 1024)
_COUNT = 12
_FLUSH_BYTES = 64 * 1024**2
_TURNS = 3
ROWS = (1, 8, 64)
"""Of the activations that are timed: one session, a batch of sessions, a chunk of a prompt."""
_WORTH = 1.25
"""Decoding must gain this much before a node with room for exact weights gives them up."""
_NO_LOSS = 0.9


@dataclass(frozen=True)
class Speeds:
    """Seconds that 10^9 weights take on `device` in `dtype`, by scheme and rows."""

    device: str
    dtype: str
    gigaweight_s: Mapping[Scheme, Mapping[int, float]]

    def gain(self, scheme: Scheme, rows: int) -> float:
        """How many times faster than unquantized weights."""
        return self.gigaweight_s["none"][rows] / self.gigaweight_s[scheme][rows]


@torch.inference_mode()
def measure(device: torch.device, dtype: torch.dtype) -> Speeds:
    """Time every scheme at `ROWS` rows, in turns, on random weights; the least of a few times counts."""
    weights = {scheme: [_random(scheme, device, dtype) for _ in range(_COUNT)] for scheme in SCHEMES}
    flush = torch.ones(_FLUSH_BYTES // 4, device=device)
    best: dict[Scheme, dict[int, float]] = {scheme: {} for scheme in SCHEMES}
    for rows in ROWS:
        input_MI = torch.randn(rows, _SHAPE[1], device=device).to(dtype)
        for _ in range(_TURNS):
            for scheme in SCHEMES:
                flush.sum()
                settle(device)
                began = time.perf_counter()
                for weight in weights[scheme]:
                    _multiply(input_MI, weight)
                settle(device)
                took_s = (time.perf_counter() - began) / (_COUNT * _SHAPE[0] * _SHAPE[1]) * 1e9
                best[scheme][rows] = min(took_s, best[scheme].get(rows, took_s))
    return Speeds(str(device), str(dtype).removeprefix("torch."), best)


def pick_scheme(span_bytes: Mapping[Scheme, int], budget_bytes: int, speeds: Speeds) -> Scheme:
    """The most exact scheme that fits, except that int8, which loses next to nothing, is preferred where it
    decodes faster by a quarter and is no slower with more rows. int4 is for weights that fit no other way.

    `span_bytes`: what the span takes under each scheme that may be used (leave out what must not be).
    Raises OutOfMemory if none fits.
    """
    fitting: list[Scheme] = [scheme for scheme in SCHEMES if span_bytes.get(scheme, budget_bytes + 1) <= budget_bytes]
    if not fitting:
        least = min(span_bytes.values())
        raise OutOfMemory(f"the blocks take {least} bytes at the narrowest scheme, the budget is {budget_bytes}")
    pays = speeds.gain("int8", ROWS[0]) >= _WORTH and all(speeds.gain("int8", rows) >= _NO_LOSS for rows in ROWS)
    return "int8" if pays and "int8" in fitting else fitting[0]


def _random(scheme: Scheme, device: torch.device, dtype: torch.dtype) -> torch.Tensor | QuantizedWeight:
    """Any bits make a valid weight, so nothing is quantized and the clock starts early."""
    if scheme == "none":
        return torch.full(_SHAPE, 0.01, dtype=dtype, device=device)
    if scheme == "int8":
        codes = torch.randint(-127, 128, _SHAPE, dtype=torch.int8, device=device)
        return QuantizedWeight("int8", _SHAPE, codes, torch.ones(_SHAPE[0], dtype=torch.bfloat16, device=device))
    codes = torch.randint(0, 16, _SHAPE, dtype=torch.uint8, device=device)
    scales = torch.ones(_SHAPE[1] // GROUP, _SHAPE[0], 2, dtype=torch.bfloat16, device=device)
    if traits(codes.device).int4_native.used:
        return QuantizedWeight("int4", _SHAPE, int4.pack(codes), scales, "kernel")
    return QuantizedWeight("int4", _SHAPE, int4.pack_plain(codes), scales)


def _multiply(input_MI: torch.Tensor, weight: torch.Tensor | QuantizedWeight) -> torch.Tensor:
    if isinstance(weight, QuantizedWeight):
        return weight.product(input_MI)
    return functional.linear(input_MI, weight)
