"""X.T @ X of bfloat16 inputs: as exact as sums in float32, symmetric, alike for all threads."""

import importlib

import pytest
import torch
from torch import Tensor

from fewbits.statistics import PANEL, InputStats

native = importlib.import_module("fewbits.native.library")


@pytest.fixture
def found(monkeypatch) -> native.Library:
    monkeypatch.delenv("FEWBITS_NATIVE", raising=False)
    library = native.library()
    if library is None or not library.has_bf16:
        pytest.skip("the native library has no products of bfloat16 here")
    return library


def inputs(rows: int, columns: int) -> Tensor:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns))
    return (x * torch.logspace(-2, 2, columns)).bfloat16()


def collected(*parts: Tensor) -> InputStats:
    stats = InputStats.of(parts[0].shape[1], frozenset({"hessian", "absmax"}))
    for part in parts:
        stats.add(part)
    return stats


@pytest.mark.parametrize("rows", [1, 2, 129, 500])
@pytest.mark.parametrize("columns", [1, 63, 64, 200, 256, 257, 700])
def test_sums_are_as_exact_as_float32(found, rows, columns):
    x = inputs(rows, columns)
    stats = collected(x)
    stats.finish()
    exact = x.double().T @ x.double() / rows
    size = x.double().abs().T @ x.double().abs() / rows  # products are exact, each sum rounds to 2^-24
    assert bool(((stats.hessian.double() - exact).abs() <= (rows + 2) * 2**-24 * size).all())
    assert torch.equal(stats.hessian, stats.hessian.T)
    assert torch.equal(stats.absmax, x.abs().amax(0).float())
    assert stats.tokens == rows


def test_rows_may_lie_apart_and_what_is_added_later_adds_up(found):
    x = inputs(300, 640)
    apart = torch.full((300, 700), torch.nan, dtype=torch.bfloat16)
    apart[:, 20:660] = x
    whole, parts = collected(apart[:100, 20:660], apart[100:, 20:660]), collected(x[:100], x[100:])
    assert all(map(torch.equal, whole.panels, parts.panels))


def test_the_bits_do_not_depend_on_threads(found):
    x = inputs(200, 1000)
    shapes = [(1000 - start, min(PANEL, 1000 - start)) for start in range(0, 1000, PANEL)]
    first, *others = ([torch.zeros(shape) for shape in shapes] for _ in range(3))
    found.gram(x, first, threads=1)
    for panels, threads in zip(others, (2, 7), strict=True):
        found.gram(x, panels, threads)
        assert all(map(torch.equal, panels, first))


def test_what_is_not_finite_is_seen(found):
    x = inputs(10, 100)
    x[3, 50] = torch.inf
    stats = collected(x)
    assert not bool(stats.panels[0][50].isfinite().any())
    assert bool(stats.panels[0][:50, :50].isfinite().all())


def test_panels_of_another_shape_are_refused(found):
    with pytest.raises(ValueError, match="panel 1 are"):
        found.gram(inputs(4, 512), [torch.zeros(512, 512), torch.zeros(256, 256)])
    with pytest.raises(ValueError, match="1 panels of 256 are not those of 512 columns"):
        found.gram(inputs(4, 512), [torch.zeros(512, 256)])
    with pytest.raises(ValueError, match="float32 on cpu"):
        found.gram(inputs(4, 64).float(), [torch.zeros(64, 64)])
