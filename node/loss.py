"""The loss at the head of a training step, and its gradient. On the computing thread that trains only."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn import functional

from swarm.model.shard import Head

LOGITS_BYTES = 256 * 2**20
"""About what the logits of the positions that are computed at once may take: they are as wide as the vocabulary."""
_ROWS = {"cpu": (1, 64), "cuda": (64, 4096)}
"""The fewest and the most positions at once: below, products of few rows waste a GPU; above, who is served waits."""
_WIDE_TENSORS = 3  # logits, the same in float32, their probabilities


def rows_at_once(vocabulary: int, device: torch.device) -> int:
    """Positions whose logits are computed at once."""
    fewest, most = _ROWS[device.type]
    return max(fewest, min(most, LOGITS_BYTES // _row_bytes(vocabulary)))


def logits_bytes(vocabulary: int, device: torch.device) -> int:
    """What the logits of so many positions take, with all that is made of them."""
    return rows_at_once(vocabulary, device) * _row_bytes(vocabulary)


def _row_bytes(vocabulary: int) -> int:
    return _WIDE_TENSORS * torch.float32.itemsize * vocabulary


def label_loss(
    head: Head,
    hidden_BTD: torch.Tensor,
    labels_BT: torch.Tensor,
    share: float = 1.0,
    within: Callable[[], AbstractContextManager[object]] = nullcontext,
    give_way: Callable[[], None] = lambda: None,
) -> tuple[float, torch.Tensor]:
    """Mean cross-entropy over labelled positions times `share`, and its gradient [B, T, D].

    The next-token shift and the mean over the batch's labelled tokens are those of `transformers`'
    causal-LM loss; unlabelled positions are left out before the LM head instead of after it. `share`: the
    part of a batch's labelled tokens that these are (1 changes no bit). `within`: what logits are computed in.
    `give_way` is called between and after the products of every few positions, and within them (`Head.logits`).
    """
    gradient_BTD = torch.zeros_like(hidden_BTD)
    if share == 0.0:  # no label: a mean over nothing would not be a number
        return 0.0, gradient_BTD
    targets_BT = labels_BT[:, 1:].to(hidden_BTD.device)
    counted = targets_BT != -100
    targets_N, hidden_ND = targets_BT[counted], hidden_BTD[:, :-1][counted].detach()
    if not len(targets_N):
        return math.nan, gradient_BTD
    each, total = share / len(targets_N), 0.0
    gradients = []
    rows = rows_at_once(head.vocabulary, hidden_BTD.device)
    for targets_R, hidden_RD in zip(torch.split(targets_N, rows), torch.split(hidden_ND, rows), strict=True):
        summed, gradient_RD = _summed_loss(head, hidden_RD, targets_R, each, within(), give_way)
        total += summed
        gradients.append(gradient_RD)
        give_way()
    gradient_BTD[:, :-1][counted] = torch.cat(gradients)
    return total * each, gradient_BTD


def _summed_loss(
    head: Head,
    hidden_RD: torch.Tensor,
    targets_R: torch.Tensor,
    each: float,
    within: AbstractContextManager[object],
    give_way: Callable[[], None],
) -> tuple[float, torch.Tensor]:
    """Summed cross-entropy, and the gradient [R, D] of that sum times `each`."""
    with torch.enable_grad():
        hidden = hidden_RD.requires_grad_(True)
        with within:
            logits_RV = head.logits(hidden, give_way)
        give_way()
        with torch.no_grad():
            # As cross_entropy and its backward pass have it, but in one tensor as wide as the vocabulary instead of
            # three: the probabilities replace their logarithms, and become the gradient.
            log_p_RV = functional.log_softmax(logits_RV.float(), dim=-1)
            summed = float(functional.nll_loss(log_p_RV, targets_R, reduction="sum"))
            grad_RV = log_p_RV.exp_().mul_(each)
            grad_RV[torch.arange(len(targets_R), device=grad_RV.device), targets_R] -= each
        give_way()
        torch.autograd.backward(logits_RV, grad_RV.to(logits_RV.dtype))
    assert hidden.grad is not None
    return summed, hidden.grad
