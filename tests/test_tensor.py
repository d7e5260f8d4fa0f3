from dataclasses import replace

import pytest
import torch

import oracles
from checks import FLOATS, TWO_LEVEL, assert_same, random_weight, schemes
from fewbits.errors import InputError
from fewbits.scheme import QuantScheme
from fewbits.tensor import Levels, Note, QuantizedTensor, dequantize, quantize_tensor


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dequantize_takes_the_dtype_of_the_scale_unless_told(dtype):
    weight = random_weight(QuantScheme(4, "group", 8), (3, 16), dtype)
    assert weight.dequantize().dtype == dtype
    assert dequantize(weight).dtype == dtype
    assert dequantize(weight, torch.float64).dtype == torch.float64
    assert torch.equal(dequantize(weight), weight.dequantize())


@pytest.mark.parametrize("scheme", schemes("tensor", "channel", 8), ids=lambda scheme: scheme.label)
def test_dequantize_equals_the_definition(scheme):
    weight = random_weight(scheme, (5, 16), torch.bfloat16)  # 8 + 9 bits: exact in float32
    exact = oracles.dequantized(weight.codes, weight.scale, weight.zero_point, scheme)
    assert torch.equal(weight.dequantize(torch.float32).double(), exact)
    assert torch.equal(weight.dequantize(torch.float64), exact)
    assert torch.equal(weight.dequantize(), exact.to(torch.bfloat16))
    assert weight.shape == (5, 16)


@pytest.mark.parametrize(
    ("scheme", "grid"),
    [
        (QuantScheme(4, "tensor"), (5, 1)), (QuantScheme(4, "channel"), (1, 1)),
        (QuantScheme(4, "channel"), (5, 2)), (QuantScheme(4, "group", 8), (5, 1)),
        (QuantScheme(4, "group", 8), (2, 5)), (QuantScheme(4, "group", 5), (5, 3)),
    ],
)  # fmt: skip
def test_shapes_that_do_not_belong_together_are_refused(scheme, grid):
    codes, points = torch.zeros(5, 16, dtype=torch.uint8), torch.zeros(grid, dtype=torch.uint8)
    with pytest.raises(InputError):
        QuantizedTensor(codes, torch.ones(grid), points, scheme)


def test_a_zero_point_of_another_shape_than_the_scale_is_refused():
    codes, scale = torch.zeros(5, 16, dtype=torch.uint8), torch.ones(5, 2)
    for grid in ((1, 1), (5, 1), (2, 5)):
        points = torch.zeros(grid, dtype=torch.uint8)
        with pytest.raises(InputError, match="accepted is"):
            QuantizedTensor(codes, scale, points, QuantScheme(4, "group", 8))


@pytest.mark.parametrize("scheme", schemes("tensor"), ids=lambda scheme: scheme.label)
def test_per_row_repeats_the_scale_and_changes_no_weight(scheme):
    weight = random_weight(scheme, (5, 16))
    rows = weight.per_row()
    assert rows.scheme == QuantScheme(scheme.bits, "channel", None, scheme.symmetric)
    assert rows.scale.shape == rows.zero_point.shape == (5, 1)
    assert rows.scale.is_contiguous()
    assert rows.zero_point.is_contiguous()
    assert torch.equal(rows.dequantize(), weight.dequantize())


def test_per_row_leaves_rows_and_groups_as_they_are():
    for scheme in schemes("channel", 8):
        weight = random_weight(scheme, (5, 16))
        assert weight.per_row() is weight


@pytest.mark.parametrize("scheme", schemes("tensor", "channel", 8), ids=lambda scheme: scheme.label)
def test_concatenate_puts_matrices_one_below_the_other(scheme):
    parts = [random_weight(scheme, (rows, 16), torch.bfloat16) for rows in (3, 1, 4)]
    joined = QuantizedTensor.concatenate(parts)
    assert joined.shape == (8, 16)
    assert torch.equal(joined.dequantize(), torch.cat([part.dequantize() for part in parts]))
    assert torch.equal(joined.codes, torch.cat([part.codes for part in parts]))


