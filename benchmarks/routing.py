"""How long does it take to find the best chain through a large swarm?

Random swarms of 1,000 nodes over 80 blocks: spans of 4 to 30 blocks, speeds, loads and queues of every
kind, 16 measured neighbours a node, 30 nodes measured by the client. Every swarm is routed over several
times, as a client does on one snapshot. `p50_ms` and `p95_ms` are wall time of `find_route` once a snapshot is
known; `first_p50_ms` is the first route on a fresh one, which turns its records into arrays. `cpu_*` is the
thread's own time, which other work on the same cores disturbs less. `fill_*` replaces one
lost hop of a chain and keeps the others.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated

import numpy as np
import typer

from benchmarks.provenance import provenance, publish
from swarm.ids import Span
from swarm.net.routing import RouteTerms, find_replacement, find_route
from swarm.net.view import NodeInfo

NEIGHBOURS = 16


def main(
    nodes: Annotated[int, typer.Option(min=10)] = 1000,
    blocks: Annotated[int, typer.Option(min=8)] = 80,
    swarms: Annotated[int, typer.Option(min=2)] = 30,
    routes: Annotated[int, typer.Option(min=1, help="Over each swarm, after the first.")] = 5,
    json_to: Annotated[str, typer.Option("--json", help="Write the result to this file; -: to stdout.")] = "",
    save: Annotated[bool, typer.Option("--save", help="Keep the result in benchmarks/results.")] = False,
) -> None:
    """Time routes over random swarms."""
    origin = provenance(threads=1)
    first, known, cpu, fill, hops = [], [], [], [], []
    for seed in range(swarms):
        records, terms = random_swarm(seed, nodes, blocks)
        first.append(_ms(time.perf_counter, partial(find_route, records, blocks, terms)))
        for _ in range(routes):
            known.append(_ms(time.perf_counter, partial(find_route, records, blocks, terms)))
            cpu.append(_ms(time.thread_time, partial(find_route, records, blocks, terms)))
        route = find_route(records, blocks, terms)
        hops.append(len(route.hops))
        lost = {route.hops[len(route.hops) // 2].peer_id}
        fill.append(_ms(time.perf_counter, partial(find_replacement, records, blocks, route.hops, lost, terms)))
    result = {
        "p50_ms": _quantile(known, 50),
        "p95_ms": _quantile(known, 95),
        "cpu_p50_ms": _quantile(cpu, 50),
        "cpu_p95_ms": _quantile(cpu, 95),
        "first_p50_ms": _quantile(first, 50),
        "first_p95_ms": _quantile(first, 95),
        "fill_p50_ms": _quantile(fill, 50),
        "fill_p95_ms": _quantile(fill, 95),
        "hops_p50": _quantile(hops, 50),
        "nodes": nodes,
        "blocks": blocks,
        "neighbours": NEIGHBOURS,
        "routes": len(known),
    }
    publish("routing", result, origin, json_to, save)


def random_swarm(seed: int, nodes: int, blocks: int) -> tuple[tuple[NodeInfo, ...], RouteTerms]:
    """A swarm and what its client measured; the same for the same seed."""
    rng = random.Random(seed)
    names = [f"12D3KooW{i:044d}" for i in range(nodes)]
    records = []
    for name in names:
        length = rng.randint(min(4, blocks), min(30, blocks))
        start = rng.randint(0, blocks - length)
        decode_s = rng.uniform(0.0005, 0.008)
        records.append(
            NodeInfo(
                peer_id=name,
                span=Span(start, start + length),
                decode_s_per_block=decode_s,
                decode8_s_per_block=decode_s * rng.uniform(1.0, 3.0),
                prefill_tokens_per_s=rng.uniform(200, 4000),
                sessions=rng.randint(0, 6),
                queue=rng.choice([0, 0, 0, 1]),
                kv_free_bytes=rng.randint(0, 2**33),
                kv_total_bytes=2**33,
                rtts_s=tuple((rng.choice(names), rng.uniform(0.002, 0.25)) for _ in range(NEIGHBOURS)),
            )
        )
    rtts_s = {rng.choice(names): rng.uniform(0.01, 0.2) for _ in range(30)}
    return tuple(records), RouteTerms(rtts_s=rtts_s, kv_bytes=2**30, prompt_tokens=512)


def _ms(clock: Callable[[], float], work: Callable[[], object]) -> float:
    start_s = clock()
    work()
    return 1000 * (clock() - start_s)


def _quantile(values: list[float] | list[int], percent: float) -> float:
    return round(float(np.percentile(values, percent)), 3)


if __name__ == "__main__":
    typer.run(main)
