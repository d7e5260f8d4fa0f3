"""The Triton kernels, in Triton's interpreter, which knows no GPU; and on one, where there is one."""

import math
import os

import pytest
import torch

from checks import KERNEL_SCHEMES, TWO_LEVEL, check_kernel, random_weight, weights
from fewbits.errors import InputError
from fewbits.kernels import Triton
from fewbits.kernels.gpu import MANY_ROWS, multiply
from fewbits.kernels.gpu.launch import Call, Launch, Tile, plan
from fewbits.kernels.gpu.words import HALF, WORDS, chunk_columns, pack_words, unpack_words
from fewbits.scheme import QuantScheme

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
CPU = torch.device("cpu")
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
@pytest.mark.parametrize("scheme", KERNEL_SCHEMES, ids=lambda scheme: scheme.label)
def test_every_shape_passes_the_suite(scheme):
    check_kernel(Triton, DEVICE, [scheme])


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


TENSORS = {
    "multiply_one": ("x", "words", "scale", "zero", "bias", "y"),
    "multiply": ("x", "words", "scale", "zero", "bias", "y", "offset"),
    "add_parts": ("parts", "bias", "y"),
}


def started(kernel, x, bias=None):
    """The programs that multiply x, by their names; all of their arguments are given, tensors first."""
    parts = (kernel.scale, kernel.zero, kernel.offset, bias)
    dtypes = tuple(None if part is None else part.dtype for part in parts)
    weight = (kernel.words.shape, kernel.bits, kernel.group, kernel.point)
    found = plan(Call(len(x), x.shape[1], *weight, x.dtype, dtypes, x.device, None))
    launches = [found.product, found.adding] if found.adding else [found.product]
    for launch in launches:
        names, own = launch.program.arg_names, TENSORS[launch.program.__name__]
        assert tuple(names[: len(own)]) == own
        assert launch.rest == tuple(launch.named[name] for name in names[len(own) :])
    return [launch.program.__name__ for launch in launches]


@pytest.mark.parametrize(
    "label", ["w2-g64", "w2-channel", "w3-channel", "w4-g64", "w4-g128", "w8-channel", "w8-tensor"]
)
@pytest.mark.parametrize("columns", [2541, 2560 + 128, 4096])
@pytest.mark.parametrize("bias", [False, True])
def test_one_row_is_multiplied_by_a_program_of_its_own(label, columns, bias):
    scheme = QuantScheme.parse(label)
    if scheme.group_size and columns % scheme.group_size:
        pytest.skip("no whole groups")
    weight = random_weight(scheme, (5, columns), scales=torch.tensor([0.5, 1.0]))
    kernel = Triton(weight, torch.float32, torch.device(DEVICE))
    x = torch.randint(-4, 5, (1, columns)).float()  # sums are exact
    b = torch.randint(-8, 9, (5,)).float() if bias else None
    assert started(kernel, x.to(DEVICE), None if b is None else b.to(DEVICE)) == ["multiply_one"]
    y = kernel(x.to(DEVICE), None if b is None else b.to(DEVICE))
    exact = x.double() @ weights(weight).t() + (0 if b is None else b)
    assert torch.equal(y.cpu().double(), exact)


@pytest.mark.parametrize("label", ["w2-g64-asym", "w4-g128-asym", "w8-channel-asym"])
def test_one_row_and_zero_points(label):
    weight = random_weight(QuantScheme.parse(label), (5, 2688), scales=torch.tensor([0.5, 1.0]))
    kernel = Triton(weight, torch.float16, torch.device(DEVICE))
    x = torch.randint(-1, 2, (1, 2688)).half()
    x[:, 64:] = 0  # or the result is too large for float16
    assert started(kernel, x.to(DEVICE)) == ["multiply_one"]
    assert torch.equal(kernel(x.to(DEVICE)).cpu().double(), x.double() @ weights(weight).t())
    # In float32 a zero point that is taken off sums would cost digits.
    assert started(kernel, x.float().to(DEVICE)) != ["multiply_one"]


def test_what_tensor_cores_do_faster_is_theirs():
    for label, out in (("w4-g32", 8), ("w3-g128", 8), ("w4-g128", 2**16)):
        scheme = QuantScheme.parse(label)
        words = (out, math.ceil(2560 / chunk_columns(scheme.bits)) * WORDS)
        dtypes = (torch.bfloat16, None, None, None)
        weight = (words, scheme.bits, scheme.group_size, scheme.middle, torch.bfloat16, dtypes)
        call = Call(1, 2560, *weight, torch.device(DEVICE), None)
        assert plan(call).product.program.__name__ == "multiply"


