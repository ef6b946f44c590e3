"""The ledger: one byte budget that weights, KV caches, activations and optimizers are charged to.

Charges are made before memory is taken, so that running out is an answer to one caller and not
the end of the process. It counts what this program asks for, not what the allocator holds.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

import psutil
import torch

from swarm.errors import InputError, OutOfMemory

_M_ARENA_MAX = -8  # malloc.h
_LOWER = {
    "weights": "hold fewer blocks (--blocks) or use a narrower --dtype",
    "resend": "end other sessions, or give the node more memory (--vram)",
    "kv": "end other sessions, shorten the prompt, or give the node more memory (--vram)",
    "activations": "lower the job's batch_size or max_length",
    "optimizer": "lower the adapter's rank, or hold fewer blocks (--blocks)",
}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


class Ledger:
    """Charges by (kind, owner); a kind is one of weights, kv, resend, activations, optimizer."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._charges: dict[tuple[str, str], int] = {}
        self.most_used_bytes = 0
        """The most that was ever charged at once."""

    @property
    def used_bytes(self) -> int:
        return sum(self._charges.values())

    def used_by(self, kind: str) -> int:
        return sum(size for (k, _), size in self._charges.items() if k == kind)

    def room(self, *kinds: str) -> int:
        """What these kinds may take together, beside everything else."""
        return self.budget_bytes - sum(size for (kind, _), size in self._charges.items() if kind not in kinds)

    def free(self, kind: str, owner: str) -> int:
        """The most that `owner` may hold of `kind`."""
        return self.budget_bytes - self.used_bytes + self._charges.get((kind, owner), 0)

    def charge(self, kind: str, owner: str, size: int) -> None:
        """Set what `owner` holds of `kind` to `size` bytes. Raises OutOfMemory, naming what to lower."""
        free = self.free(kind, owner)
        if size > free:
            raise OutOfMemory(
                f"{kind} of {owner} need {_mib(size)}, but only {_mib(free)} of {_mib(self.budget_bytes)} are free",
                _LOWER[kind],
            )
        self._charges[(kind, owner)] = size
        self.most_used_bytes = max(self.most_used_bytes, self.used_bytes)

    def release(self, owner: str) -> None:
        """Give back everything charged to `owner`."""
        for key in [key for key in self._charges if key[1] == owner]:
            del self._charges[key]


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def use_one_arena() -> None:
    """Let glibc keep freed memory of all threads in one place.

    Caches are taken and given back by several threads; with an arena for each, a node that served 64 clients
    held 60 MB more than the caches it had. Without effect where the C library is another.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def parse_bytes(text: str) -> int:
    """ "8GiB", "6000MB" or plain bytes. Raises InputError."""
    lowered = text.strip().lower().removesuffix("b")
    number = lowered.rstrip("kmgi")
    try:
        return int(float(number) * _UNITS[lowered[len(number) :]])
    except (ValueError, KeyError) as error:
        raise InputError(f"'{text}' is not a size such as 8GiB") from error


def default_budget(device: torch.device) -> int:
    """What a node may use unless told: nine tenths of a card's free memory, half of a machine's free RAM."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * 0.9)
    return int(psutil.virtual_memory().available * 0.5)
