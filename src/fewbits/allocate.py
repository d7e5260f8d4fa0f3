"""Allocation: the scheme of every matrix, such that the files fit a budget and the damage is least.

    find_units(plan)                         what must have one scheme together, and which it may have
    allocate(units, damage, plan, bytes)     the least sum of damages that fits, exactly

Each unit takes one of its candidates. Sizes and damages of units are added up, and what is left is a
knapsack with one choice per unit, which HiGHS solves (scipy's `milp`). Sizes of files are sums but for
some digits in their headers: what is chosen is weighed by `weight_file_bytes`, and chosen anew with what
those digits leave.
"""

import ctypes
import math
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, product
from typing import Any

from fewbits.checkpoint import MAX_SHARD_BYTES
from fewbits.clients import Facts, joined, not_loaded
from fewbits.errors import InputError
from fewbits.formats import Placement
from fewbits.plan import Plan
from fewbits.scheme import BITS, QuantScheme
from fewbits.sizes import bytes_together, weight_file_bytes
from fewbits.structure import find_head, skeleton, text_config
from fewbits.trellis import CHAIN

FLOAT = "float"
GROUPS = (32, 64, 128)
_EXPERTS = "experts in float"  # either all of a model are, or none; but in our own format
_ROUNDS = 8  # of choosing and weighing; two or three are needed
# In the solver's numbers, of which it tells 1e-6 from 0: the largest damage that matters, and all bytes
# above the least. From 1e4 to 1e6 and from 1 to 1e6 every choice was the same, and none was faster.
_SCALE, _ROOM = 1e6, 1e3
_COARSE = 1e3  # times as large as the least sum: damages are put to another scale
_NOTHING = 1e-30  # nats that are none
_ROUGHLY = 0.01  # share by which a first sum may be above the least

Damage = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Unit:
    """Matrices that get one scheme together.

    Args:
        names: of their source tensors.
        candidates: what they may get; None for float.
        alike: for each candidate, what units have in common: of those that give one first, all give it
            with the same second. None: nothing is.
    """

    names: tuple[str, ...]
    candidates: tuple[QuantScheme | None, ...]
    alike: tuple[frozenset[tuple[Hashable, Hashable]], ...] | None = None


@dataclass(frozen=True, slots=True)
class Allocation:
    """What was chosen.

    Args:
        schemes: by source name, of all matrices in units; None for float.
        damage: predicted, nats per token: the sum over all matrices of the table.
        weight_bytes: of all weight files.
        bits_per_weight: over whole files.
        price: nats per token that one more byte would save, of the LP relaxation; 0 if there is nothing
            left to save.
    """

    schemes: dict[str, QuantScheme | None]
    damage: float
    weight_bytes: int
    bits_per_weight: float
    price: float


# -- units -------------------------------------------------------------------------------------------


def default_candidates(columns: int, symmetric: bool = True) -> list[QuantScheme]:
    """Schemes that are tried where nobody names any: all bits in all groups that divide the columns.

    Below 8 bits also with a trellis, where there are no zero points.

    >>> [scheme.label for scheme in default_candidates(96)][-2:], len(default_candidates(128))
    (['w3-g32-trellis', 'w4-g32-trellis'], 21)
    """
    groups = [size for size in GROUPS if columns % size == 0]
    if not groups:  # whole rows always fit
        found = [QuantScheme(bits, symmetric=symmetric) for bits in BITS]
    else:
        found = [QuantScheme(bits, "group", size, symmetric) for bits in BITS for size in groups]
    if not symmetric:
        return found
    return found + [replace(scheme, trellis=True) for scheme in found if scheme.bits < 8]


def measured_schemes(columns: int) -> list[QuantScheme]:
    """Those whose damage is measured: what is tried by default with and without zero points, and W8."""
    found = [s for symmetric in (True, False) for s in default_candidates(columns, symmetric)]
    return list(dict.fromkeys([*found, QuantScheme(8)]))


