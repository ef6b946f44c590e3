"""Plain text as training data: documents in, pieces of at most max_length tokens out, every position labelled.

Text travels as lines {"text": "…"}, one document a line. A piece never spans two documents, so
attention needs no mask between them; the end-of-text token closes a document. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from swarm.data.chat import IGNORED, EncodedSample
from swarm.errors import DatasetError
from swarm.ids import sha256

_LEAST_TOKENS = 2
"""One to read and one to predict."""


class TextTokenizer(Protocol):
    """The part of transformers' PreTrainedTokenizerBase that is used here."""

    @property
    def eos_token_id(self) -> int | None: ...

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any: ...


@dataclass(frozen=True)
class TextDataset:
    """The documents of one file, in file order."""

    documents: tuple[str, ...]
    digest: bytes
    where: str

    def __len__(self) -> int:
        return len(self.documents)


def text_lines(documents: Iterable[str]) -> bytes:
    """Documents in the form in which they travel."""
    return b"".join(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in documents)


def parse_text_lines(data: bytes, where: str) -> TextDataset:
    """Raises DatasetError, which names the line."""
    documents: list[str] = []
    for number, line in enumerate(data.rstrip(b"\n").split(b"\n"), start=1):
        try:
            raw: object = json.loads(line)
        except ValueError as error:  # UnicodeDecodeError is one
            raise DatasetError(f"{where} line {number} is not JSON: {error}") from error
        if not isinstance(raw, dict) or set(raw) != {"text"} or not isinstance(raw["text"], str):
            raise DatasetError(f'{where} line {number} is not {{"text": …}}', "give every line a text, or messages")
        if not raw["text"].strip():
            raise DatasetError(f"{where} line {number}: the text is empty", "remove empty documents")
        documents.append(raw["text"])
    return TextDataset(tuple(documents), sha256(data), where)


def text_pieces(tokenizer: TextTokenizer, documents: Sequence[str], max_length: int) -> tuple[EncodedSample, ...]:
    """Every document cut into pieces, in order; a last piece too short to predict anything is left out."""
    pieces: list[EncodedSample] = []
    for text in documents:
        ids = [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        for start in range(0, len(ids), max_length):
            piece = tuple(ids[start : start + max_length])
            if len(piece) >= _LEAST_TOKENS:
                pieces.append(EncodedSample(piece, (IGNORED, *piece[1:]), 0))
    return tuple(pieces)
