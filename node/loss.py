"""The loss at the head of a training step, and its gradient. Compute thread only."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn import functional

from swarm.model.shard import Head


def label_loss(
    head: Head,
    hidden_BTD: torch.Tensor,
    labels_BT: torch.Tensor,
    share: float = 1.0,
    within: AbstractContextManager[object] | None = None,
) -> tuple[float, torch.Tensor]:
    """Mean cross-entropy over labelled positions times `share`, and its gradient [B, T, D].

    The next-token shift and the mean over the batch's labelled tokens are those of `transformers`'
    causal-LM loss; unlabelled positions are left out before the LM head instead of after it. `share`: the
    part of a batch's labelled tokens that these are (1 changes no bit). `within`: what logits are computed in.
    """
    if share == 0.0:  # no label: a mean over nothing would not be a number
        return 0.0, torch.zeros_like(hidden_BTD)
    with torch.enable_grad():
        hidden = hidden_BTD.detach().requires_grad_(True)
        targets_BT = labels_BT[:, 1:].to(hidden.device)
        counted = targets_BT != -100
        with within or nullcontext():
            logits_NV = head.logits(hidden[:, :-1][counted])
        with torch.no_grad():
            # As cross_entropy and its backward pass have it, but in one tensor as wide as the vocabulary instead of
            # three: the probabilities replace their logarithms, and become the gradient.
            targets_N = targets_BT[counted]
            log_p_NV = functional.log_softmax(logits_NV.float(), dim=-1)
            loss = float(functional.nll_loss(log_p_NV, targets_N) * share)
            each = share / len(targets_N)
            grad_NV = log_p_NV.exp_().mul_(each)
            grad_NV[torch.arange(len(targets_N), device=grad_NV.device), targets_N] -= each
        torch.autograd.backward(logits_NV, grad_NV.to(logits_NV.dtype))
    assert hidden.grad is not None
    return loss, hidden.grad
