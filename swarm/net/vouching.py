"""Which description of the swarm's model to believe, and whom to ask: the first half of joining without the checkpoint.

In: peers that may hold the model. Out: a description whose table and configuration have the model
hash, with config.json and tokenizer written to a folder, or UnverifiedWeights that names who
disagrees. The description is written last, so a folder that has one is complete.
"""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from random import Random

import structlog

from swarm.errors import CorruptData, ModelMismatch, ModelNotFound, StorageError, SwarmError, UnverifiedWeights
from swarm.model.checkpoint import fingerprint, read_config
from swarm.model.holdings import MAX_FILE_BYTES, Description
from swarm.model.parts import write_whole
from swarm.model.sources import MAX_INDEX_BYTES, SMALL_FILES
from swarm.model.tokens import tokenizer_hash
from swarm.net.discovery import snapshot
from swarm.net.join import JoinInfo
from swarm.net.p2p import Peer
from swarm.net.weights import Ask, Holder
from swarm.wire.v1 import weights_pb2 as pb

MAX_ASKED = 8
"""Holders asked about a part: enough to notice a dissenter, few enough for a swarm of a thousand."""
_DESCRIPTION = "description.json"
FindHolders = Callable[[int | None], Awaitable[Sequence[Holder]]]
"""Peers to ask for a block (None: for what lies outside blocks), best first, at most MAX_ASKED count."""
log = structlog.get_logger()


def swarm_holders(peer: Peer, join: JoinInfo) -> FindHolders:
    """Those that announce the block, then bootstrap nodes and others, who may have the files too."""
    random = Random()  # which of a thousand are asked must not be foreseeable

    async def find(block: int | None) -> list[Holder]:
        nodes = [n for n in (await snapshot(peer, join.model_hash)).nodes if n.peer_id != peer.peer_id]
        random.shuffle(nodes)
        holding = [n for n in nodes if block is not None and n.span.start <= block < n.span.end]
        found: dict[str, tuple[str, ...]] = {n.peer_id: n.addrs for n in holding[: MAX_ASKED - 2]}
        for address in join.bootstrap:
            found.setdefault(address.rpartition("/p2p/")[2], (address,))
        for node in nodes:
            found.setdefault(node.peer_id, node.addrs)
        found.pop(peer.peer_id, None)
        return list(found.items())[:MAX_ASKED]

    return find


async def fetch_description(
    peer: Peer, holders: Sequence[Holder], model_hash: bytes, seal_hash: bytes, witnesses: int, folder: Path
) -> Description:
    """Fetch and verify table, configuration and small files, and keep them."""
    reasons: dict[str, str] = {}
    tokenizers: dict[bytes, list[Holder]] = {}
    candidates = []
    answers = await asyncio.gather(*(_description(peer, holder, model_hash) for holder in holders[:MAX_ASKED]))
    for holder, answer in zip(holders, answers, strict=False):
        if isinstance(answer, SwarmError):
            reasons[holder[0]] = answer.cause
        elif seal_hash and (answer.seal is None or answer.seal.hash != seal_hash):
            reasons[holder[0]] = "has no seal, or another"
        else:
            tokenizers.setdefault(answer.tokenizer_hash, []).append(holder)
            candidates.append((holder, answer))
    if candidates and not seal_hash:
        require_agreement("the tokenizer", tokenizers, witnesses, reasons)
    for holder, description in candidates:
        try:
            files = await _files(peer, holder, description, model_hash, bool(seal_hash))
            await asyncio.to_thread(_keep, folder, files, description, model_hash)
            return description
        except StorageError as error:
            if not isinstance(error, CorruptData):
                raise
            reasons[holder[0]] = error.cause
        except SwarmError as error:
            reasons[holder[0]] = error.cause
        log.warning("weights_holder_failed", peer=holder[0], reason=reasons[holder[0]])
    raise ModelNotFound(
        f"no node of the swarm could give the model: {listed(reasons) or 'nobody announces it'}",
        "start a node that has the checkpoint, or give a folder or hub id with --model",
    )


