"""Shaped links in a process of their own, from the command line or under a benchmark or test.

    python -m benchmarks.links --to 127.0.0.1:31330 --delay-ms 50 --mbit 20

prints the ports to dial instead as one JSON line and answers each JSON line on stdin, such as
`{"set": {"delay_ms": 80}}`, `{"do": "freeze", "link": 0}` or `{}`, with the links' counts; it ends with
its stdin. Its loop waits by `select`, which counts microseconds; epoll and uvloop count milliseconds.
"""

from __future__ import annotations

import asyncio
import os
import selectors
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, get_args

import psutil
import typer

from benchmarks.processes import Json, Side, answer
from benchmarks.shaping import Counts, Link, Order, Shape


class LinkProcess:
    """Links of one shape in a child process; `ports[i]` leads to `targets[i]`. Ends with the `ExitStack`."""

    def __init__(self, stack: ExitStack, logs: Path, targets: Sequence[str], delay_ms: float, mbit: float) -> None:
        """mbit: megabits a second each way; 0: unlimited."""
        to = [word for target in targets for word in ("--to", target)]
        shape = ["--delay-ms", str(delay_ms), "--mbit", str(mbit)]
        self._side = Side(stack, "links", ["benchmarks.links", *to, *shape], logs, {})
        self.ports = [int(port) for port in self._side.hear()["ports"]]

    def family(self) -> list[psutil.Process]:
        return self._side.family()

    def counts(self) -> list[Counts]:
        return self._tell({})

    def reshape(self, delay_ms: float, mbit: float, link: int | None = None) -> list[Counts]:
        """Change one link, or all."""
        return self._tell({"set": {"delay_ms": delay_ms, "mbit": mbit}, "link": link})

    def order(self, order: Order, link: int | None = None) -> list[Counts]:
        return self._tell({"do": order, "link": link})

    def _tell(self, request: Json) -> list[Counts]:
        return [Counts(**counts) for counts in self._side.ask(request)["links"]]


def shape_of(delay_ms: float, mbit: float) -> Shape:
    return Shape(delay_ms / 1000, mbit * 125_000 or None)


async def serve(targets: Sequence[tuple[str, int]], delay_ms: float, mbit: float, ports: Sequence[int]) -> None:
    """Shape links and obey stdin until it ends."""
    async with AsyncExitStack() as stack:
        shape = shape_of(delay_ms, mbit)
        links = [
            await stack.enter_async_context(Link(target, shape, port=port))
            for target, port in zip(targets, ports, strict=True)
        ]

        async def obey(request: Json) -> Json:
            which = request.get("link")
            for link in links if which is None else [links[which]]:
                if "set" in request:
                    link.reshape(shape_of(**({"delay_ms": delay_ms, "mbit": mbit} | request["set"])))
                if request.get("do") in get_args(Order):
                    link.order(request["do"])
            return {"links": [asdict(link.counts) for link in links]}

        await answer(obey, ports=[link.port for link in links])


def main(
    to: Annotated[list[str], typer.Option("--to", help="HOST:PORT that a link leads to; once a link.")],
    port: Annotated[list[int] | None, typer.Option(help="Where to listen, once a link; else any port.")] = None,
    delay_ms: Annotated[float, typer.Option(min=0, help="One way.")] = 50.0,
    mbit: Annotated[float, typer.Option(min=0, help="Megabits a second each way; 0: unlimited.")] = 20.0,
) -> None:
    """Shape TCP links until stdin ends."""
    targets = [(host, int(number)) for host, _, number in (target.rpartition(":") for target in to)]
    ports = port or [0] * len(to)

    with suppress(OSError):
        os.nice(-15)  # a wire does not wait for a core; without the right to, it may

    def precise_loop() -> asyncio.AbstractEventLoop:
        return asyncio.SelectorEventLoop(selectors.SelectSelector())

    with asyncio.Runner(loop_factory=precise_loop) as runner:
        runner.run(serve(targets, delay_ms, mbit, ports))


if __name__ == "__main__":
    typer.run(main)
