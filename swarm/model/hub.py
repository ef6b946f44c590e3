"""A checkpoint on the Hugging Face hub: its table of tensors, and only those files and bytes that are asked for.

In: a model id and a revision. Out: local paths, bytes, or a typed error that says what the hub
said. `checkpoint` imports this module when a model is no folder; importing it takes a third of a second.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, HfFileSystem, hf_hub_download
from huggingface_hub.errors import (
    HFValidationError,
    NotASafetensorsRepoError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)

# The client whose errors it passes on when nobody answers, under one name across its versions.
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

from swarm.errors import ModelNotFound, UnsupportedModel
from swarm.model.checkpoint import TensorEntry

_TIMEOUT_S = 10.0


def look_up(model: str, revision: str | None) -> tuple[str, Path, dict[str, TensorEntry]]:
    """The commit, the downloaded config.json and the table of tensors. Raises ModelNotFound, UnsupportedModel."""
    with _asking(model):
        api = HfApi()
        commit = api.model_info(model, revision=revision, timeout=_TIMEOUT_S).sha
        config_path = Path(hf_hub_download(model, "config.json", revision=commit))
        metadata = api.get_safetensors_metadata(model, revision=commit)
    tensors = {}
    for file, header in metadata.files_metadata.items():
        for name, info in header.tensors.items():
            start, end = info.data_offsets
            # Offsets count from the end of the header, whose length this API does not tell.
            tensors[name] = TensorEntry(file, info.dtype, tuple(info.shape), start, end - start)
    return str(commit), config_path, tensors


def first_bytes(model: str, commit: str, entry: TensorEntry, length: int) -> bytes:
    """The first bytes of a tensor that `look_up` listed. Raises ModelNotFound."""
    with _asking(model):
        files = HfFileSystem()
        path = f"{model}@{commit}/{entry.file}"
        data_start = 8 + struct.unpack("<Q", files.cat_file(path, start=0, end=8))[0]
        return bytes(files.cat_file(path, start=data_start + entry.offset, end=data_start + entry.offset + length))


def download(model: str, commit: str, file: str) -> Path:
    """A whole file, from the cache if it is there. Raises ModelNotFound."""
    with _asking(model):
        return Path(hf_hub_download(model, file, revision=commit))


@contextmanager
def _asking(model: str) -> Iterator[None]:
    try:
        yield
    except (RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError, HFValidationError) as error:
        raise ModelNotFound(
            f"'{model}' is neither a folder nor a model that the hub shows",
            "check the name and the revision; a private or gated model needs HF_TOKEN",
        ) from error
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise UnsupportedModel(f"the hub's '{model}' holds no safetensors files that can be read") from error
    except (httpx.HTTPError, OSError) as error:
        raise ModelNotFound(
            f"'{model}' is not a folder, and the hub does not give it: {' '.join(str(error).split())}",
            "give a checkpoint folder, or check the network, HF_ENDPOINT and HF_TOKEN",
        ) from error
