"""Which positions of the endless sample order a pipeline trains on. Pure.

A lease is the share of one pipeline in one round: ranges [start, end) of positions. Asking again
returns the same lease. An accepted pipeline's lease is closed; a lost or late one's is void and
its positions are leased again before any new ones, so that every position is accepted exactly
once. In and out go frozen values; nothing here knows a clock or a disk.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum


class LeaseState(StrEnum):
    OPEN = "open"
    CLOSED = "closed"
    VOID = "void"


@dataclass(frozen=True, order=True)
class Range:
    start: int
    end: int


@dataclass(frozen=True)
class Lease:
    lease_id: int
    round: int
    pipeline_id: int
    ranges: tuple[Range, ...]
    state: LeaseState = LeaseState.OPEN


@dataclass(frozen=True)
class Book:
    """Positions below `high` are open, closed or `free` (given back); the rest is untouched.

    Closed leases are not kept here: a job may have millions.
    """

    next_id: int = 1
    high: int = 0
    free: tuple[Range, ...] = ()
    open: tuple[Lease, ...] = ()

    def find(self, round: int, pipeline_id: int) -> Lease | None:
        """The pipeline's open lease."""
        return next((x for x in self.open if (x.round, x.pipeline_id) == (round, pipeline_id)), None)


def restore(leases: Iterable[Lease]) -> Book:
    """The book after all leases a job ever had."""
    everything = list(leases)
    held = _merge(r for lease in everything if lease.state is not LeaseState.VOID for r in lease.ranges)
    high = max((r.end for lease in everything for r in lease.ranges), default=0)
    free: list[Range] = []
    at = 0
    for taken in (*held, Range(high, high)):
        if at < taken.start:
            free.append(Range(at, taken.start))
        at = max(at, taken.end)
    return Book(
        next_id=max((lease.lease_id for lease in everything), default=0) + 1,
        high=high,
        free=tuple(free),
        open=tuple(lease for lease in everything if lease.state is LeaseState.OPEN),
    )


def grant(book: Book, round: int, pipeline_id: int, count: int) -> tuple[Book, Lease]:
    """Lease `count` positions: given-back ones first, lowest first. The same lease if it has one."""
    existing = book.find(round, pipeline_id)
    if existing is not None:
        return book, existing
    taken: list[Range] = []
    free = list(book.free)
    wanted = count
    while wanted and free:
        first = free.pop(0)
        part = min(wanted, first.end - first.start)
        taken.append(Range(first.start, first.start + part))
        if first.start + part < first.end:
            free.insert(0, Range(first.start + part, first.end))
        wanted -= part
    high = book.high + wanted
    if wanted:
        taken.append(Range(book.high, high))
    lease = Lease(book.next_id, round, pipeline_id, _merge(taken))
    return Book(book.next_id + 1, high, tuple(free), (*book.open, lease)), lease


def close(book: Book, round: int, pipeline_id: int) -> tuple[Book, Lease | None]:
    """The pipeline was accepted: its positions are done for good."""
    return _end(book, round, pipeline_id, LeaseState.CLOSED)


def void(book: Book, round: int, pipeline_id: int) -> tuple[Book, Lease | None]:
    """The pipeline does not count: its positions are free again."""
    book, lease = _end(book, round, pipeline_id, LeaseState.VOID)
    if lease is not None:
        book = replace(book, free=_merge((*book.free, *lease.ranges)))
    return book, lease


def _end(book: Book, round: int, pipeline_id: int, state: LeaseState) -> tuple[Book, Lease | None]:
    lease = book.find(round, pipeline_id)
    if lease is None:
        return book, None
    remaining = tuple(x for x in book.open if x is not lease)
    return replace(book, open=remaining), replace(lease, state=state)


def _merge(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Ascending, neighbours joined."""
    merged: list[Range] = []
    for item in sorted(ranges):
        if merged and item.start <= merged[-1].end:
            merged[-1] = Range(merged[-1].start, max(merged[-1].end, item.end))
        else:
            merged.append(item)
    return tuple(merged)
