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
    "linear_num_heads": 2,
    "linear_head_dim": 16,
    # sliding layers with heads of their own
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_head_dim": 16,
    # dense blocks among sparse ones
    "mlp_only_layers": [1, 4],
    # factors that are 1 by default and not in released models
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.3,
    "logits_scaling": 8.0,
}
VIEWS = {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}, "full_attention": None}
# What the field names above cannot know. Several entries: several checkpoints of the family.
SPECIAL: dict[str, list[dict[str, Any]]] = {
    # What the released models set and the defaults leave neutral: factors on the way in and out.
    "afmoe": [{"mup_enabled": True}],
    # Rotary positions in sliding layers only, as released; the default has no positions for full layers at all.
    "cohere_compass_text": [{"rope_parameters": VIEWS}],
    # The default configuration leaves the number of experts open.
    "deepseek_v2": [{"num_experts_per_tok": 2}],
    "dots1": [{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}],
    # Sizes of the sliding layers are keyword arguments of their own.
    "dots3_note_text": [
        {
            "head_dim": 24,
            "swa_num_attention_heads": 2,
            "swa_num_key_value_heads": 2,
            "swa_q_lora_rank": 24,
            "swa_kv_lora_rank": 32,
            "swa_head_dim": 24,
            "swa_qk_nope_head_dim": 16,
            "swa_v_head_dim": 16,
        }
    ],
    # Three block structures: multi-query rotary (7B), alibi (RW), grouped heads with two norms (40B).
    "falcon": [
        {},
        {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
        {"new_decoder_architecture": True, "num_kv_heads": 2},
    ],
    # The small models' embeddings per block are refused with their reason; the large ones (26B-A4B, 31B) have none.
    "gemma4_text": [
        {
            "hidden_size_per_layer_input": 0,
            "global_head_dim": 32,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 24,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
        },
    ],
    # The second one shares keys and values (transformers 5.23 cannot run gemma4_text so without embeddings per block).
    "gemma4_unified_text": [
        {"global_head_dim": 32, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
        {"global_head_dim": 32, "num_kv_shared_layers": 2},
    ],
    # Must be fewer than the blocks.
    "gemma3n_text": [{"num_kv_shared_layers": 2}],
    # The default lets every block choose tokens for itself.
    "glm_moe_dsa": [{"indexer_types": ["full", "full", "shared"] * (BLOCKS // 3)}],
    # The second one scales by depth.
    "gpt2": [{}, {"scale_attn_by_inverse_layer_idx": True}],
    # Heads may differ by block, which the default does not use.
    "laguna": [{"num_attention_heads_per_layer": [4, 2] * (BLOCKS // 2)}],
    # Two attentions a block; rotary positions are `head_dim` wide.
    "longcat_flash": [{"num_layers": BLOCKS, "head_dim": 8, "moe_topk": 2, "zero_expert_num": 2}],
    # All blocks attend to everything by default; released models choose blocks of tokens in most.
    "minimax_m3_vl_text": [
        {
            "layer_types": ["full_attention", "minimax_m3_sparse"] * (BLOCKS // 2),
            "index_block_size": 2,
            "index_topk_blocks": 2,
            "rotary_dim": 8,
        }
    ],
    "ministral": [{"head_dim": 16}],
    # Norm before (most sizes) and norm after with projections (350M).
    "opt": [
        {"ffn_dim": 48, "word_embed_proj_dim": 64},
        {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    ],
    # Image and sound encoders belong to the embedding, which text does not run.
    "phi4_multimodal": [
        {
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 28,
                "crop_size": 28,
            },
            "audio_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_blocks": 2,
                "num_attention_heads": 2,
                "ext_pw_out_channel": 32,
                "depthwise_separable_out_channel": 32,
                "nemo_conv_channels": 32,
            },
        }
    ],
}


def families() -> list[str]:
    """Model types of all families that should be sharded, in the order of transformers' own list."""
    return [
        kind
        for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if getattr(CONFIG_MAPPING[kind], "base_model_pp_plan", None) or kind in TABLE
    ]


def variants(kind: str) -> list[Any]:
    """Small configurations of a family that together have all its kinds of layers."""
    specials, known = SPECIAL.get(kind, [{}]), _fields(kind)
    made = [_tiny(kind, special) for special in specials]
    # Where one kind of attention serves all blocks: a model with a window, too, if the default has none.
    if "sliding_window" in known and "layer_types" not in known and CONFIG_MAPPING[kind]().sliding_window is None:
        made.append(_tiny(kind, {**specials[0], "sliding_window": WINDOW}))
    return made


def _tiny(kind: str, special: dict[str, Any]) -> Any:
    cls, known = CONFIG_MAPPING[kind], _fields(kind)
    default = cls()
    # Some families' sizes differ by block; reading the common one must be asked for.
    default.allow_global_per_layer_attribute_access = True
    aliases = getattr(cls, "attribute_map", {})
    wanted = SIZES | {aliases.get(name, name): value for name, value in SIZES.items()}
    chosen = {
        name: value for name, value in wanted.items() if name in known and getattr(default, name, None) is not None
    }
    for name in known:
        if name.endswith("intermediate_size") and isinstance(getattr(default, name, None), int):
            chosen.setdefault(name, SIZES["moe_intermediate_size"])
    if "num_key_value_heads" in known and default.num_key_value_heads == default.num_attention_heads:
        chosen["num_key_value_heads"] = SIZES["num_attention_heads"]
    for turn, (name, values) in enumerate(per_block_lists(default).items()):
        if name in known and isinstance(values[0], str):
            kinds = _all_kinds(name, list(dict.fromkeys(values)), known)
            chosen[name] = [kinds[i // (turn + 1) % len(kinds)] for i in range(BLOCKS)]
    if "sliding_attention" in chosen.get("layer_types", ()):
        chosen["sliding_window"] = WINDOW
        if "use_sliding_window" in known:
            chosen["use_sliding_window"] = True
    return cls(**chosen | special)


def _all_kinds(name: str, kinds: list[str], known: set[str]) -> list[str]:
    """What a list of a default configuration names, and what it leaves out where all blocks are of one kind."""
    if name == "layer_types" and len(kinds) == 1 and "sliding_window" in known:
        return ["sliding_attention", "full_attention"]
    if name == "mlp_layer_types" and len(kinds) == 1:
        return ["dense", "sparse"]
    return kinds


def _fields(kind: str) -> set[str]:
    """Names that a family's configuration has."""
    bases = [base for base in inspect.getmro(CONFIG_MAPPING[kind]) if is_dataclass(base)]
    return {field.name for base in bases for field in fields(base)}


def per_block_lists(config: Any) -> dict[str, list[Any]]:
    """Lists of a configuration that say something about each block."""
    return {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list) and len(value) == config.num_hidden_layers and isinstance(value[0], (str, bool, int))
    }
