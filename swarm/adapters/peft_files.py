"""LoRA adapters as PEFT stores them: two files, from a peer, a folder or the hub, or written here.

In: `adapter_config.json` and `adapter_model.safetensors`. Out: every pair of tensors by linear layer,
with its scale, or a typed error that names the setting that cannot be served. What the tensors are
called says which linears are adapted; the configuration must agree as far as it lists them.

Some mixtures of experts were rewritten in transformers 5: what were linear layers of every expert is one stacked
tensor. For these PEFT takes such names (`gate_proj`) in `target_modules` for the experts, even where a dense block
or shared experts have linear layers of that name, and leaves those out without a word. An adapter of theirs names
their weights in `target_parameters` instead, which PEFT takes as they are.

Files may come from strangers: pickles are never opened, and an expression (a regular expression in
`target_modules`, or a pattern with groups) is never run, since a bad one takes forever.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download, is_offline_mode
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from swarm.errors import AdapterNotFound, CodecError, UnsupportedModel
from swarm.ids import Span, block_of

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_ADAPTER_BYTES = 4 * 1024**3
_PICKLE_FILE = "adapter_model.bin"
_MAX_CONFIG_BYTES = 4 * 1024**2
_MAX_RANK = 4096
_TIMEOUT_S = 10.0
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_SAME_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base model's weights as they are; PiSSA and others do not."""
_HARMLESS = frozenset(
    (
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "lora_dropout", "fan_in_fan_out", "megatron_core", "loftq_config", "eva_config"),
        *("corda_config", "lora_ga_config", "velora_config", "qalora_group_size", "runtime_config"),
        *("layers_pattern", "ensure_weight_tying"),
    )
)
"""Settings that say nothing about the function computed, or act only through another that is checked."""
_REASONS = {
    "use_dora": "DoRA scales whole weight matrices",
    "lora_bias": "its B has a bias",
    "modules_to_save": "whole modules would be replaced",
    "trainable_token_indices": "embeddings would be replaced",
    "layer_replication": "blocks are repeated",
}
_WEIGHT = ".weight"
_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""What linear layers of experts and their routers have been called in transformers 4."""
_SIMPLE = re.compile(r"(?:[\w\-^$]|\\?\.)+")
"""A pattern key that is a name, perhaps with anchors: what every tool writes."""


class PeftLora(BaseModel):
    """`adapter_config.json` of a LoRA adapter."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    peft_type: str
    r: int
    lora_alpha: float
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    target_parameters: tuple[str, ...] | None = None
    layers_to_transform: int | tuple[int, ...] | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    bias: str = "none"
    init_lora_weights: bool | str | None = None

    @classmethod
    def parse(cls, data: bytes) -> PeftLora:
        """Raises CodecError (does not parse) and UnsupportedModel (a setting that cannot be served, by name)."""
        try:
            raw = json.loads(data[: _MAX_CONFIG_BYTES + 1])
            if not isinstance(raw, dict):
                raise CodecError("the adapter's configuration is not a JSON object")
            if raw.get("peft_type") != "LORA":
                raise UnsupportedModel(
                    f"the adapter is of the kind {str(raw.get('peft_type'))[:40]}, only LORA is served", _OTHER
                )
            for name in ("rank_pattern", "alpha_pattern"):
                if isinstance(raw.get(name), dict) and len(raw[name]) > 10_000:
                    raise CodecError(f"the adapter's {name} has {len(raw[name])} entries")
            config = cls.model_validate(raw)
        except (ValueError, RecursionError, ValidationError) as error:
            raise CodecError("the adapter's configuration does not parse") from error
        config._check()
        return config

    def _check(self) -> None:
        for name, value in (self.model_extra or {}).items():
            if value and name not in _HARMLESS:
                what = f": {', '.join(map(str, value))}"[:200] if isinstance(value, list | tuple) else ""
                reason = _REASONS.get(name, "this version does not know what that changes")
                raise UnsupportedModel(f"the adapter sets {name[:60]}{what}; {reason}", _OTHER)
        if self.target_parameters and (
            self.rank_pattern
            or self.alpha_pattern
            or not all(name.endswith(_WEIGHT) for name in self.target_parameters)
        ):
            what = ", ".join(self.target_parameters)[:200]
            raise UnsupportedModel(
                f"the adapter sets target_parameters: {what}; tensors outside linear layers are adapted", _OTHER
            )
        if self.bias != "none":
            raise UnsupportedModel(f"the adapter trains biases (bias: {self.bias[:40]})", _OTHER)
        if self.init_lora_weights not in _SAME_BASE:
            raise UnsupportedModel(
                f"the adapter was made for changed base weights (init_lora_weights: {self.init_lora_weights})",
                "convert it to plain LoRA with PEFT's path_initial_model_for_weight_conversion",
            )
        if not 1 <= self.r <= _MAX_RANK:
            raise UnsupportedModel(f"the adapter's rank {self.r} is not in 1…{_MAX_RANK}", _OTHER)

    def rank_of(self) -> Callable[[str], int]:
        """The rank of a linear by its whole name, as PEFT finds it."""
        ranks = _lookup(self.rank_pattern or {}, "rank_pattern")
        return lambda name: int(ranks(name, self.r))

    def scale_of(self) -> Callable[[str, int], float]:
        """alpha / r of a linear by its whole name and rank; alpha / sqrt(r) with rank stabilisation (rsLoRA)."""
        alphas = _lookup(self.alpha_pattern or {}, "alpha_pattern")
        return lambda name, r: alphas(name, self.lora_alpha) / (math.sqrt(r) if self.use_rslora else r)

    def listed(self, name: str, block: int) -> bool | None:
        """Whether the configuration says that this linear is adapted; None: it uses an expression."""
        if self.target_parameters and _ends(name + _WEIGHT, self.target_parameters):
            return True
        if self.target_modules is None:
            return False
        if isinstance(self.exclude_modules, str):
            return None
        if self.exclude_modules and _ends(name, self.exclude_modules):
            return False
        if isinstance(self.target_modules, str):
            return True if self.target_modules.lower() == "all-linear" else None
        only = (self.layers_to_transform,) if isinstance(self.layers_to_transform, int) else self.layers_to_transform
        return _ends(name, self.target_modules) and (not only or block in only)


