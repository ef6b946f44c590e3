"""Which ways of multiplying are right and pay on this device: tried once a process, in about 0.1 s; on a GPU in some
seconds the first time, when Triton compiles.

A kernel that is missing, refuses, or is not close to the plain way is not used, and the answer says why, also in the
log; so a device nobody here has seen is served slowly at worst, never wrongly. Speed only decides where a kernel is
known to be a loss on some machines, and only a clear loss counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache

import structlog
import torch
from torch.nn import functional

from swarm.compute import settle
from swarm.model.kernels import int4, int8

log = structlog.get_logger()
_SHAPES = {"cpu": (1536, 1024), "cuda": (4096, 4096)}
"""Large enough that the work outweighs the call."""
_FEW_ROWS = 8
_CLOSE = 0.02
"""Of the norm of the result: seven times what rounding to bfloat16 costs."""
_TRIALS = 9
_REFUSALS = (RuntimeError, NotImplementedError, AttributeError)
_LOSS = 1.3
"""A kernel is left out when it takes this much longer than the plain way: clearly, not by noise, so that
two runs on one machine choose alike."""


@dataclass(frozen=True)
class Verdict:
    """Whether a kernel is used, and if not, why."""

    used: bool
    reason: str = ""


@dataclass(frozen=True)
class Traits:
    """What this device is good at."""

    int8_native: Verdict
    int8_digits: Verdict
    int4_native: Verdict
    int8_widen: Verdict
    int4_widen: Verdict
    """Widening in one pass; 4 bits: from the native kernel's order."""


def traits(device: torch.device) -> Traits:
    """Of a device with its index, as tensors have it: cuda:0, not cuda."""
    return _traits(device.type, device.index)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
@torch.no_grad()
def _traits(device_type: str, index: int | None) -> Traits:
    device = torch.device(device_type, index or 0) if device_type == "cuda" else torch.device(device_type)
    generator, shape = torch.Generator().manual_seed(0), _SHAPES.get(device_type, _SHAPES["cpu"])
    codes_OI = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator).to(device)
    scales_O = torch.rand(shape[0], generator=generator).to(device, torch.bfloat16)
    input_MI = torch.randn(_FEW_ROWS, shape[1], generator=generator).to(device)
    rough_MI = input_MI.to(torch.bfloat16)

    found = Traits(
        int8_native=_try_native(rough_MI[:1], codes_OI, scales_O),
        int8_digits=_try_digits(input_MI, codes_OI, scales_O),
        int4_native=_try_int4(rough_MI, codes_OI),
        int8_widen=_try_int8_widen(codes_OI, scales_O),
        int4_widen=_try_int4_widen(codes_OI),
    )
    left_out = {name: verdict["reason"] for name, verdict in asdict(found).items() if not verdict["used"]}
    log.info("kernels", device=str(device), left_out=left_out)
    return found


def _try(kernel: Callable[[], torch.Tensor], plain: Callable[[], torch.Tensor], *, must_pay: bool) -> Verdict:
    try:
        got, expected = kernel().float(), plain().float()
        error = float((got - expected).norm() / expected.norm())
    except Exception as refusal:  # a compiler that is missing or fails says so in ways of its own
        return _refused(refusal)
    if not error < _CLOSE:
        return Verdict(False, f"its result is off by {error:.3g} here")
    if must_pay:
        kernel_s, plain_s = _best_s(kernel, plain)
        if kernel_s > _LOSS * plain_s:
            return Verdict(False, f"it takes {kernel_s * 1e6:.0f} µs here, the plain way {plain_s * 1e6:.0f}")
    return Verdict(True)


def _try_native(row_1I: torch.Tensor, codes_OI: torch.Tensor, scales_O: torch.Tensor) -> Verdict:
    if row_1I.device.type == "cpu":
        return Verdict(False, "a CPU has a kernel of our own")
    return _try(
        lambda: int8.native(row_1I, codes_OI, scales_O),
        lambda: int8.pieces(row_1I, codes_OI, scales_O),
        must_pay=True,
    )


