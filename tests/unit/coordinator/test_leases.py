"""Leases: given-back positions first, the same lease twice, every position closed once."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.leases import Book, Lease, LeaseState, Range, close, form, grant, restore, void, void_ahead


def test_asking_again_gives_the_same_lease() -> None:
    book, lease = grant(Book(), 1, 0, 10)
    again, same = grant(book, 1, 0, 10)
    assert (lease.ranges, same) == ((Range(0, 10),), lease)
    assert again == book


def test_void_positions_are_leased_first() -> None:
    book, _ = grant(Book(), 1, 0, 10)
    book, _ = grant(book, 1, 1, 10)
    book, _ = void(book, 1, 0)
    book, third = grant(book, 2, 0, 4)
    book, fourth = grant(book, 2, 1, 10)
    assert third.ranges == (Range(0, 4),)
    assert fourth.ranges == (Range(4, 10), Range(20, 24))


def test_a_lease_that_was_trained_in_part_gives_the_rest_back() -> None:
    book, _ = grant(Book(), 1, 0, 4)
    book, _ = grant(book, 1, 1, 4)
    book, _ = void(book, 1, 0)
    book, lease = grant(book, 2, 0, 6)
    assert lease.ranges == (Range(0, 4), Range(8, 10))
    book, closed = close(book, 2, 0, 3)
    assert closed is not None
    assert (closed.ranges, closed.state) == ((Range(0, 3),), LeaseState.CLOSED)
    assert (book.free, book.high) == ((Range(3, 4),), 8)
    book, lease = grant(book, 3, 0, 3)
    assert lease.ranges == (Range(3, 4), Range(8, 10))


def test_what_is_held_ahead_is_taken_over_under_its_id_or_free_again() -> None:
    book, changed, (first, second, ahead, other) = form(Book(), 1, [0, 1], 4, ahead=True)
    assert changed == ()
    assert [lease.ranges for lease in (first, second, ahead, other)] == [(Range(at, at + 4),) for at in (0, 4, 8, 12)]
    book, _ = close(book, 1, 0)
    book, _ = close(book, 1, 1)
    # Pipeline 0 goes on as pipeline 1; what pipeline 1 held ahead is leased to the one beside it, first of all.
    book, changed, new = form(book, 2, [0, 1], 4, continued=[(1, 0)])
    assert [(x.lease_id, x.round, x.pipeline_id, x.state, x.ahead) for x in changed] == [
        (ahead.lease_id, 2, 1, LeaseState.OPEN, False),
        (other.lease_id, 1, 1, LeaseState.VOID, True),
    ]
    assert [(lease.pipeline_id, lease.ranges) for lease in new] == [(0, other.ranges)]
    assert book.find(2, 1) == changed[0]
    assert (book.free, book.high) == ((), 16)


def test_a_job_that_rests_holds_nothing_ahead() -> None:
    book, _, _ = form(Book(), 1, [0, 1], 4, ahead=True)
    book, ended = void_ahead(book)
    assert {lease.state for lease in ended} == {LeaseState.VOID}
    assert [lease.ahead for lease in book.open] == [False, False]
    assert book.high == 8


def test_ending_an_unknown_lease_changes_nothing() -> None:
    assert close(Book(), 1, 0) == (Book(), None)
    assert void(Book(), 1, 0) == (Book(), None)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["grant", "close", "partial", "void", "rewind"]), st.integers(0, 5), st.integers(1, 9)
        ),
        max_size=60,
    )
)
def test_every_position_is_closed_at_most_once(steps: list[tuple[str, int, int]]) -> None:
    book = Book()
    leases: dict[int, Lease] = {}
    number: dict[int, int] = {}
    for what, pipeline_id, count in steps:
        round = number.get(pipeline_id, 0)
        if what == "rewind":
            # As a coordinator does it: no lease is open, and those of later rounds are forgotten.
            if book.open:
                continue
            leases = {key: lease for key, lease in leases.items() if lease.round < count}
            book = restore(leases.values())
        elif what == "grant":
            free_before = book.free
            fresh = book.find(round, pipeline_id) is None
            book, lease = grant(book, round, pipeline_id, count)
            if fresh:
                assert sum(r.end - r.start for r in lease.ranges) == count
                untouched = [r for r in lease.ranges if r.start >= book.high - count and r not in free_before]
                assert not book.free or not untouched or max(r.end for r in untouched) <= book.high
        else:
            if what == "partial":
                book, ended = close(book, round, pipeline_id, count)
            else:
                book, ended = (close if what == "close" else void)(book, round, pipeline_id)
            number[pipeline_id] = round + 1
            if ended is None:
                continue
            lease = ended
        if what != "rewind":
            leases[lease.lease_id] = lease
        kept = [x for x in leases.values() if x.state is not LeaseState.VOID]
        positions = [at for x in kept for r in x.ranges for at in range(r.start, r.end)]
        free = [at for r in book.free for at in range(r.start, r.end)]
        assert sorted(positions + free) == list(range(book.high)), "each position is in one place"
        assert restore(leases.values()) == book, "a restart knows the same"
