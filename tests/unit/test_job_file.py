from __future__ import annotations

from pathlib import Path

import pytest

from swarm.config import CodecSettings, JobSpec, job_from_json, load_job
from swarm.errors import ConfigError


def write(path: Path, text: str) -> Path:
    (path / "job.yaml").write_text(text)
    return path / "job.yaml"


def test_the_smallest_file_and_its_defaults(tmp_path: Path) -> None:
    spec = load_job(write(tmp_path, "name: a\ndata: {train: d.jsonl}\n"))
    assert spec.data.train == tmp_path / "d.jsonl"
    assert (spec.inner.start, spec.outer.lr, spec.outer.momentum) == ("own", 1.0, 0.0)
    assert job_from_json(spec.model_dump_json()) == spec


def test_the_documented_example_is_valid(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "jobs.md").read_text()
    text = page.split("```yaml\n")[1].split("```")[0].replace("model: /path/or/hub-id", "#")
    spec = load_job(write(tmp_path, text))
    defaults = JobSpec.model_validate({"name": "sentiment", "data": {"train": "x"}})
    assert spec.eval is not None
    assert spec.early_stopping is not None
    optional = {"data": defaults.data, "eval": None, "early_stopping": None}
    assert spec.model_copy(update=optional) == defaults


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "must hold a mapping"),
        ("- a\n- b", "must hold a mapping"),
        ("name: [", "not valid YAML"),
        ("name: a\nname: b\ndata: {train: x}", "'name' is given twice"),
        ("name: a", "data"),
        ("name: a\ndata: {train: x, test: y}", "data.test"),
        ("name: A B\ndata: {train: x}", "name"),
        ("name: a\ndata: {train: x}\nschedule: {rounds: 0}", "schedule.rounds"),
        ("name: a\ndata: {train: x}\nschedule: {inner_steps: many}", "schedule.inner_steps"),
        ("name: a\ndata: {train: x}\ninner: {lr: .nan}", "inner.lr"),
        ("name: a\ndata: {train: x}\nmethod: {kind: dance}", "method.kind"),
        ("name: a\ndata: {train: x}\nouter: {lr: 1.0e7}", "outer.lr"),
        ("name: a\ndata: {train: x}\nuplink: {bits: 9}", "uplink.bits"),
        ("name: a\ndata: {train: x}\nactivations: int3", "activations"),
        ("name: a\ndata: {train: x}\nprecision: float16", "precision"),
        ("name: a\ndata: {train: x}\ninner: {clip: 0}", "inner.clip"),
        ("name: a\ndata: {train: x}\nschedule: {accumulate: 0}", "schedule.accumulate"),
        ("name: a\ndata: {train: x}\nschedule: {microbatches: many}", "schedule.microbatches"),
        ("name: a\ndata: {train: x}\nschedule: {batch_size: 4, microbatches: 5}", "more than batch_size"),
        ("name: a\ndata: {train: x}\ninner: {warmup_steps: 100000}", "warmup_steps"),
        ("name: !!python/object/apply:os.system [id]\ndata: {train: x}", "not valid YAML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        load_job(write(tmp_path, text))
    assert str(tmp_path / "job.yaml") in caught.value.cause


def test_settings_are_hashable_and_frozen() -> None:
    assert len({CodecSettings(), CodecSettings(), CodecSettings(bits=3)}) == 2
