"""Signed DHT records: who may write under which subkey.

Every record lives under a subkey "<peer id>/<name>" and ends in that peer's ed25519 signature
over key, subkey, value and expiry, so nobody else can write, alter or prolong it. Records
without such a subkey are refused altogether. (hivemind's own validator knows RSA only.)
"""

from __future__ import annotations

import struct

from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.utils import MSGPackSerializer

from swarm.errors import SignatureError
from swarm.identity import Identity, verify

_SIGNATURE_BYTES = 64
MAX_RECORD_BYTES = 16 * 1024


class SignedRecords(RecordValidatorBase):  # type: ignore[misc]  # hivemind has no types
    """Signs what this process stores and checks what it is asked to store or is answered."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity

    def sign_value(self, record: DHTRecord) -> bytes:
        return bytes(record.value) + self._identity.sign(_signed_bytes(record, record.value))

    def strip_value(self, record: DHTRecord) -> bytes:
        return bytes(record.value)[:-_SIGNATURE_BYTES]

    def validate(self, record: DHTRecord) -> bool:
        if not _SIGNATURE_BYTES <= len(record.value) <= MAX_RECORD_BYTES:
            return False
        try:
            # The subkey arrives serialized; the DHT's own markers for plain values do not parse to a string.
            subkey = MSGPackSerializer.loads(record.subkey)
        except Exception:  # msgpack raises several unrelated types on hostile bytes
            return False
        if not isinstance(subkey, str) or "/" not in subkey:
            return False
        value, signature = record.value[:-_SIGNATURE_BYTES], record.value[-_SIGNATURE_BYTES:]
        try:
            verify(subkey.partition("/")[0], _signed_bytes(record, value), signature)
        except SignatureError:
            return False
        return True


def _signed_bytes(record: DHTRecord, value: bytes) -> bytes:
    parts = [b"swarm-record-v1", record.key, record.subkey, value, struct.pack(">d", record.expiration_time)]
    return b"".join(struct.pack(">I", len(part)) + part for part in parts)
