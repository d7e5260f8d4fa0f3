import pytest
import torch

from checks import DTYPES, check_kernel, fast_kernel, random_weight, schemes, without_native
from fewbits.kernels import KERNELS, Int4Pack, Int8Pack, Reference, choose_kernel
from fewbits.kernels.aten import kernel_group
from fewbits.scheme import QuantScheme

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on CUDA, and there is none")


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("int4pack", "cpu"), ("int8pack", "cpu"), ("reference", "cpu"),
        pytest.param("reference", "cuda", marks=needs_cuda),
    ],
)  # fmt: skip
def test_every_kernel_passes_the_suite(name, device):
    check_kernel(KERNELS[name], device)


@pytest.mark.parametrize("kernel_class", [Int4Pack, Int8Pack, Reference])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_input_rows_give_no_output_rows(kernel_class, dtype):
    weight = random_weight(QuantScheme(8 if kernel_class is Int8Pack else 4), (7, 172), dtype)
    kernel = kernel_class(weight, dtype, CPU)
    for batch in ((0,), (2, 0)):
        assert kernel(torch.zeros(*batch, 172, dtype=dtype)).shape == (*batch, 7)


def test_kernels_give_the_same_result_twice():
    for name, bits in (("int4pack", 4), ("int8pack", 8), ("reference", 4)):
        weight = random_weight(QuantScheme(bits), (130, 1024))
        kernel = KERNELS[name](weight, torch.bfloat16, CPU)
        x = torch.randn(33, 1024).bfloat16()
        assert torch.equal(kernel(x), kernel(x))


def test_the_reference_takes_float64_and_multiplies_in_it():
    weight = random_weight(QuantScheme(8, "group", 4, symmetric=False), (7, 172), torch.float64)
    x = torch.randint(-8, 9, (5, 172)).double() * (1 + 2.0**-40)  # needs more bits than float32 has
    weight.scale.copy_(torch.ones_like(weight.scale))
    kernel = Reference(weight, torch.float64, CPU)
    expected = x @ (weight.codes.double() - weight.zero_point.repeat_interleave(4, 1).double()).t()
    assert torch.equal(kernel(x), expected)


def test_the_reference_puts_its_slices_together_in_order(monkeypatch):
    weight = random_weight(QuantScheme(4, "group", 4), (33, 96), scales=torch.tensor([0.5, 1.0]))
    kernel, x = Reference(weight, torch.float32, CPU), torch.randint(-8, 9, (2, 3, 96)).float()
    whole = kernel(x)
    for rows in (1, 5, 33):  # one row at a time, a ragged last slice, all at once
        monkeypatch.setattr("fewbits.kernels.reference._SLICE", rows * 96)
        assert torch.equal(kernel(x), whole)


def test_the_reference_refuses_nothing():
    for scheme in schemes("tensor", "channel", 1, 4, 32):
        weight = random_weight(scheme, (3, 32))
        for dtype in (*DTYPES, torch.float64):
            assert Reference.refuses(weight, dtype, torch.device("cuda")) is None


@pytest.mark.parametrize(
    ("label", "dtype", "device", "native", "expected"),
    [
        ("w4-g32", torch.bfloat16, "cpu", True, "int4pack"),
        ("w4-g32-asym-k", torch.bfloat16, "cpu", True, "int4pack"),
        ("w4-g32-asym-k", torch.float32, "cpu", True, "reference"),
        ("w4-g32-asym-k", torch.bfloat16, "cuda", False, "triton"),
        ("w3-g32-asym", torch.bfloat16, "cpu", True, "int4pack"),
        ("w2-channel", torch.bfloat16, "cpu", True, "int4pack"),
        ("w4-g32", torch.float16, "cpu", True, "reference"),
        ("w4-g32", torch.float32, "cpu", True, "reference"),
        ("w8-channel", torch.bfloat16, "cpu", True, "int8pack"),
        ("w8-tensor", torch.bfloat16, "cpu", True, "int8pack"),
        ("w8-tensor-asym", torch.bfloat16, "cpu", True, "reference"),
        ("w8-g32", torch.bfloat16, "cpu", True, "reference"),
        ("w4-g8", torch.bfloat16, "cpu", False, "reference"),
        ("w4-g32", torch.float64, "cpu", False, "reference"),
        ("w8-channel", torch.float64, "cpu", False, "reference"),
        ("w4-g32", torch.bfloat16, "cuda", False, "triton"),
        ("w4-g32", torch.float32, "cuda", False, "triton"),
        ("w8-channel", torch.bfloat16, "cuda", False, "triton"),
        ("w4-g8", torch.bfloat16, "cuda", False, "reference"),
        ("w4-g32", torch.float64, "cuda", False, "reference"),
    ],
)
def test_the_first_kernel_that_takes_the_weight_is_chosen(
    label, dtype, device, native, expected, monkeypatch
):
    weight = random_weight(QuantScheme.parse(label), (16, 256))
    names = list(KERNELS)
    for kernel in (fast_kernel(expected) if native else expected, expected):
        name, refusals = choose_kernel(weight, dtype, torch.device(device))
        assert name == kernel
        assert list(refusals) == names[: names.index(kernel)]
        assert all(refusals.values())
        without_native(monkeypatch)


def test_a_kernel_group_is_the_largest_that_divides_or_the_one_that_pads_least():
    sizes = (256, 128, 64, 32)
    assert [kernel_group(size, 1024, sizes) for size in (32, 96, 128, 192, 512, 1024)] == [
        32, 32, 128, 64, 256, 256,
    ]  # fmt: skip
    assert [kernel_group(size, 1024, sizes) for size in (1, 16, 48)] == [None] * 3
    assert [kernel_group(None, columns, sizes) for columns in (1024, 172, 96, 32, 130)] == [
        256, 64, 32, 32, 32,
    ]  # fmt: skip
