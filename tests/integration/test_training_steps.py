"""A job whose steps are microbatched, accumulated and clipped, on two real nodes: the same training as on one.

A job whose rounds overlap: with one pipeline and nothing compressed the same training as one whose rounds wait.
Then a job whose every step runs away: each stage skips them, and the round is given up with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from swarm.samples import write_sentiment_jsonl
from tests.integration.processes import Process, Swarm, swarm_of
from tests.integration.test_training_exact import wait_for_job

JOB = """
name: {name}
method: {{kind: lora, r: 4, alpha: 8}}
data: {{train: train.jsonl}}
schedule:
  {{rounds: {rounds}, inner_steps: 3, overlap_steps: {overlap}, batch_size: 4, accumulate: {accumulate},
    microbatches: {microbatches}, seed: 3}}
inner: {{lr: {lr}, clip: {clip}}}
outer: {{lr: 1.0, momentum: 0.0, nesterov: false}}
uplink: {{kind: dense}}
downlink: {{kind: dense}}
activations: float32
{more}
"""


@pytest.fixture(scope="module")
def swarm(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    root = tmp_path_factory.mktemp("steps")
    write_sentiment_jsonl(root / "train.jsonl", "train", 60)
    write_sentiment_jsonl(root / "heldout.jsonl", "held_out", 4)
    with swarm_of(root, smollm2, {"half-a": "0:12", "half-b": "12:30"}, coordinator=True) as started:
        yield started


def submit(swarm: Swarm, name: str, **settings: object) -> None:
    path = swarm.root / f"{name}.yaml"
    path.write_text(JOB.format(**({"name": name, "overlap": 0, "accumulate": 2, "more": ""} | settings)))
    swarm.run_json("job", "submit", str(path))


def test_how_a_step_is_cut_changes_nothing(swarm: Swarm) -> None:
    losses = {}
    for name, microbatches in (("whole", 1), ("cut", 4)):
        submit(swarm, name, rounds=1, microbatches=microbatches, lr="1.0e-3", clip=0.5)
        wait_for_job(swarm, name)
        (lead,) = [p for p in swarm.processes if p.name == "half-a"]
        steps = [e for e in lead.log_events() if e.get("event") == "inner_step" and e.get("job") == name]
        assert [e["skipped_steps"] for e in steps] == [0, 0, 0]
        losses[name] = [(e["loss"], e["norm"]) for e in steps]
    for (loss, norm), (other_loss, other_norm) in zip(losses["whole"], losses["cut"], strict=True):
        assert loss == pytest.approx(other_loss, rel=1e-3)
        assert norm == pytest.approx(other_norm, rel=1e-2)
    assert any(norm > 0.5 for _, norm in losses["whole"])


def steps_of(process: Process, job: str) -> list[dict[str, Any]]:
    return [e for e in process.log_events() if e.get("event") == "inner_step" and e.get("job") == job]


def test_rounds_that_overlap_lose_and_repeat_nothing(swarm: Swarm, waiting: list[float]) -> None:
    """The update of one pipeline is its own delta: what was trained since stays as if nothing had been delayed.

    The second round is scored while two steps of the third are done already.
    """
    name = "overlap"
    scored = "eval: {data: heldout.jsonl, samples: 4, every: 2}"
    submit(swarm, name, rounds=3, microbatches=2, lr="2.0e-3", clip=0.5, overlap=2, accumulate=1, more=scored)
    status = wait_for_job(swarm, name)
    lead, second = (next(p for p in swarm.processes if p.name == name) for name in ("half-a", "half-b"))
    steps = steps_of(lead, name)
    assert [(e["round"], e["step"]) for e in steps] == [(r, f"{s}/3") for r in (1, 2, 3) for s in (1, 2, 3)]
    assert [e["loss"] for e in steps] == pytest.approx(waiting, rel=1e-3)
    for process in (lead, second):
        carried = [
            e["round"] for e in process.log_events() if (e.get("event"), e.get("job")) == ("carried", status["id"])
        ]
        assert carried == [2, 3]
    scores = [entry["eval_loss"] for entry in status["history"]]
    assert scores[0] is None
    assert scores[2] < scores[1]


@pytest.fixture(scope="module")
def waiting(swarm: Swarm) -> list[float]:
    """Losses of the same steps where every round waits for the one before."""
    submit(swarm, "waiting", rounds=3, microbatches=2, lr="2.0e-3", clip=0.5, accumulate=1)
    wait_for_job(swarm, "waiting")
    losses = [e["loss"] for e in steps_of(next(p for p in swarm.processes if p.name == "half-a"), "waiting")]
    assert losses[-1] < 0.9 * losses[0], "the steps change something"
    return losses


def test_a_round_whose_every_step_is_skipped_is_abandoned(swarm: Swarm) -> None:
    # One step at this rate, and every later forward pass overflows; what the round sends is still within bounds.
    submit(swarm, "runaway", rounds=2, microbatches=2, lr="1.2e+19", clip=1.0)
    lead, second = (next(p for p in swarm.processes if p.name == name) for name in ("half-a", "half-b"))
    lead.wait_log("inner_step_skipped", job="runaway", round=1, step="3/3", skipped_steps=2)
    lead.wait_log("inner_step_skipped", job="runaway", round=2, step="3/3", skipped_steps=3)
    failed = lead.wait_log("round_failed", job="runaway", round=2)
    assert failed["error"].startswith("SW603 all 3 inner steps of round 2 were skipped")
    # Nobody was blamed: what is not finite was never sent.
    assert not [e for process in (lead, second) for e in process.log_events() if e.get("event") == "chain_failed"]
