"""`swarm job …`: launch and follow fine-tuning jobs at the coordinator that the join string names."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from swarm.cli.options import DataDirOption, Join, Json, LogLevel
from swarm.cli.process import run, say
from swarm.datadir import default_data_dir
from swarm.errors import CoordinatorLost, JobConflict, StorageError
from swarm.net.join import parse_join

if TYPE_CHECKING:
    from swarm.client.coordinator import CoordinatorClient
    from swarm.wire.v1 import coordinator_pb2 as pb

T = TypeVar("T")
app = typer.Typer(help="Fine-tuning jobs.", no_args_is_help=True)
JobName = Annotated[str, typer.Argument(help="Name or id of the job.")]


async def with_coordinator(
    join_text: str, data_dir: Path | None, action: Callable[[CoordinatorClient], Awaitable[T]]
) -> T:
    """Connect, do one thing, disconnect. Raises CoordinatorLost if the join string names no coordinator."""
    from swarm.client.coordinator import CoordinatorClient
    from swarm.identity import Identity

    join = parse_join(join_text)
    if not join.coordinator:
        raise CoordinatorLost(
            "the join string names no coordinator", "use the join string that `swarm coordinator start` printed"
        )
    identity = Identity.load_or_create((data_dir or default_data_dir("client")) / "identity.key")
    client = await CoordinatorClient.connect(join.coordinator, join.tls_fingerprint, identity)
    try:
        return await action(client)
    finally:
        await client.close()


def job_dict(status: pb.JobStatus) -> dict[str, Any]:
    """A job's status as plain JSON values."""
    return {
        "id": status.job_id,
        "name": status.name,
        "state": status.state,
        "reason": status.reason,
        "round": status.round,
        "rounds": status.rounds,
        "inner_steps": status.inner_steps,
        "pipelines": status.pipelines,
        "method": status.method,
        "trainable_parameters": status.trainable_parameters,
        "contribution_bytes": status.contribution_bytes,
        "ddp_bf16_bytes": status.ddp_bf16_bytes,
        "adapter_round": status.adapter_round,
        "best_round": status.best_round or None,
        "best_loss": round(status.best_loss, 5) if status.HasField("best_loss") else None,
        "kept_rounds": list(status.kept_rounds),
        "submitter": status.submitter,
        "changes_wait": bool(status.next_spec_json),
        "history": [
            {
                "round": r.round,
                "phase": r.phase,
                "contributions": r.contributions,
                "contribution_bytes": r.contribution_bytes,
                "update_bytes": r.update_bytes,
                "loss": round(r.loss, 5),
                "eval_loss": round(r.eval_loss, 5) if r.HasField("eval_loss") else None,
                "tokens": r.tokens,
                "params_hash": r.params_hash.hex(),
                "seconds": round(r.seconds, 2),
            }
            for r in status.history
        ],
        "progress": [
            {
                "round": p.round,
                "inner_step": p.inner_step,
                "loss": round(p.loss, 5),
                "tokens_per_s": round(p.tokens_per_s, 1),
            }
            for p in status.progress
        ],
    }


def job_line(status: pb.JobStatus) -> str:
    """A job's status in one line."""
    reason = f" ({status.reason})" if status.reason else ""
    steps = "; ".join(f"step {p.inner_step}/{status.inner_steps} loss {p.loss:.3f}" for p in status.progress)
    return (
        f"{status.name}: {status.state}{reason}, round {status.round} of {status.rounds},"
        f" {status.pipelines} pipelines{'; ' + steps if steps else ''}"
    )


@app.command("submit")
def submit(
    file: Annotated[Path, typer.Argument(help="The job's YAML file.")],
    join: Join,
    data_dir: DataDirOption = None,
    as_json: Json = False,
    log_level: LogLevel = "warning",
) -> None:
    """Check a job file and its data, upload both, and queue the job."""

    async def main() -> None:
        from swarm.config import load_job
        from swarm.data.sources import load_source
        from swarm.wire.v1 import coordinator_pb2 as pb
        from swarm.wire.version import hello

        spec = load_job(file)
        # Parsed here so that a bad line is named before anything is uploaded.
        train = load_source(spec.data.train)
        heldout = load_source(spec.eval.data) if spec.eval is not None else None
        model_hash = parse_join(join).model_hash
        if spec.model is not None:
            from swarm.model.checkpoint import open_for

            info = parse_join(join)
            open_for(info.model, info.revision, info.model_hash, spec.model)

        async def action(client: CoordinatorClient) -> pb.JobStatus:
            digest = await client.put_blob(train.data)
            request = pb.SubmitJobRequest(
                hello=hello(model_hash, ("train",)),
                spec_json=spec.model_dump_json(),
                dataset=digest,
                dataset_size=len(train.data),
                samples=train.samples,
            )
            if heldout is not None:
                request.heldout = await client.put_blob(heldout.data)
                request.heldout_size, request.heldout_samples = len(heldout.data), heldout.samples
            return await client.submit_job(request)

        status = await with_coordinator(join, data_dir, action)
        say(json.dumps(job_dict(status)) if as_json else f"submitted {job_line(status)}")

    run(main, role="client", log_level=log_level, as_json=as_json)


