"""The join string: everything a newcomer needs, in one word that can be copied.

    swarm1-<base64url of JoinInfo and a 4-byte checksum>

It carries bootstrap addresses, the model and revision, and, where there is one, the
coordinator's address and the fingerprint of its TLS key. `@FILE` on a command line reads the
string from a file.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from google.protobuf.message import DecodeError

from swarm.errors import JoinStringError
from swarm.wire.v1 import common_pb2 as pb

PREFIX = "swarm1-"
_MAX_CHARS = 8192


@dataclass(frozen=True)
class JoinInfo:
    """What a join string says."""

    bootstrap: tuple[str, ...]
    """Multiaddrs that end in /p2p/<peer id>."""
    model: str
    revision: str
    model_hash: bytes
    coordinator: str = ""
    """host:port, empty where the swarm has none."""
    tls_fingerprint: bytes = b""
    tokenizer_hash: bytes = b""
    """What the swarm's tokenizer must hash to; empty: not told."""
    seal_hash: bytes = b""
    """What all weights together must hash to when they come from peers; empty: peers vouch for each other."""

    def with_coordinator(self, address: str, fingerprint: bytes) -> JoinInfo:
        return replace(self, coordinator=address, tls_fingerprint=fingerprint)

    def encode(self) -> str:
        message = pb.JoinInfo(
            bootstrap=self.bootstrap,
            model=self.model,
            revision=self.revision,
            model_hash=self.model_hash,
            coordinator=self.coordinator,
            tls_fingerprint=self.tls_fingerprint,
            tokenizer_hash=self.tokenizer_hash,
            seal_hash=self.seal_hash,
        )
        body = message.SerializeToString()
        return PREFIX + base64.urlsafe_b64encode(body + _checksum(body)).decode().rstrip("=")


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(b"join" + body).digest()[:4]


def parse_join(text: str) -> JoinInfo:
    """Read a join string, or `@FILE` that holds one. Raises JoinStringError."""
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise JoinStringError(
                f"cannot read the join file {text[1:]}: {reason}", "give @FILE with a file that --join-file wrote"
            ) from error
    text = text.strip()
    if not text.startswith(PREFIX) or len(text) > _MAX_CHARS:
        raise JoinStringError("that is not a join string")
    encoded = text[len(PREFIX) :]
    try:
        data = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
        body, checksum = data[:-4], data[-4:]
        if _checksum(body) != checksum:
            raise JoinStringError("the join string is damaged or cut off")
        message = pb.JoinInfo.FromString(body)
    except (binascii.Error, DecodeError, ValueError) as error:
        raise JoinStringError("the join string is damaged or cut off") from error
    if not message.bootstrap or len(message.model_hash) != 32:
        raise JoinStringError("the join string names no bootstrap node or no model")
    return JoinInfo(
        bootstrap=tuple(message.bootstrap),
        model=message.model,
        revision=message.revision,
        model_hash=message.model_hash,
        coordinator=message.coordinator,
        tls_fingerprint=message.tls_fingerprint,
        tokenizer_hash=message.tokenizer_hash,
        seal_hash=message.seal_hash,
    )