def find_units(
    plan: Plan,
    schemes: Sequence[QuantScheme] | None = None,
    *,
    clients: tuple[str, ...] = (),
    tensor_parallel: int = 1,
    fixed: Collection[str] = frozenset(),
) -> list[Unit]:
    """What of a plan is to be allocated, and to which schemes; a plan with any of them is not refused.

    Matrices are together that the format or transformers keeps as one, or that a client does: those that
    were named, or any that reads the format. What the plan leaves in float stays so.

    Args:
        plan: in any scheme, of the format that will be written.
        schemes: to choose from, float beside them; by default `default_candidates`, symmetric if the
            plan's are.
        clients, tensor_parallel: as the plan was made with.
        fixed: source names that keep what the plan gives them. Where one is joined with others by more
            than a client that nobody named, those others get the same.
    """
    fixed = frozenset(fixed)
    free = [name for name in plan.placements if name not in fixed]
    promised = bool(clients) or tensor_parallel > 1
    judge = _Judge(plan, clients if promised else None, tensor_parallel)
    symmetric = all(plan.placements[name].scheme.symmetric for name in free)
    pinned = _pinned(plan, fixed)
    units = []
    for members in _together(plan, free, judge.facts, clients, tensor_parallel):
        names = tuple(name for name in members if name in plan.placements and name not in fixed)
        if not names:
            continue
        places = {id(p): name for name in names if (p := plan.placements[name])}.values()
        columns = math.gcd(*(plan.matrices[name].rows_columns[1] for name in places))
        wanted = default_candidates(columns, symmetric) if schemes is None else schemes
        held = [s for s in wanted if all(judge.holds(name, s) for name in places)]
        candidates: list[QuantScheme | None] = [*dict.fromkeys(held), None]
        given = [
            _scheme_of(plan, name) for name in members if name in fixed or name not in plan.placements
        ]
        candidates = given[:1] or candidates
        alike = [_alike(plan, places, scheme) for scheme in candidates]
        fitting = [
            (c, a)
            for c, a in zip(candidates, alike, strict=True)
            if all(pinned.get(kind, value) == value for kind, value in a)
        ]
        chosen, kinds = zip(*fitting, strict=True)
        units.append(Unit(names, chosen, kinds if any(kinds) else None))
    return units


class _Judge:
    """Which schemes a matrix may have.

    Args:
        plan: that it is in.
        clients: that must load it; None: nobody named any.
        tensor_parallel: devices.
    """

    def __init__(self, plan: Plan, clients: tuple[str, ...] | None, tensor_parallel: int) -> None:
        self.plan = plan
        config, head = None, None
        if clients is not None:
            model = skeleton(plan.checkpoint.config)
            config, head = text_config(model), find_head(model)
        self.facts = Facts(plan.placements, plan.floats, plan.format.name, config, head)

        @cache
        def refused(scheme: QuantScheme) -> set[str]:
            if clients is None:
                return set()
            facts = replace(
                self.facts, placements=_replaced(plan, dict.fromkeys(plan.placements, scheme))
            )
            return not_loaded(facts, clients, tensor_parallel)

        self._refused = refused

    def holds(self, name: str, scheme: QuantScheme) -> bool:
        """Whether groups divide the columns, the format holds it, and the clients load it."""
        place, matrix = self.plan.placements[name], self.plan.matrices[name]
        if matrix.kind == "embedding" and scheme.inputs is not None:
            return False
        if scheme.trellis and matrix.rows_columns[0] % CHAIN:
            return False
        try:
            scheme.groups(matrix.rows_columns[1])
        except InputError:
            return False
        if self.plan.format.refuses(replace(place, scheme=scheme), scheme) is not None:
            return False
        return name.removesuffix(".weight") not in self._refused(scheme)


