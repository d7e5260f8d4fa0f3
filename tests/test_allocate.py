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
from fewbits.plan import make_plan
from fewbits.recipe import parse_override
from fewbits.sizes import weight_file_bytes
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


def best_of_all(costs, sizes, most, allowed=lambda _: True) -> float:
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


# -- models --------------------------------------------------------------------------------------------


def table_of(units, seed: int = 0) -> dict[str, dict[str, float]]:
    """Damages of very different sizes, with noise, so that more bits are not always better."""
    rng = random.Random(seed)
    found = {}
    for unit in units:
        for name in unit.names:
            whole = 10 ** rng.uniform(-7, 0)
            found[name] = {
                scheme.label: whole * 4.0 ** (2 - scheme.bits) * rng.uniform(0.5, 2)
                for scheme in unit.candidates
                if scheme is not None
            }
    return found


def planned(folder: Path, layout: str, scheme: QuantScheme = ANY, clients=(), **more):
    return make_plan(folder, Recipe(RTN(), scheme, **more), layout, clients)


def budgets(plan, units) -> list[int]:
    """From the least that is possible to nearly the whole."""
    sizes = [
        weight_file_bytes(allotted(plan, {n: u.candidates[i] for u in units for n in u.names}))
        for i in (0, -1)
    ]
    return [min(sizes) + int(share * (max(sizes) - min(sizes))) for share in (0.15, 0.4, 0.8)]


MODELS = ["llama", "qwen3", "gpt2", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "phi3", "opt"]


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("model_type", MODELS)
def test_no_format_refuses_what_was_allocated(checkpoint, model_type, layout):
    folder = checkpoint(model_type)
    symmetric = layout != "awq"
    try:
        plan = planned(folder, layout, QuantScheme(4, symmetric=symmetric))
    except InputError:
        return  # in one scheme too
    units = find_units(plan)
    assert sorted(n for unit in units for n in unit.names) == sorted(plan.placements)
    damage = table_of(units)
    for most in budgets(plan, units):
        found = allocate(units, damage, plan, most)
        recipe = Recipe(RTN(), QuantScheme(4, symmetric=symmetric), allocation=found.schemes)
        made = make_plan(folder, recipe, layout)
        assert weight_file_bytes(made) == found.weight_bytes <= most
        assert found.bits_per_weight == 8 * found.weight_bytes / plan.parameters
        given = {name: place.scheme for name, place in made.placements.items()}
        assert given == {name: s for name, s in found.schemes.items() if s is not None}
        lost = [damage[name][scheme.label] for name, scheme in given.items()]
        assert found.damage == pytest.approx(math.fsum(lost), rel=1e-12)
        for unit in units:
            assert len({found.schemes[name] for name in unit.names}) == 1
            assert found.schemes[unit.names[0]] in unit.candidates


@pytest.mark.parametrize(
    ("model_type", "layout"),
    [("llama", "compressed-tensors"), ("gpt_oss", "fewbits"), ("llama", "gguf"), ("qwen3_moe", "gptq")],
)
def test_no_unit_alone_could_be_better_within_the_budget(checkpoint, model_type, layout):
    plan = planned(checkpoint(model_type), layout)
    units = find_units(plan)
    damage = table_of(units, 1)
    for most in budgets(plan, units):
        found = allocate(units, damage, plan, most)
        for unit in units:
            now = found.schemes[unit.names[0]]

            def lost(scheme, unit=unit) -> float:
                return sum(0.0 if scheme is None else damage[n][scheme.label] for n in unit.names)

            for other in unit.candidates:
                if lost(other) >= lost(now) or (unit.alike and None in (now, other)):
                    continue
                changed = found.schemes | dict.fromkeys(unit.names, other)
                # Digits of two offsets for each tensor, and what pads a file.
                slack = 2 * 4 * len(plan.checkpoint.tensors) + 32
                assert weight_file_bytes(allotted(plan, changed)) > most - slack


