"""What rounding to several grids costs, against the definition in float64, for every instruction set."""

import importlib

import pytest
import torch

from fewbits import QuantScheme
from fewbits.methods import grid

native = importlib.import_module("fewbits.native.library")


@pytest.mark.parametrize(("rows", "groups", "size"), [(1, 1, 1), (5, 3, 31), (40, 2, 128), (7, 1, 70)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_errors_are_those_of_the_definition(found, rows, groups, size, bits):
    generator = torch.Generator().manual_seed(rows)
    wide = torch.randn(rows, groups * size + 3, generator=generator)
    weight, most = wide[:, : groups * size], 2**bits - 1
    steps = torch.rand(4, rows, groups, generator=generator) + 2.0**-bits
    points = torch.randint(most + 1, (rows, groups), generator=generator).float()
    costs = torch.rand(groups * size, generator=generator)
    parts, step = weight.double().view(rows, groups, size), steps.double()[..., None]
    low = -points.double()[..., None]
    nearest = (parts / step).round().clamp(low, low + most)
    wanted = ((nearest * step - parts).square() * costs.double().view(groups, size)).sum(-1)
    for isa in (isa for isa in native.ISAS if found.use(isa)):
        for threads in (1, 3):
            errors = found.grid_errors(weight, steps, points, most, costs, threads)
            assert torch.allclose(errors.double(), wanted, rtol=1e-4, atol=1e-9), isa


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_grid_that_is_found_is_the_one_found_without_the_library(found, monkeypatch, symmetric):
    generator = torch.Generator().manual_seed(1)
    weight, scheme = torch.randn(60, 256, generator=generator), QuantScheme(4, "group", 64, symmetric)
    costs = torch.rand(256, generator=generator)
    ours = grid.search_qparams(weight, scheme, costs)
    monkeypatch.setenv("FEWBITS_NATIVE", "0")
    torchs = grid.search_qparams(weight, scheme, costs)
    assert torch.equal(ours[1], torchs[1])
    assert float((ours[0] == torchs[0]).float().mean()) > 0.99  # near ties


def test_groups_that_are_not_alike_are_refused(found):
    steps = torch.ones(1, 2, 3)
    with pytest.raises(ValueError, match="2 x 10 weights in 3 groups"):
        found.grid_errors(torch.ones(2, 10), steps, torch.ones(2, 3), 15, torch.ones(10))