def _together(
    plan: Plan, free: list[str], facts: Facts, clients: tuple[str, ...], tensor_parallel: int
) -> list[list[str]]:
    """Matrices that have one scheme; of those that are not free only what binds others."""
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for name, matrix in plan.matrices.items():
        if matrix.expert is not None:  # transformers joins them
            groups["parameter", matrix.module, matrix.parameter].append(name)
    for name, place in plan.placements.items():
        kind = plan.format.alike(name, place) if place.expert else None
        if kind is not None:
            groups["format", kind[0]].append(name)
    promised, known = bool(clients) or tensor_parallel > 1, set(free)
    lists = [
        [name for name in names if name in plan.matrices and (promised or name in known)]
        for names in joined(facts, clients, tensor_parallel)
    ]
    pairs = _names_in_names(plan, free)
    roots = {name: name for name in plan.matrices}

    def root(name: str) -> str:
        while roots[name] != name:
            roots[name] = name = roots[roots[name]]
        return name

    for names in chain(groups.values(), lists, pairs):
        for name in names[1:]:
            roots[root(name)] = root(names[0])
    found: dict[str, list[str]] = defaultdict(list)
    for name in plan.matrices:
        found[root(name)].append(name)
    return list(found.values())


def _names_in_names(plan: Plan, free: list[str]) -> list[list[str]]:
    """Pairs of which a format does not hold the second in codes and the first in float.

    It is asked only where a name is a part of another one, whatever their numbers are. Experts, of which
    there are thousands, are in float only if all are.
    """
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in free:
        if not plan.placements[name].expert:
            for module in _modules(plan, name):
                kinds[re.sub(r"\d+", "#", module)].append(name)
    found = []
    for short, long in ((a, b) for a in kinds for b in kinds if a != b and a in b):
        for name, other in product(kinds[short], kinds[long]):
            inside = [m for m in _modules(plan, name) if any(m in n for n in _modules(plan, other))]
            if name == other or not inside:
                continue
            try:
                plan.format.config({other: plan.placements[other]}, inside)
            except InputError:
                found.append([name, other])
    return found


def _modules(plan: Plan, name: str) -> set[str]:
    """What clients may call its module."""
    return {plan.placements[name].module, name.removesuffix(".weight")}


def _alike(
    plan: Plan, names: Iterable[str], scheme: QuantScheme | None
) -> frozenset[tuple[Hashable, Hashable]]:
    """What matrices have in common with others, were they in a scheme.

    Args:
        plan: that they are in.
        names: one of each kind in a unit.
        scheme: None for float.
    """
    found: set[tuple[Hashable, Hashable]] = set()
    for name in names:
        place = plan.placements[name]
        if place.expert and plan.format.name != "fewbits":
            found.add((_EXPERTS, scheme is None))
        kind = None
        if scheme is not None:
            kind = plan.format.alike(name, replace(place, scheme=scheme))
        found |= set() if kind is None else {kind}
    return frozenset(found)


def _pinned(plan: Plan, fixed: frozenset[str]) -> dict[Hashable, Hashable]:
    """What fixed matrices have, and others must have as well."""
    found: dict[Hashable, Hashable] = {}
    for name in fixed & plan.placements.keys():
        found |= dict(_alike(plan, [name], plan.placements[name].scheme))
    return found


def _scheme_of(plan: Plan, name: str) -> QuantScheme | None:
    place = plan.placements.get(name)
    return None if place is None else place.scheme


def _replaced(plan: Plan, schemes: Mapping[str, QuantScheme | None]) -> dict[str, Placement]:
    """The plan's placements in other schemes; matrices that had one have one."""
    made: dict[tuple[int, QuantScheme], Placement] = {}
    found = {}
    for name, place in plan.placements.items():
        scheme = schemes.get(name, place.scheme)
        if scheme is not None:
            key = id(place), scheme
            if key not in made:
                made[key] = replace(place, scheme=scheme)
            found[name] = made[key]
    return found


def allotted(plan: Plan, schemes: Mapping[str, QuantScheme | None]) -> Plan:
    """The plan with other schemes, of the size and the codes that `make_plan` would give it.

    Args:
        plan: of which all is quantized that has a scheme.
        schemes: by source name; None for float.
    """
    placements = _replaced(plan, schemes)
    config = dict(plan.checkpoint.config)
    if any(plan.matrices[name].head for name in placements):
        config["tie_word_embeddings"] = False
    origins = {name: origin for name, origin in plan.origins.items() if name in placements}
    left = plan.origins.keys() - origins.keys()
    matrices = {n: m for n, m in plan.matrices.items() if n not in left} if left else plan.matrices
    return replace(plan, config=config, matrices=matrices, placements=placements, origins=origins)


