"""A node measures its own compute: what one block takes to decode, to prefill and to train on this device.

In: the views it serves. Out: seconds, medians of a few runs on random activations; nothing is kept, and no
session is touched. Compute thread only.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from node.loss import label_loss
from node.stage import AdapterStage
from swarm.compute import settle
from swarm.model.shard import Head, View

_CONTEXT = 4
"""Columns in the cache while decoding is timed: few, so that filling it for eight rows costs a slow CPU little.
At the lengths of most sessions a step is bound by the weights, not by the cache."""
_PREFILL_TOKENS = 128
_LEAST_PREFILL_TOKENS = 16
_MOST_RUNS = 15
Clock = Callable[[], float]


@dataclass(frozen=True)
class Speed:
    """As a node's record tells it."""

    decode_s_per_block: float
    decode8_s_per_block: float
    prefill_tokens_per_s: float
    """Through the whole view."""
    rows8: bool = True
    """Whether eight rows fitted; if not, `decode8_s_per_block` is eight steps of one."""


def measure_speed(
    view: View,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    budget_s: float = 3.0,
    clock: Clock = time.perf_counter,
) -> Speed:
    """Time the view at one and at eight rows, and a prefill chunk as long as the budget allows.

    `width`: of the hidden states. A device so slow that one step takes more than the budget takes two steps of
    each kind all the same. Raises torch.OutOfMemoryError if not even one row fits.
    """
    blocks, share_s = len(view.span), budget_s / 3

    def hidden(rows: int, tokens: int) -> torch.Tensor:
        return torch.randn(rows, tokens, width, dtype=dtype, device=device)

    def decode_s(rows: int) -> float:
        cache = view.new_cache()
        view.forward(hidden(rows, _CONTEXT), 0, cache)
        position = _CONTEXT
        step_BTD = hidden(rows, 1)

        def step() -> None:
            nonlocal position
            view.forward(step_BTD, position, cache)
            position += 1

        return _median_s(step, share_s, device, clock)

    with torch.inference_mode():
        one_s = decode_s(1)
        try:
            eight_s, fits = decode_s(8), True
        except torch.OutOfMemoryError:
            eight_s, fits = 8 * one_s, False
        # A token of a chunk takes at most what a row of eight does; one warm-up and one run must fit.
        tokens = max(_LEAST_PREFILL_TOKENS, min(_PREFILL_TOKENS, int(share_s / 2 / (eight_s / 8))))
        prompt_BTD = hidden(1, tokens)
        prefill_s = _median_s(lambda: view.forward(prompt_BTD, 0, view.new_cache()), share_s, device, clock)
    return Speed(one_s / blocks, eight_s / blocks, tokens / prefill_s, fits)


def training_cost(
    stage: AdapterStage, head: Head, ids_BT: torch.Tensor, clock: Clock = time.perf_counter
) -> tuple[float, float]:
    """Seconds that one block and the head take for a forward and a backward pass of these tokens, all labelled.

    The least of three runs. Nothing is trained, and nothing is charged: for when a node is otherwise idle.
    """
    blocks_s, head_s = [], []

    def now_s() -> float:
        settle(head.device)
        return clock()

    for _ in range(3):
        began = now_s()
        output = stage.forward(0, head.embed(ids_BT).detach(), input_grad=True)
        forward_s = now_s() - began
        began = now_s()
        _, gradient = label_loss(head, output, ids_BT)
        head_s.append(now_s() - began)
        began = now_s()
        stage.backward(0, gradient)
        blocks_s.append(forward_s + now_s() - began)
        stage.skip()
    return min(blocks_s) / len(stage.span), min(head_s)


def _median_s(step: Callable[[], object], budget_s: float, device: torch.device, clock: Clock) -> float:
    """The median of 1 to 15 runs, as many as the budget allows, after one that warms up."""
    times_s: list[float] = []
    end_s = clock() + budget_s
    step()
    while not times_s or (len(times_s) < _MOST_RUNS and clock() < end_s):
        settle(device)
        start_s = clock()
        step()
        settle(device)
        times_s.append(clock() - start_s)
    return statistics.median(times_s)
