"""What the swarm looks like from here: spans and adapters that nodes announce in the DHT.

`publish_*` write this node's records; `snapshot` reads everybody's into plain values that the
pure functions of `swarm.net.routing` decide on.
"""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.message import DecodeError

import swarm
from swarm.errors import SpanError
from swarm.ids import Span
from swarm.net.p2p import Peer
from swarm.net.view import AdapterInfo, FileInfo, NodeInfo, SwarmView
from swarm.wire.v1 import common_pb2, records_pb2

RECORD_TTL_S = 30.0
REFRESH_S = 8.0
"""A node writes its records this often: three lost writes in a row still leave it visible."""


def _key(kind: str, model_hash: bytes) -> str:
    return f"{kind}/{model_hash.hex()}"


async def publish_span(
    peer: Peer, model_hash: bytes, span: Span, *, dtype: str, sessions: int, state: str = "serving"
) -> bool:
    """Announce the blocks this node serves. False if no DHT peer took the record."""
    record = records_pb2.SpanRecord(
        span=common_pb2.Span(start=span.start, end=span.end),
        addrs=peer.addrs,
        dtype=dtype,
        sessions=sessions,
        state=state,
        version=swarm.__version__,
    )
    return await peer.publish(_key("span", model_hash), "span", record.SerializeToString(), RECORD_TTL_S)


async def withdraw_span(peer: Peer, model_hash: bytes, span: Span, dtype: str) -> None:
    """Say that this node is leaving, so that nobody routes to it while its old record lives on."""
    await publish_span(peer, model_hash, span, dtype=dtype, sessions=0, state="draining")


async def publish_adapter(
    peer: Peer, model_hash: bytes, name: str, job_id: str, round: int, files: Sequence[FileInfo]
) -> bool:
    """Announce an adapter whose files this node serves."""
    record = records_pb2.AdapterRecord(
        name=name,
        job_id=job_id,
        round=round,
        files=[common_pb2.FileEntry(name=f.name, sha256=f.sha256, size=f.size) for f in files],
        addrs=peer.addrs,
    )
    return await peer.publish(_key("adapter", model_hash), name, record.SerializeToString(), RECORD_TTL_S)


async def snapshot(peer: Peer, model_hash: bytes) -> SwarmView:
    """Read all live records. Records that do not parse are left out: their signer is at fault."""
    nodes = []
    for (peer_id, _), value in (await peer.lookup(_key("span", model_hash))).items():
        try:
            record = records_pb2.SpanRecord.FromString(value)
            span = Span(record.span.start, record.span.end)
        except (DecodeError, SpanError):
            continue
        nodes.append(NodeInfo(peer_id, span, tuple(record.addrs), record.dtype, record.sessions, record.state))
    holders: dict[tuple[str, str, int, tuple[FileInfo, ...]], list[tuple[str, tuple[str, ...]]]] = {}
    for (peer_id, _), value in (await peer.lookup(_key("adapter", model_hash))).items():
        try:
            adapter = records_pb2.AdapterRecord.FromString(value)
        except DecodeError:
            continue
        files = tuple(FileInfo(f.name, f.sha256, f.size) for f in adapter.files)
        key = (adapter.name, adapter.job_id, adapter.round, files)
        holders.setdefault(key, []).append((peer_id, tuple(adapter.addrs)))
    adapters = [AdapterInfo(*key, holders=tuple(sorted(who))) for key, who in holders.items()]
    return SwarmView(
        tuple(sorted(nodes, key=lambda n: (n.span, n.peer_id))),
        tuple(sorted(adapters, key=lambda a: (a.name, a.round))),
    )