def test_inputs_of_other_columns_are_refused():
    weight = random_weight(QuantScheme(4, "group", 32), (9, 96))
    kernel = Triton(weight, torch.float32, torch.device(DEVICE))
    for columns in (95, 97, 3 * 96):
        with pytest.raises(InputError, match=f"{columns} columns; accepted are 96"):
            kernel(torch.zeros(1, columns, device=DEVICE))
    with pytest.raises(InputError, match="inputs of 300 columns; accepted is what fills 1 chunks"):
        multiply(
            torch.zeros(1, 300, device=DEVICE), None, kernel.words, kernel.scale, None, None, 4, 32, 8
        )


@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_compiled_is_started_again_only_with_what_it_was_compiled_for(rows):
    weight = random_weight(QuantScheme(4, "group", 64), (20, 4096), scales=torch.tensor([0.5, 1.0]))
    kernel = Triton(weight, torch.float32, torch.device(DEVICE))
    numbers = torch.randint(-8, 9, (rows * 4096 + 1,), device=DEVICE).float()
    assert started(kernel, numbers[:-1].view(rows, 4096)) == (
        ["multiply_one"] if rows == 1 else ["multiply", "add_parts"]
    )
    calls = {0: numbers[:-1], 1: numbers[1:]}  # the second begins at 4 bytes beyond a multiple of 16
    for where in (0, 1, 0, 0, 1, 1):
        x = calls[where].view(rows, 4096)
        assert torch.equal(kernel(x).cpu().double(), x.cpu().double() @ weights(weight).t())
    x = numbers[:-1].view(rows, 4096)
    for scale in (torch.float16, torch.float32):
        own = (kernel.words, kernel.scale.to(scale), None, None, 4, 64, 8)
        for bias in (None, torch.ones(20, device=DEVICE), torch.ones(20, device=DEVICE).half()):
            y = multiply(x, bias, *own).cpu().double()
            assert torch.equal(y, x.cpu().double() @ weights(weight).t() + (bias is not None))


class Program:
    """Stands for one of Triton's: what it is given, and what its compiled form is started with."""

    arg_names = ("x", "y", "out", "GROUP", "rows")

    def __init__(self):
        self.given, self.started = [], []

    def __getitem__(self, grid):
        def run(*tensors, **named):
            self.given.append((grid, tensors, named))
            return {grid: lambda *arguments: self.started.append(arguments)}

        return run


def test_a_launch_gives_a_compiled_program_pointers_and_the_rest_in_their_order():
    program = Program()
    launch = Launch(program, (2, 1, 1), {"rows": 3, "GROUP": 32, "out": 7}, CPU, num_warps=4)
    x = torch.zeros(9)
    launch(x, None)
    ((grid, tensors, named),) = program.given
    assert (grid, tensors[1]) == ((2, 1, 1), None)
    assert tensors[0] is x
    assert named == {"rows": 3, "GROUP": 32, "out": 7, "num_warps": 4}
    launch(x, None)
    assert program.started == [(x.data_ptr(), None, 7, 32, 3)]
    launch(x[1:], None)  # compiled for multiples of 16 bytes
    launch(x, torch.zeros(9, device="meta"))  # of which Triton says that it is not there
    assert len(program.given) == 3
    assert len(program.started) == 1


def test_what_was_compiled_for_other_places_is_not_kept():
    program = Program()
    launch = Launch(program, (1, 1, 1), {"out": 1, "GROUP": 1, "rows": 1}, CPU)
    x = torch.zeros(9)
    launch(x[1:], x)
    launch(x, x)
    assert (len(program.given), len(program.started)) == (2, 0)
    launch(x, x)
    assert len(program.started) == 1


def test_a_triton_that_wants_other_arguments_is_asked_each_time(monkeypatch):
    monkeypatch.setattr("fewbits.kernels.gpu.launch._starts_compiled", lambda: False)
    program = Program()
    launch = Launch(program, (1, 1, 1), {"out": 1, "GROUP": 1, "rows": 1}, CPU)
    for _ in range(3):
        launch(torch.zeros(1), None)
    assert (len(program.given), len(program.started)) == (3, 0)


def test_many_rows_are_multiplied_by_the_unpacked_weight(monkeypatch):
    monkeypatch.setattr("fewbits.kernels.gpu.kernel.MANY_ROWS", 2)
    weight = random_weight(QuantScheme(4, "group", 32), (9, 96), scales=torch.tensor([0.5, 1.0]))
    kernel = Triton(weight, torch.float32, torch.device(DEVICE))
    x, bias = torch.randint(-8, 9, (5, 96)).float(), torch.ones(9)
    y = kernel(x.to(DEVICE), bias.to(DEVICE))
    assert torch.equal(y.cpu().double(), x.double() @ weights(weight).t() + 1)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 4, MANY_ROWS + 1])
def test_it_is_compiled_in_one_graph(rows):
    weight = random_weight(QuantScheme(4, "group", 128), (64, 256), torch.bfloat16)
    kernel = Triton(weight, torch.bfloat16, torch.device(DEVICE))
    x = torch.randn(rows, 256, device=DEVICE).bfloat16()
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
