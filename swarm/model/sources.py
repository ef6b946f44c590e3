"""Where a checkpoint's tensors lie: the table of a safetensors header, a folder of them, and what a source is.

In: headers and index files, which may come from strangers. Out: `TensorEntry` values whose ranges
were checked (inside the file, no gaps, no overlaps, as many bytes as dtype and shape say), or
CorruptData. Tensor data is never read here, nothing is ever unpickled, and no name in an index
leads out of its folder.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

from swarm.errors import CorruptData, ModelNotFound, UnsupportedModel

MAX_HEADER_BYTES = 16 * 1024 * 1024
"""A tensor takes about 120 bytes of header: this is 130,000 tensors in one file. Published checkpoints
cut files at 5 to 10 GB, which hold a few thousand. Parsing costs about ten times the header in
memory, so that the 100 MB which the reference reader allows would be 1 GB from a stranger."""
MAX_INDEX_BYTES = 64 * 1024 * 1024
"""About 100 bytes a tensor, for the whole model: a mixture with 400,000 expert matrices fits."""
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
SMALL_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)
"""All that a process needs of a checkpoint besides tensors."""

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*\.safetensors")
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in the checkpoint."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """First byte within the file."""
    size: int


@dataclass(frozen=True)
class Located:
    """A tensor's bytes on this machine."""

    path: Path
    offset: int
    size: int


class Source(Protocol):
    """A checkpoint at one revision, as this machine reaches it. Methods block: call them off the loop."""

    name: str
    revision: str
    tensors: dict[str, TensorEntry]

    def files(self, names: Collection[str]) -> Path:
        """A folder that holds those of the named small files which the checkpoint has. Raises ModelNotFound."""

    def first_bytes(self, names: Iterable[str], length: int) -> dict[str, bytes]:
        """The first `length` bytes of each tensor (all of a smaller one), without fetching it."""

    def ensure(self, names: Collection[str]) -> None:
        """Bring tensors to this machine. Raises ModelNotFound, CorruptData, NetworkError, StorageError."""

    def local(self, name: str) -> Located | None:
        """Where a tensor lies on this machine; None if it is not here."""


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Size of a tensor. Raises CorruptData for a dtype that safetensors does not know."""
    if dtype not in _BITS:
        raise CorruptData(f"'{dtype[:32]}' is not a dtype of safetensors", "update this software, or the checkpoint")
    return prod(shape) * _BITS[dtype] // 8


def item_bits(dtype: str) -> int:
    return _BITS[dtype]


def part_of(name: str) -> str:
    """The part of the model a tensor belongs to: its block (`model.layers.12`), or itself (`lm_head.weight`)."""
    words = name.split(".")
    for place, word in enumerate(words[:-1]):
        if word.isascii() and word.isdigit():
            return ".".join(words[: place + 1])
    return name


def block_of(part: str) -> int | None:
    """The block that a part is; None for embeddings, norms and heads."""
    last = part.rpartition(".")[2]
    return int(last) if last.isascii() and last.isdigit() else None


def parse_header(file: str, header: bytes, file_bytes: int) -> dict[str, TensorEntry]:
    """The table in a safetensors header (without its 8-byte length). Raises CorruptData."""
    data_bytes = file_bytes - 8 - len(header)
    entries: dict[str, TensorEntry] = {}
    try:
        table = json.loads(header, object_pairs_hook=_no_duplicates)
        for name, info in table.items():
            if name == "__metadata__":
                continue
            start, end = info["data_offsets"]
            shape = tuple(info["shape"])
            if not all(type(n) is int and n >= 0 for n in (start, end, *shape)):
                raise ValueError(f"'{name}' has a place or shape that is not made of counts")
            if tensor_bytes(info["dtype"], shape) != end - start:
                raise ValueError(f"'{name}' has {end - start} bytes, which its dtype and shape do not need")
            entries[name] = TensorEntry(file, info["dtype"], shape, 8 + len(header) + start, end - start)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptData(f"{file} is not a safetensors file: {error}") from error
    at = 8 + len(header)
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size)):
        if entry.offset != at:
            what = "overlaps the tensor before it" if entry.offset < at else "leaves a gap before it"
            raise CorruptData(f"{file} is damaged: '{name}' {what}")
        at += entry.size
    if at != 8 + len(header) + data_bytes:
        raise CorruptData(f"{file} is cut off or longer than its table: {data_bytes} bytes of data")
    return entries


def header_length(file: str, first_8: bytes, file_bytes: int) -> int:
    """Read a header's length. Raises CorruptData."""
    if len(first_8) != 8:
        raise CorruptData(f"{file} is not a safetensors file: it has {len(first_8)} bytes")
    (length,) = struct.unpack("<Q", first_8)
    if length > min(MAX_HEADER_BYTES, file_bytes - 8):
        raise CorruptData(f"{file} announces a header of {length} bytes")
    return int(length)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The table at the start of a file. Raises CorruptData."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(header_length(str(path), file.read(8), size))
    except OSError as error:
        raise CorruptData(f"cannot read {path}: {error.strerror}") from error
    return {
        name: TensorEntry(path.name, e.dtype, e.shape, e.offset, e.size)
        for name, e in parse_header(str(path), header, size).items()
    }


