"""Files and flags, parsed at the edge: the job file and what it may say.

What comes in is YAML or JSON text; what goes out is a frozen pydantic model; unknown keys,
wrong types and impossible values are a `ConfigError` that names the field. Nothing here
touches the network, torch or the disk beyond reading the one named file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from swarm.errors import ConfigError
from swarm.ids import NAME_PATTERN

ActivationEncoding = Literal["int8", "int4", "bfloat16", "float16", "float32"]
Precision = Literal["auto", "float32", "bfloat16"]


class Settings(BaseModel):
    """Base of every settings model: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LoraMethod(Settings):
    """LoRA (Hu et al., 2021): W + (alpha / r) B A, B starts at zero."""

    kind: Literal["lora"] = "lora"
    r: Annotated[int, Field(ge=1, le=1024)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of linear layers within a block (`q_proj`), or every linear layer of the blocks."""


class DataSettings(Settings):
    """Where the samples come from; the file travels with the job."""

    train: Path
    """JSONL, one {"messages": [{"role", "content"}, …]} a line; loss on the assistant's text only."""
    packing: bool = False
    """Whether short samples of a step share rows, none seeing another."""


class Schedule(Settings):
    rounds: Annotated[int, Field(ge=1, le=1_000_000)] = 10
    inner_steps: Annotated[int, Field(ge=1, le=100_000)] = 20
    """H: local optimizer steps between two synchronizations."""
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 8
    accumulate: Annotated[int, Field(ge=1, le=4096)] = 1
    """Batches an optimizer step; its loss is the mean over all their labelled tokens."""
    microbatches: Literal["auto"] | Annotated[int, Field(ge=1, le=4096)] = "auto"
    """Parts of a batch that are in a pipeline at once."""
    max_length: Annotated[int, Field(ge=8, le=1_048_576)] = 512
    """Tokens a sample may have; longer ones are cut on the left of the prompt, never silently: they are counted."""
    seed: int = 0
    min_pipelines: Annotated[int, Field(ge=1, le=1024)] = 1
    """A round starts once this many pipelines can be formed."""
    round_deadline_s: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """A round freezes with what it has once this time has passed; auto: three times what pipelines took lately."""
    overlap_steps: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Inner steps of the next round that are done while this one's contributions and update travel; 0: none."""
    quorum: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Share of a round's pipelines; once they are whole, the others have a short grace, then the round freezes."""

    @property
    def samples_per_step(self) -> int:
        """Samples of one optimizer step."""
        return self.batch_size * self.accumulate

    @model_validator(mode="after")
    def _microbatches_fit(self) -> Schedule:
        if self.microbatches != "auto" and self.microbatches > self.batch_size:
            raise ValueError("microbatches is more than batch_size: a microbatch has at least one sample")
        return self

    @model_validator(mode="after")
    def _overlap_fits(self) -> Schedule:
        if self.overlap_steps > self.inner_steps:
            raise ValueError("overlap_steps is more than inner_steps: a round's update waits for the next one's end")
        return self


class InnerSettings(Settings):
    """Inner AdamW, of each node on its own adapters."""

    lr: Annotated[float, Field(gt=0)] = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Linear warm-up over the first inner steps of the job."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of a step's gradient, over the adapters of all blocks together; unset: any."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """What the learning rate does after the warm-up, down to zero at the job's last inner step."""
    start: Literal["reference", "own"] = "own"
    """What a node's inner steps of a round start from: the reference parameters, or those with what this node could
    not send yet (its residual) still in them."""


class EvalSettings(Settings):
    """Held-out evaluation on the swarm's own pipelines, forward only; the file travels with the job."""

    data: Path
    """As `data.train`."""
    every: Annotated[int, Field(ge=1)] = 1
    """Rounds from one evaluation to the next; the last round is always scored."""
    samples: Annotated[int, Field(ge=1, le=100_000)] = 64
    """The first so many of the file, in seeded order: the same ones every time."""


class EarlyStopping(Settings):
    """Ends a job whose held-out loss no longer falls; its adapter is then the best round's."""

    patience: Annotated[int, Field(ge=1)] = 3
    """Evaluations in a row that are no better than the best one."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """How much lower a loss must be to count as better."""


class OuterSettings(Settings):
    """The coordinator's SGD on the averaged pseudo-gradient (DiLoCo, Douillard et al., 2023).

    The paper's 0.7/0.9 is wrong for adapters under error feedback. Momentum of 0.5 helps where every value is sent, and
    hurts where few are: they are averaged over those who sent them only (docs/experiments.md, "Defaults of a job").
    """

    lr: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    nesterov: bool = True
    weights: Literal["tokens", "equal"] = "tokens"
    """What a pipeline's share in the average follows: the labelled tokens it trained on, or nothing."""


class CodecSettings(Settings):
    """Gradient codec after CocktailSGD (Wang et al., 2023): what is kept, and at how many bits."""

    kind: Literal["cocktail", "dense"] = "cocktail"
    """`dense` sends every value as float32: for measurements and exactness tests."""
    random_keep: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of coordinates a round may send at all, chosen by seed (indices need no transmission)."""
    density: Annotated[float, Field(gt=0, le=1)] = 0.0625
    """Share of those kept by magnitude, chunk by chunk."""
    bits: Annotated[int, Field(ge=1, le=8)] = 2
    """Bits a kept value takes: one sign bit, the rest magnitude levels."""
    chunk: Annotated[int, Field(ge=64, le=65536)] = 4096
    """Coordinates that share one top-k selection."""
    allocation: Literal["even", "energy"] = "even"
    """`energy`: tensors with large values keep more, the others less, at as many kept values in all."""
    decay: Annotated[float, Field(ge=0, le=1)] = 0.95
    """What remains of the residual when it is carried into the next round (SparseLoCo's 0.95)."""


class JobSpec(Settings):
    """One fine-tuning run, as its YAML file states it."""

    name: str
    model: str | None = None
    """Folder or hub id; may be left out: the join string names the swarm's model."""
    method: LoraMethod = LoraMethod()
    data: DataSettings
    schedule: Schedule = Schedule()
    inner: InnerSettings = InnerSettings()
    outer: OuterSettings = OuterSettings()
    uplink: CodecSettings = CodecSettings()
    downlink: CodecSettings = CodecSettings(density=0.125, bits=4, decay=1.0)
    eval: EvalSettings | None = None
    early_stopping: EarlyStopping | None = None
    activations: ActivationEncoding = "int8"
    """How activations and their gradients cross the links between the nodes of a pipeline."""
    precision: Precision = "auto"
    """What blocks and head compute in: the dtype each node holds its weights in, or bfloat16 by autocast. Adapters,
    their gradients and the optimizer are float32 always."""

    @field_validator("name")
    @classmethod
    def _name_is_safe(cls, value: str) -> str:
        if NAME_PATTERN.fullmatch(value) is None:
            raise ValueError("use 1-63 lower-case letters, digits, '.', '_' and '-', starting with a letter or digit")
        return value

    @model_validator(mode="after")
    def _warmup_fits(self) -> JobSpec:
        if self.inner.warmup_steps > self.schedule.rounds * self.schedule.inner_steps:
            raise ValueError("inner.warmup_steps is longer than the whole job")
        return self

    @model_validator(mode="after")
    def _stopping_has_scores(self) -> JobSpec:
        if self.early_stopping is not None and self.eval is None:
            raise ValueError("early_stopping needs eval: it looks at the held-out loss")
        return self


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice instead of keeping the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_job(path: Path) -> JobSpec:
    """Read a job file. Relative paths of data are taken relative to the job file.

    Raises ConfigError: unreadable file, YAML that does not parse (names the line), unknown or
    wrong keys (names each).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    try:
        raw = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    spec = parse_job(raw, str(path))
    update: dict[str, Settings] = {"data": spec.data.model_copy(update={"train": path.parent / spec.data.train})}
    if spec.eval is not None:
        update["eval"] = spec.eval.model_copy(update={"data": path.parent / spec.eval.data})
    return spec.model_copy(update=update)


def parse_job(raw: object, where: str) -> JobSpec:
    """Validate parsed YAML or JSON; `where` names the source in the error."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{where} must hold a mapping with at least `name` and `data`")
    try:
        return JobSpec.model_validate(raw)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in problem['loc']) or 'file'}: {problem['msg']}"
            for problem in error.errors()
        )
        raise ConfigError(f"{where}: {problems}") from error


def job_from_json(text: str) -> JobSpec:
    """A spec that travelled as JSON. Raises ConfigError."""
    try:
        return JobSpec.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(
            f"job specification: {error.error_count()} invalid fields: {error.errors()[0]['msg']}"
        ) from error