def test_the_files_are_as_large_as_was_said_and_no_larger_than_the_budget(tmp_path, checkpoint):
    folder = checkpoint("llama")
    plan = planned(folder, "compressed-tensors")
    units = find_units(plan)
    most = budgets(plan, units)[1]
    found = allocate(units, table_of(units), plan, most, max_shard_bytes=20_000)
    overrides = tuple((name, scheme) for name, scheme in found.schemes.items())
    result = quantize(folder, tmp_path / "out", overrides=overrides, max_shard_bytes=20_000)
    assert result.weight_bytes == found.weight_bytes <= most
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2


@pytest.mark.parametrize("model_type", MODELS)
def test_clients_that_are_named_load_what_was_allocated(checkpoint, model_type):
    folder = checkpoint(model_type)
    for layout, client in (("compressed-tensors", "vllm"), ("gptq", "vllm"), ("gptq-v2", "gptqmodel")):
        scheme = QuantScheme(4, "group", 32)
        try:
            plan = planned(folder, layout, scheme, (client,))
        except InputError:
            continue
        units = find_units(plan, clients=(client,))
        for most in budgets(plan, units):
            found = allocate(units, table_of(units), plan, most)
            made = make_plan(folder, Recipe(RTN(), scheme, allocation=found.schemes), layout, (client,))
            assert weight_file_bytes(made) == found.weight_bytes
        if (layout, client) == ("gptq", "vllm"):  # whose kernels take 4 and 8 bits
            bits = {scheme.bits for unit in units for scheme in unit.candidates if scheme is not None}
            assert bits == {4, 8}


def test_units_are_what_every_client_of_the_format_has_as_one(checkpoint):
    plan = planned(checkpoint("llama"), "compressed-tensors")
    block = [
        {name.split(".")[-2] for name in unit.names}
        for unit in find_units(plan)
        if ".0." in unit.names[0]
    ]
    assert sorted(map(sorted, block)) == [
        ["down_proj"], ["gate_proj", "up_proj"], ["k_proj", "q_proj", "v_proj"], ["o_proj"]
    ]  # fmt: skip
    alone = find_units(planned(checkpoint("llama"), "fewbits"))
    assert all(len(unit.names) == 1 for unit in alone)


@pytest.mark.parametrize(
    ("layout", "count"), [("compressed-tensors", 1), ("gptq", 2), ("gguf", 2 * 2), ("fewbits", 2 * 2)]
)
def test_experts_are_as_many_units_as_the_format_lets_them_be(checkpoint, layout, count):
    # Two blocks. In gguf and our own, gate and up are one parameter, down another; vLLM has all of a
    # block in one scheme, and compressed-tensors those of all blocks.
    plan = planned(checkpoint("mixtral"), layout)
    units = [u for u in find_units(plan) if plan.placements[u.names[0]].expert]
    assert len(units) == count
    free = all(None in unit.candidates for unit in units)
    assert free
    ties = {unit.alike is not None for unit in units}
    assert ties == {layout != "fewbits"}


def test_what_is_fixed_is_left_alone_and_binds_only_what_must_be_alike(checkpoint):
    overrides = (parse_override("*.0.self_attn.q_proj=w8-g32"), parse_override("*.o_proj=float"))
    recipe = Recipe(RTN(), ANY, overrides)
    fixed = {"model.layers.0.self_attn.q_proj.weight"}
    plan = make_plan(checkpoint("llama"), recipe, "compressed-tensors")
    units = {unit.names: unit for unit in find_units(plan, fixed=fixed)}
    names = [name for unit in units for name in unit]
    assert not fixed & set(names)
    assert not any("o_proj" in name for name in names)
    pair = tuple(f"model.layers.0.self_attn.{kind}_proj.weight" for kind in "kv")
    assert len(units[pair].candidates) > 2  # nobody named a client that has the three as one
    bound = {u.names: u for u in find_units(plan, clients=("vllm",), fixed=fixed)}
    assert [s.label for s in bound[pair].candidates] == ["w8-g32"]


