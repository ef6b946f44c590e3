"""What rounds take from a job file, and what of the file may change while the job runs. Pure.

In: the file in force and new values as text. Out: the changed file, or a ConfigError that names the
key and says why it cannot change. What nodes and coordinator agreed on at the start (method,
codecs, the order of samples) stays as it was submitted.
"""

from __future__ import annotations

from collections.abc import Mapping

import yaml

from coordinator.round_model import Rules
from swarm.config import JobSpec, parse_job
from swarm.errors import ConfigError

CHANGEABLE = (
    *("schedule.rounds", "schedule.round_deadline_s", "schedule.min_pipelines", "schedule.quorum"),
    *("inner.lr", "early_stopping.patience", "early_stopping.min_delta"),
)
_SHORT = {key.partition(".")[2]: key for key in CHANGEABLE if key.startswith("schedule.")}

_WHY_NOT = {
    "name": "adapters and folders are already named by it",
    "model": "a job belongs to one base model",
    "method": "the adapters that were trained so far would not fit",
    "eval": "scores of different samples cannot be compared",
    "data": "the samples accepted so far are of this file",
    "schedule": "which samples a lease holds, and their order, follow from it",
    "inner": "nodes build their optimizers with it when they join",
    "outer": "a coordinator that has to repeat a round must take the same step",
    "uplink": "contributions under way are compressed with it",
    "downlink": "nodes add the same published bytes with it",
    "activations": "pipelines under way send with it",
}


def rules_of(spec: JobSpec, fruitless_generations: int) -> Rules:
    return Rules(
        rounds=spec.schedule.rounds,
        round_deadline_s=None if spec.schedule.round_deadline_s == "auto" else spec.schedule.round_deadline_s,
        min_pipelines=spec.schedule.min_pipelines,
        fruitless_generations=fruitless_generations,
        quorum=spec.schedule.quorum,
        inner_steps=spec.schedule.inner_steps,
        eval_every=spec.eval.every if spec.eval else 0,
        patience=spec.early_stopping.patience if spec.early_stopping else 0,
        min_delta=spec.early_stopping.min_delta if spec.early_stopping else 0.0,
        overlap_steps=spec.schedule.overlap_steps,
    )


def changed_spec(spec: JobSpec, values: Mapping[str, str], open_round: int) -> tuple[JobSpec, str]:
    """The changed file, and what changed in words. Raises ConfigError, also for a change that says nothing."""
    if not values:
        raise ConfigError("no setting is named", "give KEY=VALUE, such as rounds=20")
    whole = spec.model_dump(mode="json")
    told: list[str] = []
    for given, text in sorted(values.items()):
        key = _SHORT.get(given, given)
        section, _, name = key.partition(".")
        if key not in CHANGEABLE:
            raise ConfigError(f"{given} cannot change while a job runs: {_reason(section)}", _can())
        before = whole[section] or {}
        told.append(f"{key} {before.get(name, 'unset')} → {text}")
        whole[section] = before | {name: _value(given, text)}
    changed = parse_job(whole, "the changed job")
    if changed.schedule.rounds < open_round:
        raise ConfigError(
            f"rounds={changed.schedule.rounds}: round {open_round} is open already",
            "`swarm job stop` ends a job before its last round",
        )
    return changed, "; ".join(told)


def _reason(section: str) -> str:
    return _WHY_NOT.get(section, "there is no such setting")


def _can() -> str:
    return f"these can: {', '.join(CHANGEABLE)}"


def _value(key: str, text: str) -> object:
    try:
        value: object = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}={text[:100]} is not a value") from error
    # YAML 1.1 wants a dot in a number with an exponent; people write 1e-4.
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
