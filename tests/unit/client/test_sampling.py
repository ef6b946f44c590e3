from __future__ import annotations

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from swarm.client.sampling import Sampler, Sampling
from swarm.errors import InputError


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(0.7, 1.0, 0), (1.0, 0.8, 0), (1.3, 1.0, 5), (0.9, 0.7, 7)]
)
def test_the_distribution_is_that_of_transformers(temperature: float, top_p: float, top_k: int) -> None:
    logits = torch.randn(20, generator=torch.Generator().manual_seed(3)) * 2
    scores = TemperatureLogitsWarper(temperature)(None, logits.unsqueeze(0))
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    expected = scores.softmax(-1)[0]
    sampler = Sampler(Sampling(temperature, top_p, top_k, seed=1))
    draws = torch.bincount(torch.tensor([sampler.pick(logits) for _ in range(4000)]), minlength=20) / 4000
    assert set(draws.nonzero().flatten().tolist()) <= set(expected.nonzero().flatten().tolist())
    assert float((draws - expected).abs().max()) < 0.04


def test_greedy_and_seeds() -> None:
    logits = torch.tensor([0.1, 3.0, 2.9])
    assert Sampler(Sampling()).pick(logits) == 1
    picks = [[Sampler(Sampling(1.0, seed=s)).pick(logits) for _ in range(1)] for s in (5, 5)]
    assert picks[0] == picks[1]


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}])
def test_impossible_settings(settings: dict[str, float]) -> None:
    with pytest.raises(InputError):
        Sampling(**settings)  # type: ignore[arg-type]
