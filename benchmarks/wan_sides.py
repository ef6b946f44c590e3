"""The client of `benchmarks.wan`: decodes over a shaped swarm and a direct one, in four ways.

    python -m benchmarks.wan_sides THREADS JOIN_OF_THE_SHAPED JOIN_OF_THE_DIRECT FOLDER

Asked for `{"prompt", "tokens", "how"}`, it decodes greedily and answers with the tokens, when each of them
was there (seconds since the prompt went off), when the answer ended and, if it guessed, how well.

    plain         the chain, one token a trip            (k + 1 one-way trips)
    direct        the same on nodes that are not shaped  (what the nodes and the client compute)
    speculative   the chain, several tokens a trip
    star          the client relays every hop            (2 k one-way trips), as Petals does
"""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing
from pathlib import Path

import torch
import uvloop

from benchmarks.processes import Json, answer
from swarm.client.drafting import Pace, PromptLookup
from swarm.client.sampling import Sampling
from swarm.client.speculative import speculate
from swarm.client.swarm import SwarmClient
from swarm.logs import configure
from swarm.model.checkpoint import Checkpoint
from swarm.net.chain import StepExtras
from swarm.net.join import parse_join
from swarm.samples import smollm2_folder
from swarm.wire.v1 import chain_pb2 as pb


class Client:
    """Answers requests; one `Pace` learns over all of them, as in a client that people use."""

    def __init__(self, shaped: SwarmClient, direct: SwarmClient) -> None:
        self._shaped = shaped
        self._direct = direct
        self._pace = Pace()

    async def run(self, request: Json) -> Json:
        prompt_ids = self._shaped.encode_prompt(request["prompt"])
        before = (self._pace.trips, self._pace.drafted, self._pace.accepted)
        began_s, tokens, seen_s = time.perf_counter(), [], []
        async with aclosing(self._decode(request["how"], prompt_ids, int(request["tokens"]))) as text:
            async for token in text:
                seen_s.append(time.perf_counter() - began_s)
                tokens.append(token)
            end_s = time.perf_counter() - began_s
        after = (self._pace.trips, self._pace.drafted, self._pace.accepted)
        counts = dict(
            zip(("trips", "drafted", "accepted"), (a - b for a, b in zip(after, before, strict=True)), strict=True)
        )
        return {
            "tokens": tokens,
            "seen_s": seen_s,
            "end_s": end_s,
            "text": self._shaped.tokenizer.decode(tokens),
            "prompt_tokens": len(prompt_ids),
            **counts,
        }

    async def _decode(self, how: str, prompt_ids: Sequence[int], count: int) -> AsyncGenerator[int, None]:
        client = self._direct if how == "direct" else self._shaped
        stop = client.stop_tokens()
        if how == "star":
            tokens = self._star(prompt_ids, count, stop)
        else:
            session = await client.session(expected_tokens=len(prompt_ids) + count)
            if how == "speculative":
                tokens = speculate(session, prompt_ids, count, Sampling(), PromptLookup(), stop, pace=self._pace)
            else:
                tokens = session.generate(prompt_ids, count, Sampling(), stop)
        try:
            async for token in tokens:
                yield token
        finally:
            if how != "star":
                await session.close()

    async def _star(self, prompt_ids: Sequence[int], count: int, stop: frozenset[int]) -> AsyncIterator[int]:
        client = self._shaped
        async with AsyncExitStack() as stack:
            chains = []
            for hop in await client.find_hops((), ()):
                chains.append(await client.open_chain([hop], pb.MODE_CACHED, None))
                stack.push_async_callback(chains[-1].close)
            at, ids = 0, list(prompt_ids)
            for _ in range(count):
                with torch.inference_mode():
                    hidden_BTD = client.embed(torch.tensor([ids]), torch.arange(at, at + len(ids)).unsqueeze(0))
                for chain in chains:
                    # As the chain does, the last node sends back the last position alone.
                    extras = StepExtras(tail=1 if chain is chains[-1] else None)
                    hidden_BTD = (await chain.forward(hidden_BTD, at, extras))[1]
                logits_BTV = await client.heads.logits(hidden_BTD)
                at += len(ids)
                ids = [int(logits_BTV[0, -1].argmax())]
                if ids[0] in stop:
                    return
                yield ids[0]


async def run(shaped: str, direct: str, folder: Path) -> None:
    checkpoint = Checkpoint.open(str(smollm2_folder()))
    async with AsyncExitStack() as stack:
        clients = []
        for name, join in (("shaped", shaped), ("direct", direct)):
            own = folder / f"client-{name}"
            own.mkdir()
            clients.append(
                await stack.enter_async_context(SwarmClient(parse_join(join), checkpoint, own / "client.key"))
            )
        await answer(Client(*clients).run)


def main() -> None:
    threads, shaped, direct, folder = sys.argv[1:]
    configure("info", role="client")  # stdout belongs to the answers
    torch.set_num_threads(int(threads))
    uvloop.run(run(shaped, direct, Path(folder)))


if __name__ == "__main__":
    main()