def test_fixed_weights_keep_their_scheme_and_all_others_fit_them(checkpoint):
    # AWQ has one size of groups for all: that of what is fixed.
    overrides = (parse_override("*.0.mlp.down_proj=w4-g32-asym"),)
    recipe = Recipe(RTN(), QuantScheme(4, "group", 32, symmetric=False), overrides)
    fixed = {"model.layers.0.mlp.down_proj.weight"}
    plan = make_plan(checkpoint("llama"), recipe, "awq")
    for unit in find_units(plan, fixed=fixed):
        assert {s.group_size for s in unit.candidates if s is not None} == {32}
    loose = find_units(plan)
    assert {s.group_size for u in loose for s in u.candidates if s is not None} == {32, 64, 128}


def test_candidates_are_those_whose_groups_divide_the_columns(checkpoint):
    plan = planned(checkpoint("llama"), "fewbits")
    for unit in find_units(plan):
        columns = plan.matrices[unit.names[0]].rows_columns[1]
        assert list(unit.candidates) == [*default_candidates(columns), None]
        wanted = {size for size in (32, 64, 128) if columns % size == 0}
        assert {s.group_size for s in unit.candidates if s is not None} == wanted
    narrow = default_candidates(80)
    labels = ["w2-channel", "w3-channel", "w4-channel", "w8-channel"]
    assert [s.label for s in narrow] == labels + [f"{label}-trellis" for label in labels[:3]]
    assert [s.label for s in default_candidates(80, False)] == [f"{label}-asym" for label in labels]
    some = find_units(plan, [QuantScheme(3, "group", 64)])
    assert {len(unit.candidates) for unit in some} == {1, 2}  # 96 columns have no groups of 64


def test_lists_of_clients_that_were_named_and_of_all():
    model = SimpleNamespace()
    facts = Facts({}, ["a.q_proj", "a.k_proj", "a.gate_proj"], "gptq", model)
    assert joined(facts) == [("a.q_proj.weight", "a.k_proj.weight")]
    assert joined(facts, ("gptqmodel",)) == []


def test_a_tied_head_costs_nothing_in_float(checkpoint):
    folder = checkpoint("qwen3")
    plan = planned(folder, "fewbits", head=True)
    units = find_units(plan)
    assert any("lm_head.weight" in unit.names for unit in units)
    found = allocate(units, table_of(units), plan, budgets(plan, units)[0])
    assert found.schemes["lm_head.weight"] is None
    made = make_plan(folder, Recipe(RTN(), ANY, head=True, allocation=found.schemes), "fewbits")
    assert weight_file_bytes(made) == found.weight_bytes


# -- refusals ------------------------------------------------------------------------------------------


def test_a_budget_below_the_least_says_the_least_and_that_would_do(checkpoint):
    plan = planned(checkpoint("llama"), "fewbits")
    units = find_units(plan)
    with pytest.raises(InputError, match="the least") as caught:
        allocate(units, table_of(units), plan, 10_000)
    least = math.floor(float(str(caught.value).split(" ")[-6]) * 1e9)
    found = allocate(units, table_of(units), plan, least)
    assert found.weight_bytes <= least
    with pytest.raises(InputError, match="the least"):
        allocate(units, table_of(units), plan, found.weight_bytes - 1)


def test_a_budget_that_the_float_model_fits_in_says_its_size(checkpoint):
    folder = checkpoint("llama")
    plan = planned(folder, "fewbits")
    units, whole = find_units(plan), sum(open_headers(folder).file_bytes.values())
    with pytest.raises(InputError, match="nothing to quantize"):
        allocate(units, table_of(units), plan, whole + 100)
    assert any(allocate(units, table_of(units), plan, whole - 1000).schemes.values())


def test_a_table_that_lacks_a_matrix_or_a_scheme_is_refused(checkpoint):
    plan = planned(checkpoint("llama"), "fewbits")
    units = find_units(plan)
    table = table_of(units)
    name = units[3].names[0]
    with pytest.raises(InputError, match=f"{name} in w2-g32, but for none"):
        allocate(units, {n: row for n, row in table.items() if n != name}, plan, 10**5)
    less = {label: nats for label, nats in table[name].items() if label != "w3-g32"}
    with pytest.raises(InputError, match=f"{name} in w3-g32"):
        allocate(units, table | {name: less}, plan, 10**5)
    with pytest.raises(InputError, match=f"{name} in w3-g32"):
        allocate(units, table | {name: table[name] | {"w3-g32": math.nan}}, plan, 10**5)
