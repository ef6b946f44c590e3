"""What stands in the body of a frame, and in which order it is read.

    bytes u32 | coded numbers | coded symbols

The numbers (swarm.compress.ranges): the density of each tensor if it is not the settings'; how many gap symbols each
crowd of chunks has; the frequencies of the value symbols; the levels of each group; the positions of chunks that
keep few. The symbols (swarm.compress.rans): the positions of each crowd, then all values.

The values of a frame share one table of frequencies, counted in it. As many symbols as fit a byte are coded as one;
their frequencies are the products of the single ones.

In: the values of a frame one after the other, or a body from anybody. Out: a body, or the values. All that is
allocated follows from the shapes: next to the result at most a byte a kept value, three a listed position, and a
constant. Never trusts a count in a body beyond what the shapes allow.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swarm.compress import allocate, levels, positions, quantize, ranges, rans, select, values
from swarm.compress.frame import FrameContext, Layout
from swarm.compress.plan import Plan, even_plan, make_plan
from swarm.config import CodecSettings
from swarm.errors import CodecError

_LENGTH = struct.Struct("<I")
_LEVEL_ROOM_BYTES = 96
"""A zero flag and two numbers at no more than 11 bits a decision."""

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Chosen:
    """What of a frame's values is kept, and as what."""

    plan: Plan
    steps: tuple[int, ...]
    """Of each tensor's density; empty if all have the settings'."""
    places: NDArray[np.uint16]
    """Within subsets."""
    symbols: NDArray[np.uint8]
    top: NDArray[np.int64]
    fraction: NDArray[np.int64]


def choose(flat: Float32, layout: Layout, settings: CodecSettings, context: FrameContext) -> Chosen:
    """Selection and quantization of these finite values."""
    steps: tuple[int, ...] = ()
    if settings.allocation == "energy":
        steps = allocate.steps_by_energy(flat, layout.sizes, settings)
        plan = make_plan(layout.sizes, settings, steps)
    else:
        plan = even_plan(layout.sizes, settings)
    seeds = _seeds(layout, settings, context)
    places = np.empty(plan.places, np.uint16)
    select.largest(flat, plan.runs, seeds, places, settings.chunk)
    in_chunk = places
    if settings.random_keep < 1:
        in_chunk = places.copy()
        select.in_chunks(plan.runs, seeds, in_chunk, settings.chunk)
    symbols, top, fraction = quantize.quantize(flat, plan, in_chunk, settings.bits)
    return Chosen(plan, steps, places, symbols, top, fraction)


def encode(flat: Float32, layout: Layout, settings: CodecSettings, context: FrameContext) -> bytes:
    """The body of a frame of these finite values."""
    chosen = choose(flat, layout, settings, context)
    plan, bits, names = chosen.plan, settings.bits, allocate.names_of(layout.keys)
    weights = values.weights_of(chosen.symbols, bits)
    streams: list[bytes] = []
    writer = ranges.Writer(_room_bytes(plan, settings, len(chosen.steps)))
    allocate.write_steps(writer, chosen.steps, names)
    for crowd in plan.crowds:
        symbols = positions.symbols_of(crowd, chosen.places)
        writer.count(symbols.size - crowd.symbols)
        streams.append(rans.write(symbols, positions.table_of(crowd)))
    streams.append(rans.write(values.packed(chosen.symbols, bits), values.table_of(weights, bits)))
    values.write_weights(writer, weights)
    fraction = chosen.fraction if bits > 1 else None
    writer.levels(chosen.top, fraction, levels.classes(plan.group_values), names[plan.group_tensor], levels.ZERO)
    writer.positions(plan.exact, chosen.places)
    numbers = writer.finish()
    return b"".join([_LENGTH.pack(len(numbers)), numbers, *streams])


def decode(body: memoryview, layout: Layout, settings: CodecSettings, context: FrameContext) -> Float32:
    """The values, zero where none was sent. Raises CodecError."""
    if len(body) < _LENGTH.size:
        raise CodecError("the frame ends before its numbers")
    (size,) = _LENGTH.unpack_from(body)
    if size > len(body) - _LENGTH.size:
        raise CodecError("the numbers reach beyond the frame")
    reader = ranges.Reader(body[_LENGTH.size : _LENGTH.size + size])
    symbols = rans.Reader(body[_LENGTH.size + size :])
    bits, names = settings.bits, allocate.names_of(layout.keys)
    if settings.allocation == "energy":
        plan = make_plan(layout.sizes, settings, allocate.read_steps(reader, names))
    else:
        plan = even_plan(layout.sizes, settings)
    places = np.empty(plan.places, np.uint16)
    counts = [crowd.symbols + reader.count() for crowd in plan.crowds]
    weights = values.read_weights(reader, bits)
    classes = levels.classes(plan.group_values)
    top, fraction = reader.levels(classes, names[plan.group_tensor], levels.ZERO, with_fraction=bits > 1)
    floor, step = levels.levels(top, fraction, levels.resolutions(plan.group_values), bits)
    reader.positions(plan.exact, places)
    for crowd, count in zip(plan.crowds, counts, strict=True):
        if not crowd.symbols <= count <= crowd.most_symbols:
            raise CodecError(f"the frame has {count} position symbols where at most {crowd.most_symbols} can be")
        positions.places_of(crowd, symbols.read(count, positions.table_of(crowd)), places)
    for run in plan.all:
        places[run["first_place"] :][: run["rows"] * run["kept"]] = np.tile(np.arange(run["kept"]), run["rows"])
    if settings.random_keep < 1:
        select.in_chunks(plan.runs, _seeds(layout, settings, context), places, settings.chunk)
    packed = symbols.read(values.packed_size(plan.values, bits), values.table_of(weights, bits))
    symbols.finish()
    flat = np.zeros(layout.elements, np.float32)
    quantize.place(flat, plan, places, packed, bits, floor, step)
    return flat


def _seeds(layout: Layout, settings: CodecSettings, context: FrameContext) -> NDArray[np.uint64]:
    if settings.random_keep < 1:
        return select.seeds_of(context.job_id, context.round, layout.keys)
    return np.zeros(1, np.uint64)


def _room_bytes(plan: Plan, settings: CodecSettings, steps: int) -> int:
    """The most that the numbers of a frame can take: 16 bits a decision that was foreseen as impossible."""
    exact = int((plan.exact["rows"] * plan.exact["kept"]).sum())
    return 1024 + 16 * exact + _LEVEL_ROOM_BYTES * (plan.groups + steps + len(plan.crowds) + (1 << settings.bits))
