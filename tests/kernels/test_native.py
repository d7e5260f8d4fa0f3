"""The native library, with every instruction set that this machine runs."""

import copy
import pickle
import threading
from dataclasses import replace

import pytest
import torch

from checks import TRELLIS_SCHEMES, TRELLIS_SHAPES, check_kernel, random_weight
from fewbits.errors import InputError
from fewbits.kernels import Native, NativeInt8, choose_kernel
from fewbits.linear import QuantizedLinear
from fewbits.native import library, why_absent
from fewbits.native.library import ISAS
from fewbits.scheme import QuantScheme

CPU, BF16 = torch.device("cpu"), torch.bfloat16
pytestmark = pytest.mark.skipif(library() is None, reason=f"the native library {why_absent()}")


@pytest.fixture(params=["neon", "avx2", "avx512", "amx"])
def isa(request):
    if not library().use(request.param):
        pytest.skip(f"this machine does not run {request.param}, or the library was built without it")
    yield request.param
    library().use(None)


@pytest.mark.parametrize("kernel_class", [Native, NativeInt8])
def test_every_instruction_set_passes_the_suite(isa, kernel_class):
    check_kernel(kernel_class)


@pytest.mark.parametrize("kernel_class", [Native, NativeInt8])
def test_every_instruction_set_passes_the_suite_with_a_trellis(isa, kernel_class):
    check_kernel(kernel_class, tried=TRELLIS_SCHEMES, shapes=TRELLIS_SHAPES)


def test_the_portable_code_passes_the_suite(monkeypatch):
    library().use("portable")
    try:
        weight = random_weight(QuantScheme(4), (7, 64))
        assert "no vector code" in Native.refuses(weight, BF16, CPU)
        monkeypatch.setattr(type(library()), "isa", "avx2")  # the code that runs stays the portable one
        for kernel_class in (Native, NativeInt8):
            check_kernel(kernel_class)
            check_kernel(kernel_class, tried=TRELLIS_SCHEMES, shapes=TRELLIS_SHAPES)
    finally:
        library().use(None)


@pytest.mark.parametrize("kernel_class", [Native, NativeInt8])
@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_row(isa, kernel_class, rows, value):
    kernel = kernel_class(random_weight(QuantScheme(4, "group", 32), (40, 96)), BF16, CPU)
    x = torch.randn(rows, 96).bfloat16()
    expected = kernel(x)
    x[0, 50] = value
    y = kernel(x)
    assert not torch.isfinite(y[0]).any()
    assert torch.equal(y[1:], expected[1:])


@pytest.mark.parametrize(
    "scheme",
    [
        "w2-g32-asym", "w3-g64", "w4-channel-asym", "w8-tensor",
        "w2-g64-trellis", "w3-channel-trellis", "w4-g32-trellis",
    ],
)  # fmt: skip
def test_the_weight_comes_back(scheme):
    weight = random_weight(QuantScheme.parse(scheme), (64 if scheme.endswith("trellis") else 45, 192))
    kernel = Native(weight, BF16, CPU)
    codes, scale, zero_point = kernel.numbers()
    assert torch.equal(codes, weight.codes)
    per_row = weight.per_row()
    assert torch.equal(scale, per_row.scale)
    assert torch.equal(zero_point, per_row.zero_point)
    for dtype in (torch.float32, BF16, torch.float16):
        assert torch.equal(kernel.weight(dtype), weight.dequantize(dtype))
        which = torch.tensor([3, 0, 33, 31, 3])
        assert torch.equal(kernel.rows(which, dtype), weight.dequantize(dtype)[which])


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "half", "to"])
def test_a_kernel_that_was_moved_computes_the_same(how):
    kernel = Native(random_weight(QuantScheme(4, "group", 32), (40, 96)), BF16, CPU)
    x = torch.randn(3, 96).bfloat16()
    expected, again = kernel(x), None
    if how == "pickle":
        again = pickle.loads(pickle.dumps(kernel))
    elif how == "deepcopy":
        again = copy.deepcopy(kernel)
    else:  # scales in another dtype that holds them: their memory is another
        again = copy.deepcopy(kernel).to(torch.float32)
    del kernel
    assert torch.equal(again(x), expected)


