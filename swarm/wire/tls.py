"""TLS of the coordinator: a self-signed certificate that join strings pin by its SHA-256.

There is no certificate authority: the join string carries the fingerprint, a client fetches the
certificate, compares, and then trusts exactly that certificate and no other.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import os
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from swarm.errors import CoordinatorLost, IdentityError, PinError

SERVER_NAME = "swarm-coordinator"


@dataclass(frozen=True)
class ServerTls:
    """PEM key and certificate of a server, and the fingerprint that pins it."""

    key_pem: bytes
    certificate_pem: bytes
    fingerprint: bytes

    @classmethod
    def load_or_create(cls, folder: Path) -> ServerTls:
        """Read `tls.pem` (key and certificate), or make it (mode 0600). Raises IdentityError."""
        path = folder / "tls.pem"
        try:
            pem = path.read_bytes() if path.exists() else _create(path)
            certificate = x509.load_pem_x509_certificate(pem)
        except (OSError, ValueError) as error:
            raise IdentityError(f"cannot use the TLS key {path}: {error}") from error
        return cls(pem, certificate.public_bytes(Encoding.PEM), certificate.fingerprint(hashes.SHA256()))


def _create(path: Path) -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, SERVER_NAME)])
    start = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # The pin is what is trusted; a wide window keeps a wrong clock from looking like an attack.
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=365 * 50))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    pem += certificate.public_bytes(Encoding.PEM)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    return pem


async def fetch_pinned_certificate(host: str, port: int, fingerprint: bytes, timeout_s: float) -> bytes:
    """The server's certificate as PEM, if its SHA-256 is the pinned one.

    Raises CoordinatorLost (nobody answers in time) and PinError (another certificate).
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the fingerprint decides, below
    context.set_alpn_protocols(["h2"])
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
    except (OSError, TimeoutError) as error:
        raise CoordinatorLost(f"no coordinator answers at {host}:{port}") from error
    der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    if hashlib.sha256(der).digest() != fingerprint:
        raise PinError(f"the coordinator at {host}:{port} shows another TLS key than the join string pins")
    return ssl.DER_cert_to_PEM_cert(der).encode()
