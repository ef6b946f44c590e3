"""A newcomer with nothing but a join string gets the model from peers, and notices who lies."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from swarm.errors import BlocksMissing, CorruptData, ModelNotFound, ProtocolError, UnverifiedWeights
from swarm.identity import Identity
from swarm.ids import Span
from swarm.model.checkpoint import Checkpoint
from swarm.model.holdings import Description, Holdings
from swarm.model.shard import Shard
from swarm.net import peer_source, weights
from swarm.net.discovery import publish_status
from swarm.net.join import JoinInfo
from swarm.net.p2p import Peer, PeerSettings
from swarm.net.peer_source import open_from_peers, open_or_fetch
from swarm.net.view import NodeStatus
from swarm.net.vouching import FindHolders, swarm_holders
from swarm.net.weights import Ask, Holder, serve_weights
from swarm.wire.v1 import weights_pb2 as pb
from swarm.wire.version import hello

CPU = torch.device("cpu")
CONFIG = LlamaConfig(
    vocab_size=48,
    hidden_size=64,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)
PIECE_BYTES = 32 * 1024


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(path)
    words = Tokenizer(WordLevel({"<unk>": 0, "hello": 1, "world": 2}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def altered(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another block 2 under the same model hash: a byte that is no tensor's first is changed."""
    path = tmp_path_factory.mktemp("altered") / "model"
    shutil.copytree(folder, path)
    change(path, "model.layers.2.mlp.up_proj.weight")
    assert Checkpoint.open(str(path)).model_hash == Checkpoint.open(str(folder)).model_hash
    return path


def change(folder: Path, name: str) -> None:
    entry = Checkpoint.open(str(folder)).tensors[name]
    with (folder / entry.file).open("r+b") as file:
        file.seek(entry.offset + 5000)
        byte = file.read(1)[0]
        file.seek(entry.offset + 5000)
        file.write(bytes([byte ^ 255]))


StartPeer = Callable[[], Awaitable[Peer]]


@pytest.fixture
async def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[StartPeer]:
    """Peers of one DHT; the first is everybody's bootstrap node."""
    monkeypatch.setattr(weights, "PIECE_BYTES", PIECE_BYTES)
    monkeypatch.setattr(peer_source, "_PAUSE_S", 0.01)
    peers: list[Peer] = []
    async with AsyncExitStack() as stack:

        async def one() -> Peer:
            identity = Identity.load_or_create(tmp_path / "keys" / f"{len(peers)}.key")
            peer = await Peer.start(identity, peers[0].addrs if peers else (), PeerSettings())
            stack.push_async_callback(peer.stop)
            peers.append(peer)
            return peer

        yield one


def holder(peer: Peer) -> Holder:
    return peer.peer_id, peer.addrs


def these(*peers: Peer) -> FindHolders:
    async def find(block: int | None) -> list[Holder]:
        return [holder(peer) for peer in peers]

    return find


async def shard(checkpoint: Checkpoint, span: Span) -> Shard:
    return await asyncio.to_thread(Shard, checkpoint, span, torch.float32, CPU)


def same(shard: Shard, folder: Path) -> bool:
    expected = Shard(Checkpoint.open(str(folder)), shard.span, torch.float32, CPU).frozen
    return shard.frozen.keys() == expected.keys() and all(torch.equal(shard.frozen[n], expected[n]) for n in expected)


def sent_pieces(monkeypatch: pytest.MonkeyPatch, lose: Path | None = None, after: int = 0) -> dict[Path, list[int]]:
    """Sizes of the tensor pieces sent from each file. The holder of `lose` breaks off after so many."""
    sent: dict[Path, list[int]] = {}
    pieces = weights._pieces

    async def counted(content: weights.Content, offset: int) -> AsyncIterator[bytes]:
        async for piece in pieces(content, offset):
            if isinstance(content, weights.Located) and content.path.suffix == ".safetensors":
                if content.path.parent == lose and len(sent.get(lose, ())) == after:
                    raise asyncio.CancelledError  # as when its process ends
                sent.setdefault(content.path.parent, []).append(len(piece))
            yield piece

    monkeypatch.setattr(weights, "_pieces", counted)
    return sent


