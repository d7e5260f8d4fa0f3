"""The best model that fits: schemes chosen by what rounding each matrix was measured to cost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fewbits.allocate import Allocation, Unit, allocate, default_candidates, find_units
from fewbits.checkpoint import open_checkpoint
from fewbits.errors import InputError
from fewbits.ledger import Ledger
from fewbits.plan import Plan, Survey, make_plan, survey
from fewbits.recipe import Recipe
from fewbits.scheme import QuantScheme
from fewbits.sizes import weight_file_bytes

# Below what 3 bits need, 2 are tried too. What they cost is beyond what gradients at the float model can
# tell: measured alone, matrices in 2 bits lost up to 4.8 times the prediction, in 3 and 4 bits 1 to 1.7
# times (babyllama105, 2026-11-26).
_MORE_BITS = (3, 4, 8)
# In which a plan is made that says what may be quantized: the first that format and model hold.
_TRIED = ("w8-g32", "w8-channel", "w4-g128", "w4-g32", "w4-g128-asym", "w4-g32-asym")
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
        if self.bits_per_weight is not None and not 0 < self.bits_per_weight < math.inf:
            raise InputError(f"bits per weight are {self.bits_per_weight}; accepted are numbers above 0")
        if self.memory is not None and self.memory < 1:
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
    damage: dict[str, dict[str, float]],
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
        damage: see `allocate`.
        format, clients, tensor_parallel, max_shard_bytes: as for `quantize`.

    Raises:
        InputError: nothing is that small, or the model fits as it is.
    """
    seen = survey(open_checkpoint(source))
    most = _most_bytes(seen, recipe, size, format, clients, tensor_parallel, max_shard_bytes)
    plan = _widest(seen, recipe, format, clients, tensor_parallel)
    fixed = recipe.caught(plan.matrices.values())

    def choose(schemes: Sequence[QuantScheme] | None) -> Allocation:
        units: list[Unit] = find_units(
            plan, schemes, clients=clients, tensor_parallel=tensor_parallel, fixed=fixed
        )
        return allocate(units, damage, plan, most, max_shard_bytes=max_shard_bytes)

    try:
        found = choose(_without_two_bits(plan))
    except InputError:  # too small for it, or a format that holds other bits only
        found = choose(None)
    budget = size.asked | {
        "predicted": found.damage,
        "price": found.price,
        "weight_bytes": found.weight_bytes,
    }
    return Fitted(_recipe(recipe, plan, found), plan.format.name, budget)


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
    wide = replace(recipe, head=True, embeddings=recipe.embeddings or holds)
    schemes = dict.fromkeys([recipe.scheme, *map(QuantScheme.parse, _TRIED)])
    refused: InputError | None = None
    for scheme in schemes:
        try:
            return make_plan(seen, replace(wide, scheme=scheme), format, clients, tensor_parallel)
        except InputError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _without_two_bits(plan: Plan) -> list[QuantScheme]:
    columns = {plan.matrices[name].rows_columns[1] for name in plan.placements}
    kinds = {plan.placements[name].scheme.symmetric for name in plan.placements}
    found = [s for n in sorted(columns) for kind in kinds for s in default_candidates(n, kind)]
    return [scheme for scheme in dict.fromkeys(found) if scheme.bits in _MORE_BITS]


def _recipe(recipe: Recipe, plan: Plan, found: Allocation) -> Recipe:
    """The recipe in which each matrix has what was chosen."""
    quantized = {name for name, scheme in found.schemes.items() if scheme is not None}
    kept = quantized | (plan.placements.keys() - found.schemes.keys())
    head = any(plan.matrices[name].head for name in kept)
    embeddings = any(plan.matrices[name].kind == "embedding" for name in kept)
    # A head that is made from a tied embedding is there only where it is quantized.
    schemes = {n: s for n, s in found.schemes.items() if s is not None or n not in plan.origins}
    return replace(recipe, allocation=schemes, head=head, embeddings=embeddings)
