"""The loss is transformers' causal-LM loss, whatever part of the batch carries labels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from node.loss import label_loss
from swarm.model.checkpoint import Checkpoint
from swarm.model.shard import Head
from tests.unit.node.pipelines import CPU


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_loss_and_gradient_are_those_of_cross_entropy(tiny: Path, share: float) -> None:
    head = Head(Checkpoint.open(str(tiny)), torch.float32, CPU)
    hidden = torch.randn(3, 9, head.width)
    labels = torch.randint(0, 64, (3, 9))
    labels[0, :5] = labels[2, 4:] = -100
    loss, gradient = label_loss(head, hidden, labels, share)
    leaf = hidden.clone().requires_grad_(True)
    logits = head.logits(leaf)[:, :-1].flatten(0, 1)
    expected = functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)
    torch.autograd.backward(expected * share)
    assert leaf.grad is not None
    assert loss == pytest.approx(float(expected.detach()) * share, rel=1e-6)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-5, atol=1e-8)


def test_without_a_label_there_is_no_gradient(tiny: Path) -> None:
    head = Head(Checkpoint.open(str(tiny)), torch.float32, CPU)
    loss, gradient = label_loss(head, torch.randn(1, 4, head.width), torch.full((1, 4), -100), 0.0)
    assert loss == 0.0
    assert not gradient.any()
