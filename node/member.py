"""This node's part in one job, round by round: prepare, contribute, settle.

    prepare(round)   hold the parameters the round starts from: kept, updated, or from a snapshot
    end_steps()      what the last inner step left, for the contribution
    contribute(…)    delta → error feedback → compress → to disk → upload → receipt
    settle(round)    final receipt and commit → apply the published update → to disk
    carry(round)     in place of prepare, with rounds that overlap: what was trained since `end_steps` stays

The reference parameters are the fp32 sum of decoded updates, added in the coordinator's order, and
their hash is checked after every round; a mismatch fetches a snapshot. A contribution that was
not accepted is void: its samples are leased again, so its delta does not enter the residual. Inner
work that did not count leaves nothing behind: a round that is trained again, here or by a node that came
back, starts from the moments that it started from before, and ends with the same bytes.

With rounds that overlap, inner steps go on from the parameters as they are while the round is closed.
Once its update is there the parameters become the new reference plus what was trained since the
round's end (delayed DiLoCo): the own delta of the round, which the update contains as far as it was
sent, is taken out with the old reference. The next delta is relative to the new reference as ever.

With `inner.start: own` a node does not go back to the reference: what it could not send stays in its parameters,
and inner steps build on it. The delta then holds the residual without its being added.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import sqrt
from typing import Any, TypeVar

import numpy as np
import structlog

from node.jobstate import JobFolder, PendingContribution, SavedState
from node.link import Link
from node.stage import AdapterStage
from node.step import RANK_FORWARD
from swarm.adapters.registry import ModelAdapters, Parameters
from swarm.compress import FrameContext, compress_with_feedback
from swarm.compute import Compute, Priority
from swarm.config import JobSpec
from swarm.errors import CodecError, ContributionError, CorruptData, JobConflict
from swarm.ids import Span, block_of, sha256
from swarm.optim.params import block_hash, by_block, hash_all, params_hash, unpack_block
from swarm.optim.update import updated_block
from swarm.wire.v1 import common_pb2
from swarm.wire.v1 import coordinator_pb2 as pb

FIRST_ROUND = 1
_WAIT_S = 20.0
_COUNTED = (pb.VERDICT_ACCEPTED, pb.VERDICT_CLIPPED)
_VOID = (pb.VERDICT_LATE, pb.VERDICT_REJECTED)
log = structlog.get_logger()
T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """What a finished set of inner steps tells the coordinator beside the delta."""

    round: int
    generation: int
    pipeline_id: int
    inner_steps: int
    tokens: int
    lease_id: int
    loss: float | None = None
    """Mean over the round's inner steps; the lead knows it."""
    skipped_steps: int = 0
    """Of `inner_steps`: their loss or gradient was not finite."""
    label_tokens: int = 0
    """Tokens that carried loss; the lead knows it."""


@dataclass(frozen=True)
class Ended:
    """This node's blocks as the last inner step of a round left them."""

    values: Parameters
    moments: Parameters


