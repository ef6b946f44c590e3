"""`swarm demo`: the whole main job on this machine, with real processes, a real model and real data.

One bootstrap node, one coordinator and three volunteers: two hold half of the blocks each and train
as one pipeline, the third holds all and is a pipeline of its own. They fine-tune LoRA adapters on
movie-review sentiment over several rounds; then the swarm answers with the trained adapter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from swarm.cli.options import LogLevel
from swarm.cli.process import run


def demo(
    out: Annotated[Path, typer.Option(help="Folder for logs, data, the adapter and summary.json.")] = Path("demo"),
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    inner_steps: Annotated[int, typer.Option(min=1)] = 10,
    held_out: Annotated[int, typer.Option(min=2, help="Held-out sentences to score.")] = 200,
    log_level: LogLevel = "warning",
) -> None:
    """Train and prompt a small swarm of real processes on this machine (about 5 minutes on 2 cores)."""

    async def main() -> None:
        from swarm.cli.demo_run import DemoSettings, run_demo

        await run_demo(DemoSettings(out=out.resolve(), rounds=rounds, inner_steps=inner_steps, held_out=held_out))

    run(main, role="demo", log_level=log_level)
