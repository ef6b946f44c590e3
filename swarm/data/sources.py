"""What `data.train` may be, how it travels, and how a lead reads it back.

At submission: a JSONL file of chats or of texts (travels as it is), a `.txt` file (one document), or a folder that
`datasets.save_to_disk` wrote (a column `messages` or `text`; needs the optional `datasets` package).
At the lead: the travelled bytes and the tokenizer become `Samples`, which encodes one by its index;
every lead gets the same ones.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from swarm.data.chat import EncodedSample, encode_sample
from swarm.data.dataset import ChatDataset, parse_chat_lines, read_file
from swarm.data.text import TextDataset, parse_text_lines, text_lines, text_pieces
from swarm.errors import DatasetError


@dataclass(frozen=True)
class Travelling:
    """The bytes that are uploaded, and how many conversations or documents are in them."""

    data: bytes
    samples: int


class Samples(Protocol):
    def __len__(self) -> int: ...

    def encode(self, index: int) -> EncodedSample:
        """Raises DatasetError, UnsupportedModel."""
        ...


def load_source(path: Path) -> Travelling:
    """Read and check training data. Raises DatasetError."""
    if path.is_dir():
        data = _saved_dataset(path)
    elif path.suffix == ".txt":
        data = text_lines([_read_text(path)])
    else:
        data = read_file(path)
    return Travelling(data, len(_parse(data, str(path))))


def open_samples(data: bytes, where: str, tokenizer: Any, max_length: int) -> Samples:
    """What travelled, ready to be encoded. Raises DatasetError. Text is tokenized here, chats one by one later."""
    dataset = _parse(data, where)
    if isinstance(dataset, ChatDataset):
        return ChatSamples(dataset, tokenizer, max_length)
    pieces = text_pieces(tokenizer, dataset.documents, max_length)
    if not pieces:
        raise DatasetError(f"{where} holds no text to learn from", "give it at least two tokens")
    return _Pieces(pieces)


def _parse(data: bytes, where: str) -> ChatDataset | TextDataset:
    try:
        first: object = json.loads(data.split(b"\n", 1)[0])
    except ValueError:
        first = None  # said with its line by the parser of chats
    if isinstance(first, dict) and "text" in first:
        return parse_text_lines(data, where)
    return parse_chat_lines(data, where)


@dataclass(frozen=True)
class ChatSamples:
    """Conversations, tokenized when they are asked for."""

    dataset: ChatDataset
    tokenizer: Any
    max_length: int

    def __len__(self) -> int:
        return len(self.dataset)

    def encode(self, index: int) -> EncodedSample:
        return encode_sample(self.tokenizer, self.dataset[index], self.max_length, self.dataset.line(index))


@dataclass(frozen=True)
class _Pieces:
    pieces: tuple[EncodedSample, ...]

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, index: int) -> EncodedSample:
        return self.pieces[index]


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"cannot read {path}: {error}", "check the path, and save the file as UTF-8") from error
    if not text.strip():
        raise DatasetError(f"{path} is empty")
    return text


def _saved_dataset(path: Path) -> bytes:
    """A folder of the `datasets` package as JSONL."""
    try:
        import datasets  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise DatasetError(
            f"{path} is a folder, which only the optional package `datasets` can read",
            "pip install 'volunteer-swarm[datasets]', or give a .jsonl or .txt file",
        ) from error
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DatasetError(f"cannot read {path}: {error}", "give a folder that save_to_disk wrote") from error
    rows = found["train"] if isinstance(found, datasets.DatasetDict) else found
    for column in ("messages", "text"):
        if column in rows.column_names:
            lines = (json.dumps({column: row[column]}, ensure_ascii=False) for row in rows)
            return "".join(f"{line}\n" for line in lines).encode()
    raise DatasetError(
        f"{path} has the columns {', '.join(rows.column_names)}", "name one of them `messages` or `text`"
    )
