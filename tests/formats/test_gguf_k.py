from dataclasses import replace

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st

from checks import TWO_LEVEL, assert_same, random_weight
from fewbits.errors import InputError
from fewbits.formats import FORMATS, Placement
from fewbits.formats.gguf_k import BYTES
from fewbits.formats.packed import write_packed

LAYOUT = FORMATS["gguf"]


@st.composite
def any_bytes(draw):
    rows, blocks = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    stored = torch.randint(0, 256, (rows, blocks * BYTES), dtype=torch.uint8, generator=generator)
    for i in (1, 3):  # no infinite scales
        stored[:, i::BYTES] &= 0xBB
    return stored


@settings(max_examples=50, deadline=None, derandomize=True)
@given(any_bytes())
def test_any_bytes_are_the_values_that_the_library_gives_and_are_written_again(stored):
    weight = LAYOUT.read("X.weight", {"X.weight_blocks": stored}, TWO_LEVEL)
    theirs = torch.from_numpy(gguf.quants.dequantize(stored.numpy(), Kind.Q4_K))
    assert torch.equal(weight.dequantize(), theirs)
    assert torch.equal(LAYOUT.write("X.weight", weight)["X.weight_blocks"], stored)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(any_bytes())
def test_the_library_finds_every_part(stored):
    stored[:, 1::BYTES] &= 0x7F  # d below 0 is written by nobody
    stored[:, 3::BYTES] &= 0x7F
    weight = LAYOUT.read("X.weight", {"X.weight_blocks": stored}, TWO_LEVEL)
    found = LAYOUT.decode("X.weight", {"X.weight_blocks": stored}, TWO_LEVEL, weight.shape)
    parts = (found.codes, found.scale, found.zero_point)
    assert_same(
        replace(weight, codes=parts[0], scale=parts[1], zero_point=parts[2], levels=found.levels), weight
    )


def test_what_is_held_is_what_is_read_and_its_bytes_are_counted():
    weight = random_weight(TWO_LEVEL, (5, 768))
    tensors = LAYOUT.write("X.weight", weight)
    assert (
        LAYOUT.written_bytes(5, 768, TWO_LEVEL, 2) == tensors["X.weight_blocks"].numel() == 5 * 3 * 144
    )
    assert LAYOUT.held(weight) is weight
    assert_same(LAYOUT.read("X.weight", tensors, TWO_LEVEL), weight)
    config = LAYOUT.config({"X.weight": Placement("X", TWO_LEVEL, shape=(5, 768))}, [])
    assert LAYOUT.scheme_of(config, "X.weight", "X") == TWO_LEVEL
    stored = type("S", (), {"tensors": tensors})
    assert LAYOUT.shape(config, "X.weight", stored) == (5, 768)
    assert not LAYOUT.remarks({"X.weight": Placement("X", TWO_LEVEL)})


def test_rows_that_are_no_whole_blocks_are_refused():
    reason = LAYOUT.refuses(Placement("X", TWO_LEVEL, shape=(8, 288)), TWO_LEVEL)
    assert "multiples of 256" in reason
    with pytest.raises(InputError, match="rows of 144 bytes for each 256 columns"):
        LAYOUT.read("X.weight", {"X.weight_blocks": torch.ones(2, 100, dtype=torch.uint8)}, TWO_LEVEL)


@pytest.mark.parametrize("name", sorted(FORMATS.keys() - {"gguf"}))
def test_every_other_format_says_where_two_levels_have_a_layout(name):
    place = Placement("model.X", TWO_LEVEL, shape=(16, 256))
    assert FORMATS[name].refuses(place, TWO_LEVEL) == "two levels of scales have a layout in gguf only"


def test_what_packs_integers_alone_does_not_lose_the_levels():
    with pytest.raises(InputError, match="layout in gguf only"):
        write_packed("X.weight", "", random_weight(TWO_LEVEL, (16, 256)))
