"""The two sides of `benchmarks.decode`: plain `transformers`, and a client of a swarm.

    python -m benchmarks.decode_sides local THREADS
    python -m benchmarks.decode_sides swarm THREADS JOIN FOLDER

Asked for `{"prompt_ids", "tokens", "how"}`, a side generates so many tokens greedily and answers with
them and `seen_s`, when each of them was there: what lies between is decoding without the prompt's prefill.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import torch
import uvloop

from benchmarks.processes import Json, answer
from swarm.logs import configure
from swarm.samples import smollm2_folder

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
        way = self._generate if request["how"] == "generate" else self._loop
        tokens, seen_s = way(prompt_1T, int(request["tokens"]))
        return {"tokens": tokens, "seen_s": seen_s}

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


async def local() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    chat = [{"role": "user", "content": PROMPT}]
    prompt_ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    await answer(Local().run, prompt_ids=prompt_ids)


async def swarm(join: str, folder: Path) -> None:
    from swarm.client.sampling import Sampling
    from swarm.client.swarm import SwarmClient
    from swarm.model.checkpoint import Checkpoint
    from swarm.net.join import parse_join

    # float32 on the links: the text must be the local one, bit for bit.
    checkpoint = Checkpoint.open(str(smollm2_folder()))
    async with SwarmClient(parse_join(join), checkpoint, folder / "client.key", encoding="float32") as client:

        async def run(request: Json) -> Json:
            session = await client.session()
            tokens, seen_s = [], []
            try:
                async for token in session.generate(request["prompt_ids"], int(request["tokens"]), Sampling()):
                    seen_s.append(time.perf_counter())
                    tokens.append(token)
            finally:
                await session.close()
            return {"tokens": tokens, "seen_s": seen_s}

        await answer(run, prompt_ids=client.encode_prompt(PROMPT))


def main() -> None:
    side, threads, *rest = sys.argv[1:]
    configure("info", role=side)  # stdout belongs to the answers
    torch.set_num_threads(int(threads))
    if side == "local":
        asyncio.run(local())
    else:
        uvloop.run(swarm(rest[0], Path(rest[1])))


if __name__ == "__main__":
    main()
