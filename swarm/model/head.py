"""What surrounds the blocks: embedding before them; final norm, LM head and scaling of logits after them.

A client or a pipeline's lead holds it. It is the family's own causal language model with a turn
in the place of its blocks: whatever the family does to embeddings on the way in (positions,
projections, norms, factors) and to hidden states on the way out (norms, merging of streams, caps on
logits) happens here, without a line per family.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from swarm.errors import OutOfMemory, UnsupportedModel
from swarm.model.arena import Arena
from swarm.model.blocks import assign, copy_without_blocks, whole_of
from swarm.model.checkpoint import Checkpoint
from swarm.model.few_rows import try_few_rows, use_few_rows
from swarm.model.names import cook
from swarm.model.norms import use_norm_rows
from swarm.model.parted import linear_in_parts


class _Turn(nn.Module):
    """Takes what would enter the first block, and gives what should come out of the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: torch.Tensor | None = None
        self.given: torch.Tensor | None = None
        self.in_tuple = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.taken = args[0] if args else kwargs["hidden_states"]
        # Several residual streams a token travel side by side in one row.
        output = self.taken if self.given is None else self.given.reshape(self.taken.shape)
        return (output, None) if self.in_tuple else output


class Head:
    """Token embedding, final norm and LM head."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        """Raises UnsupportedModel, CorruptData, OutOfMemory."""
        self.dtype = dtype
        self.device = device
        whole = whole_of(checkpoint, dtype)
        model = cast(Any, copy_without_blocks(whole.model, whole.base, whole.parts, range(0)))
        self._turn = _Turn()
        base = getattr(model, model.base_model_prefix)
        base.get_submodule(whole.parts.layers).append(self._turn)
        wanted = [recipe for recipe in whole.recipes if whole.block_of(recipe.target) is None]
        try:
            loaded = cook(checkpoint, whole.model, wanted, dtype, device)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(f"the embedding and LM head do not fit on {device}") from error
        arena = Arena()
        _fill(model, {name: arena.place(tensor) for name, tensor in loaded.items()}, checkpoint)
        self._model = model.to(device).eval().requires_grad_(False)
        self._base = base
        self._config = model.config
        self._lock = threading.Lock()  # embedding on the loop and logits on a thread share the turn
        self._plain_embed: nn.Module | None = None
        self._plain_head: nn.Sequential | None = None
        self._learn_turn()
        self._learn_shortcuts(whole.parts.norm)

    @property
    def model(self) -> Any:
        """The family's causal language model without its blocks."""
        return self._model

    @property
    def width(self) -> int:
        """Numbers a token's hidden state has between blocks."""
        return self._width

    @property
    def vocabulary(self) -> int:
        """Logits of one token."""
        return self._vocabulary

    def embed(self, ids_BT: torch.Tensor, positions_BT: torch.Tensor | None = None) -> torch.Tensor:
        """Token ids [B, T] to hidden states [B, T, width]. positions_BT: position ids, else 0, 1, 2, …;
        they matter to families with learned positions only."""
        ids = ids_BT.to(self.device)
        if self._plain_embed is not None:
            return cast(torch.Tensor, self._plain_embed(ids))
        with self._lock:
            self._turn.given = None
            self._base(input_ids=ids, position_ids=self._positions(ids, positions_BT), use_cache=False)
            hidden, self._turn.taken = cast(torch.Tensor, self._turn.taken), None
        return hidden.flatten(2)

    def logits(self, hidden: torch.Tensor, between: Callable[[], None] | None = None) -> torch.Tensor:
        """Hidden states [..., width] after the last block to logits [..., V].

        `between`: called between parts of the product with the vocabulary, forward and backward, where the family's
        head is a norm and a linear layer and autocast is off. `hidden` is [N, width] then."""
        if self._plain_head is not None:
            norm, product = self._plain_head
            narrowed = torch.is_autocast_enabled(self.device.type)
            if between is not None and isinstance(product, nn.Linear) and not narrowed:
                return linear_in_parts(norm(hidden), product, between)
            return cast(torch.Tensor, self._plain_head(hidden))
        lead = hidden.shape[:-1]
        # One token a row: then no mask over the others is made.
        rows_N1D = hidden.reshape(math.prod(lead), 1, hidden.shape[-1])
        embeds = rows_N1D[..., : self._embedding_width]  # says how many rows there are; the turn gives the rest
        with self._lock:
            self._turn.given = rows_N1D
            try:
                output = self._model(inputs_embeds=embeds, position_ids=self._positions(embeds), use_cache=False)
            finally:
                self._turn.given = self._turn.taken = None
        return cast(torch.Tensor, output.logits).reshape(*lead, -1)

    def _positions(self, inputs: torch.Tensor, positions_BT: torch.Tensor | None = None) -> torch.Tensor:
        if positions_BT is not None:
            return positions_BT.to(self.device)
        return torch.arange(inputs.shape[1], device=self.device).unsqueeze(0)

    def _learn_turn(self) -> None:
        """Find the width, and whether this family's blocks return a tuple: what runs and fits is right."""
        self._embedding_width = int(self._model.get_input_embeddings().weight.shape[-1])
        with torch.no_grad():
            for in_tuple in (True, False):
                self._turn.in_tuple = in_tuple
                try:
                    self._width = self.embed(torch.zeros((2, 1), dtype=torch.long)).shape[-1]
                    logits = self.logits(torch.zeros((2, 3, self._width), dtype=self.dtype, device=self.device))
                except (TypeError, AttributeError, ValueError, IndexError):
                    continue
                if logits.shape[:2] == (2, 3):
                    self._vocabulary = logits.shape[-1]
                    return
        raise UnsupportedModel(
            f"model type '{self._config.model_type}' calls its blocks in a way this version knows not"
        )

    def _learn_shortcuts(self, norm: str) -> None:
        """Most families look up a table on the way in, and norm and project on the way out. Where that alone
        gives the same bits it is done directly: the model around it costs half a millisecond a token."""
        table, lm_head = self._model.get_input_embeddings(), self._model.get_output_embeddings()
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, table.weight.shape[0], (2, 5), generator=generator).to(self.device)
        positions = torch.tensor([[0, 1, 2, 3, 4], [9, 8, 7, 6, 5]], device=self.device)
        hidden = 3 * torch.randn((2, 2, self._width), generator=generator)
        hidden = hidden.to(device=self.device, dtype=self.dtype)
        with torch.no_grad():
            if torch.equal(self.embed(ids, positions), table(ids)):
                self._plain_embed = table
            last: Any = self._base
            for step in norm.split("."):
                last = getattr(last, step, None)
            if last is not None and self._width == lm_head.weight.shape[-1]:
                direct = nn.Sequential(last, lm_head)
                if torch.equal(self.logits(hidden), direct(hidden)):
                    self._plain_head = direct

    def use_few_rows(self) -> None:
        """Let norm and LM head take our own kernels for few rows, if a trial shows that it pays."""
        matrix = self._model.get_output_embeddings()
        if isinstance(matrix, nn.Linear):
            trial = try_few_rows(matrix)
            if trial is not None and trial.pays:
                use_few_rows(matrix)
                use_norm_rows(self._model)


def _fill(model: Any, loaded: dict[str, torch.Tensor], checkpoint: Checkpoint) -> None:
    """Assign what was loaded, to tied names too. Raises UnsupportedModel if something is missing."""
    for one, other in model.all_tied_weights_keys.items():
        for name, twin in ((one, other), (other, one)):
            if name not in loaded and twin in loaded:
                loaded[name] = loaded[twin]
    missing = [name for name, _ in model.named_parameters() if name not in loaded]
    if missing:
        raise UnsupportedModel(f"the checkpoint {checkpoint.name} has no tensor '{missing[0]}'")
    state = model.state_dict()
    assign(model, {name: tensor for name, tensor in loaded.items() if name in state})
