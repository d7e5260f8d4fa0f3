from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st

from checks import assert_same, check_format, random_weight, schemes
from fewbits.errors import InputError
from fewbits.formats import Placement
from fewbits.formats.gguf import BLOCKS, GgufLayout, block_of
from fewbits.kernels import Int4Pack, Reference
from fewbits.scheme import InputScheme, QuantScheme
from fewbits.tensor import QuantizedTensor

LAYOUT = GgufLayout()
Q8, Q4, ODD = (QuantScheme.parse(block.label) for block in BLOCKS[:3])


@st.composite
def held_weights(draw):
    rows, blocks = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    bits, symmetric = draw(st.sampled_from([(8, True), (4, True), (4, False)]))
    sizes = [32 * n for n in range(1, blocks + 1) if blocks % n == 0]
    size = draw(st.sampled_from([None, *sizes]))
    granularity = draw(st.sampled_from(["channel", "tensor"])) if size is None else "group"
    torch.manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16]))
    scales = torch.tensor([2.0**-17, 1.75 * 2.0**-12, 0.0123, 1.0, 3.2, 4344.0]).to(dtype)
    if dtype == torch.float16 and draw(st.booleans()):
        scales = torch.arange(1, 2**14, 7).to(torch.int16).view(torch.float16)  # subnormal ones first
    weight = random_weight(
        QuantScheme(bits, granularity, size, symmetric), (rows, 32 * blocks), dtype, scales
    )
    return replace(weight, scale=-weight.scale) if symmetric and draw(st.booleans()) else weight


def test_it_passes_the_suite_of_formats():
    check_format(LAYOUT)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(held_weights())
def test_what_is_written_is_read_and_decoded_bit_for_bit(weight):
    tensors, held = LAYOUT.write("X.weight", weight), LAYOUT.held(weight)
    assert_same(LAYOUT.read("X.weight", tensors, held.scheme), held)
    found = LAYOUT.decode("X.weight", tensors, held.scheme, weight.shape)
    for part in ("codes", "scale", "zero_point"):
        ours, theirs = getattr(held, part), getattr(found, part)
        assert ours.dtype == theirs.dtype, part
        assert torch.equal(ours, theirs), part
    assert torch.equal(held.dequantize(torch.float64), weight.dequantize(torch.float64))
    assert tensors["X.weight_blocks"].nbytes == LAYOUT.written_bytes(*weight.shape, weight.scheme, 2)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(held_weights())
def test_the_gguf_library_gives_our_weights_and_asymmetric_ones_but_for_the_rounding_of_m(weight):
    tensors, held = LAYOUT.write("X.weight", weight), LAYOUT.held(weight)
    block = block_of(held.scheme)
    theirs = gguf.quants.dequantize(tensors["X.weight_blocks"].numpy(), Kind[block.kind])
    error = (torch.from_numpy(theirs).double() - held.dequantize(torch.float64)).abs()
    least = (held.scale.double() * held.zero_point.double()).repeat_interleave(32, 1)
    if held.scheme.symmetric:
        assert not error.any()
    else:
        assert bool((error <= least * 2.0**-11).all())
        assert bool((error <= held.scale.double().repeat_interleave(32, 1) * 15 / 2048).all())


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_bytes_of_the_library_s_own_quantizer_are_read_and_written_again(kind):
    block = next(block for block in BLOCKS if block.kind == kind)
    scheme = QuantScheme.parse(block.label)
    weight = np.random.default_rng(0).standard_normal((24, 96), np.float32)
    weight[3] = 0
    if kind == "Q4_1":  # whose m is whatever the smallest weight is: here a whole number of steps
        steps = np.random.default_rng(1).integers(0, 16, (24, 3, 32))
        steps[..., 0], steps[..., 1] = 0, 15
        weight = ((steps - 5) * np.float32(0.125)).reshape(24, 96).astype(np.float32)
    stored = torch.from_numpy(gguf.quants.quantize(weight, Kind[kind]))
    read = LAYOUT.read("X.weight", {"X.weight_blocks": stored}, scheme)
    again = LAYOUT.write("X.weight", read)["X.weight_blocks"]
    assert torch.equal(again, stored)
    theirs = torch.from_numpy(gguf.quants.dequantize(stored.numpy(), Kind[kind]))
    assert torch.equal(read.dequantize(torch.float32), theirs)
    if kind == "Q4_0":
        assert bool((read.scale < 0).any()), "the library gives d a sign"


