from dataclasses import replace

import pytest
import torch
from torch import Tensor

import oracles
from checks import assert_same, schemes
from fewbits.affine import quantize
from fewbits.errors import InputError
from fewbits.methods import GPTQ, METHODS, RTN, WeightedRTN
from fewbits.methods.gptq import factor
from fewbits.methods.grid import search_qparams
from fewbits.scheme import QuantScheme

W4 = QuantScheme(4, "group", 16)


def problem(rows: int = 8, columns: int = 48, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the Hessian of strongly correlated inputs: else GPTQ has nothing to do."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mixing = randn(columns, columns) * torch.arange(1, columns + 1)[:, None] ** -0.7
    x = randn(4 * columns, columns) @ mixing
    return randn(rows, columns), x.T @ x / len(x)


def loss(weight: Tensor, quantized, hessian: Tensor) -> float:
    error = weight.double() - quantized.dequantize(torch.float64)
    return float(torch.trace(error @ hessian.double() @ error.T))


@pytest.mark.parametrize("sweeps", [0, 2])
@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "by activations"])
@pytest.mark.parametrize("scheme", schemes("tensor", "channel", 8, 16), ids=lambda s: s.label)
def test_codes_equal_the_least_squares_oracle(scheme, act_order, sweeps):
    weight, hessian = problem()
    method = GPTQ(act_order=act_order, sweeps=sweeps)
    quantized, notes = method(weight, scheme, {"hessian": hessian})
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True).tolist() if act_order else list(range(len(hessian)))
    codes = oracles.gptq_codes(weight, hessian, quantized, order, 0.01, sweeps)
    assert torch.equal(quantized.codes, codes)
    assert not notes


def test_more_columns_than_one_lazy_update_holds_change_nothing():
    weight, hessian = problem(rows=4, columns=200)
    quantized, _ = GPTQ(sweeps=1)(weight, QuantScheme(3, "group", 40), {"hessian": hessian})
    order = hessian.diagonal().argsort(descending=True).tolist()
    codes = oracles.gptq_codes(weight, hessian, quantized, order, 0.01, sweeps=1)
    assert torch.equal(quantized.codes, codes)


@pytest.mark.parametrize("seed", range(3))
def test_each_sweep_lowers_the_error_or_leaves_it(seed):
    weight, hessian = problem(rows=16, columns=96, seed=seed)
    scheme = QuantScheme(3, "group", 16)
    damped, stats = hessian + 0.01 * hessian.diagonal().diag(), {"hessian": hessian}
    counts = (0, 1, 2, 5, 50)
    found = [loss(weight, GPTQ(sweeps=n)(weight, scheme, stats)[0], damped) for n in counts]
    assert found == sorted(found, reverse=True)
    assert found[2] < 0.98 * found[0]


def test_its_grid_is_the_search_weighted_by_what_is_left_of_each_column():
    weight, hessian = problem()
    quantized, _ = GPTQ(tries=0)(weight, W4, {"hessian": hessian})
    order = hessian.diagonal().argsort(descending=True)
    damped = hessian + 0.01 * hessian.diagonal().diag()
    left = torch.empty(48, dtype=torch.float64)
    for i, k in enumerate(order):  # the part of column k that the columns after it cannot explain
        rest = order[i + 1 :]
        explained = damped[k, rest] @ torch.linalg.solve(damped[rest][:, rest], damped[rest, k])
        left[k] = damped[k, k] - explained
    scale, zero_point = search_qparams(weight, W4, left)
    assert torch.equal(quantized.scale, scale)
    assert torch.equal(quantized.zero_point, zero_point)


@pytest.mark.parametrize("scheme", schemes("tensor", "channel", 16)[::3], ids=lambda s: s.label)
def test_of_grids_that_are_tried_each_row_takes_one_that_loses_no_more(scheme):
    weight, hessian = problem(rows=16, columns=96)
    damped, stats = hessian + 0.01 * hessian.diagonal().diag(), {"hessian": hessian}

    def losses(tries: int) -> Tensor:
        quantized, _ = GPTQ(sweeps=0, tries=tries)(weight, scheme, stats)
        error = weight - quantized.dequantize(torch.float64)
        lost = ((error @ damped) * error).sum(1)
        return lost.sum(0, keepdim=True) if scheme.granularity == "tensor" else lost

    none, few, many = losses(0), losses(3), losses(12)
    assert bool((few <= none * (1 + 1e-9)).all())
    assert bool((many <= few * (1 + 1e-9)).all())  # the first three are the same
    assert float(many.sum()) < float(none.sum())


def test_uncorrelated_inputs_reduce_it_to_round_to_nearest():
    weight, hessian = problem()
    quantized, _ = GPTQ()(weight, W4, {"hessian": hessian.diagonal().diag()})
    nearest = quantize(weight, quantized.scale, quantized.zero_point, W4)
    assert torch.equal(quantized.codes, nearest)


@pytest.mark.parametrize("seed", range(5))
def test_the_output_error_is_well_below_that_of_weighted_rounding_and_that_below_nearest(seed):
    weight, hessian = problem(seed=seed)
    scheme, stats = QuantScheme(3, "group", 16, symmetric=False), {"hessian": hessian}
    errors = [
        loss(weight, method(weight, scheme, stats)[0], hessian)
        for method in (GPTQ(), WeightedRTN(), RTN())
    ]
    assert errors[0] < 0.6 * errors[1]
    assert errors[1] < errors[2]


