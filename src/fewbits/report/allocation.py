"""An allocation as a picture: kinds of matrices by blocks, a number of bits in each cell."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table as Printed
from rich.text import Text

from fewbits.report.parts import Cell, Column, Facts, Part, Section, Table, Words
from fewbits.scheme import QuantScheme

_FLOAT = "float"
_WIDTH = 100  # columns of a terminal
_COLORS = {2: "red", 3: "yellow", 4: "green", 8: "cyan"}
_SHADES = {2: 8, 3: 6, 4: 4, 8: 2, None: 0}  # fewer bits are darker
_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")

Schemes = Mapping[str, QuantScheme | None]
_Place = frozenset[QuantScheme | None]  # of the matrices of a kind in a block, or in several


@dataclass(frozen=True, slots=True)
class Picture:
    """What stands where.

    Args:
        kinds: names of matrices inside of a block, or whole ones outside; in their order.
        blocks: first and last of the blocks in each column; None: outside of them.
        cells: schemes by kind and column; nothing where there is no such matrix.
    """

    kinds: list[str]
    blocks: list[tuple[int, int] | None]
    cells: dict[tuple[str, int], _Place]


def picture(schemes: Schemes, most: int | None = None) -> Picture:
    """Matrices by kind and block; neighbouring blocks that are alike are one column.

    Args:
        schemes: by source name; None for float.
        most: columns; ranges of blocks are put together, alike or not, until there are no more.
    """
    found: dict[tuple[str, int | None], set[QuantScheme | None]] = defaultdict(set)
    for name, scheme in schemes.items():
        found[_kind(name)].add(scheme)
    kinds = list(dict.fromkeys(kind for kind, _ in found))
    numbers = sorted({block for _, block in found if block is not None})
    columns = [(number, number) for number in numbers]
    if most is not None and len(columns) > most:
        columns = _joined(columns, lambda a, b: all(found[k, a] == found[k, b] for k in kinds))
    if most is not None and len(columns) > most:
        size = -(-len(numbers) // most)
        parts = (numbers[i : i + size] for i in range(0, len(numbers), size))
        columns = [(part[0], part[-1]) for part in parts]
    outside = any(block is None for _, block in found)
    blocks: list[tuple[int, int] | None] = [*columns, *([None] if outside else [])]
    cells = {}
    for kind in kinds:
        for i, span in enumerate(blocks):
            inside = [None] if span is None else range(span[0], span[1] + 1)
            place = frozenset().union(*(found.get((kind, block), set()) for block in inside))
            if place:
                cells[kind, i] = place
    return Picture(kinds, blocks, cells)


def allocation_table(schemes: Schemes) -> Printed:
    """For a terminal of 100 columns: bits, and sizes of groups where there are several."""
    table = Printed(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    grouped = _grouped(schemes)
    names = max((len(_kind(name)[0]) for name in schemes), default=0)
    shown = picture(schemes)
    if names + sum(_widths(shown, grouped)) > _WIDTH:
        most = len(shown.blocks)
        while names + sum(_widths(shown, grouped)) > _WIDTH and most > 1:
            most -= 1
            shown = picture(schemes, most)
    table.add_column("block", no_wrap=True)
    for span in shown.blocks:
        table.add_column(_span(span), justify="right", no_wrap=True)
    for kind in shown.kinds:
        cells = [_colored(shown.cells.get((kind, i)), grouped) for i in range(len(shown.blocks))]
        table.add_row(kind, *cells)
    return table


def allocation_lines(
    schemes: Schemes,
    *,
    damage: float,
    bits_per_weight: float,
    price: float,
    realized: float | None = None,
) -> Iterator[str]:
    """What stands below the picture, a fact a line.

    Args:
        schemes: of which it is.
        damage: predicted, nats per token.
        bits_per_weight: over whole files.
        price: nats that one more byte would save.
        realized: KL that was measured, nats; None: it was not.
    """
    measured = "" if realized is None else f", realized {realized:.3g} nats"
    yield (
        f"predicted KL {damage:.3g} nats{measured}; {bits_per_weight:.3f} bits per weight over whole "
        f"files; {price_text(price)}"
    )
    words = ["number: bits"]
    words += ["after it columns in a group"] * _grouped(schemes)
    words += ["t: a trellis"] * any(s is not None and s.trellis for s in schemes.values())
    words += ["f: in float"] * any(scheme is None for scheme in schemes.values())
    yield "; ".join(words)


def price_text(price: float) -> str:
    """What more bytes would save.

    >>> price_text(2e-9), price_text(0)
    ('1 MB more would save 0.002 nats', 'more bytes would save nothing')
    """
    return f"1 MB more would save {1e6 * price:.3g} nats" if price else "more bytes would save nothing"


def allocation_section(
    schemes: Schemes,
    *,
    damage: float,
    bits_per_weight: float,
    price: float,
    asked: str,
    realized: float | None = None,
) -> Section:
    """The same for the page.

    Args:
        schemes, damage, bits_per_weight, price: as for `allocation_lines`.
        asked: which budget there was, in words.
        realized: KL behind the last block, nats; None: no block was run.
    """
    grouped, shown = _grouped(schemes), picture(schemes)
    columns = (Column("block", text=True), *(Column(kind) for kind in shown.kinds))
    spans = [(i, span) for i, span in enumerate(shown.blocks)]
    rows = tuple(
        (Cell(_span(span)), *(_shaded(shown.cells.get((kind, i)), grouped) for kind in shown.kinds))
        for i, span in spans
    )
    pairs = [
        ("asked for", asked),
        ("bits per weight", f"{bits_per_weight:.3f}, over whole files"),
        ("KL, predicted", f"{damage:.3g} nats per token"),
        ("KL, realized", _realized(realized)),
        ("price of a byte", price_text(price)),
    ]
    what = (
        "Each matrix has the number of bits at which the predicted KL of the whole is least, within the "
        "budget. Darker (in the dark: brighter) is fewer bits."
    )
    parts: tuple[Part, ...] = (
        Facts(tuple(pairs)), Words(what), Table("Bits of each matrix", columns, rows, kind="heat"),
    )  # fmt: skip
    return Section("allocation", "Bits of each matrix", parts)


def _realized(nats: float | None) -> str:
    if nats is None:
        return "not measured"
    return f"{nats:.3g} nats per token, behind the last block, on held-out calibration samples"


def read_schemes(allocation: Mapping[str, Iterable[str]]) -> dict[str, QuantScheme | None]:
    """By source name, from a ledger's lists of names by label."""
    return {
        name: None if label == _FLOAT else QuantScheme.parse(label)
        for label, names in allocation.items()
        for name in names
    }


