"""Tiny configurations that still contain every kind of layer their family has.

Families come from transformers: every causal language model whose configuration publishes
`base_model_pp_plan`, and those of the part table. A family's own default configuration is shrunk by
the names of its fields; per-layer lists keep every kind that the default has. What the rules
below cannot know is in `SPECIAL`, each line with its reason.
"""

from __future__ import annotations

import inspect
from dataclasses import fields, is_dataclass
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from swarm.model.families import TABLE

BLOCKS = 6
WINDOW = 5

# Multi-head and latent attention, mixtures of experts, recurrences: the names transformers uses.
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "sliding_window": WINDOW,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 2,
    # latent attention
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "qk_head_dim": 24,
    "v_head_dim": 16,
    # chosen tokens
    "index_topk": 4,
    "index_head_dim": 16,
    "index_n_heads": 2,
    # linear attention
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
SPECIAL: dict[str, dict[str, Any]] = {}


def families() -> list[str]:
    """Model types of all families that should be sharded, in the order of transformers' own list."""
    return [
        kind
        for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if getattr(CONFIG_MAPPING[kind], "base_model_pp_plan", None) or kind in TABLE
    ]


def variants(kind: str) -> list[Any]:
    """Small configurations of a family that together have all its kinds of layers."""
    return [tiny(kind)]


def tiny(kind: str) -> Any:
    """A small configuration of a family."""
    cls = CONFIG_MAPPING[kind]
    default = cls()
    known = {name for base in inspect.getmro(cls) if is_dataclass(base) for name in (f.name for f in fields(base))}
    aliases = getattr(cls, "attribute_map", {})
    wanted = {aliases.get(name, name): value for name, value in SIZES.items()}
    chosen = {
        name: value for name, value in wanted.items() if name in known and getattr(default, name, None) is not None
    }
    if getattr(default, "num_key_value_heads", None) == getattr(default, "num_attention_heads", 0):
        chosen.pop("num_key_value_heads", None)
        if "num_key_value_heads" in known:
            chosen["num_key_value_heads"] = SIZES["num_attention_heads"]
    for turn, (name, values) in enumerate(per_block_lists(default).items()):
        if name in known:
            kinds = list(dict.fromkeys(values))
            chosen[name] = [kinds[i // (turn + 1) % len(kinds)] for i in range(BLOCKS)]
    chosen.update(SPECIAL.get(kind, {}))
    return cls(**chosen)


def per_block_lists(config: Any) -> dict[str, list[Any]]:
    """Lists of a configuration that say something about each block."""
    return {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list) and len(value) == config.num_hidden_layers and isinstance(value[0], (str, bool, int))
    }