def test_a_bias_is_added_before_rounding():
    weight, bias = random_weight(QuantScheme(8), (40, 96)), torch.randn(40).bfloat16()
    x = torch.randn(5, 96).bfloat16()
    exact = x.double() @ weight.dequantize(torch.float64).t() + bias.double()
    in_float = Native(weight, torch.float32, CPU)(x.float(), bias.float())
    torch.testing.assert_close(in_float.double(), exact, rtol=1e-5, atol=1e-4)
    kernel = Native(weight, BF16, CPU)
    assert torch.equal(kernel(x, bias), kernel(x.float(), bias.float()).bfloat16())


@pytest.mark.parametrize(
    "label",
    [
        "w2-g32-asym", "w3-g64", "w4-g96", "w4-g32-asym-k", "w8-channel-asym",
        "w2-g64-trellis", "w3-g96-trellis", "w4-g32-trellis", "w4-channel-trellis",
    ],
)  # fmt: skip
def test_a_product_is_the_same_bits_on_every_processor_and_among_any_rows(label):
    weight = random_weight(QuantScheme.parse(label), (96 if label.endswith("trellis") else 70, 768))
    for kernel_class, dtype in ((Native, BF16), (Native, torch.float32), (NativeInt8, BF16)):
        kernel, x = kernel_class(weight, dtype, CPU), torch.randn(37, 768).to(dtype)
        results = []
        for name in ISAS:
            if library().use(name):
                results += [kernel(x), torch.cat([kernel(x[:1]), kernel(x[1:8]), kernel(x[8:])])]
        library().use(None)
        assert len(results) > 2
        assert all(torch.equal(result, results[0]) for result in results)


def test_rows_that_lie_apart_are_read_where_they_lie():
    kernel = Native(random_weight(QuantScheme(4, "group", 32), (40, 96)), BF16, CPU)
    wide = torch.randn(6, 200).bfloat16()
    for x in (wide[:, 3:99], wide[::2, :96], wide[:1, :96].expand(4, 96), wide.t()[:96, :4].t()):
        assert torch.equal(kernel(x), kernel(x.contiguous()))


