"""The sides of the serving benchmarks: plain `transformers`, a client of a swarm, and a judge of quality.

    python -m benchmarks.decode_sides local THREADS
    python -m benchmarks.decode_sides swarm THREADS JOIN FOLDER
    python -m benchmarks.decode_sides judge THREADS JOIN OTHER_JOIN FOLDER

Asked for `{"how", "prompt_ids", "tokens", …}`, a side generates so many tokens greedily and answers with
them and `seen_s`, when each of them was there on the machine's monotonic clock: what lies between is
decoding without the prompt's prefill. `"sessions": n` generates n texts side by side, each with its own
session; answers are then lists. `"how": "prefill"` answers with `took_s`, until the first token.
"""

from __future__ import annotations

import asyncio
import math
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import uvloop

from benchmarks.processes import Json, answer
from swarm.logs import configure
from swarm.samples import smollm2_folder

if TYPE_CHECKING:
    from swarm.client.swarm import SwarmClient

PROMPT = "Tell me a story about the keeper of a lighthouse."


class _Clock:
    """A `transformers` streamer that notes when tokens come."""

    def __init__(self) -> None:
        self.seen_s: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        self.seen_s.append(time.perf_counter())

    def end(self) -> None:
        pass


class Local:
    """What a user of `transformers` runs."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32).eval()
        # Every round takes the asked-for number of tokens, on both sides.
        self._model.generation_config.eos_token_id = None

    async def run(self, request: Json) -> Json:
        prompt_1T = torch.tensor([request["prompt_ids"]])
        if request["how"] == "prefill":
            return self._prefill(prompt_1T)
        way = self._generate if request["how"] == "generate" else self._loop
        tokens, seen_s = way(prompt_1T, int(request["tokens"]))
        return {"tokens": tokens, "seen_s": seen_s}

    @torch.inference_mode()
    def _prefill(self, prompt_1T: torch.Tensor) -> Json:
        began = time.perf_counter()
        out = self._model(prompt_1T, use_cache=True, logits_to_keep=1)
        token = int(out.logits[0, -1].argmax())
        return {"took_s": time.perf_counter() - began, "tokens": [token]}

    def _generate(self, prompt_1T: torch.Tensor, count: int) -> tuple[list[int], list[float]]:
        clock = _Clock()
        out = self._model.generate(
            prompt_1T,
            attention_mask=torch.ones_like(prompt_1T),
            max_new_tokens=count,
            do_sample=False,
            streamer=clock,
        )
        _prompt, *seen_s = clock.seen_s
        return out[0, prompt_1T.shape[1] :].tolist(), seen_s

    @torch.inference_mode()
    def _loop(self, prompt_1T: torch.Tensor, count: int) -> tuple[list[int], list[float]]:
        """The least that decoding with a KV cache takes."""
        out = self._model(prompt_1T, use_cache=True, logits_to_keep=1)
        tokens = [int(out.logits[0, -1].argmax())]
        seen_s = [time.perf_counter()]
        while len(tokens) < count:
            out = self._model(torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True)
            tokens.append(int(out.logits[0, -1].argmax()))
            seen_s.append(time.perf_counter())
        return tokens, seen_s


class Remote:
    """What a user of a swarm runs."""

    def __init__(self, client: SwarmClient) -> None:
        self._client = client

    async def run(self, request: Json) -> Json:
        before = self._client.traffic.activation_bytes
        if request["how"] == "prefill":
            reply = await self._prefill(request)
        else:
            adapters = request.get("adapters") or [""] * int(request.get("sessions", 1))
            texts = await asyncio.gather(*(self._text(request, adapter) for adapter in adapters))
            tokens, seen_s = [t for t, _ in texts], [s for _, s in texts]
            single = "sessions" not in request and "adapters" not in request
            reply = {"tokens": tokens[0] if single else tokens, "seen_s": seen_s[0] if single else seen_s}
        # A client counts both directions of its own streams; links between nodes are the nodes' to count.
        return {**reply, "client_bytes": self._client.traffic.activation_bytes - before}

    async def _text(self, request: Json, adapter: str) -> tuple[list[int], list[float]]:
        from swarm.client.sampling import Sampling

        session = await self._client.session(adapter)
        tokens, seen_s = [], []
        try:
            async for token in session.generate(request["prompt_ids"], int(request["tokens"]), Sampling()):
                seen_s.append(time.perf_counter())
                tokens.append(token)
        finally:
            await session.close()
        return tokens, seen_s

    async def _prefill(self, request: Json) -> Json:
        session = await self._client.session()
        try:
            # The chain is opened by the first token; what is timed is the prompt behind it.
            await session.step(request["prompt_ids"][:1])
            began = time.perf_counter()
            hidden = await session.forward(torch.tensor([request["prompt_ids"]]), position=0, last_only=True)
            token = int((await session.logits(hidden))[0, 0].argmax())
            return {"took_s": time.perf_counter() - began, "tokens": [token]}
        finally:
            await session.close()


class Judge:
    """KL divergence of one swarm's next-token distributions from another's, over the same tokens."""

    def __init__(self, exact: SwarmClient, other: SwarmClient) -> None:
        self._exact = exact
        self._other = other

    async def run(self, request: Json) -> Json:
        kl_sum, loss_exact, loss_other, count = 0.0, 0.0, 0.0, 0
        exact, other = await self._exact.scorer(), await self._other.scorer()
        for ids in request["texts"]:
            ids_1T = torch.tensor([ids])
            rows = [(await scorer.hidden(ids_1T))[0, :-1] for scorer in (exact, other)]
            with torch.inference_mode():
                p, q = (self._exact.head.logits(hidden).log_softmax(dim=-1) for hidden in rows)
                kl_sum += float((p.exp() * (p - q)).sum())
                targets = ids_1T[0, 1:].unsqueeze(1)
                loss_exact -= float(p.gather(1, targets).sum())
                loss_other -= float(q.gather(1, targets).sum())
            count += len(ids) - 1
        await exact.close()
        await other.close()
        return {
            "kl": kl_sum / count,
            "perplexity_ratio": math.exp((loss_other - loss_exact) / count),
            "scored_tokens": count,
        }


async def local() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    chat = [{"role": "user", "content": PROMPT}]
    prompt_ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    await answer(Local().run, prompt_ids=prompt_ids)


async def swarm(joins: list[str], folder: Path) -> None:
    from swarm.client.swarm import SwarmClient
    from swarm.model.checkpoint import Checkpoint
    from swarm.net.join import parse_join

    checkpoint = Checkpoint.open(str(smollm2_folder()))
    async with AsyncExitStack() as stack:
        clients = []
        for number, join in enumerate(joins):
            # float32 on the links: the text must be the local one, bit for bit.
            identity = folder / f"client-{number}" / "identity.key"
            identity.parent.mkdir(parents=True)
            client = SwarmClient(parse_join(join), checkpoint, identity, encoding="float32")
            clients.append(await stack.enter_async_context(client))
            _ = client.heads
        handle = Remote(clients[0]).run if len(clients) == 1 else Judge(*clients).run
        await answer(handle, prompt_ids=clients[0].encode_prompt(PROMPT))


def main() -> None:
    side, threads, *rest = sys.argv[1:]
    configure("warning", role=side)  # stdout belongs to the answers
    torch.set_num_threads(int(threads))
    if side == "local":
        asyncio.run(local())
    else:
        *joins, folder = rest
        uvloop.run(swarm(joins, Path(folder)))


if __name__ == "__main__":
    main()
