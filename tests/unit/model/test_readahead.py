"""Reading ahead changes how long a layer takes, and nothing else."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

from swarm.model.readahead import ReadAheadLinear, read_ahead, try_read_ahead


def linear(in_features: int, out_features: int, *, bias: bool = False) -> nn.Linear:
    """Its weight lies as in a checkpoint file: 8 bytes aligned, no more."""
    layer = nn.Linear(in_features, out_features, bias=bias).requires_grad_(False)
    memory = torch.randn(in_features * out_features + 2)[2:]
    layer.weight = nn.Parameter(memory.view(out_features, in_features), requires_grad=False)
    return layer


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9])
@pytest.mark.parametrize(
    ("in_features", "out_features", "bias"),
    [(576, 192, False), (576, 1536, False), (1536, 576, True), (640, 3001, False), (9000, 130, True)],
)
def test_every_bit_is_the_same(rows: int, in_features: int, out_features: int, bias: bool) -> None:
    torch.manual_seed(rows)
    plain = linear(in_features, out_features, bias=bias)
    ahead = copy.copy(plain)
    read_ahead(ahead)
    assert type(ahead) is ReadAheadLinear
    assert type(plain) is nn.Linear
    input_BTD = torch.randn(1, rows, in_features)
    # Few rows come out as each row alone would, whoever shares the batch; more as the plain layer has them.
    few = rows <= 5
    expected = (
        torch.cat([plain(input_BTD[:, row : row + 1]) for row in range(rows)], dim=1) if few else plain(input_BTD)
    )
    assert torch.equal(ahead(input_BTD), expected)


def test_pieces_are_the_weight_itself() -> None:
    layer = linear(1024, 2000)
    read_ahead(layer)
    assert isinstance(layer, ReadAheadLinear)
    assert len(layer.pieces) == 4
    assert sum(weight.shape[0] for weight, _ in layer.pieces) == 2000
    assert all(w.untyped_storage().data_ptr() == layer.weight.untyped_storage().data_ptr() for w, _ in layer.pieces)


def test_small_layers_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(32, 32), linear(256, 256))
    read_ahead(model)
    assert [type(module) for module in model] == [nn.Linear, ReadAheadLinear]


def test_an_adapter_goes_on_top() -> None:
    torch.manual_seed(0)
    layers = [linear(256, 300), linear(300, 256)]
    plain, ahead = nn.Sequential(*layers), nn.Sequential(*map(copy.copy, layers))
    read_ahead(ahead)
    config = peft.LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False)
    for model in (plain, ahead):
        torch.manual_seed(1)
        peft.inject_adapter_in_model(config, model)
    input_BD = torch.randn(1, 256)
    assert torch.equal(plain(input_BD), ahead(input_BD))
    assert isinstance(ahead.get_submodule("0.base_layer"), ReadAheadLinear)


def test_what_fits_in_a_cache_is_not_tried() -> None:
    assert try_read_ahead(nn.Sequential(linear(256, 256), linear(256, 256))) is None


def test_a_trial_measures_and_changes_nothing() -> None:
    model = nn.Sequential(*[linear(1024, 1024) for _ in range(10)])
    trial = try_read_ahead(model)
    assert trial is not None
    assert trial.exact
    assert trial.plain_s > 0
    assert trial.ahead_s > 0
    assert all(type(module) is nn.Linear for module in model)