def _try_digits(input_MI: torch.Tensor, codes_OI: torch.Tensor, scales_O: torch.Tensor) -> Verdict:
    """Integer sums must be exact: processors without VNNI may saturate in between."""
    if input_MI.device.type != "cpu":
        return Verdict(False, "only where integers are the fast way: on CPUs")
    extreme = torch.full((3, codes_OI.shape[1]), 127, dtype=torch.int8)
    extreme[1, ::2] = -128
    try:
        for weight in (torch.full_like(codes_OI[:64], -127), codes_OI):
            if not torch.equal(torch._int_mm(extreme, weight.t()).double(), extreme.double() @ weight.double().t()):
                return Verdict(False, "integer products saturate on this processor")
    except _REFUSALS as refusal:
        return _refused(refusal)
    return _try(
        lambda: int8.digits(input_MI, codes_OI, scales_O),
        lambda: int8.pieces(input_MI, codes_OI, scales_O),
        must_pay=True,
    )


def _try_int4(rough_MI: torch.Tensor, codes_OI: torch.Tensor) -> Verdict:
    """Another order of codes or meaning of the zeros than ours would show as a result far off."""
    if not int4.has_kernel(rough_MI.device):
        return Verdict(False, "torch has no 4-bit kernel for this device")
    codes, scales_GO2 = _int4_weight(codes_OI)
    try:
        packed = int4.pack(codes)
        if not torch.equal(int4.unpack(packed, codes.shape[1]), codes):
            return Verdict(False, "the order of its packed codes is not one of blocks of 64 rows")
    except _REFUSALS as refusal:
        return _refused(refusal)
    weight_OI = int4.dequantize(codes, scales_GO2, torch.float32)
    return _try(
        lambda: int4.native(rough_MI, packed, scales_GO2),
        lambda: functional.linear(rough_MI.float(), weight_OI),
        must_pay=False,
    )


def _int4_weight(codes_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unpacked codes and scales, of any values."""
    group = 32
    codes = codes_OI.to(torch.int16).bitwise_and_(15).to(torch.uint8)
    scales_GO2 = torch.stack([codes_OI[:, ::group].float().abs() / 128 + 0.1, codes_OI[:, ::group].float() / 64], -1)
    return codes, scales_GO2.transpose(0, 1).contiguous().to(torch.bfloat16)


def _try_int8_widen(codes_OI: torch.Tensor, scales_O: torch.Tensor) -> Verdict:
    if codes_OI.device.type != "cuda":
        return Verdict(False, "only for GPUs")

    def kernel() -> torch.Tensor:
        from swarm.model.kernels import widen

        return widen.int8(codes_OI, scales_O, torch.bfloat16)

    return _try(kernel, lambda: int8.dequantize(codes_OI, scales_O, torch.bfloat16), must_pay=True)


def _try_int4_widen(codes_OI: torch.Tensor) -> Verdict:
    if codes_OI.device.type != "cuda" or not int4.has_kernel(codes_OI.device):
        return Verdict(False, "only for GPUs that torch has a 4-bit kernel for")
    codes, scales_GO2 = _int4_weight(codes_OI)
    shape = (codes.shape[0], codes.shape[1])
    try:
        packed = int4.pack(codes)
    except _REFUSALS as refusal:
        return _refused(refusal)

    def kernel() -> torch.Tensor:
        from swarm.model.kernels import widen

        return widen.int4(packed, scales_GO2, shape, torch.bfloat16)

    def plain() -> torch.Tensor:
        return int4.dequantize(int4.unpack(packed, shape[1]), scales_GO2, torch.bfloat16)

    return _try(kernel, plain, must_pay=True)


def _refused(refusal: Exception) -> Verdict:
    said = (str(refusal).splitlines() or [""])[0][:200]
    return Verdict(False, f"it is refused here: {type(refusal).__name__}: {said}")


def _best_s(*ways: Callable[[], torch.Tensor]) -> list[float]:
    """The least seconds of each, taken in turns so that other work on the machine hits all alike."""
    times = [float("inf")] * len(ways)
    for _ in range(_TRIALS):
        for index, way in enumerate(ways):
            began = time.perf_counter()
            settle(way().device)
            times[index] = min(times[index], time.perf_counter() - began)
    return times
