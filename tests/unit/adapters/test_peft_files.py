"""Adapters as PEFT itself writes them are served as PEFT computes them; what cannot be is named."""

from __future__ import annotations

import importlib.util
import json
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load, save
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, LlamaConfig

from swarm.adapters.bank import AdapterBank
from swarm.adapters.peft_files import CONFIG_FILE, WEIGHTS_FILE, PeftLora, read_adapter
from swarm.adapters.registry import ModelAdapters
from swarm.errors import AdapterNotFound, CodecError, SwarmError, UnsupportedModel
from swarm.ids import Span
from swarm.model.checkpoint import Checkpoint
from swarm.model.shard import Head, Shard

CPU = torch.device("cpu")
ALL = Span(0, 4)
ID = b"\1" * 32
LLAMA = LlamaConfig(vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4)
GPT2 = GPT2Config(vocab_size=64, n_embd=24, n_layer=4, n_head=4, n_positions=64)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(LLAMA, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(GPT2, tmp_path_factory.mktemp("gpt2"))


def saved(config: Any, folder: Path) -> Path:
    torch.manual_seed(4)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def made(base: Path, folder: Path, auto: Any = AutoModelForCausalLM, dtype: Any = None, **settings: Any) -> Path:
    """An adapter that PEFT saved, with every tensor drawn anew: none is zero."""
    torch.manual_seed(9)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **settings}
    model = get_peft_model(auto.from_pretrained(base), LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
                if dtype is not None:
                    parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder)
    return folder


def served(base: Path, adapter: Path, ids_BT: torch.Tensor) -> torch.Tensor:
    checkpoint = Checkpoint.open(str(base))
    adapters, head = ModelAdapters(checkpoint), Head(checkpoint, torch.float32, CPU)
    view = Shard(checkpoint, ALL, torch.float32, CPU).view()
    bank = AdapterBank(view)
    bank.add(ID, *adapters.load(read_adapter(str(adapter)), ALL))
    with torch.inference_mode(), bank.rows([ID] * len(ids_BT)):
        return head.logits(view.forward(head.embed(ids_BT)))


SETTINGS: dict[str, dict[str, Any]] = {
    "list": {},
    "all-linear": {"target_modules": "all-linear"},
    "expression": {"target_modules": r".*\.(q|v)_proj"},
    "whole names": {"target_modules": ["model.layers.1.self_attn.q_proj", "model.layers.3.mlp.up_proj"]},
    "ranks": {"rank_pattern": {"q_proj": 2, r"^model.layers.2.mlp.down_proj": 7}},
    "alphas": {"alpha_pattern": {"model.layers.0.self_attn.q_proj": 1, "q_proj": 11, r"mlp\.down_proj$": 3}},
    "both": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5, "down_proj": 9}},
    "rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 9}},
    "some blocks": {"layers_to_transform": [1, 2]},
    "one block": {"layers_to_transform": 3, "layers_pattern": "layers"},
    "excluded": {"exclude_modules": ["model.layers.0.self_attn.q_proj"]},
    "gaussian": {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_peft_saves_is_served_as_peft_computes_it(name: str, llama: Path, tmp_path: Path) -> None:
    adapter = made(llama, tmp_path, **SETTINGS[name])
    ids_BT = torch.randint(0, 64, (2, 7))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), adapter)
    with torch.inference_mode():
        expected = model(ids_BT).logits
    assert torch.equal(served(llama, adapter, ids_BT), expected)


@pytest.mark.parametrize("targets", ["all-linear", ["c_attn"], ["c_attn", "mlp.c_proj"]])
def test_gpt2_with_its_transposed_linear_layers(targets: Any, gpt2: Path, tmp_path: Path) -> None:
    adapter = made(gpt2, tmp_path, target_modules=targets, fan_in_fan_out=True)
    ids_BT = torch.randint(0, 64, (2, 7))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(gpt2), adapter)
    with torch.inference_mode():
        assert torch.equal(served(gpt2, adapter, ids_BT), model(ids_BT).logits)