class JobMember:
    """One job on this node. Calls are serialized: a round is settled before the next is prepared."""

    def __init__(
        self,
        job_id: str,
        spec: JobSpec,
        span: Span,
        stage: AdapterStage,
        adapters: ModelAdapters,
        compute: Compute,
        link: Link,
        folder: JobFolder,
    ) -> None:
        self.job_id = job_id
        self.spec = spec
        self.span = span
        self.stage = stage
        self._adapters = adapters
        self._compute = compute
        self._link = link
        self._folder = folder
        self._lock = asyncio.Lock()
        self.uses = 0
        """How often it was prepared: tells whoever did so last from others."""
        self._round = 0
        """The round that `_reference` starts; 0 before the first `prepare`."""
        self._reference: Parameters = {}
        self._base_hash = b""
        self._residual: Parameters = {}
        self._lineage = 0
        self._moments: Parameters = {}
        """AdamW's at the start of `_round`, as `AdapterStage.moments` gives them."""
        self._ended: Parameters | None = None
        """With rounds that overlap: the parameters since which inner steps may be carried into the next round."""
        self._aside: Parameters | None = None
        """What such steps have made of them, while the stage holds the reference."""

    async def prepare(self, round: int, base_hash: bytes = b"", lineage: int = 0, *, to_score: bool = False) -> None:
        """Hold the parameters that `round` starts from, with no inner work on top of them.

        `base_hash` is what the coordinator says all parameters hash to, `lineage` its number for the
        history they follow from: after rounds were discarded, what this node carried over is void.
        `to_score`: only to look at them; what may be carried into the round is set aside, not dropped.
        """
        self.uses += 1
        async with self._lock:
            if self._round == 0:
                await self._restore()
            if lineage != self._lineage:
                await self._forget(lineage)
            if self._round == 0 and round == FIRST_ROUND:
                await asyncio.to_thread(self._initialize)
            await self._reach(round, base_hash)
            if not to_score:
                self._ended = self._aside = None
            elif self._ended is not None and self._aside is None:
                self._aside = await self._on_thread(self.stage.values)
            start = self._reference if to_score else self._start()
            await self._on_thread(self.stage.reset, start)
            if not to_score:
                await self._on_thread(self.stage.set_moments, self._moments)

    async def _on_thread(self, piece: Callable[..., T], *args: Any) -> T:
        """Behind every step of the stage that came before: steps are not answered, so nobody has waited for them."""
        return await self._compute.run(Priority.TRAIN, piece, *args, rank=RANK_FORWARD)

    async def _reach(self, round: int, base_hash: bytes) -> None:
        """Hold the reference that `round` starts from."""
        pending = await asyncio.to_thread(self._folder.load_pending) if self._round < round else None
        if pending is not None and pending.round == self._round:
            # Its end was not seen, for an error on the way; the residual depends on it.
            await self._settle(pending.round)
        if self._round != round or (base_hash and self._base_hash != base_hash):
            await self._catch_up(round)

    def _start(self) -> Parameters:
        """What inner steps of `_round` start from."""
        if self.spec.inner.start == "reference":
            return self._reference
        residual = self._residual
        return {key: value - residual[key] if key in residual else value for key, value in self._reference.items()}

    async def end_steps(self) -> Ended:
        """What the round's inner steps came to. Inner steps after it are the next round's."""

        def look() -> Ended:
            return Ended(self.stage.values(), self.stage.moments())

        ended = await self._on_thread(look)
        self._ended = ended.values if self.spec.schedule.overlap_steps else None
        self._aside = None
        return ended

    async def carry(self, round: int, base_hash: bytes) -> None:
        """Hold what `round` starts from plus what was trained since `end_steps`.

        Returns once the round before is settled. Raises JobConflict: there is nothing to go on from.
        """
        async with self._lock:
            if self._ended is None:
                raise JobConflict(
                    f"this node has trained nothing ahead for round {round} of job {self.job_id}",
                    "nothing to do: the pipeline is formed again",
                )
            await self._reach(round, base_hash)
            ended, aside, start = self._ended, self._aside, self._start()

            def correct() -> None:
                now = self.stage.values() if aside is None else aside
                self.stage.reset({key: start[key] + (now[key] - ended[key]) for key in start})

            await self._on_thread(correct)
            self._ended = self._aside = None
            log.info("carried", job=self.job_id, round=round)

    async def leave(self, use: int) -> None:
        """Who prepared it, as `uses` was then, goes: graphs and gradients that a broken step left go too.

        Without effect if it was prepared again since. Parameters stay.
        """
        if use == self.uses:
            await self._on_thread(self.stage.forget)
            self.stage.give_back()

    async def contribute_and_settle(self, work: Work, ended: Ended) -> None:
        """Send this node's delta of the round and see the round through to its end.

        `ended` is what `end_steps` gave; the stage may train on meanwhile. Raises ContributionError: it was rejected.
        One that comes too late is void, and its round not waited for.
        """
        async with self._lock:
            receipt = await self._contribute(work, ended)
            if receipt.verdict not in _VOID:
                await self._settle(work.round)
                return
            await asyncio.to_thread(self._folder.clear_pending)
            if receipt.verdict == pb.VERDICT_REJECTED:
                raise ContributionError(f"the contribution to round {work.round} was rejected: {receipt.reason}")
            log.warning("contribution_void", job=self.job_id, round=work.round, reason=receipt.reason)

    async def finish_pending(self) -> None:
        """After a restart: finish a contribution that was begun. Call before the first `prepare`."""
        pending = await asyncio.to_thread(self._folder.load_pending)
        if pending is None:
            return
        request = pb.ContributeRequest.FromString(pending.request)
        log.info("contribution_resumed", job=self.job_id, round=pending.round)
        async with self._lock:
            saved = await asyncio.to_thread(self._folder.load)
            # Before its first round is settled a job has no state.
            if pending.round != (FIRST_ROUND if saved is None else saved.round):
                self._folder.clear_pending()
                return
            if saved is None:
                await asyncio.to_thread(self._initialize)
            else:
                self._adopt(saved)
            receipt = await self._upload(request, pending.payload)
            if receipt.verdict in _VOID:
                self._folder.clear_pending()
                return
            await self._settle(pending.round)

    async def _contribute(self, work: Work, ended: Ended) -> pb.Receipt:
        context = FrameContext(self.job_id, work.round, self._base_hash)

        def compress() -> tuple[bytes, Parameters]:
            delta = {key: self._reference[key] - value for key, value in ended.values.items()}
            # What inner steps started from holds the residual, and so does the delta.
            carried = self._residual if self.spec.inner.start == "reference" else {}
            compressed = compress_with_feedback(delta, carried or None, self.spec.uplink, context)
            return compressed.frame, compressed.residual

        payload, residual = await asyncio.to_thread(compress)
        request = pb.ContributeRequest(
            job_id=self.job_id,
            round=work.round,
            generation=work.generation,
            pipeline_id=work.pipeline_id,
            payload_sha256=sha256(payload),
            payload_size=len(payload),
            inner_steps=work.inner_steps,
            tokens=work.tokens,
            lease_id=work.lease_id,
            skipped_steps=work.skipped_steps,
            label_tokens=work.label_tokens,
            span=common_pb2.Span(start=self.span.start, end=self.span.end),
        )
        if work.loss is not None:
            request.loss = work.loss
        pending = PendingContribution(work.round, request.SerializeToString(), payload, residual, ended.moments)
        await asyncio.to_thread(self._folder.save_pending, pending)
        receipt = await self._upload(request, payload)
        log.info(
            "contributed",
            job=self.job_id,
            round=work.round,
            bytes=len(payload),
            verdict=pb.Verdict.Name(receipt.verdict),
            reason=receipt.reason,
        )
        return receipt

    async def _upload(self, request: pb.ContributeRequest, payload: bytes) -> pb.Receipt:
        await self._link.call(lambda client: client.put_blob(payload, contribution=True))
        return await self._link.call(lambda client: client.contribute(request))

    async def _settle(self, round: int) -> None:
        request = pb.AwaitRoundRequest(job_id=self.job_id, round=round, wait_s=_WAIT_S)
        while True:
            reply = await self._link.call(lambda client: client.await_round(request))
            if reply.committed or reply.finished or reply.receipt.verdict in _VOID:
                break
        pending = await asyncio.to_thread(self._folder.load_pending)
        counted = reply.receipt.verdict in _COUNTED
        if pending is not None and pending.round == round and counted:
            self._keep(pending.residual, pending.moments)
        if not counted:
            log.warning("contribution_void", job=self.job_id, round=round, reason=reply.receipt.reason)
        if reply.committed:
            await self._apply(reply.update)
            await self._save()
            own_hash = await asyncio.to_thread(lambda: params_hash(self.block_hashes()).hex())
            log.info("settled", job=self.job_id, round=round, own_hash=own_hash)
        await asyncio.to_thread(self._folder.clear_pending)

    async def _apply(self, update: pb.OuterUpdate) -> None:
        """Reach the parameters after a round: its update on what this node holds, if that is the round's start and
        comes to the same hashes, else its snapshot."""
        if self._round == update.round and self._reference.keys() == self.stage.shapes.keys():
            try:
                self._reference = await self._updated(update)
                self._base_hash = update.params_hash
            except (CorruptData, CodecError) as error:
                log.warning("update_mismatch", job=self.job_id, round=update.round, error=str(error))
                await self._take_snapshot(update)
        else:
            await self._take_snapshot(update)
        self._round = update.round + 1

    async def _updated(self, update: pb.OuterUpdate) -> Parameters:
        frames = await self._ranges(update.blob, update.blocks)
        hashes = {entry.block: entry.params_hash for entry in update.snapshot_blocks}
        result: Parameters = {}
        for block, keys in by_block(self._reference).items():
            before = {key: self._reference[key] for key in keys}
            # A block that nobody sent did not change and is not in the update.
            frame = frames[block][1] if block in frames else b""
            expected = hashes.get(block, b"")
            result |= await asyncio.to_thread(updated_block, block, before, frame, self.job_id, update.round, expected)
        return result

    async def _take_snapshot(self, update: pb.OuterUpdate) -> None:
        pieces = await self._ranges(update.snapshot, update.snapshot_blocks)
        missing = set(by_block(self.stage.shapes)) - set(pieces)
        if missing:
            raise CorruptData(f"the snapshot after round {update.round} lacks blocks {', '.join(sorted(missing))}")

        def unpack() -> Parameters:
            result: Parameters = {}
            for block, keys in by_block(self.stage.shapes).items():
                entry, raw = pieces[block]
                values = unpack_block(raw, {key: self.stage.shapes[key] for key in keys})
                if block_hash(values) != entry.params_hash:
                    raise CorruptData(f"the snapshot of block {block} after round {update.round} has another hash")
                result |= values
            return result

        self._reference = await asyncio.to_thread(unpack)
        self._base_hash = update.params_hash

    async def _ranges(self, blob: bytes, blocks: Iterable[pb.BlockUpdate]) -> dict[str, tuple[pb.BlockUpdate, bytes]]:
        """This node's blocks out of a blob, in one download where they lie together; each verified."""
        own = set(by_block(self.stage.shapes))
        wanted = [entry for entry in blocks if entry.block in own]
        if not wanted:
            return {}
        start = min(entry.offset for entry in wanted)
        end = max(entry.offset + entry.length for entry in wanted)
        content = await self._link.call(lambda client: client.get_range(blob, start, end - start))

        def cut() -> dict[str, tuple[pb.BlockUpdate, bytes]]:
            pieces = {}
            for entry in wanted:
                piece = content[entry.offset - start : entry.offset - start + entry.length]
                if sha256(piece) != entry.sha256:
                    raise CorruptData(f"block {entry.block} of the round's blob has another hash")
                pieces[entry.block] = (entry, piece)
            return pieces

        return await asyncio.to_thread(cut)

    async def _restore(self) -> None:
        """On the first round since the start: what the disk holds."""
        saved = await asyncio.to_thread(self._folder.load)
        if saved is not None:
            self._adopt(saved)

    async def _forget(self, lineage: int) -> None:
        """Rounds were discarded: residual, moments and parameters are of a history that did not happen."""
        log.info("rounds_discarded", job=self.job_id, lineage=lineage)
        self._lineage, self._round = lineage, 0
        self._reference, self._base_hash = {}, b""
        self._residual, self._moments = {}, {}
        self._ended = self._aside = None
        self._folder.clear_pending()

    def _initialize(self) -> None:
        whole = self._adapters.initial(self.spec.method, self.spec.schedule.seed)
        self._reference = {key: whole[key] for key in whole if int(block_of(key)) in self.span}
        self._base_hash = hash_all(whole)
        self._round = FIRST_ROUND

    def _adopt(self, saved: SavedState) -> None:
        """Go on from the disk. After the pipeline was cut elsewhere it holds other blocks than this node does now: of
        those that it still has, residual and moments stay, and the reference comes with the next snapshot."""
        self._lineage = saved.lineage
        if saved.reference.keys() == self.stage.shapes.keys():
            self._reference, self._base_hash, self._round = saved.reference, saved.base_hash, saved.round
        self._keep(saved.residual, saved.moments)

    def _keep(self, residual: Parameters, moments: Parameters) -> None:
        """Residual and moments of this node's own blocks; what is dropped of a residual is said."""
        own = self.stage.shapes.keys()
        self._residual = {key: value for key, value in residual.items() if key in own}
        self._moments = {key: value for key, value in moments.items() if key[2:] in own}
        lost = [value for key, value in residual.items() if key not in own]
        if lost:
            norm = sqrt(sum(float(np.square(value, dtype=np.float64).sum()) for value in lost))
            log.warning("residual_dropped", job=self.job_id, blocks=str(self.span), tensors=len(lost), norm=norm)

    async def _catch_up(self, round: int) -> None:
        """Reach the parameters `round` starts from: one update if we hold the round before, else a snapshot."""
        request = pb.AwaitRoundRequest(job_id=self.job_id, round=round - 1, wait_s=_WAIT_S)
        reply = await self._link.call(lambda client: client.await_round(request))
        if not reply.committed or reply.update.round != round - 1:
            reason = reply.reason or f"round {reply.update.round} is the newest"
            raise JobConflict(f"round {round} of job {self.job_id} cannot start: {reason}", "wait for the next one")
        await self._apply(reply.update)
        await self._save()

    async def _save(self) -> None:
        state = SavedState(self._round, self._base_hash, self._reference, self._residual, self._moments, self._lineage)
        await asyncio.to_thread(self._folder.save, state)

    def block_hashes(self) -> dict[str, bytes]:
        """Hash of each of this node's blocks as the reference holds it."""
        return {
            block: block_hash({key: self._reference[key] for key in keys})
            for block, keys in by_block(self._reference).items()
        }

    def close(self) -> None:
        self.stage.close()
