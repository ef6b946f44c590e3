"""Whatever happens in whatever order: the invariants of rounds and leases hold after every event."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from coordinator import leases
from coordinator.leases import Book, Lease, LeaseState
from coordinator.placement import Member, form_pipelines
from coordinator.round_events import (
    Abandoned,
    AggregateDone,
    Change,
    CommitNow,
    Contribution,
    Event,
    NextRound,
    NodeLost,
    Offer,
    Pause,
    Resume,
    Rewind,
    Scored,
    Stop,
    Tick,
    Unusable,
)
from coordinator.round_model import (
    Aggregate,
    Answer,
    Commit,
    ContributionHeld,
    FormPipelines,
    JobChanged,
    JobState,
    OpenNext,
    Phase,
    PipelineLost,
    PipelinesFormed,
    Reply,
    Rewound,
    RoundCommitted,
    RoundFrozen,
    RoundReopened,
    RoundsState,
    Rules,
    Settings,
    Standing,
)
from coordinator.rounds import advance, begin, broken_by, recover
from swarm.ids import Span

N_BLOCKS = 4
PER_LEASE = 6
PHASES = list(Phase)
NODES = [Member(f"n{i}", Span(*ends)) for i, ends in enumerate([(0, 2), (2, 4), (0, 4), (1, 4), (0, 3), (3, 4)])]
PEERS = st.sampled_from([node.peer for node in NODES])


class RoundsMachine(RuleBasedStateMachine):
    """Random events against the real state machine, with the book of leases a driver would keep."""

    @initialize(
        min_pipelines=st.integers(1, 2),
        here=st.sets(PEERS, min_size=3),
        eval_every=st.integers(0, 2),
        patience=st.integers(0, 1),
        overlap_steps=st.integers(0, 2),
    )
    def start(self, min_pipelines: int, here: set[str], eval_every: int, patience: int, overlap_steps: int) -> None:
        self.now_s = 0.0
        rules = Rules(3, 100.0, min_pipelines, 3, 0.5, 3, eval_every, patience, overlap_steps=overlap_steps)
        self.state, effects = begin(rules)
        self.here = here
        self.book = Book()
        self.all_leases: dict[int, Lease] = {}
        self.pending: list[object] = []
        self.lease_rounds: dict[int, int] = {}
        self.named: set[tuple[int, int]] = set()
        self.held: dict[tuple[int, int, str], bytes] = {}
        self.accepted: set[tuple[int, str]] = set()
        self.unusable: set[tuple[int, int, int]] = set()
        self._perform(effects)

    # --- what a driver does with effects ------------------------------------------------------

    def _step(self, event: Event) -> Reply | None:
        before = self.state
        self.state, effects = advance(before, event)
        if not any(isinstance(effect, Rewound | RoundReopened) for effect in effects):
            self._check_progress(before, self.state)
        self._perform(effects)
        return next((effect for effect in effects if isinstance(effect, Reply)), None)

    def _perform(self, effects: tuple[object, ...]) -> None:
        for effect in effects:
            match effect:
                case PipelinesFormed(number, generation, pipelines):
                    assert (number, generation) not in self.named, "a generation comes once, rewound or not"
                    self.named.add((number, generation))
                    ids = [pipeline.pipeline_id for pipeline in pipelines]
                    assert effect.ahead == (self.state.rules.overlap_steps > 0 and number < self.state.rules.rounds)
                    self.book, changed, new = leases.form(
                        self.book, number, ids, PER_LEASE, effect.continued, effect.ahead
                    )
                    taken = [lease for lease in changed if lease.state is LeaseState.OPEN]
                    assert all(self.all_leases[lease.lease_id].ahead for lease in taken)
                    # Fewer where the job had no next round when these were formed.
                    assert len(taken) <= len(effect.continued)
                    self.all_leases |= {lease.lease_id: lease for lease in (*changed, *new)}
                case ContributionHeld(number, pipeline_id, held, _):
                    assert (number, pipeline_id, held.peer) not in self.held
                    self.held[number, pipeline_id, held.peer] = held.payload
                case PipelineLost(number, pipeline_id, _):
                    self._exclude(number, pipeline_id)
                case RoundFrozen(number, accepted, late):
                    assert accepted
                    assert not set(accepted) & set(late)
                    for pipeline_id in late:
                        self._exclude(number, pipeline_id)
                case RoundCommitted(number, accepted):
                    for pipeline_id in accepted:
                        pipeline = self.state.pipeline(pipeline_id)
                        assert pipeline is not None
                        (steps,) = {held.inner_steps for held in pipeline.held}
                        self._end(*leases.close(self.book, number, pipeline_id, steps * PER_LEASE // 3))
                        for member in pipeline.members:
                            assert (number, pipeline_id, member.peer) in self.held, "accepted, not whole"
                            assert (number, member.peer) not in self.accepted, "accepted twice"
                            self.accepted.add((number, member.peer))
                case Rewound(number, _, _):
                    self.all_leases = {key: x for key, x in self.all_leases.items() if x.round <= number}
                    self.book = leases.restore(self.all_leases.values())
                    self.held = {key: payload for key, payload in self.held.items() if key[0] <= number}
                    self.accepted = {key for key in self.accepted if key[0] <= number}
                    self.pending.clear()
                case JobChanged(job) if job is not JobState.RUNNING:
                    self.book, ended = leases.void_ahead(self.book)
                    self.all_leases |= {lease.lease_id: lease for lease in ended}
                case FormPipelines() | Aggregate() | Commit() | OpenNext():
                    self.pending.append(effect)
                case _:
                    pass

    def _exclude(self, number: int, pipeline_id: int) -> None:
        self._end(*leases.void(self.book, number, pipeline_id))
        if self.book.find(number, pipeline_id, ahead=True) is not None:
            self._end(*leases.void(self.book, number, pipeline_id, ahead=True))

    def _end(self, book: Book, lease: Lease | None) -> None:
        assert lease is not None, "every pipeline has a lease that ends once"
        self.book = book
        self.all_leases[lease.lease_id] = lease

    @staticmethod
    def _check_progress(before: RoundsState, after: RoundsState) -> None:
        if after.round == before.round:
            assert PHASES.index(after.phase) >= PHASES.index(before.phase)
            assert after.generation >= before.generation
        else:
            assert (after.round, before.phase, after.phase) == (
                before.round + 1,
                Phase.COMMITTED,
                Phase.OPEN,
            )
        if before.job is JobState.FINISHED:
            assert after == before

    # --- what happens -------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([1.0, 30.0, 101.0]))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        self._step(Tick(self.now_s, self._absent()))

    @rule(peer=PEERS)
    def node_joins(self, peer: str) -> None:
        self.here.add(peer)
        self._offer()

    @rule(peer=PEERS)
    def node_is_lost(self, peer: str) -> None:
        self.here.discard(peer)
        spares = self._spares(broken_by(self.state, peer))
        self._step(NodeLost(self.now_s, peer, "silent", spares, self._absent()))

    @rule(peer=PEERS, payload=st.sampled_from([b"x", b"y"]), back=st.integers(0, 1), other=st.booleans())
    def contribution(self, peer: str, payload: bytes, back: int, other: bool) -> None:
        mine = [p for p in self.state.pipelines if p.has(peer)]
        if not mine:
            return
        pipeline = mine[-1] if not other else mine[0]
        # Asked to wrap up, pipelines do one, two or all three of the inner steps, each node of one as many.
        steps = 1 + pipeline.pipeline_id % 3 if self.state.wrapping and not pipeline.held else 3
        steps = pipeline.held[0].inner_steps if pipeline.held else steps
        number = self.state.round - back
        event = Contribution(
            *(self.now_s, number, pipeline.generation, pipeline.pipeline_id, peer, payload), inner_steps=steps
        )
        key = (event.round, pipeline.pipeline_id, peer)
        known = self.held.get(key)
        count = len(self.held)
        reply = self._step(event)
        assert reply is not None
        assert (len(self.held) == count + 1) == (reply.answer is Answer.HELD)
        if back == 0 and known is not None:
            assert reply.answer is (Answer.DUPLICATE if known == payload else Answer.CONFLICT)
        if reply.answer is Answer.HELD:
            again = self._step(event)
            assert again == Reply(Answer.DUPLICATE), "one effect a contribution"

    @rule(which=st.integers(0, 3))
    def whole_pipeline(self, which: int) -> None:
        active = self.state.with_standing(Standing.ACTIVE)
        if active:
            pipeline = active[which % len(active)]
            for member in pipeline.members:
                if pipeline.payload_of(member.peer) is None:
                    self.contribution(member.peer, b"x", 0, False)

    @rule(peer=PEERS)
    def lead_abandons(self, peer: str) -> None:
        for pipeline in self.state.pipelines:
            if pipeline.members[0].peer == peer:
                number = pipeline.pipeline_id
                spares, absent = self._spares([number]), self._absent()
                self._step(
                    Abandoned(self.now_s, self.state.round, number, "out of memory", spares, absent=absent),
                )

    @rule(loss=st.sampled_from([1.0, 2.0, 3.0]))
    def lead_scores(self, loss: float) -> None:
        asked = self.state.scorer
        self._step(Scored(self.state.round, loss, 7))
        assert self.state.scorer is None
        if asked is not None:
            assert self.state.best is not None
            assert self.state.best.loss <= loss

    @precondition(lambda self: self.state.phase is Phase.FROZEN)
    @rule(which=st.sets(st.integers(0, 3), min_size=1))
    def payloads_rot(self, which: set[int]) -> None:
        before = self.state
        lost = [p for at, p in enumerate(before.with_standing(Standing.WHOLE)) if at in which]
        self.unusable |= {(before.round, p.generation, p.pipeline_id) for p in lost}
        self._step(Unusable(before.round, tuple((p.pipeline_id, "damaged") for p in lost)))
        assert all(self.state.pipeline(p.pipeline_id).standing is Standing.LOST for p in lost)
        reopened = len(lost) == len(before.with_standing(Standing.WHOLE))
        assert (self.state.phase is Phase.OPEN) == reopened
        assert not reopened or self.state.order is None

    @rule()
    def owner_resumes(self) -> None:
        self._step(Resume())

    @rule()
    def owner_pauses(self) -> None:
        self._step(Pause("paused by its owner"))
        assert self.state.order is not None or self.state.job in (JobState.PAUSED, JobState.FINISHED)

    @rule(back=st.integers(1, 2))
    def owner_rewinds(self, back: int) -> None:
        target = self.state.committed - back
        generations = max((g for number, g in self.named if number > target), default=0)
        best = self.state.best if self.state.best and self.state.best.round <= target else None
        self._step(Rewind(target, generations, best=best))

    @precondition(lambda self: self.state.round == 3)
    @rule()
    def owner_stops(self) -> None:
        self._step(Stop("stopped by its owner"))

    @rule(rounds=st.integers(3, 4), min_pipelines=st.integers(1, 2))
    def owner_changes(self, rounds: int, min_pipelines: int) -> None:
        rules = replace(self.state.rules, rounds=rounds, min_pipelines=min_pipelines)
        self._step(Change(Settings(rules, f"{rules}")))
        finished = self.state.job is JobState.FINISHED
        assert finished or rules in (self.state.rules, self.state.next and self.state.next.rules)

    @precondition(lambda self: self.pending)
    @rule()
    def driver_works(self) -> None:
        self._work()

    @precondition(lambda self: self.pending)
    @rule()
    def driver_catches_up(self) -> None:
        while self.pending:
            self._work()

    def _work(self) -> None:
        match self.pending.pop(0):
            case FormPipelines():
                self._offer()
            case Aggregate(number):
                self._step(AggregateDone(number))
            case Commit(number):
                self._step(CommitNow(number, self.now_s, self._absent()))
            case OpenNext():
                plans, missing = self._placement()
                self._step(NextRound(self.now_s, plans, missing))

    @rule()
    def restart(self) -> None:
        before = self.state
        self.state, effects = recover(before.stored(), self.now_s)
        assert self.state.stored() == before.stored()
        self.pending = list(effects)
        restored = leases.restore(self.all_leases.values())
        assert restored == self.book

    def _absent(self) -> frozenset[str]:
        return frozenset({node.peer for node in NODES} - self.here)

    def _offer(self) -> None:
        plans, missing = self._placement()
        self._step(Offer(self.now_s, plans, missing))

    def _spares(self, broken: list[int]):  # type: ignore[no-untyped-def]
        taken = {
            member.peer
            for pipeline in self.state.with_standing(Standing.ACTIVE, Standing.WHOLE)
            if pipeline.pipeline_id not in broken
            for member in pipeline.members
        }
        nodes = [node for node in NODES if node.peer in self.here - taken]
        return form_pipelines(nodes, N_BLOCKS).pipelines

    def _placement(self):  # type: ignore[no-untyped-def]
        placement = form_pipelines([node for node in NODES if node.peer in self.here], N_BLOCKS)
        return placement.pipelines, placement.missing

    # --- what always holds --------------------------------------------------------------------

    @invariant()
    def no_position_is_accepted_twice_or_leased_beside(self) -> None:
        taken: list[int] = []
        for lease in self.all_leases.values():
            if lease.state is not LeaseState.VOID:
                count = sum(r.end - r.start for r in lease.ranges)
                assert count == PER_LEASE or (lease.state is LeaseState.CLOSED and count in (2, 4))
                taken += [at for r in lease.ranges for at in range(r.start, r.end)]
        assert len(taken) == len(set(taken))
        free = [at for r in self.book.free for at in range(r.start, r.end)]
        assert sorted(taken + free) == list(range(self.book.high))

    @invariant()
    def a_node_counts_once_a_round(self) -> None:
        counting = self.state.with_standing(Standing.ACTIVE, Standing.WHOLE)
        peers = [member.peer for pipeline in counting for member in pipeline.members]
        assert len(peers) == len(set(peers))

    @invariant()
    def states_fit_together(self) -> None:
        state = self.state
        active = state.with_standing(Standing.ACTIVE)
        if state.phase is not Phase.OPEN:
            assert not active
            assert state.with_standing(Standing.WHOLE)
        if state.job in (JobState.WAITING, JobState.PAUSED):
            assert not active
            assert state.reason, "a job that does not run says why"
        if state.job is not JobState.RUNNING:
            assert not any(lease.ahead for lease in self.book.open), "nobody trains ahead"
        if state.order is not None:
            assert state.phase in (Phase.FROZEN, Phase.AGGREGATED), "an order waits for a commit, and for nothing else"
        if state.scorer is not None:
            asked = state.pipeline(state.scorer)
            assert state.phase is Phase.COMMITTED
            assert state.job is JobState.RUNNING
            assert asked is not None
            assert asked.standing is Standing.WHOLE
            assert {member.peer for member in asked.members} <= self.here, "asked, and not here"
        timed = state.job is JobState.RUNNING and (state.phase is Phase.OPEN or state.scorer is not None)
        assert (state.deadline_s is not None) == timed
        for pipeline in state.pipelines:
            whole = len(pipeline.held) == len(pipeline.members)
            unusable = (state.round, pipeline.generation, pipeline.pipeline_id) in self.unusable
            assert whole == (pipeline.standing is Standing.WHOLE or unusable)
            assert not (unusable and pipeline.standing is Standing.WHOLE)


RoundsMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=80, deadline=None, database=None, derandomize=True
)
TestRounds = RoundsMachine.TestCase
