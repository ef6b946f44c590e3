from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hivemind.p2p.p2p_daemon_bindings.datastructures import PeerID

from swarm.errors import IdentityError, SignatureError
from swarm.identity import Identity, verify


def test_created_once_private_and_stable(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "identity.key"
    first = Identity.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Identity.load_or_create(path).peer_id == first.peer_id
    assert list(path.parent.iterdir()) == [path]


def test_libp2p_derives_the_same_peer_id_from_the_public_key() -> None:
    identity = Identity.generate()
    assert identity.peer_id.startswith("12D3KooW")
    assert PeerID.from_base58(identity.peer_id).to_base58() == identity.peer_id


def test_signature_binds_signer_and_message() -> None:
    one, other = Identity.generate(), Identity.generate()
    signature = one.sign(b"message")
    verify(one.peer_id, b"message", signature)
    for peer, message, signed in [
        (other.peer_id, b"message", signature),
        (one.peer_id, b"another", signature),
        (one.peer_id, b"message", signature[:-1] + bytes([signature[-1] ^ 1])),
        (one.peer_id, b"message", b""),
        ("12D3KooW0OIl", b"message", signature),
        ("QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N", b"message", signature),
    ]:
        with pytest.raises(SignatureError):
            verify(peer, message, signed)


def test_a_key_others_can_read_or_that_is_no_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    Identity.load_or_create(path)
    path.chmod(0o644)
    with pytest.raises(IdentityError, match="can be read by others"):
        Identity.load_or_create(path)
    path.chmod(0o600)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(IdentityError, match="do not belong together"):
        Identity.load_or_create(path)
    path.write_bytes(b"-----BEGIN PRIVATE KEY-----")
    with pytest.raises(IdentityError, match="not an ed25519 identity key"):
        Identity.load_or_create(path)
