import ctypes
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fewbits.errors import InputError
from fewbits.formats.gguf_k import BYTES, Q4K, dequantize_k

ROOT = Path(__file__).parent.parent.parent
LIBRARY = "build/interop/llama-cpp/lib/python*/site-packages/llama_cpp/lib/libggml-base.so"


def elsewhere(blocks):
    return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), Kind.Q4_K))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 3))
def test_any_bytes_are_the_values_that_the_library_gives(seed, rows, blocks):
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randint(0, 256, (rows, blocks * BYTES), dtype=torch.uint8, generator=generator)
    for i in (1, 3):  # no infinite scales
        stored[:, i::BYTES] &= 0xBB
    assert torch.equal(dequantize_k(stored), elsewhere(stored))


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
    blocks = Q4K()(weight)
    assert blocks.shape == (weight.shape[0], weight.shape[1] // 256 * BYTES)
    values = dequantize_k(blocks)
    assert torch.equal(values, elsewhere(blocks))
    parts = weight.reshape(weight.shape[0], -1, 32)
    step = (parts.amax(2).clamp(min=0) - parts.amin(2).clamp(max=0)) / 15
    nearest = (parts / step[..., None]).nan_to_num(0).round() * step[..., None]
    assert (values - weight).square().sum() < (nearest.reshape(weight.shape) - weight).square().sum()


def test_zero_stays_zero():
    assert not dequantize_k(Q4K()(torch.zeros(2, 256))).any()


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
        theirs = torch.zeros(weight.shape[0], weight.shape[1] // 256 * BYTES, dtype=torch.uint8)
        library.ggml_quantize_chunk(
            int(Kind.Q4_K), weight.data_ptr(), theirs.data_ptr(), 0, *weight.shape,
            None if counts is None else counts.data_ptr(),
        )  # fmt: skip
        ours = Q4K()(weight, counts)
        size = torch.ones(weight.shape[1]) if counts is None else counts
        errors = [(size * (dequantize_k(b) - weight).square()).sum() for b in (ours, theirs)]
        assert errors[0] <= errors[1]


def test_columns_that_count_more_are_off_by_less():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    counts = torch.ones(256)
    counts[::8] = 100
    plain, weighted = (dequantize_k(Q4K()(weight, c)) - weight for c in (None, counts))
    assert weighted[:, ::8].square().sum() < 0.8 * plain[:, ::8].square().sum()
    assert bool((Q4K()(weight, torch.zeros(256)) == Q4K()(weight)).all())


def test_what_does_not_fit_is_refused():
    for weight, counts, message in (
        (torch.ones(2, 128), None, "rows of 128"),
        (torch.full((2, 256), torch.nan), None, "not finite"),
        (torch.full((2, 256), 1e10), None, "beyond float16"),
        (torch.ones(2, 256), torch.ones(2), "importance is"),
        (torch.ones(2, 256), -torch.ones(256), "numbers from 0"),
    ):
        with pytest.raises(InputError, match=message):
            Q4K()(weight, counts)
    with pytest.raises(InputError, match="rows of 144 bytes"):
        dequantize_k(torch.ones(2, 100, dtype=torch.uint8))
