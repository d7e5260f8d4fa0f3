"""The kernel of LLM.int8() against its definition in float64.

The definition (Dettmers et al. 2022, arXiv 2208.07339): over the columns that are no outliers, a row has
the step s = max|x| / 127 and the codes q = round(x / s); the result is scale * s * sum(q * c), with the
weights' codes c, and over the outlier columns the sum of x * w. What the kernel rounds on the way is
bounded in `definition`.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checks import DTYPES, fast_kernel, random_weight, schemes, without_native
from fewbits.errors import InputError
from fewbits.kernels import KERNELS, Int8Inputs, choose_kernel
from fewbits.linear import QuantizedLinear
from fewbits.scheme import QuantScheme
from fewbits.tensor import Outliers
from oracles import half_step

CPU = torch.device("cpu")
PLAIN, STATIC, DYNAMIC = "w8-channel-a8-token", "w8-channel-a8-token-t6-static", "w8-channel-a8-token-t6"
LABELS = (PLAIN, STATIC, DYNAMIC, "w8-tensor-a8-token-t6", "w8-channel-a8-tensor",
          "w8-tensor-a8-tensor-t6", "w8-channel-a8-tensor-t6-static")  # fmt: skip
SHAPES = ((7, 172), (33, 96), (1, 32), (130, 515), (5, 1))
each_label = pytest.mark.parametrize("label", LABELS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make(label, shape, dtype, columns=(0, 3, 17)):
    """Random codes and scales; weights of a static scheme keep some columns."""
    scheme = QuantScheme.parse(label)
    weight = random_weight(scheme, shape, dtype, scales=(torch.rand(50) + 0.5) / 128)
    if not scheme.inputs.static:
        return weight
    kept = torch.tensor([c for c in columns if c < shape[1]])
    weight.codes[:, kept] = 128
    return replace(weight, outliers=Outliers(kept, torch.randn(shape[0], len(kept)).to(dtype)))


def inputs(rows, columns, dtype):
    """Normal numbers, and in two columns a few that are far larger than 6."""
    x = torch.randn(rows, columns)
    x[:, :: columns // 2 + 1] *= 30
    return x.to(dtype)


def is_kept(weight, x):
    """Which columns stay in 16 bit, (in,) bool."""
    kept, kind = torch.zeros(x.shape[1], dtype=torch.bool), weight.scheme.inputs
    if weight.outliers is not None:
        kept[weight.outliers.columns] = True
    elif kind.threshold and not kind.static:
        kept = ((x.double().abs() > kind.threshold) | x.isnan()).any(0)
    return kept


def definition(weight, x, kept=None):
    """The result in float64, and how far the kernel may be from it: both (rows, out).

    With u = eps / 2 of float32: the step, its inverse and x times that are each rounded once, so x / s
    is off by less than 4 u * 127, and a code by one where x / s is that close to a tie. The exact sum of
    the codes is rounded to float32 and multiplied by a scale and a step that is itself off by u: 4 u
    together, here 5. Then it is rounded to the dtype of x. The sum over n outlier columns is off by what
    rounding their weights to the dtype and (n + 2) eps of the sum of |x w| make (Higham 2002, 3.5), and
    is rounded before and after it is added.
    """
    kept = is_kept(weight, x) if kept is None else kept
    wide, dtype, u = x.double(), x.dtype, torch.finfo(torch.float32).eps / 2
    scale = weight.scale.double().expand(weight.shape[0], 1)[:, 0]
    inner = wide.masked_fill(kept, 0)
    step = inner.abs().amax(1, keepdim=True) / 127
    if weight.scheme.inputs.granularity == "tensor":
        step = step.max().expand_as(step)
    ratio = inner / step.where(step > 0, 1)
    codes = (weight.codes.double() - 128).masked_fill(kept, 0)
    rounded = step * (ratio.round() @ codes.t()) * scale
    ties = ((ratio - ratio.floor() - 0.5).abs() <= 4 * u * 127).double()
    bound = step * (ties @ codes.abs().t()) * scale
    bound = (1 + 5 * u) * bound + 5 * u * rounded.abs()
    bound += half_step(rounded.abs() + bound, dtype)

    outer = wide * kept
    exact = (weight.codes.double() - 128) * scale[:, None] * kept
    if weight.outliers is not None:
        exact[:, weight.outliers.columns] = weight.outliers.weight.double()
    most = outer.abs() @ exact.abs().t()
    extra = outer.abs() @ (half_step(exact, dtype) * kept).t() + (int(kept.sum()) + 2) * 2 * u * most
    extra += half_step(most + extra, dtype) * bool(kept.any())
    result = rounded + outer @ exact.t()
    bound += extra
    return result, bound + half_step(result.abs() + bound, dtype) * bool(kept.any())


def unrounded(weight, x):
    """`x @ W.T` in float64, and the bound of a product whose inputs are kept, outliers added later."""
    wide, dtype, eps = x.double(), x.dtype, torch.finfo(torch.float32).eps
    exact = wide @ weight.dequantize(torch.float64).t()
    most = wide.abs() @ weight.dequantize(torch.float64).abs().t()
    bound = (x.shape[1] + 2) * eps * most
    return exact, bound + 3 * half_step(most + bound, dtype)


def assert_near(result, exact, bound):
    assert result.isfinite().all()
    error = (result.double().reshape(exact.shape) - exact).abs()
    worst = (error / bound.clamp_min(1e-300)).max().item()
    assert worst <= 1, f"{worst} x bound"


def keeps_inputs(kernel, x):
    return x.dtype == torch.bfloat16 and x.shape[:-1].numel() <= kernel.few


# -- what it computes ------------------------------------------------------------------------------


@each_dtype
@each_label
def test_it_computes_what_the_definition_says(label, dtype):
    for shape in SHAPES:
        weight = make(label, shape, dtype)
        kernel = Int8Inputs(weight, dtype, CPU)
        for rows in (1, 2, 4, 5, 33, 131):
            x = inputs(rows, shape[1], dtype)
            before = x.clone()
            result = kernel(x)
            assert (result.dtype, result.shape) == (dtype, (rows, shape[0]))
            expected = (unrounded if keeps_inputs(kernel, x) else definition)(weight, x)
            assert_near(result, *expected)
            assert torch.equal(x, before), "the input was modified"


@settings(max_examples=60, deadline=None)
@given(
    label=st.sampled_from(LABELS),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(5, 40),
    out=st.integers(1, 40),
    columns=st.integers(1, 90),
    power=st.integers(-8, 3),
    zeros=st.floats(0, 1),
    seed=st.integers(0, 2**20),
)
def test_it_does_at_any_size_and_density(label, dtype, rows, out, columns, power, zeros, seed):
    torch.manual_seed(seed)
    weight = make(
        label, (out, columns), dtype, columns=(0, columns // 2, columns - 1)[: 1 + columns // 3]
    )
    x = (torch.randn(rows, columns) * 2.0**power * (torch.rand(rows, columns) >= zeros)).to(dtype)
    assert_near(Int8Inputs(weight, dtype, CPU)(x), *definition(weight, x))


@each_dtype
def test_inputs_that_are_codes_are_multiplied_exactly(dtype):
    # The step is 1, and no sum of 96 * 127 * 128 passes 2**24: the result is rounded once.
    weight = random_weight(QuantScheme.parse(PLAIN), (33, 96), dtype, torch.tensor([2.0**-7, 2.0**-8]))
    x = torch.randint(-127, 128, (200, 96)).to(dtype)
    x[:, 5] = 127
    exact = x.double() @ weight.dequantize(torch.float64).t()
    kernel = Int8Inputs(weight, dtype, CPU)
    assert torch.equal(kernel(x), exact.to(dtype))
    assert torch.equal(kernel(x[:9]), exact[:9].to(dtype))


@each_dtype
def test_a_row_does_not_depend_on_the_rows_beside_it(dtype, monkeypatch):
    # 9 rows have the weights on the left of the product, 200 on the right.
    for label in (PLAIN, STATIC):
        kernel = Int8Inputs(make(label, (33, 96), dtype), dtype, CPU)
        x = inputs(200, 96, dtype)
        whole = kernel(x)
        if label == PLAIN:
            assert torch.equal(kernel(x[50:59]), whole[50:59])
        for size in (1, 7 * 33, 2**30):  # one row at a time, ragged slices, all at once
            monkeypatch.setattr("fewbits.kernels.int8._SLICE", size)
            assert torch.equal(kernel(x), whole)


@each_dtype
def test_static_outliers_do_not_coarsen_the_step(dtype):
    weight = make(STATIC, (33, 96), dtype)
    kernel = Int8Inputs(weight, dtype, CPU)
    x = torch.randn(9, 96).to(dtype)
    rest = x.clone()
    rest[:, weight.outliers.columns] = 0
    loud = rest.clone()
    loud[:, weight.outliers.columns] = 1000
    added = loud.double()[:, weight.outliers.columns] @ weight.outliers.weight.double().t()
    difference = (kernel(loud).double() - added - kernel(rest).double()).abs()
    assert (difference <= 3 * half_step(added.abs() + 3000 * 4, dtype)).all()


@each_dtype
def test_codes_below_kept_columns_do_not_count(dtype):
    weight = make(STATIC, (33, 96), dtype)
    other = replace(weight, codes=weight.codes.clone())
    other.codes[:, weight.outliers.columns] = 7
    first, second = (Int8Inputs(w, dtype, CPU) for w in (weight, other))
    for rows in (2, 9):
        x = inputs(rows, 96, dtype)
        assert torch.equal(first(x), second(x))


def test_the_threshold_is_not_rounded_to_the_dtype_of_the_inputs():
    # 6.125 is above 6.11, which bfloat16 would round to 6.125.
    weight = make("w8-channel-a8-token-t6.11", (33, 96), torch.bfloat16)
    kernel = Int8Inputs(weight, torch.bfloat16, CPU)
    x = torch.zeros(9, 96, dtype=torch.bfloat16)
    x[0, 4], x[1, 7] = 6.125, 6.09375
    columns, _ = kernel._kept(x)
    assert columns.tolist() == [4]


def test_static_schemes_without_outliers_and_threshold_0_search_for_none():
    static = replace(make(STATIC, (33, 96), torch.float32), outliers=None)
    plain = replace(static, scheme=QuantScheme.parse(PLAIN))
    x = inputs(9, 96, torch.float32)
    assert_near(Int8Inputs(static, torch.float32, CPU)(x), *definition(plain, x))


@each_dtype
def test_when_every_column_is_an_outlier_nothing_is_rounded_to_8_bits(dtype):
    weight = make(DYNAMIC, (33, 96), dtype)
    x = (torch.randn(9, 96).sign() * 8).to(dtype)
    assert_near(Int8Inputs(weight, dtype, CPU)(x), *definition(weight, x))


@each_dtype
@each_label
def test_batches_views_and_empty_ones(label, dtype):
    kernel = Int8Inputs(make(label, (7, 172), dtype), dtype, CPU)
    x = inputs(24, 172, dtype)
    whole = kernel(x)
    assert torch.equal(kernel(x.reshape(2, 3, 4, 172)), whole.reshape(2, 3, 4, 7))
    turned = x.t().contiguous().t()
    assert not turned.is_contiguous()
    assert torch.equal(kernel(turned), whole)
    assert torch.equal(kernel(torch.cat([x, x], 1)[:, :172]), whole)
    assert kernel(x[0]).shape == (7,)
    for batch in ((0,), (2, 0)):
        assert kernel(torch.zeros(*batch, 172, dtype=dtype)).shape == (*batch, 7)
    assert torch.equal(kernel(torch.zeros(9, 172, dtype=dtype)), torch.zeros(9, 7, dtype=dtype))
    assert torch.equal(kernel(x), whole)


@each_dtype
def test_the_smallest_and_the_largest_inputs(dtype):
    weight = make(PLAIN, (7, 172), torch.float32)
    weight.scale.copy_(torch.ones_like(weight.scale))
    kernel = Int8Inputs(weight, dtype, CPU)
    # A step is at least float32's smallest normal: a code rounds at most half of it away.
    limit = weight.codes.double().sub(128).abs().sum(1) * torch.finfo(torch.float32).tiny / 2
    # Of 1e-37, a 127th would be a step whose inverse is infinite.
    for value in (torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, 1e-37):
        least = torch.full((9, 172), value, dtype=dtype)
        exact = least.double() @ (weight.codes.double() - 128).t()
        slack = 2 * torch.finfo(torch.float32).eps * exact.abs() + half_step(exact, dtype)
        assert ((kernel(least).double() - exact).abs() <= limit + slack).all()
    largest = torch.zeros(9, 172, dtype=dtype)
    largest[:, 3] = torch.finfo(dtype).max / 256
    assert_near(kernel(largest), *definition(weight, largest))


@each_dtype
@each_label
@pytest.mark.parametrize("rows", [3, 9, 150])
def test_what_is_not_finite_stays_in_its_row(label, dtype, rows):
    weight = make(label, (7, 172), dtype)
    kernel = Int8Inputs(weight, dtype, CPU)
    for value in (float("nan"), float("inf"), -float("inf")):
        for column in (3, 60):  # a static outlier, and none
            x = inputs(rows, 172, dtype)
            x[1, column] = value
            result, good = kernel(x), torch.arange(rows) != 1
            assert not result[1].isfinite().any()
            if keeps_inputs(kernel, x):
                expected = unrounded(weight, x[good])
            else:
                # What is finite in that row counts in a shared step, if nothing else is in it.
                kept = is_kept(weight, x)
                whole = x.masked_fill(kept, 0).isfinite().all(1, keepdim=True)
                expected = (e[good] for e in definition(weight, x.where(whole, 0), kept))
            assert_near(result[good], *expected)


def test_a_nan_does_not_hide_an_outlier_in_its_column():
    weight = make(DYNAMIC, (7, 172), torch.float32)
    x = torch.randn(9, 172).clamp(-5, 5)
    x[1, 4], x[2, 4] = float("nan"), 500
    good = torch.arange(9) != 1
    result = Int8Inputs(weight, torch.float32, CPU)(x)
    assert_near(result[good], *definition(weight, x[good]))


def test_inputs_of_other_columns_are_refused():
    kernel = Int8Inputs(make(PLAIN, (7, 64), torch.float32), torch.float32, CPU)
    for columns in (1, 32, 128):  # they could be broadcast, regrouped or cut
        with pytest.raises(InputError, match=f"{columns} columns; accepted are 64"):
            kernel(torch.ones(8, columns))


def test_scales_that_bfloat16_cannot_hold_are_not_rounded():
    weight = make(PLAIN, (33, 96), torch.float32)
    kernel, x = Int8Inputs(weight, torch.bfloat16, CPU), inputs(2, 96, torch.bfloat16)
    assert kernel.few == 0
    assert_near(kernel(x), *definition(weight, x))


# -- its weight, and which weights it takes --------------------------------------------------------


@each_dtype
@each_label
def test_its_weight_is_what_the_codes_stand_for(label, dtype):
    for scale_dtype in {dtype, torch.float32}:
        weight = make(label, (33, 172), scale_dtype)
        linear = QuantizedLinear(weight, dtype=dtype)
        assert linear.kernel_name == "int8"
        assert torch.equal(linear.weight, weight.dequantize(dtype))


def test_it_is_chosen_for_inputs_in_8_bits_only():
    for label in LABELS:
        weight = make(label, (33, 96), torch.float32)
        for dtype in DTYPES:
            for device in ("cpu", "cuda"):
                assert choose_kernel(weight, dtype, torch.device(device)) == ("int8", {})
        name, refusals = choose_kernel(weight, torch.float64, CPU)
        assert name == "reference"
        assert "too coarse for torch.float64" in refusals["int8"]
        assert "not mps" in Int8Inputs.refuses(weight, torch.float32, torch.device("mps"))
    for scheme in schemes("tensor", "channel", 32):
        reason = Int8Inputs.refuses(random_weight(scheme, (33, 96)), torch.bfloat16, CPU)
        assert "leaves them as they are" in reason


def test_it_takes_no_more_columns_than_int32_can_sum():
    for columns, fits in ((132104, True), (132105, False)):
        weight = random_weight(
            QuantScheme.parse(PLAIN), (1, columns), torch.float32, torch.tensor([1.0])
        )
        weight.codes.zero_()  # -128
        assert (Int8Inputs.refuses(weight, torch.float32, CPU) is None) == fits
        if fits:
            x = torch.full((5, columns), 127.0)
            assert torch.equal(Int8Inputs(weight, torch.float32, CPU)(x)[:, 0], -128 * x.sum(1))


# -- gradients, through every kernel ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("label", [*LABELS, "w4-g32", "w3-g32-asym", "w8-channel", "w4-g8"])
@pytest.mark.parametrize("rows", [2, 9])
def test_the_gradient_is_that_of_the_exact_product(label, dtype, rows):
    scheme = QuantScheme.parse(label)
    weight = (
        random_weight(scheme, (33, 96), dtype) if scheme.inputs is None else make(label, (33, 96), dtype)
    )
    linear = QuantizedLinear(weight, torch.randn(33).to(dtype))
    x = inputs(rows, 96, dtype).reshape(1, rows, 96).requires_grad_()
    grad = torch.randn(1, rows, 33).to(dtype)
    y = linear(x)
    assert torch.equal(y, linear(x.detach()))
    y.backward(grad)

    w = linear.weight.double()
    wide = x.detach().double().requires_grad_()
    (wide @ w.t() + linear.bias.double()).backward(grad.double())
    most = grad.double().abs() @ w.abs()
    limit = (33 + 2) * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * most
    assert x.grad.dtype == dtype
    assert (
        (x.grad.double() - wide.grad).abs() <= limit + half_step(wide.grad.abs() + limit, dtype)
    ).all()


@pytest.mark.parametrize("label", [PLAIN, "w4-g32", "w8-channel", "w4-g8"])
def test_no_graph_is_built_that_nobody_needs(label):
    scheme = QuantScheme.parse(label)
    linear = QuantizedLinear(random_weight(scheme, (33, 96), torch.bfloat16))
    x = torch.randn(9, 96).bfloat16()
    assert not linear(x).requires_grad
    with torch.no_grad():
        assert not linear(x.clone().requires_grad_()).requires_grad


def test_every_kernel_says_its_weight(monkeypatch):
    labels = {"native": "w4-g32", "int8": PLAIN, "int4pack": "w4-g32", "int8pack": "w8-channel"}
    labels["reference"] = "w3-g8-asym"
    assert {*labels, "triton", "native-int8"} == set(KERNELS)
    if fast_kernel("int4pack") != "native":
        del labels["native"]
    for name, label in labels.items():
        if name != "native":
            without_native(monkeypatch)
        scales = torch.tensor([0.5, 1.0])
        weight = random_weight(QuantScheme.parse(label), (33, 96), torch.bfloat16, scales)
        linear = QuantizedLinear(weight)
        assert linear.kernel_name == name
        assert torch.equal(linear.weight, weight.dequantize())
        assert linear.weight.is_contiguous()


def test_a_quantized_weight_cannot_be_written_to():
    linear = QuantizedLinear(random_weight(QuantScheme(4, "group", 32), (33, 96), torch.bfloat16))
    with pytest.raises(InputError, match="cannot be written to"):
        linear.weight.data += 1
    with pytest.raises(AttributeError):
        linear.weight = torch.zeros(33, 96)
    with pytest.raises(KeyError):
        linear.weight = torch.nn.Parameter(torch.zeros(33, 96))
    assert type(linear.weight * 2) is torch.Tensor
    assert "weight" not in dict(linear.named_parameters())
