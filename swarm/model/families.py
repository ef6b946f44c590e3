"""What transformers' configurations do not say about a family's parts, and which families cannot be cut.

A family that publishes `base_model_pp_plan` needs no line here. In: a configuration. Out: the names
of its parts, the places where it may be cut, and the reason where it may not be cut at all. Never
reads weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from swarm.errors import UnsupportedModel


@dataclass(frozen=True)
class Parts:
    """Names of a base model's parts within it; dotted where a part lies deeper."""

    embed: str
    layers: str
    norm: str

    @classmethod
    def of(cls, config: Any) -> Parts:
        """From the table below or the family's pipeline plan. Raises UnsupportedModel."""
        reason = refusal(config)
        if reason:
            raise UnsupportedModel(f"model type '{config.model_type}' cannot be cut into blocks: {reason}")
        if config.model_type in TABLE:
            return TABLE[config.model_type]
        plan = list(getattr(config, "base_model_pp_plan", None) or ())
        # Some families put a dropout between embedding and blocks; it has no weights and stays where it is.
        if len(plan) < 3 or plan[-2] != "layers":
            raise UnsupportedModel(f"model type '{config.model_type}' publishes no pipeline plan this version knows")
        return cls(plan[0], plan[-2], plan[-1])


TABLE = {
    "gpt2": Parts("wte", "h", "ln_f"),
    "opt": Parts("decoder.embed_tokens", "decoder.layers", "decoder.final_layer_norm"),
    "bloom": Parts("word_embeddings", "h", "ln_f"),
    "falcon": Parts("word_embeddings", "h", "ln_f"),
}
"""Families that publish no plan. What else their embedding is made of (learned positions, a norm, projections)
needs no name: the head holds every tensor that is in no block."""


def refusal(config: Any) -> str:
    """Why no checkpoint of this configuration can be served block by block; "" if it can."""
    kind = config.model_type
    if kind == "hrm_text":
        return (
            "its two stacks of layers run in turns, several times a token, so that hidden states would cross"
            " every node once a turn"
        )
    if kind == "gemma3n_text":
        return "every block takes an embedding of the token's id of its own, which hidden states do not carry"
    if getattr(config, "hidden_size_per_layer_input", 0):
        return (
            "every block takes an embedding of the token's id of its own (hidden_size_per_layer_input > 0),"
            " which hidden states do not carry"
        )
    if "hash_moe" in (getattr(config, "mlp_layer_types", None) or ()):
        return "its first blocks choose experts by the token's id (hash_moe), which hidden states do not carry"
    return ""


def n_blocks(config: Any) -> int:
    """Blocks of the model. LongCat-Flash counts its attention layers, two a block."""
    return int(getattr(config, "num_layers", 0) if config.model_type == "longcat_flash" else config.num_hidden_layers)


def cuts(config: Any) -> tuple[int, ...]:
    """Where spans may start and end, from 0 to the number of blocks.

    Everywhere, but for families whose blocks take over an earlier block's state (keys and values
    in Gemma 4, chosen tokens in GLM-DSA): those blocks stay on one node.
    """
    total = n_blocks(config)
    forbidden: set[int] = set()
    for source, user in _shared(config):
        forbidden.update(range(source + 1, user + 1))
    return tuple(at for at in range(total + 1) if at not in forbidden)


def _shared(config: Any) -> list[tuple[int, int]]:
    """Pairs (block that computes a state, later block that takes it over)."""
    pairs = []
    modes = getattr(config, "kv_sharing_modes", None) or ()
    for user, mode in enumerate(modes):
        if mode == "reuse":
            kind = config.layer_types[user]
            pairs.append((max(i for i in range(user) if modes[i] == "store" and config.layer_types[i] == kind), user))
    kinds = getattr(config, "indexer_types", None) or ()
    for user, kind in enumerate(kinds):
        if kind == "shared":
            pairs.append((max(i for i in range(user) if kinds[i] != "shared"), user))
    return pairs


OWN_CACHES = {"minimax": "MiniMaxCache"}
"""Cache classes, in the family's own module, that the base model insists on."""
