"""This node's work for a coordinator: register, poll, train what it is assigned, hold what was trained.

The poll is the heartbeat and brings the assignment. The lead of a pipeline (index 0) runs its
rounds; the other stages wait for the lead's chain, which is accepted only if it is exactly the
one the coordinator assigned. An assignment that changes ends what was going on for the old one,
unless that is only waiting for its round to settle, or training ahead for the new one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from node.abandon import abandon
from node.adapters import AdapterStore
from node.ahead import Ahead, leads_to, same_nodes
from node.datafiles import DataFiles
from node.finished import FinishedAdapters
from node.lead import LeadLoop, Progress, Tally
from node.lead_head import LeadHead
from node.link import Link
from node.member import Ended, JobMember, Work
from node.members import Members
from node.memory import Ledger
from node.scoring import Scorer
from node.serving import NodeModel
from node.stage_session import StageSession
from swarm.compute import Compute
from swarm.data.sources import Samples, open_samples
from swarm.errors import SessionError
from swarm.ids import Span
from swarm.metrics import Traffic
from swarm.net.chain import Chain, TrainingBinding
from swarm.net.p2p import Peer
from swarm.net.view import Hop
from swarm.wire.v1 import chain_pb2, common_pb2
from swarm.wire.v1 import coordinator_pb2 as pb
from swarm.wire.version import hello

POLL_WAIT_S = 2.0
ASSIGNMENT_TIMEOUT_S = 20.0
CHAIN_STEP_TIMEOUT_S = 300.0
log = structlog.get_logger()


class Worker:
    """Takes part in jobs. Run with `run` until cancelled."""

    def __init__(
        self,
        peer: Peer,
        compute: Compute,
        model: NodeModel,
        ledger: Ledger,
        link: Link,
        adapters: AdapterStore,
        traffic: Traffic,
        data_dir: Path,
        token_block_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """`token_block_s`: what a token and block take here, as it was measured last; 0 if it was not."""
        self._token_block_s = token_block_s
        self._peer = peer
        self._compute = compute
        self._model = model
        self._link = link
        self._traffic = traffic
        self._data_files = DataFiles(data_dir, link)
        self._members = Members(compute, model, ledger, link, data_dir, peer.peer_id)
        self._finished = FinishedAdapters(link, adapters)
        self._resuming: tuple[pb.Assignment, asyncio.Task[None]] | None = None
        self._assignment: pb.Assignment | None = None
        self._assigned = asyncio.Condition()
        self._progress = Progress()
        self._lead_task: asyncio.Task[None] | None = None
        self._ahead: Ahead | None = None
        self._scoring: tuple[pb.Assignment, asyncio.Task[None]] | None = None
        self._head = LeadHead(model, ledger, compute)
        self._datasets: dict[tuple[bytes, int], Samples] = {}
        self.reason = ""

    async def run(self) -> None:
        """Register and poll until cancelled; outages are waited out."""
        try:
            await self._register()
            seen = 0
            while True:
                request = pb.PollRequest(seen=seen, wait_s=POLL_WAIT_S, traffic=self._traffic.to_proto())
                if self._lead_task is not None and self._assignment is not None:
                    request.progress.CopyFrom(self._progress_message(self._assignment.job_id))
                reply = await self._link.call(lambda client, r=request: client.poll(r))  # type: ignore[misc]
                if reply.register_again:
                    await self._register()
                    continue
                seen = reply.version
                if reply.reason != self.reason:
                    self.reason = reply.reason
                    log.info("standing", reason=reply.reason or "working")
                await self._assign(reply.assignment if reply.HasField("assignment") else None)
                self._progress.wrap_up = reply.wrap_up
                self._score_if_asked(reply.assignment)
                self._finished.name(reply.adapters)
                for finished in reply.adapters:
                    self._members.finished(finished.job_id)
        finally:
            await self._end_all()

    async def _register(self) -> None:
        span = common_pb2.Span(start=self._model.span.start, end=self._model.span.end)
        request = pb.RegisterRequest(
            hello=hello(self._model.checkpoint.model_hash, ("train",)),
            span=span,
            addrs=self._peer.addrs,
            device=str(self._model.shard.device),
            dtype=str(self._model.shard.dtype).removeprefix("torch."),
            token_block_s=self._token_block_s(),
        )
        await self._link.call(lambda client: client.register(request))
        log.info("registered", blocks=str(self._model.span))

    def _progress_message(self, job_id: str) -> pb.TrainProgress:
        p = self._progress
        return pb.TrainProgress(
            job_id=job_id,
            round=p.round,
            inner_step=p.inner_step,
            loss=p.loss,
            tokens_per_s=p.tokens_per_s,
            skipped_steps=p.skipped_steps,
        )

    async def _assign(self, new: pb.Assignment | None) -> None:
        old = self._assignment
        if _same(old, new):
            return
        if self._scoring is not None:
            await _cancel(self._scoring[1])
            self._scoring = None
        if self._lead_task is not None and self._lead_task.done():
            self._lead_task = None
        if self._lead_task is not None:
            await _cancel(self._lead_task)
            self._lead_task = None
        if self._ahead is not None and not (new is not None and self._ahead.leads_to(new)):
            await self._drop_ahead()
        if self._resuming is not None and not (
            new is not None and new.job_id == self._resuming[0].job_id and new.round > self._resuming[0].round
        ):
            await _cancel(self._resuming[1])
            self._resuming = None
        if new is not None:
            await self._members.end_settling(new.job_id, new.round)
            self._members.make_room(new.job_id)
        async with self._assigned:
            self._assignment = new
            self._assigned.notify_all()
        if new is None:
            self._head.rest()
        elif new.index != 0:
            self._head.give_up()  # the stage needs the memory
        if new is not None:
            log.info("assigned", job=new.job_name, round=new.round, stage=new.index, of=len(new.hops))
            if new.index == 0:
                self._progress.wrap_up = False
                self._lead_task = asyncio.create_task(self._lead(new))
            elif new.job_id not in self._members and (self._resuming is None or self._resuming[1].done()):
                self._resuming = (new, asyncio.create_task(self._members.resume(new)))

    async def _drop_ahead(self) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            await ahead.drop()

    # ---- stage -------------------------------------------------------------------------------

    async def accept(self, caller: str, request: chain_pb2.Open) -> StageSession:
        """The stage of a lead's chain, if the coordinator assigned exactly this one. Raises SessionError."""

        def matches(mine: pb.Assignment) -> bool:
            return (
                mine.index == request.index
                and (mine.job_id, mine.pipeline_id, mine.generation)
                == (request.job_id, request.pipeline_id, request.generation)
                and [h.peer_id for h in mine.hops] == [h.peer_id for h in request.hops]
                and mine.hops[0].peer_id == caller
            )

        assignment = await self._when_assigned(matches)
        return StageSession(self, await self._members.get(assignment), assignment)

    async def next_assignment(self, old: pb.Assignment, begin: chain_pb2.BeginRound) -> pb.Assignment:
        """What a lead carries its chain into, once the coordinator assigned it. Raises SessionError: it did not."""

        def matches(mine: pb.Assignment) -> bool:
            named = (begin.round, begin.pipeline_id, begin.generation)
            same = (mine.job_id, mine.lineage, mine.index) == (old.job_id, old.lineage, old.index)
            return same and (mine.round, mine.pipeline_id, mine.generation) == named and same_nodes(mine, old)

        return await self._when_assigned(matches)

    def stands(self, assignment: pb.Assignment) -> bool:
        """Whether a chain of this assignment may go on: it is the node's, or the same nodes' of the round before."""
        mine = self._assignment
        return mine is None or _same(mine, assignment) or leads_to(assignment, mine)

    async def _when_assigned(self, matches: Callable[[pb.Assignment], bool]) -> pb.Assignment:
        def matching() -> pb.Assignment | None:
            mine = self._assignment
            return mine if mine is not None and matches(mine) else None

        try:
            async with asyncio.timeout(ASSIGNMENT_TIMEOUT_S), self._assigned:
                found: pb.Assignment | None = await self._assigned.wait_for(matching)
        except TimeoutError as error:
            raise SessionError("the coordinator did not assign this training chain to this node") from error
        assert found is not None
        return found

    def settle_later(self, member: JobMember, work: Work, ended: Ended) -> None:
        self._members.settle_later(member, work, ended)

    # ---- lead --------------------------------------------------------------------------------

    async def _lead(self, assignment: pb.Assignment) -> None:
        await self._reporting(assignment, self._lead_round(assignment))

    async def _reporting(self, assignment: pb.Assignment, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:
            # Whatever went wrong, the coordinator must know that this pipeline will not deliver.
            await abandon(self._link, assignment.job_id, assignment.job_name, assignment, error)

    def _score_if_asked(self, assignment: pb.Assignment) -> None:
        """Once for a committed round, beside the poll."""
        asked = assignment.score and assignment.index == 0
        if asked and (self._scoring is None or not _same(self._scoring[0], assignment)):
            self._scoring = (assignment, asyncio.create_task(self._reporting(assignment, self._score(assignment))))

    async def _score(self, assignment: pb.Assignment) -> None:
        """The held-out loss of the parameters that the next round starts from."""
        member = await self._members.get(assignment)
        digest, size, following = assignment.heldout, assignment.heldout_size, assignment.round + 1
        data = await self._data_files.get(digest, size)
        loop = await self._lead_loop(assignment, member)
        where = f"{assignment.job_name}, held out"
        head, tokenizer = await self._head.get(member.spec.precision)
        dataset = await asyncio.to_thread(open_samples, data, where, tokenizer, member.spec.schedule.max_length)
        if self._ahead is not None:
            await self._ahead.finished()  # the stages compute one thing at a time
        await member.prepare(following, lineage=assignment.lineage, to_score=True)

        async def open_chain() -> Chain | None:
            if len(assignment.hops) == 1:
                return None
            chain = await self._open_chain(assignment, member, scores=True)
            await chain.begin_round(following)
            return chain

        scorer = Scorer(head, member.stage, self._compute, open_chain)
        score = await scorer.score(loop.heldout_batches(dataset, len(assignment.hops)))
        log.info("scored", job=assignment.job_name, round=assignment.round, loss=score.loss, tokens=score.tokens)
        request = pb.ReportScoreRequest(
            job_id=assignment.job_id,
            round=assignment.round,
            generation=assignment.generation,
            pipeline_id=assignment.pipeline_id,
            loss=score.loss,
            tokens=score.tokens,
        )
        await self._link.call(lambda client: client.report_score(request))

    async def _lead_round(self, assignment: pb.Assignment) -> None:
        member = await self._members.get(assignment)
        loop = await self._lead_loop(assignment, member)
        lease_request = pb.LeaseRequest(
            job_id=assignment.job_id,
            round=assignment.round,
            generation=assignment.generation,
            pipeline_id=assignment.pipeline_id,
        )
        lease = await self._link.call(lambda client: client.lease(lease_request))
        done, chain = await self._done_ahead(lease)
        trains_on, use = False, member.uses
        try:
            if done is not None:
                if chain is not None:
                    await chain.carry_into(assignment.round, assignment.pipeline_id, assignment.generation)
                await member.carry(assignment.round, assignment.base_hash)
            else:
                await member.prepare(assignment.round, assignment.base_hash, assignment.lineage)
                use = member.uses
                if len(assignment.hops) > 1:
                    chain = await self._open_chain(assignment, member)
                    await chain.begin_round(assignment.round)
            work = await loop.train_round(assignment, lease, chain, done)
            # From here on the round is the coordinator's: a new assignment must not end it.
            self.settle_later(member, work, await member.end_steps())
            if lease.HasField("ahead"):
                steps = loop.train_ahead(assignment, lease.ahead, chain)
                self._ahead = Ahead(assignment, lease.ahead.lease_id, chain, steps, partial(member.leave, member.uses))
                trains_on = True
        finally:
            if not trains_on:
                if chain is not None:
                    await chain.close()
                await member.leave(use)

    async def _done_ahead(self, lease: pb.LeaseReply) -> tuple[Tally | None, Chain | None]:
        """What was trained of this lease already, once it is done, and the chain that it went over."""
        if self._ahead is None:
            return None, None
        done = await self._ahead.finished() if self._ahead.lease_id == lease.lease_id else None
        if done is None:
            await self._drop_ahead()
            return None, None
        ahead, self._ahead = self._ahead, None
        return done, ahead.chain

    async def _lead_loop(self, assignment: pb.Assignment, member: JobMember) -> LeadLoop:
        head, tokenizer = await self._head.get(member.spec.precision)
        digest, size, max_length = assignment.dataset, assignment.dataset_size, member.spec.schedule.max_length
        if (digest, max_length) not in self._datasets:
            data = await self._data_files.get(digest, size)
            samples = await asyncio.to_thread(open_samples, data, assignment.job_name, tokenizer, max_length)
            self._datasets = {(digest, max_length): samples}
        dataset = self._datasets[digest, max_length]
        return LeadLoop(member.spec, dataset, tokenizer, head, member.stage, self._compute, self._progress)

    async def _open_chain(self, assignment: pb.Assignment, member: JobMember, scores: bool = False) -> Chain:
        hops = [Hop(h.peer_id, Span(h.span.start, h.span.end), tuple(h.addrs)) for h in assignment.hops]
        packs = member.spec.data.packing and not scores
        binding = TrainingBinding(assignment.job_id, assignment.pipeline_id, assignment.generation, packs, scores)
        return await Chain.open(
            self._peer,
            hops,
            chain_pb2.MODE_TRAIN,
            self._model.checkpoint.model_hash,
            first=1,
            training=binding,
            encoding=member.spec.activations,
            dtype=self._model.shard.dtype,
            device=self._model.shard.device,
            timeout_s=CHAIN_STEP_TIMEOUT_S,
            count=self.count_activations,
        )

    def count_activations(self, size: int) -> None:
        self._traffic.activation_bytes += size

    # ---- the end ---------------------------------------------------------------------------

    async def _end_all(self) -> None:
        scoring = None if self._scoring is None else self._scoring[1]
        resuming = None if self._resuming is None else self._resuming[1]
        for task in [self._lead_task, scoring, resuming]:
            if task is not None:
                await _cancel(task)
        await self._members.stop()
        await self._finished.stop()
        await self._drop_ahead()
        self._head.give_up()


def _same(old: pb.Assignment | None, new: pb.Assignment | None) -> bool:
    if old is None or new is None:
        return old is new
    return (old.job_id, old.round, old.generation, old.pipeline_id) == (
        new.job_id,
        new.round,
        new.generation,
        new.pipeline_id,
    )


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
