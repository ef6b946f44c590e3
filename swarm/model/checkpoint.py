"""What a checkpoint is: a configuration, a table of tensors, and a hash that names both.

Reads a Hugging Face checkpoint folder or hub id. Only JSON files and safetensors headers are read
until `load` asks for tensors by name; on the hub only the files that hold them are downloaded
(`HF_HOME`, `HF_ENDPOINT` and `HF_TOKEN` are honoured by huggingface_hub). Nothing is ever
unpickled and no code of a checkpoint is run. torch, transformers and huggingface_hub are imported
when they are first needed: a model that is not there is refused in a moment, and `swarm status`
needs only the hash.

`model_hash` is the SHA-256 of the configuration, every tensor's name, dtype and shape, and the first
bytes of each of a fixed sample of tensors: any process computes it without reading the weights,
and another revision or fine-tune of the same architecture gets another one.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from swarm.errors import CorruptData, ModelMismatch, ModelNotFound, UnsupportedModel

if TYPE_CHECKING:
    import torch

_MAX_HEADER_BYTES = 64 * 1024 * 1024
_SAMPLED_TENSORS = 64
_SAMPLED_BYTES = 64
_VOLATILE_KEYS = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"})


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """First byte within the file."""
    size: int


class Checkpoint:
    """One base model at one revision. Make with `open`."""

    def __init__(
        self, name: str, revision: str, folder: Path | None, config_path: Path, tensors: dict[str, TensorEntry]
    ) -> None:
        self.name = name
        self.revision = revision
        self.tensors = tensors
        self._folder = folder
        self._config_path = config_path
        self._raw_config = _read_config(config_path)
        self.model_hash = self._fingerprint()

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
        return said if isinstance(said, int) else int(self.config.num_hidden_layers)

    @classmethod
    def open(cls, model: str, revision: str | None = None) -> Checkpoint:
        """Open a folder or a hub id. Raises ModelNotFound, UnsupportedModel, CorruptData."""
        folder = Path(model).expanduser()
        if folder.is_dir():
            return cls._open_folder(folder.resolve())
        if model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise ModelNotFound(f"there is no checkpoint folder {model}")
        return cls._open_hub(model, revision)

    @classmethod
    def _open_folder(cls, folder: Path) -> Checkpoint:
        config_path = folder / "config.json"
        if not config_path.is_file():
            raise ModelNotFound(f"{folder} holds no config.json")
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        if not files:
            raise ModelNotFound(f"{folder} holds no *.safetensors file")
        tensors: dict[str, TensorEntry] = {}
        for file in files:
            tensors.update(_read_header(folder / file))
        return cls(str(folder), "local", folder, config_path, tensors)

    @classmethod
    def _open_hub(cls, model: str, revision: str | None) -> Checkpoint:
        from swarm.model import hub

        commit, config_path, tensors = hub.look_up(model, revision)
        return cls(model, commit, None, config_path, tensors)

    def _fingerprint(self) -> bytes:
        digest = hashlib.sha256(b"swarm-model-v1")
        stable = {key: value for key, value in self._raw_config.items() if key not in _VOLATILE_KEYS}
        digest.update(json.dumps(stable, sort_keys=True).encode())
        names = sorted(self.tensors)
        for name in names:
            entry = self.tensors[name]
            digest.update(f"{name}|{entry.dtype}|{entry.shape}\n".encode())
        step = max(1, len(names) // _SAMPLED_TENSORS)
        for name in names[::step]:
            digest.update(self._first_bytes(self.tensors[name]))
        return digest.digest()

    def _first_bytes(self, entry: TensorEntry) -> bytes:
        length = min(_SAMPLED_BYTES, entry.size)
        if self._folder is not None:
            with (self._folder / entry.file).open("rb") as file:
                file.seek(entry.offset)
                return file.read(length)
        from swarm.model import hub

        return hub.first_bytes(self.name, self.revision, entry, length)

    def load(self, names: Iterable[str], dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
        """Read tensors by name. Raises UnsupportedModel (a name is missing), ModelNotFound (the hub), CorruptData."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            entry = self.tensors.get(name)
            if entry is None:
                raise UnsupportedModel(f"the checkpoint {self.name} has no tensor '{name}'")
            by_file.setdefault(entry.file, []).append(name)
        loaded = {}
        for file, wanted in by_file.items():
            if self._folder is not None:
                path = self._folder / file
            else:
                from swarm.model import hub

                path = hub.download(self.name, self.revision, file)
            try:
                with safe_open(str(path), framework="pt") as reader:
                    for name in wanted:
                        loaded[name] = reader.get_tensor(name).to(device=device, dtype=dtype)
            except (SafetensorError, OSError) as error:
                raise CorruptData(f"cannot read {path}: {error}") from error
        return loaded

    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer. Raises ModelNotFound."""
        from transformers import AutoTokenizer

        source = str(self._folder) if self._folder is not None else self.name
        revision = {} if self._folder is not None else {"revision": self.revision}
        try:
            return AutoTokenizer.from_pretrained(source, **revision)
        except (OSError, ValueError) as error:
            raise ModelNotFound(f"{self.name} holds no tokenizer that can be read") from error


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


def _read_config(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"cannot use the configuration {path}: {error}") from error
    if not isinstance(raw, dict):
        raise UnsupportedModel(f"the configuration {path} is not a JSON object")
    if "auto_map" in raw:
        raise UnsupportedModel(f"{path} asks for code of its own, which is never run here")
    return raw


def _read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensor table at the start of a safetensors file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_MAX_HEADER_BYTES, size - 8):
                raise CorruptData(f"{path} announces a header of {length} bytes")
            header = json.loads(file.read(length))
        entries = {}
        for name, info in header.items():
            if name != "__metadata__":
                start, end = info["data_offsets"]
                if not 0 <= start <= end <= size - 8 - length:
                    raise CorruptData(f"{path} is cut off: '{name}' ends beyond the file")
                entries[name] = TensorEntry(
                    path.name, info["dtype"], tuple(info["shape"]), 8 + length + start, end - start
                )
        return entries
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise CorruptData(f"{path} is not a safetensors file: {error}") from error
