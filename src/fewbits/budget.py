"""How much memory a run takes at most, and how it is divided so that it stays below a budget.

Counted is anonymous memory, which the system cannot take back: not the pages of mapped files, which
source tensors and hidden states are. Only what is as large as a matrix is counted.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from fewbits.blockwise import KL_COPIES, Limits, held_out_samples, judged_positions
from fewbits.errors import InputError
from fewbits.learning import STEP_TOKENS
from fewbits.plan import Plan
from fewbits.recipe import Recipe
from fewbits.statistics import panel_values
from fewbits.stream import TOKENS, fast_dtype
from fewbits.structure import skeleton, text_config

# Python, torch, transformers, and what they load on the way. A process that has more counts with that.
# Fixed, so that equal commands divide their work alike. Measured 2026-11-25: 440 to 560 MB.
LIBRARIES_BYTES = 600 * 10**6
# Of one matrix that is rounded to nearest, packed and read back: float32, quotients, codes, words.
_ROUNDED = 12
_COPIES = 4  # of the columns of a matrix that GPTQ holds, at most
# Of each value before and behind the matrices of a block: itself, and its gradient or what lies between.
_PULLED = 2
_LEARNED_COPIES = 7  # of a matrix, at most, while its offsets are moved
_SPARE = 20  # one part in so many comes on top: pieces that malloc keeps; not tuned


@dataclass(frozen=True, slots=True)
class Budget:
    """What a run is expected to take.

    Args:
        limits: how much is done at a time.
        peak_bytes: at most, libraries included; an estimate from above.
    """

    limits: Limits
    peak_bytes: int


def plan_memory(
    plan: Plan,
    recipe: Recipe,
    shape: tuple[int, int] | None,
    used: int,
    most: int | None,
    kept: int = 0,
) -> Budget:
    """Divide the work.

    Args:
        plan, recipe: of the run.
        shape: samples and length of calibration; None without it.
        used: bytes that the process takes already.
        most: bytes that it may take; None: as fast as it can.
        kept: tokens whose gradients are taken back through all blocks.

    Raises:
        InputError: that cannot be done; says the least that would do.
    """
    base = max(LIBRARIES_BYTES, used)
    if shape is None:
        least = _with_spare(base + _uncalibrated(plan))
        _check(most, least)
        return Budget(Limits(), least)
    needs_hessian = "hessian" in recipe.method.needs
    every, largest, _ = _hessians(plan) if needs_hessian else (0, 0, 0)
    whole, least = (
        base
        + max(_calibrated(plan, recipe, shape, tokens, needs_hessian), _back(plan, kept, tokens, shape))
        for tokens in (TOKENS, shape[1])
    )
    if most is None:
        return Budget(Limits(), _with_spare(whole + every))
    _check(most, _with_spare(least + largest))
    room = _without_spare(most)
    if whole + every <= room:
        return Budget(Limits(TOKENS, room - whole), _with_spare(whole + every))
    tokens, rest = (TOKENS, whole) if whole + largest <= room else (shape[1], least)
    return Budget(Limits(tokens, room - rest), min(most, _with_spare(rest + every)))


def _with_spare(size: int) -> int:
    return size + size // _SPARE


def _without_spare(size: int) -> int:
    """The most that stays within a size with what comes on top."""
    return (_SPARE * (size + 1) - 1) // (_SPARE + 1)


def _check(most: int | None, least: int) -> None:
    if most is not None and least > most:
        text = math.ceil(least / 1e8) / 10
        raise InputError(
            f"--max-memory is {most / 1e9:.2f} GB, and this run takes up to {text:.1f} GB when it is "
            f"divided as far as it can be; accepted is {text:.1f}GB or more"
        )


# -- what a stage takes, in bytes: `cost` has its numbers as expected, this file from above -------------


def running_bytes(tokens: int, widest: int) -> int:
    """Of a block that is run: four float32 of the widest states are alive at a time."""
    return 4 * 4 * tokens * widest


def collecting_bytes(block: int, fast: int, running: int) -> int:
    """A block in float32 and in the fast dtype, of so many bytes a value, while it is run."""
    return (4 + fast) * block + running


def parts_bytes(widths: Iterable[int]) -> int:
    """What sums of one part and of those before it take more than the Hessians that come of them."""
    return sum(4 * (2 * panel_values(n) - n * n) for n in widths)


def matrix_bytes(matrix: int, tensor: int) -> int:
    """A matrix that is rounded to nearest, and codes and words of all in its tensor, as of experts."""
    return _ROUNDED * matrix + 2 * tensor


def rounding_bytes(block: int, beside: int) -> int:
    """A block in float32 and its codes, and what the matrix in hand takes beside them."""
    return (4 + 1) * block + beside


def factor_bytes(columns: int, rows: int, copies: int) -> int:
    """A Hessian's factor beside what it is made from; or beside so many copies of the matrix."""
    return 4 * columns * max(2 * columns, columns + copies * rows)


