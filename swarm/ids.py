"""Names of things: spans, parameter keys and hashes. Pure; imports nothing heavy.

A parameter key is `"<block>/<tensor>"`, where the block is a global block index or `head`
and the tensor name is local to the block (`"7/self_attn.q_proj.lora_A"`). Codec seeds,
pseudo-gradients, momentum and residuals are keyed by it, never by node or span, so that the
spans of two pipelines need not line up.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from swarm.errors import SpanError

HEAD = "head"
NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
"""Job and adapter names: they become file names and DHT keys."""


@dataclass(frozen=True, order=True)
class Span:
    """Blocks [start, end) by global index."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise SpanError(f"{self.start}:{self.end} is not a span of blocks")

    @classmethod
    def parse(cls, text: str, n_blocks: int | None = None) -> Span:
        """Read "START:END". Raises SpanError if malformed or beyond `n_blocks`."""
        match = re.fullmatch(r"(\d+):(\d+)", text.strip())
        if match is None:
            raise SpanError(f"'{text}' is not a span of blocks such as 0:15")
        span = cls(int(match[1]), int(match[2]))
        if n_blocks is not None and span.end > n_blocks:
            raise SpanError(f"span {span} ends beyond the model's {n_blocks} blocks")
        return span

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"

    def __len__(self) -> int:
        return self.end - self.start

    def __contains__(self, block: object) -> bool:
        return isinstance(block, int) and self.start <= block < self.end

    def covers(self, other: Span) -> bool:
        return self.start <= other.start and other.end <= self.end


def missing_blocks(spans: Iterable[Span], n_blocks: int) -> list[int]:
    """Blocks of 0…n_blocks-1 that none of the spans holds, ascending."""
    held = {block for span in spans for block in range(span.start, span.end)}
    return [block for block in range(n_blocks) if block not in held]


def ranges_text(blocks: Iterable[int]) -> str:
    """Ascending block numbers as people write them: 3, 7-12."""
    parts: list[list[int]] = []
    for block in blocks:
        if parts and parts[-1][1] == block - 1:
            parts[-1][1] = block
        else:
            parts.append([block, block])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def param_key(block: int | str, tensor: str) -> str:
    return f"{block}/{tensor}"


def block_of(key: str) -> str:
    """The block part of a parameter key: a decimal index or `head`."""
    return key.split("/", 1)[0]


def block_order(block: str) -> tuple[int, int]:
    """Sort key of block names: numbers ascending, then the head."""
    return (1, 0) if block == HEAD else (0, int(block))


def key_order(key: str) -> tuple[int, int, str]:
    """The one order in which parameters are hashed, encoded and added up."""
    block, tensor = key.split("/", 1)
    return (*block_order(block), tensor)


def sha256(data: bytes | memoryview) -> bytes:
    return hashlib.sha256(data).digest()


def seed_from(*parts: object) -> int:
    """A 64-bit seed from named parts, the same on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
