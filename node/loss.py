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
        loss = functional.cross_entropy(logits_NV.float(), targets_BT[counted]) * share
        torch.autograd.backward(loss)
    assert hidden.grad is not None
    return float(loss.detach()), hidden.grad
