"""Many adapters over one view: every row of a batch gets its own.

In: a view, adapters as arrays by key, and for each forward pass the adapter of every row. Out: the
view's own `forward`, whose modules then compute each row as if its adapter were the only one. A module
is replaced in its parent the first time that an adapter changes it, so a view without adapters is
left as it was. Never evicts: memory is the caller's to account (`nbytes`). Only the compute
thread touches a bank.

What a method computes is its own file's (`swarm.adapters.lora`): it turns an adapter into `Part`s, one
for each module it changes, and the parts of a batch's rows into a `Kernel`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from swarm.adapters import lora
from swarm.config import LoraMethod
from swarm.errors import AdapterNotFound, UnsupportedModel
from swarm.model.shard import View

BASE = b""
"""The id of rows that take the base model as it is."""


class Kernel(Protocol):
    """What a method adds to one module for the rows of one batch."""

    def __call__(self, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """`x`: what the module was given, `result`: what it returned or an earlier kernel made of that."""


class Part(Protocol):
    """One adapter's tensors at one module."""

    @property
    def nbytes(self) -> int: ...

    def check(self, site: str, module: nn.Module) -> None:
        """Raises UnsupportedModel if the module is not one that this part fits."""

    @classmethod
    def kernel(cls, parts: Sequence[Any]) -> Kernel:
        """For a batch whose i-th row has `parts[i]`, or None; not all are None."""


class _Rows:
    """The adapters of a batch's rows. Modules keep their kernels for as long as they meet the same object."""

    def __init__(self, ids: tuple[bytes, ...]) -> None:
        self.ids = ids


class BankedModule(nn.Module):
    """A module of the view and what adapters add to it; everything else about it is the inner module's."""

    def __init__(self, inner: nn.Module, bank: AdapterBank) -> None:
        super().__init__()
        self.inner = inner
        self.parts: dict[bytes, Part] = {}
        self.training = inner.training
        self._bank = bank
        self._rows: _Rows | None = None
        self._kernels: tuple[Kernel, ...] = ()

    def __getattr__(self, name: str) -> Any:
        # Model code reads `weight`, `in_features` and the like.
        modules = self.__dict__.get("_modules", {})
        if name in modules or "inner" not in modules:
            return super().__getattr__(name)
        return getattr(modules["inner"], name)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result: torch.Tensor = self.inner(x, *args, **kwargs)
        rows = self._bank.current
        if rows is None:
            return result
        if rows is not self._rows:
            self._kernels, self._rows = self._kernels_of(rows), rows
        for kernel in self._kernels:
            result = kernel(x, result)
        return result

    def put(self, adapter_id: bytes, part: Part) -> None:
        self.parts[adapter_id] = part
        self._rows, self._kernels = None, ()

    def drop(self, adapter_id: bytes) -> None:
        del self.parts[adapter_id]
        # Kernels hold tensors: what is removed must not live on in them.
        self._rows, self._kernels = None, ()

    def _kernels_of(self, rows: _Rows) -> tuple[Kernel, ...]:
        parts = [self.parts.get(adapter_id) for adapter_id in rows.ids]
        kinds = dict.fromkeys(type(part) for part in parts if part is not None)
        return tuple(kind.kernel([p if isinstance(p, kind) else None for p in parts]) for kind in kinds)


class AdapterBank:
    """The adapters of one view."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._blocks = cast(nn.ModuleList, view.model.get_submodule(view.parts.layers))
        self._device = next(chain(view.model.parameters(), view.model.buffers())).device
        self._modules: dict[bytes, list[BankedModule]] = {}
        self._last = _Rows(())
        self.current: _Rows | None = None
        """Set within `rows`."""

    def __contains__(self, adapter_id: bytes) -> bool:
        return adapter_id in self._modules

    def __len__(self) -> int:
        return len(self._modules)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held: for each adapter those of its values, in float32."""
        return sum(module.parts[key].nbytes for key, modules in self._modules.items() for module in modules)

    def add(
        self,
        adapter_id: bytes,
        method: LoraMethod | lora.LoraAdapter,
        values: Mapping[str, NDArray[np.float32]],
    ) -> None:
        """Take an adapter's tensors of this view's blocks, or fewer; replaces one of the same id.

        Raises UnsupportedModel if a tensor does not fit the view, and leaves the bank as it was.
        """
        if adapter_id == BASE:
            raise ValueError("the empty id is the base model's")
        parts = lora.parts(method, values, self._device)
        for site, part in parts.items():
            module = self._find(site)
            part.check(site, module.inner if isinstance(module, BankedModule) else module)
        if adapter_id in self:
            self.remove(adapter_id)
        self._modules[adapter_id] = [self._banked(site) for site in parts]
        for module, part in zip(self._modules[adapter_id], parts.values(), strict=True):
            module.put(adapter_id, part)

    def remove(self, adapter_id: bytes) -> None:
        """Let go of an adapter. Raises AdapterNotFound."""
        if adapter_id not in self:
            raise _not_loaded(adapter_id)
        for module in self._modules.pop(adapter_id):
            module.drop(adapter_id)
        self._last = _Rows(())

    @contextmanager
    def rows(self, ids: Sequence[bytes]) -> Iterator[None]:
        """Around `view.forward`: the adapter of each row of the batch, `BASE` for none. Raises AdapterNotFound."""
        wanted = tuple(ids)
        if wanted != self._last.ids:
            for adapter_id in wanted:
                if adapter_id != BASE and adapter_id not in self:
                    raise _not_loaded(adapter_id)
            self._last = _Rows(wanted)
        self.current = self._last if any(wanted) else None
        try:
            yield
        finally:
            self.current = None

    def _path(self, site: str) -> tuple[int, str]:
        block, path = site.split("/", 1)
        if int(block) not in self._view.span:
            raise UnsupportedModel(f"the adapter's {site} is outside the blocks {self._view.span} of this view")
        return int(block) - self._view.span.start, path

    def _find(self, site: str) -> nn.Module:
        index, path = self._path(site)
        module: nn.Module = self._blocks[index]
        for name in path.split("."):
            # An expert sees the tokens that were routed to it: which rows they are of is lost.
            if isinstance(module, nn.ModuleList) and "expert" in path:
                raise UnsupportedModel(f"the adapter changes {site}, one of several experts: it cannot share a batch")
            found = module._modules.get(name)
            if found is None:
                raise UnsupportedModel(f"the adapter changes {site}, which the model's blocks do not have")
            module = found
        return module

    def _banked(self, site: str) -> BankedModule:
        module = self._find(site)
        if isinstance(module, BankedModule):
            return module
        index, path = self._path(site)
        owner, _, leaf = path.rpartition(".")
        banked = BankedModule(module, self)
        setattr(self._blocks[index].get_submodule(owner), leaf, banked)
        return banked


def _not_loaded(adapter_id: bytes) -> AdapterNotFound:
    return AdapterNotFound(f"the adapter {adapter_id.hex()[:16]} is not loaded here", "open a new session")
