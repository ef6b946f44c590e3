"""What does packing short samples into shared rows gain, and does it change what is learned?

One process, the node's own training step (`node.step`) on all of SmolLM2-135M with LoRA r 8, float32, no network.
Batches of `--batch` chats about one film sentence each (only the one-word answer is labelled), as the demo trains
on, or of whole reviews of 60 to 120 words with every token labelled. The same samples are stepped on packed and in
rows of their own in turn, in another order every round; each way has its own adapters, so `loss_gap` is the
largest relative difference of their losses over the steps. Tokens are those of samples: padding does not count.

    gain       tokens a second, packed over unpacked: the median over the rounds of neighbours in time
    padding    share of all positions computed that hold no token, packed and unpacked
"""

from __future__ import annotations

import asyncio
import time
from itertools import islice
from typing import Annotated, Any

import torch
import typer

from benchmarks.provenance import provenance, publish, spread
from benchmarks.reviews import movie_reviews
from benchmarks.train_sides import WHOLE, Node, Settings
from node.stage import AdapterStage
from node.step import StepDriver
from swarm.data.batch import Batch, collate
from swarm.data.chat import EncodedSample, encode_sample
from swarm.data.microbatch import split_batch
from swarm.data.packing import collate_packed
from swarm.samples import movie_sentences, review_chat

_WAYS = ("packed", "plain")
_REVIEWS_FROM = 40
"""Earlier ones are for other benchmarks."""


def main(
    rounds: Annotated[int, typer.Option(min=2)] = 6,
    batch: Annotated[int, typer.Option(min=1, help="Samples of a step.")] = 32,
    parts: Annotated[int, typer.Option(min=1, help="Microbatches of a step.")] = 4,
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 1,
    json_to: Annotated[str, typer.Option("--json", help="Write the result to this file; -: to stdout.")] = "",
    save: Annotated[bool, typer.Option("--save", help="Keep the result in benchmarks/results.")] = False,
) -> None:
    """Train packed and unpacked in turn, and compare."""
    torch.set_num_threads(threads)
    origin = provenance(threads)
    result = asyncio.run(_measure(rounds, batch, parts, threads))
    publish("packing", {**result, "batch": batch, "parts": parts, "rounds": rounds}, origin, json_to, save)


async def _measure(rounds: int, size: int, parts: int, threads: int) -> dict[str, Any]:
    node = Node(WHOLE, Settings(threads, "all", 0))
    head, start = node.head(), node.stage.values()
    stages = {"packed": node.stage, "plain": AdapterStage(node.model, WHOLE, node.spec, node.ledger, "plain")}
    pad_id, longest = node.tokenizer.pad_token_id or 0, node.spec.schedule.max_length
    result: dict[str, Any] = {}
    for data in ("sentences", "reviews"):
        seconds: dict[str, list[float]] = {way: [] for way in _WAYS}
        shapes: dict[str, list[int]] = {way: [] for way in _WAYS}
        gaps: list[float] = []
        tokens = 0
        for stage in stages.values():
            stage.reset(start)
            stage.set_moments({})
        for turn in range(rounds + 1):
            samples = _samples(node.tokenizer, data, turn * size, size, longest)
            losses: dict[str, float] = {}
            for way in _WAYS if turn % 2 else reversed(_WAYS):
                driver = StepDriver(head, stages[way], node.compute, None)
                began = time.perf_counter()
                whole = collate_packed(samples, pad_id, parts, longest) if way == "packed" else collate(samples, pad_id)
                batches = split_batch(whole, parts)
                losses[way] = (await driver.step(batches, node.spec.inner.lr)).loss
                if turn:
                    seconds[way].append(time.perf_counter() - began)
                    shapes[way].append(sum(_positions(part.batch) for part in batches))
            if turn:
                tokens += sum(len(sample.input_ids) for sample in samples)
                gaps.append(abs(losses["packed"] / losses["plain"] - 1))
        gain = spread([plain / packed for plain, packed in zip(seconds["plain"], seconds["packed"], strict=True)])
        result[data] = {
            "gain": gain.median,
            "gain_spread": gain,
            "tok_s": {way: round(tokens / sum(seconds[way]), 1) for way in _WAYS},
            "padding": {way: round(1 - tokens / sum(shapes[way]), 4) for way in _WAYS},
            "loss_gap": float(f"{max(gaps):.2g}"),
        }
    node.compute.stop()
    return result


def _positions(batch: Batch) -> int:
    return batch.input_ids_BT.numel()


def _samples(tokenizer: Any, data: str, first: int, count: int, longest: int) -> list[EncodedSample]:
    if data == "sentences":
        sentences = islice(movie_sentences("train", first + count), first, None)
        return [encode_sample(tokenizer, review_chat(s.text, s.label), longest) for s in sentences]
    texts = movie_reviews(range(_REVIEWS_FROM + first, _REVIEWS_FROM + first + count))
    rows = [tuple(tokenizer(text)["input_ids"]) for text in texts]
    return [EncodedSample(row, (-100, *row[1:]), 0) for row in rows]


if __name__ == "__main__":
    typer.run(main)
