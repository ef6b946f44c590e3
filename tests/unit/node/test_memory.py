from __future__ import annotations

import pytest

from node.memory import Ledger, parse_bytes
from swarm.errors import InputError, OutOfMemory


def test_charges_replace_and_release() -> None:
    ledger = Ledger(100)
    ledger.charge("weights", "shard", 60)
    ledger.charge("kv", "s1", 30)
    ledger.charge("kv", "s1", 40)
    assert ledger.used_bytes == 100
    with pytest.raises(OutOfMemory, match="kv of s2 need") as caught:
        ledger.charge("kv", "s2", 1)
    assert "--vram" in caught.value.fix
    assert ledger.used_bytes == 100
    ledger.release("s1")
    ledger.charge("kv", "s2", 40)
    assert ledger.used_by("kv") == 40


@pytest.mark.parametrize(
    ("kind", "named"), [("weights", "--blocks"), ("activations", "batch_size"), ("optimizer", "rank")]
)
def test_the_error_names_what_to_lower(kind: str, named: str) -> None:
    with pytest.raises(OutOfMemory) as caught:
        Ledger(10).charge(kind, "x", 11)
    assert named in caught.value.fix


def test_sizes() -> None:
    assert parse_bytes("8GiB") == 8 * 2**30
    assert parse_bytes("6000MB") == 6 * 10**9
    assert parse_bytes("1.5gib") == 3 * 2**29
    assert parse_bytes("1024") == 1024
    for text in ("", "GiB", "eight", "8 parsecs", "-"):
        with pytest.raises(InputError):
            parse_bytes(text)
