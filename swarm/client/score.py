"""Scoring answers: mean loss of the right answer, and how often it is the likelier choice.

In: chat samples and the choices an answer is one of. Out: loss (mean over labelled tokens, as in
training) and accuracy. A choice's likelihood is that of its own tokens; what all choices end with
(the end-of-turn token) decides nothing and is left out. Token sequences that are the beginning of
another one that is computed anyway cost nothing: attention is causal.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from swarm.data.chat import IGNORED, encode_sample
from swarm.data.dataset import Message
from swarm.errors import InputError

HiddenStates = Callable[[torch.Tensor], Awaitable[torch.Tensor]]
"""Right-padded token ids [B, T] to hidden states [B, T, D] after the last block."""
Logits = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Question:
    """A conversation up to the answer, the choices, and which of them is right."""

    messages: tuple[Message, ...]
    choices: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Score:
    loss: float
    accuracy: float
    questions: int


@dataclass(frozen=True)
class _Query:
    """Log-probability wanted: of `tokens` after the first `start` ids of `ids`."""

    ids: tuple[int, ...]
    start: int
    tokens: tuple[int, ...]


async def score(
    questions: Sequence[Question],
    tokenizer: Any,
    logits: Logits,
    workers: Sequence[HiddenStates],
    *,
    batch_size: int = 16,
    max_length: int = 2048,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Score all questions, the batches shared out among `workers` (chains that run side by side)."""
    if not questions:
        raise InputError("there is nothing to score")
    queries = [_queries(question, tokenizer, max_length) for question in questions]
    rows = sorted(_rows([query for group in queries for query in group]), key=len)
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    by_row: dict[tuple[int, ...], list[_Query]] = {row: [] for row in rows}
    host = {query: _host(query, by_row) for group in queries for query in group}
    for query, row in host.items():
        by_row[row].append(query)
    results: dict[_Query, float] = {}
    todo = iter(list(enumerate(batches)))

    async def work(hidden_states: HiddenStates) -> None:
        for number, batch in todo:
            width = max(len(row) for row in batch)
            ids_BT = torch.tensor([list(row) + [0] * (width - len(row)) for row in batch])
            hidden_BTD = await hidden_states(ids_BT)
            for index, row in enumerate(batch):
                for query in by_row[row]:
                    results[query] = await asyncio.to_thread(_log_probability, hidden_BTD[index], query, logits)
            if progress is not None:
                progress(number + 1, len(batches))

    async with asyncio.TaskGroup() as tasks:
        for worker in workers:
            tasks.create_task(work(worker))
    loss_sum = sum(-results[group[0]] for group in queries)
    tokens = sum(len(group[0].tokens) for group in queries)
    hits = 0
    for question, group in zip(questions, queries, strict=True):
        likelihoods = [results[query] for query in group[1:]]
        hits += likelihoods.index(max(likelihoods)) == question.right
    return Score(loss_sum / tokens, hits / len(questions), len(questions))


def _queries(question: Question, tokenizer: Any, max_length: int) -> list[_Query]:
    """The labelled tokens of the right answer first (for the loss), then each choice's own tokens."""
    labelled = []
    for choice in question.choices:
        sample = encode_sample(tokenizer, (*question.messages, Message("assistant", choice)), max_length)
        start = next(i for i, label in enumerate(sample.labels) if label != IGNORED)
        labelled.append((sample.input_ids, start, tuple(i for i in sample.labels if i != IGNORED)))
    shared_end = 0
    for column in zip(*(tokens[::-1] for _, _, tokens in labelled), strict=False):
        if len(set(column)) > 1:
            break
        shared_end += 1
    ids, start, tokens = labelled[question.right]
    found = [_Query(ids[: start + len(tokens) - 1], start, tokens)]
    for ids, start, tokens in labelled:
        own = tokens[: len(tokens) - shared_end]
        if not own:
            raise InputError("one choice is the ending of another", "make the choices differ in their beginnings")
        found.append(_Query(ids[: start + len(own) - 1], start, own))
    return found


def _rows(queries: Sequence[_Query]) -> list[tuple[int, ...]]:
    """The token sequences that must be computed: those that no other one begins with."""
    kept: list[tuple[int, ...]] = []
    for ids in sorted({query.ids for query in queries}, reverse=True):
        # In descending order a sequence follows directly after one it is a beginning of.
        if not kept or kept[-1][: len(ids)] != ids:
            kept.append(ids)
    return kept


def _host(query: _Query, rows: dict[tuple[int, ...], list[_Query]]) -> tuple[int, ...]:
    if query.ids in rows:
        return query.ids
    return next(row for row in rows if row[: len(query.ids)] == query.ids)


def _log_probability(hidden_TD: torch.Tensor, query: _Query, logits: Logits) -> float:
    positions = slice(query.start - 1, query.start - 1 + len(query.tokens))
    with torch.inference_mode():
        table_NV = logits(hidden_TD[positions]).float().log_softmax(dim=-1)
    return float(table_NV.gather(1, torch.tensor(query.tokens).unsqueeze(1)).sum())
