"""The adapters of one job on this node's blocks: forward, backward, optimizer.

Called on the compute thread only. The frozen weights are shared with serving; parameters,
gradients and AdamW's moments are float32 and belong to the job. A forward pass keeps its graph
until the matching backward.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from node.memory import Ledger
from node.serving import NodeModel
from swarm.adapters.registry import Parameters, get_values, set_values
from swarm.config import JobSpec
from swarm.errors import ContextTooLong, ProtocolError
from swarm.ids import Span

_MAX_IN_FLIGHT = 64
_OPTIMIZER_COPIES = 6  # parameter, gradient, two moments, reference, residual


class AdapterStage:
    """One job's trainable part of a span."""

    def __init__(self, model: NodeModel, span: Span, spec: JobSpec, ledger: Ledger, owner: str) -> None:
        """Builds the view and injects the method. Raises OutOfMemory, UnsupportedModel."""
        shapes = model.adapters.span_shapes(spec.method, span)
        count = sum(int(np.prod(shape)) for shape in shapes.values())
        ledger.charge("optimizer", owner, count * 4 * _OPTIMIZER_COPIES)
        self.span = span
        self.shapes = shapes
        self._model = model
        self._ledger = ledger
        self._owner = owner
        # A view of its own: injection replaces modules, which serving views must not see.
        self._view = model.shard.view(span)
        self.parameters = model.adapters.attach(self._view, spec.method)
        self._optimizer = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=spec.inner.lr,
            betas=spec.inner.betas,
            eps=spec.inner.eps,
            weight_decay=spec.inner.weight_decay,
        )
        self._in_flight: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def admit(self, shape_BTD: tuple[int, ...], position: int) -> None:
        """Check a batch and charge its activations. Raises ContextTooLong, OutOfMemory. (On the loop.)"""
        batch, time, hidden = shape_BTD
        if time > self._model.context_length:
            raise ContextTooLong(f"{time} tokens are more than the model's context of {self._model.context_length}")
        inner = getattr(self._model.checkpoint.config, "intermediate_size", 4 * hidden)
        # What autograd keeps of a block: about ten tensors of the hidden and four of the inner width.
        per_token = (10 * hidden + 4 * inner) * self._model.shard.dtype.itemsize
        self._ledger.charge("activations", self._owner, batch * time * per_token * len(self.span))

    def forward(self, seq: int, hidden_BTD: torch.Tensor, *, input_grad: bool) -> torch.Tensor:
        """Run the blocks and keep the graph. `input_grad`: whether backward must return the input's gradient."""
        if len(self._in_flight) >= _MAX_IN_FLIGHT:
            raise ProtocolError(
                f"{_MAX_IN_FLIGHT} batches wait for their gradients", "send gradients before more batches"
            )
        hidden = hidden_BTD.detach().requires_grad_(input_grad)
        with torch.enable_grad():
            output = self._view.forward(hidden)
        self._in_flight[seq] = (hidden, output)
        return output.detach()

    def backward(self, seq: int, grad_BTD: torch.Tensor) -> torch.Tensor | None:
        """Accumulate gradients of batch `seq`; the gradient of its input if it was asked for."""
        kept = self._in_flight.pop(seq, None)
        if kept is None or kept[1].shape != grad_BTD.shape:
            raise ProtocolError(f"a gradient for batch {seq}, which does not wait for one of that shape")
        hidden, output = kept
        torch.autograd.backward(output, grad_BTD)
        return hidden.grad

    def step(self, lr: float) -> None:
        """One AdamW step on the accumulated gradients, which are then cleared."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def reset(self, values: Mapping[str, NDArray[np.float32]]) -> None:
        """Start over from these parameters: gradients and kept graphs go, moments stay."""
        self._in_flight.clear()
        self._optimizer.zero_grad(set_to_none=True)
        set_values(self.parameters, values)

    def values(self) -> Parameters:
        return get_values(self.parameters)

    def moments(self) -> tuple[Parameters, int]:
        """AdamW's state as arrays "m/<key>" and "v/<key>", and its step count; empty before the first step."""
        arrays: Parameters = {}
        steps = 0
        for key, parameter in self.parameters.items():
            state = self._optimizer.state.get(parameter)
            if state:
                arrays[f"m/{key}"] = state["exp_avg"].detach().cpu().numpy().copy()
                arrays[f"v/{key}"] = state["exp_avg_sq"].detach().cpu().numpy().copy()
                steps = int(state["step"])
        return arrays, steps

    def clear_moments(self) -> None:
        """Start AdamW anew."""
        self._optimizer.state.clear()

    def set_moments(self, arrays: Mapping[str, NDArray[np.float32]], steps: int) -> None:
        """Restore what `moments` gave; keys that are not of this span are ignored, absent ones start at zero."""
        for key, parameter in self.parameters.items():
            if f"m/{key}" in arrays and f"v/{key}" in arrays:
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(float(steps)),
                    "exp_avg": torch.from_numpy(arrays[f"m/{key}"].copy()).to(parameter.device),
                    "exp_avg_sq": torch.from_numpy(arrays[f"v/{key}"].copy()).to(parameter.device),
                }

    def close(self) -> None:
        self._in_flight.clear()
        self._ledger.release(self._owner)
