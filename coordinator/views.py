"""The coordinator's state as messages: what nodes and researchers are shown.

Pure functions of drivers, nodes and stored summaries; they read no clock and no disk.
"""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.driver import JobDriver
from coordinator.leases import Lease
from coordinator.nodes import Node, Nodes
from coordinator.records import AdapterFile, JobTotals, LogLine, Outcome, RoundSummary
from coordinator.round_model import JobState, Phase, Standing
from swarm.wire.v1 import common_pb2
from swarm.wire.v1 import coordinator_pb2 as pb

_BF16_BYTES = 2
_MOST_REASONS = 3


def assignment(driver: JobDriver, peer: str, nodes: Nodes) -> pb.Assignment | None:
    """The node's part in the job's current round; hops carry the addresses nodes gave last."""
    pipeline = driver.assignment_of(peer)
    if pipeline is None:
        return None
    asked = driver.state.scorer == pipeline.pipeline_id and pipeline.members[0].peer == peer
    before = driver.published.get(driver.state.round - 1)
    hops = []
    for member in pipeline.members:
        node = nodes.get(member.peer)
        span = common_pb2.Span(start=member.span.start, end=member.span.end)
        addrs = node.record.addrs if node is not None else ()
        hops.append(common_pb2.Hop(peer_id=member.peer, span=span, addrs=addrs))
    return pb.Assignment(
        job_id=driver.job.job_id,
        job_name=driver.job.name,
        spec_json=driver.job.spec_json,
        pipeline_id=pipeline.pipeline_id,
        generation=pipeline.generation,
        hops=hops,
        index=next(i for i, member in enumerate(pipeline.members) if member.peer == peer),
        round=driver.state.round,
        dataset=driver.job.dataset,
        dataset_size=driver.job.dataset_size,
        base_hash=before.params_hash if before is not None else b"",
        lineage=driver.state.lineage,
        score=asked,
        heldout=driver.job.heldout,
        heldout_size=driver.job.heldout_size,
    )


def sample_ranges(lease: Lease) -> list[pb.SampleRange]:
    return [pb.SampleRange(start=r.start, end=r.end) for r in lease.ranges]


def idle_reason(drivers: Sequence[JobDriver], peer: str) -> str:
    """Why a node has no assignment."""
    reasons: list[str] = []
    for driver in drivers:
        if len(reasons) == _MOST_REASONS:
            break
        state = driver.state
        why = driver.spare.get(peer)
        if state.job is JobState.RUNNING:
            reasons.append(f"job {driver.job.name} takes nodes on when its next round starts{_because(why)}")
        elif state.job is JobState.WAITING:
            reasons.append(f"job {driver.job.name} waits: {driver.reason}")
        elif state.job is JobState.PAUSED:
            reasons.append(f"job {driver.job.name} is paused: {driver.reason}")
    return "; ".join(reasons) if reasons else "no job needs nodes"


def _because(why: str | None) -> str:
    return f" ({why})" if why else ""


def finished_adapter(driver: JobDriver) -> pb.FinishedAdapter | None:
    """The adapter of a finished job."""
    outcome = driver.published.get(driver.adapter_round)
    if driver.state.job is not JobState.FINISHED or outcome is None or not driver.committed_round:
        return None
    return pb.FinishedAdapter(
        name=driver.job.name,
        job_id=driver.job.job_id,
        round=driver.adapter_round,
        files=_files(outcome.files),
    )


def outer_update(round: int, outcome: Outcome) -> pb.OuterUpdate:
    """A committed round as nodes apply it. Round 0 has a snapshot and no update."""
    updates, snapshots = [], []
    for piece in outcome.blocks:
        if piece.update_length:
            updates.append(
                pb.BlockUpdate(
                    block=piece.block,
                    offset=piece.update_offset,
                    length=piece.update_length,
                    sha256=piece.update_sha256,
                    params_hash=piece.params_hash,
                )
            )
        snapshots.append(
            pb.BlockUpdate(
                block=piece.block,
                offset=piece.snapshot_offset,
                length=piece.snapshot_length,
                sha256=piece.snapshot_sha256,
                params_hash=piece.params_hash,
            )
        )
    return pb.OuterUpdate(
        round=round,
        blob=outcome.update_blob if outcome.update_size else b"",
        size=outcome.update_size,
        blocks=updates,
        params_hash=outcome.params_hash,
        snapshot=outcome.snapshot_blob,
        snapshot_size=outcome.snapshot_size,
        snapshot_blocks=snapshots,
    )


