"""One family of each kind of attention: cuts equal the whole bit for bit; caches take what is said; refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, Gemma4TextConfig, GlmMoeDsaConfig, LlamaConfig

from benchmarks.families import Cut, check, load_whole, randomize
from benchmarks.families_configs import families, variants
from swarm.errors import CorruptData, SpanError, UnsupportedModel
from swarm.ids import Span
from swarm.model.checkpoint import Checkpoint
from swarm.model.families import Parts, cuts, n_blocks, refusal
from swarm.model.kvsize import cache_bytes
from swarm.model.shard import Head, Shard, block_bytes

CPU = torch.device("cpu")
KINDS = {
    "dense, full attention": "granite",
    "sliding and full": "gemma2",
    "one window for all blocks": "mistral",
    "mixture of experts": "mixtral",
    "linear and full": "qwen3_next",
    "linear, a cache of its own": "minimax",
    "multi-head latent, dense and sparse blocks": "deepseek_v3",
    "two latent attentions a block": "longcat_flash",
    "chosen tokens shared by blocks": "glm_moe_dsa",
    "several residual streams": "hy_v4",
    "keys shared by blocks": "gemma4_unified_text",
    "alibi": "bloom",
    "learned positions": "gpt2",
    "learned positions and projections": "opt",
    "multi-query, alibi and grouped": "falcon",
}


def _save(config: Any, folder: Path, **options: Any) -> Checkpoint:
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model)
    model.save_pretrained(folder, **options)
    return Checkpoint.open(str(folder))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_cuts_equal_the_whole_and_caches_take_what_is_said(kind: str, tmp_path: Path) -> None:
    for index, config in enumerate(variants(kind)):
        assert check(config, tmp_path / str(index)) == (0.0, True, 0.0)


def test_the_comparison_would_see_a_wrong_mask_or_wrong_positions(tmp_path: Path) -> None:
    cut = Cut(_save(variants("gpt2")[0], tmp_path), (0, 3, 6))
    ids = torch.randint(3, 90, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def first_row(mask_BS: torch.Tensor | None, positions_BT: torch.Tensor | None) -> torch.Tensor:
        cut.open()
        return cut.logits(ids, 0, mask_BS, positions_BT)[0, 2:]

    alone = cut.logits(ids[:1, 2:])[0]
    assert torch.allclose(first_row(mask, positions), alone, atol=1e-4)
    assert not torch.allclose(first_row(None, positions), alone, atol=1e-2)
    assert not torch.allclose(first_row(mask, None), alone, atol=1e-2)


def test_packed_experts_are_read_for_the_span_alone(tmp_path: Path) -> None:
    checkpoint = _save(variants("mixtral")[0], tmp_path, max_shard_size="30KB")
    names = {name for name in checkpoint.tensors if ".layers.1." in name or ".layers.2." in name}
    assert any(".experts.3." in name for name in names), "transformers no longer saves one tensor an expert"
    kept = {checkpoint.tensors[name].file for name in names}
    others = {entry.file for entry in checkpoint.tensors.values()} - kept
    assert others
    for file in others:
        (tmp_path / file).unlink()
    shard = Shard(checkpoint, Span(1, 3), torch.float32, CPU)
    assert sum(block_bytes(checkpoint, torch.float32)[1:3]) == shard.weight_bytes
    with pytest.raises(CorruptData):
        Head(checkpoint, torch.float32, CPU)


def test_names_of_the_hub_are_understood(tmp_path: Path) -> None:
    """GPT-2's original files lack the prefix `transformer.` and hold a mask that no model has any more."""
    config = variants("gpt2")[0]
    checkpoint = _save(config, tmp_path)
    expected = Cut(checkpoint, (0, 2, 6)).logits(torch.tensor([[5, 6, 7]]))
    path = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    tensors.pop("lm_head.weight", None)
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(tensors, path, metadata={"format": "pt"})
    original = Checkpoint.open(str(tmp_path))
    assert "h.1.ln_1.weight" in original.tensors
    assert torch.equal(Cut(original, (0, 2, 6)).logits(torch.tensor([[5, 6, 7]])), expected)


