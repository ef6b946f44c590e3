"""Rows of a batch with adapters of their own compute what each would alone, which is what `peft` computes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from swarm.adapters.bank import BASE, AdapterBank, BankedModule
from swarm.adapters.registry import ModelAdapters, Parameters
from swarm.config import LoraMethod
from swarm.errors import AdapterNotFound, UnsupportedModel
from swarm.ids import Span
from swarm.model.checkpoint import Checkpoint
from swarm.model.quantize import QuantizedLinear, quantize_weight
from swarm.model.shard import Head, Shard, View

CPU = torch.device("cpu")
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "gpt2": GPT2Config(vocab_size=64, n_embd=24, n_layer=4, n_head=4, n_positions=64),
}
# Ranks, scales and targets differ.
METHODS = {
    "llama": [
        LoraMethod(r=8, alpha=16),
        LoraMethod(r=8, alpha=5),
        LoraMethod(r=3, alpha=6, targets=("q_proj", "down_proj")),
        LoraMethod(r=8, alpha=8, targets=("v_proj", "gate_proj")),
    ],
    "gpt2": [
        LoraMethod(r=8, alpha=16),
        LoraMethod(r=8, alpha=5),
        LoraMethod(r=3, alpha=6, targets=("c_attn",)),
        LoraMethod(r=8, alpha=8, targets=("c_fc", "c_proj")),
    ],
}
IDS = [bytes([number + 1]) * 32 for number in range(4)]


class Bench:
    """A tiny checkpoint, its whole view with a bank, and four trained adapters."""

    def __init__(self, family: str, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(5)
        self.folder = folder
        if not (folder / "config.json").exists():
            AutoModelForCausalLM.from_config(CONFIGS[family]).save_pretrained(folder)
        self.checkpoint = Checkpoint.open(str(folder))
        self.adapters = ModelAdapters(self.checkpoint)
        self.methods = METHODS[family]
        self.files = [
            self.adapters.export(method, trained(self.adapters, method, seed), str(folder))
            for seed, method in enumerate(self.methods)
        ]
        self.shard = Shard(self.checkpoint, Span(0, 4), dtype, CPU)
        self.view = self.shard.view()
        self.bank = AdapterBank(self.view)

    def fill(self) -> Bench:
        for adapter_id, files in zip(IDS, self.files, strict=True):
            self.bank.add(adapter_id, *self.adapters.load(files, self.view.span))
        return self


def trained(adapters: ModelAdapters, method: LoraMethod, seed: int) -> Parameters:
    draw = np.random.default_rng(seed)
    return {key: draw.normal(0, 0.2, shape).astype(np.float32) for key, shape in adapters.shapes(method).items()}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(request.param, tmp_path_factory.mktemp(request.param)).fill()


@pytest.fixture
def llama(tmp_path: Path) -> Bench:
    return Bench("llama", tmp_path)


def run(view: View, hidden_BTD: torch.Tensor, bank: AdapterBank | None = None, ids: Sequence[bytes] = ()) -> Any:
    with torch.inference_mode(), bank.rows(ids) if bank else nullcontext():
        return view.forward(hidden_BTD)


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal but for float32 rounding, relative to the size of the values."""
    return float((got - expected).abs().max()) <= 1e-6 * max(1.0, float(expected.abs().max())) * 4


def test_one_adapter_is_peft_to_the_bit(bench: Bench, tmp_path: Path) -> None:
    head = Head(bench.checkpoint, torch.float32, CPU)
    ids_BT = torch.randint(0, 64, (3, 9))
    for number, files in enumerate(bench.files):
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bench.folder), tmp_path)
        with torch.inference_mode():
            expected = model(ids_BT).logits
            hidden = head.embed(ids_BT)
            logits = head.logits(run(bench.view, hidden, bench.bank, [IDS[number]] * 3))
            assert torch.equal(logits, expected)
            assert not close(head.logits(run(bench.view, hidden)), expected)


@pytest.mark.parametrize("time", [1, 7])
def test_a_mixed_batch_is_each_row_alone(bench: Bench, time: int) -> None:
    rows = [IDS[0], BASE, IDS[1], IDS[2], IDS[0], IDS[3], BASE, IDS[1]]
    hidden_BTD = torch.randn(8, time, 24)
    mixed = run(bench.view, hidden_BTD, bench.bank, rows)
    for row, adapter_id in enumerate(rows):
        assert close(mixed[row], run(bench.view, hidden_BTD[row : row + 1], bench.bank, [adapter_id])[0])


