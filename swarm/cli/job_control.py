"""`swarm job pause|resume|stop|set|logs`: what a job's owner does with it while it runs.

Only the identity that submitted a job, and its coordinator's own (--data-dir names either), may
change anything; anybody may read the log.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.cli.jobs import JobName, job_dict, job_line, with_coordinator
from swarm.cli.options import DataDirOption, Join, Json, LogLevel
from swarm.cli.process import run, say
from swarm.errors import InputError

if TYPE_CHECKING:
    from swarm.client.coordinator import CoordinatorClient
    from swarm.wire.v1 import coordinator_pb2 as pb

_WAIT_S = 20.0
app = typer.Typer(help="Control a fine-tuning job.")


def _control(
    action: Callable[[CoordinatorClient], Awaitable[pb.JobStatus]],
    join: str,
    data_dir: Path | None,
    as_json: bool,
    log_level: str,
) -> None:
    async def main() -> None:
        found = await with_coordinator(join, data_dir, action)
        say(json.dumps(job_dict(found)) if as_json else job_line(found))

    run(main, role="client", log_level=log_level, as_json=as_json)


@app.command("pause")
def pause(
    job: JobName, join: Join, data_dir: DataDirOption = None, as_json: Json = False, log_level: LogLevel = "warning"
) -> None:
    """Close the open round with the pipelines that are whole, then rest until `resume`."""
    _control(lambda client: client.pause_job(job), join, data_dir, as_json, log_level)


@app.command("resume")
def resume(
    job: JobName,
    join: Join,
    round: Annotated[
        int | None, typer.Option("--round", help="Go on from the end of this kept round; later ones are discarded.")
    ] = None,
    data_dir: DataDirOption = None,
    as_json: Json = False,
    log_level: LogLevel = "warning",
) -> None:
    """Let a paused job go on, from its last committed round or from an earlier one."""
    _control(lambda client: client.resume_job(job, round), join, data_dir, as_json, log_level)


@app.command("stop")
def stop(
    job: JobName, join: Join, data_dir: DataDirOption = None, as_json: Json = False, log_level: LogLevel = "warning"
) -> None:
    """End a job for good. What is committed by then stays, to be exported and prompted."""
    _control(lambda client: client.stop_job(job), join, data_dir, as_json, log_level)


@app.command("set")
def change(
    job: JobName,
    settings: Annotated[list[str], typer.Argument(metavar="KEY=VALUE...", help="Such as rounds=20 or inner.lr=5e-4.")],
    join: Join,
    data_dir: DataDirOption = None,
    as_json: Json = False,
    log_level: LogLevel = "warning",
) -> None:
    """Change settings of a running job, from its next round on."""

    async def action(client: CoordinatorClient) -> pb.JobStatus:
        return await client.change_job(job, parse_settings(settings))

    _control(action, join, data_dir, as_json, log_level)


def parse_settings(settings: list[str]) -> dict[str, str]:
    """KEY=VALUE, each key once. Raises InputError."""
    values: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key or key in values:
            raise InputError(f"'{setting}' is not KEY=VALUE, or gives a key twice")
        values[key] = value
    return values


@app.command("logs")
def logs(
    job: JobName,
    join: Join,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    data_dir: DataDirOption = None,
    as_json: Json = False,
    log_level: LogLevel = "warning",
) -> None:
    """Show what happened to a job: rounds, pipelines, contributions, and why it waits or paused."""

    async def main() -> None:
        async def action(client: CoordinatorClient) -> None:
            seen = 0
            while True:
                reply = await client.job_log(job, seen, _WAIT_S if follow else 0.0)
                for line in reply.lines:
                    say(json.dumps(line_dict(line)) if as_json else line_text(line))
                    seen = line.seq
                if reply.finished or (not follow and not reply.lines):
                    return

        await with_coordinator(join, data_dir, action)

    run(main, role="client", log_level=log_level, as_json=as_json)


def line_dict(line: pb.LogLine) -> dict[str, Any]:
    """A line of a job's log as plain JSON values; what does not apply is null."""
    return {
        "seq": line.seq,
        "time": line.unix_s,
        "kind": line.kind,
        "round": line.round,
        "text": line.text,
        "peer": line.peer_id or None,
        "pipeline": line.pipeline_id if line.HasField("pipeline_id") else None,
        "loss": round(line.loss, 5) if line.HasField("loss") else None,
        "tokens": line.tokens or None,
        "bytes": line.bytes or None,
    }


def line_text(line: pb.LogLine) -> str:
    time = datetime.fromtimestamp(line.unix_s, UTC).strftime("%Y-%m-%d %H:%M:%S")
    who = f" {line.peer_id[-8:]}" if line.peer_id else ""
    where = f" pipeline {line.pipeline_id}" if line.HasField("pipeline_id") and "pipeline " not in line.text else ""
    return f"{time}  round {line.round:<4} {line.kind:<22}{who}{where} {line.text}"