def weight_files(names: Collection[str], index: bytes | None, where: str) -> dict[str, list[str]]:
    """Which files hold the weights, and which tensors of each count (empty: all).

    The order is that of transformers: `model.safetensors`, then the index (`index` is None unless it
    counts), then every `*.safetensors`; some checkpoints keep a second copy under another name
    beside these. `names` are the checkpoint's files.

    Raises UnsupportedModel (pickled weights only), ModelNotFound (no weights), CorruptData (the index).
    """
    if index is not None:
        wanted: dict[str, list[str]] = {}
        for tensor, file in _weight_map(index, where).items():
            if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
                raise CorruptData(f"the index of {where} names a file outside its folder: '{str(file)[:80]}'")
            if file not in names:
                raise ModelNotFound(f"{where} lacks {file}, which its index names", "download the checkpoint again")
            wanted.setdefault(file, []).append(tensor)
        return wanted
    found = [SINGLE_FILE] if SINGLE_FILE in names else sorted(name for name in names if _FILE_NAME.fullmatch(name))
    if found:
        return {file: [] for file in found}
    pickled = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
    if pickled:
        raise UnsupportedModel(
            f"{where} holds its weights only as pickle ({pickled[0]}), which can run code and is never read here",
            "use a revision with safetensors (often refs/pr/N), or convert it: save_pretrained writes safetensors",
        )
    raise ModelNotFound(f"{where} holds no *.safetensors file")


def _weight_map(index: bytes, where: str) -> Mapping[str, Any]:
    try:
        if len(index) > MAX_INDEX_BYTES:
            raise ValueError(f"it has {len(index)} bytes")
        weight_map = json.loads(index)["weight_map"]
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("its weight_map is not a table")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptData(f"the index of {where} cannot be used: {error}") from error
    return weight_map


def merge_tables(
    tables: Mapping[str, dict[str, TensorEntry]], wanted: Mapping[str, list[str]], where: str
) -> dict[str, TensorEntry]:
    """One table of a checkpoint out of its files' tables. Raises CorruptData."""
    tensors: dict[str, TensorEntry] = {}
    for file, names in wanted.items():
        for name in names or tables[file]:
            if name not in tables[file]:
                raise CorruptData(f"the index of {where} puts '{name}' into {file}, which does not have it")
            if name in tensors:
                raise CorruptData(f"{where} has '{name}' twice, in {tensors[name].file} and {file}")
            tensors[name] = tables[file][name]
    return tensors


class FolderSource:
    """A checkpoint folder."""

    revision = "local"

    def __init__(self, folder: Path) -> None:
        """Read the headers. Raises ModelNotFound, UnsupportedModel, CorruptData."""
        self.name = str(folder)
        self._folder = folder
        if not (folder / "config.json").is_file():
            raise ModelNotFound(f"{folder} holds no config.json")
        try:
            names = {path.name for path in folder.iterdir() if path.is_file()}
            has_index = INDEX_FILE in names and SINGLE_FILE not in names
            index = (folder / INDEX_FILE).read_bytes() if has_index else None
        except OSError as error:
            raise ModelNotFound(f"cannot read {folder}: {error.strerror}") from error
        wanted = weight_files(names, index, str(folder))
        self.tensors = merge_tables({file: read_header(folder / file) for file in wanted}, wanted, str(folder))

    def files(self, names: Collection[str]) -> Path:
        return self._folder

    def first_bytes(self, names: Iterable[str], length: int) -> dict[str, bytes]:
        first = {}
        try:
            for name in names:
                entry = self.tensors[name]
                with (self._folder / entry.file).open("rb") as file:
                    file.seek(entry.offset)
                    first[name] = file.read(min(length, entry.size))
        except OSError as error:
            raise CorruptData(f"cannot read {self._folder}: {error.strerror}") from error
        return first

    def ensure(self, names: Collection[str]) -> None:
        pass

    def local(self, name: str) -> Located | None:
        entry = self.tensors.get(name)
        return Located(self._folder / entry.file, entry.offset, entry.size) if entry else None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key appears twice")
    return table