def targets(linears: Collection[str], config: Any) -> dict[str, list[str] | None]:
    """`target_modules` and `target_parameters` that make PEFT adapt exactly these linears of a block, by path, of
    a model with this configuration."""
    names = {path.rpartition(".")[2] for path in linears}
    asked = LoraConfig(target_modules=[*names.union(_EXPERTS)])
    convert_peft_config_for_transformers(asked, SimpleNamespace(config=config), None)
    taken = names.difference(asked.target_modules or ())
    weights = sorted(path + _WEIGHT for path in linears if path.rpartition(".")[2] in taken)
    return {"target_modules": sorted(names - taken), "target_parameters": weights or None}


_OTHER = "train or convert the adapter as plain LoRA on linear layers of the blocks"


def read_lora(
    files: Mapping[str, bytes], linears: Collection[str], base: str, key_of: Callable[[str], str], span: Span
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Scales by linear, and float32 tensors by key, of the span's blocks.

    `linears`: "<block>/<path>" of every linear of the whole model; `base`: what their names begin with in the
    model. The whole adapter is checked, not the span's part only. Raises CodecError, UnsupportedModel.
    """
    if missing := [name for name in (CONFIG_FILE, WEIGHTS_FILE) if name not in files]:
        raise CodecError(f"the adapter has no {missing[0]}")
    config = PeftLora.parse(files[CONFIG_FILE])
    try:
        stored = load_safetensors(files[WEIGHTS_FILE])
    except (SafetensorError, ValueError, KeyError) as error:
        raise CodecError("the adapter's weights are not a safetensors file") from error
    tensors = {key_of(name): tensor for name, tensor in stored.items()}
    if len(tensors) != len(stored):
        raise UnsupportedModel("the adapter has a tensor twice, under two names")
    names = {site: base + site.replace("/", ".", 1) for site in linears}
    _check_sites(config, tensors, names)
    rank_of, scale_of = config.rank_of(), config.scale_of()
    scales, values = {}, {}
    for key, tensor in tensors.items():
        site, _, leaf = key.rpartition(".")
        rank = rank_of(names[site])
        if tensor.ndim != 2 or tensor.shape[leaf == "lora_B"] != rank:
            raise UnsupportedModel(f"the adapter's {key} has shape {list(tensor.shape)}, its rank should be {rank}")
        if tensor.dtype not in _DTYPES:
            raise UnsupportedModel(f"the adapter's {key} is of the type {tensor.dtype}", _OTHER)
        if int(block_of(key)) in span:
            values[key] = tensor.to(torch.float32)
            if not bool(values[key].isfinite().all()):
                raise CodecError(f"the adapter's {key} holds values that are not finite numbers")
            scales[site] = scale_of(names[site], rank)
    return scales, values


def _check_sites(config: PeftLora, tensors: Collection[str], names: Mapping[str, str]) -> None:
    found = {key.rpartition(".")[0] for key in tensors}
    if not found:
        raise UnsupportedModel("the adapter holds no tensors", _OTHER)
    if unknown := sorted(found - names.keys()):
        raise UnsupportedModel(f"the adapter changes {unknown[0]}, which is no linear layer of this model's blocks")
    for site, name in names.items():
        listed = config.listed(name, int(block_of(site)))
        if site in found:
            if listed is False:
                raise UnsupportedModel(f"the adapter has tensors for {site}, which its configuration does not adapt")
            halves = [half for half in ("lora_A", "lora_B") if f"{site}.{half}" not in tensors]
            if halves:
                raise UnsupportedModel(f"the adapter lacks {halves[0]} of {site}")
        elif listed:
            raise UnsupportedModel(f"the adapter's tensors do not fit this model: there are none for {site}")


def _ends(name: str, endings: Collection[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def _lookup(patterns: Mapping[str, Any], setting: str) -> Callable[[str, Any], Any]:
    """The value of the first key that matches the end of a name, as PEFT matches, or else the default."""
    compiled = []
    for key, value in patterns.items():
        if _SIMPLE.fullmatch(key) is None:
            raise UnsupportedModel(f"the adapter's {setting} has the key '{key[:80]}', which is no module name", _OTHER)
        # "^" is tried where the name begins only, "$" where it ends.
        plain = key.replace("\\", "").removesuffix("$")
        compiled.append((plain.removeprefix("^"), plain.startswith("^"), value))

    def find(name: str, default: Any) -> Any:
        for key, whole, value in compiled:
            if name == key or (not whole and name.endswith(f".{key}")):
                return value
        return default

    return find


def read_adapter(source: str, revision: str | None = None) -> dict[str, bytes]:
    """The two files of an adapter in a folder or at a hub id. Downloads nothing else and never unpickles.

    Raises AdapterNotFound, UnsupportedModel (pickled weights), CodecError (too large).
    """
    folder = Path(source).expanduser()
    paths = _in_folder(folder) if folder.is_dir() else _on_hub(source, revision)
    contents = {}
    for name, limit_bytes in ((CONFIG_FILE, _MAX_CONFIG_BYTES), (WEIGHTS_FILE, MAX_ADAPTER_BYTES)):
        _check_size(source, name, paths[name].stat().st_size, limit_bytes)
        try:
            contents[name] = paths[name].read_bytes()
        except OSError as error:
            raise AdapterNotFound(f"cannot read {paths[name]}: {error.strerror}", _FIX) from error
    return contents


_FIX = f"give a folder or a hub id with {CONFIG_FILE} and {WEIGHTS_FILE}, as PEFT's save_pretrained writes them"


def _in_folder(folder: Path) -> dict[str, Path]:
    paths = {name: folder / name for name in (CONFIG_FILE, WEIGHTS_FILE)}
    for name, path in paths.items():
        if not path.is_file():
            if name == WEIGHTS_FILE and (folder / _PICKLE_FILE).exists():
                raise _pickled(str(folder))
            raise AdapterNotFound(f"{folder} has no {name}", _FIX)
    return paths


def _on_hub(source: str, revision: str | None) -> dict[str, Path]:
    try:
        if not is_offline_mode():
            # Asked first: it gives up at once where nobody answers, and tells sizes.
            info = HfApi().model_info(source, revision=revision, timeout=_TIMEOUT_S, files_metadata=True)
            sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
            if WEIGHTS_FILE not in sizes and _PICKLE_FILE in sizes:
                raise _pickled(source)
            if missing := [name for name in (CONFIG_FILE, WEIGHTS_FILE) if name not in sizes]:
                raise AdapterNotFound(f"the hub's '{source}' has no {missing[0]}", _FIX)
            _check_size(source, WEIGHTS_FILE, sizes[WEIGHTS_FILE], MAX_ADAPTER_BYTES)
        # By the branch's name, so that the cache knows it offline; then the same commit, should the branch move.
        config = Path(hf_hub_download(source, CONFIG_FILE, revision=revision))
        weights = Path(hf_hub_download(source, WEIGHTS_FILE, revision=config.parent.name))
        return {CONFIG_FILE: config, WEIGHTS_FILE: weights}
    except GatedRepoError as error:
        raise AdapterNotFound(f"the hub's '{source}' is gated", "accept its terms, and set HF_TOKEN") from error
    except LocalEntryNotFoundError as error:
        raise AdapterNotFound(
            f"the hub does not give '{source}', and it is not in the cache: {error.__cause__ or error}",
            "check the network, HF_ENDPOINT and HF_HUB_OFFLINE",
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise AdapterNotFound(f"'{source}' is neither a folder nor an adapter that the hub shows", _FIX) from error
    except (httpx.HTTPError, OSError) as error:
        raise AdapterNotFound(
            f"the hub does not give '{source}': {' '.join(str(error).split())}", "check the network and HF_ENDPOINT"
        ) from error


def _check_size(source: str, name: str, size_bytes: int, limit_bytes: int) -> None:
    if size_bytes > limit_bytes:
        raise CodecError(f"{name} of '{source}' has {size_bytes} bytes, more than {limit_bytes}")


def _pickled(source: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"'{source}' holds {_PICKLE_FILE}, a pickle, which could run code and is never opened",
        "load it once in PEFT where you trust it, and save it again with save_pretrained (safetensors)",
    )
