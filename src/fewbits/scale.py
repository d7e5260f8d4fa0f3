"""What one of many ranks does of a run: seconds, memory and traffic, from headers. See docs/scale.md.

Every term is that of one process (`cost`), times the share that the slowest rank has of it. What all
ranks do alike, or rank 0 alone, is not divided: it bounds how many are of use.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace
from itertools import chain, repeat

from fewbits.blockwise import held_out_samples, rounding_cost, searched_samples
from fewbits.cost import Hessians, Rates, Work, estimate_cost
from fewbits.errors import InputError
from fewbits.forecast import Choice, Cost, Tensors
from fewbits.formats import Format
from fewbits.learning import learned_samples
from fewbits.ranks import share_out
from fewbits.statistics import PARTS, panel_values
from fewbits.stream import TOKENS

# Between ranks, bytes per second: 10 Gbit Ethernet. An assumption; faster networks change little.
NETWORK_BYTES_S = 1.25e9
_EXCHANGE_S = 3e-4  # of one exchange, whatever its size; measured on one machine, 2026-11-26
_HELD_BYTES = 4  # of a held-out state that is passed on: float32
_STATE_BYTES = 2  # of others: bfloat16
_SCALE_BYTES = 3  # of a group: scale and zero point
# Which parts of a run are divided, and by what; all others are not.
_BY_PARTS = ("collecting", "going on", "hessians")
_BY_OWNER = ("rounding", "errors")
_BY_NAMES = ("packing", "writing", "hashing")
_JOURNAL = 0.5  # of the bytes that are hashed and written, those of the journal; the rest rank 0 handles
# An H100 SXM: rates of its data sheet (bfloat16 9.9e14 FLOP/s, float32 6.7e13 FLOP/s, 3.35e12 bytes/s)
# at 40 %, 60 % and 70 % of them, and 10 microseconds for each of ten kernels of a column. Not measured.
_GPU = {
    "multiply_fast": 5e-15, "multiply": 5e-14, "hessian": 5e-14, "cholesky": 1.5e-13,
    "attend_fast": 5e-15, "attend": 5e-14, "stream": 3.4e-12, "search": 2e-10, "search_blocks": 4e-10,
    "round": 4e-11, "column": 1e-4, "column_row": 3e-11,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that do a run together.

    Args:
        nodes: machines.
        gpus: of each; 0: one rank a machine, on its processor.

    Raises:
        InputError: numbers that are none.
    """

    nodes: int = 1
    gpus: int = 0

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.gpus < 0:
            raise InputError(
                f"--nodes {self.nodes} --gpus {self.gpus}; accepted are 1 or more nodes, 0 or more GPUs"
            )

    @property
    def count(self) -> int:
        """Of ranks."""
        return self.nodes * max(1, self.gpus)

    def rates(self, rates: Rates) -> Rates:
        """Of a rank: those of this machine, or with a GPU those assumed of it for what runs there."""
        return replace(rates, **_GPU) if self.gpus else rates  # type: ignore[arg-type]


def estimate_share(
    choice: Choice,
    groups: Counter[Tensors],
    work: Work,
    rates: Rates,
    layout: Format,
    group: Group,
) -> Cost:
    """Seconds, memory and traffic of the slowest rank."""
    rates, count = group.rates(rates), group.count
    if count == 1:
        return estimate_cost(choice, groups, work, rates, layout)
    hessian = choice.method not in ("llm-int8", "rtn")
    held = held_hessians(choice, work, count) if hessian else None
    alone = estimate_cost(choice, groups, work, rates, layout, held)
    parts = dict(alone.parts_s)
    by_part, by_owner = part_share(count), owner_share(choice, work, count)
    for name in parts:
        if name in _BY_PARTS:
            parts[name] *= by_part
        elif name == "rounding" and "collecting" not in parts:  # without calibration: by tensors
            parts[name] /= count
        elif name in _BY_OWNER:
            parts[name] *= by_owner
        elif name in _BY_NAMES:
            parts[name] *= 1 - _JOURNAL + _JOURNAL / count
        elif name == "states":
            parts[name] *= by_part
        elif name == "judging":  # two of four runs side by side
            parts[name] *= 0.75
    traffic = traffic_bytes(choice, work, count)
    parts["exchanges"] = sum(traffic.values()) / NETWORK_BYTES_S + _EXCHANGE_S * exchanges(work, count)
    return Cost(sum(parts.values()), alone.peak_bytes, parts, sum(traffic.values()))


