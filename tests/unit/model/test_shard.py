"""Any split of a model computes what the whole model computes, bit for bit."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Qwen3Config,
)

from swarm.errors import CorruptData, ModelMismatch, ModelNotFound, SpanError, UnsupportedModel
from swarm.ids import Span
from swarm.model.checkpoint import Checkpoint, open_for
from swarm.model.shard import Head, Shard, n_blocks

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**GROUPED, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "mistral-window": MistralConfig(**GROUPED, sliding_window=8),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8),
    "olmo2": Olmo2Config(**GROUPED),
    "gpt-neox": GPTNeoXConfig(**SMALL),
}


@pytest.fixture(scope="module", params=list(CONFIGS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp(request.param)
    AutoModelForCausalLM.from_config(CONFIGS[request.param]).save_pretrained(path, max_shard_size="20KB")
    return path


@pytest.mark.parametrize("cuts", [(0, 5), (0, 2, 5), (0, 1, 3, 5)])
def test_prefill_and_cached_decoding_equal_the_whole_model(folder: Path, cuts: tuple[int, ...]) -> None:
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    checkpoint = Checkpoint.open(str(folder))
    head = Head(checkpoint, torch.float32, CPU)
    spans = [Span(a, b) for a, b in pairwise(cuts)]
    views = [Shard(checkpoint, span, torch.float32, CPU).view() for span in spans]
    caches = [view.new_cache() for view in views]
    ids = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(2))
    kept = DynamicCache(config=whole.config)
    with torch.inference_mode():
        for start, end in [(0, 12), (12, 13), (13, 14), (14, 20)]:
            expected = whole(ids[:, start:end], past_key_values=kept).logits
            hidden = head.embed(ids[:, start:end])
            for view, cache in zip(views, caches, strict=True):
                hidden = view.forward(hidden, start, cache)
            assert torch.equal(head.logits(hidden), expected)


def test_a_view_of_a_part_and_views_share_their_weights(folder: Path) -> None:
    shard = Shard(Checkpoint.open(str(folder)), Span(1, 5), torch.float32, CPU)
    part, whole = shard.view(Span(2, 4)), shard.view()
    pointers = {tensor.data_ptr() for tensor in shard.frozen.values()}
    for view in (part, whole):
        assert {p.data_ptr() for p in view.model.parameters()} <= pointers
        assert not any(p.requires_grad for p in view.model.parameters())
    hidden = torch.randn(1, 6, 32)
    with torch.inference_mode():
        alone = Shard(Checkpoint.open(str(folder)), Span(2, 4), torch.float32, CPU).view()
        assert torch.equal(part.forward(hidden), alone.forward(hidden))


def test_only_the_files_of_the_span_are_read(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    checkpoint = Checkpoint.open(str(tmp_path))
    used = {entry.file for name, entry in checkpoint.tensors.items() if ".layers.1." in name or ".layers.2." in name}
    others = {entry.file for entry in checkpoint.tensors.values()} - used
    assert others
    for file in others:
        (tmp_path / file).unlink()
    shard = Shard(checkpoint, Span(1, 3), torch.float32, CPU)
    assert 0 < shard.weight_bytes < sum(entry.size for entry in checkpoint.tensors.values())
    with pytest.raises(CorruptData):
        Head(checkpoint, torch.float32, CPU)


def test_the_hash_names_model_and_revision(folder: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(folder))
    assert Checkpoint.open(str(folder)).model_hash == checkpoint.model_hash
    assert open_for(str(folder), "local", checkpoint.model_hash).name == checkpoint.name
    other = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1e-3)
    other.save_pretrained(tmp_path)
    assert Checkpoint.open(str(tmp_path)).model_hash != checkpoint.model_hash
    with pytest.raises(ModelMismatch):
        open_for(str(folder), "local", checkpoint.model_hash, str(tmp_path))


def test_what_cannot_be_loaded_says_so(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        Checkpoint.open(str(tmp_path / "nothing"))
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        Checkpoint.open(str(tmp_path))
    with pytest.raises(SpanError):
        Span.parse(f"2:{n_blocks(Checkpoint.open(str(folder)).config) + 1}", 5)
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    broken = next(tmp_path.glob("*.safetensors"))
    broken.write_bytes(broken.read_bytes()[:-8])
    with pytest.raises(CorruptData):
        Checkpoint.open(str(tmp_path))


def test_a_family_without_a_known_plan_is_refused(tmp_path: Path) -> None:
    from transformers import GPTJConfig

    small = GPTJConfig(n_layer=2, n_embd=16, n_head=2, rotary_dim=4, vocab_size=16, bos_token_id=1, eos_token_id=2)
    AutoModelForCausalLM.from_config(small).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="gptj"):
        Shard(Checkpoint.open(str(tmp_path)), Span(0, 1), torch.float32, CPU)


def test_code_in_a_checkpoint_is_never_run(folder: Path, tmp_path: Path) -> None:
    import json

    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "evil.Config"}}))
    with pytest.raises(UnsupportedModel, match="code of its own"):
        Checkpoint.open(str(tmp_path))