async def _description(peer: Peer, holder: Holder, model_hash: bytes) -> Description | SwarmError:
    try:
        ask = await Ask.dial(peer, holder, model_hash)
        try:
            data = await ask.whole(pb.WEIGHTS_ITEM_DESCRIPTION, "", MAX_INDEX_BYTES)
        finally:
            ask.close()
        return await asyncio.to_thread(Description.parse, data, f"node {holder[0]}")
    except SwarmError as error:
        return error


async def _files(
    peer: Peer, holder: Holder, description: Description, model_hash: bytes, sealed: bool
) -> dict[str, bytes]:
    files = {}
    ask = await Ask.dial(peer, holder, model_hash)
    try:
        for name, (_, sha256) in description.files.items():
            expected = sha256
            if sealed and description.seal is not None:
                # What the seal does not name is left out: its founder's checkpoint does not have it.
                if name not in description.seal.files:
                    continue
                expected = description.seal.files[name]
            files[name] = await ask.whole(pb.WEIGHTS_ITEM_FILE, name, MAX_FILE_BYTES)
            if hashlib.sha256(files[name]).digest() != expected:
                raise CorruptData(f"node {holder[0]} sent another {name} than it should")
    finally:
        ask.close()
    return files


def _keep(folder: Path, files: Mapping[str, bytes], description: Description, model_hash: bytes) -> None:
    """Verify, then write; the description last, as the sign that the rest is there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Elsewhere first: nothing of a holder that is then refused may stay beside what another gives.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as new:
            for name, content in files.items():
                (Path(new) / name).write_bytes(content)
            _verify(Path(new), description, model_hash)
        (folder / _DESCRIPTION).unlink(missing_ok=True)
        for name in set(SMALL_FILES) - files.keys():
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error.strerror}", "free disk space there") from error
    for name, content in files.items():
        write_whole(folder / name, content)
    write_whole(folder / _DESCRIPTION, description.serialize())


def _verify(folder: Path, description: Description, model_hash: bytes) -> None:
    raw_config = read_config(folder / "config.json")
    if fingerprint(raw_config, description.tensors, description.first) != model_hash:
        raise ModelMismatch("the description is not of the model that the join string names")
    if tokenizer_hash(folder) != description.tokenizer_hash:
        raise CorruptData(f"the tokenizer in {folder} is not the one described")


def kept_description(folder: Path, model_hash: bytes, seal_hash: bytes) -> Description | None:
    try:
        data = (folder / _DESCRIPTION).read_bytes()
    except OSError:
        return None
    try:
        description = Description.parse(data, str(folder))
        _verify(folder, description, model_hash)
    except SwarmError as error:
        log.warning("kept_model_not_used", folder=str(folder), reason=error.cause)
        return None
    sealed = not seal_hash or (description.seal is not None and description.seal.hash == seal_hash)
    return description if sealed else None


def require_agreement(
    what: str, given: Mapping[bytes, Sequence[Holder]], witnesses: int, silent: Mapping[str, str]
) -> None:
    """Hold to the rule without a seal. `silent`: who gave nothing, and why. Raises UnverifiedWeights."""
    if len(given) > 1:
        sides = "; ".join(
            f"{digest.hex()[:12]} by {', '.join(h[0] for h in holders)}" for digest, holders in given.items()
        )
        raise UnverifiedWeights(f"nodes disagree about {what}: {sides}")
    count = sum(len(holders) for holders in given.values())
    if count < witnesses:
        others = f" ({listed(silent)})" if silent else ""
        raise UnverifiedWeights(f"only {count} node(s) vouch for {what}, {witnesses} are needed{others}")


def listed(reasons: Mapping[str, str]) -> str:
    """Who said what, in a line."""
    return "; ".join(f"{peer[-6:]}: {reason}" for peer, reason in reasons.items())