def test_an_adapter_of_the_base_model_alone(llama: Path, tmp_path: Path) -> None:
    """Its names lack `model.`."""
    adapter = made(llama, tmp_path, auto=AutoModel)
    assert any(".model.layers.0." in name for name in load((tmp_path / WEIGHTS_FILE).read_bytes()))
    ids_BT = torch.randint(0, 64, (1, 5))
    causal = AutoModelForCausalLM.from_pretrained(llama)
    model = PeftModel.from_pretrained(causal.model, adapter)
    with torch.inference_mode():
        expected = causal.lm_head(model(ids_BT).last_hidden_state)
    assert torch.equal(served(llama, adapter, ids_BT), expected)


def test_blocks_that_an_adapter_leaves_alone(llama: Path, tmp_path: Path) -> None:
    files = read_adapter(str(made(llama, tmp_path, layers_to_transform=[3])))
    checkpoint = Checkpoint.open(str(llama))
    adapters = ModelAdapters(checkpoint)
    method, values = adapters.load(files, Span(0, 2))
    assert (method.scales, values) == ({}, {})
    view = Shard(checkpoint, Span(0, 2), torch.float32, CPU).view()
    bank = AdapterBank(view)
    bank.add(ID, method, values)
    assert ID in bank
    with torch.inference_mode():
        plain = view.forward(torch.ones(1, 2, 24))
        with bank.rows([ID]):
            assert torch.equal(view.forward(torch.ones(1, 2, 24)), plain)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora"),
    "modules": ({"modules_to_save": ["lm_head", "embed_tokens"]}, "modules_to_save: lm_head, embed_tokens"),
    "bias": ({"bias": "all"}, "bias: all"),
    "lora bias": ({"lora_bias": True}, "lora_bias"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
    "pissa": ({"init_lora_weights": "pissa"}, "pissa"),
    "replicated": ({"layer_replication": [[0, 4], [2, 4]]}, "layer_replication"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_named(name: str, llama: Path, tmp_path: Path) -> None:
    settings, words = REFUSED[name]
    adapter = made(llama, tmp_path, **settings)
    with pytest.raises(UnsupportedModel, match=words):
        ModelAdapters(Checkpoint.open(str(llama))).load(read_adapter(str(adapter)), ALL)


CHANGES: dict[str, tuple[Callable[[dict[str, Any], dict[str, torch.Tensor]], Any], type[SwarmError], str]] = {
    "half a pair": (lambda c, t: t.pop(next(iter(t))), UnsupportedModel, "lacks lora_. of ./"),
    "a linear is missing": (lambda c, t: [t.pop(n) for n in list(t) if "1.mlp" in n], UnsupportedModel, "1/mlp.down"),
    "not listed": (lambda c, t: c.update(target_modules=["q_proj"]), UnsupportedModel, "does not adapt"),
    "none": (lambda c, t: t.clear(), UnsupportedModel, "no tensors"),
    "rank": (lambda c, t: c.update(r=5), UnsupportedModel, "rank should be 5"),
    "rank zero": (lambda c, t: c.update(r=0), UnsupportedModel, "rank 0"),
    "rank text": (lambda c, t: c.update(r="many"), CodecError, "parse"),
    "alpha": (lambda c, t: c.update(lora_alpha=float("nan")), CodecError, "parse"),
    "another method": (lambda c, t: c.update(peft_type="IA3"), UnsupportedModel, "IA3"),
    "unknown setting": (lambda c, t: c.update(quantum={"x": 1}), UnsupportedModel, "quantum"),
    "slow expression": (lambda c, t: c.update(alpha_pattern={"(a*)*b": 3}), UnsupportedModel, "alpha_pattern"),
    "not a number": (lambda c, t: t[next(iter(t))].fill_(float("inf")), CodecError, "not finite"),
    "integers": (lambda c, t: t.update({n: v.to(torch.int8) for n, v in t.items()}), UnsupportedModel, "int8"),
    "a block too many": (
        lambda c, t: t.update({n.replace("layers.3", "layers.7"): v for n, v in t.items()}),
        UnsupportedModel,
        "7/",
    ),
    "twice": (
        lambda c, t: t.update({n.replace("model.model.", "model."): v for n, v in t.items()}),
        UnsupportedModel,
        "twice",
    ),
    "an odd block number": (
        lambda c, t: t.update({n.replace("layers.3", "layers.03"): v for n, v in t.items()}),
        UnsupportedModel,
        "layers.03",
    ),
    "embeddings": (
        lambda c, t: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(2, 2)}),
        UnsupportedModel,
        "embed_tokens",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_files_that_contradict_themselves_are_refused(name: str, llama: Path, tmp_path: Path) -> None:
    change, error, words = CHANGES[name]
    files = read_adapter(str(made(llama, tmp_path)))
    config, tensors = json.loads(files[CONFIG_FILE]), load(files[WEIGHTS_FILE])
    change(config, tensors)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    adapters = ModelAdapters(Checkpoint.open(str(llama)))
    with pytest.raises(error, match=words):
        adapters.load({CONFIG_FILE: json.dumps(config).encode(), WEIGHTS_FILE: save(copies)}, ALL)


def test_an_expression_is_never_run(llama: Path, tmp_path: Path) -> None:
    """The tensors say which linears are adapted; a hostile expression would never end."""
    files = read_adapter(str(made(llama, tmp_path)))
    config = json.loads(files[CONFIG_FILE]) | {"target_modules": "(([a-z_.0-9]+)+)+!"}
    loaded = ModelAdapters(Checkpoint.open(str(llama))).load({**files, CONFIG_FILE: json.dumps(config).encode()}, ALL)
    assert len(loaded[0].scales) == 8


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"peft_type": "LORA", "r": 1e999}'])
def test_configurations_that_do_not_parse(data: bytes) -> None:
    with pytest.raises(CodecError):
        PeftLora.parse(data)


def test_folders_that_hold_no_adapter(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFound, match=CONFIG_FILE):
        read_adapter(str(llama))
    (tmp_path / CONFIG_FILE).write_text("{}")
    with pytest.raises(AdapterNotFound, match=WEIGHTS_FILE):
        read_adapter(str(tmp_path))


class Bomb:
    def __reduce__(self) -> Any:
        return (sys.exit, (3,))


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UnsupportedModel, match="pickle"):
        read_adapter(str(tmp_path))


