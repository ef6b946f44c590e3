"""A checkpoint on the Hugging Face hub: its table of tensors, and only those files and bytes that are asked for.

In: a model id and a revision. Out: local files, or a typed error that says what the hub said.
A file of which at least half is needed comes whole into the hub's own cache; of a larger one only
the byte ranges, one part a block (`swarm.model.parts`), into this software's cache, whose table of
tensors also spares the headers and samples of a second start. Transport security vouches for
ranges: the hub publishes hashes of whole files only. A commit that is cached is opened without
asking the hub; a branch is always asked for, unless HF_HUB_OFFLINE says not to. HF_ENDPOINT, HF_HOME
and HF_TOKEN are honoured. Importing this module takes a third of a second.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import structlog
from huggingface_hub import HfApi, hf_hub_download, hf_hub_url, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# The client whose errors it passes on when nobody answers, under one name across its versions.
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    get_session,
    hf_raise_for_status,
    httpx,
    validate_repo_id,
)

from swarm.errors import CorruptData, ModelNotFound, NetworkError, ProtocolError
from swarm.model.parts import PartStore, Stretch, lay_out, write_whole
from swarm.model.sources import (
    INDEX_FILE,
    SINGLE_FILE,
    Located,
    TensorEntry,
    header_length,
    merge_tables,
    parse_header,
    part_of,
    read_header,
    weight_files,
)

WHOLE_FILE_SHARE = 0.5
"""Of a file of which this share is needed, the whole comes: later spans find it in the hub's cache."""
_TIMEOUT_S = 10.0
_ATTEMPTS = 5
_BACKOFF_S = 0.25
_CONNECTIONS = 8
_HEADER_GUESS_BYTES = 64 * 1024
"""Most headers fit, so that one request reads a file's table."""
_TABLE_VERSION = 1
_COMMIT = re.compile(r"[0-9a-f]{40}")
log = structlog.get_logger()


