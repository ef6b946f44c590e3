"""Which families of decoders does a swarm compute exactly, cut in two and in three?

For every causal language model in transformers whose configuration publishes `base_model_pp_plan`,
and the four of the part table: tiny random checkpoints that contain the family's kinds of layers
(`families_configs`), saved as safetensors, read again by `Checkpoint`, and run in float32 whole by
transformers and cut by Head, Shard and View. Compared are the logits of a prefill without a cache,
of a cached prefill followed by decoding well beyond the sliding window (one token at a time and a
chunk), and of a left-padded batch of two that goes on decoding.

`exact`: families where no logit differs by more than 1e-5 of the largest one; `identical` of them agree
bit for bit. `failed` has the reason of the others.
`kv_bytes_relative_error`: the largest error of `cache_bytes` against the bytes that the real caches hold.
"""

from __future__ import annotations

import copy
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from transformers import AutoModelForCausalLM

from benchmarks.families_configs import families, variants
from benchmarks.provenance import provenance, publish
from swarm.errors import SwarmError
from swarm.ids import Span
from swarm.model.checkpoint import Checkpoint
from swarm.model.families import TABLE, Parts, cuts
from swarm.model.kvsize import cache_bytes
from swarm.model.shard import Head, Shard, View, n_blocks

CPU = torch.device("cpu")
PREFILL, STEPS, CHUNK = 7, 9, 4
PADDED = 3
TOLERANCE = 1e-5


