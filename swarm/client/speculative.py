"""Several tokens a trip: guess what follows, have the swarm compute all of it at once, keep what is right.

In: a session, a prompt, and a drafter (`swarm.client.drafting`). Out: tokens, distributed exactly as
without guessing: under greedy decoding the same ones, under sampling draws from the same distribution
(Leviathan et al., 2023; Chen et al., 2023). Guesses that were not drawn at random, such as looked-up
ones, even give the text that plain sampling with the same seed gives, as far as logits of several columns
at once equal those of one at a time. Never sends more than one window at a time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

import torch

from swarm.client.drafting import MAX_DRAFT, Drafter, Guess, Pace, choose
from swarm.client.sampling import Sampler, Sampling, probabilities


class DecodingSession(Protocol):
    """What is needed of a session (`swarm.client.session.Session`)."""

    @property
    def length(self) -> int: ...

    def check_context(self, columns: int) -> None: ...

    async def forward(
        self, ids_BT: torch.Tensor, *, position: int | None = None, last_only: bool = False
    ) -> torch.Tensor: ...

    async def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...


class Judge:
    """Decides which guesses stand, and draws the token after them. One a text; pure but for its seed."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._sampler = Sampler(sampling)
        self._generator = torch.Generator().manual_seed(sampling.seed ^ 0x1D9E)

    def judge(self, logits_TV: torch.Tensor, draft: Sequence[Guess]) -> tuple[int, int]:
        """How many guesses stand, and the token after those.

        logits_TV: row i is what follows the first i guesses; T = len(draft) + 1.
        """
        for index, guess in enumerate(draft):
            if guess.probs_V is None or self._sampling.temperature == 0.0:
                # A draw from the target equals the guess with the target's own probability of it, and
                # is distributed as it should be if not.
                token = self._sampler.pick(logits_TV[index])
                if token != guess.token:
                    return index, token
            else:
                replacement = self._reject(probabilities(logits_TV[index], self._sampling), guess)
                if replacement is not None:
                    return index, replacement
        return len(draft), self._sampler.pick(logits_TV[len(draft)])

    def _reject(self, target_V: torch.Tensor, guess: Guess) -> int | None:
        """None if the guess stands (with probability min(1, p/q)); else a draw from max(p - q, 0)."""
        assert guess.probs_V is not None
        drawn_V = torch.zeros_like(target_V)  # vocabularies of one tokenizer may be padded differently
        width = min(len(drawn_V), len(guess.probs_V))
        drawn_V[:width] = guess.probs_V[:width]
        p = float(target_V[guess.token]) if guess.token < len(target_V) else 0.0
        q = float(guess.probs_V[guess.token])
        if float(torch.rand((), generator=self._generator)) * q < p:
            return None
        rest_V = (target_V - drawn_V).clamp_(min=0.0)
        # Nothing is left where the two are equal but for rounding.
        return int(torch.multinomial(rest_V if float(rest_V.sum()) > 0 else target_V, 1, generator=self._generator))


async def speculate(
    session: DecodingSession,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    drafter: Drafter,
    stop: frozenset[int] = frozenset(),
    *,
    pace: Pace | None = None,
    position: int | None = None,
) -> AsyncIterator[int]:
    """Yield new tokens one by one, as they are certain; the stop token itself is not yielded.

    drafter: has observed what is kept of the session, and nothing else. position: columns of the session to
    keep, if not all. pace: what earlier texts have taught; learns from this one. To go on afterwards, give
    the last token again, `position` = kept + len(prompt_ids) + tokens yielded - 1 (the session may hold
    guesses behind that) and a new drafter. Raises what the session raises.
    """
    pace = pace or Pace()
    judge = Judge(sampling)
    at = session.length if position is None else position
    session.check_context(at + len(prompt_ids) + max_new_tokens)
    if max_new_tokens <= 0:
        return
    hidden_BTD = await session.forward(torch.tensor([list(prompt_ids)]), position=at, last_only=True)
    logits_BTV = await session.logits(hidden_BTD)
    await asyncio.to_thread(drafter.observe, prompt_ids)
    at += len(prompt_ids)
    draft: list[Guess] = []
    left = max_new_tokens
    while True:
        accepted, token = await asyncio.to_thread(judge.judge, logits_BTV[0], draft)
        pace.judged(draft, accepted)
        new = [guess.token for guess in draft[:accepted]] + [token]
        at += accepted
        for each in new:
            if each in stop:
                return
            yield each
        left -= len(new)
        if left <= 0:
            return
        # A trip yields one token more than it has guesses.
        draft = await asyncio.to_thread(_next_draft, drafter, new, pace, min(left - 1, MAX_DRAFT))
        window = [token, *(guess.token for guess in draft)]
        began_s = time.perf_counter()
        hidden_BTD = await session.forward(torch.tensor([window]), position=at)
        logits_BTV = await session.logits(hidden_BTD)
        pace.trip_took(len(window), time.perf_counter() - began_s)
        at += 1


def _next_draft(drafter: Drafter, new: Sequence[int], pace: Pace, limit: int) -> list[Guess]:
    drafter.observe(new)
    return choose(drafter, pace, limit)
