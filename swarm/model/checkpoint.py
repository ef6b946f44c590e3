"""What a checkpoint is: a configuration, a table of tensors, and a hash that names both.

Reads a Hugging Face checkpoint from a folder, from the hub (`swarm.model.hub`) or from peers
(`swarm.net.weights`), which are `Source`s. Only JSON files and safetensors headers are read until
`load` asks for tensors by name. Nothing is ever unpickled and no code of a checkpoint is run. torch,
transformers and huggingface_hub are imported when they are first needed: a model that is not there
is refused in a moment, and `swarm status` needs only the hash.

`model_hash` is the SHA-256 of the configuration, every tensor's name, dtype and shape, and the first
bytes of each of a fixed sample of tensors: any process computes it without reading the weights,
another revision or fine-tune of the same architecture gets another one, and it does not depend on
how the checkpoint is cut into files or where it is read. It is a fingerprint, not a proof of the
content (docs/adr/0005).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs
from safetensors import SafetensorError, safe_open

from swarm.errors import CorruptData, ModelMismatch, ModelNotFound, UnsupportedModel
from swarm.model.sources import TOKENIZER_FILES, FolderSource, Located, Source, TensorEntry
from swarm.model.tokens import tokenizer_hash

if TYPE_CHECKING:
    import torch

SAMPLED_BYTES = 64
_SAMPLED_TENSORS = 64
_VOLATILE_KEYS = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"})


def default_cache() -> Path:
    """Where weights that came over a network are kept unless told: the platform's cache folder."""
    return Path(platformdirs.user_cache_dir("volunteer-swarm")) / "weights"


