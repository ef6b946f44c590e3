"""What a checkpoint on this machine can give to others, and the hashes that go with it.

In: an open checkpoint. Out, as JSON or places on disk: a description (table of tensors, sampled
bytes, small files), a manifest {tensor: SHA-256} of each part that is whole here, and, if asked
for once, a *seal*: the hashes of all manifests and small files, whose own hash is 32 bytes that
name every byte of the model. Hashes are computed from disk when first asked for and kept until a file's
size or time changes. Trusts the disk; never fetches anything, never reads outside the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarm.errors import BlocksMissing, ModelNotFound, ProtocolError, StorageError
from swarm.model.checkpoint import SAMPLED_BYTES, Checkpoint, default_cache, sampled
from swarm.model.parts import read_span, write_whole
from swarm.model.sources import SMALL_FILES, Located, TensorEntry, part_of, tensor_bytes

MAX_FILE_BYTES = 64 * 1024 * 1024
"""Of a small file: the largest published tokenizer.json are about 35 MB."""
_MAX_TENSORS = 1_000_000
_MAX_NAME_CHARS = 512
_MAX_MODEL_BYTES = 1 << 46


@dataclass(frozen=True)
class Description:
    """A checkpoint as a holder describes it; nothing in it is believed before it is verified."""

    tensors: dict[str, TensorEntry]
    """File and offset are empty: how the holder cuts its files is its own affair."""
    first: dict[str, bytes]
    files: dict[str, tuple[int, bytes]]
    """Size and SHA-256 of each small file."""
    tokenizer_hash: bytes
    seal: Seal | None

    @classmethod
    def parse(cls, data: bytes, whose: str) -> Description:
        """Raises ProtocolError, and CorruptData for an unknown dtype."""
        try:
            raw = json.loads(data)
            tensors: dict[str, TensorEntry] = {}
            if len(raw["tensors"]) > _MAX_TENSORS:
                raise ValueError("it lists too many tensors")
            for name, (dtype, shape) in raw["tensors"].items():
                if len(name) > _MAX_NAME_CHARS or not all(type(n) is int and n >= 0 for n in shape):
                    raise ValueError(f"tensor {name[:80]}")
                tensors[name] = TensorEntry("", str(dtype), tuple(shape), 0, tensor_bytes(dtype, tuple(shape)))
            if not tensors or sum(entry.size for entry in tensors.values()) > _MAX_MODEL_BYTES:
                raise ValueError("the model has no tensors, or impossibly many bytes")
            first = {name: bytes.fromhex(raw["first"][name]) for name in sampled(tensors)}
            if any(len(value) != min(SAMPLED_BYTES, tensors[name].size) for name, value in first.items()):
                raise ValueError("sampled bytes")
            files = {str(n): (int(size), bytes.fromhex(sha)) for n, (size, sha) in raw["files"].items()}
            if not files.keys() <= set(SMALL_FILES) or any(not 0 <= s <= MAX_FILE_BYTES for s, _ in files.values()):
                raise ValueError("small files")
            seal = None if raw["seal"] is None else Seal.parse(raw["seal"])
            return cls(tensors, first, files, bytes.fromhex(raw["tokenizer"]), seal)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ProtocolError(f"{whose} describes its checkpoint in a way that does not parse: {error}") from error

    def serialize(self) -> bytes:
        return canonical(
            {
                "tensors": {name: [entry.dtype, entry.shape] for name, entry in self.tensors.items()},
                "first": {name: value.hex() for name, value in self.first.items()},
                "files": {name: [size, sha.hex()] for name, (size, sha) in self.files.items()},
                "tokenizer": self.tokenizer_hash.hex(),
                "seal": None if self.seal is None else self.seal.as_dict(),
            }
        )


@dataclass(frozen=True)
class Seal:
    """Hashes of everything: a manifest's hash for each part, and the small files."""

    parts: Mapping[str, bytes]
    files: Mapping[str, bytes]

    @property
    def hash(self) -> bytes:
        """What a join string can carry."""
        return hashlib.sha256(b"swarm-seal-v1" + canonical(self.as_dict())).digest()

    def as_dict(self) -> dict[str, Any]:
        return {
            "parts": {name: value.hex() for name, value in self.parts.items()},
            "files": {name: value.hex() for name, value in self.files.items()},
        }

    @classmethod
    def parse(cls, raw: Any) -> Seal:
        return cls(
            {str(name): bytes.fromhex(value) for name, value in raw["parts"].items()},
            {str(name): bytes.fromhex(value) for name, value in raw["files"].items()},
        )


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def manifest_hash(manifest: Mapping[str, str]) -> bytes:
    """Of {tensor: SHA-256 in hex}."""
    return hashlib.sha256(b"swarm-part-v1" + canonical(dict(manifest))).digest()