def test_the_factors_multiply_to_the_damped_hessian():
    _, hessian = problem()
    order = torch.randperm(48)
    factors = factor(hessian, order, 0.1)
    assert factors is not None
    upper, scale = factors
    assert torch.equal(upper, upper.triu())
    assert torch.equal(upper.diagonal(), torch.ones(48, dtype=torch.float64))
    damped = (hessian + 0.1 * hessian.diagonal().diag())[order][:, order]
    assert torch.allclose(upper * scale @ upper.T, damped, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_arguments_are_not_modified_and_the_scale_has_the_dtype_asked_for(dtype):
    weight, hessian = problem()
    weight, hessian = weight.float(), hessian.float()
    before = weight.clone(), hessian.clone()
    quantized, _ = GPTQ()(weight, W4, {"hessian": hessian}, dtype)
    assert quantized.scale.dtype == dtype
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])
    assert_same(GPTQ()(weight, W4, {"hessian": hessian}, dtype)[0], quantized)


def test_scaling_columns_up_and_their_inputs_down_scales_the_damped_factor_alike():
    _, hessian = problem()
    s = torch.exp2(torch.randint(-6, 7, (48,)).double())
    order = torch.arange(48)
    (plain, left), (scaled, left_scaled) = (
        factor(h, order, 0.01) for h in (hessian, hessian * s * s[:, None])
    )
    assert torch.allclose(left * s**2, left_scaled, rtol=1e-10)
    assert torch.allclose(s[:, None] * plain / s, scaled, rtol=1e-8, atol=1e-12)


# -- the ladder ------------------------------------------------------------------------------------


def indefinite(share: float) -> Tensor:
    """A Hessian with the eigenvalues 1 and, once, minus that share."""
    hessian = torch.eye(16, dtype=torch.float64)
    vector = torch.ones(16, dtype=torch.float64) / 4
    return hessian - (1 + share) * torch.outer(vector, vector)


@pytest.mark.parametrize(("share", "steps"), [(0.0, 0), (0.03, 1), (0.3, 2)])
def test_more_damping_is_tried_twice_and_noted(share, steps):
    weight = torch.randn(4, 16, dtype=torch.float64)
    quantized, notes = GPTQ()(weight, W4, {"hessian": indefinite(share)})
    assert [note.kind for note in notes] == ["fallback"] * steps
    assert all("Cholesky" in note.what for note in notes)
    assert torch.isfinite(quantized.dequantize()).all()


def test_negative_eigenvalues_are_raised_when_damping_does_not_help():
    weight = torch.randn(4, 16, dtype=torch.float64)
    _, notes = GPTQ()(weight, W4, {"hessian": indefinite(30.0)})
    assert len(notes) == 4
    assert "1 eigenvalues of H raised" in notes[-1].what


@pytest.mark.parametrize("scheme", [W4, replace(W4, symmetric=False), QuantScheme(4, "tensor")])
def test_a_hessian_of_zeros_ends_in_weighted_rounding(scheme):
    weight = torch.randn(4, 16)
    quantized, notes = GPTQ()(weight, scheme, {"hessian": torch.zeros(16, 16)})
    assert "weighted rounding" in notes[-1].what
    assert_same(quantized, WeightedRTN()(weight, scheme, {"hessian": torch.zeros(16, 16)})[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite_ends_in_plain_rounding(value):
    weight, hessian = torch.randn(4, 16), torch.eye(16)
    hessian[3, 5] = value
    quantized, notes = GPTQ()(weight, W4, {"hessian": hessian})
    assert len(notes) == 2
    assert_same(quantized, RTN()(weight, W4, {})[0])


def test_an_input_that_is_always_zero_costs_nothing_and_disturbs_nothing():
    weight, hessian = problem()
    hessian[:, 7] = hessian[7] = 0
    quantized, notes = GPTQ()(weight, W4, {"hessian": hessian})
    assert not notes
    others = [k for k in range(48) if k != 7]
    order = [k for k in hessian.diagonal().argsort(descending=True).tolist() if k != 7]
    codes = oracles.gptq_codes(weight, hessian, quantized, order, 0.01, GPTQ().sweeps)
    assert torch.equal(quantized.codes[:, others], codes[:, others])


def test_a_rank_deficient_hessian_is_no_problem():
    x = torch.randn(5, 64)
    weight = torch.randn(8, 64)
    quantized, notes = GPTQ()(weight, W4, {"hessian": x.T @ x})
    assert not notes
    assert loss(weight, quantized, x.T @ x) < loss(weight, RTN()(weight, W4, {})[0], x.T @ x)


@pytest.mark.parametrize("damp", [0.0, -0.1, 1.0, float("nan")])
def test_damping_out_of_range_is_refused(damp):
    with pytest.raises(InputError, match="damp is"):
        GPTQ(damp=damp)


def test_fewer_sweeps_than_none_are_refused():
    with pytest.raises(InputError, match="sweeps is -1"):
        GPTQ(sweeps=-1)


def test_it_is_known_by_name_and_says_what_it_needs():
    assert METHODS["gptq"]() == GPTQ()
    assert GPTQ().needs == {"hessian"}
