"""Published adapters on this node: files by hash, announced in the DHT, served to peers.

    adapters/<name>/meta.json + the files

An adapter gets here from the coordinator when a job ends, or from a peer when a session asks for it.
Files are verified by hash before they are kept, and again when read.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
from pathlib import Path

import structlog

from swarm.adapters.registry import MAX_ADAPTER_BYTES
from swarm.errors import AdapterNotFound, StorageError
from swarm.ids import NAME_PATTERN, sha256
from swarm.net.blobs import fetch_file, serve_blobs
from swarm.net.discovery import ADAPTER_REFRESH_S, publish_adapter, snapshot
from swarm.net.p2p import Peer
from swarm.net.view import AdapterInfo, FileInfo

ALLOWED_FILES = frozenset({"adapter_config.json", "adapter_model.safetensors"})
log = structlog.get_logger()


class AdapterStore:
    """The adapters that this node holds for one base model."""

    def __init__(self, folder: Path, peer: Peer, model_hash: bytes) -> None:
        self._folder = folder / "adapters"
        self._peer = peer
        self._model_hash = model_hash
        self._held: dict[str, AdapterInfo] = {}
        self._by_hash: dict[bytes, Path] = {}

    async def start(self) -> None:
        """Take stock of the disk and serve files to peers."""
        for unfinished in self._folder.glob(".new-*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        for meta in sorted(self._folder.glob("*/meta.json")):
            try:
                raw = json.loads(meta.read_text())
                files = tuple(FileInfo(f["name"], bytes.fromhex(f["sha256"]), f["size"]) for f in raw["files"])
                info = AdapterInfo(raw["name"], raw["job_id"], raw["round"], files, ())
                if raw["model_hash"] == self._model_hash.hex():
                    self._remember(info, meta.parent)
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.warning("adapter_unreadable", folder=str(meta.parent), error=str(error))
        await serve_blobs(self._peer, self._read)

    def holds(self, info: AdapterInfo) -> bool:
        """Exactly these files under that name: a later job may have the name, and as many rounds, of an earlier one."""
        held = self._held.get(info.name)
        return held is not None and (held.job_id, set(held.files)) == (info.job_id, set(info.files))

    def add(self, info: AdapterInfo, contents: dict[str, bytes]) -> None:
        """Keep an adapter; replaces another one of that name. Raises StorageError, AdapterNotFound."""
        if NAME_PATTERN.fullmatch(info.name) is None or not set(contents) <= ALLOWED_FILES:
            raise AdapterNotFound(f"the adapter '{info.name[:64]}' has a name or file that is not allowed")
        target = self._folder / info.name
        temporary: Path | None = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=self._folder, prefix=".new-"))
            for name, content in contents.items():
                (temporary / name).write_bytes(content)
            meta = {
                "name": info.name,
                "job_id": info.job_id,
                "round": info.round,
                "model_hash": self._model_hash.hex(),
                "files": [{"name": f.name, "sha256": f.sha256.hex(), "size": f.size} for f in info.files],
            }
            (temporary / "meta.json").write_text(json.dumps(meta, indent=2))
            if target.exists():
                shutil.rmtree(target)
            os.rename(temporary, target)
        except OSError as error:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
            raise StorageError(f"cannot keep the adapter {info.name} in {self._folder}: {error.strerror}") from error
        replaced = self._held.get(info.name)
        self._remember(info, target)
        log.info("adapter_held", name=info.name, round=info.round)
        if replaced is not None and replaced.job_id != info.job_id:
            log.warning("adapter_replaced", name=info.name, job=info.job_id, before=replaced.job_id or "brought along")

    def offer(self, name: str, contents: dict[str, bytes]) -> None:
        """Keep and announce an adapter that this node's volunteer brought. Raises AdapterNotFound, StorageError."""
        files = tuple(FileInfo(file, sha256(content), len(content)) for file, content in sorted(contents.items()))
        self.add(AdapterInfo(name, "", 0, files, ()), contents)

    async def announce(self) -> None:
        """Write this node's adapter records; call at least every `ADAPTER_TTL_S`."""
        for info in list(self._held.values()):
            await publish_adapter(self._peer, self._model_hash, info.name, info.job_id, info.round, info.files)

    async def keep_announcing(self) -> None:
        """Write the records again and again, until cancelled."""
        while True:
            await self.announce()
            await asyncio.sleep(ADAPTER_REFRESH_S)

    async def files(self, name: str, wanted: tuple[FileInfo, ...]) -> dict[str, bytes]:
        """The contents of exactly these files: from disk, or from a peer that announces them."""
        if not wanted or {file.name for file in wanted} != ALLOWED_FILES:
            raise AdapterNotFound(f"the adapter '{name[:64]}' does not have PEFT's two files")
        contents = {file.name: self._read(file.sha256) for file in wanted}
        if all(content is not None for content in contents.values()):
            return {key: value for key, value in contents.items() if value is not None}
        view = await snapshot(self._peer, self._model_hash)
        for info in view.adapters:
            if info.name == name and set(info.files) == set(wanted):
                fetched = {f.name: await fetch_file(self._peer, info.holders, f, MAX_ADAPTER_BYTES) for f in wanted}
                self.add(info, fetched)
                return fetched
        raise AdapterNotFound(f"no node announces the adapter '{name}' with these files")

    def _remember(self, info: AdapterInfo, folder: Path) -> None:
        self._held[info.name] = info
        for file in info.files:
            self._by_hash[file.sha256] = folder / file.name

    def _read(self, digest: bytes) -> bytes | None:
        path = self._by_hash.get(digest)
        if path is None:
            return None
        try:
            content = path.read_bytes()
        except OSError:
            return None
        return content if sha256(content) == digest else None
