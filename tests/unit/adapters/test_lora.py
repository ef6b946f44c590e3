"""LoRA on a shard is LoRA in `peft`: same parameters, same outputs, same files."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.families_configs import variants
from swarm.adapters.registry import ModelAdapters, Parameters, get_values, set_values
from swarm.config import LoraMethod
from swarm.errors import CodecError, UnsupportedModel
from swarm.ids import Span
from swarm.model.checkpoint import Checkpoint
from swarm.model.shard import Head, Shard, n_blocks

CPU = torch.device("cpu")
METHOD = LoraMethod(r=4, alpha=6.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4
    )
    path = tmp_path_factory.mktemp("llama")
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def trained(adapters: ModelAdapters, method: LoraMethod = METHOD) -> Parameters:
    """Values as after training: nothing is zero."""
    draw = np.random.default_rng(8)
    return {key: draw.normal(0, 0.1, shape).astype(np.float32) for key, shape in adapters.shapes(method).items()}


def swarm_logits(folder: Path, files: dict[str, bytes] | None, ids: torch.Tensor) -> torch.Tensor:
    checkpoint = Checkpoint.open(str(folder))
    adapters = ModelAdapters(checkpoint)
    head = Head(checkpoint, torch.float32, CPU)
    shard = Shard(checkpoint, Span(0, 4), torch.float32, CPU)
    with torch.inference_mode():
        hidden = head.embed(ids)
        for span in (Span(0, 1), Span(1, 4)):
            view = shard.view(span)
            if files is not None:
                set_values(adapters.attach(view, METHOD), adapters.load(files, span)[1])
            hidden = view.forward(hidden)
        return head.logits(hidden)


def test_exported_files_load_in_peft_and_give_the_same_logits(folder: Path, tmp_path: Path) -> None:
    adapters = ModelAdapters(Checkpoint.open(str(folder)))
    files = adapters.export(METHOD, trained(adapters), str(folder))
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    ids = torch.randint(0, 64, (2, 9))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path)
    with torch.inference_mode():
        expected = model(ids).logits
    assert torch.equal(swarm_logits(folder, files, ids), expected)
    assert not torch.allclose(swarm_logits(folder, None, ids), expected)


def test_peft_trains_exactly_these_parameters(folder: Path) -> None:
    adapters = ModelAdapters(Checkpoint.open(str(folder)))
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM"))
    expected = {tuple(p.shape) for p in model.parameters() if p.requires_grad}
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shapes = adapters.shapes(METHOD)
    assert sum(int(np.prod(s)) for s in shapes.values()) == count == 4 * 4 * (4 * 48 + 3 * 64)
    assert set(shapes.values()) == expected


def test_start_values_are_a_function_of_seed_and_key(folder: Path) -> None:
    adapters = ModelAdapters(Checkpoint.open(str(folder)))
    whole = adapters.initial(METHOD, 7)
    part = adapters.initial_span(METHOD, 7, Span(2, 3))
    assert part
    assert all(np.array_equal(part[key], whole[key]) for key in part)
    other = adapters.initial(METHOD, 8)
    for key, value in whole.items():
        if key.endswith("lora_B"):
            assert not value.any()
        else:
            assert not np.array_equal(value, other[key])
            assert np.abs(value).max() <= 1 / np.sqrt(value.shape[1])
            assert abs(float(value.mean())) < 0.1
    # Pinned: another release of numpy or of this code must draw the same numbers.
    assert whole["0/mlp.down_proj.lora_A"][0, :3].tobytes().hex() == "08635d3dad4f18be07171e3e"


def test_the_adapted_model_starts_equal_to_the_base_model(folder: Path) -> None:
    adapters = ModelAdapters(Checkpoint.open(str(folder)))
    files = adapters.export(METHOD, adapters.initial(METHOD, 0), "x")
    ids = torch.randint(0, 64, (1, 7))
    assert torch.equal(swarm_logits(folder, files, ids), swarm_logits(folder, None, ids))


def test_attached_values_are_float32_and_round_trip(folder: Path) -> None:
    adapters = ModelAdapters(Checkpoint.open(str(folder)))
    view = Shard(Checkpoint.open(str(folder)), Span(1, 3), torch.bfloat16, CPU).view()
    parameters = adapters.attach(view, METHOD)
    values = {key: value for key, value in trained(adapters).items() if key in parameters}
    assert values.keys() == adapters.span_shapes(METHOD, Span(1, 3)).keys() == parameters.keys()
    set_values(parameters, values)
    assert all(np.array_equal(value, values[key]) for key, value in get_values(parameters).items())
    assert {p.dtype for p in view.model.parameters() if p.requires_grad} == {torch.float32}


def test_targets_are_checked(folder: Path) -> None:
    adapters = ModelAdapters(Checkpoint.open(str(folder)))
    only = adapters.shapes(LoraMethod(targets=("q_proj",)))
    assert {key.split("/")[1] for key in only} == {"self_attn.q_proj.lora_A", "self_attn.q_proj.lora_B"}
    with pytest.raises(UnsupportedModel, match="dance_proj"):
        adapters.shapes(LoraMethod(targets=("q_proj", "dance_proj")))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "deepseek_v3", "glm4_moe"])
def test_beside_stacked_experts_every_linear_layer_is_adapted(family: str, tmp_path: Path) -> None:
    """PEFT takes names of linear layers for those of experts in some families, and experts have none here."""
    model = AutoModelForCausalLM.from_config(variants(family)[0])
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(str(tmp_path))
    adapters = ModelAdapters(checkpoint)
    view = Shard(checkpoint, Span(0, n_blocks(checkpoint.config)), torch.float32, CPU).view()
    parameters = adapters.attach(view, METHOD)
    shapes = adapters.shapes(METHOD)
    assert {key: tuple(value.shape) for key, value in parameters.items()} == shapes
    assert any(key.endswith("o_proj.lora_A") for key in shapes)
    set_values(parameters, trained(adapters))
    view.forward(Head(checkpoint, torch.float32, CPU).embed(torch.arange(1, 9)[None])).sum().backward()
    silent = {key for key, value in parameters.items() if value.grad is None}
    assert not silent


@pytest.mark.parametrize("family", ["afmoe", "deepseek_v3", "qwen2_moe", "qwen3_moe", "qwen3_next"])
def test_peft_adapts_dense_and_shared_experts_by_their_names(family: str, tmp_path: Path) -> None:
    """PEFT takes them for the stacked experts' unless the file says otherwise."""
    torch.manual_seed(5)
    base = AutoModelForCausalLM.from_config(variants(family)[0]).eval()
    base.save_pretrained(tmp_path / "base")
    adapters = ModelAdapters(Checkpoint.open(str(tmp_path / "base")))
    values, ids = trained(adapters), torch.arange(3, 12)[None]
    (tmp_path / "adapter").mkdir()
    files = adapters.export(METHOD, values, "base")
    for name, content in files.items():
        (tmp_path / "adapter" / name).write_bytes(content)
    _, read = adapters.load(files, Span(0, n_blocks(base.config)))
    assert read.keys() == values.keys()
    with torch.inference_mode():
        expected = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()(ids).logits
        for key in (key for key in values if key.endswith("lora_A")):
            block, _, path = key.removesuffix(".lora_A").partition("/")
            product = values[key.removesuffix("A") + "B"] @ values[key]
            base.get_submodule(f"model.layers.{block}.{path}").weight += torch.from_numpy(
                METHOD.alpha / METHOD.r * product
            )
        torch.testing.assert_close(base(ids).logits, expected, rtol=1e-3, atol=1e-4)


def test_foreign_files_are_refused(folder: Path) -> None:
    adapters = ModelAdapters(Checkpoint.open(str(folder)))
    files = adapters.export(METHOD, trained(adapters), "x")
    config, weights = files["adapter_config.json"], files["adapter_model.safetensors"]
    for changed, error in [
        ({"adapter_config.json": b"{", "adapter_model.safetensors": weights}, CodecError),
        ({"adapter_config.json": b'{"peft_type": "IA3"}', "adapter_model.safetensors": weights}, UnsupportedModel),
        ({"adapter_config.json": config, "adapter_model.safetensors": weights[:-10]}, CodecError),
        (
            {"adapter_config.json": config.replace(b'"r": 4', b'"r": 5'), "adapter_model.safetensors": weights},
            UnsupportedModel,
        ),
    ]:
        with pytest.raises(error):
            adapters.load(changed, Span(0, 4))
