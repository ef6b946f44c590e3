"""A checkpoint on the hub: as much as is needed comes, once, whatever the network does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hub_lookalike import TOKEN, Lookalike, Repo, running_hub
from huggingface_hub import constants
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from swarm.errors import BlocksMissing, CorruptData, ModelNotFound, NetworkError, ProtocolError, UnsupportedModel
from swarm.ids import Span
from swarm.model import hub as hub_module
from swarm.model.checkpoint import Checkpoint, open_for
from swarm.model.holdings import Description, Holdings
from swarm.model.shard import Shard

CPU = torch.device("cpu")
MODEL = "someone/small"
COMMIT, OLDER = "c" * 40, "0" * 40
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=128,
    intermediate_size=1408,
    num_hidden_layers=10,
    num_attention_heads=4,
    num_key_value_heads=2,
)


@dataclass(frozen=True)
class Folders:
    """The same weights as one file and as five, and other weights."""

    single: Path
    sharded: Path
    older: Path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("hub")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIG)
    model.save_pretrained(root / "single")
    model.save_pretrained(root / "sharded", max_shard_size="5MB")
    words = Tokenizer(WordLevel({"<unk>": 0, "hello": 1}, unk_token="<unk>"))
    for folder in ("single", "sharded"):
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(root / folder)
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(root / "older")
    return Folders(root / "single", root / "sharded", root / "older")


@pytest.fixture
def hub(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lookalike]:
    with running_hub() as hub:
        hub.repos[MODEL] = Repo({COMMIT: folders.sharded, OLDER: folders.older}, {"main": COMMIT, "v1": OLDER})
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(hub_module, "_BACKOFF_S", 0.001)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


def opened(tmp_path: Path, revision: str | None = None) -> Checkpoint:
    return Checkpoint.open(MODEL, revision, tmp_path / "swarm-cache")


def weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_a_fifth_of_the_model_reads_a_fifth_of_the_bytes(
    hub: Lookalike, folders: Folders, tmp_path: Path, layout: str
) -> None:
    folder: Path = getattr(folders, layout)
    hub.repos[MODEL].commits[COMMIT] = folder
    checkpoint = opened(tmp_path)
    local = Checkpoint.open(str(folder))
    assert checkpoint.revision == COMMIT
    assert checkpoint.model_hash == local.model_hash
    assert checkpoint.tokenizer_hash == local.tokenizer_hash
    assert checkpoint.tensors == local.tensors
    headers = hub.body_bytes(".safetensors")
    shard = Shard(checkpoint, Span(4, 6), torch.float32, CPU)
    expected = Shard(local, Span(4, 6), torch.float32, CPU)
    assert shard.frozen.keys() == expected.frozen.keys()
    assert all(torch.equal(shard.frozen[name], expected.frozen[name]) for name in shard.frozen)
    share = hub.body_bytes(".safetensors") / weights(folder)
    assert 0.19 < share < (0.23 if layout == "single" else 0.42), share  # a file of which half is needed comes whole
    assert headers < 0.03 * weights(folder)
    if layout == "single":
        ranges = [r for r in hub.requests if r.body_bytes > 200_000]
        assert len(ranges) == 2, "the tensors of a block follow each other and come in one request"


def test_one_table_whatever_the_files(folders: Folders) -> None:
    assert Checkpoint.open(str(folders.single)).model_hash == Checkpoint.open(str(folders.sharded)).model_hash
    assert Checkpoint.open(str(folders.older)).model_hash != Checkpoint.open(str(folders.single)).model_hash


def test_a_second_start_downloads_nothing(
    hub: Lookalike, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Shard(opened(tmp_path), Span(2, 4), torch.float32, CPU).frozen
    before = len(hub.requests)
    again = opened(tmp_path)
    Shard(again, Span(2, 4), torch.float32, CPU)
    assert [r.path for r in hub.requests[before:]] == [f"/api/models/{MODEL}"], "only: what is main today?"
    pinned = opened(tmp_path, COMMIT)
    assert pinned.model_hash == again.model_hash
    assert len(hub.requests) == before + 1, "a commit that is here is opened without asking"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = Shard(opened(tmp_path), Span(2, 4), torch.float32, CPU).frozen
    assert all(torch.equal(offline[name], first[name]) for name in first)
    assert len(hub.requests) == before + 1
    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE"):
        opened(tmp_path, "v1")


def test_configuration_and_tokenizer_come_and_stay(
    hub: Lookalike, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = opened(tmp_path)
    assert first.config.hidden_size == CONFIG.hidden_size
    assert first.tokenizer().encode("hello") == [1]
    assert hub.body_bytes(".safetensors") < 0.05 * weights(folders.sharded)
    before = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = opened(tmp_path)
    assert again.tokenizer().encode("hello") == [1]
    assert again.config.hidden_size == CONFIG.hidden_size
    with pytest.raises(ModelNotFound, match="offline"):
        Shard(again, Span(0, 1), torch.float32, CPU)
    assert len(hub.requests) == before


def test_a_token_that_is_withdrawn_is_named(hub: Lookalike, folders: Folders, tmp_path: Path) -> None:
    hub.repos[MODEL].commits[COMMIT] = folders.single
    checkpoint = opened(tmp_path)
    hub.repos[MODEL].gated = True
    with pytest.raises(ModelNotFound, match="gated"):
        Shard(checkpoint, Span(0, 1), torch.float32, CPU)


def test_revisions_by_branch_and_by_commit(hub: Lookalike, folders: Folders, tmp_path: Path) -> None:
    older = Checkpoint.open(str(folders.older)).model_hash
    assert opened(tmp_path, "v1").revision == OLDER
    assert opened(tmp_path, "v1").model_hash == older
    assert opened(tmp_path, OLDER).model_hash == older
    assert opened(tmp_path).model_hash != older
    hub.repos[MODEL].branches["main"] = OLDER
    assert opened(tmp_path).model_hash == older, "a branch that moved is seen"
    with pytest.raises(ModelNotFound, match="neither a folder nor a model"):
        opened(tmp_path, "no-such-branch")
    with pytest.raises(ModelNotFound, match="neither a folder nor a model"):
        Checkpoint.open("someone/else", cache=tmp_path)


def test_a_broken_connection_resumes(hub: Lookalike, folders: Folders, tmp_path: Path) -> None:
    hub.repos[MODEL].commits[COMMIT] = folders.single
    checkpoint = opened(tmp_path)
    before = hub.body_bytes(".safetensors")
    hub.break_after = [100_000, 0, 700_000, 1]
    shard = Shard(checkpoint, Span(0, 1), torch.float32, CPU)
    expected = Shard(Checkpoint.open(str(folders.single)), Span(0, 1), torch.float32, CPU)
    assert all(torch.equal(shard.frozen[name], expected.frozen[name]) for name in shard.frozen)
    assert hub.body_bytes(".safetensors") - before == shard.weight_bytes, "no byte came twice"


def test_a_whole_file_survives_a_broken_connection(hub: Lookalike, folders: Folders, tmp_path: Path) -> None:
    hub.repos[MODEL].commits[COMMIT] = folders.single
    checkpoint = opened(tmp_path)
    hub.break_after = [5_000_000]
    shard = Shard(checkpoint, Span(0, 9), torch.float32, CPU)
    expected = Shard(Checkpoint.open(str(folders.single)), Span(0, 9), torch.float32, CPU)
    assert all(torch.equal(shard.frozen[name], expected.frozen[name]) for name in shard.frozen)
    assert not list((tmp_path / "swarm-cache").rglob("part-*")), "it lies in the hub's own cache"
    hub.break_after = [0] * 99
    Shard(checkpoint, Span(9, 10), torch.float32, CPU)  # from there, without asking


def test_a_damaged_file_in_the_hubs_cache_is_named(hub: Lookalike, folders: Folders, tmp_path: Path) -> None:
    hub.repos[MODEL].commits[COMMIT] = folders.single
    Shard(opened(tmp_path), Span(0, 9), torch.float32, CPU)
    (cached,) = (tmp_path / "hf").rglob("snapshots/*/model.safetensors")
    blob = cached.resolve()
    blob.write_bytes(blob.read_bytes()[:-100])
    with pytest.raises(CorruptData, match="cut off"):
        Shard(opened(tmp_path), Span(0, 1), torch.float32, CPU)


def test_ranges_can_be_given_on(hub: Lookalike, folders: Folders, tmp_path: Path) -> None:
    """A node that took its blocks from the hub vouches for them as one with a folder does."""
    checkpoint = opened(tmp_path)
    Shard(checkpoint, Span(4, 5), torch.float32, CPU)
    holdings = Holdings(checkpoint, tmp_path)
    folder = Holdings(Checkpoint.open(str(folders.single)), tmp_path)
    assert holdings.manifest("model.layers.4") == folder.manifest("model.layers.4")
    assert Description.parse(holdings.describe(), "it") == Description.parse(folder.describe(), "it")
    with pytest.raises(BlocksMissing, match=r"does not hold the tensor 'model\.layers\.9"):
        holdings.manifest("model.layers.9")


def test_what_had_arrived_before_a_crash_is_not_fetched_again(hub: Lookalike, folders: Folders, tmp_path: Path) -> None:
    hub.repos[MODEL].commits[COMMIT] = folders.single
    checkpoint = opened(tmp_path)
    hub.break_after = [900_000, 0, 0, 0, 0, 0]
    with pytest.raises(NetworkError, match="stopped sending"):
        Shard(checkpoint, Span(0, 1), torch.float32, CPU)
    hub.break_after = []
    before = hub.body_bytes(".safetensors")
    shard = Shard(opened(tmp_path), Span(0, 1), torch.float32, CPU)
    assert hub.body_bytes(".safetensors") - before == shard.weight_bytes - 900_000
    expected = Shard(Checkpoint.open(str(folders.single)), Span(0, 1), torch.float32, CPU)
    assert all(torch.equal(shard.frozen[name], expected.frozen[name]) for name in shard.frozen)


def test_a_server_without_ranges_is_named(hub: Lookalike, tmp_path: Path) -> None:
    hub.ranges = False
    with pytest.raises(ProtocolError, match="ignores byte ranges"):
        opened(tmp_path)


def test_a_gated_model_needs_the_token_which_only_the_hub_sees(
    hub: Lookalike, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos[MODEL].gated = True
    with pytest.raises(ModelNotFound, match="gated") as refused:
        opened(tmp_path)
    assert "HF_TOKEN" in refused.value.fix
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    Shard(opened(tmp_path), Span(0, 1), torch.float32, CPU)
    assert {r.token for r in hub.requests if r.origin == "hub" and r.body_bytes > 2} == {f"Bearer {TOKEN}"}
    assert {r.token for r in hub.requests if r.origin == "cdn"} == {""}


def test_pickled_weights_are_refused(hub: Lookalike, folders: Folders, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_bytes((folders.single / "config.json").read_bytes())
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    hub.repos[MODEL].commits[COMMIT] = folder
    for model in (MODEL, str(folder)):
        with pytest.raises(UnsupportedModel, match="pickle"):
            Checkpoint.open(model, cache=tmp_path / "cache")
    assert hub.body_bytes(".bin") == 0


def test_an_index_that_leads_out_of_the_repository_is_refused(hub: Lookalike, folders: Folders, tmp_path: Path) -> None:
    folder = tmp_path / "hostile"
    folder.mkdir()
    (folder / "config.json").write_bytes((folders.single / "config.json").read_bytes())
    save_file({"a": torch.zeros(2)}, folder / "part.safetensors")
    hub.repos[MODEL].commits[COMMIT] = folder
    for name in ("../part.safetensors", "/etc/part.safetensors", "a/../part.safetensors", "pickle.bin", 7):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        for model in (MODEL, str(folder)):
            with pytest.raises(CorruptData, match="outside its folder"):
                Checkpoint.open(model, cache=tmp_path / f"cache-{str(name).replace('/', '_')}")


def test_nobody_answers(hub: Lookalike, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ModelNotFound, match="the hub does not give it") as failed:
        opened(tmp_path)
    assert "HF_ENDPOINT" in failed.value.fix


def test_the_environment_is_honoured(hub: Lookalike, folders: Folders, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE, as a process reads them when it starts."""
    hub.repos[MODEL].gated = True
    program = (
        "import sys; from swarm.model.checkpoint import open_for\n"
        "c = open_for(sys.argv[1], sys.argv[2], bytes.fromhex(sys.argv[3]))\n"
        "import torch; c.load(['model.norm.weight'], torch.float32, torch.device('cpu')); print(c.revision)"
    )
    expected = Checkpoint.open(str(folders.sharded)).model_hash.hex()
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "XDG_CACHE_HOME": str(tmp_path / "xdg"),
    }
    command = [sys.executable, "-c", program, MODEL, COMMIT, expected]
    for extra in ({}, {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:1"}):
        done = subprocess.run(command, env={**environment, **extra}, capture_output=True, text=True, timeout=100)
        assert done.stdout.splitlines()[-1:] == [COMMIT], done.stderr
    assert (tmp_path / "home" / "hub").is_dir()
    assert list((tmp_path / "xdg" / "volunteer-swarm").rglob("*.safetensors"))


def test_a_join_string_names_a_commit(
    hub: Lookalike, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    expected = Checkpoint.open(str(folders.sharded)).model_hash
    assert open_for(MODEL, COMMIT, expected).model_hash == expected
    assert open_for(MODEL, COMMIT, expected, str(folders.single)).model_hash == expected
