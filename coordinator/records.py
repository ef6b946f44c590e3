"""What the database keeps, as frozen values. Field names are those of migrations/*.sql."""

from __future__ import annotations

from dataclasses import dataclass

from swarm.ids import Span


@dataclass(frozen=True)
class NodeRecord:
    peer: str
    span: Span
    addrs: tuple[str, ...]
    device: str
    dtype: str
    token_block_s: float = 0.0
    """Seconds a token and block, as it measured; 0: not said."""


@dataclass(frozen=True)
class JobRecord:
    job_id: str
    name: str
    spec_json: str
    submitter: str
    model_hash: bytes
    dataset: bytes
    dataset_size: int
    samples: int
    trainable_parameters: int
    heldout: bytes = b""
    heldout_size: int = 0
    heldout_samples: int = 0


@dataclass(frozen=True)
class ContributionRecord:
    """`verdict` is the number of swarm.v1.Verdict; `receipt` the signed message as it was answered."""

    round: int
    generation: int
    pipeline_id: int
    peer: str
    lead: bool
    payload: bytes
    payload_size: int
    inner_steps: int
    tokens: int
    loss: float | None
    verdict: int
    reason: str
    receipt: bytes
    label_tokens: int = 0
    """Tokens that carried loss; leads know it."""
    skipped_steps: int = 0
    """Of `inner_steps`: dropped, since their loss or gradient was not finite."""


@dataclass(frozen=True)
class BlockPiece:
    """One block within the update blob and within the snapshot blob, and its parameters' hash."""

    block: str
    params_hash: bytes
    update_offset: int
    update_length: int
    update_sha256: bytes
    snapshot_offset: int
    snapshot_length: int
    snapshot_sha256: bytes


@dataclass(frozen=True)
class AdapterFile:
    name: str
    sha256: bytes
    size: int


@dataclass(frozen=True)
class Outcome:
    """What aggregating a round made; round 0 is the initial state, with an empty update."""

    params_hash: bytes
    state_blob: bytes
    update_blob: bytes
    update_size: int
    snapshot_blob: bytes
    snapshot_size: int
    blocks: tuple[BlockPiece, ...]
    files: tuple[AdapterFile, ...]

    @property
    def blobs(self) -> tuple[bytes, ...]:
        """Everything that is kept of it, by hash."""
        return (self.state_blob, self.update_blob, self.snapshot_blob, *(file.sha256 for file in self.files))


@dataclass(frozen=True)
class RoundSummary:
    """A round as people see it. `loss` is the mean over the leads that count; None before any is known."""

    round: int
    phase: str
    opened_unix_s: float
    committed_unix_s: float | None
    pipelines: int
    contributions: int
    contribution_bytes: int
    tokens: int
    loss: float | None
    update_bytes: int
    params_hash: bytes
    eval_loss: float | None = None


@dataclass(frozen=True)
class LogLine:
    """One line of a job's log. `seq` counts up from 1 and, like the time, is given when it is stored."""

    kind: str
    round: int
    text: str
    peer: str = ""
    pipeline_id: int | None = None
    loss: float | None = None
    tokens: int = 0
    size: int = 0
    seq: int = 0
    unix_s: float = 0.0


@dataclass(frozen=True)
class JobTotals:
    contribution_bytes: int
    accepted_pipeline_rounds: int
    """Pipelines that were accepted, summed over the committed rounds."""


@dataclass(frozen=True)
class LogEntry:
    """One committed round in the job's hash chain."""

    round: int
    entry_hash: bytes
    signature: bytes
