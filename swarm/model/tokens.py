"""Which tokenizer a checkpoint has, as a hash: the same text must become the same ids everywhere.

The hash covers what maps text to ids: tokenizer.json where there is one (as JSON, without the
truncation and padding that the last user left in it, and merges in one spelling), else the
vocabulary files as bytes. A folder that `save_pretrained` wrote and the hub's original of it agree
unless the vocabulary, merges, added tokens or the steps before and after differ.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from swarm.errors import CorruptData

_LEGACY = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "added_tokens.json")
_STATE_OF_LAST_USE = frozenset({"truncation", "padding", "version"})


def tokenizer_hash(folder: Path) -> bytes:
    """SHA-256 of a folder's tokenizer; empty if it holds none. Raises CorruptData."""
    digest = hashlib.sha256(b"swarm-tokenizer-v1")
    try:
        if (folder / "tokenizer.json").is_file():
            raw = json.loads((folder / "tokenizer.json").read_bytes())
            digest.update(json.dumps(_normal(raw), sort_keys=True).encode())
            return digest.digest()
        found = [name for name in _LEGACY if (folder / name).is_file()]
        for name in found:
            content = (folder / name).read_bytes()
            digest.update(f"{name}|{len(content)}\n".encode() + content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptData(f"cannot read the tokenizer in {folder}: {error}") from error
    return digest.digest() if found else b""


def _normal(raw: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in raw.items() if key not in _STATE_OF_LAST_USE}
    merges = kept["model"].get("merges")
    if isinstance(merges, list):
        # Written as "a b" before tokenizers 0.20, as ["a", "b"] since.
        kept["model"] = {**kept["model"], "merges": [m if isinstance(m, str) else " ".join(m) for m in merges]}
    return kept