class Checkpoint:
    """One base model at one revision. Make with `open`."""

    def __init__(self, source: Source) -> None:
        """Read configuration and samples. Raises UnsupportedModel, ModelNotFound."""
        self.source = source
        self.name = source.name
        self.revision = source.revision
        self.tensors = source.tensors
        self._config_path = source.files(("config.json",)) / "config.json"
        self._raw_config = read_config(self._config_path)
        first = source.first_bytes(sampled(self.tensors), SAMPLED_BYTES)
        self.model_hash = fingerprint(self._raw_config, self.tensors, first)

    @classmethod
    def open(cls, model: str, revision: str | None = None, cache: Path | None = None) -> Checkpoint:
        """Open a folder or a hub id. Raises ModelNotFound, UnsupportedModel, CorruptData."""
        folder = Path(model).expanduser()
        if folder.is_dir():
            return cls(FolderSource(folder.resolve()))
        if model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise ModelNotFound(f"there is no checkpoint folder {model}")
        from swarm.model.hub import HubSource

        return cls(HubSource.open(model, revision, cache or default_cache()))

    @cached_property
    def config(self) -> Any:
        """The configuration as transformers reads it. Raises UnsupportedModel."""
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(str(self._config_path.parent))
        except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
            reason = str(error).split("\n", 1)[0]  # what follows is advice about transformers
            raise UnsupportedModel(f"cannot use the configuration {self._config_path}: {reason}") from error

    @property
    def n_blocks(self) -> int:
        """Blocks of the model. Most families say it in config.json under this name. Raises UnsupportedModel."""
        said = self._raw_config.get("num_hidden_layers")
        if isinstance(said, int):
            return said
        from swarm.model.families import n_blocks

        return n_blocks(self.config)

    @cached_property
    def tokenizer_hash(self) -> bytes:
        """SHA-256 of what maps text to ids; empty without a tokenizer. Raises ModelNotFound, CorruptData."""
        return tokenizer_hash(self.source.files(TOKENIZER_FILES))

    def check_tokenizer(self, expected: bytes, whose: str) -> None:
        """Refuse a tokenizer that differs from the swarm's (`whose`: who says so). Raises ModelMismatch."""
        if expected and self.tokenizer_hash != expected:
            raise ModelMismatch(
                f"the tokenizer of {self.name} ({self.tokenizer_hash.hex()[:12] or 'none'}) is not that of {whose}"
                f" ({expected.hex()[:12]}): the same text would become other tokens",
                "use the checkpoint's own tokenizer files, or the join string of the swarm you mean",
            )

    def load(self, names: Iterable[str], dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
        """Read tensors by name, fetching what is not on this machine.

        Raises UnsupportedModel (a name is missing), CorruptData, and what the source raises
        (ModelNotFound, NetworkError, StorageError).
        """
        wanted = list(dict.fromkeys(names))
        for name in wanted:
            if name not in self.tensors:
                raise UnsupportedModel(f"the checkpoint {self.name} has no tensor '{name}'")
        self.source.ensure(wanted)
        by_path: dict[Path, list[str]] = {}
        for name in wanted:
            by_path.setdefault(self._here(name).path, []).append(name)
        loaded = {}
        for path, names_there in by_path.items():
            try:
                with safe_open(str(path), framework="pt") as reader:
                    for name in names_there:
                        loaded[name] = reader.get_tensor(name).to(device=device, dtype=dtype)
            except (SafetensorError, OSError) as error:
                raise CorruptData(f"cannot read {path}: {error}") from error
        return loaded

    def _here(self, name: str) -> Located:
        located = self.source.local(name)
        if located is None:
            raise CorruptData(f"'{name}' of {self.name} was removed from this machine while it was read")
        return located

    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer. Raises ModelNotFound."""
        from transformers import AutoTokenizer

        folder = self.source.files(TOKENIZER_FILES)
        try:
            return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ModelNotFound(f"{self.name} holds no tokenizer that can be read") from error


def sampled(tensors: Mapping[str, TensorEntry]) -> list[str]:
    """The tensors whose first bytes are part of the fingerprint."""
    names = sorted(tensors)
    return names[:: max(1, len(names) // _SAMPLED_TENSORS)]


def fingerprint(raw_config: Mapping[str, Any], tensors: Mapping[str, TensorEntry], first: Mapping[str, bytes]) -> bytes:
    """`model_hash`. `first`: the first SAMPLED_BYTES of each of `sampled(tensors)`."""
    digest = hashlib.sha256(b"swarm-model-v1")
    stable = {key: value for key, value in raw_config.items() if key not in _VOLATILE_KEYS}
    digest.update(json.dumps(stable, sort_keys=True).encode())
    for name in sorted(tensors):
        entry = tensors[name]
        digest.update(f"{name}|{entry.dtype}|{entry.shape}\n".encode())
    for name in sampled(tensors):
        digest.update(first[name])
    return digest.digest()


def open_for(model: str, revision: str, model_hash: bytes, override: str = "") -> Checkpoint:
    """The base model a join string names, as this machine finds it (at `override` if given).

    Raises ModelNotFound, and ModelMismatch if what is found is another model or revision.
    """
    if revision == "local" and not override and not Path(model).is_dir():
        raise ModelNotFound(
            f"the swarm's model is the folder {model}, which is not on this machine",
            "copy the checkpoint here and name its folder with --model",
        )
    checkpoint = Checkpoint.open(override or model, None if revision == "local" else revision)
    if checkpoint.model_hash != model_hash:
        raise ModelMismatch(
            f"{checkpoint.name} has model hash {checkpoint.model_hash.hex()[:12]},"
            f" but the swarm runs {model} with {model_hash.hex()[:12]}"
        )
    return checkpoint


def read_config(path: Path) -> dict[str, Any]:
    """config.json as it is. Raises UnsupportedModel: not JSON, or it asks for code of its own."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"cannot use the configuration {path}: {error}") from error
    if not isinstance(raw, dict):
        raise UnsupportedModel(f"the configuration {path} is not a JSON object")
    if "auto_map" in raw:
        raise UnsupportedModel(f"{path} asks for code of its own, which is never run here")
    return raw
