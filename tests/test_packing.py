import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from fewbits.packing import pack, packed_columns, unpack

# Every count up to two units of 8 elements, and those around whole words for each number of bits.
COLUMNS = [*range(1, 18), 31, 32, 33, 63, 64, 65, 96]


@st.composite
def codes_and_bits(draw):
    bits = draw(st.sampled_from([2, 3, 4, 8]))
    columns = draw(st.integers(1, 70))
    row = st.lists(st.integers(0, 2**bits - 1), min_size=columns, max_size=columns)
    return draw(st.lists(row, min_size=1, max_size=4)), bits


@settings(max_examples=200, deadline=None, derandomize=True)
@given(codes_and_bits())
def test_packing_equals_one_long_integer_per_row(case):
    rows, bits = case
    codes = torch.tensor(rows, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.tolist() == [oracles.pack_bits(row, bits) for row in rows]
    assert torch.equal(unpack(packed, bits, codes.shape[1]), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("columns", COLUMNS)
def test_packing_equals_compressed_tensors_bit_for_bit(bits, columns):
    codes = torch.randint(0, 2**bits, (5, columns), dtype=torch.uint8)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)  # how that library holds codes
    packed = pack(codes, bits)
    assert torch.equal(packed, pack_to_int32(signed, bits))
    assert torch.equal(unpack_from_int32(packed, bits, codes.shape), signed)
    assert torch.equal(unpack(pack_to_int32(signed, bits), bits, columns), codes)
    assert packed.shape == (5, packed_columns(columns, bits))


def test_the_documented_picture_holds():
    # element   0  1  2  3  4  5  6  7 | 8: four bits each, the lowest first
    packed = pack(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9]], dtype=torch.uint8), 4)
    assert [word & 0xFFFFFFFF for word in packed[0].tolist()] == [0x87654321, 0x9]


def test_three_bit_elements_lie_across_words():
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 10] = 0b101  # bits 30 to 32: its two low bits end a word, its high bit begins the next
    assert [word & 0xFFFFFFFF for word in pack(codes, 3)[0].tolist()] == [0b01 << 30, 0b1, 0]


def test_unused_bits_of_the_last_word_are_zero_when_packed_and_ignored_when_unpacked():
    codes = torch.full((1, 5), 7, dtype=torch.uint8)
    packed = pack(codes, 3)
    assert packed.tolist() == [[2**15 - 1]]
    assert torch.equal(unpack(torch.full_like(packed, -1), 3, 5), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_need_not_be_contiguous(bits):
    for shape in ((16, 8), (9, 5), (32, 32)):
        codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
        assert torch.equal(pack(codes.t(), bits), pack(codes.t().contiguous(), bits))
        packed = pack(codes, bits)
        across = packed.t().contiguous().t()
        assert torch.equal(unpack(across, bits, shape[1]), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packing_leaves_its_input_alone_and_shares_no_memory_with_it(bits):
    codes = torch.randint(0, 2**bits, (3, 32), dtype=torch.uint8)
    before = codes.clone()
    packed = pack(codes, bits)
    unpack(packed, bits, 32).fill_(0)
    packed.fill_(-1)
    assert torch.equal(codes, before)
