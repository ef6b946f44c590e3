from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import JoinStringError
from swarm.net.join import JoinInfo, parse_join

INFO = JoinInfo(
    bootstrap=("/ip4/127.0.0.1/tcp/31330/p2p/12D3KooWCvRN9ajWZwNUPfGGXHAWVgWeGmdv5y3amBZ9jxgeriqG",),
    model="some/model",
    revision="0123abc",
    model_hash=bytes(range(32)),
)


def test_round_trip_with_and_without_coordinator(tmp_path: Path) -> None:
    assert parse_join(INFO.encode()) == INFO
    full = INFO.with_coordinator("example.org:31340", bytes(32))
    assert parse_join(f"  {full.encode()}\n") == full
    assert full.encode().split() == [full.encode()]
    (tmp_path / "join").write_text(full.encode() + "\n")
    assert parse_join(f"@{tmp_path / 'join'}") == full


def test_a_cut_or_changed_string_is_refused() -> None:
    text = INFO.encode()
    for end in range(len(text)):
        with pytest.raises(JoinStringError):
            parse_join(text[:end])
    for place in range(7, len(text), 5):
        changed = text[:place] + ("A" if text[place] != "A" else "B") + text[place + 1 :]
        with pytest.raises(JoinStringError):
            parse_join(changed)


@given(st.text(max_size=200))
def test_nothing_else_is_a_join_string(text: str) -> None:
    with pytest.raises(JoinStringError):
        parse_join(text if not text.startswith("@") else "x" + text)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(JoinStringError, match="/nowhere/join"):
        parse_join("@/nowhere/join")
