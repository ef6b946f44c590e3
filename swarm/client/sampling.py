"""From logits to a token: greedy or sampled, as `transformers` defines its warpers. Pure and seeded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from swarm.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy, and then the other fields do not matter."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """Keep only so many of the likeliest tokens; 0 keeps all."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 100.0:
            raise InputError("temperature must be between 0 and 100")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError("top_p must be above 0 and at most 1")
        if self.top_k < 0:
            raise InputError("top_k must be 0 or more")


class Sampler:
    """Draws the tokens of one session; the same seed and logits give the same text."""

    def __init__(self, settings: Sampling) -> None:
        self._settings = settings
        self._generator = torch.Generator().manual_seed(settings.seed)

    def pick(self, logits_V: torch.Tensor) -> int:
        """The next token from one row of logits [V]."""
        if self._settings.temperature == 0.0:
            return int(logits_V.argmax())
        return int(torch.multinomial(probabilities(logits_V, self._settings), 1, generator=self._generator))


def probabilities(logits_V: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The distribution [V] (fp32, on the CPU) that `Sampler.pick` draws from; one-hot when greedy."""
    if sampling.temperature == 0.0:
        return torch.nn.functional.one_hot(logits_V.argmax(), logits_V.numel()).float().cpu()
    scores_V = logits_V.float().cpu() / sampling.temperature
    if sampling.top_k:
        kth = torch.topk(scores_V, min(sampling.top_k, scores_V.numel())).values[-1]
        scores_V = scores_V.masked_fill(scores_V < kth, float("-inf"))
    if sampling.top_p < 1.0:
        ordered_V, index_V = scores_V.sort(descending=False)
        # Drop the tail whose total stays within 1 - top_p; the likeliest token always stays.
        tail_V = ordered_V.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - sampling.top_p
        tail_V[-1] = False
        scores_V = scores_V.masked_fill(torch.zeros_like(tail_V).scatter(0, index_V, tail_V), float("-inf"))
    return scores_V.softmax(dim=-1)