@dataclass
class Difference:
    """Largest relative difference of logits so far."""

    worst: float = 0.0
    identical: bool = True

    def add(self, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        if ours.shape != theirs.shape or not torch.isfinite(theirs).all():
            raise ValueError(f"logits of shape {tuple(theirs.shape)} that are not finite, or not {tuple(ours.shape)}")
        self.identical &= torch.equal(ours, theirs)
        difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        self.worst = max(self.worst, difference if difference == difference else float("inf"))


def randomize(model: torch.nn.Module) -> None:
    """Weights large enough that masks, gates and experts decide something; norms and biases other than 1 and 0."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or (name not in model.state_dict()):
                continue
            if tensor.dim() >= 2 and isinstance(tensor, torch.nn.Parameter):
                tensor.normal_(0.0, 1.0 if "embed" in name else tensor.shape[-1] ** -0.5)
            else:
                tensor.add_(torch.randn_like(tensor) * 0.1)


def splits(config: Any) -> list[tuple[int, ...]]:
    """Cuts in two and in three, where the family allows them."""
    total, allowed = n_blocks(config), cuts(config)
    inner = [at for at in allowed if 0 < at < total]
    if not inner:
        raise ValueError("there is no place to cut")
    middle = min(inner, key=lambda at: abs(at - total / 2))
    found: list[tuple[int, ...]] = [(0, middle, total)]
    if len(inner) > 1:
        found.append((0, inner[0], inner[-1], total))
    return found


class Cut:
    """The model, cut."""

    def __init__(self, checkpoint: Checkpoint, at: tuple[int, ...]) -> None:
        self.head = Head(checkpoint, torch.float32, CPU)
        self.views: list[View] = [
            Shard(checkpoint, Span(start, end), torch.float32, CPU).view() for start, end in pairwise(at)
        ]
        self.caches: list[Any] = [None] * len(self.views)

    def open(self) -> None:
        self.caches = [view.new_cache() for view in self.views]

    def logits(
        self,
        ids_BT: torch.Tensor,
        position: int = 0,
        mask_BS: torch.Tensor | None = None,
        positions_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if positions_BT is None:
            positions_BT = torch.arange(position, position + ids_BT.shape[1]).unsqueeze(0)
        hidden = self.head.embed(ids_BT, positions_BT)
        for view, cache in zip(self.views, self.caches, strict=True):
            hidden = view.forward(hidden, position, cache, mask_BS=mask_BS, positions_BT=positions_BT)
        return self.head.logits(hidden)


def compare(whole: Any, cut: Cut, vocabulary: int) -> Difference:
    """Prefill, cached decoding and a left-padded batch, both ways."""
    difference = Difference()
    total = PREFILL + STEPS + CHUNK
    ids = torch.randint(3, vocabulary, (2, total), generator=torch.Generator().manual_seed(7))
    cut.caches = [None] * len(cut.views)
    difference.add(cut.logits(ids), whole(ids, use_cache=False).logits)

    pieces = [0, *range(PREFILL, PREFILL + STEPS + 1), total]
    cut.open()
    past = None
    for start, end in pairwise(pieces):
        positions = torch.arange(start, end).unsqueeze(0)
        output = whole(ids[:, start:end], past_key_values=past, position_ids=positions, use_cache=True)
        past = output.past_key_values
        difference.add(cut.logits(ids[:, start:end], start), output.logits)

    mask = torch.ones((2, total), dtype=torch.long)
    mask[0, :PADDED] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    real = mask.bool()
    cut.open()
    past = None
    for start, end in pairwise(pieces):
        seen, where = mask[:, :end], positions[:, start:end]
        output = whole(ids[:, start:end], attention_mask=seen, position_ids=where, past_key_values=past, use_cache=True)
        past = output.past_key_values
        ours = cut.logits(ids[:, start:end], start, seen, where)
        difference.add(ours[real[:, start:end]], output.logits[real[:, start:end]])
    return difference


def held_bytes(cache: Any) -> int:
    """Bytes of the tensors in a cache."""

    def held(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return value.nbytes
        if isinstance(value, dict):
            return sum(held(each) for each in value.values())
        return sum(held(each) for each in value) if isinstance(value, (list, tuple)) else 0

    layers = [{k: v for k, v in vars(layer).items() if not k.startswith("_")} for layer in cache.layers]
    return held(layers) + held(getattr(cache, "linear_cache", []))


def load_whole(folder: Path) -> Any:
    """A saved model in float32, as `transformers` loads it, but each tensor where one would be that torch had made.

    Read from a file they lie at any multiple of 8 bytes, and on some processors BLAS rounds otherwise there than at
    a multiple of 16: two equal models would differ in their last bits."""
    whole: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for tensor in (*whole.parameters(), *whole.buffers()):
        tensor.data = tensor.data.clone()
    return whole


def check(config: Any, folder: Path) -> tuple[float, bool, float]:
    """Save a random model of a configuration and compare its cuts with the whole.

    Returns the largest relative difference of logits, whether all bits agree, and the largest relative
    error of `cache_bytes`. Raises what goes wrong.
    """
    Parts.of(config)  # refuses with the reason
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    randomize(model)
    model.save_pretrained(folder)
    del model
    whole = load_whole(folder)
    checkpoint = Checkpoint.open(str(folder))
    worst, identical, kv_error = 0.0, True, 0.0
    with torch.inference_mode():
        for at in splits(checkpoint.config):
            cut = Cut(checkpoint, at)
            difference = compare(whole, cut, checkpoint.config.vocab_size)
            if not difference.worst <= TOLERANCE:
                raise ValueError(f"cut at {at}: logits differ by {difference.worst:.1e} of the largest")
            worst, identical = max(worst, difference.worst), identical and difference.identical
            for view, cache in zip(cut.views, cut.caches, strict=True):
                said = 2 * cache_bytes(checkpoint.config, view.span, torch.float32, PREFILL + STEPS + CHUNK)
                held = held_bytes(cache)
                kv_error = max(kv_error, abs(said - held) / max(held, 1))
    return worst, identical, kv_error


def main(
    only: Annotated[list[str] | None, typer.Argument(help="Model types; default: all.")] = None,
    json_to: Annotated[str, typer.Option("--json", help="Write the result to this file; -: to stdout.")] = "",
    save: Annotated[bool, typer.Option("--save", help="Keep the result in benchmarks/results.")] = False,
) -> None:
    """Cut every family and compare."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    origin = provenance(1)
    started = time.perf_counter()
    kinds = only or families()
    exact, identical, failed, worst, kv_error = [], 0, {}, 0.0, 0.0
    for kind in kinds:
        same = True
        try:
            for config in variants(kind):
                with tempfile.TemporaryDirectory(prefix="swarm-families-") as folder:
                    difference, bits, kv = check(config, Path(folder))
                worst, same, kv_error = max(worst, difference), same and bits, max(kv_error, kv)
        except SwarmError as error:
            failed[kind] = error.cause
        except Exception as error:  # any failure of any family is a result here
            failed[kind] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        else:
            exact.append(kind)
            identical += same
    result: dict[str, object] = {
        "families": len(kinds),
        "exact": len(exact),
        "identical": identical,
        "exact_with_plan": sum(kind not in TABLE for kind in exact),
        "exact_by_table": sum(kind in TABLE for kind in exact),
        "worst_relative_difference": worst,
        "failed": failed,
        "kv_bytes_relative_error": kv_error,
        "seconds": round(time.perf_counter() - started, 1),
    }
    publish("families", result, origin, json_to, save)


if __name__ == "__main__":
    typer.run(main)
