"""Guessing the next tokens of a text cheaply, so that one trip through the swarm can check several.

In: the tokens that are certain so far, in order (`observe`). Out: guesses for what follows, one after the
other (`propose`), each with its kind, the evidence it rests on. `Pace` learns how often each kind comes
true and what a trip costs; `choose` takes guesses for as long as one more raises the expected tokens a
second. Whether a guess is right is decided elsewhere (`swarm.client.speculative`): a bad drafter costs
time, never correctness. Never touches the network. Drafters may compute for long: call them off the event
loop, one call at a time.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from swarm.client.sampling import Sampling, probabilities

Kind = tuple[Literal["match", "assistant"], int]
"""What a guess rests on: so many tokens seen before in this order, or an assistant so sure (in tenths)."""

MAX_DRAFT = 48
"""Guesses a trip; even certain ones stop paying where nodes are busy with them for longer than a trip."""


@dataclass(frozen=True)
class Guess:
    """One guessed token.

    The kind may depend on what comes before the token and on `probs_V`, never on which token was drawn:
    `choose` drops guesses by their kind, and to drop unlikely draws would shift what the rest stands for.
    """

    token: int
    kind: Kind
    probs_V: torch.Tensor | None = None
    """The distribution that it was drawn from; None: it was not drawn at random."""


class Drafter(Protocol):
    """Guesses for one text."""

    def observe(self, ids: Sequence[int]) -> None:
        """Tokens that follow for certain."""

    def propose(self) -> Iterator[Guess]:
        """What may follow, token by token without end; each assumes that those before it are right."""


class PromptLookup:
    """Copies what followed where the text last went as it does now: the longest match, then the latest.

    (Saxena, "Prompt lookup decoding", 2023; there the first match of a fixed length is taken.)
    """

    MAX_MATCH = 8
    """Longer matches are told apart when the best is sought, but are of one kind."""
    _MAX_COMPARED = 64
    _MAX_PLACES = 256
    """A frequent token occurs everywhere: so many places are compared, the latest."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._places: defaultdict[int, list[int]] = defaultdict(list)

    def observe(self, ids: Sequence[int]) -> None:
        for token in ids:
            self._places[token].append(len(self._ids))
            self._ids.append(token)

    def propose(self) -> Iterator[Guess]:
        start, length = self._longest_match()
        if not length:
            return
        count = len(self._ids)
        for offset in range(MAX_DRAFT):
            # Reading on into the draft itself continues a loop for as long as is wanted.
            at = start + offset if start + offset < count else start + offset % (count - start)
            yield Guess(self._ids[at], ("match", min(self.MAX_MATCH, length + offset)))

    def _longest_match(self) -> tuple[int, int]:
        """Where the text went on after the longest earlier match of its end, and the match's length."""
        ids, last, best, best_length = self._ids, len(self._ids) - 1, 0, 0
        if not ids:
            return best, best_length
        for place in reversed(self._places[ids[last]][-self._MAX_PLACES - 1 : -1]):
            length = 1
            while length < min(self._MAX_COMPARED, place + 1) and ids[place - length] == ids[last - length]:
                length += 1
            if length > best_length:
                best, best_length = place + 1, length
        return best, best_length


