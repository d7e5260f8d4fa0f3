import ctypes
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file

from checks import TWO_LEVEL, assert_same
from fewbits.errors import InputError
from fewbits.methods import METHODS, Q4K, RTN, WeightedRTN
from fewbits.scheme import QuantScheme

ROOT = Path(__file__).parent.parent.parent
LIBRARY = "build/interop/llama-cpp/lib/python*/site-packages/llama_cpp/lib/libggml-base.so"


def elsewhere(blocks):
    return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), Kind.Q4_K))


def rounded(weight, importance=None):
    stats = {} if importance is None else {"hessian": importance.diag()}
    found, notes = Q4K(weighted=importance is not None)(weight, TWO_LEVEL, stats)
    assert not notes
    return found.dequantize()


def weights():
    torch.manual_seed(0)
    reference = load_file(ROOT / "reference" / "model" / "model.safetensors")
    return {
        "normal": torch.randn(64, 512),
        "heavy tails": torch.distributions.StudentT(3.0).sample((64, 512)),
        "above zero": torch.rand(64, 256) + 1,
        "below zero": -torch.rand(64, 256) - 1,
        "small": torch.randn(64, 256) * 1e-4,
        "some zero": torch.randn(64, 256) * (torch.arange(64) % 2)[:, None],
        "query": reference["model.layers.0.self_attn.q_proj.weight"][:64].float(),
        "down": reference["model.layers.3.mlp.down_proj.weight"][:64].float(),
    }


@pytest.mark.parametrize("name", weights())
def test_the_error_is_below_that_of_four_bits_with_one_scale_for_32(name):
    """A weight between the least and the largest of a part, or 0, is at most half a step off."""
    weight = weights()[name]
    before = weight.clone()
    values = rounded(weight)
    assert torch.equal(weight, before)
    parts = weight.reshape(weight.shape[0], -1, 32)
    step = (parts.amax(2).clamp(min=0) - parts.amin(2).clamp(max=0)) / 15
    nearest = (parts / step[..., None]).nan_to_num(0).round() * step[..., None]
    assert (values - weight).square().sum() < (nearest.reshape(weight.shape) - weight).square().sum()


def test_zero_stays_zero():
    assert not rounded(torch.zeros(2, 256)).any()


@pytest.mark.parametrize("name", weights())
def test_llama_cpp_s_own_quantizer_is_no_better(name):
    found = next(ROOT.glob(LIBRARY), None)
    if found is None:
        pytest.skip("make interop builds llama.cpp")
    library = ctypes.CDLL(str(found))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    types = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    library.ggml_quantize_chunk.argtypes = types
    library.ggml_quantize_init(int(Kind.Q4_K))
    weight = weights()[name].contiguous()
    importance = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(1)) ** 4
    for counts in (None, importance):
        theirs = torch.zeros(weight.shape[0], weight.shape[1] // 256 * 144, dtype=torch.uint8)
        library.ggml_quantize_chunk(
            int(Kind.Q4_K), weight.data_ptr(), theirs.data_ptr(), 0, *weight.shape,
            None if counts is None else counts.data_ptr(),
        )  # fmt: skip
        ours = rounded(weight, counts)
        size = torch.ones(weight.shape[1]) if counts is None else counts
        errors = [(size * (w - weight).square()).sum() for w in (ours, elsewhere(theirs))]
        assert errors[0] <= errors[1]


def test_columns_that_count_more_are_off_by_less():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    counts = torch.ones(256)
    counts[::8] = 100
    plain, weighted = (rounded(weight, c) - weight for c in (None, counts))
    assert weighted[:, ::8].square().sum() < 0.8 * plain[:, ::8].square().sum()
    assert torch.equal(rounded(weight, torch.zeros(256)), rounded(weight))


def test_what_does_not_fit_is_refused():
    for weight, message in (
        (torch.ones(2, 128), "not 128"),
        (torch.full((2, 256), torch.nan), "NaN or infinity"),
        (torch.full((2, 256), 1e10), "beyond float16"),
    ):
        with pytest.raises(InputError, match=message):
            rounded(weight)


def test_a_hessian_that_is_not_finite_is_said():
    weight = torch.randn(8, 256)
    found, [note] = Q4K(weighted=True)(weight, TWO_LEVEL, {"hessian": torch.full((256, 256), torch.nan)})
    assert "not finite" in note.what
    assert torch.equal(found.dequantize(), rounded(weight))


def test_methods_that_others_fall_back_to_take_two_levels():
    weight, hessian = torch.randn(8, 256), torch.rand(256).diag()
    assert_same(RTN()(weight, TWO_LEVEL, {})[0], Q4K()(weight, TWO_LEVEL, {})[0])
    stats = {"hessian": hessian}
    weighted = Q4K(weighted=True)(weight, TWO_LEVEL, stats)[0]
    assert_same(WeightedRTN()(weight, TWO_LEVEL, stats)[0], weighted)


def test_other_schemes_are_rounded_to_nearest_and_it_has_a_name():
    weight = torch.randn(8, 64)
    for label in ("w8-g32", "w4-channel-asym"):
        scheme = QuantScheme.parse(label)
        assert_same(Q4K()(weight, scheme, {})[0], RTN()(weight, scheme, {})[0])
    assert METHODS["q4_k"]() == Q4K()
    assert not Q4K().needs
    assert Q4K(weighted=True).needs == {"hessian"}