class HubSource:
    """A hub id at one commit. Make with `open`."""

    def __init__(self, name: str, revision: str, cache: Path, table: dict[str, Any]) -> None:
        self.name = name
        self.revision = revision
        self.tensors = {
            tensor: TensorEntry(e[0], e[1], tuple(e[2]), e[3], e[4]) for tensor, e in table["tensors"].items()
        }
        self._names = frozenset(table["names"])
        self._sizes: dict[str, int] = table["sizes"]
        self._first: dict[str, str] = table["first"]
        self._table = table
        self._folder = cache / revision
        self._parts = PartStore(self._folder)
        self._whole: dict[str, Path] = {}

    @classmethod
    def open(cls, model: str, revision: str | None, cache: Path) -> HubSource:
        """Find the commit and its table of tensors. Raises ModelNotFound, UnsupportedModel, CorruptData."""
        cache = cache / "hub" / model.replace("/", "--")
        with _asking(model):
            validate_repo_id(model)
            commit, names = _known_commit(model, revision, cache), list[str]()
            if commit is None:
                info = HfApi().model_info(model, revision=revision, timeout=_TIMEOUT_S)
                commit, names = str(info.sha), [file.rfilename for file in info.siblings or ()]
                if not _COMMIT.fullmatch(commit):
                    raise ModelNotFound(f"the hub names no commit of '{model}'", "check HF_ENDPOINT")
            table = _cached_table(cache / commit)
            if table is None:
                table = _read_table(model, commit, names)
                write_whole(cache / commit / "table.json", json.dumps(table).encode())
            write_whole(_ref(cache, revision), commit.encode())
        source = cls(model, commit, cache, table)
        source.files(("config.json",))
        return source

    def files(self, names: Collection[str]) -> Path:
        folder = None
        for name in ("config.json", *names):
            if name in self._names:
                with _asking(self.name):
                    path = Path(hf_hub_download(self.name, name, revision=self.revision))
                folder = folder or path.parent
        if folder is None:
            raise ModelNotFound(f"the hub's '{self.name}' holds no config.json")
        return folder

    def first_bytes(self, names: Iterable[str], length: int) -> dict[str, bytes]:
        wanted = list(names)

        def read(name: str) -> bytes:
            entry = self.tensors[name]
            return b"".join(self._stream(entry.file, entry.offset, entry.offset + min(length, entry.size)))

        if missing := [name for name in wanted if name not in self._first]:
            with _asking(self.name), ThreadPoolExecutor(_CONNECTIONS) as pool:
                self._first |= {name: data.hex() for name, data in zip(missing, pool.map(read, missing), strict=True)}
            write_whole(self._folder / "table.json", json.dumps(self._table).encode())
        return {name: bytes.fromhex(self._first[name])[:length] for name in wanted}

    def local(self, name: str) -> Located | None:
        entry = self.tensors.get(name)
        if entry is None:
            return None
        if (whole := self._cached_file(entry.file)) is not None:
            return Located(whole, entry.offset, entry.size)
        return self._parts.local(_part(name, entry), name)

    def _cached_file(self, file: str) -> Path | None:
        """A file that lies whole in the hub's cache; its header is checked once. Raises CorruptData."""
        if file not in self._whole:
            found = try_to_load_from_cache(self.name, file, revision=self.revision)
            if not isinstance(found, str):
                return None
            table = read_header(Path(found))
            if any(table.get(n) != entry for n, entry in self.tensors.items() if entry.file == file):
                raise CorruptData(f"{found} is not the file the hub has", f"remove {Path(found).resolve()}")
            self._whole[file] = Path(found)
        return self._whole[file]

    def ensure(self, names: Collection[str]) -> None:
        by_file: dict[str, list[str]] = {}
        for name in names:
            if self.local(name) is None:
                by_file.setdefault(self.tensors[name].file, []).append(name)
        for file, missing in by_file.items():
            # A part is fetched whole, so what counts is all of it.
            parts = {_part(name, self.tensors[name]) for name in missing}
            members: dict[str, dict[str, TensorEntry]] = {part: {} for part in parts}
            for name, entry in self.tensors.items():
                if entry.file == file and (part := _part(name, entry)) in members:
                    members[part][name] = entry
            needed = sum(entry.size for tensors in members.values() for entry in tensors.values())
            with _asking(self.name):
                if needed >= WHOLE_FILE_SHARE * self._sizes[file]:
                    self._download(file)
                    continue
                for part, tensors in sorted(members.items()):
                    log.info("fetching", model=self.name, part=part, bytes=sum(e.size for e in tensors.values()))
                    self._fill(part, tensors)

    def _download(self, file: str) -> None:
        """A whole file into the hub's cache. Connections that are reset begin again, which the library does not do."""
        log.info("fetching", model=self.name, file=file, bytes=self._sizes[file])
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                hf_hub_download(self.name, file, revision=self.revision)
                return
            except httpx.TransportError as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                log.warning("hub_connection_broke", file=file, at=0, reason=reason)
                time.sleep(_BACKOFF_S * 2**attempt)
        raise NetworkError(f"the hub stopped sending {self.name}/{file}: {reason}")

    def _fill(self, part: str, tensors: dict[str, TensorEntry]) -> None:
        layout = lay_out(tensors)
        stretches = []
        for run in _runs([tensors[name] for name in layout.order]):
            file, start, end = run[0].file, run[0].offset, run[-1].offset + run[-1].size

            def read(done: int, file: str = file, start: int = start, end: int = end) -> Iterator[bytes]:
                return self._stream(file, start + done, end)

            stretches.append(Stretch(f"{self.name}/{file} [{start}:{end}]", end - start, read))
        self._parts.fill(part, layout, stretches)

    def _stream(self, file: str, start: int, end: int) -> Iterator[bytes]:
        # Inside, since these errors are OSErrors, which a writer would take for those of its disk.
        with _asking(self.name):
            for _, data in stream(self.name, self.revision, file, start, end, self._sizes[file]):
                yield data


def stream(
    model: str, commit: str, file: str, start: int, end: int, file_bytes: int | None = None
) -> Iterator[tuple[int, bytes]]:
    """The bytes [start, end) of a file as (size of the file, piece), over broken connections.

    Raises ModelNotFound, NetworkError (several attempts in a row brought nothing), ProtocolError.
    """
    url = hf_hub_url(model, file, revision=commit)
    failures = 0
    while start < end:
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        try:
            with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT_S) as response:
                hf_raise_for_status(response)
                size = _check_range(response, url, start)
                if file_bytes is not None and size != file_bytes:
                    raise ProtocolError(f"{url} has {size} bytes, {file_bytes} before", "check HF_ENDPOINT")
                file_bytes, end = size, min(end, size)
                for data in response.iter_bytes():
                    piece = data[: end - start]
                    start += len(piece)
                    failures = 0
                    yield size, piece
                    if start == end:
                        return
            reason = "it ended early"
        except httpx.TransportError as error:
            reason = " ".join(str(error).split()) or type(error).__name__
        except HfHubHTTPError as error:
            if error.response.status_code not in (408, 429, 500, 502, 503, 504):
                raise
            reason = f"status {error.response.status_code}"
        failures += 1
        if failures == _ATTEMPTS:
            raise NetworkError(f"the hub stopped sending {model}/{file} at byte {start}: {reason}")
        log.warning("hub_connection_broke", file=file, at=start, reason=reason)
        time.sleep(_BACKOFF_S * 2**failures)


