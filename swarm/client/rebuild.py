"""How a chain whose hops were partly replaced gets its KV caches back. Pure.

In: what each hop holds, and the column the next step starts at. Out: fills, in order. A hop's
predecessor resends what it sent if it still has it; otherwise the client replays its tokens, and the
hops before the lost one compute them again (to the same values).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Held:
    """One hop's state as it told when the chain was opened."""

    columns: int
    logged_from: int
    """It can resend what it sent for columns from here to `columns`."""


@dataclass(frozen=True)
class Fill:
    """Hops `first` to `last` lack columns [start, end)."""

    first: int
    last: int
    start: int
    end: int
    from_client: bool
    """Whether the client sends them (and hops before `first` recompute), or hop `first` - 1 does."""


def plan_fills(hops: Sequence[Held], end: int) -> list[Fill]:
    """What must be sent so that every hop holds columns [0, end)."""
    fills: list[Fill] = []
    index = 0
    while index < len(hops):
        if hops[index].columns >= end:
            index += 1
            continue
        last = index
        while last + 1 < len(hops) and hops[last + 1].columns < end:
            last += 1
        start = min(hop.columns for hop in hops[index : last + 1])
        before = hops[index - 1] if index else None
        logged = before is not None and before.columns >= end and before.logged_from <= start
        fills.append(Fill(index, last, start, end, from_client=not logged))
        index = last + 1
    return fills


def resume_at(hops: Sequence[Held], first: int, last: int) -> int:
    """The column between `first` and `last` to go on from: where the hops that kept anything all are.

    Columns before it are filled from neighbours; those from it on are computed by everybody.
    """
    kept = [hop.columns for hop in hops if hop.columns > first]
    return min([last, *kept]) if kept else first
