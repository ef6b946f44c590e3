"""Which ways of multiplying are right and pay on this device: tried once a process, in about 0.1 s; on a GPU in some
seconds the first time, when Triton compiles.

A kernel that is missing, refuses, or is not close to the plain way is not used, and the answer says why, also in the
log; so a device nobody here has seen is served slowly at worst, never wrongly. Speed only decides where a kernel is
known to be a loss on some machines, and only a clear loss counts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import structlog
import torch
from torch.nn import functional

from swarm.compute import settle
from swarm.model.kernels import int4, int8

log = structlog.get_logger()
_SHAPES = {"cpu": (1536, 1024), "cuda": (4096, 4096)}
"""Large enough that the work outweighs the call."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_RAGGED = (200, 320)
"""Fills neither a block of rows nor one of columns."""
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


_NOT_HERE = Verdict(False, "not made for this kind of device")
_found: dict[torch.device, Traits] = {}
_trying = threading.Lock()
"""Two trials at once would time each other."""


def traits(device: torch.device) -> Traits:
    """Of a device with its index, as tensors have it: cuda:0, not cuda. Raises torch.OutOfMemoryError at first."""
    found = _found.get(device)
    if found is None:
        with _trying:
            found = _found.get(device) or _traits(device)
            _found[device] = found
    return found


@torch.inference_mode(False)
@torch.no_grad()
def _traits(device: torch.device) -> Traits:
    generator, shape = torch.Generator().manual_seed(0), _SHAPES.get(device.type, _SHAPES["cpu"])
    codes_OI = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator).to(device)
    scales_O = torch.rand(shape[0], generator=generator).to(device, torch.bfloat16)
    input_MI = torch.randn(_FEW_ROWS, shape[1], generator=generator).to(device)
    rough_MI = input_MI.to(torch.bfloat16)

    int8_widen = _try_int8_widen(rough_MI, codes_OI, scales_O)
    found = Traits(
        int8_native=_try_native(rough_MI[:1], codes_OI, scales_O, int8_widen),
        int8_digits=_try_digits(input_MI, codes_OI, scales_O),
        int4_native=_try_int4(rough_MI, codes_OI),
        int8_widen=int8_widen,
        int4_widen=_try_int4_widen(codes_OI),
    )
    for name, verdict in asdict(found).items():
        if not verdict["used"] and verdict["reason"] != _NOT_HERE.reason:
            log.info("kernel_left_out", device=str(device), kernel=name, reason=verdict["reason"])
    return found


def _try(kernel: Callable[[], torch.Tensor], plain: Callable[[], torch.Tensor], *, must_pay: bool) -> Verdict:
    try:
        got, expected = kernel().float(), plain().float()
        error = float((got - expected).norm() / expected.norm())
    except torch.OutOfMemoryError:
        raise
    except Exception as refusal:  # a compiler that is missing or fails says so in ways of its own
        return _refused(refusal)
    if not error < _CLOSE:
        return Verdict(False, f"its result is off by {error:.3g} here")
    if must_pay:
        kernel_s, plain_s = _best_s(kernel, plain)
        if kernel_s > _LOSS * plain_s:
            return Verdict(False, f"it takes {kernel_s * 1e6:.0f} µs here, the plain way {plain_s * 1e6:.0f}")
    return Verdict(True)


def _first_refusal(*trials: Callable[[], Verdict]) -> Verdict:
    return next((verdict for trial in trials if not (verdict := trial()).used), Verdict(True))


def _try_native(row_1I: torch.Tensor, codes_OI: torch.Tensor, scales_O: torch.Tensor, widen: Verdict) -> Verdict:
    """Against what would be used instead."""
    if row_1I.device.type == "cpu":  # which has a kernel of our own
        return _NOT_HERE

    def instead() -> torch.Tensor:
        if widen.used:
            return functional.linear(row_1I, _widen_int8(codes_OI, scales_O, row_1I.dtype))
        return int8.pieces(row_1I, codes_OI, scales_O)

    return _try(lambda: int8.native(row_1I, codes_OI, scales_O), instead, must_pay=True)


def _try_digits(input_MI: torch.Tensor, codes_OI: torch.Tensor, scales_O: torch.Tensor) -> Verdict:
    """Integer sums must be exact: processors without VNNI may saturate in between."""
    if input_MI.device.type != "cpu":
        return _NOT_HERE
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


def _widen_int8(codes_OI: torch.Tensor, scales_O: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from swarm.model.kernels import widen  # needs Triton, which only torch's builds for GPUs bring

    return widen.int8(codes_OI, scales_O, dtype)


def _try_int8_widen(rough_MI: torch.Tensor, codes_OI: torch.Tensor, scales_O: torch.Tensor) -> Verdict:
    if codes_OI.device.type != "cuda":
        return _NOT_HERE
    rows, columns = _RAGGED
    ragged_OI, their_O = codes_OI[:rows, :columns].contiguous(), scales_O[:rows].contiguous()

    def right(dtype: torch.dtype) -> Verdict:
        return _try(
            lambda: _widen_int8(ragged_OI, their_O, dtype),
            lambda: int8.dequantize(ragged_OI, their_O, torch.float32),
            must_pay=False,
        )

    def pays() -> Verdict:
        return _try(
            lambda: functional.linear(rough_MI, _widen_int8(codes_OI, scales_O, rough_MI.dtype)),
            lambda: int8.pieces(rough_MI, codes_OI, scales_O),
            must_pay=True,
        )

    return _first_refusal(*(partial(right, dtype) for dtype in _DTYPES), pays)


def _try_int4_widen(codes_OI: torch.Tensor) -> Verdict:
    if codes_OI.device.type != "cuda" or not int4.has_kernel(codes_OI.device):
        return _NOT_HERE
    whole_OI, scales_GO2 = _int4_weight(codes_OI)
    rows, columns = _RAGGED
    kept, groups = rows + -rows % int4.BLOCK_ROWS, columns * len(scales_GO2) // whole_OI.shape[1]
    ragged_OI, theirs_GO2 = whole_OI[:kept, :columns].contiguous(), scales_GO2[:groups, :kept].contiguous()

    def widened(packed: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        from swarm.model.kernels import widen

        return widen.int4(packed, scales, shape, dtype)

    def right(dtype: torch.dtype) -> Verdict:
        return _try(
            lambda: widened(int4.pack(ragged_OI), theirs_GO2, _RAGGED, dtype),
            lambda: int4.dequantize(ragged_OI[:rows], theirs_GO2, torch.float32),
            must_pay=False,
        )

    def pays() -> Verdict:
        packed, shape, dtype = int4.pack(whole_OI), (whole_OI.shape[0], whole_OI.shape[1]), torch.bfloat16
        return _try(
            lambda: widened(packed, scales_GO2, shape, dtype),
            lambda: int4.dequantize(int4.unpack(packed, shape[1]), scales_GO2, dtype),
            must_pay=True,
        )

    return _first_refusal(*(partial(right, dtype) for dtype in _DTYPES), pays)


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
