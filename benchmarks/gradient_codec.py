"""How close does the gradient codec come to the entropy of what it sends, and how fast is it on one core?

A whole contribution: LoRA r 8 on all linear layers of SmolLM2-135M, 2.4 M parameters in 420 tensors, with Gaussian,
Student-t(3) and log-normal values and, with --real-steps, what so many inner steps on movie reviews change.

`over_entropy` is the largest, over all operating points, of frame bits ÷ bound. The frame counts whole, with header,
levels, tables and checksum. The bound is log2 C(n, k) summed over the chunks, n the places a chunk's random subset
leaves and k those it keeps, both as the settings say, plus k times the empirical zeroth-order entropy of the
quantized symbols (sign and code). That entropy is the frame's, not each tensor's: many tensors keep 5 to 50 values
here, whose empirical entropy is far below what any code could reach without a table as large as themselves.

`encode_M_s` and `decode_M_s` are million parameters of the contribution (sent or not) a second of the thread's own
time, at the default point, everything included: check of the values, selection, quantization, coding, checksum; a
frame's plan and the tables of its positions are remembered from the round before. They are the fastest of the timed
calls, since other work on the same cores only slows them down (it takes time away, which the thread's own clock leaves
out, and caches, which it does not); `spread_M_s` has the others, `wall_M_s` the same calls by the clock on the
wall. `slowest_*` are the points where the fastest call is slowest. `feedback` is `compress_with_feedback`: adding
the residual, encoding, decoding and subtracting; `choose` is selection and quantization alone.

`*_scratch` is the peak of traced memory beyond the input and what is returned, as a share of the contribution.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from math import lgamma, log
from typing import Annotated

import numpy as np
import typer

from benchmarks.provenance import Spread, provenance, publish, spread
from benchmarks.pseudo_gradients import DISTRIBUTIONS, Tensors, made, real
from swarm.compress import FrameContext, compress_with_feedback, decode, encode
from swarm.compress.cocktail import choose
from swarm.compress.codec import encode_flat, parts_of
from swarm.compress.frame import layout_of
from swarm.config import CodecSettings

EVERY_STAGE = ("encode", "decode", "choose", "feedback")
CONTEXT = FrameContext("benchmark", 1, bytes(32))
DENSITIES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
BITS = (1, 2, 3, 4, 8)
KEEPS = (1.0, 0.2)
ALLOCATION_DENSITIES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)


def main(
    repeats: Annotated[int, typer.Option(min=2, help="Timed calls at each point.")] = 3,
    default_repeats: Annotated[int, typer.Option(min=2, help="Timed calls at the default point.")] = 30,
    real_steps: Annotated[int, typer.Option(min=0, help="Also values of so many real inner steps; 0: none.")] = 0,
    json_to: Annotated[str, typer.Option("--json", help="Write the result to this file; -: to stdout.")] = "",
    save: Annotated[bool, typer.Option("--save", help="Keep the result in benchmarks/results.")] = False,
) -> None:
    """Measure size and speed at every operating point."""
    origin = provenance(threads=1)
    sources = {name: made(name) for name in DISTRIBUTIONS}
    if real_steps:
        sources["real"] = real(real_steps, threads=1)
    rows = [
        point(name, tensors, settings, repeats) for name, tensors in sources.items() for settings in operating_points()
    ]
    default = speeds(sources["real" if real_steps else "gaussian"], CodecSettings(), default_repeats, EVERY_STAGE)
    worst = max(rows, key=lambda row: float(str(row["over_entropy"])))
    result = {
        "over_entropy": worst["over_entropy"],
        "encode_M_s": default["encode"].most,
        "decode_M_s": default["decode"].most,
        "choose_M_s": default["choose"].most,
        "feedback_M_s": default["feedback"].most,
        "spread_M_s": {name: default[name] for name in EVERY_STAGE},
        "wall_M_s": {name: default[f"wall_{name}"] for name in EVERY_STAGE},
        "slowest_encode": slowest(rows, "encode_M_s"),
        "slowest_decode": slowest(rows, "decode_M_s"),
        "points_below_50_encode": sum(float(str(row["encode_M_s"])) < 50 for row in rows),
        "points_below_150_decode": sum(float(str(row["decode_M_s"])) < 150 for row in rows),
        "worst": worst,
        **{f"{name}_scratch": share for name, share in scratch(sources["gaussian"]).items()},
        "parameters": sum(tensor.size for tensor in sources["gaussian"].values()),
        "real_steps": real_steps,
        "allocation": allocation(sources["real"]) if real_steps else [],
        "points": rows,
    }
    publish("gradient_codec", result, origin, json_to, save)


def operating_points() -> Iterator[CodecSettings]:
    for keep in KEEPS:
        for density in DENSITIES:
            for bits in BITS:
                yield CodecSettings(random_keep=keep, density=density, bits=bits)


def point(name: str, tensors: Tensors, settings: CodecSettings, repeats: int) -> dict[str, object]:
    frame = encode(tensors, settings, CONTEXT)
    decoded = decode(frame, {key: tensor.shape for key, tensor in tensors.items()}, CONTEXT)
    measured = speeds(tensors, settings, repeats)
    return {
        "values": name,
        "random_keep": settings.random_keep,
        "density": round(settings.density, 6),
        "bits": settings.bits,
        "over_entropy": round(8 * len(frame) / bound_bits(tensors, settings), 4),
        "bytes": len(frame),
        "encode_M_s": measured["encode"].most,
        "decode_M_s": measured["decode"].most,
        "lost_energy": lost_energy(tensors, decoded),
    }


def bound_bits(tensors: Tensors, settings: CodecSettings) -> float:
    """Of the positions of every chunk and the values of the whole frame."""
    layout = layout_of({key: tensor.shape for key, tensor in tensors.items()})
    flat = np.concatenate([tensors[key].reshape(-1) for key in layout.keys])
    chosen = choose(flat, layout, settings, CONTEXT)
    positions = sum(
        int(run["rows"]) * (lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)) / log(2)
        for run in chosen.plan.runs
        for n, k in [(int(run["subset"]), int(run["kept"]))]
    )
    often = np.bincount(chosen.symbols)
    often = often[often > 0]
    return positions - float((often * np.log2(often / chosen.symbols.size)).sum())


def speeds(
    tensors: Tensors, settings: CodecSettings, repeats: int, names: tuple[str, ...] = ("encode", "decode")
) -> dict[str, Spread]:
    """Spreads of million parameters a second, by the thread's own clock and, as wall_*, by the one on the wall.

    One call of each in turn, after a round that is not timed.
    """
    layout = layout_of({key: tensor.shape for key, tensor in tensors.items()})
    flat = np.concatenate([tensors[key].reshape(-1) for key in layout.keys])
    frame = encode(tensors, settings, CONTEXT)
    residual = {key: tensor * np.float32(0.5) for key, tensor in tensors.items()} if "feedback" in names else None
    work: dict[str, Callable[[], object]] = {
        "encode": partial(encode, tensors, settings, CONTEXT),
        "decode": partial(decode, frame, layout.shapes, CONTEXT),
        "choose": partial(choose, flat, layout, settings, CONTEXT),
        "feedback": partial(compress_with_feedback, tensors, residual, settings, CONTEXT),
    }
    taken: dict[str, list[float]] = {prefix + name: [] for prefix in ("", "wall_") for name in names}
    for turn in range(repeats + 1):
        for name in names:
            start_s, start_cpu_s = time.perf_counter(), time.thread_time()
            work[name]()
            if turn:
                taken[name].append(layout.elements / 1e6 / (time.thread_time() - start_cpu_s))
                taken[f"wall_{name}"].append(layout.elements / 1e6 / (time.perf_counter() - start_s))
    return {name: spread(values, 1) for name, values in taken.items()}


def lost_energy(tensors: Tensors, decoded: Tensors) -> float:
    """Squared error over squared norm."""
    error = sum(float(np.square(decoded[key] - tensor, dtype=np.float64).sum()) for key, tensor in tensors.items())
    return round(error / sum(float(np.square(tensor, dtype=np.float64).sum()) for tensor in tensors.values()), 6)


def slowest(rows: list[dict[str, object]], name: str) -> dict[str, object]:
    return min(rows, key=lambda row: float(str(row[name])))


def scratch(tensors: Tensors) -> dict[str, float]:
    """At the default point and at the one that needs most: every value at 8 bits."""
    layout = layout_of({key: tensor.shape for key, tensor in tensors.items()})
    flat = np.empty(layout.elements, np.float32)
    for key, part in parts_of(flat, layout).items():
        part[...] = tensors[key]
    shares: dict[str, float] = {}
    for label, settings in (("default", CodecSettings()), ("dense_8_bit", CodecSettings(density=1, bits=8))):
        frame = encode_flat(flat, layout, settings, CONTEXT)
        work: dict[str, tuple[Callable[[], object], int]] = {
            "encode": (partial(encode_flat, flat, layout, settings, CONTEXT), len(frame)),
            "decode": (partial(decode, frame, layout.shapes, CONTEXT), flat.nbytes),
            "feedback": (
                partial(compress_with_feedback, tensors, None, settings, CONTEXT),
                2 * flat.nbytes + len(frame),
            ),
        }
        for name, (call, returned_bytes) in work.items():
            call()
            tracemalloc.start()
            call()
            peak_bytes = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            shares[f"{label}_{name}"] = round((peak_bytes - returned_bytes) / flat.nbytes, 3)
    return shares


def allocation(tensors: Tensors) -> list[dict[str, object]]:
    """`energy` against `even`: what is lost, and what `even` loses at as many bytes, between its neighbours."""
    shapes = {key: tensor.shape for key, tensor in tensors.items()}

    def measured(settings: CodecSettings) -> tuple[int, float]:
        frame = encode(tensors, settings, CONTEXT)
        return len(frame), lost_energy(tensors, decode(frame, shapes, CONTEXT))

    even = sorted(measured(CodecSettings(density=1.25**-step)) for step in range(24))
    rows: list[dict[str, object]] = []
    for density in ALLOCATION_DENSITIES:
        size, lost = measured(CodecSettings(density=density, allocation="energy"))
        at_as_many = float(np.interp(size, [point[0] for point in even], [point[1] for point in even]))
        rows.append({"density": round(density, 6), "bytes": size, "energy": lost, "even": round(at_as_many, 6)})
    return rows


if __name__ == "__main__":
    typer.run(main)
