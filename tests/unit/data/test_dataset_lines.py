"""A chat file is read whole and exactly, or the error names the line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from swarm.data.dataset import Message, load_chat_file, parse_chat_lines
from swarm.errors import DatasetError

GOOD = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}'


def turns(*messages: object) -> bytes:
    return json.dumps({"messages": list(messages)}).encode()


USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Ho"}


def test_lines_become_samples() -> None:
    data = GOOD + b"\r\n" + turns({"role": "system", "content": "S"}, USER, ANSWER, USER) + b"\n\n  \n"
    dataset = parse_chat_lines(data, "a.jsonl")
    assert len(dataset) == 2
    assert dataset[0] == (Message("user", "Hi"), Message("assistant", "Ho"))
    assert [message.role for message in dataset[1]] == ["system", "user", "assistant", "user"]
    assert dataset.digest == hashlib.sha256(data).digest()
    assert dataset.line(1) == "a.jsonl line 2"
    assert dataset[0][0].as_dict() == USER


def test_only_newlines_end_lines() -> None:
    line = GOOD.decode().replace("Hi", "a\u2028b\u0085é")
    assert parse_chat_lines(line.encode(), "x")[0][0].content == "a\u2028b\u0085é"


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (b'{"messages": [', "is not JSON: .*column"),
        (b"\xef\xbb\xbf" + GOOD, "is not JSON: .*BOM"),
        (b"9" * 5000, "is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (GOOD.replace(b"Hi", b"H\xff"), "is not UTF-8: byte .* 0xff"),
        (b"", "is blank"),
        (b"  \t", "is blank"),
        (b'["messages"]', "is a list, not an object"),
        (b"null", "is null, not an object"),
        (b"{}", "key 'messages' is missing"),
        (GOOD[:-1] + b', "id": 7}', "unknown key 'id'"),
        (GOOD[:-1] + b', "messages": []}', "key 'messages' is given twice"),
        (GOOD.replace(b'"role": "user"', b'"role": "user", "role": "user"'), "key 'role' is given twice"),
        (b'{"messages": "Hi"}', "messages is a string, not a list"),
        (turns(), "messages is empty"),
        (turns("Hi", ANSWER), "message 1 is a string, not an object"),
        (turns(USER, {"role": "assistant"}), "message 2: key 'content' is missing"),
        (turns(USER, ANSWER | {"weight": 1}), "message 2: unknown key 'weight'"),
        (turns(USER, {"role": "tool", "content": "x"}), "message 2: unknown role 'tool'"),
        (turns(USER, {"role": ["user"], "content": "x"}), "message 2: unknown role"),
        (turns(USER, {"role": "assistant", "content": ""}), "message 2: content is empty"),
        (turns(USER, {"role": "assistant", "content": " \n"}), "message 2: content is empty"),
        (
            turns(USER, {"role": "assistant", "content": True}),
            "message 2: content is a boolean, not a string",
        ),
        (turns(USER, {"role": "assistant", "content": 1.5}), "message 2: content is a number, not a string"),
        (turns(USER, {"role": "assistant", "content": "\ud83d"}), "message 2: .*surrogate"),
        (turns(USER), "has no assistant message"),
        (turns(ANSWER, USER), "starts with the assistant"),
    ],
)
def test_the_error_names_the_line_and_what_is_wrong(line: bytes, cause: str) -> None:
    with pytest.raises(DatasetError, match=f"^SW102 a.jsonl line 2.*{cause}"):
        parse_chat_lines(b"\n".join([GOOD, line, GOOD]), "a.jsonl")


@pytest.mark.parametrize("data", [b"", b"\n\n", b"  "])
def test_an_empty_file(data: bytes) -> None:
    with pytest.raises(DatasetError, match=r"a\.jsonl is empty"):
        parse_chat_lines(data, "a.jsonl")


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    with pytest.raises(DatasetError, match=r"cannot read .*chat\.jsonl: No such file"):
        load_chat_file(path)
    path.write_bytes(GOOD)
    assert len(load_chat_file(path)) == 1
    path.write_bytes(b"{")
    with pytest.raises(DatasetError, match=r"chat\.jsonl line 1"):
        load_chat_file(path)
