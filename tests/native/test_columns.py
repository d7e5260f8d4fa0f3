"""Columns rounded by the library: each at the nearest point, alike in all sets, threads and in torch."""

import importlib

import pytest
import torch
from torch import Tensor

from fewbits.methods import GPTQ
from fewbits.scheme import QuantScheme

native = importlib.import_module("fewbits.native.library")


def problem(rows: int, columns: int = 150, groups: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    steps = randn(groups, rows).abs() + 0.1
    return {
        "weights": randn(columns, rows),
        "errors": 0.3 * randn(columns, rows),
        "shares": 0.1 * randn(columns, columns),
        "steps": steps,
        "inverse": steps.reciprocal(),
        "low": torch.randint(-15, 1, (groups, rows), generator=generator).float(),
        "groups": torch.randint(groups, (columns,), generator=generator),
    }


def in_squares(shares: Tensor) -> Tensor:
    """In squares of 64 x 64; what fills them up must not be read."""
    count = -(-len(shares) // 64)
    filled = torch.full((64 * count, 64 * count), torch.nan)
    filled[: len(shares), : len(shares)] = shares
    return filled.view(count, 64, count, 64).transpose(1, 2).contiguous()


def round_columns(library, p: dict[str, Tensor], upper: bool = False, threads: int = 1) -> Tensor:
    errors, grid = p["errors"].clone(), (p["steps"], p["inverse"], p["low"])
    library.round_columns(
        p["weights"], errors, in_squares(p["shares"]), grid, 15, p["groups"], upper, threads=threads
    )
    return errors


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("rows", [1, 63, 64, 200])
def test_each_column_is_rounded_to_the_point_nearest_to_where_the_others_leave_it(found, rows, upper):
    p = problem(rows)
    errors = round_columns(found, p, upper).double()
    exact = {name: t.double() for name, t in p.items()}
    step, low = exact["steps"][p["groups"]], exact["low"][p["groups"]]
    before = exact["shares"].triu(1).T  # (columns, columns) of the error of the second
    after = torch.zeros_like(before) if upper else exact["shares"].tril(-1).T
    moved = before @ errors + after @ exact["errors"]
    chosen = exact["weights"] / step - errors / step
    wanted = (exact["weights"] / step + moved / step).clamp(low, low + 15)
    # What float32 rounds: 150 products and as many sums of a move, each to 2^-24 of all that is summed;
    # the error of each that it is made of, and what is taken off for it here, 2^-22 of their size.
    size = before.abs() @ errors.abs() + after.abs() @ exact["errors"].abs()
    bound = 2**-24 * (
        310 * size / step + 8 * ((exact["weights"] / step).abs() + 15 + errors.abs() / step)
    )
    assert float(bound.max()) < 0.01  # else it would show nothing
    assert bool((chosen.round() - chosen).abs().le(bound).all())
    assert bool(((chosen.round() - wanted).abs() <= 0.5 + bound).all())
    assert bool((chosen.round() >= low).all())
    assert bool((chosen.round() <= low + 15).all())


@pytest.mark.parametrize("rows", [3, 130])
def test_costs_are_those_of_the_distances_from_where_the_others_leave_columns(found, rows):
    p = problem(rows)
    costs, errors = torch.rand(150), torch.zeros_like(p["errors"])
    grid = (p["steps"], p["inverse"], p["low"])
    lost = found.round_columns(
        p["weights"], errors, in_squares(p["shares"]), grid, 15, p["groups"], True, costs
    )
    left = errors.double() + p["shares"].triu(1).T.double() @ errors.double()
    assert torch.allclose(lost.double(), costs.double() @ left.square(), rtol=1e-4)


@pytest.mark.parametrize("rows", [5, 64, 300])
def test_the_bits_do_not_depend_on_threads(found, rows):
    p = problem(rows)
    for isa in (isa for isa in native.ISAS if found.use(isa)):
        expected = round_columns(found, p)
        for threads in (2, 5):
            assert torch.equal(round_columns(found, p, threads=threads), expected), isa


def test_instruction_sets_agree_up_to_ties(found):
    p = problem(100)
    expected = round_columns(found, p, True)
    for isa in (isa for isa in native.ISAS if found.use(isa)):
        same = (round_columns(found, p, True) - expected).abs() < 1e-4 * (1 + expected.abs())
        assert float(same.float().mean()) > 0.98, isa


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_matrix_loses_as_much_as_in_torch(found, monkeypatch, bits):
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(1000, 200, generator=generator) @ torch.randn(200, 200, generator=generator)
    weight = torch.randn(90, 200, generator=generator)
    hessian, scheme = x.T @ x / len(x), QuantScheme(bits, "group", 40)
    native_codes, _ = GPTQ()(weight, scheme, {"hessian": hessian})
    monkeypatch.setenv("FEWBITS_NATIVE", "0")
    torch_codes, _ = GPTQ()(weight, scheme, {"hessian": hessian})
    same = (native_codes.codes == torch_codes.codes).all(1)
    assert float(same.float().mean()) > 0.9  # a tie that falls elsewhere changes the rest of a row


def test_a_group_that_is_none_is_refused(found):
    p = problem(3)
    p["groups"][5] = 3
    with pytest.raises(ValueError, match="a group is none of 3"):
        round_columns(found, p)