def test_scales_below_zero_multiply_as_they_are():
    weight = np.random.default_rng(0).standard_normal((32, 64), np.float32)
    stored = torch.from_numpy(gguf.quants.quantize(weight, Kind.Q4_0))
    read = LAYOUT.read("X.weight", {"X.weight_blocks": stored}, Q4)
    x = torch.randint(-8, 9, (3, 64)).to(torch.bfloat16)
    exact = x.double() @ read.dequantize(torch.float64).t()
    size = x.double().abs() @ read.dequantize(torch.float64).abs().t()
    for kernel in (Reference, Int4Pack):
        assert kernel.refuses(read, torch.bfloat16, torch.device("cpu")) is None
        made = kernel(read, torch.bfloat16, torch.device("cpu"))
        error = (made(x).double() - exact).abs()
        # of an operand, and of the result: half a step of bfloat16 each; sums are float32
        assert bool((error <= size * 2.0**-8 + exact.abs() * 2.0**-8).all()), kernel


def test_a_least_value_that_is_no_whole_number_of_steps_is_refused():
    weight = np.random.default_rng(0).standard_normal((2, 32), np.float32)
    stored = torch.from_numpy(gguf.quants.quantize(weight, Kind.Q4_1))
    with pytest.raises(InputError, match="whole number of steps"):
        LAYOUT.read("X.weight", {"X.weight_blocks": stored}, ODD)
    constant = torch.from_numpy(gguf.quants.quantize(np.ones((1, 32), np.float32), Kind.Q4_1))
    with pytest.raises(InputError, match="whole number of steps"):  # d is 0
        LAYOUT.read("X.weight", {"X.weight_blocks": constant}, ODD)


def test_scales_that_cannot_be_held_are_refused_by_value():
    weight = random_weight(ODD, (1, 32), torch.float16)
    for scale, message in ((0.0, "a scale of 0"), (60000.0, ".* beyond float16")):
        bad = replace(weight, scale=torch.full((1, 1), scale).half(), zero_point=weight.zero_point | 2)
        with pytest.raises(InputError, match=f"X.weight: {message}"):
            LAYOUT.write("X.weight", bad)
    wide = replace(random_weight(Q4, (1, 32)), scale=torch.tensor([[0.1]]))
    with pytest.raises(InputError, match=r"0\.1.* is no float16"):
        LAYOUT.write("X.weight", wide)


@pytest.mark.parametrize(
    ("scheme", "shape", "message"),
    [
        (QuantScheme(8, "group", 32, symmetric=False), (8, 64), "8 bits, asymmetric: no block"),
        (QuantScheme(3, "group", 32), (8, 64), "3 bits: no block"),
        (QuantScheme(2, "channel", symmetric=False), (8, 64), "2 bits, asymmetric: no block"),
        (QuantScheme(4, "group", 16), (8, 64), "groups of 16"),
        (QuantScheme(4, "channel"), (8, 48), "rows of 48"),
        (QuantScheme(8, "channel", inputs=InputScheme()), (8, 64), "inputs in 8 bits"),
    ],
)
def test_what_has_no_block_is_refused_before_and_when_it_is_written(scheme, shape, message):
    assert message in LAYOUT.refuses(Placement("X", scheme, shape=shape), scheme)
    weight = random_weight(scheme, shape, torch.float16)
    with pytest.raises(InputError, match=message):
        LAYOUT.write("X.weight", weight)


def test_experts_of_one_stack_have_one_type():
    places = {
        f"model.layers.0.experts.{i}.w1.weight": Placement("m", scheme, expert=True)
        for i, scheme in enumerate((Q4, Q8))
    }
    with pytest.raises(InputError, match=r"experts\.\*\.w1\.weight: .*w4-g32 and w8-g32"):
        LAYOUT.config(places, [])
    fine = {name: replace(place, scheme=Q4) for name, place in places.items()}
    assert set(LAYOUT.config(fine, [])["weights"].values()) == {"w4-g32"}


def test_reading_refuses_what_is_no_row_of_blocks():
    tensors = LAYOUT.write("X.weight", random_weight(Q4, (3, 64), torch.float16))
    with pytest.raises(InputError, match="no tensor"):
        LAYOUT.read("X.weight", {}, Q4)
    with pytest.raises(InputError, match="rows of 34 bytes"):
        LAYOUT.read("X.weight", tensors, Q8)
    with pytest.raises(InputError, match="no block holds w4-g64"):
        LAYOUT.read("X.weight", tensors, QuantScheme(4, "group", 64))


def test_what_it_writes_for_every_scheme_it_does_not_refuse_is_the_scheme_it_names():
    for scheme in schemes("tensor", "channel", 32, 64):
        place = Placement("X", scheme, shape=(8, 64))
        if LAYOUT.refuses(place, scheme) is None:
            weight = random_weight(scheme, (8, 64), torch.float16)
            config = LAYOUT.config({"X.weight": place}, [])
            named = LAYOUT.scheme_of(config, "X.weight", "X")
            tensors = LAYOUT.write("X.weight", weight)
            assert isinstance(LAYOUT.read("X.weight", tensors, named), QuantizedTensor)
            stored = type("S", (), {"tensors": tensors})
            assert LAYOUT.shape(config, "X.weight", stored) == (8, 64)
