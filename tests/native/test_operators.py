"""What PyTorch calls without Python gives the bits that the library gives through ctypes."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from checks import random_weight
from fewbits.kernels.native import Native, NativeInt8
from fewbits.linear import FloatLinear, QuantizedLinear
from fewbits.native import library, operators, why_absent
from fewbits.scheme import QuantScheme

BF16, CPU = torch.bfloat16, torch.device("cpu")

if not operators.available():
    pytest.skip(f"the native library {why_absent()}", allow_module_level=True)


def layouts(columns: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Inputs (..., columns) as models hand them over, and as nobody would."""
    x = torch.randn(4, 3, 2 * columns).to(dtype)
    whole = x[..., :columns].contiguous()
    return {
        "one piece": whole,
        "rows apart": x[..., columns:],
        "every other row": whole[:, ::2],
        "turned": whole.transpose(0, 1),
        "columns apart": x[..., ::2],
        "columns first": torch.randn(columns, 5).to(dtype).T,
        "one row": whole[0, 0],
        "no row": whole[:0],
        "one row, many times": whole[0, :1].expand(6, columns),
        "rows, many times": whole[:, None].expand(4, 2, 3, columns),
        "each row many times": whole[:, :, None].expand(4, 3, 2, columns),
        "from the end": whole.flip(0)[:, 1],
    }


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("label", ["w4-g32", "w4-g64-asym", "w8-channel", "w2-g32-trellis"])
def test_a_product_of_any_layout(label, dtype):
    kernel = Native(random_weight(QuantScheme.parse(label), (64, 192), dtype), dtype, CPU)
    for name, x in layouts(192, dtype).items():
        for bias in (None, torch.randn(64).to(dtype)):
            y = kernel(x, bias)
            exact = library().linear(kernel._weight, x.contiguous(), bias, kernel.inputs)
            assert y.shape == (*x.shape[:-1], 64), name
            assert y.is_contiguous(), name
            assert torch.equal(y, exact), name


def test_inputs_of_8_bits():
    kernel = NativeInt8(random_weight(QuantScheme(4, "group", 32), (70, 192)), BF16, CPU)
    x = torch.randn(3, 192).bfloat16()
    exact = library().linear(kernel._weight, x, None, kernel.inputs)
    assert torch.equal(kernel(x), exact)
    assert not torch.equal(exact, library().linear(kernel._weight, x))


def test_float_weights():
    linear = FloatLinear.around(nn.Linear(192, 40, dtype=BF16))
    for name, x in layouts(192, BF16).items():
        for bias in (operators.NOTHING, linear.bias.detach()):
            y = operators.float_linear(x, linear.weight.detach(), bias)
            given = bias if bias.numel() else None
            exact = library().float_linear(linear.weight.detach(), x.reshape(-1, 192), given)
            assert torch.equal(y, exact.view(*x.shape[:-1], 40)), name


@pytest.mark.parametrize("of", [(2, 6, 3), (1, 6, 3), (2, 1, 3), (1, 1, 1), None], ids=str)
def test_attention_with_a_mask_of_any_shape(of):
    query = torch.randn(2, 3, 6, 16).bfloat16().transpose(1, 2)
    key, value = (torch.randn(2, 2, 25, 16).bfloat16()[:, :, :20] for _ in range(2))
    mask = None if of is None else torch.rand(*of, 30) < 0.6
    seen = None if mask is None else mask[..., :20].expand(2, 6, 3, 20)
    given = operators.NOTHING if mask is None else mask
    y = operators.attend_few(query, key, value, given, 0.3)
    assert torch.equal(y, library().attend_few(query, key, value, seen, 0.3))