@app.command("list")
def list_jobs(
    join: Join, data_dir: DataDirOption = None, as_json: Json = False, log_level: LogLevel = "warning"
) -> None:
    """Show every job of the coordinator."""

    async def main() -> None:
        reply = await with_coordinator(join, data_dir, lambda client: client.list_jobs())
        if as_json:
            say(json.dumps([job_dict(status) for status in reply.jobs]))
        else:
            say("\n".join(job_line(status) for status in reply.jobs) or "no jobs")

    run(main, role="client", log_level=log_level, as_json=as_json)


@app.command("status")
def status(
    job: JobName,
    join: Join,
    data_dir: DataDirOption = None,
    as_json: Json = False,
    log_level: LogLevel = "warning",
) -> None:
    """Show one job: state, rounds, loss, bytes."""

    async def main() -> None:
        found = await with_coordinator(join, data_dir, lambda client: client.get_job(job))
        if as_json:
            say(json.dumps(job_dict(found)))
            return
        say(job_line(found))
        for entry in found.history:
            say(
                f"  round {entry.round}: {entry.phase}, {entry.contributions} contributions,"
                f" {entry.contribution_bytes} bytes up, {entry.update_bytes} bytes down, loss {entry.loss:.4f},"
                f"{f' held-out loss {entry.eval_loss:.4f},' if entry.HasField('eval_loss') else ''}"
                f" {entry.tokens} tokens, {entry.seconds:.1f} s, parameters {entry.params_hash.hex()[:12]}"
            )
        if found.HasField("best_loss"):
            say(f"  best held-out loss {found.best_loss:.4f}, of round {found.best_round}")
        if found.kept_rounds:
            kept = ", ".join(str(number) for number in found.kept_rounds)
            say(f"  kept rounds, to resume from: {kept}; any committed round can be exported")
        if found.next_spec_json:
            say("  changed settings take effect when pipelines are next formed")
        if found.contribution_bytes:
            saving = found.ddp_bf16_bytes / found.contribution_bytes
            say(f"  {found.contribution_bytes} bytes contributed, {saving:.0f} times less than DDP in bfloat16")

    run(main, role="client", log_level=log_level, as_json=as_json)


@app.command("export")
def export(
    job: JobName,
    out: Annotated[Path, typer.Option("--out", help="Folder to make; must not exist yet.")],
    join: Join,
    round: Annotated[
        int | None, typer.Option("--round", help="Any committed round; default: the job's own choice.")
    ] = None,
    data_dir: DataDirOption = None,
    as_json: Json = False,
    log_level: LogLevel = "warning",
) -> None:
    """Write the adapter of a job as PEFT's two files: of its newest round, or of any before."""

    async def main() -> None:
        async def action(client: CoordinatorClient) -> tuple[pb.JobStatus, dict[str, bytes]]:
            found = await client.get_job(job, round)
            if not found.adapter:
                raise JobConflict(f"job {found.name} has no committed round to export yet", "wait for its first round")
            return found, {f.name: await client.get_blob(f.sha256, f.size) for f in found.adapter}

        refuse_existing(out)
        found, files = await with_coordinator(join, data_dir, action)
        write_folder(out, files)
        result = {"job": found.name, "round": found.adapter_round, "folder": str(out)}
        say(json.dumps(result) if as_json else f"adapter of {found.name} after round {found.adapter_round}: {out}")

    run(main, role="client", log_level=log_level, as_json=as_json)


def refuse_existing(out: Path) -> None:
    """Raises StorageError if the folder to make is there already."""
    if out.exists() or out.is_symlink():
        raise StorageError(f"{out} exists already", "choose another --out")


def write_folder(out: Path, files: dict[str, bytes]) -> None:
    """Make a folder with these files: whole, or not at all. Raises StorageError."""
    refuse_existing(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        try:
            for name, content in files.items():
                (temporary / Path(name).name).write_bytes(content)
            temporary.chmod(0o755)
            os.rename(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # gone already if all went well
    except OSError as error:
        raise StorageError(f"cannot write {out}: {error.strerror}") from error
