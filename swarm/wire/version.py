"""Who can talk to whom: the protocol versions and features this release speaks.

The first message of every connection carries a `Hello`. Ranges must overlap and every required
feature must be known, otherwise the connection is refused by name; the model hash must match
where a model is involved.
"""

from __future__ import annotations

from swarm.errors import ModelMismatch, VersionError
from swarm.wire.v1 import common_pb2 as pb

VERSION_MIN = 1
VERSION_MAX = 1
FEATURES = frozenset(
    {"push", "train", "int8-activations", "step-frames", "packed-rows", "score-frames", "scaled-gradients"}
)
"""step-frames: a training chain's optimizer step is a message of its own, after the last gradient.
packed-rows: position ids that start again within a row of a training chain keep its samples apart.
score-frames: a forward pass of a training chain may say that no gradient will come.
scaled-gradients: gradients in float16 travel with an exponent, so that small ones are not rounded to zero."""


def hello(model_hash: bytes = b"", required: tuple[str, ...] = ()) -> pb.Hello:
    return pb.Hello(version_min=VERSION_MIN, version_max=VERSION_MAX, required=required, model_hash=model_hash)


def check_hello(other: pb.Hello, model_hash: bytes = b"") -> None:
    """Refuse a peer we cannot talk to. Raises VersionError, ModelMismatch."""
    if other.version_max < VERSION_MIN or other.version_min > VERSION_MAX:
        raise VersionError(
            f"the other side speaks protocol {other.version_min}-{other.version_max},"
            f" this one {VERSION_MIN}-{VERSION_MAX}"
        )
    unknown = sorted(set(other.required) - FEATURES)
    if unknown:
        raise VersionError(f"the other side requires features unknown here: {', '.join(unknown)}")
    if model_hash and other.model_hash != model_hash:
        raise ModelMismatch(
            f"the other side runs model {other.model_hash.hex()[:12] or 'none'}, this one {model_hash.hex()[:12]}"
        )
