"""What `swarm status` gathers and how it is shown to people."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from rich.console import Console
from rich.table import Table

from swarm.errors import SwarmError
from swarm.ids import missing_blocks, ranges_text
from swarm.net.join import JoinInfo

if TYPE_CHECKING:
    from swarm.net.p2p import Peer


class NodeRow(TypedDict):
    peer: str
    blocks: str
    dtype: str
    sessions: int
    state: str
    doing: str


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


async def collect(peer: Peer, join: JoinInfo, n_blocks: int) -> Status:
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
    nodes = [
        NodeRow(
            peer=node.peer_id,
            blocks=str(node.span),
            dtype=node.dtype,
            sessions=node.sessions,
            state=node.state,
            doing=doing.get(node.peer_id, ""),
        )
        for node in view.nodes
    ]
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


def render(status: Status) -> None:
    """Print for people."""
    console = Console()
    console.print(f"{status['model']} ({status['revision']}), {status['blocks']} blocks")
    table = Table("node", "blocks", "dtype", "sessions", "state", "doing")
    for node in status["nodes"]:
        table.add_row(node["peer"], node["blocks"], node["dtype"], str(node["sessions"]), node["state"], node["doing"])
    console.print(table)
    if status["missing_blocks"]:
        console.print(f"[red]no node holds blocks {ranges_text(status['missing_blocks'])}: prompts cannot run[/red]")
    for adapter in status["adapters"]:
        console.print(f"adapter {adapter['name']} (round {adapter['round']}), held by {adapter['holders']} nodes")
    console.print(f"coordinator: {status['coordinator']}")
    for job in status["jobs"]:
        reason = f" ({job['reason']})" if job["reason"] else ""
        console.print(f"job {job['name']}: {job['state']}, round {job['round']} of {job['rounds']}{reason}")
