"""`swarm job pause|set|resume --round|logs|stop|export --round` against real processes and a real model."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tests.integration.processes import Swarm, run_swarm, swarm_of
from tests.integration.test_crashes import accepted_positions, wait_finished, write_job


def wait_round(swarm: Swarm, name: str, number: int, timeout_s: float = 120.0) -> dict[str, Any]:
    """Until a round is committed."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        status: dict[str, Any] = swarm.run_json("job", "status", name)
        if any(entry["round"] == number and entry["phase"] == "committed" for entry in status["history"]):
            return status
    raise AssertionError(f"round {number} was not committed:\n" + "\n".join(p.log_tail() for p in swarm.processes))


def test_a_job_is_paused_rewound_changed_and_exported(smollm2: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "job", "tame", 50, 1, 1)
    with swarm_of(tmp_path / "swarm", smollm2, {"whole": "0:30"}, coordinator=True) as swarm:
        swarm.run_json("job", "submit", str(job))
        wait_round(swarm, "tame", 2)
        stranger = run_swarm(
            *("job", "pause", "tame", "--join", swarm.join, "--data-dir", str(tmp_path / "stranger"), "--json")
        )
        assert json.loads(stranger.stdout)["error"]["code"] == "SW206"
        swarm.run_json("job", "pause", "tame")
        while (paused := swarm.run_json("job", "status", "tame"))["state"] != "paused":
            assert paused["state"] == "running"
        assert paused["reason"] == "paused by its owner"
        target = paused["kept_rounds"][0]
        wrong = swarm.run("job", "set", "tame", "method.r=4", "--json")
        assert "would not fit" in json.loads(wrong.stdout)["error"]["cause"]
        rounds = paused["round"] + 2
        swarm.run_json("job", "set", "tame", f"rounds={rounds}", "inner.lr=5e-4")
        resumed = swarm.run_json("job", "resume", "tame", "--round", str(target))
        assert resumed["round"] == target + 1
        status = wait_finished(swarm, "tame")
        assert status["kept_rounds"][-1] == rounds == status["rounds"]
        (node,) = (process for process in swarm.processes if process.name == "whole")
        node.wait_log("rounds_discarded")
        node.wait_log("settled", round=rounds)
        assert accepted_positions(swarm.root / "coordinator") == list(range(rounds * 2))
        lines = [json.loads(line) for line in swarm.run("job", "logs", "tame", "-f", "--json").stdout.splitlines()]
        kinds = [line["kind"] for line in lines]
        assert kinds.count("job_rewound") == kinds.count("job_finished") == 1
        assert [line["round"] for line in lines if line["kind"] == "round_committed"][-2:] == [rounds - 1, rounds]
        folder = tmp_path / "adapter"
        exported = swarm.run_json("job", "export", "tame", "--round", str(rounds - 1), "--out", str(folder))
        assert exported["round"] == rounds - 1
        assert (folder / "adapter_model.safetensors").exists()


def test_a_node_that_does_not_train_serves_and_is_given_no_job(smollm2: Path, tmp_path: Path) -> None:
    """In float16, in which no node trains: without `--no-train` it would be refused (unit/node/test_step)."""
    job = write_job(tmp_path / "job", "tame", 2, 1, 1)
    with swarm_of(tmp_path / "swarm", smollm2, {}, coordinator=True) as swarm:
        swarm.node("whole", "0:30", "--no-train", "--dtype", "float16").event()
        swarm.run_json("job", "submit", str(job))
        text = swarm.run_json("generate", "Why is the sky blue?", "--max-new-tokens", "3")
        assert len(text["tokens"]) == 3
        status = swarm.run_json("job", "status", "tame")
        assert (status["state"], status["round"]) == ("waiting", 1)
        assert "no idle node" in status["reason"]
