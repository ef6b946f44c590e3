"""Signed answers to contributions. Pure apart from the key: the same answer has the same bytes."""

from __future__ import annotations

from coordinator.ports import Signer
from swarm.wire.v1 import coordinator_pb2 as pb


def signed_receipt(
    signer: Signer,
    *,
    job_id: str,
    round: int,
    peer: str,
    verdict: pb.Verdict.ValueType,
    reason: str,
    payload: bytes,
) -> bytes:
    """A serialized Receipt. The signature covers the message with an empty signature field."""
    receipt = pb.Receipt(
        job_id=job_id, round=round, peer_id=peer, verdict=verdict, reason=reason, payload_sha256=payload
    )
    receipt.signature = signer.sign(receipt.SerializeToString(deterministic=True))
    return receipt.SerializeToString(deterministic=True)