class Assistant:
    """A smaller `transformers` causal LM with the same tokenizer, run here with a KV cache of its own.

    Under sampling it draws from its own warped distribution, which a guess carries (Leviathan et al.,
    2023); greedily it takes the likeliest token.
    """

    def __init__(self, model: Any, sampling: Sampling) -> None:
        self._model = model.eval()
        self._sampling = sampling
        # Apart from the stream that the text itself is drawn with.
        self._generator = torch.Generator().manual_seed(sampling.seed ^ 0x5EED)
        self._ids: list[int] = []
        self._cached: list[int] = []
        self._cache: Any = None

    def observe(self, ids: Sequence[int]) -> None:
        self._ids += ids

    def propose(self) -> Iterator[Guess]:
        if not self._ids:
            return
        ids = list(self._ids)
        for _ in range(MAX_DRAFT):
            logits_V = self._logits(ids)
            if self._sampling.temperature == 0.0:
                confidence = float(logits_V.softmax(-1).max())
                guess = Guess(int(logits_V.argmax()), ("assistant", _tenth(confidence)))
            else:
                probs_V = probabilities(logits_V, self._sampling)
                token = int(torch.multinomial(probs_V, 1, generator=self._generator))
                guess = Guess(token, ("assistant", _tenth(float(probs_V.max()))), probs_V)
            yield guess
            ids.append(guess.token)

    @torch.inference_mode()
    def _logits(self, ids: list[int]) -> torch.Tensor:
        """What follows `ids`; what the cache holds of them is not computed again."""
        keep = 0
        for held, wanted in zip(self._cached, ids[:-1], strict=False):
            if held != wanted:
                break
            keep += 1
        if self._cache is not None and keep < len(self._cached):
            self._cache.crop(keep - len(self._cached))
        out = self._model(torch.tensor([ids[keep:]]), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache, self._cached = out.past_key_values, list(ids)
        logits_V: torch.Tensor = out.logits[0, -1].float().cpu()
        return logits_V


class Pace:
    """What guesses and trips are worth, as learnt so far. One may serve all texts of a client in turn."""

    _PRIOR_GUESSES = 8.0
    _MATCH_PRIOR = (0.2, 0.43, 0.62, 0.73, 0.76, 0.82, 0.82, 0.9)
    """Measured on SmolLM2 rewriting and summarising reviews (docs/experiments.md)."""
    _MEMORY = 0.97
    """How much less each earlier trip counts: links and load change."""
    _PRIOR_COLUMN_S = 0.005
    _PRIOR_SPREAD = 10.0
    """Squared columns: how strongly the prior holds before trips have had different lengths."""

    def __init__(self) -> None:
        self._judged: dict[Kind, tuple[int, int]] = {}
        self._weight = self._columns = self._seconds = 0.0
        self._columns_sq = self._product = 0.0
        self._guess_s = 0.0
        self.trips = self.drafted = self.accepted = 0

    def acceptance(self, kind: Kind) -> float:
        """How likely a guess of this kind is right, given that those before it are."""
        right, judged = self._judged.get(kind, (0, 0))
        source, level = kind
        prior = self._MATCH_PRIOR[level - 1] if source == "match" else 0.15 + 0.08 * level
        return (right + self._PRIOR_GUESSES * prior) / (judged + self._PRIOR_GUESSES)

    def judged(self, draft: Sequence[Guess], accepted: int) -> None:
        """The first `accepted` guesses were right and the next one, if any, was wrong."""
        self.drafted += len(draft)
        self.accepted += accepted
        for index, guess in enumerate(draft[: accepted + 1]):
            right, judged = self._judged.get(guess.kind, (0, 0))
            self._judged[guess.kind] = (right + (index < accepted), judged + 1)

    def trip_took(self, columns: int, seconds: float) -> None:
        """Checking `columns` tokens took so long, head included."""
        if self._weight:
            # Replacing a lost node takes seconds, but is not what trips take.
            seconds = min(seconds, 4.0 * (self.fixed_s + columns * self.column_s))
        self.trips += 1
        forget = self._MEMORY
        self._weight = forget * self._weight + 1.0
        self._columns = forget * self._columns + columns
        self._seconds = forget * self._seconds + seconds
        self._columns_sq = forget * self._columns_sq + columns * columns
        self._product = forget * self._product + columns * seconds

    def draft_took(self, guesses: int, seconds: float) -> None:
        """Drawing up so many guesses took so long."""
        self._guess_s += 0.2 * (seconds / max(1, guesses) - self._guess_s)

    @property
    def column_s(self) -> float:
        """What a trip takes longer for one more token: the slope of a line through the trips so far."""
        if not self._weight:
            return self._PRIOR_COLUMN_S
        spread = self._columns_sq - self._columns**2 / self._weight
        joint = self._product - self._columns * self._seconds / self._weight
        return max(1e-5, (joint + self._PRIOR_SPREAD * self._PRIOR_COLUMN_S) / (spread + self._PRIOR_SPREAD))

    @property
    def fixed_s(self) -> float:
        """What a trip takes however few tokens it checks."""
        if not self._weight:
            return 0.2
        return max(1e-4, (self._seconds - self.column_s * self._columns) / self._weight)

    def worth(self, expected: float, survival: float, drafted: int) -> bool:
        """Whether one more guess, right with all before it with probability `survival`, raises tokens a second.

        expected: tokens that the trip yields with the `drafted` guesses it has.
        """
        more_s = self.column_s + self._guess_s
        return survival * (self.fixed_s + self.column_s + drafted * more_s) > expected * more_s


def choose(drafter: Drafter, pace: Pace, limit: int) -> list[Guess]:
    """At most `limit` guesses. Survival never grows along a draft, so the first that does not pay ends it."""
    draft: list[Guess] = []
    expected = survival = 1.0
    asked, began_s = 0, time.perf_counter()
    for guess in drafter.propose() if limit > 0 else ():
        asked += 1
        survival *= pace.acceptance(guess.kind)
        if not pace.worth(expected, survival, len(draft)):
            break
        draft.append(guess)
        expected += survival
        if len(draft) >= limit:
            break
    pace.draft_took(asked, time.perf_counter() - began_s)
    return draft


def _tenth(probability: float) -> int:
    return min(9, int(10 * probability))
