from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import ProtocolError
from swarm.wire.masks import pack_mask, unpack_mask


@given(st.integers(1, 5), st.integers(1, 40), st.data())
def test_masks_survive(batch: int, time: int, data: st.DataObject) -> None:
    bits = data.draw(st.lists(st.booleans(), min_size=batch * time, max_size=batch * time))
    mask = torch.tensor(bits).reshape(batch, time)
    packed = pack_mask(mask)
    restored = unpack_mask(packed, batch, time)
    if all(bits):
        assert packed == b""
        assert restored is None
    else:
        assert restored is not None
        assert torch.equal(restored, mask)


def test_another_size_is_refused() -> None:
    with pytest.raises(ProtocolError):
        unpack_mask(b"\x01", 2, 9)
