"""Which positions of the endless sample order a pipeline trains on. Pure.

A lease is the share of one pipeline in one round: ranges [start, end) of positions. Asking again
returns the same lease. An accepted pipeline's lease is closed as far as it was trained; a lost or
late one's is void. What is given back is leased again before any new positions, so that every
position is accepted exactly once. With rounds that overlap a pipeline holds a second lease ahead, for the
round after: the next round's pipeline of the same nodes takes it over under its id; if there is none,
it is void. In and out go frozen values; nothing here knows a clock or a disk.
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
    ahead: bool = False
    """For the round after `round`."""


@dataclass(frozen=True)
class Book:
    """Positions below `high` are open, closed or `free` (given back); the one before it is not free.

    Closed leases are not kept here: a job may have millions.
    """

    next_id: int = 1
    high: int = 0
    free: tuple[Range, ...] = ()
    open: tuple[Lease, ...] = ()

    def find(self, round: int, pipeline_id: int, ahead: bool = False) -> Lease | None:
        """The pipeline's open lease, or the one that it holds ahead."""
        wanted = (round, pipeline_id, ahead)
        return next((x for x in self.open if (x.round, x.pipeline_id, x.ahead) == wanted), None)


def restore(leases: Iterable[Lease]) -> Book:
    """The book after all leases a job ever had."""
    everything = list(leases)
    held = _merge(r for lease in everything if lease.state is not LeaseState.VOID for r in lease.ranges)
    high = held[-1].end if held else 0
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


def grant(book: Book, round: int, pipeline_id: int, count: int, ahead: bool = False) -> tuple[Book, Lease]:
    """Lease `count` positions: given-back ones first, lowest first. The same lease if it has one."""
    existing = book.find(round, pipeline_id, ahead)
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
    lease = Lease(book.next_id, round, pipeline_id, _merge(taken), ahead=ahead)
    return Book(book.next_id + 1, high, tuple(free), (*book.open, lease)), lease


def form(
    book: Book,
    round: int,
    pipeline_ids: Iterable[int],
    count: int,
    continued: Iterable[tuple[int, int]] = (),
    ahead: bool = False,
) -> tuple[Book, tuple[Lease, ...], tuple[Lease, ...]]:
    """Lease to pipelines that are formed: the book, leases of the book before that changed, and new ones.

    `continued`: (id, id in the round before) of pipelines that take over what was held ahead; what others
    held ahead in earlier rounds is void. `ahead`: each gets a lease for the round after, too.
    """
    ids, changed, new = list(pipeline_ids), list[Lease](), list[Lease]()
    for pipeline_id, before in continued:
        held = book.find(round - 1, before, ahead=True)
        if held is not None:
            lease = replace(held, round=round, pipeline_id=pipeline_id, ahead=False)
            book = replace(book, open=tuple(lease if x is held else x for x in book.open))
            changed.append(lease)
    book, ended = void_ahead(book, round)
    taken = {lease.pipeline_id for lease in changed}
    for later in (False, True) if ahead else (False,):
        for pipeline_id in ids:
            if later or pipeline_id not in taken:
                book, lease = grant(book, round, pipeline_id, count, later)
                new.append(lease)
    return book, (*changed, *ended), tuple(new)


def void_ahead(book: Book, before: int | None = None) -> tuple[Book, tuple[Lease, ...]]:
    """Nothing is held ahead any more: by anybody, or in rounds before `before`."""
    ended: list[Lease] = []
    for held in book.open:
        if held.ahead and (before is None or held.round < before):
            book, lease = void(book, held.round, held.pipeline_id, ahead=True)
            assert lease is not None, "it is open"
            ended.append(lease)
    return book, tuple(ended)


def close(book: Book, round: int, pipeline_id: int, trained: int | None = None) -> tuple[Book, Lease | None]:
    """The pipeline was accepted: its first `trained` positions are done for good, the rest is free again.

    Positions are trained in the order of the lease's ranges; None means all of them.
    """
    book, lease = _end(book, round, pipeline_id, LeaseState.CLOSED)
    if lease is None or trained is None:
        return book, lease
    done, rest = _split(lease.ranges, trained)
    return _give_back(book, rest), replace(lease, ranges=done)


def _split(ranges: Iterable[Range], count: int) -> tuple[tuple[Range, ...], tuple[Range, ...]]:
    """The first `count` positions, and the others."""
    first: list[Range] = []
    rest: list[Range] = []
    for item in ranges:
        cut = item.start + min(count, item.end - item.start)
        if item.start < cut:
            first.append(Range(item.start, cut))
        if cut < item.end:
            rest.append(Range(cut, item.end))
        count -= cut - item.start
    return tuple(first), tuple(rest)


def void(book: Book, round: int, pipeline_id: int, ahead: bool = False) -> tuple[Book, Lease | None]:
    """The pipeline does not count: its positions are free again."""
    book, lease = _end(book, round, pipeline_id, LeaseState.VOID, ahead)
    if lease is not None:
        book = _give_back(book, lease.ranges)
    return book, lease


def _give_back(book: Book, ranges: Iterable[Range]) -> Book:
    free, high = _merge((*book.free, *ranges)), book.high
    if free and free[-1].end == high:
        high = free[-1].start
        free = free[:-1]
    return replace(book, free=free, high=high)


def _end(book: Book, round: int, pipeline_id: int, state: LeaseState, ahead: bool = False) -> tuple[Book, Lease | None]:
    lease = book.find(round, pipeline_id, ahead)
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