def _check_range(response: Any, url: str, start: int) -> int:
    """The size of the whole file, from an answer that begins at `start`. Raises ProtocolError."""
    if response.status_code == 200:
        if start:
            raise ProtocolError(
                f"the server of {url} ignores byte ranges",
                "use another HF_ENDPOINT, or download the checkpoint into a folder and give that",
            )
        length = response.headers.get("content-length", "")
        if not length.isdigit():
            raise ProtocolError(f"{url} comes without its size", "check HF_ENDPOINT")
        return int(length)
    said = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("content-range", ""))
    if response.status_code != 206 or said is None or int(said[1]) != start:
        raise ProtocolError(f"{url} answers a request for byte {start} with other bytes", "check HF_ENDPOINT")
    return int(said[2])


def _read_table(model: str, commit: str, names: list[str]) -> dict[str, Any]:
    """What is kept of a commit: names of files, sizes and tensors of those with weights."""
    index = None
    if INDEX_FILE in names and SINGLE_FILE not in names:
        index = Path(hf_hub_download(model, INDEX_FILE, revision=commit)).read_bytes()
    wanted = weight_files(names, index, f"the hub's '{model}'")

    def read(file: str) -> tuple[int, dict[str, TensorEntry]]:
        begin, size = bytearray(), 0
        for size, data in stream(model, commit, file, 0, _HEADER_GUESS_BYTES):  # noqa: B007
            begin += data
        length = header_length(f"{model}/{file}", bytes(begin[:8]), size)
        for _, data in stream(model, commit, file, len(begin), 8 + length, size):
            begin += data
        return size, parse_header(file, bytes(begin[8 : 8 + length]), size)

    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        read_files = dict(zip(wanted, pool.map(read, wanted), strict=True))
    tensors = merge_tables({file: table for file, (_, table) in read_files.items()}, wanted, f"the hub's '{model}'")
    return {
        "version": _TABLE_VERSION,
        "names": names,
        "sizes": {file: size for file, (size, _) in read_files.items()},
        "tensors": {n: [e.file, e.dtype, e.shape, e.offset, e.size] for n, e in tensors.items()},
        "first": {},
    }


def _cached_table(folder: Path) -> dict[str, Any] | None:
    try:
        table = json.loads((folder / "table.json").read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CorruptData(f"cannot read {folder / 'table.json'}: {error}") from error
    return table if isinstance(table, dict) and table.get("version") == _TABLE_VERSION else None


def _known_commit(model: str, revision: str | None, cache: Path) -> str | None:
    """The commit, where it is known without asking. Raises ModelNotFound in offline mode if it is not."""
    if revision and _COMMIT.fullmatch(revision) and (cache / revision / "table.json").is_file():
        return revision
    if not is_offline_mode():
        return None
    ref = _ref(cache, revision)
    if not ref.is_file() or not (cache / ref.read_text() / "table.json").is_file():
        raise ModelNotFound(
            f"HF_HUB_OFFLINE is set and '{model}' at {revision or 'main'} was not opened here before",
            "run it once without HF_HUB_OFFLINE, or give a checkpoint folder",
        )
    return ref.read_text()


def _ref(cache: Path, revision: str | None) -> Path:
    return cache / "refs" / quote(revision or "main", safe="").replace(".", "%2E")


def _part(name: str, entry: TensorEntry) -> str:
    """A block may lie in two files, of which one comes whole: a part never mixes files."""
    return f"{part_of(name)}@{entry.file}"


def _runs(entries: list[TensorEntry]) -> list[list[TensorEntry]]:
    """Tensors that follow each other in their file, together: one request each."""
    runs: list[list[TensorEntry]] = []
    for entry in entries:
        if runs and runs[-1][-1].file == entry.file and runs[-1][-1].offset + runs[-1][-1].size == entry.offset:
            runs[-1].append(entry)
        else:
            runs.append([entry])
    return runs


@contextmanager
def _asking(model: str) -> Iterator[None]:
    try:
        yield
    except GatedRepoError as error:
        raise ModelNotFound(
            f"the hub's '{model}' is gated", "accept its terms on the hub, and set HF_TOKEN to a token of that account"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError, HFValidationError) as error:
        raise ModelNotFound(
            f"'{model}' is neither a folder nor a model that the hub shows",
            "check the name and the revision; a private or gated model needs HF_TOKEN",
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelNotFound(
            f"the hub does not give a file of '{model}', and it is not in the cache: {error.__cause__ or error}",
            "check the network, HF_ENDPOINT and HF_HUB_OFFLINE",
        ) from error
    except (httpx.HTTPError, OSError) as error:
        raise ModelNotFound(
            f"'{model}' is not a folder, and the hub does not give it: {' '.join(str(error).split())}",
            "give a checkpoint folder, or check the network, HF_ENDPOINT and HF_TOKEN",
        ) from error
