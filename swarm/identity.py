"""The ed25519 identity of a process: one key file that names it, on libp2p and on gRPC alike.

The file holds libp2p's PrivateKey protobuf (type 1, then seed and public key), which the libp2p
daemon reads directly, so that the peer id of the data plane and the signer of the control plane
are the same thing. Created on first start with mode 0600, written whole or not at all.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from swarm.errors import IdentityError, SignatureError

_PRIVATE_PREFIX = bytes.fromhex("08011240")  # PrivateKey{type: Ed25519, data: 64 bytes}
_PUBLIC_PREFIX = bytes.fromhex("002408011220")  # identity multihash of PublicKey{type: Ed25519, data: 32 bytes}


class Identity:
    """A private key, its peer id (base58, `12D3KooW…`) and the file it lives in."""

    def __init__(self, key: Ed25519PrivateKey, path: Path | None = None) -> None:
        self._key = key
        self.path = path
        public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.peer_id: str = base58.b58encode(_PUBLIC_PREFIX + public).decode()

    @classmethod
    def generate(cls) -> Identity:
        """A new identity that lives in memory only."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load_or_create(cls, path: Path) -> Identity:
        """Read the key file, or make one (mode 0600).

        Raises IdentityError: not an ed25519 key file, readable by others, or not writable.
        """
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return cls._create(path)
        except OSError as error:
            raise IdentityError(f"cannot read the identity key {path}: {error.strerror}") from error
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise IdentityError(f"the identity key {path} can be read by others", f"run: chmod 600 {path}")
        if len(data) != len(_PRIVATE_PREFIX) + 64 or not data.startswith(_PRIVATE_PREFIX):
            raise IdentityError(f"{path} is not an ed25519 identity key")
        seed, public = data[4:36], data[36:]
        identity = cls(Ed25519PrivateKey.from_private_bytes(seed), path)
        if identity.peer_id != _peer_id(public):
            raise IdentityError(f"the two halves of the identity key {path} do not belong together")
        return identity

    @classmethod
    def _create(cls, path: Path) -> Identity:
        identity = cls(Ed25519PrivateKey.generate(), path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # mkstemp makes the file 0600 from the start; the rename makes it whole or absent.
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
            with os.fdopen(handle, "wb") as file:
                file.write(identity._serialize())
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, path)
        except OSError as error:
            raise IdentityError(f"cannot write the identity key {path}: {error.strerror}") from error
        return identity

    def _serialize(self) -> bytes:
        seed = self._key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
        return _PRIVATE_PREFIX + seed + self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)

    def sign(self, message: bytes) -> bytes:
        """64-byte ed25519 signature."""
        return self._key.sign(message)


def _peer_id(public: bytes) -> str:
    return base58.b58encode(_PUBLIC_PREFIX + public).decode()


def verify(peer_id: str, message: bytes, signature: bytes) -> None:
    """Check that `peer_id`, which contains its public key, signed `message`. Raises SignatureError."""
    try:
        raw = base58.b58decode(peer_id)
    except ValueError as error:
        raise SignatureError(f"'{peer_id[:64]}' is not a peer id") from error
    if len(raw) != len(_PUBLIC_PREFIX) + 32 or not raw.startswith(_PUBLIC_PREFIX):
        raise SignatureError(f"peer id {peer_id[:64]} is not that of an ed25519 key")
    try:
        Ed25519PublicKey.from_public_bytes(raw[len(_PUBLIC_PREFIX) :]).verify(signature, message)
    except InvalidSignature as error:
        raise SignatureError(f"the signature is not that of {peer_id}") from error
