"""Greedy text through the swarm is `transformers`' own, token for token, over one node and over two."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from swarm.client.sampling import Sampling
from swarm.client.swarm import SwarmClient
from swarm.model.checkpoint import Checkpoint
from swarm.net.join import parse_join
from swarm.net.view import Hop
from tests.integration.processes import Swarm

NEW_TOKENS = 64
PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain why the sky is blue to a child.",
    "List three uses of copper.",
    "Who wrote Hamlet, and when?",
    "Translate 'good morning' into Spanish.",
    "Give me a recipe for pancakes.",
    "What is 17 times 23?",
    "Describe a volunteer in one sentence.",
    "Why do cats purr?",
    "Summarize the plot of Romeo and Juliet.",
    "Name the planets of the solar system in order.",
    "How does a bicycle stay upright?",
    "Write a Python function that reverses a list.",
    "What is the difference between a virus and a bacterium?",
    "Tell me a joke about computers.",
    "Invent a name for a coffee shop and explain it.",
    "How do I remove a wine stain?",
    "What happened in 1969?",
    "Continue: Once upon a time, in a village without a name,",
]


async def _texts(swarm: Swarm, model: Path, hops: tuple[Hop, ...], name: str) -> list[list[int]]:
    checkpoint = Checkpoint.open(str(model))
    async with SwarmClient(
        parse_join(swarm.join), checkpoint, swarm.root / name / "identity.key", encoding="float32"
    ) as client:
        found = []
        for prompt in PROMPTS:
            session = await client.session(via=hops)
            ids = client.encode_prompt(prompt)
            tokens = session.generate(ids, NEW_TOKENS, Sampling(), client.stop_tokens())
            found.append([token async for token in tokens])
            await session.close()
        return found


async def _chains(swarm: Swarm, model: Path) -> tuple[tuple[Hop, ...], tuple[Hop, ...]]:
    async with SwarmClient(
        parse_join(swarm.join), Checkpoint.open(str(model)), swarm.root / "look" / "identity.key"
    ) as client:
        view = await client.view()
    hops = {str(node.span): Hop(node.peer_id, node.span, node.addrs) for node in view.nodes}
    return (hops["0:30"],), (hops["0:15"], hops["15:30"])


@pytest.fixture(scope="module")
def local_texts(smollm2: Path) -> list[list[int]]:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    texts = []
    for prompt in PROMPTS:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :].tolist()
        texts.append(new[: new.index(2)] if 2 in new else new)
    return texts


async def test_both_topologies_equal_transformers(
    serving_swarm: Swarm, smollm2: Path, local_texts: list[list[int]]
) -> None:
    whole, halves = await _chains(serving_swarm, smollm2)
    assert [len(whole), len(halves)] == [1, 2]
    # Side by side: the test machine has two cores and each node computes on one.
    over_one, over_two = await asyncio.gather(
        _texts(serving_swarm, smollm2, whole, "one"), _texts(serving_swarm, smollm2, halves, "two")
    )
    assert over_one == local_texts
    assert over_two == local_texts
    # Two sessions took turns in this thread: neither may leave its inference mode behind.
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


async def test_sampling_is_seeded_and_uses_the_distribution(serving_swarm: Swarm, smollm2: Path) -> None:
    checkpoint = Checkpoint.open(str(smollm2))
    async with SwarmClient(
        parse_join(serving_swarm.join), checkpoint, serving_swarm.root / "sampling" / "identity.key"
    ) as client:
        ids = client.encode_prompt(PROMPTS[1])

        async def draw(seed: int) -> list[int]:
            session = await client.session()
            sampling = Sampling(temperature=0.9, top_p=0.95, top_k=50, seed=seed)
            tokens = [token async for token in session.generate(ids, 12, sampling)]
            await session.close()
            return tokens

        assert await draw(1) == await draw(1)
        assert len({tuple(await draw(seed)) for seed in range(1, 4)}) > 1


def test_generate_and_status_commands(serving_swarm: Swarm) -> None:
    answer = serving_swarm.run_json("generate", PROMPTS[0], "--max-new-tokens", "12")
    assert "Paris" in answer["text"]
    # Which way is faster is measured, and a busy machine measures this and that.
    assert [hop["blocks"] for hop in answer["hops"]] in (["0:30"], ["0:15", "15:30"])
    spoken = serving_swarm.run("generate", PROMPTS[0], "--max-new-tokens", "12")
    assert spoken.stdout.strip() == answer["text"]
    status = serving_swarm.run_json("status")
    assert sorted(node["blocks"] for node in status["nodes"]) == ["0:15", "0:30", "15:30"]
    assert status["missing_blocks"] == []
