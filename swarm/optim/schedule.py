"""The inner learning rate as a function of the job's global inner step. Pure.

A node that joins in round 50 takes the rate that round 50 has, whatever it did before: warm-up and
decay belong to the job. Steps that a round did without (it was wrapped up) count all the same, so
that every pipeline of a round has the same rate at the same step.
"""

from __future__ import annotations

import math

from swarm.config import InnerSettings


def global_step(round: int, inner_steps: int, step: int) -> int:
    """Of inner step `step` (from 0) of a round (from 1)."""
    return (round - 1) * inner_steps + step


def learning_rate(inner: InnerSettings, step: int, total_steps: int) -> float:
    """At global inner step `step` of `total_steps`: linear warm-up, then constant or decaying to zero."""
    warm = min(1.0, (step + 1) / (inner.warmup_steps + 1))
    if inner.decay == "none":
        return inner.lr * warm
    left = max(1, total_steps - inner.warmup_steps)
    done = min(1.0, max(0.0, (step - inner.warmup_steps) / left))
    share = 1.0 - done if inner.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return inner.lr * warm * share
