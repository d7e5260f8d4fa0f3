"""Learned rounding: gradients as autograd has them, codes that stay on their grid, and nothing worse."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewbits import GPTQ, InputError, QuantizedTensor, QuantScheme
from fewbits.methods import Learned, Rounding

SCHEMES = ["w4-g32", "w3-g32-asym", "w2-channel", "w8-channel-asym", "w4-tensor"]
ROWS, COLUMNS = 24, 96


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def problem(label: str, dtype: torch.dtype = torch.float32, scales: torch.dtype = torch.bfloat16):
    """A weight, the inputs it meets, and its codes by GPTQ, many of which are not the nearest."""
    weight, x = random(ROWS, COLUMNS, dtype=dtype), random(400, COLUMNS, seed=1, dtype=dtype)
    x = x @ (torch.eye(COLUMNS, dtype=dtype) + 0.1 * random(COLUMNS, COLUMNS, seed=2, dtype=dtype))
    rounded, _ = GPTQ()(weight, QuantScheme.parse(label), {"hessian": x.t() @ x / len(x)}, scales)
    return weight, x, rounded


def equal(one: QuantizedTensor, other: QuantizedTensor) -> bool:
    names = ("codes", "scale", "zero_point")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("label", SCHEMES)
def test_it_begins_with_the_codes_it_is_given(label, scales):
    weight, _, rounded = problem(label, scales=scales)
    rounding = Rounding.of(weight.clone(), rounded)
    assert equal(rounding.quantized(), rounded)
    assert torch.equal(rounding.weights(), rounded.dequantize(torch.float32))


@pytest.mark.parametrize("label", SCHEMES)
def test_gradients_are_those_of_autograd_with_rounding_as_the_identity(label):
    weight, x, rounded = problem(label, torch.float64, torch.float64)
    rounding = Rounding.of(weight.clone(), rounded)
    shape = (*rounded.scale.shape, -1) if label != "w4-tensor" else (1, 1, -1)
    rounding.offsets = (random(ROWS, COLUMNS, seed=3, dtype=torch.float64) * 0.3).view(shape)
    rounding.factors = 1 + random(*rounded.scale.shape, seed=4, dtype=torch.float64) * 0.05
    v, a = rounding.offsets.clone().requires_grad_(), rounding.factors.clone().requires_grad_()
    points = rounded.zero_point.double()[..., None]
    step = (rounded.scale * a)[..., None]
    u = rounding.weight.view(shape) / step + v
    codes = (u + (u.round() - u).detach() + points).clamp(0, rounded.scheme.max_code)
    own = ((codes - points) * step).view(weight.shape)
    assert torch.allclose(own, rounding.weights(), rtol=1e-12)
    wanted = torch.autograd.grad((x @ (own - weight).t()).square().sum(), (v, a, own), retain_graph=True)
    offsets, of_scale = rounding.gradients(wanted[2])
    found = offsets, of_scale * rounded.scale
    for one, other in zip(found, wanted[:2], strict=True):
        assert float((one - other).norm()) <= 1e-10 * float(other.norm())


@pytest.mark.parametrize("label", SCHEMES)
@pytest.mark.parametrize("least", [0.0, 0.25])
def test_codes_stay_on_a_grid_that_the_format_holds(label, least):
    weight, x, rounded = problem(label)
    rounded = QuantizedTensor(
        rounded.codes, rounded.scale.clamp(min=least), rounded.zero_point, rounded.scheme
    )
    rounding = Rounding.of(weight.clone(), rounded, least)
    for step in range(20):
        gradient = (rounding.weights() - weight) @ (x.t() @ x) + random(ROWS, COLUMNS, seed=step) * 100
        rounding.step(gradient, 0.05)
    found = rounding.quantized()
    assert found.scheme == rounded.scheme
    assert found.scale.dtype == rounded.scale.dtype
    assert torch.equal(found.zero_point, rounded.zero_point)
    assert int(found.codes.max()) <= found.scheme.max_code
    assert float(found.scale.min()) >= max(least, 1e-30)
    assert not torch.equal(found.codes, rounded.codes)
    assert torch.equal(found.dequantize(torch.float32), rounding.weights())


class Line:
    """A block of one matrix: y = x W.T, errors on other inputs than gradients."""

    def __init__(self, label: str) -> None:
        self.weight, x, self.rounded = problem(label)
        self.x, self.other = x.chunk(2)
        # Codes that are one off where they could be right.
        codes = self.rounded.codes.int() + (random(ROWS, COLUMNS, seed=5) > 1)
        codes = codes.clamp(max=self.rounded.scheme.max_code).to(torch.uint8)
        self.spoiled = replace(self.rounded, codes=codes)
        self.now = torch.empty(0)

    def put(self, _name: str, weight: Tensor) -> None:
        self.now = weight

    def gradients(self, _step: int) -> dict[str, Tensor]:
        return {"one": (self.x @ (self.now - self.weight).t()).t() @ self.x}

    def error(self) -> float:
        return float((self.other @ (self.now - self.weight).t()).square().mean())


def test_it_finds_better_codes_for_inputs_it_has_not_seen():
    line = Line("w3-g32")
    roundings = {"one": Rounding.of(line.weight.clone(), line.spoiled)}
    before, after, step = Learned()(roundings, line.put, line.gradients, line.error)
    assert step > 0
    assert after < 0.8 * before
    line.put("one", roundings["one"].best.dequantize(torch.float32))
    assert line.error() == after


def test_what_makes_it_worse_is_not_kept():
    line = Line("w3-g32")
    roundings = {"one": Rounding.of(line.weight.clone(), line.rounded)}
    against = lambda step: {"one": -line.gradients(step)["one"]}  # noqa: E731
    before, after, step = Learned(steps=20)(roundings, line.put, against, line.error)
    assert (step, after) == (0, before)
    assert roundings["one"].best is line.rounded


def test_the_search_ends_half_way_where_it_leads_nowhere():
    line, steps = Line("w3-g32"), []

    def against(step: int) -> dict[str, Tensor]:
        steps.append(step)
        return {"one": -line.gradients(step)["one"]}

    roundings = {"one": Rounding.of(line.weight.clone(), line.rounded)}
    Learned(steps=20)(roundings, line.put, against, line.error)
    assert steps == list(range(10))


def test_a_matrix_that_nothing_reached_keeps_its_codes():
    line = Line("w3-g32")
    unseen = Rounding.of(line.weight.clone(), line.rounded)
    roundings = {"one": Rounding.of(line.weight.clone(), line.spoiled), "other": unseen}

    def put(name: str, weight: Tensor) -> None:
        if name == "one":
            line.put(name, weight)

    assert Learned(steps=50)(roundings, put, line.gradients, line.error)[2] > 0
    assert equal(unseen.best, line.rounded)


def test_steps_begin_at_one():
    with pytest.raises(InputError, match=r"steps is 0; accepted are numbers from 1"):
        Learned(steps=0)