class Holdings:
    """One checkpoint, as others may ask for it. Methods block; any thread may call them."""

    def __init__(self, checkpoint: Checkpoint, cache: Path | None = None) -> None:
        self.checkpoint = checkpoint
        self._cache = (cache or default_cache()) / "hashes"
        self._lock = threading.Lock()
        self._members: dict[str, list[str]] = {}
        for name in checkpoint.tensors:
            self._members.setdefault(part_of(name), []).append(name)
        self._manifests: dict[str, dict[str, str]] = {}
        # A checkpoint that came by a seal passes it on.
        self._seal: Seal | None = getattr(checkpoint.source, "seal", None)
        self._folder: Path | None = None
        self._described: tuple[Seal | None, bytes] | None = None

    def describe(self) -> bytes:
        """The description. Raises ModelNotFound where the small files cannot be had."""
        seal = self._seal
        if self._described is not None and self._described[0] is seal:
            return self._described[1]
        source = self.checkpoint.source
        files = {}
        for name in SMALL_FILES:
            if (path := self._small(name)) is not None:
                content = path.read_bytes()
                files[name] = (len(content), hashlib.sha256(content).digest())
        first = source.first_bytes(sampled(source.tensors), SAMPLED_BYTES)
        description = Description(source.tensors, first, files, self.checkpoint.tokenizer_hash, seal)
        self._described = seal, description.serialize()
        return self._described[1]

    def _small(self, name: str) -> Path | None:
        if self._folder is None:
            self._folder = self.checkpoint.source.files(SMALL_FILES)
        path = self._folder / name
        return path if path.is_file() and path.stat().st_size <= MAX_FILE_BYTES else None

    def file(self, name: str) -> Located:
        """A small file. Raises ModelNotFound."""
        path = self._small(name) if name in SMALL_FILES else None
        if path is None:
            raise ModelNotFound(f"this node has no file '{name[:80]}' of the model to give")
        return Located(path, 0, path.stat().st_size)

    def tensor(self, name: str) -> Located:
        """A tensor that is on this machine. Raises BlocksMissing."""
        located = self.checkpoint.source.local(name)
        if located is None:
            raise BlocksMissing(f"this node does not hold the tensor '{name[:80]}'")
        return located

    def manifest(self, part: str) -> dict[str, str]:
        """{tensor: SHA-256 in hex} of a part that is whole here. Raises BlocksMissing, StorageError."""
        if part not in self._members:
            raise BlocksMissing(f"the model has no part '{part[:80]}'")
        places = {name: self.tensor(name) for name in self._members[part]}
        with self._lock:  # one at a time: strangers ask
            if part not in self._manifests:
                by_path: dict[Path, dict[str, Located]] = {}
                for name, place in places.items():
                    by_path.setdefault(place.path, {})[name] = place
                manifest: dict[str, str] = {}
                for path, inside in by_path.items():
                    manifest |= self._hashes(path, inside)
                self._manifests[part] = manifest
            return self._manifests[part]

    def _hashes(self, path: Path, places: Mapping[str, Located]) -> dict[str, str]:
        kept_at = self._cache / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24]}.json"
        try:
            with path.open("rb") as file:
                stat = path.stat()
                kept = _kept(kept_at, [str(path.resolve()), stat.st_size, stat.st_mtime_ns])
                missing = False
                for place in places.values():
                    key = f"{place.offset}:{place.size}"
                    if key not in kept["tensors"]:
                        digest = hashlib.sha256()
                        for data in read_span(file, place.offset, place.size):
                            digest.update(data)
                        kept["tensors"][key] = digest.hexdigest()
                        missing = True
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror}") from error
        if missing:
            write_whole(kept_at, canonical(kept))
        return {name: str(kept["tensors"][f"{place.offset}:{place.size}"]) for name, place in places.items()}

    def make_seal(self) -> bytes:
        """Hash the whole model, which must be on this machine; later descriptions carry the seal.

        Reads every byte once (0.3 to 1 s a GB). Raises BlocksMissing, StorageError.
        """
        parts = {part: manifest_hash(self.manifest(part)) for part in self._members}
        files = {}
        for name in SMALL_FILES:
            if (path := self._small(name)) is not None:
                files[name] = hashlib.sha256(path.read_bytes()).digest()
        self._seal = Seal(parts, files)
        return self._seal.hash


def _kept(path: Path, stamp: list[Any]) -> dict[str, Any]:
    """Hashes computed before of a file that has not changed since."""
    try:
        kept = json.loads(path.read_bytes())
        if kept["stamp"] == stamp and isinstance(kept["tensors"], dict):
            return dict(kept)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, or of another release: computed again
    return {"stamp": stamp, "tensors": {}}
