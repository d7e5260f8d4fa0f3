import pytest
import torch

import oracles
from checks import check_method, schemes
from fewbits.affine import choose_qparams
from fewbits.methods import METHODS, RTN


def test_rtn_is_a_method():
    check_method(RTN())


def test_rtn_needs_no_statistics_and_has_nothing_to_note():
    method = METHODS["rtn"]()
    assert method.needs == frozenset()
    assert method(torch.randn(2, 8), schemes("channel")[0], {})[1] == []


@pytest.mark.parametrize("scheme", schemes("tensor", "channel", 8), ids=lambda scheme: scheme.label)
def test_every_weight_takes_the_nearest_point_of_its_grid(scheme):
    weight = torch.randn(4, 16).to(torch.bfloat16)
    quantized, _ = RTN()(weight, scheme, {})
    scale, zero_point = choose_qparams(weight, scheme)
    assert torch.equal(quantized.scale, scale)
    assert torch.equal(quantized.zero_point, zero_point)
    assert torch.equal(quantized.codes, oracles.nearest_codes(weight, scale, zero_point, scheme))