def test_what_does_not_fit_is_refused_before_it_is_read():
    kernel = Native(random_weight(QuantScheme(4, "group", 32, symmetric=False), (40, 96)), BF16, CPU)
    x, given = torch.randn(2, 96).bfloat16(), kernel._arguments
    codes, scales, zeros, _, *numbers = given
    less = "codes, scales, zeros or a table are not as the weight has them"
    head, key = torch.randn(8, 96).bfloat16(), torch.randn(1, 2, 5, 16).bfloat16()
    nothing = operators.NOTHING
    for call, words in [
        (lambda: kernel(x[:, 1:]), "x has 95 columns, W has 96"),
        (lambda: kernel(x.double()), "bfloat16, float16 or float32"),
        (lambda: kernel(x[0, 0]), "1 to 8 dimensions, not 0"),
        (lambda: kernel(x.view(1, 1, 1, 1, 1, 1, 1, 2, 96)), "1 to 8 dimensions, not 9"),
        (lambda: kernel(x, torch.randn(39).bfloat16()), "a bias has 40 numbers"),
        (lambda: operators.linear(x, torch.randn(40), *given), "a bias has 40 numbers"),
        (
            lambda: kernel(x, torch.zeros(2).bfloat16().as_strided((2, 20), (1, 0))),
            "a bias has 40 numbers",
        ),
        (lambda: operators.linear(x, nothing, codes[1:], *given[1:]), less),
        (lambda: operators.linear(x, nothing, codes, scales[:, 1:], *given[2:]), less),
        (lambda: operators.linear(x, nothing, codes, scales, zeros[1:], *given[3:]), less),
        (lambda: operators.linear(x, nothing, codes, scales, nothing, *given[3:]), less),
        (lambda: operators.linear(x, nothing, codes.view(torch.int8), *given[1:]), less),
        (lambda: operators.linear(x, nothing, codes, scales, zeros.float(), *given[3:]), less),
        (lambda: operators.linear(x, nothing, codes, scales.mT, *given[2:]), less),
        (lambda: operators.linear(x, nothing, codes, scales, zeros, codes, *numbers), less),
        (lambda: operators.linear(x, nothing, *given[:7], 24, *given[8:]), "a multiple of 32 columns"),
        (lambda: operators.linear(x, nothing, *given[:8], 9, 0), less),
        (lambda: operators.linear(x, nothing, *given[:-1], 7), "does not take this weight"),
        (lambda: operators.float_linear(x, head.T, nothing), "x has 96 columns, W has 8"),
        (lambda: operators.float_linear(x, head.float(), nothing), "in one piece, in the dtype of x"),
        (lambda: operators.attend_few(key, key[:, :, 1:], key, nothing, 1.0), "do not fit"),
        (lambda: operators.attend_few(key, key.float(), key, nothing, 1.0), "one dtype"),
        (lambda: operators.attend_few(key, key, key, torch.ones(1, 1, 5, 5), 1.0), "a mask is of bool"),
        (
            lambda: operators.attend_few(key, key, key, torch.ones(1, 1, 4, 5, dtype=torch.bool), 1.0),
            "a mask does not fit",
        ),
    ]:
        with pytest.raises(RuntimeError, match=words):
            call()


@pytest.mark.parametrize("assign", [False, True])
def test_weights_that_were_loaded_are_multiplied(assign):
    scheme = QuantScheme(4, "group", 32)
    ours, others = (Native(random_weight(scheme, (40, 96)), BF16, CPU) for _ in range(2))
    ours.load_state_dict(others.state_dict(), assign=assign)
    x = torch.randn(3, 96).bfloat16()
    assert torch.equal(ours(x), others(x))


BEFORE = """
import torch
from torch import nn
from fewbits.native.library import Library, library
Library.serve_torch = lambda self: False
from fewbits.linear import FloatLinear, QuantizedLinear
from fewbits.native import operators
from fewbits.scheme import QuantScheme
torch.manual_seed(0)
linear = QuantizedLinear.from_float(nn.Linear(96, 40, dtype=torch.bfloat16), QuantScheme(4, "group", 32))
x = torch.randn(2, 3, 96).bfloat16()
calls = []
own = Library.linear
Library.linear = lambda *a: calls.append(1) or own(*a)
y = linear(x)
assert calls == [1]
assert torch.equal(y, own(library(), linear.kernel._weight, x, linear.bias))
weight = torch.randn(7, 96).bfloat16()
y = operators.float_linear(x, weight, operators.NOTHING)
assert torch.equal(y.view(-1, 7), library().float_linear(weight, x.view(-1, 96)))
query, mask = torch.randn(1, 2, 3, 16), torch.rand(1, 1, 3, 8) < 0.5
y = operators.attend_few(query, query, query, mask, 1.0)
assert torch.equal(y, library().attend_few(query, query, query, mask[..., :3].expand(1, 2, 3, 3), 1.0))
"""


def test_a_pytorch_that_cannot_call_the_library_calls_python():
    subprocess.run([sys.executable, "-c", BEFORE], check=True)


# -- compiled ----------------------------------------------------------------------------------------


def test_shapes_are_known_without_data():
    kernel = Native(random_weight(QuantScheme(4, "group", 32), (40, 96)), BF16, CPU)
    x, key = torch.randn(2, 3, 96).bfloat16(), torch.randn(2, 2, 5, 16).bfloat16()
    query = torch.randn(2, 4, 3, 16).bfloat16()
    nothing = operators.NOTHING
    calls = [
        (operators.linear, (x, nothing, *kernel._arguments)),
        (operators.weight, (*kernel._arguments[:-1], torch.float32)),
        (operators.float_linear, (x, torch.randn(7, 96).bfloat16(), nothing)),
        (operators.attend_few, (query, key, key[..., :8], nothing, 1.0)),
    ]
    if operators.has_bf16():
        calls.append((operators.attend, (query, query, query[..., :8], 1.0, True)))
    for operator, arguments in calls:
        given = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
        meta, real = operator(*given), operator(*arguments)
        assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_go_through_a_compiled_graph(bias):
    linear = QuantizedLinear.from_float(nn.Linear(96, 40, bias=bias), QuantScheme(4, "group", 32))
    found = []
    for call in (linear, torch.compile(linear, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(1)
        x = torch.randn(3, 96, requires_grad=True)
        y = call(x)
        y.square().sum().backward()
        found.append((y.detach(), x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
