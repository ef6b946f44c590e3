"""A base model cut to a span of its blocks, still without weights.

The causal language model is built once per checkpoint and dtype with its parameters on the meta
device, all blocks by their global index, so that what depends on depth stays right. A cut copies
the span's blocks out of it, renumbers the cache index only, and leaves a stand-in wherever the head
has tensors: what a stand-in returns is NaN, so that a family whose blocks need more of the head than
their hidden states shows at once instead of being wrong in silence.

In: a checkpoint and a span. Out: modules whose parameters are on meta and whose buffers are real.
Never reads weights.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from swarm.errors import SpanError, UnsupportedModel
from swarm.ids import Span
from swarm.model.checkpoint import Checkpoint
from swarm.model.families import Parts, cuts, n_blocks
from swarm.model.names import Recipe, recipes

_NOT_PER_BLOCK = ("token_id", "token_ids", "architectures", "section")


@dataclass(frozen=True)
class Whole:
    """A whole model on meta, and how its checkpoint fills it."""

    model: Any
    parts: Parts
    recipes: tuple[Recipe, ...]

    @property
    def base(self) -> nn.Module:
        return cast(nn.Module, getattr(self.model, self.model.base_model_prefix))

    @property
    def layers(self) -> str:
        """What names of block tensors start with: "model.layers."."""
        return f"{self.model.base_model_prefix}.{self.parts.layers}."

    def block_of(self, name: str) -> int | None:
        """The block a parameter belongs to; None: the head's."""
        return int(name[len(self.layers) :].split(".", 1)[0]) if name.startswith(self.layers) else None


class _BigOnMeta(TorchFunctionMode):
    """Makes large new tensors on meta at once: the experts of one block can be larger than this machine's memory.

    `init_empty_weights` moves parameters to meta after they were made. Buffers must be real, and are
    far smaller than the limit.
    """

    limit = 2**24

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.zeros, torch.ones, torch.randn, torch.rand):
            size = kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
            if math.prod(size) > self.limit:
                kwargs["device"] = "meta"
        return func(*args, **kwargs)


_wholes: WeakKeyDictionary[Checkpoint, dict[torch.dtype, Whole]] = WeakKeyDictionary()
_lock = threading.RLock()


def whole_of(checkpoint: Checkpoint, dtype: torch.dtype) -> Whole:
    """The checkpoint's model on meta; made once. Callers copy before they change it. Raises UnsupportedModel."""
    with _lock:
        kept = _wholes.setdefault(checkpoint, {})
        if dtype not in kept:
            parts = Parts.of(checkpoint.config)
            try:
                with _BigOnMeta(), init_empty_weights(include_buffers=False):
                    model = AutoModelForCausalLM.from_config(copy.deepcopy(checkpoint.config), dtype=dtype)
            except ValueError as error:
                raise UnsupportedModel(f"model type '{checkpoint.config.model_type}': {error}") from error
            model.eval().requires_grad_(False)
            kept[dtype] = Whole(model, parts, tuple(recipes(checkpoint.tensors, model)))
        return kept[dtype]


def skeleton_of(checkpoint: Checkpoint, span: Span, dtype: torch.dtype) -> nn.Module:
    """The base model cut to a span: parameters on meta, buffers real.

    Raises UnsupportedModel, and SpanError where the family may not be cut.
    """
    whole = whole_of(checkpoint, dtype)
    _check_cut(checkpoint.config, span)
    model = copy_without_blocks(whole.base, whole.base, whole.parts, range(span.start, span.end))
    total = n_blocks(checkpoint.config)
    per_block = int(checkpoint.config.num_hidden_layers) // total
    for module in model.get_submodule(whole.parts.layers).modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            cast(Any, module).layer_idx -= span.start * per_block
    _empty_head(model, model.get_submodule(whole.parts.layers))
    if getattr(_parent(model, whole.parts.norm), _leaf(whole.parts.norm), None) is not None:
        setattr(_parent(model, whole.parts.norm), _leaf(whole.parts.norm), nn.Identity())
    # Masks are made from per-layer lists such as `layer_types`.
    config = cast(Any, model).config
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == total and not name.endswith(_NOT_PER_BLOCK):
            setattr(config, name, value[span.start : span.end])
    config.num_hidden_layers = len(span) * per_block
    return model


def copy_without_blocks(root: nn.Module, base: nn.Module, parts: Parts, kept: range) -> nn.Module:
    """A copy of `root` whose `base` has the blocks of `kept` only. `root` is `base` or contains it."""
    blocks = base.get_submodule(parts.layers)
    # deepcopy takes what it finds in its memo for the copy: the other blocks cost nothing.
    memo: dict[int, Any] = {
        id(block): nn.Identity() for index, block in enumerate(cast(Any, blocks)) if index not in kept
    }
    with _lock:
        copied = copy.deepcopy(root, memo)
    new_base = memo[id(base)]
    new_blocks = new_base.get_submodule(parts.layers)
    setattr(_parent(new_base, parts.layers), _leaf(parts.layers), nn.ModuleList(new_blocks[i] for i in kept))
    return copied


def assign(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put tensors in the place of a module's meta parameters and buffers, sharing their storage."""
    for name, tensor in tensors.items():
        owner = _parent(model, name)
        if _leaf(name) in owner._buffers:
            owner._buffers[_leaf(name)] = tensor
        else:
            setattr(owner, _leaf(name), nn.Parameter(tensor, requires_grad=False))


class _Absent(nn.Module):
    """Stands where the head has a module: NaN in the shape of what came in, or in one that fits any."""

    def __init__(self, instead_of: nn.Module) -> None:
        super().__init__()
        self._looks_up = isinstance(instead_of, nn.Embedding)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        given = args[0] if args else next(iter(kwargs.values()))
        if self._looks_up:
            return torch.full((1, 1, 1), torch.nan, device=given.device)
        return cast(torch.Tensor, given.new_full((), torch.nan).expand_as(given))


def _empty_head(module: nn.Module, blocks: nn.Module) -> None:
    """Replace every module with parameters that is not, and does not contain, `blocks`."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        delattr(module, name)
        module.register_buffer(name, torch.full(parameter.shape, torch.nan, dtype=parameter.dtype), persistent=False)
    for name, child in list(module.named_children()):
        if child is blocks or next(child.parameters(), None) is None:
            continue
        if any(inner is blocks for inner in child.modules()):
            _empty_head(child, blocks)
        else:
            setattr(module, name, _Absent(child))


def _check_cut(config: Any, span: Span) -> None:
    allowed = cuts(config)
    if span.start not in allowed or span.end not in allowed:
        raise SpanError(
            f"blocks {span} cannot be cut out of a '{config.model_type}': some of its blocks use what an earlier one"
            " has computed",
            f"choose both ends from {', '.join(map(str, allowed))}",
        )


def _parent(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
