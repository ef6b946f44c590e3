"""Guesses never change what is decoded: the same text greedily, the same distribution under sampling."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from swarm.client.drafting import Assistant, Guess, Pace, PromptLookup, choose
from swarm.client.sampling import Sampler, Sampling, probabilities
from swarm.client.speculative import Judge, speculate
from swarm.errors import ContextTooLong

VOCAB = 5
Target = Callable[[Sequence[int]], torch.Tensor]
TOKENS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)


def target_of(seed: int, order: int = 2, sharpness: float = 2.0) -> Target:
    """An arbitrary model: logits [V] as a function of the last `order` tokens."""
    table = torch.randn(VOCAB**order, VOCAB, generator=torch.Generator().manual_seed(seed)) * sharpness

    def logits(ids: Sequence[int]) -> torch.Tensor:
        index = 0
        for token in list(ids)[-order:]:
            index = index * VOCAB + token
        return table[index]

    return logits


class ModelSession:
    """A session whose model is a function; like the real one, it keeps columns and goes back by `position`."""

    def __init__(self, target: Target, context_length: int = 10_000) -> None:
        self._target = target
        self._ids: list[int] = []
        self._context_length = context_length
        self.trips = 0

    @property
    def length(self) -> int:
        return len(self._ids)

    def check_context(self, columns: int) -> None:
        if columns > self._context_length:
            raise ContextTooLong(f"{columns} columns")

    async def forward(
        self, ids_BT: torch.Tensor, *, position: int | None = None, last_only: bool = False
    ) -> torch.Tensor:
        at = self.length if position is None else position
        assert 0 <= at <= self.length
        self.trips += 1
        new = ids_BT[0].tolist()
        self._ids = self._ids[:at] + new
        ends = range(at + len(new) if last_only else at + 1, at + len(new) + 1)
        return torch.stack([self._target(self._ids[:end]) for end in ends]).unsqueeze(0)

    async def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


class Scripted:
    """Guesses whatever it was told, right or wrong."""

    def __init__(self, guesses: Sequence[int], probs_V: torch.Tensor | None = None) -> None:
        self._guesses = guesses
        self._probs_V = probs_V
        self._count = 0

    def observe(self, ids: Sequence[int]) -> None:
        self._count += len(ids)

    def propose(self) -> Iterator[Guess]:
        for offset in range(8):
            yield Guess(self._guesses[(self._count + offset) % len(self._guesses)], ("match", 8), self._probs_V)


async def collect(tokens: AsyncIterator[int]) -> list[int]:
    return [token async for token in tokens]


def plain(target: Target, prompt: Sequence[int], count: int, sampling: Sampling, stop: frozenset[int]) -> list[int]:
    sampler, ids = Sampler(sampling), list(prompt)
    while len(ids) < len(prompt) + count:
        token = sampler.pick(target(ids))
        if token in stop:
            break
        ids.append(token)
    return ids[len(prompt) :]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    TOKENS,
    st.integers(0, 40),
    st.one_of(st.none(), TOKENS),
    st.sampled_from([Sampling(), Sampling(0.8, seed=3), Sampling(1.2, top_p=0.7, top_k=3, seed=9)]),
    st.sets(st.integers(0, VOCAB - 1), max_size=1),
)
async def test_the_text_is_the_one_without_guesses(
    seed: int, prompt: list[int], count: int, script: list[int] | None, sampling: Sampling, stop: set[int]
) -> None:
    target, ends = target_of(seed), frozenset(stop)
    drafter = PromptLookup() if script is None else Scripted(script)
    tokens = await collect(speculate(ModelSession(target), prompt, count, sampling, drafter, ends))
    assert tokens == plain(target, prompt, count, sampling, ends)


@pytest.mark.parametrize("sampling", [Sampling(1.0, seed=1), Sampling(0.7, top_p=0.9, top_k=4, seed=2)])
@pytest.mark.parametrize("agreement", [0.0, 0.6])
def test_one_judged_token_is_distributed_as_the_target(sampling: Sampling, agreement: float) -> None:
    generator = torch.Generator().manual_seed(17)
    target_V, other_V = torch.randn(2, VOCAB, generator=generator) * 2
    p = probabilities(target_V, sampling)
    q = probabilities(agreement * target_V + (1 - agreement) * other_V, Sampling(1.0))
    judge, draws, counts = Judge(sampling), 6_000, torch.zeros(VOCAB)
    logits_TV = torch.stack([target_V, target_V])
    for _ in range(draws):
        guess = Guess(int(torch.multinomial(q, 1, generator=generator)), ("assistant", 5), q)
        accepted, token = judge.judge(logits_TV, [guess])
        counts[guess.token if accepted else token] += 1
    assert _chi_squared(counts, p * draws) < 25.0  # 4 degrees of freedom: 5e-5


async def test_whole_texts_have_the_probabilities_of_plain_sampling() -> None:
    """Every text of two tokens, counted, against its probability by the chain rule."""
    target, sampling, draws = target_of(5, sharpness=1.0), Sampling(1.0), 3_000
    expected = {}
    for text in itertools.product(range(VOCAB), repeat=2):
        probability, ids = 1.0, [0, 1]
        for token in text:
            probability *= float(probabilities(target(ids), sampling)[token])
            ids.append(token)
        expected[text] = probability
    q = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.1])
    generator = torch.Generator().manual_seed(4)

    class Random(Scripted):
        def propose(self) -> Iterator[Guess]:
            while True:
                yield Guess(int(torch.multinomial(q, 1, generator=generator)), ("assistant", 9), q)

    counts = dict.fromkeys(expected, 0)
    for seed in range(draws):
        drafted = speculate(ModelSession(target), [0, 1], 2, Sampling(1.0, seed=seed), Random([0]))
        counts[tuple(await collect(drafted))] += 1  # type: ignore[index]
    keys = list(expected)
    statistic = _chi_squared(
        torch.tensor([float(counts[k]) for k in keys]), torch.tensor([expected[k] for k in keys]) * draws
    )
    assert statistic < 24 + 5 * (2 * 24) ** 0.5  # 24 degrees of freedom


def _chi_squared(counts: torch.Tensor, expected: torch.Tensor) -> float:
    possible = expected > 0
    assert float(counts[~possible].sum()) == 0
    return float(((counts - expected)[possible] ** 2 / expected[possible]).sum())


@given(st.integers(0, 10_000), st.floats(0.1, 3), st.floats(0.05, 1), st.integers(0, VOCAB))
def test_probabilities_are_what_the_sampler_draws_from(seed: int, temperature: float, top_p: float, top_k: int) -> None:
    logits_V = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    sampling = Sampling(temperature, top_p, top_k, seed=seed)
    drawn = torch.multinomial(probabilities(logits_V, sampling), 1, generator=torch.Generator().manual_seed(seed))
    assert Sampler(sampling).pick(logits_V) == int(drawn)


class FarPace(Pace):
    """A pace whose trips take what they take on long links."""

    def trip_took(self, columns: int, seconds: float) -> None:
        super().trip_took(columns, 0.2 + 0.005 * columns)

    def draft_took(self, guesses: int, seconds: float) -> None:
        pass


async def test_a_text_that_repeats_itself_takes_few_trips() -> None:
    def target(ids: Sequence[int]) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor((ids[-1] + 1) % VOCAB), VOCAB).float() * 10

    session, pace = ModelSession(target), FarPace()
    tokens = await collect(speculate(session, [0], 60, Sampling(), PromptLookup(), pace=pace))
    assert tokens == [(i + 1) % VOCAB for i in range(60)]
    assert session.trips <= 20
    assert pace.accepted == 60 - session.trips


async def test_going_on_after_a_text_and_a_context_that_is_full() -> None:
    target, drafter = target_of(8), PromptLookup()
    session = ModelSession(target, context_length=40)
    first = await collect(speculate(session, [1, 2, 3], 11, Sampling(), drafter))
    kept = 3 + len(first) - 1
    drafter = PromptLookup()
    drafter.observe([1, 2, 3, *first[:-1]])
    again = speculate(session, [first[-1], 4], 9, Sampling(), drafter, position=kept)
    assert await collect(again) == plain(target, [1, 2, 3, *first, 4], 9, Sampling(), frozenset())
    with pytest.raises(ContextTooLong):
        await collect(speculate(session, [1], 40, Sampling(), drafter))


def test_the_longest_match_is_copied_then_the_latest() -> None:
    lookup = PromptLookup()
    lookup.observe([7, 1, 2, 3, 9, 2, 3, 8, 5, 2, 3, 6, 1, 2, 3])
    first = [guess for guess, _ in zip(lookup.propose(), range(3), strict=False)]
    assert [guess.token for guess in first] == [9, 2, 3]
    assert [guess.kind for guess in first] == [("match", 3), ("match", 4), ("match", 5)]
    lookup.observe([4, 2, 3])  # now three places match with two tokens: the latest of them
    assert next(lookup.propose()).token == 4
    fresh = PromptLookup()
    assert list(fresh.propose()) == []
    fresh.observe([1, 2])
    assert list(fresh.propose()) == []


@given(TOKENS)
def test_a_draft_goes_on_in_the_loop_it_found(ids: list[int]) -> None:
    lookup = PromptLookup()
    lookup.observe([*ids, *ids])
    drafted = [guess.token for guess in lookup.propose()]
    looped = [token for token, _ in zip(itertools.cycle(ids), drafted, strict=False)]
    # Where a token occurs twice, the latest of the longest matches may have a shorter period.
    assert drafted == looped or len(set(ids)) < len(ids)


def learned(fixed_s: float, column_s: float, right: float) -> Pace:
    """What a client knows after a while on such links with guesses that good."""
    pace, guess = Pace(), Guess(0, ("match", 8))
    for turn in range(400):
        columns = 1 + turn % 9
        pace.trip_took(columns, fixed_s + column_s * columns)
        pace.judged([guess], int(turn % 100 < 100 * right))
    return pace


@pytest.mark.parametrize(
    ("fixed_s", "column_s", "right"),
    [(0.2, 0.006, 0.9), (0.2, 0.006, 0.5), (0.3, 0.002, 0.95), (0.02, 0.02, 0.6), (0.004, 0.05, 0.3)],
)
def test_drafts_have_the_length_that_maximises_tokens_a_second(fixed_s: float, column_s: float, right: float) -> None:
    pace = learned(fixed_s, column_s, right)
    assert pace.column_s == pytest.approx(column_s, rel=0.15)

    class Same(Scripted):
        def propose(self) -> Iterator[Guess]:
            return itertools.repeat(Guess(0, ("match", 8)))

    p = pace.acceptance(("match", 8))
    assert p == pytest.approx(right, abs=0.02)

    def tokens_s(count: int) -> float:
        expected: float = sum(p**i for i in range(count + 1))
        return expected / (fixed_s + column_s * (count + 1))

    best = max(range(101), key=tokens_s)
    chosen = len(choose(Same([0]), pace, 100))
    assert tokens_s(chosen) >= 0.97 * tokens_s(best)


def test_a_pause_is_not_taken_for_a_trip() -> None:
    pace = learned(0.2, 0.005, 0.9)
    pace.trip_took(4, 30.0)
    assert pace.fixed_s < 0.3


@pytest.fixture(scope="module")
def models() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """A target and an assistant that mostly agrees with it: the same weights, disturbed."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    target = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, initializer_range=0.3, **shape)).eval()
    assistant = LlamaForCausalLM(target.config).eval()
    assistant.load_state_dict(target.state_dict())
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter += 0.02 * torch.randn(parameter.shape)
    return target, assistant


@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_an_assistant_model_saves_trips_and_keeps_its_cache_right(
    models: tuple[LlamaForCausalLM, LlamaForCausalLM], temperature: float
) -> None:
    model, small = models

    @torch.inference_mode()
    def target(ids: Sequence[int]) -> torch.Tensor:
        return model(torch.tensor([list(ids)])).logits[0, -1]

    sampling, prompt, count = Sampling(temperature, seed=5), [3, 1, 4, 1, 5], 30
    session, pace, assistant = ModelSession(target), FarPace(), Assistant(small, sampling)
    tokens = await collect(speculate(session, prompt, count, sampling, assistant, pace=pace))
    assert len(tokens) == count
    if not temperature:
        assert tokens == plain(target, prompt, count, sampling, frozenset())
    assert session.trips < 0.8 * count
    # What the cache holds after all those turns back is what a fresh one would.
    fresh = Assistant(small, sampling)
    fresh.observe([*prompt, *tokens])
    assistant.observe([*prompt, *tokens][len(assistant._ids) :])
    torch.testing.assert_close(assistant._logits(assistant._ids), fresh._logits(fresh._ids), rtol=1e-4, atol=1e-4)