def test_gradients_pass_through_a_cut_as_through_the_whole(tmp_path: Path) -> None:
    checkpoint = _save(variants("qwen3_next")[0], tmp_path)
    whole = load_whole(tmp_path).requires_grad_(False)
    cut = Cut(checkpoint, (0, 3, 6))
    ids = torch.randint(3, 90, (2, 7))
    embeds = [whole.get_input_embeddings()(ids).requires_grad_() for _ in range(2)]
    torch.autograd.backward(whole(inputs_embeds=embeds[0], use_cache=False).logits.square().mean())
    hidden = embeds[1]
    for view in cut.views:
        hidden = view.forward(hidden)
    torch.autograd.backward(cut.head.logits(hidden).square().mean())
    assert embeds[0].grad is not None
    assert torch.equal(embeds[0].grad, embeds[1].grad)


def test_what_must_stay_float32_does(tmp_path: Path) -> None:
    checkpoint = _save(variants("deepseek_v3")[0], tmp_path)
    frozen = Shard(checkpoint, Span(2, 4), torch.bfloat16, CPU).frozen
    dtypes = {name: tensor.dtype for name, tensor in frozen.items()}
    assert dtypes["layers.0.mlp.gate.e_score_correction_bias"] == torch.float32
    assert dtypes["layers.0.self_attn.o_proj.weight"] == torch.bfloat16


def test_a_family_that_cannot_be_cut_says_why() -> None:
    refused = {kind: refusal(variants(kind)[0]) for kind in ("hrm_text", "gemma3n_text", "deepseek_v4", "llama")}
    assert refused.pop("llama") == ""
    assert all(refused.values())
    with pytest.raises(UnsupportedModel, match="token's id"):
        Parts.of(Gemma4TextConfig())


def test_every_other_family_of_transformers_has_its_parts() -> None:
    named = [kind for kind in families() if not refusal(variants(kind)[0])]
    assert len(named) >= 84
    for kind in named:
        assert Parts.of(variants(kind)[0]).layers


def test_blocks_that_use_an_earlier_ones_choice_stay_together(tmp_path: Path) -> None:
    checkpoint = _save(variants("glm_moe_dsa")[0], tmp_path)
    assert cuts(checkpoint.config) == (0, 1, 3, 4, 6)
    with pytest.raises(SpanError, match="0, 1, 3, 4, 6"):
        Shard(checkpoint, Span(0, 2), torch.float32, CPU)


@given(st.lists(st.booleans(), min_size=1, max_size=24))
def test_no_cut_parts_a_block_from_what_it_uses(shared: list[bool]) -> None:
    kinds = ["full", *("shared" if each else "full" for each in shared)]
    config = GlmMoeDsaConfig(num_hidden_layers=len(kinds), indexer_types=kinds)
    allowed = cuts(config)
    assert allowed[0] == 0
    assert allowed[-1] == len(kinds)
    assert set(allowed[:-1]) == {at for at, kind in enumerate(kinds) if kind == "full"}


@given(
    st.sampled_from(["llama", "gemma2", "deepseek_v3", "qwen3_next", "minimax", "inkling_text"]),
    st.integers(0, 6),
    st.integers(0, 40),
)
def test_cache_bytes_add_up_and_never_shrink(kind: str, at: int, length: int) -> None:
    config = _CONFIGS.setdefault(kind, variants(kind)[0])
    total = n_blocks(config)
    parts = sum(cache_bytes(config, Span(a, b), torch.bfloat16, length) for a, b in ((0, at), (at, total)) if a < b)
    assert parts == cache_bytes(config, Span(0, total), torch.bfloat16, length)
    assert parts <= cache_bytes(config, Span(0, total), torch.bfloat16, length + 1)


_CONFIGS: dict[str, Any] = {}


def test_cache_bytes_of_published_sizes() -> None:
    llama_70b = LlamaConfig(hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8)
    assert cache_bytes(llama_70b, Span(0, 80), torch.bfloat16, 1) == 2 * 8 * 128 * 2 * 80
    latent = DeepseekV3Config()
    assert cache_bytes(latent, Span(0, 1), torch.bfloat16, 1) == (512 + 64) * 2