def drift_bytes(columns: int) -> int:
    """How an input drifted: the sum of one part, and that of those before it."""
    return 2 * 4 * columns**2


def correcting_bytes(columns: int, rows: int) -> int:
    """Drift, a Hessian that is damped and its factor; or drift, factor and copies of the matrix."""
    return 4 * columns * max(3 * columns, 2 * columns + 4 * rows)


def learning_bytes(block: int, matrix: int, pulled: int) -> int:
    """A block whose rounding is learned, beside what lies between its matrices.

    In float32 as it is run, as it was, offsets and gradients; first, best and new codes; one
    matrix as it is rounded.
    """
    return (4 * 4 + 3) * block + 4 * _LEARNED_COPIES * matrix + pulled


def fast_bytes(plan: Plan) -> int:
    """Of a value in the dtype that samples are run in; 0 where that is float32."""
    return 2 if fast_dtype(plan.checkpoint.dtype) is not None else 0


def _uncalibrated(plan: Plan) -> int:
    """One tensor is rounded, packed and written at a time; all experts of a stack together."""
    sizes = [_elements(plan, name) for name in plan.placements]
    return max((matrix_bytes(*size) for size in sizes), default=0)


def _elements(plan: Plan, name: str) -> tuple[int, int]:
    """Of one matrix of a source tensor, and of all of it."""
    matrix = plan.matrices[name]
    rows, columns = matrix.rows_columns
    return rows * columns, rows * columns * (matrix.shape[0] if matrix.stacked else 1)


def _hessians(plan: Plan) -> tuple[int, int, int]:
    """Bytes of all Hessians of the block that has most; of the largest; on top while they are summed."""
    widths = input_widths(plan).values()
    totals = (sum(4 * n * n for n in found) for found in widths)
    widest = max((n for found in widths for n in found), default=0)
    return max(totals, default=0), 4 * widest**2, max(map(parts_bytes, widths), default=0)


def input_widths(plan: Plan) -> dict[int, list[int]]:
    """Features of the tensors that the matrices of each block read, from above.

    Which linears read one tensor is not known yet: of those of one parent with equally many columns, the
    last is taken to read another than the rest.
    """
    found: dict[int, dict[tuple[str, int], int]] = defaultdict(lambda: defaultdict(int))
    for name in plan.placements:
        matrix = plan.matrices[name]
        if matrix.block is None:
            continue
        columns = matrix.rows_columns[1]
        parent = matrix.module.rpartition(".")[0]
        for i in range(matrix.shape[0] if matrix.stacked else 1):
            expert = matrix.kind == "expert"
            owner = f"{matrix.module}.{i if matrix.expert is None else matrix.expert}"
            found[matrix.block][owner if expert else parent, columns] += 0 if expert else 1
    return {
        number: [n for (_, n), linears in groups.items() for _ in range(2 if linears > 1 else 1)]
        for number, groups in found.items()
    }


