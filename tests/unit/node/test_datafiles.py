"""A data set's download that is cut goes on where it was, and what is damaged is fetched anew."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from node import datafiles
from node.datafiles import DataFiles
from swarm.errors import CorruptData
from swarm.ids import sha256

PIECE = 100
DATA = bytes(range(256)) * 4
DIGEST = sha256(DATA)


class Coordinator:
    """Sends ranges of one content, and hangs before a given one; stands for the link to it as well."""

    def __init__(self, content: bytes = DATA) -> None:
        self.content = content
        self.asked: list[int] = []
        self.hang_at = -1
        self.hung = asyncio.Event()

    async def call(self, action: Callable[[Coordinator], Awaitable[bytes]]) -> bytes:
        return await action(self)

    async def get_range(self, digest: bytes, offset: int, length: int) -> bytes:
        if offset == self.hang_at:
            self.hung.set()
            await asyncio.Event().wait()
        self.asked.append(offset)
        return self.content[offset : offset + length]


def files_of(folder: Path, link: Any) -> DataFiles:
    return DataFiles(folder, link)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datafiles, "PIECE_BYTES", PIECE)


async def test_a_download_cut_half_way_goes_on_in_another_process(tmp_path: Path) -> None:
    first, second = Coordinator(), Coordinator()
    first.hang_at = 5 * PIECE
    task = asyncio.create_task(files_of(tmp_path, first).get(DIGEST, len(DATA)))
    await first.hung.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert await files_of(tmp_path, second).get(DIGEST, len(DATA)) == DATA
    assert second.asked == list(range(5 * PIECE, len(DATA), PIECE))


async def test_what_is_there_is_not_fetched_again_unless_it_is_damaged(tmp_path: Path) -> None:
    link = Coordinator()
    files = files_of(tmp_path, link)
    await files.get(DIGEST, len(DATA))
    link.asked.clear()
    assert await files.get(DIGEST, len(DATA)) == DATA
    assert link.asked == []
    (tmp_path / "data" / DIGEST.hex()).write_bytes(b"\x01" + DATA[1:])
    assert await files.get(DIGEST, len(DATA)) == DATA
    assert len(link.asked) == -(-len(DATA) // PIECE)


async def test_another_content_is_refused_and_not_kept(tmp_path: Path) -> None:
    link = Coordinator(bytes(len(DATA)))
    with pytest.raises(CorruptData):
        await files_of(tmp_path, link).get(DIGEST, len(DATA))
    assert list((tmp_path / "data").iterdir()) == []
    link.content = DATA
    assert await files_of(tmp_path, link).get(DIGEST, len(DATA)) == DATA


async def test_only_the_newest_data_sets_are_kept(tmp_path: Path) -> None:
    for number in range(6):
        content = bytes([number])
        assert await files_of(tmp_path, Coordinator(content)).get(sha256(content), 1) == content
    assert len(list((tmp_path / "data").iterdir())) == 4
