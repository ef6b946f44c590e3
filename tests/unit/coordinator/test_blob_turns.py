"""Many who ask for one blob that takes long to read leave the threads to others."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from coordinator_sim import DATASET, upload
from coordinator_swarm import opened

from swarm.wire.v1 import coordinator_pb2 as pb

MORE_THAN_THREADS = 40
"""The loop's own pool has 32 at most."""


@pytest.mark.parametrize("hang_up", [False, True])
async def test_a_blob_that_is_read_for_long_holds_one_thread(tmp_path: Path, hang_up: bool) -> None:
    """Whether or not those who ask stay: what they began goes on."""
    async with opened(tmp_path) as swarm:
        digest = await upload(swarm.service, "me", DATASET)
        path = tmp_path / "blobs" / "whole" / digest.hex()
        aside = tmp_path / "aside"
        path.rename(aside)
        os.mkfifo(path)  # a file that is read as slowly as somebody writes it
        piece = pb.GetPieceRequest(sha256=digest, length=10)
        reads = [asyncio.create_task(swarm.service.get_piece("me", piece)) for _ in range(MORE_THAN_THREADS)]
        with ThreadPoolExecutor(1) as pool:
            # Opened once somebody reads it: the comparison with the name is under way.
            slow = await asyncio.get_running_loop().run_in_executor(pool, open, path, "wb")
        with slow:
            if hang_up:
                for read in reads[:-1]:
                    read.cancel()
                await asyncio.wait(reads[:-1])
            async with asyncio.timeout(20):
                await asyncio.to_thread(swarm.coordinator._shared.storage.nodes)
            aside.rename(path)
            slow.write(DATASET)
        found = await asyncio.gather(*(read for read in reads if not read.cancelled()))
        assert [reply.data for reply in found] == [DATASET[:10]] * (1 if hang_up else MORE_THAN_THREADS)