def _calibrated(plan: Plan, recipe: Recipe, shape: tuple[int, int], tokens: int, hessians: bool) -> int:
    """All but libraries and the Hessians that are kept: the stage of a block that takes most."""
    samples, length = shape
    elements: dict[int, int] = defaultdict(int)
    for name, number in plan.blocks.items():
        elements[number] += plan.info(name).count
    block = max(elements.values(), default=0)
    shapes = [
        plan.matrices[n].rows_columns for n in plan.placements if plan.matrices[n].block is not None
    ]
    rows, columns = (max((s[i] for s in shapes), default=0) for i in (0, 1))
    matrix = max(map(math.prod, shapes), default=0)
    experts = any(plan.matrices[n].kind == "expert" for n in plan.placements)
    held = held_out_samples(samples, length) * length
    running = running_bytes(max(tokens, length), max(rows, columns, plan.hidden_size))
    kept = 4 * 4 * held * plan.hidden_size  # states that are compared: float, wanted, got, and a sum
    summed = _hessians(plan)[2] if hessians else 0
    if recipe.corrected:  # weights that are rounded, beside the others; inputs as they were
        summed += drift_bytes(columns) + (fast_bytes(plan) or 4) * block + running // 4
    beside = _rounding(plan, recipe.corrected) if hessians else matrix_bytes(matrix, 0)
    stages = [
        (4 + (2 if experts else 0)) * block,  # load: experts are joined first
        collecting_bytes(block, fast_bytes(plan), running) + summed,
        rounding_bytes(block, beside),
        4 * block + KL_COPIES * 4 * judged_positions(samples, length) * _vocabulary(plan),
    ]
    if recipe.learned is not None:
        stages.append(_learning(plan, block, matrix, max(STEP_TOKENS, length)))
        looked_up = [n for n in plan.placements if plan.matrices[n].kind == "embedding"]
        codes = sum(plan.info(plan.origins.get(n, n)).count for n in looked_up)
        stages.append(5 * codes + running)  # and the floats that they stand for, of 4 bytes at most
    if recipe.transforms:  # all that read one tensor are tried together
        together = block if experts else 2 * matrix
        stages.append(4 * block + running + 4 * together + matrix_bytes(matrix, 0))
    return max(max(stages) + kept, _uncalibrated(plan))


def _back(plan: Plan, kept: int, tokens: int, shape: tuple[int, int]) -> int:
    """Taking gradients through the block that takes most; the Hessians that are kept come on top."""
    if not kept:
        return 0
    elements: dict[int, int] = defaultdict(int)
    for name, number in plan.blocks.items():
        elements[number] += plan.info(name).count
    values = _pulled_values(plan, min(kept, max(tokens, shape[1])))
    states = (2 + 4) * kept * plan.hidden_size  # and gradients, at the first block
    return 4 * max(elements.values(), default=0) + states + values


def _learning(plan: Plan, block: int, matrix: int, tokens: int) -> int:
    """A block whose rounding is learned: what it has of each weight, and gradients through all of it."""
    fisher = 2 * 4 * plan.hidden_size**2
    return learning_bytes(block, matrix, _pulled_values(plan, tokens)) + fisher


def _pulled_values(plan: Plan, tokens: int) -> int:
    """Bytes of what so many tokens have before and behind the matrices of a block, with gradients."""
    ends: dict[int, float] = defaultdict(float)  # features that a token has before and behind matrices
    share = _chosen_share(plan)
    for matrix in plan.matrices.values():
        if matrix.block is not None:
            count = matrix.shape[0] if matrix.stacked else 1
            ends[matrix.block] += sum(matrix.rows_columns) * (
                count * share if matrix.kind == "expert" else 1
            )
    return math.ceil(4 * _PULLED * max(ends.values(), default=0) * tokens)


def _chosen_share(plan: Plan) -> float:
    """Of the experts of a block, those that a token is sent to; all where that is not told."""
    experts = [m for m in plan.matrices.values() if m.kind == "expert"]
    count = max((m.shape[0] if m.stacked else (m.expert or 0) + 1 for m in experts), default=1)
    config = text_config(skeleton(plan.checkpoint.config)) if experts else None
    chosen = getattr(config, "num_experts_per_tok", None)
    return min(1.0, chosen / count) if isinstance(chosen, int) else 1.0


def _rounding(plan: Plan, corrected: bool) -> int:
    """Beside block, codes and Hessians: a factor and what it is made from, or a factor and columns.

    Matrices that read one tensor are rounded as one: here those of one parent, with as many columns.
    """
    together: dict[tuple[str, int | None, int], int] = defaultdict(int)
    for name in plan.placements:
        matrix = plan.matrices[name]
        if matrix.block is not None:
            key = matrix.module if matrix.kind == "expert" else matrix.module.rpartition(".")[0]
            height, columns = matrix.rows_columns
            together[key, matrix.expert, columns] += height
    shapes = [(n, rows) for (_, _, n), rows in together.items()]
    sizes = [factor_bytes(n, rows, _COPIES + corrected) for n, rows in shapes]
    sizes += [correcting_bytes(n, rows) for n, rows in shapes if corrected]
    return max(sizes, default=0)


def _vocabulary(plan: Plan) -> int:
    """Rows of the largest matrix outside of the blocks: embeddings, or the head."""
    shapes = (info.shape for n, info in plan.checkpoint.tensors.items() if n not in plan.blocks)
    return max((shape[0] for shape in shapes if len(shape) == 2), default=0)
