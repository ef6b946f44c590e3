"""What the swarm looks like from here: spans and adapters that nodes announce in the DHT.

`publish_*` write this node's records; `snapshot` reads everybody's into plain values that the
pure functions of `swarm.net.routing` and `swarm.net.placement` decide on. Numbers are checked here:
nothing behind this module meets a NaN or a negative speed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from google.protobuf.message import DecodeError

import swarm
from swarm.errors import SpanError
from swarm.ids import Span
from swarm.net.p2p import Peer
from swarm.net.view import MAX_NEIGHBOURS, STATES, AdapterInfo, FileInfo, NodeInfo, NodeStatus, SwarmView
from swarm.wire.v1 import common_pb2, records_pb2

RECORD_TTL_S = 7.0
"""A record's life by the publisher's clock. Where that clock is up to 3 s ahead of the DHT's (more is refused
at the join), a dead node is gone after 10 s; where it is 3 s behind, a living one still shows for 4 s."""
REFRESH_S = 2.0
"""A node writes its span this often: two lost writes leave it visible, and with the worst clock none may be lost."""
ADAPTER_TTL_S = 30.0
ADAPTER_REFRESH_S = 8.0
"""Adapters change rarely, and whoever fetches one tries its holders in turn: they need not vanish at once."""
MAX_RECORD_BYTES = 4096
_MAX_ADDRS = 12
_MAX_ADDR_CHARS = 160
_MAX_REASON_CHARS = 120
_MAX_RTT_S = 60.0


def _key(kind: str, model_hash: bytes) -> str:
    return f"{kind}/{model_hash.hex()}"


async def publish_status(peer: Peer, model_hash: bytes, status: NodeStatus) -> bool:
    """Announce this node's span, speed and load. False if no DHT peer took the record."""
    record = span_record(status, peer.addrs).SerializeToString()
    return await peer.publish(_key("span", model_hash), "span", record, RECORD_TTL_S)


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
    return await peer.publish(_key("adapter", model_hash), name, record.SerializeToString(), ADAPTER_TTL_S)


async def snapshot(peer: Peer, model_hash: bytes) -> SwarmView:
    """Read all live records. Records that do not parse are left out: their signer is at fault."""
    nodes = []
    for (peer_id, subkey), value in (await peer.lookup(_key("span", model_hash))).items():
        node = node_info(peer_id, value) if subkey == "span" else None
        if node is not None:
            nodes.append(node)
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


def span_record(status: NodeStatus, addrs: Sequence[str]) -> records_pb2.SpanRecord:
    """The record of a status, under 4 KiB: the nearest neighbours are kept, a long reason is cut."""
    nearest = sorted(status.rtts_s, key=lambda pair: (pair[1], pair[0]))[:MAX_NEIGHBOURS]
    return records_pb2.SpanRecord(
        span=_pb_span(status.span),
        addrs=[addr for addr in addrs if len(addr) <= _MAX_ADDR_CHARS][:_MAX_ADDRS],
        dtype=status.dtype,
        sessions=status.sessions,
        state=status.state,
        version=swarm.__version__,
        reason=status.reason[:_MAX_REASON_CHARS],
        quantization=status.quantization,
        decode_s_per_block=status.decode_s_per_block,
        decode8_s_per_block=status.decode8_s_per_block,
        prefill_tokens_per_s=status.prefill_tokens_per_s,
        link_bytes_per_s=status.link_bytes_per_s,
        kv_free_bytes=status.kv_free_bytes,
        kv_total_bytes=status.kv_total_bytes,
        queue=status.queue,
        batching=status.batching,
        epoch=status.epoch,
        settled_s=status.settled_s,
        pinned=status.pinned,
        next_span=_pb_span(status.next_span) if status.next_span else None,
        neighbours=[records_pb2.Neighbour(peer_id=peer_id, rtt_ms=rtt_s * 1000) for peer_id, rtt_s in nearest],
    )


def node_info(peer_id: str, record: bytes) -> NodeInfo | None:
    """A record as a plain value; None if it is too large, does not parse or names no span or state."""
    if len(record) > MAX_RECORD_BYTES:
        return None
    try:
        pb = records_pb2.SpanRecord.FromString(record)
        span = Span(pb.span.start, pb.span.end)
        next_span = Span(pb.next_span.start, pb.next_span.end) if pb.HasField("next_span") else None
    except (DecodeError, SpanError):
        return None
    if pb.state not in STATES:
        return None
    return NodeInfo(
        peer_id=peer_id,
        addrs=tuple(pb.addrs),
        version=pb.version,
        span=span,
        state=pb.state,
        reason=pb.reason[:_MAX_REASON_CHARS],
        dtype=pb.dtype,
        quantization=pb.quantization or "none",
        batching=pb.batching or "one",
        decode_s_per_block=_measured(pb.decode_s_per_block),
        decode8_s_per_block=_measured(pb.decode8_s_per_block),
        prefill_tokens_per_s=_measured(pb.prefill_tokens_per_s),
        link_bytes_per_s=_measured(pb.link_bytes_per_s),
        sessions=pb.sessions,
        queue=pb.queue,
        kv_free_bytes=pb.kv_free_bytes,
        kv_total_bytes=pb.kv_total_bytes,
        epoch=pb.epoch,
        settled_s=_measured(pb.settled_s),
        pinned=pb.pinned,
        next_span=next_span,
        rtts_s=tuple(
            (n.peer_id, n.rtt_ms / 1000)
            for n in pb.neighbours[:MAX_NEIGHBOURS]
            if math.isfinite(n.rtt_ms) and 0 < n.rtt_ms <= _MAX_RTT_S * 1000
        ),
    )


def _measured(value: float) -> float:
    """A finite positive number, or 0 for "not measured"."""
    return value if math.isfinite(value) and value > 0 else 0.0


def _pb_span(span: Span) -> common_pb2.Span:
    return common_pb2.Span(start=span.start, end=span.end)