def job_status(
    driver: JobDriver,
    nodes: Nodes,
    history: Sequence[RoundSummary],
    totals: JobTotals,
    now_unix_s: float,
    adapter_round: int,
    files: Sequence[AdapterFile],
) -> pb.JobStatus:
    """`files` are the adapter's of `adapter_round`; 0 for none."""
    state, job = driver.state, driver.job
    inner_steps = driver.spec.schedule.inner_steps
    progress = _progress(driver, nodes)
    return pb.JobStatus(
        job_id=job.job_id,
        name=job.name,
        state=state.job.value,
        reason=driver.reason,
        round=state.round,
        rounds=state.rules.rounds,
        inner_steps=inner_steps,
        pipelines=len(state.with_standing(Standing.ACTIVE, Standing.WHOLE)) if state.job is JobState.RUNNING else 0,
        method=driver.spec.method.kind,
        trainable_parameters=job.trainable_parameters,
        contribution_bytes=totals.contribution_bytes,
        ddp_bf16_bytes=totals.accepted_pipeline_rounds * inner_steps * job.trainable_parameters * _BF16_BYTES,
        history=[_round_status(summary, progress, now_unix_s) for summary in history],
        progress=progress,
        adapter=_files(files),
        adapter_round=adapter_round,
        spec_json=job.spec_json,
        kept_rounds=[round for round in driver.kept_rounds if round],
        next_spec_json=state.next.spec_json if state.next is not None else "",
        submitter=job.submitter,
        best_round=state.best.round if state.best is not None else 0,
        best_loss=state.best.loss if state.best is not None else None,
    )


def log_line(line: LogLine) -> pb.LogLine:
    return pb.LogLine(
        seq=line.seq,
        unix_s=line.unix_s,
        kind=line.kind,
        round=line.round,
        text=line.text,
        peer_id=line.peer,
        pipeline_id=line.pipeline_id,
        loss=line.loss,
        tokens=line.tokens,
        bytes=line.size,
    )


def node_status(node: Node, driver: JobDriver | None, reason: str, now_s: float) -> pb.NodeStatus:
    """`driver` is the job the node works for, `reason` why it works for none."""
    record = node.record
    doing = f"idle: {reason}"
    if driver is not None:
        pipeline = driver.assignment_of(record.peer)
        part = "leads" if pipeline is not None and pipeline.members[0].peer == record.peer else "trains in"
        doing = f"{part} a pipeline of job {driver.job.name}, round {driver.state.round}"
    return pb.NodeStatus(
        peer_id=record.peer,
        span=common_pb2.Span(start=record.span.start, end=record.span.end),
        device=record.device,
        silent_s=max(0.0, now_s - node.last_call_s),
        doing=doing,
        traffic=node.traffic,
    )


def _round_status(summary: RoundSummary, progress: Sequence[pb.TrainProgress], now_unix_s: float) -> pb.RoundStatus:
    status = pb.RoundStatus(
        round=summary.round,
        phase=summary.phase,
        contributions=summary.contributions,
        contribution_bytes=summary.contribution_bytes,
        update_bytes=summary.update_bytes,
        tokens=summary.tokens,
        params_hash=summary.params_hash,
        # Wall-clock time may have been set back in between.
        seconds=max(0.0, (summary.committed_unix_s or now_unix_s) - summary.opened_unix_s),
    )
    if summary.eval_loss is not None:
        status.eval_loss = summary.eval_loss
    losses = [item.loss for item in progress if item.round == summary.round]
    if summary.loss is not None:
        status.loss = summary.loss
    elif losses and summary.phase == Phase.OPEN:
        status.loss = sum(losses) / len(losses)
    return status


def _progress(driver: JobDriver, nodes: Nodes) -> list[pb.TrainProgress]:
    """What the leads of the current round said last."""
    found = []
    for pipeline in driver.state.with_standing(Standing.ACTIVE, Standing.WHOLE):
        node = nodes.get(pipeline.members[0].peer)
        said = node.progress if node is not None else None
        if said is not None and (said.job_id, said.round) == (driver.job.job_id, driver.state.round):
            found.append(said)
    return found


def _files(files: Sequence[AdapterFile]) -> list[common_pb2.FileEntry]:
    return [common_pb2.FileEntry(name=f.name, sha256=f.sha256, size=f.size) for f in files]
