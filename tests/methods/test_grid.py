import pytest
import torch

import oracles
from checks import FLOATS, assert_same, schemes
from fewbits.affine import choose_qparams, quantize
from fewbits.errors import InputError
from fewbits.methods import METHODS, WeightedRTN
from fewbits.methods.grid import candidates, search_qparams
from fewbits.scheme import QuantScheme


def inputs(columns: int) -> torch.Tensor:
    x = torch.randn(3 * columns, columns, dtype=torch.float64) * torch.rand(columns) ** 3
    return x @ torch.randn(columns, columns, dtype=torch.float64)


@pytest.mark.parametrize("scheme", schemes("tensor", "channel", 4, 8), ids=lambda s: s.label)
@pytest.mark.parametrize("full", [False, True], ids=["diagonal", "blocks"])
def test_each_scale_is_the_candidate_of_least_error(scheme, full):
    weight, x = torch.randn(5, 16, dtype=torch.float64), inputs(16)
    hessian = x.T @ x
    hessian = hessian if full else hessian.diagonal().diag()
    scale, zero_point = search_qparams(weight, scheme, hessian if full else hessian.diagonal())
    wide, point = choose_qparams(weight, scheme)
    best = oracles.best_shrinks(weight, wide, point, scheme, hessian, list(candidates(scheme)))
    assert torch.equal(scale, wide * torch.tensor(candidates(scheme), dtype=torch.float64)[best])
    assert torch.equal(zero_point, point)


def test_long_groups_are_weighed_in_blocks_of_neighbours():
    weight, x = torch.randn(3, 256, dtype=torch.float64), inputs(256)
    hessian = x.T @ x
    inside = torch.block_diag(hessian[:128, :128], hessian[128:, 128:])
    scheme = QuantScheme(3, "channel")
    assert torch.equal(*(search_qparams(weight, scheme, h)[0] for h in (hessian, inside)))


@pytest.mark.parametrize("rows", [1, 700])
def test_slices_of_rows_change_nothing(rows):
    weight, importance = torch.randn(rows, 512), torch.rand(512)
    whole, _ = search_qparams(weight, QuantScheme(4, "group", 32), importance)
    each = [
        search_qparams(row[None], QuantScheme(4, "group", 32), importance)[0] for row in weight[::50]
    ]
    assert torch.equal(whole[::50], torch.cat(each))


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_group_of_zeros_and_one_without_importance_keep_the_grid_of_their_range(dtype):
    weight, importance = torch.randn(2, 16).to(dtype), torch.ones(16)
    weight[0, :8] = 0
    importance[8:] = 0
    scheme = QuantScheme(4, "group", 8)
    scale, _ = search_qparams(weight, scheme, importance)
    wide, _ = choose_qparams(weight, scheme)
    assert scale.dtype == dtype
    assert scale[0, 0] == wide[0, 0] == 1
    assert torch.equal(scale[:, 1], wide[:, 1])


def test_a_scale_that_would_vanish_stays():
    weight = torch.full((1, 8), torch.finfo(torch.float16).tiny * 2**-10, dtype=torch.float16)
    scale, _ = search_qparams(weight, QuantScheme(8, "channel"), torch.ones(8))
    assert scale > 0


def test_weighted_rounding_takes_the_nearest_code_of_the_searched_grid():
    weight, x = torch.randn(5, 16), inputs(16).float()
    scheme, stats = QuantScheme(4, "group", 8, symmetric=False), {"hessian": x.T @ x}
    before = weight.clone()
    quantized, notes = WeightedRTN()(weight, scheme, stats, torch.bfloat16)
    scale, zero_point = search_qparams(weight, scheme, x.T @ x, torch.bfloat16)
    assert torch.equal(weight, before)
    assert quantized.scale.dtype == torch.bfloat16
    assert torch.equal(quantized.scale, scale)
    assert torch.equal(quantized.codes, quantize(weight, scale, zero_point, scheme))
    assert notes == []
    assert_same(WeightedRTN()(weight, scheme, stats, torch.bfloat16)[0], quantized)
    assert METHODS["weighted-rtn"]().needs == {"hessian"}


def test_what_cannot_be_quantized_is_refused():
    with pytest.raises(InputError, match="NaN"):
        search_qparams(torch.full((2, 8), torch.nan), QuantScheme(4, "channel"), torch.ones(8))


def test_a_coarse_search_tries_every_so_many_of_the_fractions():
    weight, importance = torch.randn(16, 64, dtype=torch.float64), torch.rand(64).double()
    scheme = QuantScheme(4, "group", 32)
    wide, point = choose_qparams(weight, scheme)
    tried = list(candidates(scheme))[::3]
    best = oracles.best_shrinks(weight, wide, point, scheme, torch.diag(importance), tried)
    scale, _ = search_qparams(weight, scheme, importance, every=3)
    assert torch.equal(scale, wide * torch.tensor(tried, dtype=torch.float64)[best])
