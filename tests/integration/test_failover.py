"""Nodes that die, freeze, leave or send nonsense under a running session: the text goes on, token for token."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from swarm.client.sampling import Sampling
from swarm.client.session import Session
from swarm.client.swarm import SwarmClient
from swarm.errors import BlocksMissing, ContextTooLong
from swarm.model.checkpoint import Checkpoint
from swarm.net.discovery import RECORD_TTL_S
from swarm.net.join import parse_join
from tests.integration.processes import Process, Swarm, run_swarm, swarm_of

TOKENS = 24
PROMPT = (
    "What should one look for when buying a used bicycle? Think about the frame, the brakes, the wheels, "
    "the chain, the saddle, the price, and the questions to put to the person who sells it."
)
Strike = Callable[[Process], None]


class Fleet:
    """A swarm with two nodes for each half of the blocks, by peer id."""

    def __init__(self, swarm: Swarm, nodes: dict[str, Process], spans: dict[str, str]) -> None:
        self.swarm = swarm
        self.nodes = nodes
        self.spans = spans
        self.clients = 0

    def add(self, span: str, process: Process) -> str:
        peer = str(process.event()["peer"])
        self.nodes[peer] = process
        self.spans[peer] = span
        return peer

    def start(self, span: str) -> str:
        return self.add(span, self.swarm.node(f"again-{len(self.swarm.processes)}", span))

    def replace(self, peer: str) -> None:
        """Another node for the blocks of one that ended."""
        self.nodes.pop(peer).popen.wait()
        self.start(self.spans.pop(peer))

    @asynccontextmanager
    async def client(self, model: Path) -> AsyncIterator[SwarmClient]:
        self.clients += 1
        key = self.swarm.root / f"client-{self.clients}" / "identity.key"
        checkpoint = Checkpoint.open(str(model))
        async with SwarmClient(parse_join(self.swarm.join), checkpoint, key, encoding="float32") as client:
            yield client


@pytest.fixture(scope="module")
def fleet(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with swarm_of(tmp_path_factory.mktemp("failover"), smollm2, {}) as swarm:
        found = Fleet(swarm, {}, {})
        started = [(span, swarm.node(f"node-{n}", span)) for n, span in enumerate(("0:15", "0:15", "15:30", "15:30"))]
        for span, process in started:
            found.add(span, process)
        yield found


@pytest.fixture(scope="module")
def plain(fleet: Fleet, smollm2: Path) -> list[int]:
    """The text without faults."""

    async def text() -> list[int]:
        async with fleet.client(smollm2) as client:
            session = await client.session()
            tokens = await _collect(session, client)
            await session.close()
        return tokens

    return asyncio.run(text())


async def _struck(
    fleet: Fleet, model: Path, at: int, hop: int, strike: Strike
) -> tuple[list[int], Session, str, float]:
    """A text during which `strike` hits a hop's node at a token; also the victim and the longest pause."""
    async with fleet.client(model) as client:
        session = await client.session()
        tokens: list[int] = []
        victim = ""
        async for token in session.generate(client.encode_prompt(PROMPT), TOKENS, Sampling()):
            tokens.append(token)
            if len(tokens) == at:
                victim = session.hops[hop].peer_id
                strike(fleet.nodes[victim])
        await session.close()
    return tokens, session, victim


def _send(number: signal.Signals) -> Strike:
    return lambda process: os.kill(process.popen.pid, number)


@pytest.mark.parametrize("seed", [0, 1])
async def test_a_killed_node_is_replaced(fleet: Fleet, smollm2: Path, plain: list[int], seed: int) -> None:
    chance = random.Random(seed)
    at, hop = chance.randrange(1, TOKENS - 2), seed % 2
    tokens, session, victim = await _struck(fleet, smollm2, at, hop, _send(signal.SIGKILL))
    fleet.replace(victim)
    assert tokens == plain
    assert session.rebuilt == 1


@pytest.mark.parametrize("seed", [2, 3])
async def test_a_frozen_node_is_passed_by_and_may_thaw(
    fleet: Fleet, smollm2: Path, plain: list[int], seed: int
) -> None:
    chance = random.Random(seed)
    at, hop = chance.randrange(1, TOKENS - 2), seed % 2
    tokens, session, victim = await _struck(fleet, smollm2, at, hop, _send(signal.SIGSTOP))
    _send(signal.SIGCONT)(fleet.nodes[victim])
    assert tokens == plain
    assert session.rebuilt == 1
    # The thawed node serves again.
    async with fleet.client(smollm2) as client:
        await _until_listed(client, victim)
        other = await client.session()
        assert [t async for t in other.generate(client.encode_prompt(PROMPT), TOKENS, Sampling())] == plain
        await other.close()


async def test_a_frozen_node_hides_nobody_else(fleet: Fleet, smollm2: Path) -> None:
    """Whoever asks it or writes to it waits; records of the others must not run out meanwhile."""
    frozen, *others = fleet.nodes
    async with fleet.client(smollm2) as client:
        for peer in fleet.nodes:
            await _until_listed(client, peer)
        _send(signal.SIGSTOP)(fleet.nodes[frozen])
        try:
            until = time.monotonic() + 2 * RECORD_TTL_S
            while time.monotonic() < until:
                assert {node.peer_id for node in (await client.view()).nodes} >= set(others)
        finally:
            _send(signal.SIGCONT)(fleet.nodes[frozen])
        await _until_listed(client, frozen)