def lookalike() -> Any:
    """The hub of the checkpoint tests."""
    path = Path(__file__).parents[1] / "model" / "hub_lookalike.py"
    spec = importlib.util.spec_from_file_location("hub_lookalike", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("hub_lookalike", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    module = lookalike()
    with module.running_hub() as hub:
        url = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        hub.add = lambda name, folder: hub.repos.update({name: module.Repo({"c" * 40: folder}, {"main": "c" * 40})})
        yield hub


def test_the_hub_gives_two_files_which_are_there_offline(
    hub: Any, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(llama, tmp_path / "adapter")
    (folder / "optimizer.pt").write_bytes(b"x" * 1000)
    hub.add("acme/lora", folder)
    assert read_adapter("acme/lora") == read_adapter(str(folder))
    fetched = {r.path.rpartition("/")[2] for r in hub.requests if r.method == "GET" and "/resolve/" in r.path}
    assert fetched <= {CONFIG_FILE, WEIGHTS_FILE}
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert read_adapter("acme/lora") == read_adapter(str(folder))
    assert len(hub.requests) == asked
    with pytest.raises(AdapterNotFound, match="not in the cache"):
        read_adapter("acme/other")


def test_hub_ids_that_are_no_adapter(hub: Any, llama: Path, tmp_path: Path) -> None:
    hub.add("acme/tiny", llama)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / CONFIG_FILE).write_text("{}")
    (pickled / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    hub.add("acme/pickled", pickled)
    with pytest.raises(UnsupportedModel, match="pickle"):
        read_adapter("acme/pickled")
    for name, words in (("acme/tiny", CONFIG_FILE), ("acme/nothing", "neither"), ("no/such/folder", "neither")):
        with pytest.raises(AdapterNotFound, match=words):
            read_adapter(name)
    hub.repos["acme/tiny"].gated = True
    with pytest.raises(AdapterNotFound, match="gated"):
        read_adapter("acme/tiny")


def test_nobody_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(AdapterNotFound, match="acme/lora") as failed:
        read_adapter("acme/lora")
    assert "HF_ENDPOINT" in failed.value.fix