# -- cells -------------------------------------------------------------------------------------------


def _kind(name: str) -> tuple[str, int | None]:
    """The name of a matrix inside its block, experts together, and the block's number.

    >>> _kind("model.layers.3.mlp.experts.17.up_proj.weight"), _kind("lm_head.weight")
    (('experts.up_proj', 3), ('lm_head', None))
    """
    module = name.removesuffix(".weight")
    numbers = _NUMBER.search(module)
    if numbers is None:
        return module.rpartition(".")[2], None
    inside = _NUMBER.sub("", module[numbers.end() :]).strip(".")
    return ".".join(inside.split(".")[-2:]), int(numbers[1])


def _joined(
    columns: Sequence[tuple[int, int]], alike: Callable[[int, int], bool]
) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for first, last in columns:
        if found and alike(found[-1][0], first):
            found[-1] = found[-1][0], last
        else:
            found.append((first, last))
    return found


def _grouped(schemes: Schemes) -> bool:
    """Whether sizes of groups differ."""
    return len({scheme.group_size for scheme in schemes.values() if scheme is not None}) > 1


def _span(span: tuple[int, int] | None) -> str:
    if span is None:
        return "-"
    return str(span[0]) if span[0] == span[1] else f"{span[0]}-{span[1]}"


def _text(place: _Place | None, grouped: bool) -> str:
    """Of a cell: the fewest and the most bits where there are several."""
    if not place:
        return ""

    def one(scheme: QuantScheme | None) -> str:
        if scheme is None:
            return "f"
        size = "ch" if scheme.group_size is None else f"g{scheme.group_size}"
        return f"{scheme.bits}{size if grouped else ''}{'t' * scheme.trellis}"

    by_bits = sorted(place, key=_bits)
    first, last = one(by_bits[0]), one(by_bits[-1])
    if len(by_bits) > 1 and first != last:
        low, high = (re.sub(r"(?<=\d)(?:g\d+|ch)$", "", text) for text in (first, last))
        return low if low == high else f"{low}-{high}"
    return first


def _bits(scheme: QuantScheme | None) -> float:
    """Of a weight, its scales counted in 16 bits; float last."""
    if scheme is None:
        return float("inf")
    return scheme.bits + (0 if scheme.group_size is None else 16 / scheme.group_size)


def _least(place: _Place) -> int | None:
    """The fewest bits; None where all are in float."""
    return min((scheme.bits for scheme in place if scheme is not None), default=None)


def _colored(place: _Place | None, grouped: bool) -> Text:
    least = None if not place else _least(place)
    return Text(_text(place, grouped), style="" if least is None else _COLORS[least])


def _shaded(place: _Place | None, grouped: bool) -> Cell:
    if not place:
        return Cell("")
    by_bits = sorted(place, key=_bits)
    labels = [_FLOAT if scheme is None else scheme.label for scheme in by_bits]
    return Cell(_text(place, grouped), heat=_SHADES[_least(place)], hidden=", ".join(labels))


def _widths(shown: Picture, grouped: bool) -> list[int]:
    """Of the columns, with the space before each."""
    return [
        1 + max(len(_span(span)), *(len(_text(shown.cells.get((k, i)), grouped)) for k in shown.kinds))
        for i, span in enumerate(shown.blocks)
    ]