def test_one_matrix_alone_is_not_copied():
    weight = random_weight(QuantScheme(4, "tensor"), (3, 16))
    assert QuantizedTensor.concatenate([weight]) is weight


@pytest.mark.parametrize(
    "other", [QuantScheme(8), QuantScheme(4, symmetric=False), QuantScheme(4, "group", 8)]
)
def test_matrices_of_different_schemes_are_not_joined(other):
    parts = [random_weight(scheme, (3, 16)) for scheme in (QuantScheme(4), other)]
    with pytest.raises(InputError, match="different schemes"):
        QuantizedTensor.concatenate(parts)


def test_quantize_tensor_reproduces_a_weight_that_lies_on_its_grid():
    for scheme in schemes("tensor", "channel", 8):
        # Whole numbers from the lowest to the highest multiple of the grid: the scale comes out as 1.
        low = 1 - 2 ** (scheme.bits - 1) if scheme.symmetric else 0
        high = 2 ** (scheme.bits - 1) - 1 if scheme.symmetric else 2**scheme.bits - 1
        weight = torch.randint(low, high + 1, (5, 16)).float()
        weight[:, ::8], weight[:, 1::8] = low, high
        quantized = quantize_tensor(weight, scheme)
        assert torch.equal(quantized.scale, torch.ones_like(quantized.scale))
        assert torch.equal(quantized.dequantize(), weight)


def test_two_equal_weights_are_quantized_alike():
    weight = torch.randn(5, 16)
    assert_same(quantize_tensor(weight, QuantScheme(4)), quantize_tensor(weight.clone(), QuantScheme(4)))


def test_two_levels_subtract_in_float32_whatever_they_are_given_in():
    weight = random_weight(TWO_LEVEL, (5, 512))
    steps, counts = (t.double() for t in (weight.levels.steps, weight.levels.counts))
    scale, offset = ((steps[..., i, None] * counts.unflatten(1, (2, 8))[..., i]) for i in (0, 1))
    codes = weight.codes.unflatten(1, (2, 8, 32)).double()
    exact = (scale[..., None] * codes - offset[..., None]).reshape(5, 512)
    assert torch.equal(weight.scale.double(), scale.reshape(5, 16))
    assert torch.equal(weight.offset.double(), offset.reshape(5, 16))
    assert torch.equal(weight.dequantize(), exact.float())  # both products are exact: one rounding
    assert torch.equal(weight.dequantize(torch.float64), exact.float().double())
    assert torch.equal(weight.dequantize(torch.bfloat16), exact.float().bfloat16())


def test_two_levels_stay_through_rows_and_joins_and_have_no_other_groups():
    weight = random_weight(TWO_LEVEL, (5, 512))
    parts = [weight.rows(slice(0, 2)), weight.rows(torch.tensor([2, 3, 4]))]
    assert torch.equal(parts[1].dequantize(), weight.dequantize()[2:])
    assert_same(QuantizedTensor.concatenate(parts), weight)
    assert weight.per_row() is weight
    assert weight.coarsest() is weight
    assert weight.regrouped(32) is weight
    with pytest.raises(InputError, match="no groups of 64"):
        weight.regrouped(64)


def test_levels_go_with_their_scheme_alone():
    weight = random_weight(TWO_LEVEL, (5, 512))
    for scheme in (TWO_LEVEL, QuantScheme(4, "group", 32, symmetric=False)):
        levels = None if scheme.two_level else weight.levels
        with pytest.raises(InputError, match="levels of scales"):
            QuantizedTensor(weight.codes, weight.scale, weight.zero_point, scheme, levels=levels)
    short = Levels(weight.levels.steps[:, :1], weight.levels.counts)
    with pytest.raises(InputError, match="levels of scales"):
        replace(weight, levels=short)
    with pytest.raises(InputError, match="method q4_k alone"):
        quantize_tensor(torch.randn(5, 512), TWO_LEVEL)


def test_a_note_reads_as_one_line():
    note = Note("fallback", "model.layers.3.mlp", "ran the reference kernel")
    assert str(note) == "fallback: model.layers.3.mlp: ran the reference kernel"
