import dataclasses

import pytest

from checks import TWO_LEVEL, schemes
from fewbits.errors import InputError
from fewbits.scheme import QuantScheme


def test_every_label_is_parsed_back_to_its_scheme():
    all_schemes = [*schemes("tensor", "channel", 1, 32, 128), TWO_LEVEL]
    assert [QuantScheme.parse(scheme.label) for scheme in all_schemes] == all_schemes
    assert len({scheme.label for scheme in all_schemes}) == len(all_schemes)


def test_labels_are_as_documented():
    assert QuantScheme(4, "group", 128).label == "w4-g128"
    assert QuantScheme(8).label == "w8-channel"
    assert QuantScheme(8, "tensor", symmetric=False).label == "w8-tensor-asym"


@pytest.mark.parametrize(
    "label",
    ["", "w4", "4-g128", "w4-g", "w4-128", "w4-row", "w4-g128-sym", "W4-g128", "w4-g128 ", "w4-g128\n",
     "w4-g-1", "w5-channel", "w1-tensor", "w16-channel", "w4-g0", "w4-channel-asym-asym",
     "w4-g32-k", "w4-g64-asym-k", "w8-g32-asym-k", "w4-channel-asym-k", "w4-g32-asym-k-a8-token"],
)  # fmt: skip
def test_what_is_no_label_is_refused(label):
    with pytest.raises(InputError):
        QuantScheme.parse(label)


@pytest.mark.parametrize("bits", [-1, 0, 1, 5, 6, 7, 9, 16])
def test_bits_without_a_grid_are_refused(bits):
    with pytest.raises(InputError, match=f"bits is {bits}; accepted are 2, 3, 4 and 8"):
        QuantScheme(bits)


@pytest.mark.parametrize(
    ("granularity", "group_size"),
    [("group", None), ("group", 0), ("group", -4), ("channel", 32), ("tensor", 32), ("row", None)],
)
def test_a_group_size_goes_with_groups_only(granularity, group_size):
    with pytest.raises(InputError):
        QuantScheme(4, granularity, group_size)


@pytest.mark.parametrize(
    ("bits", "middle", "max_code"), [(2, 2, 3), (3, 4, 7), (4, 8, 15), (8, 128, 255)]
)
def test_the_grid_has_two_to_the_bits_codes_and_zero_in_the_upper_half(bits, middle, max_code):
    scheme = QuantScheme(bits)
    assert (scheme.middle, scheme.max_code) == (middle, max_code)


def test_groups_counts_the_scales_of_a_row():
    assert QuantScheme(4, "group", 32).groups(96) == 3
    assert QuantScheme(4, "group", 1).groups(5) == 5
    assert QuantScheme(4, "channel").groups(97) == 1
    assert QuantScheme(4, "tensor").groups(97) == 1
    assert TWO_LEVEL.groups(512) == 16


def test_groups_that_do_not_divide_the_columns_are_refused():
    with pytest.raises(InputError, match="group_size 32 does not divide 100 columns"):
        QuantScheme(4, "group", 32).groups(100)
    with pytest.raises(InputError, match="multiples of 256 columns, not 288"):
        TWO_LEVEL.groups(288)


def test_equal_schemes_are_one_key_and_none_can_be_changed():
    assert len({QuantScheme(4, "group", 32), QuantScheme(4, "group", 32), QuantScheme(4)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantScheme(4).bits = 8
