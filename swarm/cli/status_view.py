"""What `swarm status` gathers and how it is shown to people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypedDict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from swarm.errors import SwarmError
from swarm.ids import missing_blocks, ranges_text
from swarm.net.join import JoinInfo
from swarm.net.view import NodeInfo

if TYPE_CHECKING:
    from swarm.net.p2p import Peer

Avoided = Mapping[str, tuple[str, float]]
"""Peers that this machine's clients avoid: peer id to the reason and the seconds left."""


class NodeRow(TypedDict):
    peer: str
    blocks: str
    dtype: str
    quantization: str
    sessions: int
    queue: int
    state: str
    reason: str
    doing: str
    decode_ms_per_block: float
    decode8_ms_per_block: float
    prefill_tokens_per_s: float
    link_bytes_per_s: float
    kv_free_bytes: int
    kv_total_bytes: int
    settled_s: float
    moves_to: str
    avoided: str
    """Empty, or the reason in words."""


class AdapterRow(TypedDict):
    name: str
    round: int
    holders: int


class JobRow(TypedDict):
    name: str
    state: str
    round: int
    rounds: int
    reason: str


class Status(TypedDict):
    model: str
    revision: str
    blocks: int
    missing_blocks: list[int]
    nodes: list[NodeRow]
    adapters: list[AdapterRow]
    coordinator: str
    jobs: list[JobRow]


async def collect(peer: Peer, join: JoinInfo, n_blocks: int, avoided: Avoided | None = None) -> Status:
    """Ask the DHT and, if the join string names one, the coordinator; its absence is a state, not a failure."""
    from swarm.client.coordinator import CoordinatorClient
    from swarm.net.discovery import snapshot

    view = await snapshot(peer, join.model_hash)
    doing: dict[str, str] = {}
    jobs: list[JobRow] = []
    coordinator = "none"
    if join.coordinator:
        try:
            calls = await CoordinatorClient.connect(join.coordinator, join.tls_fingerprint, peer.identity)
            try:
                reply = await calls.list_jobs()
            finally:
                await calls.close()
            coordinator = join.coordinator
            doing = {node.peer_id: node.doing for node in reply.nodes}
            jobs = [
                JobRow(name=j.name, state=j.state, round=j.round, rounds=j.rounds, reason=j.reason) for j in reply.jobs
            ]
        except SwarmError as error:
            coordinator = f"{join.coordinator}: {error.cause}"
    nodes = [node_row(node, doing.get(node.peer_id, ""), avoided or {}) for node in view.nodes]
    serving = [node.span for node in view.nodes if node.state == "serving"]
    return Status(
        model=join.model,
        revision=join.revision,
        blocks=n_blocks,
        missing_blocks=missing_blocks(serving, n_blocks),
        nodes=nodes,
        adapters=[AdapterRow(name=a.name, round=a.round, holders=len(a.holders)) for a in view.adapters],
        coordinator=coordinator,
        jobs=jobs,
    )


def node_row(node: NodeInfo, doing: str = "", avoided: Avoided | None = None) -> NodeRow:
    """A record as `status` tells it: figures with their units, 0 where the node measured none."""
    reason, left_s = (avoided or {}).get(node.peer_id, ("", 0.0))
    return NodeRow(
        peer=node.peer_id,
        blocks=str(node.span),
        dtype=node.dtype,
        quantization=node.quantization,
        sessions=node.sessions,
        queue=node.queue,
        state=node.state,
        reason=node.reason,
        doing=doing,
        decode_ms_per_block=round(node.decode_s_per_block * 1000, 4),
        decode8_ms_per_block=round(node.decode8_s_per_block * 1000, 4),
        prefill_tokens_per_s=round(node.prefill_tokens_per_s, 1),
        link_bytes_per_s=round(node.link_bytes_per_s),
        kv_free_bytes=node.kv_free_bytes,
        kv_total_bytes=node.kv_total_bytes,
        settled_s=round(node.settled_s, 1),
        moves_to=str(node.next_span) if node.next_span else "",
        avoided=f"avoided for {left_s:.0f} s: {reason}" if reason else "",
    )


def render(status: Status, console: Console | None = None) -> None:
    """Print for people."""
    console = console or Console()
    console.print(f"{status['model']} ({status['revision']}), {status['blocks']} blocks")
    # What strangers wrote into their records is text, never markup.
    table = Table("node", "blocks", "weights", "speed", "load", "cache", "state")
    for node in status["nodes"]:
        cells = (node["peer"], node["blocks"], _weights(node), _speed(node), _load(node), _cache(node), _state(node))
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)
    if status["missing_blocks"]:
        console.print(f"[red]no node holds blocks {ranges_text(status['missing_blocks'])}: prompts cannot run[/red]")
    for adapter in status["adapters"]:
        console.print(f"adapter {adapter['name']} (round {adapter['round']}), held by {adapter['holders']} nodes")
    console.print(f"coordinator: {status['coordinator']}")
    for job in status["jobs"]:
        reason = f" ({job['reason']})" if job["reason"] else ""
        console.print(f"job {job['name']}: {job['state']}, round {job['round']} of {job['rounds']}{reason}")


def _weights(node: NodeRow) -> str:
    return node["dtype"] if node["quantization"] == "none" else f"{node['quantization']}, {node['dtype']}"


def _speed(node: NodeRow) -> str:
    if not node["decode_ms_per_block"]:
        return "not measured"
    parts = [f"{node['decode_ms_per_block']:.3g} ms a block"]
    if node["decode8_ms_per_block"]:
        parts.append(f"{node['decode8_ms_per_block']:.3g} ms for 8 rows")
    if node["prefill_tokens_per_s"]:
        parts.append(f"prefill {node['prefill_tokens_per_s']:.0f} tokens/s")
    if node["link_bytes_per_s"]:
        parts.append(f"link {node['link_bytes_per_s'] / 1e6:.3g} MB/s")
    return ", ".join(parts)


def _load(node: NodeRow) -> str:
    sessions = f"{node['sessions']} session{'' if node['sessions'] == 1 else 's'}"
    return f"{sessions}, {node['queue']} waiting" if node["queue"] else sessions


def _cache(node: NodeRow) -> str:
    if not node["kv_total_bytes"]:
        return "not told"
    return f"{node['kv_free_bytes'] / 2**30:.2f} of {node['kv_total_bytes'] / 2**30:.2f} GiB free"


def _state(node: NodeRow) -> str:
    parts = [f"{node['state']}: {node['reason']}" if node["reason"] else node["state"]]
    if node["moves_to"]:
        parts.append(f"moves to blocks {node['moves_to']}")
    return ", ".join([*parts, *(part for part in (node["doing"], node["avoided"]) if part)])
