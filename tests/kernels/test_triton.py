"""The Triton kernels, in Triton's interpreter, which knows no GPU; and on one, where there is one."""

import os

import pytest
import torch

from checks import TWO_LEVEL, check_kernel, random_weight, weights
from fewbits.kernels import Triton
from fewbits.kernels.gpu import multiply
from fewbits.kernels.gpu.kernel import HALF, Tile, pack_words, unpack_words
from fewbits.scheme import QuantScheme

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1",
    reason="no GPU, and Triton's interpreter is off",
)


class Anywhere(Triton):
    """That also runs on the CPU, as the interpreter does."""

    @classmethod
    def refuses(cls, weight, dtype, device):
        """As on a GPU."""
        return super().refuses(weight, dtype, torch.device("cuda"))


@pytest.mark.parametrize(
    "label", ["w2-g32-asym", "w3-g96", "w4-g32", "w4-channel-asym", "w8-tensor", "q4_k"]
)
def test_products_are_within_the_rounding_of_sums(label):
    scheme = TWO_LEVEL if label == "q4_k" else QuantScheme.parse(label)
    shape = (5, 512) if label == "q4_k" else (7, 172) if "g" not in label[:4] else (33, 96)
    check_kernel(Anywhere, DEVICE, [scheme], [shape])


@pytest.mark.skipif(not GPU, reason="takes minutes in the interpreter")
def test_every_scheme_and_shape_passes_the_suite():
    check_kernel(Triton, DEVICE)


@pytest.mark.parametrize("bits", HALF)
def test_words_hold_the_codes_where_the_layout_says(bits):
    fields = 2 * HALF[bits]
    columns = 32 * fields + 7
    codes = torch.randint(0, 2**bits, (3, columns), dtype=torch.uint8)
    words = pack_words(codes, bits)
    assert words.shape == (3, 64)
    for row, column in ((0, 0), (1, 31), (2, 32), (1, columns - 1), (0, 32 * fields - 1)):
        chunk, inside = divmod(column, 32 * fields)
        field, word = divmod(inside, 32)
        upper, place = divmod(field, HALF[bits])
        half = int(words[row, chunk * 32 + word]) >> 16 * upper
        assert half >> place * bits & 2**bits - 1 == codes[row, column]
    assert torch.equal(unpack_words(words, bits)[:, :columns], codes)


@pytest.mark.parametrize("label", ["w2-g32-asym", "w3-g96-asym", "w4-g32", "w8-channel-asym"])
def test_a_weight_is_unpacked_as_it_is(label):
    weight = random_weight(QuantScheme.parse(label), (5, 96), torch.float32)
    kernel = Triton(weight, torch.float32, torch.device(DEVICE))
    exact = weights(weight)
    assert torch.equal(kernel.weight(torch.float32).cpu(), exact.float())


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_the_columns_may_be_cut_into_any_number_of_parts(parts, bias):
    weight = random_weight(QuantScheme(4, "group", 32), (20, 640), scales=torch.tensor([0.5, 1.0]))
    kernel = Triton(weight, torch.float32, torch.device(DEVICE))
    x = torch.randint(-8, 9, (3, 640)).float()  # sums are exact
    b = torch.randint(-8, 9, (20,)).float() if bias else None
    tile = Tile(rows=16, inputs=16, parts=parts)
    own = (
        kernel.words,
        kernel.scale,
        kernel.zero,
        kernel.offset,
        kernel.bits,
        kernel.group,
        kernel.point,
    )
    y = multiply(x.to(DEVICE), None if b is None else b.to(DEVICE), *own, tile=tile)
    assert torch.equal(y.cpu().double(), x.double() @ weights(weight).t() + (0 if b is None else b))


def test_many_rows_are_multiplied_by_the_unpacked_weight(monkeypatch):
    monkeypatch.setattr("fewbits.kernels.gpu.kernel.MANY_ROWS", 2)
    weight = random_weight(QuantScheme(4, "group", 32), (9, 96), scales=torch.tensor([0.5, 1.0]))
    kernel = Triton(weight, torch.float32, torch.device(DEVICE))
    x, bias = torch.randint(-8, 9, (5, 96)).float(), torch.ones(9)
    y = kernel(x.to(DEVICE), bias.to(DEVICE))
    assert torch.equal(y.cpu().double(), x.double() @ weights(weight).t() + 1)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_it_is_one_operation_in_a_compiled_graph():
    weight = random_weight(QuantScheme(4, "group", 128), (64, 256), torch.bfloat16)
    kernel = Triton(weight, torch.bfloat16, torch.device(DEVICE))
    x = torch.randn(1, 256, device=DEVICE).bfloat16()
    assert torch.equal(torch.compile(kernel, fullgraph=True)(x), kernel(x))


@pytest.mark.parametrize(
    "label", ["w2-g32-asym", "w3-g96-asym", "w4-channel", "w8-g32-asym", "w4-g32-asym-k"]
)
def test_rows_are_those_of_the_weight_and_numbers_those_given(label):
    scheme = QuantScheme.parse(label)
    weight = random_weight(scheme, (7, 768), torch.float32)
    kernel = Triton(weight, torch.float32, torch.device(DEVICE))
    which = torch.tensor([3, 0, 6, 3], device=DEVICE)
    assert torch.equal(kernel.rows(which, torch.float32), kernel.weight(torch.float32)[which])
    codes, scale, zero_point = (part.cpu() for part in kernel.numbers())
    assert torch.equal(codes, weight.codes)
    assert torch.equal(scale, weight.scale)
    if not scheme.two_level:
        assert torch.equal(zero_point, weight.zero_point)
