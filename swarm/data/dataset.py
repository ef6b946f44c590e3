"""JSONL chat files: bytes → conversations, or an error that names the line.

What comes in is the whole file as bytes, one {"messages": [{"role", "content"}, …]} a line;
what goes out is a frozen `ChatDataset` with the sha256 of exactly those bytes, which is the
name the data travels under. Line k of the file is sample k - 1, always: a blank line between
samples is an error, blank lines at the end are not. Nothing is repaired, skipped or defaulted;
the first line that is wrong is a `DatasetError`. Knows no tokenizer and no template.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from swarm.errors import DatasetError
from swarm.ids import sha256

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str

    def as_dict(self) -> dict[str, str]:
        """The form that chat templates and OpenAI-shaped HTTP take."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class ChatDataset:
    """The conversations of one file, in file order."""

    samples: tuple[tuple[Message, ...], ...]
    digest: bytes
    """sha256 of the file's bytes."""
    where: str
    """What errors call the file."""

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Message, ...]:
        return self.samples[index]

    def line(self, index: int) -> str:
        """Where sample `index` stands, as errors name it."""
        return f"{self.where} line {index + 1}"


def load_chat_file(path: Path) -> ChatDataset:
    """Read and parse a chat file. Raises DatasetError, also when it cannot be read."""
    return parse_chat_lines(read_file(path), str(path))


def read_file(path: Path) -> bytes:
    """Raises DatasetError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DatasetError(
            f"cannot read {path}: {error.strerror or error}", "check the path and its permissions"
        ) from error


def parse_chat_lines(data: bytes, where: str) -> ChatDataset:
    """Parse the bytes of a chat file; `where` names it in errors. Raises DatasetError."""
    # Only \n ends a line: str.splitlines would also cut at U+2028, which JSON strings may hold.
    lines = data.split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise DatasetError(f"{where} is empty")
    samples = tuple(_parse_line(line, f"{where} line {number}") for number, line in enumerate(lines, start=1))
    return ChatDataset(samples=samples, digest=sha256(data), where=where)


class _DuplicateKeyError(ValueError):
    """A JSON object gives one key twice; json would silently keep the last."""


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise _DuplicateKeyError(f"key '{key}' is given twice")
        found[key] = value
    return found


def _parse_line(line: bytes, where: str) -> tuple[Message, ...]:
    if not line.strip():
        raise DatasetError(f"{where} is blank", "remove blank lines between samples")
    try:
        raw: object = json.loads(line.decode("utf-8"), object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{where} is not UTF-8: byte {error.start + 1} of the line is {line[error.start]:#04x}",
            "save the file as UTF-8",
        ) from error
    except _DuplicateKeyError as error:
        raise DatasetError(f"{where}: {error}") from error
    except RecursionError as error:
        raise DatasetError(f"{where} is nested too deeply") from error
    except ValueError as error:  # JSONDecodeError, and integers too long to convert
        raise DatasetError(f"{where} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise DatasetError(f"{where} is {_kind(raw)}, not an object")
    _check_keys(raw, {"messages"}, where)
    turns = raw["messages"]
    if not isinstance(turns, list):
        raise DatasetError(f"{where}: messages is {_kind(turns)}, not a list")
    if not turns:
        raise DatasetError(f"{where}: messages is empty")
    messages = tuple(_parse_turn(turn, f"{where}, message {n}") for n, turn in enumerate(turns, start=1))
    if all(message.role != "assistant" for message in messages):
        raise DatasetError(f"{where} has no assistant message, so there is nothing to learn from", "add the answer")
    if messages[0].role == "assistant":
        # Chat templates cannot render the empty conversation that would be its prompt.
        raise DatasetError(f"{where} starts with the assistant", "put what it answers before it")
    return messages


def _parse_turn(turn: object, where: str) -> Message:
    if not isinstance(turn, dict):
        raise DatasetError(f"{where} is {_kind(turn)}, not an object")
    _check_keys(turn, {"role", "content"}, where)
    content = turn["content"]
    if not isinstance(content, str):
        raise DatasetError(f"{where}: content is {_kind(content)}, not a string")
    if not content.strip():
        raise DatasetError(f"{where}: content is empty")
    if any("\ud800" <= char <= "\udfff" for char in content):
        raise DatasetError(
            f"{where}: content holds half of a surrogate pair", r"write both \u escapes, or the character"
        )
    for role in ROLES:
        if turn["role"] == role:
            return Message(role, content)
    raise DatasetError(f"{where}: unknown role {turn['role']!r:.40}", f"roles are {', '.join(ROLES)}")


def _check_keys(found: dict[str, object], wanted: set[str], where: str) -> None:
    if unknown := sorted(found.keys() - wanted):
        raise DatasetError(f"{where}: unknown key {unknown[0]!r:.40}")
    if missing := sorted(wanted - found.keys()):
        raise DatasetError(f"{where}: key '{missing[0]}' is missing")


def _kind(value: object) -> str:
    """What JSON calls a parsed value."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "a list"
        case _:
            return "an object"