@given(st.lists(st.sampled_from([BASE, *IDS]), min_size=1, max_size=6), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_neighbours_never_matter(shared: Bench, rows: list[bytes], time: int, seed: int) -> None:
    hidden_BTD = torch.randn(len(rows), time, 24, generator=torch.Generator().manual_seed(seed))
    mixed = run(shared.view, hidden_BTD, shared.bank, rows)
    order = list(np.random.default_rng(seed).permutation(len(rows)))
    shuffled = run(shared.view, hidden_BTD[order], shared.bank, [rows[i] for i in order])
    assert close(shuffled, mixed[order])
    alone = run(shared.view, hidden_BTD[:1], shared.bank, rows[:1])
    assert close(mixed[:1], alone)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench("llama", tmp_path_factory.mktemp("shared")).fill()


def test_cached_decoding_of_a_mixed_batch(bench: Bench) -> None:
    hidden_BTD = torch.randn(3, 6, 24)
    rows = [IDS[2], BASE, IDS[1]]
    with torch.inference_mode(), bench.bank.rows(rows):
        whole = bench.view.forward(hidden_BTD)
        cache = bench.view.new_cache()
        bench.view.forward(hidden_BTD[:, :5], 0, cache)
        last = bench.view.forward(hidden_BTD[:, 5:], 5, cache)
    torch.testing.assert_close(last, whole[:, 5:], rtol=1e-5, atol=1e-5)


def test_base_rows_and_views_without_adapters_are_untouched(llama: Bench) -> None:
    hidden_BTD = torch.randn(2, 5, 24)
    plain = run(llama.view, hidden_BTD)
    assert not any(isinstance(module, BankedModule) for module in llama.view.model.modules())
    llama.fill()
    assert torch.equal(run(llama.view, hidden_BTD, llama.bank, [BASE, BASE]), plain)
    assert torch.equal(run(llama.view, hidden_BTD), plain)
    assert close(run(llama.view, hidden_BTD, llama.bank, [IDS[0], BASE])[1], plain[1])


def test_memory_is_that_of_the_values_and_is_given_back(llama: Bench) -> None:
    size_bytes = 0
    for adapter_id, files in zip(IDS, llama.files, strict=True):
        adapter, values = llama.adapters.load(files, Span(0, 4))
        llama.bank.add(adapter_id, adapter, values)
        size_bytes += sum(value.nbytes for value in values.values())
        assert llama.bank.nbytes == size_bytes
    assert (len(llama.bank), IDS[1] in llama.bank) == (4, True)
    run(llama.view, torch.randn(2, 1, 24), llama.bank, IDS[:2])
    for adapter_id in IDS:
        llama.bank.remove(adapter_id)
    assert (len(llama.bank), llama.bank.nbytes, IDS[1] in llama.bank) == (0, 0, False)
    held = [m for m in llama.view.model.modules() if isinstance(m, BankedModule) and (m.parts or m._kernels)]
    assert not held
    with pytest.raises(AdapterNotFound), llama.bank.rows([BASE, IDS[0]]):
        pass
    with pytest.raises(AdapterNotFound):
        llama.bank.remove(IDS[0])


def test_an_adapter_that_comes_again_replaces_the_first(llama: Bench) -> None:
    llama.fill()
    hidden_BTD = torch.randn(1, 2, 24)
    first = run(llama.view, hidden_BTD, llama.bank, [IDS[0]])
    second = run(llama.view, hidden_BTD, llama.bank, [IDS[1]])
    llama.bank.add(IDS[0], *llama.adapters.load(llama.files[1], Span(0, 4)))
    assert torch.equal(run(llama.view, hidden_BTD, llama.bank, [IDS[0]]), second)
    assert not close(first, second)


def test_a_part_of_the_span_takes_its_part_of_the_adapter(bench: Bench) -> None:
    hidden_BTD = torch.randn(2, 3, 24)
    expected = run(bench.view, hidden_BTD, bench.bank, IDS[:2])
    for span in (Span(0, 1), Span(1, 4)):
        view = bench.shard.view(span)
        bank = AdapterBank(view)
        for adapter_id, files in zip(IDS, bench.files, strict=True):
            bank.add(adapter_id, *bench.adapters.load(files, span))
        hidden_BTD = run(view, hidden_BTD, bank, IDS[:2])
    assert torch.equal(hidden_BTD, expected)


def test_narrow_base_models_keep_adapters_in_float32(tmp_path: Path) -> None:
    Bench("llama", tmp_path)
    narrow = Bench("llama", tmp_path, torch.bfloat16).fill()
    hidden_BTD = torch.randn(4, 3, 24, dtype=torch.bfloat16)
    rows = [IDS[0], IDS[1], BASE, IDS[3]]
    mixed = run(narrow.view, hidden_BTD, narrow.bank, rows)
    assert mixed.dtype == torch.bfloat16
    for row, adapter_id in enumerate(rows):
        alone = run(narrow.view, hidden_BTD[row : row + 1], narrow.bank, [adapter_id])
        torch.testing.assert_close(mixed[row], alone[0], rtol=0.02, atol=0.02)


def test_gradients_flow_to_the_input_through_a_mixed_batch(llama: Bench) -> None:
    with torch.inference_mode():
        llama.fill()
    hidden_BTD = torch.randn(3, 4, 24, requires_grad=True)
    rows = [IDS[0], BASE, IDS[2]]
    with llama.bank.rows(rows):
        llama.view.forward(hidden_BTD).square().sum().backward()
    assert hidden_BTD.grad is not None
    for row, adapter_id in enumerate(rows):
        alone = hidden_BTD.detach()[row : row + 1].clone().requires_grad_()
        with llama.bank.rows([adapter_id]):
            llama.view.forward(alone).square().sum().backward()
        assert alone.grad is not None
        torch.testing.assert_close(hidden_BTD.grad[row], alone.grad[0], rtol=1e-4, atol=1e-4)


class Narrow(nn.Module):
    """A linear layer that is no `nn.Linear` and has no `weight`."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = source.in_features, source.out_features
        self.register_buffer("halves", source.weight.detach().to(torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.get_buffer("halves").to(x.dtype))


def test_other_kinds_of_linear_layers(llama: Bench) -> None:
    block: Any = llama.view.model.get_submodule("layers.1")
    q_proj, down_proj = block.self_attn.q_proj, block.mlp.down_proj
    block.mlp.down_proj = Narrow(down_proj)
    block.self_attn.q_proj = QuantizedLinear(quantize_weight(q_proj.weight.detach(), "int8"), None, torch.float32)
    # Four rows of numbers in all: with more, int8 weights go through another kernel, which rounds differently.
    hidden_BTD = torch.randn(2, 2, 24)
    plain = run(llama.view, hidden_BTD)
    llama.fill()
    assert isinstance(block.self_attn.q_proj, BankedModule)
    assert isinstance(block.self_attn.q_proj.inner, QuantizedLinear)
    assert (block.mlp.down_proj.in_features, block.mlp.down_proj.out_features) == (40, 24)
    assert block.self_attn.q_proj.weight.shape == (24, 24)
    assert not hasattr(block.mlp.down_proj, "weight")
    assert torch.equal(run(llama.view, hidden_BTD, llama.bank, [BASE, BASE]), plain)
    mixed = run(llama.view, hidden_BTD, llama.bank, IDS[:2])
    assert not close(mixed, plain)
    for row in range(2):
        alone = run(llama.view, hidden_BTD[row : row + 1], llama.bank, IDS[row : row + 1])
        torch.testing.assert_close(mixed[row], alone[0], rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused_and_leaves_no_trace(llama: Bench) -> None:
    method = LoraMethod(r=2, targets=("q_proj",))
    a, b = np.ones((2, 24), "f4"), np.ones((24, 2), "f4")
    fits = {"1/self_attn.q_proj.lora_A": a, "1/self_attn.q_proj.lora_B": b}
    for values in (
        {**fits, "9/self_attn.q_proj.lora_A": a, "9/self_attn.q_proj.lora_B": b},
        {**fits, "1/self_attn.dance.lora_A": a, "1/self_attn.dance.lora_B": b},
        {**fits, "1/mlp.lora_A": a, "1/mlp.lora_B": b},
        {**fits, "1/self_attn.q_proj.lora_A": np.ones((2, 25), "f4")},
        {**fits, "1/self_attn.q_proj.lora_A": np.ones((3, 24), "f4")},
        {"1/self_attn.q_proj.lora_A": a},
        {**fits, "1/self_attn.q_proj.lora_C": a},
    ):
        with pytest.raises(UnsupportedModel):
            llama.bank.add(IDS[0], method, values)
        assert (len(llama.bank), llama.bank.nbytes) == (0, 0)
    with pytest.raises(ValueError, match="base model"):
        llama.bank.add(BASE, method, fits)
    llama.bank.add(IDS[0], method, fits)


class Regrouping(nn.Module):
    """Experts see some tokens of some rows."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4, bias=False)])
        self.dense = nn.Linear(4, 4, bias=False)


def test_layers_that_regroup_rows_cannot_be_wrong_in_silence(llama: Bench) -> None:
    block: Any = llama.view.model.get_submodule("layers.0")
    block.moe = Regrouping()
    pair = {"lora_A": np.ones((1, 4), "f4"), "lora_B": np.ones((4, 1), "f4")}
    method = LoraMethod(r=1)
    with pytest.raises(UnsupportedModel, match="experts"):
        llama.bank.add(IDS[0], method, {f"0/moe.experts.0.{leaf}": value for leaf, value in pair.items()})
    for adapter_id in IDS[:2]:
        llama.bank.add(adapter_id, method, {f"0/moe.dense.{leaf}": value for leaf, value in pair.items()})
    x_ND = torch.randn(6, 4)
    with torch.inference_mode():
        with llama.bank.rows([IDS[0], BASE]):  # two rows of three tokens, flattened
            out = block.moe.dense(x_ND)
        plain = block.moe.dense(x_ND)
        assert torch.equal(out[3:], plain[3:])
        assert not torch.equal(out[:3], plain[:3])
        with llama.bank.rows([IDS[0], BASE]), pytest.raises(UnsupportedModel, match="regroups"):
            block.moe.dense(x_ND[:5])
