"""The outer optimizer is torch's SGD, and parameters have one hash."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from swarm.config import OuterSettings
from swarm.errors import CorruptData
from swarm.optim.outer import outer_step
from swarm.optim.params import block_hash, hash_all, pack_block, params_hash, unpack_block


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("rate", "momentum"), [(0.7, 0.9), (1.0, 0.5), (0.3, 0.0)])
def test_it_is_torchs_sgd(rate: float, momentum: float, nesterov: bool) -> None:
    generator = np.random.Generator(np.random.Philox(key=3))
    params = {"0/a": generator.normal(size=(4, 5)).astype(np.float32)}
    parameter = torch.nn.Parameter(torch.from_numpy(params["0/a"].copy()))
    sgd = torch.optim.SGD([parameter], lr=rate, momentum=momentum, nesterov=nesterov and momentum > 0)
    settings = OuterSettings(lr=rate, momentum=momentum, nesterov=nesterov)
    state: dict[str, np.ndarray] = {}
    for _ in range(5):
        gradient = {"0/a": generator.normal(size=(4, 5)).astype(np.float32)}
        step = outer_step(gradient, state, settings)
        params["0/a"] = params["0/a"] + step.update["0/a"]
        state = step.momentum
        parameter.grad = torch.from_numpy(gradient["0/a"])
        sgd.step()
        # torch fuses multiply and add, which rounds once less.
        np.testing.assert_allclose(params["0/a"], parameter.detach().numpy(), rtol=2e-6, atol=2e-6)


def test_lr_one_without_momentum_is_the_mean_itself() -> None:
    gradient = {"0/a": np.array([0.1, -3.0], np.float32)}
    step = outer_step(gradient, {}, OuterSettings(lr=1.0, momentum=0.0))
    np.testing.assert_array_equal(step.update["0/a"], -gradient["0/a"])
    assert step.momentum == {}


def test_a_key_without_gradient_keeps_its_momentum() -> None:
    old = {"0/a": np.ones(2, np.float32), "1/a": np.ones(2, np.float32)}
    step = outer_step({"0/a": np.ones(2, np.float32)}, old, OuterSettings(lr=1.0, momentum=0.5))
    np.testing.assert_array_equal(step.momentum["0/a"], np.full(2, 1.5, np.float32))
    assert step.momentum["1/a"] is old["1/a"]
    assert list(step.update) == ["0/a"]


def test_hashes_tell_keys_shapes_and_values_apart() -> None:
    values = np.arange(6, dtype=np.float32)
    hashes = {
        block_hash({"0/a": values}),
        block_hash({"0/b": values}),
        block_hash({"0/a": values.reshape(2, 3)}),
        block_hash({"0/a": values.reshape(3, 2)}),
        block_hash({"0/a": values + 1}),
        block_hash({"0/a": values[:3], "0/b": values[3:]}),
    }
    assert len(hashes) == 6


def test_hashes_do_not_depend_on_order_or_layout() -> None:
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(2, np.float32)
    assert block_hash({"0/a": a, "0/b": b}) == block_hash({"0/b": b, "0/a": np.asfortranarray(a)})
    both = {"10/a": a, "2/a": b, "head/x": a}
    parts = {name: block_hash({key: both[key]}) for name, key in [("head", "head/x"), ("2", "2/a"), ("10", "10/a")]}
    assert hash_all(both) == params_hash(parts)


def test_blocks_pack_and_unpack() -> None:
    block = {"3/b": np.arange(4, dtype=np.float32).reshape(2, 2), "3/a": np.ones((1, 3), np.float32)}
    shapes = {key: value.shape for key, value in block.items()}
    data = pack_block(block)
    assert data[:12] == np.ones(3, "<f4").tobytes()
    back = unpack_block(data, shapes)
    assert all((back[key] == block[key]).all() for key in block)
    back["3/a"] += 1  # writable: nodes add updates in place
    with pytest.raises(CorruptData):
        unpack_block(data[:-1], shapes)
