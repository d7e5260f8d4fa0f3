"""Allocation against all combinations, against an exact relaxation, and against what a plan refuses."""

import itertools
import math
import random
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits import RTN, QuantScheme, Recipe, quantize
from fewbits.allocate import Unit, _Problem, allocate, allotted, default_candidates, find_units
from fewbits.checkpoint import open_headers
from fewbits.clients import Facts, joined
from fewbits.errors import InputError
from fewbits.formats import FORMATS
from fewbits.plan import make_plan, survey
from fewbits.recipe import parse_override
from fewbits.sizes import weight_file_bytes
from fewbits.structure import find_head, skeleton, text_config
from models import tiny_checkpoint

G32, ANY = QuantScheme(4, "group", 32), QuantScheme(4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a model type and changes of its config, made once."""
    made: dict[object, Path] = {}

    def get(model_type: str = "llama", **changes: int) -> Path:
        key = (model_type, *changes.items())
        if key not in made:
            made[key] = tiny_checkpoint(tmp_path_factory.mktemp(model_type), model_type, **changes)
        return made[key]

    return get


# -- the choice ----------------------------------------------------------------------------------------


def units_of(count: int, candidates: int, alike=None) -> list[Unit]:
    schemes = tuple(QuantScheme(4, "group", 1 + i) for i in range(candidates - 1))
    return [Unit((f"{i}",), (*schemes, None), alike) for i in range(count)]


def best_of_all(costs, sizes, most, allowed=lambda choice: True) -> float:
    """The least cost of any combination that fits; infinity if none does."""
    return min(
        (
            math.fsum(row[i] for row, i in zip(costs, choice, strict=True))
            for choice in itertools.product(*(range(len(row)) for row in costs))
            if sum(row[i] for row, i in zip(sizes, choice, strict=True)) <= most and allowed(choice)
        ),
        default=math.inf,
    )


NATS = st.one_of(
    st.just(0.0),
    st.floats(-9, 1).map(lambda x: 10**x),
    st.floats(-1e-6, 1e-6),  # noise below 0
)
ROW = st.lists(st.tuples(NATS, st.integers(0, 10**9)), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=6), st.floats(0, 1))
def test_the_choice_is_the_best_of_all_combinations(rows, share):
    costs = [[cost for cost, _ in row] for row in rows]
    sizes = [[size for _, size in row] for row in rows]
    low, high = sum(map(min, sizes)), sum(map(max, sizes))
    most = low + int(share * (high - low))
    problem = _Problem(costs, sizes, [Unit((), ())] * len(rows))
    choice = problem.solve(most)
    assert choice is not None
    assert problem.size(choice) <= most
    # Sums are told apart that differ by a billionth of the spread of costs that the best choice has.
    least = [min(row) for row in costs]
    best = best_of_all(costs, sizes, most)
    assert problem.cost(choice) - best <= 1e-9 * (best - math.fsum(least)) + 1e-18


def test_less_than_the_least_is_no_choice():
    problem = _Problem([[1.0, 0.0]] * 3, [[5, 9]] * 3, units_of(3, 2))
    assert problem.solve(14) is None
    assert problem.solve(15) == [0, 0, 0]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_what_units_have_in_common_is_the_same_in_all(seed, share):
    rng = random.Random(seed)
    kinds = [[frozenset({("group", i % 2)}) for i in range(3)] + [frozenset()] for _ in range(2)]
    kinds += [[frozenset()] * 4, [frozenset({("group", 1), ("other", i)}) for i in range(4)]]
    units = [Unit((f"{i}",), (None,) * 4, tuple(alike)) for i, alike in enumerate(kinds)]
    costs = [[rng.random() for _ in range(4)] for _ in units]
    sizes = [[rng.randrange(1000) for _ in range(4)] for _ in units]

    def agree(choice) -> bool:
        chosen = [pair for unit, i in zip(units, choice, strict=True) for pair in unit.alike[i]]
        return len(dict(chosen)) == len(set(chosen))

    problem = _Problem(costs, sizes, units)
    smallest = problem.smallest()
    assert agree(smallest)
    assert problem.size(smallest) == best_of_all(sizes, sizes, math.inf, agree)
    most = problem.size(smallest) + int(share * 2000)
    choice = problem.solve(most)
    assert agree(choice)
    assert problem.size(choice) <= most
    assert problem.cost(choice) == pytest.approx(best_of_all(costs, sizes, most, agree), rel=1e-9)


def relaxed(costs, sizes, most) -> Fraction:
    """The least cost if candidates may be mixed: along the hull of each row, the steepest step first."""
    total, room, steps = Fraction(0), Fraction(most), []
    for row_costs, row_sizes in zip(costs, sizes, strict=True):
        points = sorted(zip(row_sizes, map(Fraction, row_costs), strict=True))
        hull = points[:1]
        total, room = total + hull[0][1], room - hull[0][0]
        while True:
            left = [p for p in points if p[0] > hull[-1][0] and p[1] < hull[-1][1]]
            if not left:
                break
            last = hull[-1]
            hull.append(max(left, key=lambda p: ((last[1] - p[1]) / (p[0] - last[0]), p[0])))
        steps += [((a[1] - b[1]) / (b[0] - a[0]), b[0] - a[0]) for a, b in itertools.pairwise(hull)]
    for slope, size in sorted(steps, reverse=True):
        part = min(room, size)
        total, room = total - slope * part, room - part
    return total


@pytest.mark.parametrize("seed", range(12))
def test_the_price_of_a_byte_is_a_difference_of_the_relaxation(seed):
    rng = random.Random(seed)
    sizes = [sorted(rng.sample(range(10**3, 10**6), 5)) for _ in range(20)]
    costs = [[10 ** rng.uniform(-9, -1 - 2 * i) for i in range(4)] + [0.0] for _ in sizes]
    most = sum(map(min, sizes)) + rng.randrange(sum(map(max, sizes)) - sum(map(min, sizes)))
    price = _Problem(costs, sizes, units_of(20, 5)).price(most)
    # The relaxation is straight between two corners, and corners are hundreds of bytes apart.
    difference = relaxed(costs, sizes, most) - relaxed(costs, sizes, most + 1)
    assert price == pytest.approx(float(difference), rel=1e-6)


def test_nothing_left_to_save_has_no_price():
    assert _Problem([[1.0, 0.0]], [[5, 9]], units_of(1, 2)).price(100) == 0


@pytest.mark.parametrize("most", ["2.6", "3.7", "5"])
def test_models_of_hundreds_of_billions_take_seconds(most):
    import time

    rng, costs, sizes = random.Random(0), [], []
    for count in [1, 1, 1, 256, 256] * 61:
        weights, damage = count * 7168 * 2048, 10 ** rng.uniform(-6, -3)
        pairs = [(bits, size) for bits in (2, 3, 4, 8) for size in (32, 64, 128)]
        costs.append([damage * 4.0**-b * (1 + g / 400) * rng.uniform(0.9, 1.1) for b, g in pairs])
        sizes.append([weights * (b * g + 16) // (8 * g) + rng.randrange(999) for b, g in pairs])
    problem = _Problem(costs, sizes, units_of(len(costs), 12))
    began = time.process_time()
    choice = problem.solve(int(float(most) * sum(map(max, sizes)) / 8.5))
    assert choice is not None
    assert time.process_time() - began < 60
