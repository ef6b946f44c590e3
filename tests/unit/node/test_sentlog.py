from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from node.sentlog import SentLog
from swarm.wire.tensors import pack, unpack


def _values(start: int, end: int, rows: int) -> torch.Tensor:
    columns = torch.arange(start, end, dtype=torch.float32)
    return (columns.reshape(1, -1, 1) + 100 * torch.arange(rows).reshape(-1, 1, 1)).expand(rows, end - start, 4)


def _read(log: SentLog, start: int, end: int) -> torch.Tensor:
    parts, at = [], start
    for position, meta, payload in log.frames(start, end):
        assert position == at
        parts.append(unpack(meta, payload, torch.float32, torch.device("cpu")))
        at += int(meta.shape[1])
    assert at == end
    return torch.cat(parts, dim=1)


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 20)), min_size=1, max_size=8), st.data())
def test_any_columns_come_back_whatever_was_rolled_back(steps: list[tuple[int, int]], data: st.DataObject) -> None:
    log, at = SentLog(2**30), 0
    for width, back in steps:
        at = max(0, at - back)
        log.add(at, *pack(_values(at, at + width, 2), "float32"))
        at += width
    assert (log.start, log.end) == (0, at)
    start = data.draw(st.integers(0, at - 1))
    assert torch.equal(_read(log, start, at), _values(start, at, 2))


def test_beyond_its_limit_the_log_goes() -> None:
    log = SentLog(100)
    log.add(0, *pack(_values(0, 5, 1), "float32"))
    assert (log.start, log.end) == (0, 5)
    log.add(5, *pack(_values(5, 9, 1), "float32"))
    assert (log.start, log.end, log.nbytes) == (9, 9, 0)
    log.add(9, *pack(_values(9, 10, 1), "float32"))
    assert (log.start, log.end) == (9, 10)


@pytest.mark.parametrize("encoding", ["bfloat16", "int8"])
def test_other_encodings_come_back_as_they_were_sent(encoding: str) -> None:
    log, values = SentLog(2**20), torch.randn(1, 3, 64)
    log.add(0, *pack(values, encoding))
    sent = unpack(*pack(values, encoding), torch.float32, torch.device("cpu"))
    assert torch.allclose(_read(log, 0, 3), sent, rtol=1e-5)
