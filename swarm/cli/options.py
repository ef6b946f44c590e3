"""Flags that several commands share, each defined once. `SWARM_*` variables stand in for flags."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal

import typer

from swarm.errors import InputError
from swarm.ids import NAME_PATTERN

Join = Annotated[
    str, typer.Option("--join", envvar="SWARM_JOIN", help="Join string of the swarm, or @FILE that holds it.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"],
    typer.Option("--log-level", envvar="SWARM_LOG_LEVEL", help="What the log on stderr holds."),
]
DataDirOption = Annotated[
    Path | None,
    typer.Option("--data-dir", envvar="SWARM_DATA_DIR", help="Folder of this process: identity, state, adapters."),
]
JoinFile = Annotated[Path | None, typer.Option("--join-file", help="Also write the join string to this file.")]
Host = Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 to be reachable from outside.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="TCP port; 0: any free one.")]
Announce = Annotated[
    list[str] | None,
    typer.Option("--announce", help="Multiaddr to publish instead of the address listened on. Repeatable."),
]
Model = Annotated[
    str | None, typer.Option("--model", envvar="SWARM_MODEL", help="Folder or hub id of the weights on this machine.")
]
DTYPE_NAMES = ("float32", "bfloat16", "float16", "auto")
Dtype = Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16 or auto.")]
Threads = Annotated[int, typer.Option("--threads", min=0, help="CPU threads torch may use; 0: its own choice.")]


def one_of(flag: str, value: str, allowed: Collection[str]) -> str:
    """The value, if it is one of those that a flag takes. Raises InputError."""
    if value not in allowed:
        raise InputError(f"{flag} cannot be '{value}'", f"choose {flag} from {', '.join(allowed)}")
    return value


def named_source(text: str) -> tuple[str, str]:
    """("NAME", "SOURCE") of NAME=SOURCE. Raises InputError."""
    name, mark, source = text.partition("=")
    if not mark or not source or NAME_PATTERN.fullmatch(name) is None:
        raise InputError(
            f"--adapter cannot be '{text}'", "give --adapter NAME=SOURCE, the name in letters, digits, '.', '_' and '-'"
        )
    return name, source
