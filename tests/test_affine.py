import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from checks import FLOATS, assert_within_half_a_step, schemes
from fewbits.affine import choose_qparams, dequantize, quantize
from fewbits.errors import InputError
from fewbits.scheme import QuantScheme
from fewbits.tensor import quantize_tensor

GRANULARITIES = ("tensor", "channel", 1, 8)
# Float16 is subnormal below 6e-5 and has nothing but zero below 3e-8; 0.01 is what weights are like.
MAGNITUDES = (1e-7, 1e-6, 1e-5, 0.01, 1.0, 300.0)


def weights_of(magnitude, dtype, rows=6, columns=24):
    """Rows around zero and beside it, one with an outlier, one of zeros."""
    weight = torch.randn(rows, columns, dtype=torch.float64)
    weight[6:] += torch.randn(max(0, rows - 6), 1)
    weight[1] += 4
    weight[2] -= 4
    weight[3, 5] = 40
    weight[4] = 0
    return (weight * magnitude).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scheme", schemes(*GRANULARITIES), ids=lambda scheme: scheme.label)
def test_every_weight_is_within_half_a_step_of_its_code(scheme, dtype):
    for magnitude in MAGNITUDES:  # many rows: a scale that was rounded the wrong way is not in every one
        weight = weights_of(magnitude, dtype, rows=96)
        assert_within_half_a_step(weight, quantize_tensor(weight, scheme))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    values=st.lists(st.floats(-1000, 1000, width=16), min_size=8, max_size=8),
    exponent=st.integers(-30, 0),
    dtype=st.sampled_from(FLOATS),
    scheme=st.sampled_from(schemes("tensor", "channel", 1, 4)),
)
def test_half_a_step_holds_for_any_weights(values, exponent, dtype, scheme):
    weight = (torch.tensor(values, dtype=torch.float64) * 2.0**exponent).view(2, 4).to(dtype)
    assert_within_half_a_step(weight, quantize_tensor(weight, scheme))


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", schemes("channel"), ids=lambda scheme: scheme.label)
def test_half_a_step_holds_for_a_scale_of_fewer_bits_than_the_weight(scheme, scale_dtype):
    for magnitude in MAGNITUDES:
        weight = weights_of(magnitude, torch.float32, rows=32)
        scale, zero_point = choose_qparams(weight, scheme, scale_dtype)
        assert scale.dtype == scale_dtype
        codes = quantize(weight, scale, zero_point, scheme)
        exact = oracles.dequantized(codes, scale, zero_point, scheme)
        points = oracles.spread(scale, tuple(weight.shape), scheme)
        # The slack of assert_within_half_a_step.
        slack = 2 * torch.finfo(torch.float32).eps * 2**scheme.bits
        assert ((weight - exact).abs() <= points * (0.5 + slack)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", schemes(*GRANULARITIES), ids=lambda scheme: scheme.label)
def test_codes_equal_the_exhaustive_search(scheme, dtype):
    # With at most 11 bits in weight and scale, weight / scale is a tie or 2**-12 away from one;
    # float32 rounds it by at most 2**-17 below 2**8, so the nearest code is found in all cases.
    for magnitude in (1e-6, 0.01, 300.0):
        weight = weights_of(magnitude, dtype)
        scale, zero_point = choose_qparams(weight, scheme)
        codes = quantize(weight, scale, zero_point, scheme)
        assert torch.equal(codes, oracles.nearest_codes(weight, scale, zero_point, scheme))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scheme", schemes("tensor", "channel", 8), ids=lambda scheme: scheme.label)
def test_codes_equal_the_exhaustive_search_where_division_is_exact(scheme, dtype):
    weight = weights_of(0.01, dtype)
    scale, zero_point = choose_qparams(weight, scheme)
    scale = torch.exp2(scale.log2().round())  # some weights are now outside of the grid
    codes = quantize(weight, scale, zero_point, scheme)
    assert torch.equal(codes, oracles.nearest_codes(weight, scale, zero_point, scheme))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_ties_go_to_the_even_multiple_of_scale(bits, dtype):
    for zero_point in (0, 1, 2 ** (bits - 1), 2**bits - 1):
        scheme = QuantScheme(bits, symmetric=False)
        steps = torch.arange(-zero_point, 2**bits - 1 - zero_point)
        weight = (steps[None] + 0.5).to(dtype) * 0.25
        scale, points = torch.full((1, 1), 0.25, dtype=dtype), torch.tensor([[zero_point]])
        expected = torch.where(steps % 2 == 0, steps, steps + 1) + zero_point
        codes = quantize(weight, scale, points.to(torch.uint8), scheme)
        assert torch.equal(codes[0].long(), expected)
        assert torch.equal(codes, oracles.nearest_codes(weight, scale, points, scheme))


@pytest.mark.parametrize("scheme", schemes(*GRANULARITIES), ids=lambda scheme: scheme.label)
def test_the_scale_is_the_range_in_steps_to_one_step_of_its_dtype(scheme):
    for dtype, magnitude in product(FLOATS, MAGNITUDES):
        weight = weights_of(magnitude, dtype)
        scale, zero_point = choose_qparams(weight, scheme)
        for place, shared in oracles.parts(weight, scheme).items():
            if scheme.symmetric:
                exact = max(abs(w) for w in shared) / (2 ** (scheme.bits - 1) - 1)
            else:
                exact = (max(*shared, 0, 0) - min(*shared, 0, 0)) / (2**scheme.bits - 1)
            stored = scale[place].double()
            if exact == 0:
                assert stored == 1
            else:
                # To nearest is half a step of its dtype, to the next above a whole one; before it the
                # range and the division are rounded, here and there, by half a step of the working one.
                working = torch.promote_types(dtype, torch.float32)
                limit = 2 * oracles.half_step(stored, dtype) + 4 * oracles.half_step(stored, working)
                assert abs(stored - exact) <= limit
            if scheme.symmetric:
                assert zero_point[place] == 2 ** (scheme.bits - 1)


@pytest.mark.parametrize("scheme", schemes("channel", 8), ids=lambda scheme: scheme.label)
def test_shapes_and_dtypes_are_as_documented(scheme):
    weight = torch.randn(3, 16).to(torch.bfloat16)
    before = weight.clone()
    scale, zero_point = choose_qparams(weight, scheme)
    codes = quantize(weight, scale, zero_point, scheme)
    assert scale.shape == zero_point.shape == (3, scheme.groups(16))
    assert codes.shape == weight.shape
    assert (scale.dtype, zero_point.dtype, codes.dtype) == (torch.bfloat16, torch.uint8, torch.uint8)
    assert torch.equal(weight, before)


def test_one_scale_for_the_tensor_is_one_by_one():
    scale, zero_point = choose_qparams(torch.randn(3, 16), QuantScheme(4, "tensor"))
    assert scale.shape == zero_point.shape == (1, 1)


@pytest.mark.parametrize("scheme", schemes("tensor", "channel", 8), ids=lambda scheme: scheme.label)
def test_a_weight_of_zeros_stays_zero(scheme):
    for dtype in FLOATS:
        quantized = quantize_tensor(torch.zeros(3, 16, dtype=dtype), scheme)
        assert torch.equal(quantized.scale, torch.ones_like(quantized.scale))
        assert torch.equal(quantized.dequantize(), torch.zeros(3, 16, dtype=dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_groups_of_one_weight_lose_only_the_rounding_of_their_scale(bits, dtype):
    weight = weights_of(1.0, dtype)
    quantized = quantize_tensor(weight, QuantScheme(bits, "group", 1))
    exact = oracles.dequantized(quantized.codes, quantized.scale, quantized.zero_point, quantized.scheme)
    # w / n is rounded once in the working precision and once to the dtype, then taken n times.
    bound = 2 * (2 ** (bits - 1) - 1) * oracles.half_step(quantized.scale, dtype)
    assert ((weight.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scheme", schemes("tensor", "channel", 8), ids=lambda scheme: scheme.label)
def test_weights_that_are_not_finite_are_refused(scheme, value):
    for dtype in FLOATS:
        weight = torch.zeros(3, 16, dtype=dtype)
        weight[1, 9] = value
        with pytest.raises(InputError, match="NaN or infinity"):
            choose_qparams(weight, scheme)


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(0, 8), torch.zeros(8, 0), torch.zeros(8), torch.zeros(2, 3, 8), torch.tensor(1.0),
        torch.zeros(2, 8, dtype=torch.int32), torch.zeros(2, 8, dtype=torch.uint8),
        torch.zeros(2, 8, dtype=torch.bool), torch.zeros(2, 8, dtype=torch.complex64),
    ],
    ids=lambda weight: f"{tuple(weight.shape)}-{weight.dtype}",
)  # fmt: skip
def test_what_is_no_floating_point_matrix_is_refused(weight):
    with pytest.raises(InputError, match="accepted are floating-point matrices"):
        choose_qparams(weight, QuantScheme(4))


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="does not divide"):
        choose_qparams(torch.randn(2, 12), QuantScheme(4, "group", 8))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("largest", "dtype", "scale_dtype"),
    [
        (65504.0, torch.float16, None), (3e38, torch.bfloat16, None), (3e38, torch.float32, None),
        (1e308, torch.float64, None), (1e9, torch.float32, torch.float16),
    ],
)  # fmt: skip
def test_no_finite_weight_gets_an_infinite_scale(symmetric, largest, dtype, scale_dtype):
    for scheme in (QuantScheme(bits, symmetric=symmetric) for bits in (2, 3, 4, 8)):
        weight = torch.tensor([[largest, -largest, 0.0]], dtype=dtype)
        try:
            scale, _ = choose_qparams(weight, scheme, scale_dtype)
        except InputError:
            continue  # refusing it is right too; an infinite scale dequantizes to NaN
        assert torch.isfinite(scale).all()


@pytest.mark.parametrize("scheme", schemes("tensor", "channel", 8), ids=lambda scheme: scheme.label)
def test_dequantize_is_the_product_rounded_once(scheme):
    weight = weights_of(0.01, torch.float16)  # 11 + 8 bits: the product is exact in float32
    scale, zero_point = choose_qparams(weight, scheme)
    codes = quantize(weight, scale, zero_point, scheme)
    exact = oracles.dequantized(codes, scale, zero_point, scheme)
    for dtype in FLOATS:
        assert torch.equal(dequantize(codes, scale, zero_point, scheme, dtype), exact.to(dtype))


def test_a_large_weight_is_quantized_in_slices_as_it_is_in_one(monkeypatch):
    weight = torch.randn(7, 24)
    for scheme in schemes("tensor", "channel", 8):
        scale, zero_point = choose_qparams(weight, scheme)
        whole = quantize(weight, scale, zero_point, scheme)
        for rows in (1, 3, 7):  # one at a time, a ragged last slice, all at once
            with monkeypatch.context() as patch:
                patch.setattr("fewbits.affine._SLICE", rows * 24)
                assert torch.equal(quantize(weight, scale, zero_point, scheme), whole)


def test_codes_do_not_depend_on_how_the_weight_lies_in_memory():
    weight = torch.randn(24, 6).t()
    for scheme in schemes("tensor", "channel", 8):
        ours, theirs = quantize_tensor(weight, scheme), quantize_tensor(weight.contiguous(), scheme)
        assert torch.equal(ours.codes, theirs.codes)
        assert torch.equal(ours.scale, theirs.scale)
        assert torch.equal(ours.zero_point, theirs.zero_point)