def part_share(count: int) -> float:
    """Of the samples, what the busiest of so many ranks runs.

    >>> [part_share(n) for n in (1, 2, 3, 8, 64)]
    [1.0, 0.5, 0.375, 0.125, 0.125]
    """
    return math.ceil(PARTS / count) / PARTS


def block_inputs(work: Work) -> list[tuple[int, int]]:
    """Rows and columns of what reads one input, of a block that has as much as the average."""
    found = ((shape, round(n / work.blocks)) for shape, n in work.inputs.items())
    return list(chain.from_iterable(repeat(shape, max(1, n)) for shape, n in found))


def owners(choice: Choice, work: Work, count: int) -> list[int]:
    """Which rank rounds what reads each input of a block."""
    hessian = choice.method not in ("llm-int8", "rtn")
    return share_out([rounding_cost(*shape, hessian) for shape in block_inputs(work)], count)


def owner_share(choice: Choice, work: Work, count: int) -> float:
    """Of the rounding, what the busiest rank does."""
    hessian = choice.method not in ("llm-int8", "rtn")
    loads = [0.0] * count
    for shape, rank in zip(block_inputs(work), owners(choice, work, count), strict=True):
        loads[rank] += rounding_cost(*shape, hessian)
    return max(loads) / sum(loads) if sum(loads) else 1.0


def traffic_bytes(choice: Choice, work: Work, count: int) -> dict[str, int]:
    """The same of the rank that receives most."""
    if count == 1 or choice.method == "rtn":
        return {}
    found = [received_bytes(choice, work, count, rank) for rank in range(count)]
    return max(found, key=lambda sizes: sum(sizes.values()))


def received_bytes(choice: Choice, work: Work, count: int, rank: int) -> dict[str, int]:
    """What one of so many ranks receives in a calibrated run, by what it is."""
    hessian = choice.method not in ("llm-int8", "rtn")
    shapes, whose = block_inputs(work), owners(choice, work, count)
    elsewhere = PARTS - len(range(rank, PARTS, count))
    held = held_out_samples(work.samples, work.length)
    state = work.length * work.hidden
    passed = sum(
        n for runs in (2, 1) for i, n in enumerate(_batches(held, work, runs)) if i % count != rank
    )  # samples: through the float block from two states, then through the rounded one
    found = {
        "hessians": sum(
            elsewhere * 4 * panel_values(n)
            for (_, n), owner in zip(shapes, whose, strict=True)
            if owner == rank and hessian
        ),
        "codes": sum(
            rows * (n + _SCALE_BYTES * choice.scheme.groups(n))
            for (rows, n), owner in zip(shapes, whose, strict=True)
            if owner != rank
        ),
        "held-out states": _HELD_BYTES * state * passed,
    }
    found = {name: work.blocks * size for name, size in found.items()}
    learns = choice.method.endswith("learned")
    fitted, wanted = work.samples - held, 0
    if choice.method.startswith("awq"):
        wanted = searched_samples(work.samples, work.length)
    if learns and rank == 0:
        wanted = max(wanted, learned_samples(fitted, work.length))
    ends = [i * fitted // PARTS for i in range(PARTS + 1)]
    other = sum(max(0, min(ends[i + 1], wanted) - ends[i]) for i in range(PARTS) if i % count != rank)
    found["states"] = (work.blocks - 1) * other * _STATE_BYTES * state
    if learns and rank:  # all anew, from rank 0
        every = sum(rows * (n + _SCALE_BYTES * choice.scheme.groups(n)) for rows, n in shapes)
        found["learned codes"] = work.blocks * every
    found["tokens"] = 8 * work.samples * work.length if rank else 0
    return found


def _batches(held: int, work: Work, runs: int) -> list[int]:
    """Samples of the batches in which held-out ones are run, so many times one behind the other."""
    size = max(1, min(work.samples, TOKENS // work.length))
    return runs * [min(size, held - start) for start in range(0, held, size)]


def exchanges(work: Work, count: int) -> int:
    """How many a rank takes part in: panels of Hessians, and some for each block and rank."""
    panels = sum(math.ceil(n / 256) for _, n in block_inputs(work))
    return work.blocks * (PARTS * panels // count + 12 * count)


def held_hessians(choice: Choice, work: Work, count: int) -> Hessians:
    """Of the rank that rounds most: sums of one part of all inputs, and of all parts of its own."""
    inputs, whose = block_inputs(work), owners(choice, work, count)
    kept, sums = [0] * count, [0] * count
    for (_, n), owner in zip(inputs, whose, strict=True):
        kept[owner] += 4 * n * n
        sums[owner] += 4 * panel_values(n)
    return Hessians(max(sums) + sum(4 * panel_values(n) for _, n in inputs), max(kept))
