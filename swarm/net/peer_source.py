"""A checkpoint that comes from nodes of the swarm: who is believed, and where it is kept.

In: a join string's model hash, the peers that may hold the model, and, if the join string has
one, the seal's hash. Out: a `Checkpoint` whose tensors arrive a part at a time when they are first
loaded, as safetensors files in a cache folder beside config.json and tokenizer, so that a restart
fetches nothing twice. Table and configuration must have the model hash. Contents must have the
SHA-256 of a manifest that the seal names, or, without a seal, that every holder who answers gives alike
and at least `witnesses` of them give. What that does not protect from is in docs/adr/0005.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any, TypeVar

import structlog

from swarm.errors import (
    BlocksMissing,
    CorruptData,
    ModelNotFound,
    PeerLost,
    ProtocolError,
    StorageError,
    SwarmError,
    UnverifiedWeights,
)
from swarm.model.checkpoint import Checkpoint, default_cache, open_for
from swarm.model.holdings import Description, manifest_hash
from swarm.model.parts import PartStore, Stretch, lay_out
from swarm.model.sources import MAX_INDEX_BYTES, Located, TensorEntry, block_of, part_of
from swarm.net.join import JoinInfo
from swarm.net.p2p import Peer
from swarm.net.vouching import (
    MAX_ASKED,
    FindHolders,
    fetch_description,
    kept_description,
    listed,
    require_agreement,
    swarm_holders,
)
from swarm.net.weights import Ask, Holder
from swarm.wire.v1 import weights_pb2 as pb

WITNESSES = 2
_PASSES = 3
_PAUSE_S = 1.0
_GUARD_S = 300.0
"""Every step has its own deadline; this only keeps a thread from waiting for a loop that ended."""
T = TypeVar("T")
log = structlog.get_logger()


async def open_from_peers(
    peer: Peer,
    find: FindHolders,
    model_hash: bytes,
    *,
    name: str = "",
    cache: Path | None = None,
    seal_hash: bytes = b"",
    witnesses: int = WITNESSES,
) -> Checkpoint:
    """The swarm's model, with what this machine kept of it.

    Raises ModelNotFound (nobody has it), UnverifiedWeights, StorageError, UnsupportedModel.
    """
    # What came on agreement alone must not be taken for sealed later: a folder of its own.
    sealed = f"-sealed-{seal_hash.hex()[:16]}" if seal_hash else ""
    folder = (cache or default_cache()) / "peers" / f"{model_hash.hex()}{sealed}"
    description = await asyncio.to_thread(kept_description, folder, model_hash, seal_hash)
    if description is None:
        description = await fetch_description(peer, await find(None), model_hash, seal_hash, witnesses, folder)
    source = PeerSource(name or str(folder), folder, description, peer, find, model_hash, seal_hash, witnesses)
    return await asyncio.to_thread(Checkpoint, source)


async def open_or_fetch(
    peer: Peer, join: JoinInfo, override: str = "", *, seal_hash: bytes = b"", witnesses: int = WITNESSES
) -> Checkpoint:
    """The model of a join string: as this machine finds it (at `override` if given), else from the swarm.

    Raises what `open_for` and `open_from_peers` raise, and ModelMismatch if the tokenizer is not the swarm's.
    """
    try:
        checkpoint = await asyncio.to_thread(open_for, join.model, join.revision, join.model_hash, override)
    except ModelNotFound as error:
        if override:
            raise
        log.warning("model_from_peers", model=join.model, reason=error.cause)
        find = swarm_holders(peer, join)
        checkpoint = await open_from_peers(
            peer, find, join.model_hash, name=join.model, seal_hash=seal_hash, witnesses=witnesses
        )
    await asyncio.to_thread(checkpoint.check_tokenizer, join.tokenizer_hash, "the swarm")
    return checkpoint


class PeerSource:
    """A `Source` (swarm.model.sources): its methods block and must not be called on the peer's loop."""

    revision = "peers"

    def __init__(
        self,
        name: str,
        folder: Path,
        description: Description,
        peer: Peer,
        find: FindHolders,
        model_hash: bytes,
        seal_hash: bytes,
        witnesses: int,
    ) -> None:
        self.name = name
        self.description = description
        self._folder = folder
        self._peer = peer
        self._find = find
        self._model_hash = model_hash
        self.seal = description.seal if seal_hash else None
        self._witnesses = witnesses
        self._loop = asyncio.get_running_loop()
        self._store = PartStore(folder)
        self._parts: dict[str, dict[str, TensorEntry]] = {}
        for tensor, entry in description.tensors.items():
            self._parts.setdefault(part_of(tensor), {})[tensor] = entry
        self.tensors: dict[str, TensorEntry] = {}
        for part, members in self._parts.items():
            file, offsets = self._store.path(part).name, lay_out(members).offsets
            for tensor, entry in members.items():
                placed = TensorEntry(file, entry.dtype, entry.shape, offsets[tensor], entry.size)
                members[tensor] = self.tensors[tensor] = placed

    def files(self, names: Collection[str]) -> Path:
        return self._folder

    def first_bytes(self, names: Iterable[str], length: int) -> dict[str, bytes]:
        return {name: self.description.first[name][:length] for name in names}

    def local(self, name: str) -> Located | None:
        return self._store.local(part_of(name), name) if name in self.tensors else None

    def ensure(self, names: Collection[str]) -> None:
        for part in sorted({part_of(name) for name in names if self.local(name) is None}):
            self._fetch(part)

    def _fetch(self, part: str) -> None:
        members = self._parts[part]
        layout = lay_out(members)
        reasons: dict[str, str] = {}
        for attempt in range(_PASSES):
            holders, manifest = self._call(self._agree(part))
            log.info("fetching", part=part, bytes=sum(e.size for e in members.values()), holders=len(holders))
            for holder in holders:
                try:
                    with _Reading(self, holder) as reading:
                        stretches = [
                            Stretch(name, members[name].size, reading.of(name), bytes.fromhex(manifest[name]))
                            for name in layout.order
                        ]
                        self._store.fill(part, layout, stretches)
                    self._check_samples(part)
                    return
                except (StorageError, UnverifiedWeights) as error:
                    if not isinstance(error, CorruptData):  # CorruptData: the holder's fault, not this disk's
                        raise
                    reasons[holder[0]] = error.cause
                except SwarmError as error:
                    reasons[holder[0]] = error.cause
                log.warning("weights_holder_failed", peer=holder[0], part=part, reason=reasons[holder[0]])
            if attempt + 1 < _PASSES:
                self._call(asyncio.sleep(_PAUSE_S))
        raise BlocksMissing(f"no node could send {part}: {listed(reasons)}", "try again; what has arrived is kept")

    def _check_samples(self, part: str) -> None:
        """The model hash covers the first bytes of some tensors: hold the content to it as well."""
        for name in self._parts[part].keys() & self.description.first.keys():
            located, expected = self._store.local(part, name), self.description.first[name]
            if located is None or _read(located)[: len(expected)] != expected:
                self._store.path(part).unlink(missing_ok=True)
                raise UnverifiedWeights(f"the nodes that hold {part} give another '{name}' than the model hash covers")

    async def _agree(self, part: str) -> tuple[list[Holder], dict[str, str]]:
        """Who holds a part, and its manifest. Raises BlocksMissing, UnverifiedWeights."""
        holders = list(await self._find(block_of(part)))[:MAX_ASKED]
        answers = await asyncio.gather(*(self._manifest(holder, part) for holder in holders))
        given: dict[bytes, list[Holder]] = {}
        manifests: dict[bytes, dict[str, str]] = {}
        reasons: dict[str, str] = {}
        for holder, answer in zip(holders, answers, strict=True):
            if isinstance(answer, SwarmError):
                reasons[holder[0]] = answer.cause
            else:
                digest = manifest_hash(answer)
                given.setdefault(digest, []).append(holder)
                manifests[digest] = answer
        if self.seal is not None:
            expected = self.seal.parts.get(part, b"")
            for digest in given.keys() - {expected}:
                log.warning("weights_not_sealed", part=part, peers=[h[0] for h in given[digest]])
            if expected not in given:
                raise BlocksMissing(
                    f"no node gives {part} as the seal says: {listed(reasons) or 'others hold another'}"
                )
            return given[expected], manifests[expected]
        if not given:
            raise BlocksMissing(f"no node holds {part}: {listed(reasons) or 'nobody announces it'}")
        require_agreement(f"the content of {part}", given, self._witnesses, reasons)
        (digest,) = given
        return given[digest], manifests[digest]

    async def _manifest(self, holder: Holder, part: str) -> dict[str, str] | SwarmError:
        try:
            ask = await Ask.dial(self._peer, holder, self._model_hash)
            try:
                data = await ask.whole(pb.WEIGHTS_ITEM_MANIFEST, part, MAX_INDEX_BYTES)
            finally:
                ask.close()
            manifest = json.loads(data)
            if manifest.keys() != self._parts[part].keys() or any(
                len(bytes.fromhex(h)) != 32 for h in manifest.values()
            ):
                raise ProtocolError(f"node {holder[0]} gives a manifest of other tensors")
            return {str(name): str(value) for name, value in manifest.items()}
        except SwarmError as error:
            return error
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            return ProtocolError(f"node {holder[0]} gives a manifest that does not parse: {error}")

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run on the peer's loop and wait. Raises what it raises, and PeerLost if the loop ends."""
        if self._on_loop():
            work.close()
            raise RuntimeError("weights from peers are loaded off the event loop")
        if self._loop.is_closed():
            work.close()
            raise PeerLost("this process is stopping")
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result(_GUARD_S)
        except (FutureTimeout, CancelledError) as error:
            raise PeerLost("this process is stopping, or its event loop does not answer") from error

    def _on_loop(self) -> bool:
        try:
            return asyncio.get_running_loop() is self._loop
        except RuntimeError:
            return False


class _Reading:
    """One holder's stream while a part is filled from it."""

    def __init__(self, source: PeerSource, holder: Holder) -> None:
        self._source = source
        self._holder = holder
        self._ask: Ask | None = None

    def __enter__(self) -> _Reading:
        return self

    def __exit__(self, *_: object) -> None:
        if self._ask is not None:
            self._source._loop.call_soon_threadsafe(self._ask.close)

    def of(self, name: str) -> Callable[[int], Iterator[bytes]]:
        def read(start: int) -> Iterator[bytes]:
            if self._ask is None:
                self._ask = self._source._call(Ask.dial(self._source._peer, self._holder, self._source._model_hash))
            left = self._source._call(self._ask.begin(pb.WEIGHTS_ITEM_TENSOR, name, start))
            if left != self._source.tensors[name].size - start:
                raise ProtocolError(f"node {self._holder[0]} has another size for '{name}'")
            while left > 0:
                piece = self._source._call(self._ask.piece(left))
                left -= len(piece)
                yield piece

        return read


def _read(located: Located) -> bytes:
    with located.path.open("rb") as file:
        file.seek(located.offset)
        return file.read(min(located.size, 4096))
