"""From the contributions of a round to the next reference parameters, in deterministic float32.

In: the outer state after the last round, and the decoded contributions in order of peer id. Out:
the new outer state and one codec frame a block, whose decoded numbers were added to the reference
parameters here exactly as every node adds them. Pure numpy on the CPU; the same input gives the
same bytes, so that a crash can repeat it.

Averaging: per coordinate, the weighted sum over the pipelines divided by max(weight of those that
sent it, K/4), K being the accepted pipelines (measured best, DESIGN.md); a dense uplink is averaged
plainly. Weights have the mean 1, so that equal ones are the plain rule, to the bit.

Total: whatever was accepted, a round ends with finite numbers. One that could not be computed would never be
left, since it is computed again until it is. So what a member sends is bounded, and update, momentum and residual
saturate; parameters do not need to, since nodes add the same bounded updates to theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from swarm.compress import FrameContext, compress_with_feedback
from swarm.config import CodecSettings, JobSpec
from swarm.errors import ContributionError, CorruptData
from swarm.optim.outer import outer_step
from swarm.optim.params import block_hash, by_block, pack_block, params_hash

F32 = NDArray[np.float32]
_PARTS = ("params", "momentum", "residual")
MOST_SENT = 2.0**64
"""A pseudo-gradient with a value beyond this is no training result, whatever the job: its square leaves float32, which
no norm layer survives."""
_SATURATION = np.float32(2.0**80)
"""Far beyond what means of values up to MOST_SENT lead to; a million rounds of such updates are far below the end of
float32."""


@dataclass(frozen=True)
class OuterState:
    """Everything a job carries from round to round, by parameter key; absent means zero."""

    params: Mapping[str, F32]
    momentum: Mapping[str, F32]
    residual: Mapping[str, F32]
    """What the coordinator's own frames could not carry yet."""

    def pack(self) -> bytes:
        """One safetensors file, the same bytes for the same state."""
        tensors = {
            f"{part}/{key}": np.ascontiguousarray(value)
            for part in _PARTS
            for key, value in getattr(self, part).items()
        }
        packed: bytes = save(tensors)
        return packed

    @classmethod
    def unpack(cls, data: bytes) -> OuterState:
        parts: dict[str, dict[str, F32]] = {part: {} for part in _PARTS}
        for name, value in load(data).items():
            part, _, key = name.partition("/")
            if part not in parts or value.dtype != np.float32:
                raise CorruptData(f"'{name}' does not belong into a job's outer state")
            parts[part][key] = value
        return cls(**parts)


@dataclass(frozen=True)
class BlockResult:
    block: str
    frame: bytes
    params_hash: bytes
    snapshot: bytes
    """The block's parameters after the update, as swarm.optim.params.pack_block."""


@dataclass(frozen=True)
class RoundResult:
    """Blocks in block order."""

    state: OuterState
    blocks: tuple[BlockResult, ...]
    params_hash: bytes


def refuse_huge(contribution: Mapping[str, F32]) -> None:
    """Raises ContributionError, naming the key: a finite value that is no training result."""
    for key, value in contribution.items():
        largest = max(float(value.max()), -float(value.min()))
        if largest > MOST_SENT:
            raise ContributionError(
                f"'{key}' holds a value of magnitude {largest:.3g}; more than {MOST_SENT:g} is refused"
            )


def pipeline_weights(tokens: Mapping[int, int]) -> dict[int, float]:
    """Weights of the mean 1 that follow the labelled tokens of each pipeline, by its id.

    What a pipeline trained on is its lead's word: it counts up to twice the median, and no more.
    """
    most = 2 * median(tokens.values())
    counted = {pipeline_id: min(count, most) for pipeline_id, count in tokens.items()}
    mean = sum(counted.values()) / len(counted)
    return {pipeline_id: count / mean if mean else 1.0 for pipeline_id, count in counted.items()}


def average(
    contributions: Iterable[tuple[str, Mapping[str, F32]]],
    pipelines: int,
    uplink: CodecSettings,
    weights: Mapping[str, float] | None = None,
) -> dict[str, F32]:
    """Mean pseudo-gradient by parameter key, of the keys that were sent.

    Contributions come one by one, in ascending order of peer id, and are not kept. `weights` by
    peer; None: all are 1.
    """
    sums: dict[str, F32] = {}
    senders: dict[str, F32] = {}
    last = ""
    for peer, tensors in contributions:
        assert last < peer, "contributions are added in order of peer id, once each"
        last = peer
        weight = np.float32(1.0 if weights is None else weights[peer])
        for key, value in tensors.items():
            if key not in sums:
                sums[key] = np.zeros(value.shape, np.float32)
                senders[key] = np.zeros(value.shape, np.float32)
            sums[key] += weight * value
            senders[key] += weight * (value != 0)
    if uplink.kind == "dense":
        return {key: total / np.float32(pipelines) for key, total in sums.items()}
    for count in senders.values():
        np.maximum(count, np.float32(pipelines / 4), out=count)
    return {key: total / senders[key] for key, total in sums.items()}


def outer_round(state: OuterState, mean: Mapping[str, F32], spec: JobSpec, job_id: str, round: int) -> RoundResult:
    """Outer step, compression with the coordinator's residual, and the same sum the nodes make.

    A block without any mean keeps parameters, momentum and residual, and gets no frame.
    """
    with np.errstate(over="ignore"):  # what overflows saturates
        step = outer_step(mean, state.momentum, spec.outer)
    for stepped in (step.update, step.momentum):
        stepped.update({key: _saturated(stepped[key]) for key in mean if key in stepped})
    params = dict(state.params)
    residual = dict(state.residual)
    blocks: list[BlockResult] = []
    for block, keys in by_block(params).items():
        frame = b""
        sent = [key for key in keys if key in step.update]
        if sent:
            # A key of the block that nobody sent takes part with zero: a frame is a whole block.
            update = {key: step.update.get(key, np.zeros_like(params[key])) for key in keys}
            before = block_hash({key: params[key] for key in keys})
            compressed = compress_with_feedback(
                update,
                {key: residual[key] for key in keys if key in residual},
                spec.downlink,
                FrameContext(job_id, round, before),
            )
            frame = compressed.frame
            for key in keys:
                params[key] = params[key] + compressed.decoded[key]
                residual[key] = _saturated(compressed.residual[key])
        of_block = {key: params[key] for key in keys}
        blocks.append(BlockResult(block, frame, block_hash(of_block), pack_block(of_block)))
    return RoundResult(
        OuterState(params, step.momentum, residual),
        tuple(blocks),
        params_hash({result.block: result.params_hash for result in blocks}),
    )


def _saturated(value: F32) -> F32:
    """The same bits unless they are huge."""
    return np.clip(value, -_SATURATION, _SATURATION)


def initial_round(params: Mapping[str, F32]) -> RoundResult:
    """Round 0: the parameters a job starts from, with empty frames."""
    blocks: list[BlockResult] = []
    for block, keys in by_block(params).items():
        of_block = {key: params[key] for key in keys}
        blocks.append(BlockResult(block, b"", block_hash(of_block), pack_block(of_block)))
    return RoundResult(
        OuterState(dict(params), {}, {}),
        tuple(blocks),
        params_hash({result.block: result.params_hash for result in blocks}),
    )
