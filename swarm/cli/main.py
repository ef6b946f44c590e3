"""`swarm`: every command of the project. Importing this module never imports torch."""

from __future__ import annotations

from typing import Annotated

import typer

import swarm
from swarm.cli import job_control, jobs, prompt, serve
from swarm.cli.chat import chat
from swarm.cli.demo import demo

app = typer.Typer(
    name="swarm",
    help="Pool ordinary GPUs to run and fine-tune language models none of them could hold alone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"volunteer-swarm {swarm.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.add_typer(serve.bootstrap_app, name="bootstrap")
app.add_typer(serve.node_app, name="node")
app.add_typer(serve.coordinator_app, name="coordinator")
jobs.app.add_typer(job_control.app)
app.add_typer(jobs.app, name="job")
app.command("generate")(prompt.generate)
app.command("chat")(chat)
app.command("status")(prompt.status)
app.command("demo")(demo)


def run() -> None:
    """Entry point of the console script."""
    app()
