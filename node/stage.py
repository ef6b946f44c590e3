"""The adapters of one job on this node's blocks: forward, backward, optimizer.

Called on the computing thread that trains, which gives way to serving between layers. The frozen weights are
shared with serving; parameters, gradients and AdamW's moments are float32 and belong to the job. A forward
pass keeps its graph until the matching backward; gradients add up until a step or a skip.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from node.layers import between_layers
from node.memory import Ledger
from node.recompute import RecomputeSwitch, kept_bytes, recomputed_bytes
from node.serving import NodeModel
from swarm.adapters.registry import Parameters, get_values, set_values
from swarm.config import JobSpec
from swarm.errors import ContextTooLong, JobConflict, OutOfMemory, ProtocolError, UnsupportedModel
from swarm.ids import Span
from swarm.model.cast_again import cast_again, kept_cast_bytes
from swarm.model.packed import keeps_apart

log = structlog.get_logger()
_MAX_IN_FLIGHT = 256
_OPTIMIZER_COPIES = 6  # parameter, gradient, two moments, reference, residual
_OVERLAP_COPIES = 4  # parameters and two moments as a round ended, parameters set aside while a round is scored


class AdapterStage:
    """One job's trainable part of a span."""

    def __init__(
        self,
        model: NodeModel,
        span: Span,
        spec: JobSpec,
        ledger: Ledger,
        owner: str,
        give_way: Callable[[], None] = lambda: None,
    ) -> None:
        """Builds the view and injects the method. `give_way` is called between layers, forward and backward.

        Raises OutOfMemory, UnsupportedModel (also of packed rows), JobConflict (precision)."""
        if spec.precision == "float32" and model.shard.dtype != torch.float32:
            held = str(model.shard.dtype).removeprefix("torch.")
            raise JobConflict(
                f"the job computes in float32, this node holds its blocks in {held}",
                "start the node with --dtype float32, or leave the job's precision out",
            )
        if model.shard.dtype == torch.float16:
            raise JobConflict(
                "this node holds its blocks in float16, in which gradients are rounded to zero",
                "start the node with --dtype bfloat16 or float32",
            )
        shapes = model.adapters.span_shapes(spec.method, span)
        count = sum(int(np.prod(shape)) for shape in shapes.values())
        copies = _OPTIMIZER_COPIES + (_OVERLAP_COPIES if spec.schedule.overlap_steps else 0)
        ledger.charge("optimizer", owner, count * 4 * copies)
        self.span = span
        self.shapes = shapes
        self._model = model
        self._ledger = ledger
        self._owner = owner
        try:
            self._build(spec, give_way)
        except BaseException:
            ledger.release(owner)
            raise

    def _build(self, spec: JobSpec, give_way: Callable[[], None]) -> None:
        model = self._model
        # A view of its own: injection replaces modules, which serving views must not see.
        self._view = model.shard.view(self.span)
        self.parameters = model.adapters.attach(self._view, spec.method, give_way)
        self._optimizer = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=spec.inner.lr,
            betas=spec.inner.betas,
            eps=spec.inner.eps,
            weight_decay=spec.inner.weight_decay,
        )
        self._in_flight: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._charged: dict[int, int] = {}
        """Bytes by batch, from its admission to its gradient."""
        self._recomputed: set[int] = set()
        self._recompute = RecomputeSwitch(self._view.blocks)
        if spec.data.packing and not keeps_apart(self._view, model.width):
            kind = model.checkpoint.config.model_type
            raise UnsupportedModel(
                f"models of type '{kind}' do not keep samples apart that share a row", "set data.packing to false"
            )
        # Weights in bfloat16 need none, and LoRA's products are summed in place only without (`swarm.adapters.fused`).
        self._autocast = spec.precision == "bfloat16" and model.shard.dtype != torch.bfloat16
        self._cast_bytes = 0
        """Copies of weights that every batch keeps for itself."""
        if self._autocast:
            cast_again(self._view.blocks)
            self._cast_bytes = kept_cast_bytes(self._view.blocks, torch.bfloat16)
        between_layers(self._view.blocks, give_way)
        self.give_way = give_way
        """For what is computed beside the blocks."""
        self.reason = ""
        """Why it is slower than it could be; empty: it is not."""

    def fits(self, shape_BTD: tuple[int, ...]) -> bool:
        """Whether one more batch's activations can be kept beside those that are, and leave as much memory again to
        sessions, to other jobs and to what the estimate leaves out. (On the loop.)"""
        kept = sum(self._charged.values()) + self._kept_bytes(shape_BTD)
        return 2 * kept <= self._ledger.free("activations", self._owner)

    def admit(self, seq: int, shape_BTD: tuple[int, ...]) -> None:
        """Check a batch and charge its activations. Raises ContextTooLong, OutOfMemory. (On the loop.)

        Where they do not fit, those of batch `seq` are computed a second time in backward instead of kept.
        """
        self._check_length(shape_BTD)
        others = sum(self._charged.values())
        try:
            self._charge(seq, others, self._kept_bytes(shape_BTD))
        except OutOfMemory as error:
            of_one = self._cast_bytes // len(self.span)
            self._charge(seq, others, recomputed_bytes(*self._sizes(shape_BTD)) + of_one)
            self._recomputed.add(seq)
            if not self.reason:
                self.reason = f"activations are computed twice: {error.cause}"
                log.warning("activations_recomputed", owner=self._owner, reason=self.reason)

    def admit_score(self, shape_BTD: tuple[int, ...]) -> None:
        """Charge a pass that keeps nothing, until `give_back`. Raises ContextTooLong, OutOfMemory. (On the loop.)"""
        self._check_length(shape_BTD)
        tokens, hidden, inner, _, itemsize = self._sizes(shape_BTD)
        of_one = kept_bytes(tokens, hidden, inner, 1, itemsize) + self._cast_bytes // len(self.span)
        size = sum(self._charged.values()) + of_one
        self._ledger.charge("activations", self._owner, size)

    def _check_length(self, shape_BTD: tuple[int, ...]) -> None:
        if shape_BTD[1] > self._model.context_length:
            raise ContextTooLong(
                f"{shape_BTD[1]} tokens are more than the model's context of {self._model.context_length}"
            )

    def give_back(self) -> None:
        """Charge only what is kept: what is done with goes back with the next batch, or here. (On the loop.)"""
        self._ledger.charge("activations", self._owner, sum(self._charged.values()))

    def _kept_bytes(self, shape_BTD: tuple[int, ...]) -> int:
        return kept_bytes(*self._sizes(shape_BTD)) + self._cast_bytes

    def _sizes(self, shape_BTD: tuple[int, ...]) -> tuple[int, int, int, int, int]:
        """What `node.recompute` estimates activations by."""
        batch, time, hidden = shape_BTD
        inner = getattr(self._model.checkpoint.config, "intermediate_size", None) or 4 * hidden
        return batch * time, hidden, inner, len(self.span), self._model.shard.dtype.itemsize

    def _charge(self, seq: int, others: int, size: int) -> None:
        self._ledger.charge("activations", self._owner, others + size)
        self._charged[seq] = size

    def precision(self) -> AbstractContextManager[object]:
        """What a forward pass runs in."""
        return torch.autocast(self._model.shard.device.type, torch.bfloat16) if self._autocast else nullcontext()

    def forward(
        self, seq: int, hidden_BTD: torch.Tensor, positions_BT: torch.Tensor | None = None, *, input_grad: bool
    ) -> torch.Tensor:
        """Run the blocks and keep the graph. `input_grad`: whether backward must return the input's gradient.
        `positions_BT`: position ids of packed rows; None: every row is one sample."""
        if len(self._in_flight) >= _MAX_IN_FLIGHT:
            raise ProtocolError(
                f"{_MAX_IN_FLIGHT} batches wait for their gradients", "send gradients before more batches"
            )
        hidden = hidden_BTD.detach().requires_grad_(input_grad)
        self._recompute.on = seq in self._recomputed
        with torch.enable_grad(), self.precision():
            output = self._view.forward(
                hidden, positions_BT=None if positions_BT is None else positions_BT.to(hidden.device)
            )
        self._in_flight[seq] = (hidden, output)
        return output.detach()

    def score(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Run the blocks and keep nothing: no gradient will come. The same bits as `forward`."""
        self._recompute.on = False
        parameters = list(self.parameters.values())
        try:
            # Instead of `no_grad`, under which layers take other ways, which round otherwise.
            for parameter in parameters:
                parameter.requires_grad_(False)
            with torch.enable_grad(), self.precision():
                return self._view.forward(hidden_BTD.detach())
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)

    def backward(self, seq: int, grad_BTD: torch.Tensor) -> torch.Tensor | None:
        """Accumulate gradients of batch `seq`; the gradient of its input if it was asked for.

        Batches come back in the order they came in: a sum of gradients depends on it by its last bits.
        """
        kept = self._in_flight.get(seq)
        if kept is None or kept[1].shape != grad_BTD.shape:
            raise ProtocolError(f"a gradient for batch {seq}, which does not wait for one of that shape")
        if next(iter(self._in_flight)) != seq:
            raise ProtocolError(f"a gradient for batch {seq} before those of the batches before it")
        self.drop(seq)
        hidden, output = kept
        torch.autograd.backward(output, grad_BTD.to(output.dtype))
        return hidden.grad

    def drop(self, seq: int) -> None:
        """Forget a batch without its gradient: it has none that is finite, or never got this far."""
        self._in_flight.pop(seq, None)
        self._charged.pop(seq, None)
        self._recomputed.discard(seq)

    def squared_norm(self) -> float:
        """Of the accumulated gradient; NaN or infinity if it is not finite. Summed in double, tensor by tensor."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients)) if gradients else torch.zeros(1)
        return float(norms.double().square().sum())

    def step(self, lr: float, scale: float = 1.0) -> None:
        """One AdamW step on the accumulated gradients times `scale`, which are then cleared."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if scale != 1.0:
            torch._foreach_mul_([p.grad for p in self.parameters.values() if p.grad is not None], scale)
        self._optimizer.step()
        self.skip()

    def skip(self) -> None:
        """Drop the accumulated gradients; parameters and moments stay."""
        self._optimizer.zero_grad(set_to_none=True)

    def reset(self, values: Mapping[str, NDArray[np.float32]]) -> None:
        """Start over from these parameters: gradients and kept graphs go, moments stay."""
        self.forget()
        set_values(self.parameters, values)

    def values(self) -> Parameters:
        return get_values(self.parameters)

    def moments(self) -> Parameters:
        """AdamW's state as arrays "m/<key>", "v/<key>" and, of one element, "t/<key>": how many steps it took.

        Empty before the first step.
        """
        arrays: Parameters = {}
        for key, parameter in self.parameters.items():
            state = self._optimizer.state.get(parameter)
            if state:
                arrays[f"m/{key}"] = state["exp_avg"].detach().cpu().numpy().copy()
                arrays[f"v/{key}"] = state["exp_avg_sq"].detach().cpu().numpy().copy()
                arrays[f"t/{key}"] = np.array([float(state["step"])], np.float32)
        return arrays

    def set_moments(self, arrays: Mapping[str, NDArray[np.float32]]) -> None:
        """Restore what `moments` gave; keys that are not of this span are ignored, absent ones start at zero."""
        self._optimizer.state.clear()
        for key, parameter in self.parameters.items():
            if f"t/{key}" in arrays:
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(float(arrays[f"t/{key}"][0])),
                    "exp_avg": torch.from_numpy(arrays[f"m/{key}"].copy()).to(parameter.device),
                    "exp_avg_sq": torch.from_numpy(arrays[f"v/{key}"].copy()).to(parameter.device),
                }

    def forget(self) -> None:
        """Drop accumulated gradients and kept graphs."""
        for seq in list(self._charged):
            self.drop(seq)
        self._in_flight.clear()
        self.skip()

    def close(self) -> None:
        self.forget()
        self._ledger.release(self._owner)