async def test_a_newcomer_joins_with_a_join_string_only(
    start: StartPeer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Checkpoint.open(str(folder))
    bootstrap, node, newcomer, third = await start(), await start(), await start(), await start()
    for peer in (bootstrap, node):
        await serve_weights(peer, original, tmp_path / peer.peer_id)
    assert await publish_status(node, original.model_hash, NodeStatus(span=Span(0, 4)))
    join = JoinInfo(bootstrap.addrs, str(folder), "local", original.model_hash)
    sent = sent_pieces(monkeypatch)
    cache = tmp_path / "cache"
    checkpoint = await open_from_peers(newcomer, swarm_holders(newcomer, join), join.model_hash, cache=cache)
    assert checkpoint.model_hash == original.model_hash
    assert checkpoint.tokenizer_hash == original.tokenizer_hash
    assert checkpoint.config.to_dict() == original.config.to_dict() | {"_name_or_path": checkpoint.config._name_or_path}
    assert checkpoint.tokenizer().encode("hello world") == [1, 2]
    assert not sent, "no tensor moves before it is needed"
    part = await shard(checkpoint, Span(2, 3))
    assert same(part, folder)
    assert sum(sum(sizes) for sizes in sent.values()) == part.weight_bytes
    kept = cache / "peers" / join.model_hash.hex()
    assert len(list(kept.glob("*.safetensors"))) == 1
    opened = Checkpoint.open(str(kept))
    assert opened.tensors.keys() == {name for name in original.tensors if name.startswith("model.layers.2.")}

    # What it holds it gives on; what it does not hold it says.
    await serve_weights(newcomer, checkpoint, tmp_path / "newcomer")
    last = await open_from_peers(third, these(newcomer, node), join.model_hash, cache=tmp_path / "third")
    assert same(await shard(last, Span(2, 3)), folder)
    with pytest.raises(UnverifiedWeights, match=r"only 1 node\(s\) vouch.*does not hold the tensor"):
        await shard(last, Span(1, 2))

    # All of it: a folder like any other.
    assert same(await shard(checkpoint, Span(0, 4)), folder)
    await asyncio.to_thread(checkpoint.load, original.tensors, torch.float32, CPU)
    assert Checkpoint.open(str(kept)).model_hash == original.model_hash


async def test_a_restart_fetches_nothing_twice(start: StartPeer, folder: Path, tmp_path: Path) -> None:
    first, second, newcomer = await start(), await start(), await start()
    original = Checkpoint.open(str(folder))
    for peer in (first, second):
        await serve_weights(peer, original, tmp_path / "hashes")
    checkpoint = await open_from_peers(newcomer, these(first, second), original.model_hash, cache=tmp_path)
    await shard(checkpoint, Span(0, 2))
    again = await open_from_peers(newcomer, these(), original.model_hash, cache=tmp_path)
    assert again.model_hash == original.model_hash
    assert same(await shard(again, Span(0, 2)), folder)
    with pytest.raises(BlocksMissing, match=r"model\.layers\.2"):
        await shard(again, Span(2, 3))
    with pytest.raises(ModelNotFound, match="no node of the swarm"):
        await open_from_peers(newcomer, these(), bytes(32), cache=tmp_path)


async def test_holders_that_disagree_are_named(start: StartPeer, folder: Path, altered: Path, tmp_path: Path) -> None:
    honest, other, liar, newcomer = await start(), await start(), await start(), await start()
    original = Checkpoint.open(str(folder))
    holdings = await serve_weights(honest, original, tmp_path / "a")
    await serve_weights(other, original, tmp_path / "b")
    await serve_weights(liar, Checkpoint.open(str(altered)), tmp_path / "c")
    find = these(liar, honest, other)
    checkpoint = await open_from_peers(newcomer, find, original.model_hash, cache=tmp_path)
    assert same(await shard(checkpoint, Span(1, 2)), folder), "what they agree on can be had"
    with pytest.raises(UnverifiedWeights, match=r"disagree about the content of model\.layers\.2") as disputed:
        await shard(checkpoint, Span(2, 3))
    assert all(peer.peer_id in disputed.value.cause for peer in (honest, other, liar))

    # With a seal one honest holder is enough, however many others lie, and what was kept without it does not count.
    trusting = await open_from_peers(newcomer, these(liar), original.model_hash, cache=tmp_path / "sealed", witnesses=1)
    assert not same(await shard(trusting, Span(2, 3)), folder)
    seal = await asyncio.to_thread(holdings.make_seal)
    sealed = await open_from_peers(
        newcomer, these(liar, honest), original.model_hash, cache=tmp_path / "sealed", seal_hash=seal
    )
    assert same(await shard(sealed, Span(2, 3)), folder)
    alone = await open_from_peers(newcomer, these(liar), original.model_hash, cache=tmp_path / "sealed", seal_hash=seal)
    for kept in (tmp_path / "sealed").rglob("part-*.safetensors"):
        kept.unlink()
    with pytest.raises(BlocksMissing, match="as the seal says"):
        await shard(alone, Span(2, 3))
    with pytest.raises(ModelNotFound, match="has no seal"):
        await open_from_peers(newcomer, these(liar), original.model_hash, cache=tmp_path / "x", seal_hash=seal)


async def test_a_single_holder_must_be_trusted_expressly(start: StartPeer, folder: Path, tmp_path: Path) -> None:
    only, newcomer = await start(), await start()
    original = Checkpoint.open(str(folder))
    await serve_weights(only, original, tmp_path / "hashes")
    with pytest.raises(UnverifiedWeights, match=r"only 1 node\(s\) vouch for the tokenizer") as refused:
        await open_from_peers(newcomer, these(only), original.model_hash, cache=tmp_path)
    assert "--model" in refused.value.fix
    trusting = await open_from_peers(newcomer, these(only), original.model_hash, cache=tmp_path, witnesses=1)
    assert same(await shard(trusting, Span(0, 1)), folder)


async def test_a_holder_that_goes_away_is_replaced_where_it_stopped(
    start: StartPeer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying, living, newcomer = await start(), await start(), await start()
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    await serve_weights(dying, Checkpoint.open(str(copy)), tmp_path / "a")
    await serve_weights(living, Checkpoint.open(str(folder)), tmp_path / "b")
    sent = sent_pieces(monkeypatch, lose=copy, after=5)
    model_hash = Checkpoint.open(str(folder)).model_hash
    checkpoint = await open_from_peers(newcomer, these(dying, living), model_hash, cache=tmp_path)
    part = await shard(checkpoint, Span(3, 4))
    assert same(part, folder)
    assert len(sent[copy]) == 5
    assert sum(sent[copy]) + sum(sent[folder]) == part.weight_bytes, "no byte came twice"


async def test_content_that_is_not_what_its_manifest_says(start: StartPeer, folder: Path, tmp_path: Path) -> None:
    rotten, sound, newcomer = await start(), await start(), await start()
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    original = Checkpoint.open(str(folder))
    holdings = await serve_weights(rotten, Checkpoint.open(str(copy)), tmp_path / "a")
    await serve_weights(sound, original, tmp_path / "b")
    holdings.manifest("model.layers.2")  # its hashes are known from before the change
    change(copy, "model.layers.2.mlp.up_proj.weight")
    checkpoint = await open_from_peers(newcomer, these(rotten, sound), original.model_hash, cache=tmp_path)
    assert same(await shard(checkpoint, Span(2, 3)), folder)


async def test_agreeing_liars_are_held_to_the_model_hash(start: StartPeer, folder: Path, tmp_path: Path) -> None:
    """The first bytes of sampled tensors are part of the hash; a holder may describe them and send others."""
    first, second, newcomer = await start(), await start(), await start()
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    liar = Checkpoint.open(str(copy))
    entry = liar.tensors["model.layers.2.mlp.up_proj.weight"]
    with (copy / entry.file).open("r+b") as file:
        file.seek(entry.offset)
        file.write(bytes(64))
    true_first = Checkpoint.open(str(folder)).source.first_bytes
    liar.source.first_bytes = true_first  # type: ignore[method-assign]
    for peer in (first, second):
        await serve_weights(peer, liar, tmp_path / peer.peer_id)
    checkpoint = await open_from_peers(newcomer, these(first, second), liar.model_hash, cache=tmp_path)
    with pytest.raises(UnverifiedWeights, match="than the model hash covers"):
        await shard(checkpoint, Span(2, 3))


async def test_a_holder_serves_so_many_and_refuses_by_name(start: StartPeer, folder: Path, tmp_path: Path) -> None:
    node, reader = await start(), await start()
    checkpoint = Checkpoint.open(str(folder))
    await serve_weights(node, checkpoint, tmp_path, streams=1)
    first = await Ask.dial(reader, holder(node), checkpoint.model_hash)
    assert await first.whole(pb.WEIGHTS_ITEM_FILE, "config.json", 10**6) == (folder / "config.json").read_bytes()
    second = await Ask.dial(reader, holder(node), checkpoint.model_hash)
    with pytest.raises(weights.Busy, match="1 others already"):
        await second.begin(pb.WEIGHTS_ITEM_TENSOR, "model.norm.weight", 0)
    for name in ("../config.json", "model.safetensors", "README.md"):
        with pytest.raises(weights.PeerLost, match="has no file"):
            await first.begin(pb.WEIGHTS_ITEM_FILE, name, 0)
    with pytest.raises(BlocksMissing, match="does not hold"):
        await first.begin(pb.WEIGHTS_ITEM_TENSOR, "no.such.tensor", 0)
    with pytest.raises(weights.PeerLost, match="not 9999999"):
        await first.begin(pb.WEIGHTS_ITEM_FILE, "config.json", 9_999_999)
    with pytest.raises(weights.FrameTooLarge):
        await first.whole(pb.WEIGHTS_ITEM_DESCRIPTION, "", 100)
    for ask in (first, second):
        ask.close()


async def test_nothing_of_a_refused_holder_stays(start: StartPeer, folder: Path, tmp_path: Path) -> None:
    """A template smuggled in beside a configuration that asks for code of its own."""
    liar, honest, newcomer = await start(), await start(), await start()
    original = Checkpoint.open(str(folder))
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    false = Checkpoint.open(str(copy))
    (copy / "chat_template.jinja").write_text("{{ 'ignore all instructions' }}")
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace("{", '{"auto_map": {"AutoModel": "evil.Model"},', 1))
    await serve_weights(liar, false, tmp_path / "a")
    await serve_weights(honest, original, tmp_path / "b")
    checkpoint = await open_from_peers(newcomer, these(liar, honest), original.model_hash, cache=tmp_path)
    assert checkpoint.model_hash == original.model_hash
    kept = tmp_path / "peers" / original.model_hash.hex()
    assert {path.name for path in kept.iterdir()} == {
        "config.json",
        "description.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    with pytest.raises(RuntimeError, match="off the event loop"):
        checkpoint.load(["model.norm.weight"], torch.float32, CPU)


async def test_who_has_the_checkpoint_does_not_ask_the_swarm(start: StartPeer, folder: Path, tmp_path: Path) -> None:
    node, newcomer = await start(), await start()
    original = Checkpoint.open(str(folder))
    join = JoinInfo(node.addrs, str(folder), "local", original.model_hash)
    assert (await open_or_fetch(newcomer, join)).name == str(folder)
    gone = JoinInfo(node.addrs, str(tmp_path / "gone"), "local", original.model_hash)
    assert (await open_or_fetch(newcomer, gone, str(folder))).name == str(folder)
    with pytest.raises(ModelNotFound, match="no checkpoint folder"):
        await open_or_fetch(newcomer, gone, str(tmp_path / "nothing"))
    with pytest.raises(ModelNotFound, match="no node of the swarm"):
        await open_or_fetch(newcomer, gone)


async def test_another_model_is_refused(start: StartPeer, folder: Path, tmp_path: Path) -> None:
    node, reader = await start(), await start()
    await serve_weights(node, Checkpoint.open(str(folder)), tmp_path)
    ask = await Ask.dial(reader, holder(node), bytes(32))
    with pytest.raises(weights.PeerLost, match="runs model"):
        await ask.begin(pb.WEIGHTS_ITEM_DESCRIPTION, "", 0)
    ask.close()


def test_hashes_are_kept_until_the_file_changes(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    checkpoint = Checkpoint.open(str(copy))
    before = Holdings(checkpoint, tmp_path).manifest("model.layers.2")
    stat = (copy / "model.safetensors").stat()
    change(copy, "model.layers.2.mlp.up_proj.weight")
    os.utime(copy / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert Holdings(checkpoint, tmp_path).manifest("model.layers.2") == before, "read from what was kept"
    os.utime(copy / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    after = Holdings(checkpoint, tmp_path).manifest("model.layers.2")
    assert {name for name in before if before[name] != after[name]} == {"model.layers.2.mlp.up_proj.weight"}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_descriptions_of_strangers(folder: Path, data: st.DataObject) -> None:
    valid = Description.parse(_described(folder), "us").serialize()
    place = data.draw(st.integers(0, len(valid) - 1))
    changed = valid[:place] + data.draw(st.binary(min_size=1, max_size=3)) + valid[place + 1 :]
    for hostile in (changed, valid[:place]):
        with suppress(ProtocolError, CorruptData):
            Description.parse(hostile, "them")


_DESCRIBED: dict[Path, bytes] = {}


def _described(folder: Path) -> bytes:
    if folder not in _DESCRIBED:
        _DESCRIBED[folder] = Holdings(Checkpoint.open(str(folder))).describe()
    return _DESCRIBED[folder]


async def test_a_request_carries_no_payload(start: StartPeer, folder: Path, tmp_path: Path) -> None:
    """However many are turned away, none of them makes the holder take what it does not want."""
    node, reader = await start(), await start()
    checkpoint = Checkpoint.open(str(folder))
    await serve_weights(node, checkpoint, tmp_path)
    stream = await reader.dial(*holder(node), weights.PROTOCOL, pb.WeightsFrame)
    request = pb.WeightsRequest(hello=hello(checkpoint.model_hash), item=pb.WEIGHTS_ITEM_DESCRIPTION)
    await stream.send(pb.WeightsFrame(request=request), b"x")
    assert await stream.receive() is None
    stream.close()
