"""Sessions in one batch are each what they are alone, whatever their lengths, paddings and windows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig

from node.kv import SessionCache
from swarm.errors import SessionError
from swarm.ids import Span
from swarm.model.checkpoint import Checkpoint
from swarm.model.rows import Row, forward_rows, prepare_rows, supports_rows
from swarm.model.shard import Shard, View

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
}
CONFIGS = {"full": LlamaConfig(**_SIZES), "sliding": MistralConfig(**_SIZES, sliding_window=8)}


def view_of(folder: Path, config: PreTrainedConfig) -> View:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return Shard(Checkpoint.open(str(folder)), Span(0, 3), torch.float32, torch.device("cpu")).view(Span(1, 3))


def grow(
    view: View, cache: SessionCache, hidden: torch.Tensor, position: int, mask: torch.Tensor | None
) -> torch.Tensor:
    time = hidden.shape[1]
    cache.prepare(position, time, [], mask)
    output = view.forward(hidden, cache.length, cache.kv, mask_BS=cache.mask_BS, positions_BT=cache.positions(time))
    cache.grew(time)
    return output


@pytest.mark.parametrize("kind", CONFIGS)
@torch.inference_mode()
def test_a_batch_of_sessions_is_each_of_them_alone(kind: str, tmp_path: Path) -> None:
    view = view_of(tmp_path, CONFIGS[kind])
    assert supports_rows(view)
    prepare_rows(view)
    torch.manual_seed(1)
    lengths, batches = (3, 11, 20), (1, 2, 1)
    together = [SessionCache(view, batch) for batch in batches]
    alone = [SessionCache(view, batch) for batch in batches]
    for number, (length, batch) in enumerate(zip(lengths, batches, strict=True)):
        hidden = torch.randn(batch, length, 64)
        mask = None
        if number == 1:
            mask = torch.ones((2, length), dtype=torch.bool)
            mask[0, :4] = False
        grow(view, together[number], hidden, 0, mask)
        grow(view, alone[number], hidden, 0, mask)
    for _ in range(12):
        steps = [torch.randn(batch, 1, 64) for batch in batches]
        expected = [grow(view, cache, step, cache.length, None) for cache, step in zip(alone, steps, strict=True)]
        for cache in together:
            cache.prepare(cache.length, 1, [], None)
        rows = [Row(cache.kv, cache.batch, cache.mask_BS) for cache in together]
        positions = torch.cat([cache.positions(1) for cache in together])
        output = forward_rows(view, torch.cat(steps), positions, rows)
        for cache in together:
            cache.grew(1)
        assert torch.allclose(output, torch.cat(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
@torch.inference_mode()
def test_a_cache_that_went_back_is_as_if_it_had_never_gone_on(kind: str, tmp_path: Path) -> None:
    view = view_of(tmp_path, CONFIGS[kind])
    torch.manual_seed(2)
    hidden = torch.randn(1, 30, 64)
    fresh, rolled = SessionCache(view, 1), SessionCache(view, 1)
    expected = grow(view, fresh, hidden[:, :20], 0, None)
    grow(view, rolled, hidden[:, :17], 0, None)
    grow(view, rolled, torch.randn(1, 9, 64), 17, None)
    output = grow(view, rolled, hidden[:, 17:20], 17, None)
    assert rolled.length == 20
    assert torch.allclose(output, expected[:, 17:], rtol=1e-5, atol=1e-5)
    step = torch.randn(1, 1, 64)
    assert torch.allclose(grow(view, rolled, step, 20, None), grow(view, fresh, step, 20, None), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_rows_move_with_their_masks(tmp_path: Path) -> None:
    view = view_of(tmp_path, CONFIGS["full"])
    hidden = torch.randn(2, 6, 64)
    mask = torch.ones((2, 6), dtype=torch.bool)
    mask[1, :3] = False
    moved = SessionCache(view, 2)
    grow(view, moved, hidden, 0, mask)
    plain = SessionCache(view, 3)
    grow(view, plain, hidden[[1, 1, 0]], 0, mask[[1, 1, 0]])
    step = torch.randn(3, 1, 64)
    moved.prepare(6, 1, [1, 1, 0], None)
    output = view.forward(step, 6, moved.kv, mask_BS=moved.mask_BS, positions_BT=moved.positions(1))
    assert torch.allclose(output, grow(view, plain, step, 6, None), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_a_window_says_when_it_cannot_go_back(tmp_path: Path) -> None:
    view = view_of(tmp_path, CONFIGS["sliding"])
    cache = SessionCache(view, 1)
    for _ in range(10):
        grow(view, cache, torch.randn(1, 30, 64), cache.length, None)
    with pytest.raises(SessionError):
        cache.prepare(40, 1, [], None)


@torch.inference_mode()
def test_a_gap_is_refused(tmp_path: Path) -> None:
    cache = SessionCache(view_of(tmp_path, CONFIGS["full"]), 1)
    with pytest.raises(SessionError, match="does not follow"):
        cache.prepare(1, 1, [], None)