def test_threads_that_call_at_once_get_what_one_alone_gets(isa):
    kernel = Native(random_weight(QuantScheme(4, "group", 32), (300, 96)), BF16, CPU)
    inputs = [torch.randn(1 + i % 9, 96).bfloat16() for i in range(24)]
    expected = [kernel(x) for x in inputs]
    wrong = []

    def call(start):
        for i in range(200):
            which = (start + i) % len(inputs)
            if not torch.equal(kernel(inputs[which]), expected[which]):
                wrong.append(which)

    threads = [threading.Thread(target=call, args=(3 * i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_how_many_threads_work_does_not_change_a_bit():
    kernel = Native(random_weight(QuantScheme(3, "group", 32), (300, 480)), BF16, CPU)
    before = torch.get_num_threads()
    try:
        for rows in (1, 30):
            x = torch.randn(rows, 480).bfloat16()
            results = []
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                results.append(kernel(x))
            assert all(torch.equal(y, results[0]) for y in results)
    finally:
        torch.set_num_threads(before)


def on_every_isa(call):
    """What each instruction set, and the portable code, gives, in one thread and in three."""
    results = []
    for name in ISAS:
        if library().use(name):
            results += [call(threads) for threads in (1, 3)]
    library().use(None)
    assert len(results) > 2
    return results


def test_zero_points_far_off_the_grid_are_refused():
    scheme = QuantScheme(4, "group", 32, symmetric=False)
    weight = random_weight(scheme, (40, 96))
    for point, reason in ((16, None), (17, "takes zero points up to 16, not 17")):
        moved = replace(weight, zero_point=torch.full_like(weight.zero_point, point))
        assert Native.refuses(moved, BF16, CPU) == reason
        name, _ = choose_kernel(moved, BF16, CPU)
        assert (name == "native") == (reason is None)
    moved = replace(weight, zero_point=torch.full_like(weight.zero_point, 16))
    x = torch.randint(-8, 9, (20, 96)).bfloat16()
    results = on_every_isa(lambda n: library().linear(Native(moved, BF16, CPU)._weight, x, threads=n))
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("columns", [1, 63, 64, 200])
def test_a_float_weight_is_summed_in_float32_and_rounded_once(columns):
    weight, bias = torch.randn(300, columns).bfloat16(), torch.randn(300).bfloat16()
    for rows in (1, 2, 3, 7):
        x = torch.randn(rows, 2 * columns).bfloat16()[:, columns:]
        exact = x.double() @ weight.double().T + bias.double()
        sizes = x.double().abs() @ weight.double().abs().T + bias.double().abs()
        results = on_every_isa(lambda n, x=x: library().float_linear(weight, x, bias, n))
        assert all(torch.equal(y, results[0]) for y in results)
        before = (columns / 16 + 10) * 2**-24 * sizes  # a product, and sums in 16 lanes of 4 vectors
        assert ((results[0].double() - exact).abs() <= before + 2**-8 * (exact.abs() + before)).all()
    x = torch.randn(2, columns).bfloat16()
    x[0, -1] = torch.nan
    y = library().float_linear(weight, x, None)
    assert y[0].isnan().all()
    assert torch.equal(y[1:], library().float_linear(weight, x[1:], None))


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("keys", [1, 255, 256, 513])
def test_attention_is_the_same_bits_on_every_processor_and_for_any_threads(dtype, keys):
    for heads, groups, queries, width, values in (
        (8, 2, 1, 64, 64),
        (6, 6, 3, 20, 72),
        (5, 1, 1, 80, 7),
    ):
        query = torch.randn(2, queries, heads, width).to(dtype).transpose(1, 2)
        key = torch.randn(2, groups, keys + 3, width).to(dtype)[:, :, :keys]
        value = torch.randn(2, groups, keys, values).to(dtype)
        mask = (torch.rand(2, 1, queries, keys) < 0.5).expand(2, heads, queries, keys)
        for seen in (None, mask):
            given = (query, key, value, seen, 0.3)
            results = on_every_isa(lambda n, given=given: library().attend_few(*given, n))
            assert all(torch.equal(y, results[0]) for y in results)
        key[1, 0, keys // 2] = torch.nan
        spoiled = library().attend_few(query, key, value, None, 0.3)
        assert spoiled[1, :, : heads // groups].isnan().all()
        assert not spoiled[0].isnan().any()


@pytest.mark.parametrize("label", ["w4-g32-asym", "w8-channel", "w3-g32-trellis"])
def test_a_compiled_graph_holds_it_as_one_operation(label):
    weight, bias = random_weight(QuantScheme.parse(label), (64, 96), BF16), torch.randn(64).bfloat16()
    linear = QuantizedLinear(weight, bias)
    assert linear.kernel_name == "native"
    found = []

    def backend(graph, example_inputs):
        found.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(linear, backend=backend, fullgraph=True)
    x = torch.randn(2, 3, 96).bfloat16()
    with torch.no_grad():
        assert torch.equal(compiled(x), linear(x))
    assert [name for name in found if "native_linear" in name] == ["fewbits.native_linear.default"]


def test_inputs_are_rounded_to_8_bits_only_where_that_is_asked_for():
    weight = random_weight(QuantScheme(4, "group", 32), (40, 96))
    assert choose_kernel(weight, BF16, CPU)[0] == "native"
    assert choose_kernel(weight, BF16, CPU, int8_inputs=True)[0] == "native-int8"


def test_the_library_can_be_turned_off(monkeypatch):
    weight = random_weight(QuantScheme(4, "group", 32), (40, 96))
    monkeypatch.setenv("FEWBITS_NATIVE", "0")
    name, refusals = choose_kernel(weight, BF16, CPU)
    assert name == "int4pack"
    assert "FEWBITS_NATIVE=0" in refusals["native"]
    monkeypatch.setenv("FEWBITS_NATIVE", "yes")
    with pytest.raises(InputError, match="FEWBITS_NATIVE is 'yes'; 0"):
        choose_kernel(weight, BF16, CPU)


def test_every_instruction_set_has_a_name():
    assert library().isa in ISAS
