"""What a process counts about itself. Plain integers, written from the event loop only.

Bytes are counted where they are handed to a socket (frames, headers and gRPC messages with
their prefix included; TLS records, TCP and libp2p's own framing are not), so that they can be
compared with what a proxy on the wire sees: a test does.
"""

from __future__ import annotations

from dataclasses import dataclass

from swarm.wire.v1 import coordinator_pb2 as pb


@dataclass
class Traffic:
    """Bytes by purpose since the process started."""

    contribution_bytes: int = 0
    """Sent to the coordinator: compressed pseudo-gradients and the calls that carry them."""
    downlink_bytes: int = 0
    """Received from the coordinator: updates, snapshots, data, finished adapters."""
    activation_bytes: int = 0
    """Sent to other nodes and clients: activations and their gradients."""

    def to_proto(self) -> pb.Traffic:
        return pb.Traffic(
            contribution_bytes=self.contribution_bytes,
            downlink_bytes=self.downlink_bytes,
            activation_bytes=self.activation_bytes,
        )
