"""Which tensors of a checkpoint make which parameters of a model, as transformers converts them.

A checkpoint may name and pack its tensors otherwise than the model does: without the base model's
prefix, under legacy names, one tensor an expert where the model holds all experts in one.
transformers keeps those rules as renamings and converters and applies them while it loads whole
models; here the same rules are applied to names alone, so that only the tensors of some blocks, or
of the head, are read. In: the names of a checkpoint and the model on meta. Out: `Recipe`s, and the
parameters they make. Never reads a tensor that was not asked for.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from swarm.errors import UnsupportedModel
from swarm.model.checkpoint import Checkpoint


@dataclass
class Recipe:
    """How one parameter, or several that are packed together, come out of checkpoint tensors."""

    target: str
    """Full parameter name; the first one if there are several."""
    converter: Any = None
    """None: the tensor is taken as it is."""
    sources: list[tuple[str, str]] = field(default_factory=list)
    """Checkpoint name and the converter's pattern it matched, in the order the converter needs."""


def recipes(names: Iterable[str], model: Any) -> list[Recipe]:
    """The recipes for a whole model on meta; checkpoint tensors that the model has no use for are left out."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, Recipe] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target in state:
            recipe = found.setdefault(target, Recipe(target, by_pattern[pattern] if pattern else None))
            recipe.sources.append((name, pattern or name))
    return list(found.values())


def cook(
    checkpoint: Checkpoint,
    model: Any,
    wanted: Iterable[Recipe],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Read the sources and make the parameters, by full name. Raises UnsupportedModel, CorruptData.

    model: on meta, as `recipes` took it; says what must stay float32.
    """
    wanted = list(wanted)
    dtype_of = _dtypes(model, dtype)
    by_dtype: dict[torch.dtype, list[Recipe]] = {}
    for recipe in wanted:
        if recipe.converter is None:
            by_dtype.setdefault(dtype_of(recipe.target), []).append(recipe)
    made: dict[str, torch.Tensor] = {}
    for kind, plain in by_dtype.items():
        loaded = checkpoint.load([recipe.sources[0][0] for recipe in plain], kind, device)
        made.update({recipe.target: loaded[recipe.sources[0][0]] for recipe in plain})
    for recipe in wanted:
        if recipe.converter is not None:  # one at a time: packing doubles what a tensor takes
            made.update(_convert(checkpoint, model, recipe, dtype_of(recipe.target), device))
    state = model.state_dict()
    for name, tensor in made.items():
        if name in state and state[name].shape != tensor.shape:
            raise UnsupportedModel(
                f"{checkpoint.name}: {name} has shape {tuple(tensor.shape)}, its configuration says"
                f" {tuple(state[name].shape)}"
            )
    return made


def _convert(
    checkpoint: Checkpoint, model: Any, recipe: Recipe, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    loaded = checkpoint.load([name for name, _ in recipe.sources], dtype, device)
    converter = copy.deepcopy(recipe.converter)
    for name, pattern in recipe.sources:
        converter.add_tensor(recipe.target, name, pattern, loaded.pop(name))
    try:
        made = converter.convert(recipe.target, model=model, config=model.config)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UnsupportedModel(f"the tensors for {recipe.target} in {checkpoint.name} do not fit: {error}") from error
    return {name: (value[0] if isinstance(value, list) else value).contiguous() for name, value in made.items()}


def _dtypes(model: Any, dtype: torch.dtype) -> Callable[[str], torch.dtype]:
    """What each parameter is loaded as: some are kept in float32, and buffers keep the dtype they have."""
    plan = model._get_dtype_plan(dtype)
    rules = [(re.compile(pattern.replace("*", ".*")), kind) for pattern, kind in plan.items()]
    state = model.state_dict()

    def of(name: str) -> torch.dtype:
        for rule, kind in rules:
            if rule.search(name):
                return cast(torch.dtype, kind)
        tensor = state.get(name)
        return tensor.dtype if tensor is not None else dtype

    return of