# -- the choice --------------------------------------------------------------------------------------


def allocate(
    units: Sequence[Unit],
    damage: Damage,
    plan: Plan,
    most_bytes: int,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Allocation:
    """The schemes of least damage with which all weight files together take at most so many bytes.

    Args:
        units: of the plan, as `find_units` gives them.
        damage: nats per token that a source tensor costs in a scheme: source name -> label -> nats.
            Float costs 0. Of more matrices than are allocated those in the plan's schemes are added.
        plan: of all that is written.
        most_bytes: of weight files.
        max_shard_bytes: of one file.

    Raises:
        InputError: the table lacks a matrix or a scheme; nothing is that small; or the model is, in
            float.
    """
    costs = [[_cost(unit, scheme, damage) for scheme in unit.candidates] for unit in units]
    file_bytes = min(plan.source_bytes, max_shard_bytes)
    sizes = [
        [bytes_together(plan, unit.names, scheme, file_bytes) for scheme in unit.candidates]
        for unit in units
    ]
    problem = _Problem(costs, sizes, units)

    weighed: dict[tuple[int, ...], int] = {}  # seconds for thousands of experts, or for a tokenizer

    def weigh(choice: Sequence[int]) -> int:
        key = tuple(choice)
        if key not in weighed:
            made = allotted(plan, _schemes(units, choice))
            weighed[key] = weight_file_bytes(made, max_shard_bytes)
        return weighed[key]

    _check_float(units, plan, most_bytes, max_shard_bytes)
    smallest = problem.smallest()
    least = weigh(smallest)
    if least > most_bytes:
        raise InputError(
            f"the budget is {_said(most_bytes, plan)}; the least that these schemes and what stays in "
            f"float take is {_said(least, plan, up=True)}"
        )
    rest = least - problem.size(smallest)  # what no unit takes
    choice, limit = _choose(problem, weigh, smallest, most_bytes, most_bytes - rest)
    schemes = _schemes(units, choice)
    kept = (name for name in plan.placements if name not in schemes)
    others = (damage.get(name, {}).get(plan.placements[name].scheme.label, 0.0) for name in kept)
    size = weigh(choice)
    return Allocation(
        schemes, math.fsum([problem.cost(choice), *others]), size, 8 * size / plan.parameters,
        problem.price(limit),
    )  # fmt: skip


def _choose(
    problem: "_Problem",
    weigh: Callable[[Sequence[int]], int],
    smallest: list[int],
    most_bytes: int,
    limit: int,
) -> tuple[list[int], int]:
    """The best choice that fits when it is weighed, and what the sum of its sizes was allowed to be."""
    best, allowed = smallest, limit
    for _ in range(_ROUNDS):
        choice = problem.solve(limit)
        if choice is None:
            break
        left = most_bytes - weigh(choice)
        if left >= 0 and problem.cost(choice) <= problem.cost(best):
            best, allowed = choice, limit
        again = problem.size(choice) + left
        if left >= 0 and again <= limit:
            break
        limit = again
    return best, allowed


def _schemes(units: Sequence[Unit], choice: Sequence[int]) -> dict[str, QuantScheme | None]:
    return {
        name: unit.candidates[i] for unit, i in zip(units, choice, strict=True) for name in unit.names
    }


def _check_float(units: Sequence[Unit], plan: Plan, most_bytes: int, max_shard_bytes: int) -> None:
    """A model that fits as it is needs no codes."""
    free = [name for unit in units for name in unit.names if None in unit.candidates]
    if len(free) < len(plan.placements):
        return
    whole = weight_file_bytes(allotted(plan, dict.fromkeys(free)), max_shard_bytes)
    if whole <= most_bytes:
        raise InputError(
            f"the budget is {_said(most_bytes, plan)}, and in float the model takes "
            f"{_said(whole, plan, up=True)}: nothing to quantize; accepted are smaller budgets"
        )


def _said(count: int, plan: Plan, up: bool = False) -> str:
    """A number of bytes in GB and in bits per weight; what is least, rounded so that it would do.

    Small ones in more digits.
    """
    digits = max(3, 3 - math.floor(math.log10(max(count, 1) / 1e9)))
    unit, bits = 10**digits, 8 * count / plan.parameters
    gigabytes = math.ceil(count / 1e9 * unit) / unit if up else count / 1e9
    bits = math.ceil(bits * 1000) / 1000 if up else bits
    return f"{gigabytes:.{digits}f} GB ({bits:.3f} bits per weight)"


def _cost(unit: Unit, scheme: QuantScheme | None, damage: Damage) -> float:
    """Of all matrices of a unit."""
    if scheme is None:
        return 0.0
    label = scheme.label
    found = []
    for name in unit.names:
        nats = damage.get(name, {}).get(label, math.nan)
        if not math.isfinite(nats):
            known = ", ".join(damage.get(name, {})) or "none"
            raise InputError(
                f"the damage table has no number for {name} in {label}, but for {known}; accepted are "
                f"numbers for {', '.join(s.label for s in unit.candidates if s is not None)}"
            )
        found.append(nats)
    return math.fsum(found)


class _Problem:
    """One choice per unit, of least cost, of a size in all.

    Args:
        costs, sizes: of each candidate of each unit.
        units: for what they have in common.
    """

    def __init__(self, costs: list[list[float]], sizes: list[list[int]], units: Sequence[Unit]) -> None:
        self.costs, self.sizes = costs, sizes
        self._starts = [0]
        for row in costs:
            self._starts.append(self._starts[-1] + len(row))
        common: dict[Hashable, dict[Hashable, list[int]]] = defaultdict(lambda: defaultdict(list))
        having: dict[Hashable, set[int]] = defaultdict(set)
        for start, unit in zip(self._starts, units, strict=False):
            for i, kinds in enumerate(unit.alike or ()):
                for kind, value in kinds:
                    common[kind][value].append(start + i)
                    having[kind].add(start)
        self._common = [list(v.values()) for kind, v in common.items() if len(having[kind]) > 1]

    def cost(self, choice: Sequence[int]) -> float:
        """Of a choice."""
        return math.fsum(row[i] for row, i in zip(self.costs, choice, strict=True))

    def size(self, choice: Sequence[int]) -> int:
        """Of a choice."""
        return sum(row[i] for row, i in zip(self.sizes, choice, strict=True))

    def smallest(self) -> list[int]:
        """The choice of least size."""
        first = [row.index(min(row)) for row in self.sizes]
        if not self._common:
            return first
        above = [[float(size - min(row)) for size in row] for row in self.sizes]
        found = self._exactly(above, None)
        assert found is not None, "without a limit there is a choice"
        return found

    def solve(self, most: int) -> list[int] | None:
        """The choice of least cost whose size is at most that; None if there is none."""
        above = [[cost - min(row) for cost in row] for row in self.costs]
        limit, least = most, sum(map(min, self.sizes))
        while limit >= least:
            found = self._exactly(above, limit)
            if found is None or self.size(found) <= most:
                return found
            limit -= self.size(found) - most  # what the solver takes for whole is whole to 1e-6
        return None

    def _exactly(self, above: list[list[float]], most: int | None) -> list[int] | None:
        """The choice of least sum of what costs are above the least of their unit.

        The solver tells sums apart that differ by 1e-6 of its own numbers. Whatever costs more than a
        whole choice is in no better one: it is left out, and the rest is put to a finer scale.
        """
        largest = max(chain.from_iterable(above), default=0.0)
        while True:
            scale = _SCALE / largest if largest > _NOTHING else 0.0
            scaled = [[cost * scale if cost <= largest else None for cost in row] for row in above]
            choice = self._milp(scaled, most, _ROUGHLY)
            if choice is None or not scale:
                return choice
            total = math.fsum(row[i] for row, i in zip(above, choice, strict=True))
            if total * _COARSE > largest:
                break
            largest = total
        scale = _SCALE / total
        scaled = [[cost * scale if cost <= total else None for cost in row] for row in above]
        return self._milp(scaled, most, 0.0)

    def price(self, most: int) -> float:
        """By how much the least cost falls with one more byte, were parts of candidates chosen too."""
        import numpy as np
        from scipy.optimize import linprog

        costs = np.array([cost - min(row) for row in self.costs for cost in row])
        equal, equals, below, limits, per_byte = self._constraints(most)
        costs = np.concatenate([costs, np.zeros(equal.shape[1] - len(costs))])
        price, scale = 0.0, 1 / max(float(costs.max()), _NOTHING)
        for _ in range(2):  # the second time by the costs that decide: the solver tells 1e-7 from 0
            found = linprog(costs * scale, below, limits, equal, equals, bounds=(0, 1), method="highs")
            assert found.status == 0, found.message
            price = max(0.0, -float(found.ineqlin.marginals[0]) / scale * per_byte)
            scale /= max(float(found.fun), 1e-12)  # 0 where all is saved
        return price

    def _milp(self, costs: list[list[float | None]], most: int | None, gap: float) -> list[int] | None:
        """The solver's choice; candidates without a cost are left out."""
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp

        equal, equals, below, limits, _ = self._constraints(most)
        flat = [cost for row in costs for cost in row]
        count = equal.shape[1]
        objective, upper = np.zeros(count), np.ones(count)
        objective[: len(flat)] = [0.0 if cost is None else cost for cost in flat]
        upper[: len(flat)] = [0.0 if cost is None else 1.0 for cost in flat]
        rows = [LinearConstraint(equal, equals, equals), LinearConstraint(below, ub=limits)]
        with _silent():
            found = milp(
                objective, integrality=np.ones(count), bounds=Bounds(0.0, upper), constraints=rows,
                options={"mip_rel_gap": gap},
            )  # fmt: skip
        if found.status == 2:  # infeasible
            return None
        assert found.x is not None, found.message
        ends = zip(self._starts, self._starts[1:], strict=False)
        return [int(np.argmax(found.x[start:end])) for start, end in ends]

    def _constraints(self, most: int | None) -> tuple[Any, Any, Any, Any, float]:
        """One candidate of each unit, one value of what is common; the size; what a byte is in it.

        The size comes first of what is at most something; it is 0 if nothing is asked of it.
        """
        import numpy as np
        from scipy.sparse import coo_array

        rows: list[int] = []  # of ones
        columns: list[int] = []
        for i, (start, end) in enumerate(zip(self._starts, self._starts[1:], strict=False)):
            rows += [i] * (end - start)
            columns += range(start, end)
        count, equalities = self._starts[-1], len(self._starts) - 1
        least = [min(row) for row in self.sizes]
        room = 0 if most is None else most - sum(least)
        per_byte = 0.0 if most is None else _ROOM / max(room, 1)
        above = [(s - low) * per_byte for row, low in zip(self.sizes, least, strict=True) for s in row]
        under = [(0, i, value) for i, value in enumerate(above) if value]
        limits = [room * per_byte]
        for values in self._common:
            for members in values:
                rows.append(equalities)
                columns.append(count)
                for member in members:  # none of them unless their value is the one
                    under += [(len(limits), member, 1.0), (len(limits), count, -1.0)]
                    limits.append(0.0)
                count += 1
            equalities += 1
        equal = coo_array((np.ones(len(rows)), (rows, columns)), (equalities, count)).tocsr()
        place = [entry[0] for entry in under], [entry[1] for entry in under]
        data = [entry[2] for entry in under]
        below = coo_array((data, place), (len(limits), count)).tocsr()
        return equal, np.ones(equalities), below, np.array(limits), per_byte


@contextmanager
def _silent() -> Iterator[None]:
    """Without what HiGHS prints now and then, past Python, where `--json` may be printed."""
    library = ctypes.CDLL(None)
    sys.stdout.flush()
    library.fflush(None)
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        library.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