async def test_a_node_killed_during_the_prompt_is_replaced(fleet: Fleet, smollm2: Path, plain: list[int]) -> None:
    async with fleet.client(smollm2) as client:
        _ = client.heads
        victim = (await client.find_hops((), ()))[1].peer_id
        session = await client.session()
        text = asyncio.create_task(_collect(session, client))
        await asyncio.sleep(0.15)  # the moment of the fault, somewhere in the prompt
        _send(signal.SIGKILL)(fleet.nodes[victim])
        assert await text == plain
        assert victim not in {hop.peer_id for hop in session.hops}
        await session.close()
    fleet.replace(victim)


async def _collect(session: Session, client: SwarmClient) -> list[int]:
    return [t async for t in session.generate(client.encode_prompt(PROMPT), TOKENS, Sampling())]


async def test_a_leaving_node_hands_its_sessions_over(fleet: Fleet, smollm2: Path, plain: list[int]) -> None:
    tokens, session, victim = await _struck(fleet, smollm2, 8, 0, _send(signal.SIGTERM))
    assert tokens == plain
    assert victim not in {hop.peer_id for hop in session.hops}
    assert fleet.nodes[victim].popen.wait(timeout=30) == 128 + signal.SIGTERM
    fleet.replace(victim)


@pytest.mark.parametrize("kind", ["nan", "shape", "garbage"])
async def test_nonsense_is_caught_at_the_next_door(fleet: Fleet, smollm2: Path, plain: list[int], kind: str) -> None:
    script = str(Path(__file__).with_name("faulty_node.py"))
    swarm = fleet.swarm
    command = [sys.executable, script, kind, "6", "--", "node", "start", "--join", swarm.join, "--blocks", "0:30"]
    more = ["--dtype", "float32", "--threads", "1", "--data-dir", str(swarm.root / f"faulty-{kind}"), "--json"]
    process = swarm.start_command(f"faulty-{kind}", [*command, *more])
    faulty = str(process.event()["peer"])
    try:
        async with fleet.client(smollm2) as client:
            await _until_listed(client, faulty)
            for other in fleet.nodes:  # so that the session begins on the faulty one
                client.avoid.add(other, "not yet", 3.0)
            session = await client.session()
            tokens = await _collect(session, client)
            assert tokens == plain
            assert session.rebuilt == 1
            reason, seconds = client.avoid.current()[faulty]
            assert seconds > 30
            assert reason
            assert client.avoid.path is not None
            folder = client.avoid.path.parent
        result = run_swarm("status", "--join", swarm.join, "--data-dir", str(folder), "--json")
        status = json.loads(result.stdout)
        assert next(node["avoided"] for node in status["nodes"] if node["peer"] == faulty)
    finally:
        process.stop()


async def _until_listed(client: SwarmClient, peer: str) -> None:
    while not any(node.peer_id == peer for node in (await client.view()).nodes):
        pass  # each look takes a round trip through the DHT


async def test_a_lost_span_is_named_and_the_session_goes_on_when_it_is_back(
    fleet: Fleet, smollm2: Path, plain: list[int]
) -> None:
    async with fleet.client(smollm2) as client:
        ids = client.encode_prompt(PROMPT)
        session = await client.session()
        tokens = [t async for t in session.generate(ids, 8, Sampling())]
        lost = [peer for peer, span in fleet.spans.items() if span == "15:30"]
        for peer in lost:
            fleet.nodes[peer].kill()
        began = time.monotonic()
        with pytest.raises(BlocksMissing, match="15-29"):
            await session.step([tokens[-1]])
        assert time.monotonic() - began < 15
        for peer in lost:
            fleet.replace(peer)
        # The same call again, in the same session: nothing of it was lost.
        logits = await session.step([tokens[-1]])
        assert int(logits.argmax()) == plain[8]
        await session.close()


async def test_a_killed_client_leaves_no_memory_behind(fleet: Fleet) -> None:
    swarm = fleet.swarm
    command = [sys.executable, "-m", "swarm.cli", "generate", PROMPT, "--join", swarm.join]
    more = ["--max-new-tokens", "400", "--data-dir", str(swarm.root / "doomed"), "--json"]
    doomed = swarm.start_command("doomed", [*command, *more])

    def sessions() -> int:
        return sum(node["sessions"] for node in swarm.run_json("status")["nodes"])

    while not sessions():
        assert doomed.popen.poll() is None, doomed.log_tail()
    doomed.kill()
    killed = time.monotonic()
    while sessions():
        assert time.monotonic() - killed < 30
    free = [(node["kv_free_bytes"], node["kv_total_bytes"]) for node in swarm.run_json("status")["nodes"]]
    assert all(left == total for left, total in free)


async def test_a_context_too_long_leaves_the_session_as_it_was(fleet: Fleet, smollm2: Path, plain: list[int]) -> None:
    async with fleet.client(smollm2) as client:
        ids = client.encode_prompt(PROMPT)
        session = await client.session()
        assert int((await session.step(ids)).argmax()) == plain[0]
        with pytest.raises(ContextTooLong):
            await session.step([1] * client.context_length)
        assert int((await session.step(plain[:1])).argmax()) == plain[1]
        await session.close()
