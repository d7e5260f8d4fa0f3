"""The best model that fits: schemes chosen by what rounding each matrix was measured to cost."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fewbits.allocate import Allocation, Unit, allocate, find_units
from fewbits.checkpoint import open_checkpoint
from fewbits.errors import InputError
from fewbits.ledger import Ledger
from fewbits.plan import Plan, Survey, make_plan, survey
from fewbits.recipe import Recipe
from fewbits.scheme import QuantScheme
from fewbits.sizes import weight_file_bytes

# What 2 bits cost is beyond what gradients at the float model can tell: measured alone, integers of 2
# bits lost up to 4.8 times the prediction, of 3 and 4 up to 2.3. So they are tried below what 3 bits
# need, and trellises, which lose less, everywhere, at a higher price (babyllama105, 2026-11-26: LOG.md).
_MORE_BITS = (3, 4, 8)
_TWO_BITS = 2.0  # times what 2 bits are predicted to cost
# In which a plan is made that says what may be quantized: the first that format and model hold.
_TRIED = ("w8-g32", "w8-channel", "w4-g128", "w4-g32", "w4-g128-asym", "w4-g32-asym")
_MOST_BITS = 64  # of a weight: of the widest floats
_HOLD_EMBEDDINGS = ("fewbits", "gguf")


@dataclass(frozen=True, slots=True)
class Size:
    """How large the weight files may be, all together; neither: as with the recipe's own scheme.

    Raises:
        InputError: both, or a number that is none.
    """

    bits_per_weight: float | None = None
    memory: int | None = None  # bytes

    def __post_init__(self) -> None:
        if self.bits_per_weight is not None and self.memory is not None:
            raise InputError("bits per weight and memory are both given; accepted is one of them")
        if self.bits_per_weight is not None and not 0 < self.bits_per_weight <= _MOST_BITS:
            raise InputError(
                f"bits per weight are {self.bits_per_weight}; accepted are numbers above 0, at most "
                f"{_MOST_BITS}"
            )
        if self.memory is not None and not 1 <= self.memory < math.inf:
            raise InputError(f"memory is {self.memory} bytes; accepted are numbers from 1")

    @property
    def asked(self) -> dict[str, Any]:
        """As in the request."""
        if self.memory is not None:
            return {"memory_bytes": self.memory}
        return {} if self.bits_per_weight is None else {"bits_per_weight": self.bits_per_weight}


@dataclass(frozen=True, slots=True)
class Fitted:
    """A recipe whose schemes were chosen, for which format, and what is said of it in the request."""

    recipe: Recipe
    format: str
    budget: dict[str, Any]


def fit(
    source: Path,
    recipe: Recipe,
    size: Size,
    damage: dict[str, dict[str, float]] | None,
    *,
    format: str | None,
    clients: tuple[str, ...],
    tensor_parallel: int,
    max_shard_bytes: int,
) -> Fitted:
    """Choose the scheme of each matrix such that the predicted KL is least.

    The output head may be chosen too, and the embedding where the recipe asks for it or the format that
    was named holds it. What an override speaks of keeps what it says.

    Args:
        source: folder of the float checkpoint.
        recipe: without an allocation.
        size: of the weight files, at most.
        damage: see `allocate`; None: it is not known yet, and only asked whether anything fits.
        format, clients, tensor_parallel, max_shard_bytes: as for `quantize`.

    Raises:
        InputError: nothing is that small, or the model fits as it is.
    """
    seen = survey(open_checkpoint(source))
    most = _most_bytes(seen, recipe, size, format, clients, tensor_parallel, max_shard_bytes)
    plan = _widest(seen, recipe, format, clients, tensor_parallel)
    fixed = recipe.caught(plan.matrices.values())
    units = find_units(plan, clients=clients, tensor_parallel=tensor_parallel, fixed=fixed)
    strange = set(find_unmeasured(plan))
    units = [_in_float(unit) if strange.intersection(unit.names) else unit for unit in units]

    def choose(units: list[Unit]) -> Allocation:
        known = _nothing(units) if damage is None else _dearer(damage)
        return allocate(units, known, plan, most, max_shard_bytes=max_shard_bytes)

    try:
        found = choose([_without_two_bits(unit) for unit in units])
    except InputError:  # too small for it: this one says what is the least
        found = choose(units)
    budget = size.asked | {
        "predicted": found.damage,
        "price": found.price,
        "weight_bytes": found.weight_bytes,
    }
    return Fitted(_recipe(recipe, plan, found), plan.format.name, budget)


def find_unmeasured(plan: Plan) -> list[str]:
    """Matrices of which nobody knows what rounding them costs: outside of blocks, like projections."""
    return [
        name
        for name, matrix in plan.matrices.items()
        if matrix.block is None and not matrix.head and matrix.kind != "embedding"
    ]


def find_format(
    source: Path, recipe: Recipe, format: str | None, clients: tuple[str, ...], tensor_parallel: int
) -> str:
    """Name of the format in which `fit` would have the files."""
    seen = survey(open_checkpoint(source))
    return _widest(seen, recipe, format, clients, tensor_parallel).format.name


def fitted_before(recipe: Recipe, size: Size, ledger: Ledger) -> Fitted | None:
    """What a finished run chose that was asked for the same size; None if it was not."""
    request = ledger.request
    budget, labels = request.get("budget"), request.get("allocation")
    if not isinstance(budget, dict) or not isinstance(labels, dict):
        return None
    keys = ("memory_bytes", "bits_per_weight")
    if {key: budget[key] for key in keys if key in budget} != size.asked:
        return None
    schemes = {
        name: None if label == "float" else QuantScheme.parse(label)
        for label, names in labels.items()
        for name in names
    }
    head, embeddings = request.get("head"), request.get("embeddings", False)
    chosen = replace(recipe, allocation=schemes, head=bool(head), embeddings=bool(embeddings))
    return Fitted(chosen, request["format"], budget)


def _most_bytes(
    seen: Survey,
    recipe: Recipe,
    size: Size,
    format: str | None,
    clients: tuple[str, ...],
    tensor_parallel: int,
    max_shard_bytes: int,
) -> int:
    if size.memory is not None:
        return size.memory
    if size.bits_per_weight is None:
        plan = make_plan(seen, recipe, format, clients, tensor_parallel)
        return weight_file_bytes(plan, max_shard_bytes)
    counts = (i.count for i in seen.checkpoint.tensors.values() if i.dtype.is_floating_point)
    return math.floor(size.bits_per_weight * sum(counts) / 8)


def _widest(
    seen: Survey,
    recipe: Recipe,
    format: str | None,
    clients: tuple[str, ...],
    tensor_parallel: int,
) -> Plan:
    """A plan that quantizes all that may be chosen, in some scheme."""
    holds = format in _HOLD_EMBEDDINGS and any(m.kind == "embedding" for m in seen.matrices.values())
    wide = replace(recipe, embeddings=recipe.embeddings or holds)
    tried = [recipe.scheme, *map(QuantScheme.parse, _TRIED)]
    schemes = [s for s in dict.fromkeys(tried) if recipe.scheme.symmetric or not s.symmetric]
    refused: list[InputError] = []
    for head in dict.fromkeys((True, recipe.head)):  # some formats hold none
        for scheme in schemes:
            try:
                made = replace(wide, scheme=scheme, head=head)
                return make_plan(seen, made, format, clients, tensor_parallel)
            except InputError as error:
                refused.append(error)
    raise min(refused, key=lambda error: len(str(error)))  # with the fewest reasons


def _in_float(unit: Unit) -> Unit:
    """Stays so, if it may."""
    kept = [i for i, scheme in enumerate(unit.candidates) if scheme is None]
    return _with_candidates(unit, kept) if kept else unit


def _with_candidates(unit: Unit, kept: list[int]) -> Unit:
    alike = None if unit.alike is None else tuple(unit.alike[i] for i in kept)
    return replace(unit, candidates=tuple(unit.candidates[i] for i in kept), alike=alike)


def _without_two_bits(unit: Unit) -> Unit:
    """With the candidates of more bits, if there are any but float."""
    kept = [i for i, s in enumerate(unit.candidates) if s is None or s.trellis or s.bits in _MORE_BITS]
    if all(unit.candidates[i] is None for i in kept):
        return unit
    return _with_candidates(unit, kept)


def _dearer(damage: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """What 2 bits are predicted to cost is too little."""
    two = {label for nats in damage.values() for label in nats if QuantScheme.parse(label).bits == 2}
    return {
        name: {label: cost * (_TWO_BITS if label in two else 1) for label, cost in nats.items()}
        for name, nats in damage.items()
    }


def _nothing(units: list[Unit]) -> dict[str, dict[str, float]]:
    """Damage of none."""
    return {
        name: {scheme.label: 0.0 for scheme in unit.candidates if scheme is not None}
        for unit in units
        for name in unit.names
    }


def _recipe(recipe: Recipe, plan: Plan, found: Allocation) -> Recipe:
    """The recipe in which each matrix has what was chosen."""
    quantized = {name for name, scheme in found.schemes.items() if scheme is not None}
    kept = quantized | (plan.placements.keys() - found.schemes.keys())
    head = any(plan.matrices[name].head for name in kept)
    embeddings = any(plan.matrices[name].kind == "embedding" for name in kept)
    # A head that is made from a tied embedding is there only where it is quantized.
    schemes = {n: s for n, s in found.schemes.items() if s is not None or n not in plan.origins}
    return replace(recipe, allocation=schemes, head=head, embeddings=embeddings)
