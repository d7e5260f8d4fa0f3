"""Checkpoints that other tools wrote, read: their logits, by those tools, are ours.

Made by tests/interop/make_golden.py --small: gptqmodel 7.6.0 in float16, llama-cpp-python 0.3.36.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fewbits
from checks import without_native
from fewbits.linear import QuantizedLinear

GOLDEN = sorted((Path(__file__).parent / "interop" / "golden").iterdir())


def divergence(ours, theirs):
    ours, theirs = (F.log_softmax(x.double(), -1) for x in (ours, theirs))
    return float((ours.exp() * (ours - theirs)).sum(-1).mean())


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_the_logits_of_the_tool_that_wrote_it_are_ours(folder, monkeypatch):
    answer = np.load(folder / "answer.npz")
    tokens, theirs = torch.from_numpy(answer["tokens"]), torch.from_numpy(answer["logits"])
    model = fewbits.load(folder, dtype=torch.float32)
    without_native(monkeypatch)
    other = fewbits.load(folder, dtype=torch.float32)
    linears = [module for module in other.base_model.modules() if isinstance(module, QuantizedLinear)]
    assert len(linears) == 7
    for linear in linears:  # what one code less in every weight would do
        linear.kernel.zero_point += 1
    with torch.no_grad():
        found, wrong = (divergence(each(tokens).logits, theirs) for each in (model, other))
    # They compute in float16, or round inputs to 8 bits: small parts of a step, where this is one.
    assert found < 1e-3 * wrong
