"""A real model's adapter of a round that is not kept: the same bytes, over gRPC, however long it takes to make them."""

from __future__ import annotations

from pathlib import Path

from coordinator.ports import CoordinatorSettings
from tests.unit.node.jobs import Node, job, node_with_coordinator


async def _export(at: Node, round: int) -> dict[str, bytes]:
    status = await at.link.call(lambda client: client.get_job("tiny", round))
    return {
        file.name: await at.link.call(lambda client, f=file: client.get_blob(f.sha256, f.size))  # type: ignore[misc]
        for file in status.adapter
    }


async def test_a_past_round_is_exported(tiny: Path, tmp_path: Path) -> None:
    # No call waits until it is made: the client asks until it is.
    settings = CoordinatorSettings(making_wait_s=0.0, kept_rounds=1)
    async with node_with_coordinator(tiny, tmp_path, settings) as at:
        job_id = await at.submit(job())
        exported = {}
        for round in (1, 2, 3):
            await at.train(await at.assigned(job_id, round))
            exported[round] = await _export(at, round)
        assert len({files["adapter_model.safetensors"] for files in exported.values()}) == 3
        whole = tmp_path / "coordinator" / "blobs" / "whole"
        dense = min(len(files["adapter_model.safetensors"]) for files in exported.values()) // 2
        for path in list(whole.iterdir()):
            if path.stat().st_size >= dense:  # outer states, snapshots, weights
                path.unlink()
        for round in (2, 1):
            assert await _export(at, round) == exported[round]
        assert all(path.stat().st_size < dense for path in whole.iterdir()), "made in memory alone"
        assert await _export(at, 3) == exported[3], "the newest, out of its contributions"
