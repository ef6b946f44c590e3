"""What training data may be: chats, plain text, folders of the optional `datasets` package."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from swarm.data.sources import load_source, open_samples
from swarm.data.text import text_lines, text_pieces
from swarm.errors import DatasetError

CHAT = json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}) + "\n"


class Letters:
    """A real, if small, tokenizer: one token a character, 0 ends a text."""

    eos_token_id = 0

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, Any]:
        assert not add_special_tokens
        return {"input_ids": [ord(character) for character in text]}


def test_chats_travel_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(CHAT * 2)
    assert load_source(path).data == path.read_bytes()
    assert load_source(path).samples == 2


def test_lines_of_texts_travel_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    source = load_source(path)
    assert (source.data, source.samples) == (path.read_bytes(), 2)


def test_text_is_cut_into_pieces_with_every_position_labelled(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_text("abcdefghi", encoding="utf-8")
    source = load_source(path)
    assert (source.data, source.samples) == (b'{"text": "abcdefghi"}\n', 1)
    samples = open_samples(source.data, "train", Letters(), 4)
    encoded = [samples.encode(index) for index in range(len(samples))]
    assert [piece.input_ids for piece in encoded] == [tuple(b"abcd"), tuple(b"efgh"), (ord("i"), 0)]
    assert [piece.labels for piece in encoded] == [(-100, *b"bcd"), (-100, *b"fgh"), (-100, 0)]


def test_pieces_do_not_span_documents() -> None:
    pieces = text_pieces(Letters(), ["abc", "d", "efghij"], 4)
    assert [piece.input_ids for piece in pieces] == [(*b"abc", 0), (ord("d"), 0), tuple(b"efgh"), (*b"ij", 0)]
    # One token alone predicts nothing.
    assert [piece.input_ids for piece in text_pieces(Letters(), ["abcd"], 4)] == [tuple(b"abcd")]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b'{"text": "a"}\n{"messages": []}\n', "line 2 is not"),
        (b'{"text": "a"}\nnonsense\n', "line 2 is not JSON"),
        (b'{"text": "a"}\n{"text": " "}\n', "line 2: the text is empty"),
        (b'{"text": 5}\n', "line 1 is not"),
        (b"nonsense", "line 1 is not JSON"),
        (b"", "is empty"),
    ],
)
def test_wrong_lines_are_named(data: bytes, why: str) -> None:
    with pytest.raises(DatasetError, match=why):
        open_samples(data, "train", Letters(), 8)


def test_an_empty_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_text(" \n")
    with pytest.raises(DatasetError, match="is empty"):
        load_source(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DatasetError, match="cannot read"):
        load_source(path)


def test_lines_keep_every_character() -> None:
    text = "line one\nline two\u2028 still two\tß"
    samples = open_samples(text_lines([text]), "train", Letters(), 1000)
    assert samples.encode(0).input_ids == (*map(ord, text), 0)


def test_a_saved_dataset_needs_the_optional_package(tmp_path: Path) -> None:
    if importlib.util.find_spec("datasets") is None:
        with pytest.raises(DatasetError, match="optional package `datasets`") as caught:
            load_source(tmp_path)
        assert "volunteer-swarm[datasets]" in caught.value.fix
        return
    import datasets

    datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}]).save_to_disk(tmp_path / "saved")
    assert load_source(tmp_path / "saved").samples == 2
