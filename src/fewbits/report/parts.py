"""What a page is made of: sections of tables, figures, facts; and how they become one HTML file.

All text is escaped by the template; only figures are markup, and they come from `plots`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fewbits.estimate import Estimate

_HEATS = 10  # shades of a heat map; page.css has a color for each
MISSING = "\N{EN DASH}"  # stands where nothing was measured
TIMES, DELTA = "\N{MULTIPLICATION SIGN}", "\N{GREEK CAPITAL LETTER DELTA}"


@dataclass(frozen=True, slots=True)
class Column:
    """Head of a column.

    Args:
        label: of one or two words; `unit` stands below it.
        text: left-aligned, sorted as text.
    """

    label: str
    unit: str = ""
    text: bool = False


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell.

    Args:
        text: what stands in it.
        small: further lines, smaller.
        value: what it is sorted by; a number or, in columns of text, None.
        heat: shade of a heat map, 0 to 9; None leaves it blank.
        hidden: for screen readers alone.
        code: text is a hash or a command.
    """

    text: str
    small: tuple[str, ...] = ()
    value: float | None = None
    heat: int | None = None
    hidden: str = ""
    code: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells; the first cell of each is its head.

    Args:
        pinned: so many rows stay on top however the others are sorted.
        kind: "plain" or "heat".
    """

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    sortable: bool = False
    pinned: int = 0
    kind: str = "plain"
    part: ClassVar[str] = "table"


@dataclass(frozen=True, slots=True)
class Figure:
    """A plot, drawn twice: for wide screens and for phones. Both are inline SVG, and safe."""

    caption: str
    wide: str
    narrow: str
    part: ClassVar[str] = "figure"


@dataclass(frozen=True, slots=True)
class Words:
    """A paragraph."""

    text: str
    muted: bool = False
    part: ClassVar[str] = "words"


@dataclass(frozen=True, slots=True)
class Items:
    """A list."""

    items: tuple[str, ...]
    part: ClassVar[str] = "items"


@dataclass(frozen=True, slots=True)
class Facts:
    """Terms and what they are."""

    pairs: tuple[tuple[str, str], ...]
    part: ClassVar[str] = "facts"


@dataclass(frozen=True, slots=True)
class Command:
    """To be typed into a shell."""

    text: str
    part: ClassVar[str] = "command"


@dataclass(frozen=True, slots=True)
class Details:
    """Parts that are shown when asked for; `long` ones also stay closed on paper."""

    summary: str
    parts: tuple["Part", ...]
    open: bool = False
    long: bool = False
    part: ClassVar[str] = "details"


Part = Table | Figure | Words | Items | Facts | Command | Details


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what stands below it."""

    id: str
    title: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Page:
    """Everything that the template is given."""

    title: str
    subtitle: str
    summary: tuple[str, ...]
    sections: tuple[Section, ...]
    footer: str


def render(page: Page) -> str:
    """One HTML file that loads nothing; the same bytes for the same page."""
    import jinja2
    from markupsafe import Markup

    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True,
    )  # fmt: skip
    style, script = (
        Markup((folder / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js")
    )
    environment.filters["svg"] = Markup
    return environment.get_template("page.html.j2").render(
        page=page, style=style, script=script, numbers=iter(range(1, 10**6)).__next__
    )


# -- cells -------------------------------------------------------------------------------------------


def estimate_cell(
    estimate: Estimate | None, small: Sequence[str] = (), hidden: str = "", percent: bool = False
) -> Cell:
    """A value above its standard error, then `small`."""
    if estimate is None:
        return Cell(MISSING, tuple(small), hidden=hidden)
    value, _, error = estimate_text(estimate, percent).partition(" ± ")
    lines = (f"± {error}",) if error else ()
    known = estimate.value if math.isfinite(estimate.value) else None
    return Cell(value, (*lines, *small), known, hidden=hidden)


def estimate_text(estimate: Estimate, percent: bool = False) -> str:
    """As everywhere in fewbits; shares in percent.

    >>> estimate_text(Estimate(0.925, 0.002), percent=True)
    '92.50 ± 0.20 %'
    """
    if not percent:
        return str(estimate)
    error = None if estimate.error is None else 100 * estimate.error
    return f"{Estimate(100 * estimate.value, error)} %"


def number_cell(value: float | None, text: str | None = None, small: Sequence[str] = ()) -> Cell:
    """A number without an error; by default in three digits."""
    if value is None:
        return Cell(MISSING)
    return Cell(f"{value:.3g}" if text is None else text, tuple(small), value)


def heat_table(
    caption: str,
    corner: str,
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[float | None]]],
    small: Sequence[Sequence[tuple[str, ...]]] = (),
    shades: Sequence[float | None] = (),
) -> Table:
    """A heat map whose cells hold their numbers; shades are spread evenly over the logarithms.

    Args:
        caption: of the table.
        corner: what its rows are.
        columns: their names.
        rows: name and a value for each column; None: nothing is known.
        small: smaller lines for each cell.
        shades: values that the shades are spread over; by default those of the rows.
    """
    every = shades or [value for _, values in rows for value in values]
    positive = [value for value in every if value is not None and 0 < value < math.inf]
    low, high = (math.log(f(positive)) for f in (min, max)) if positive else (0.0, 0.0)

    def cell(value: float | None, lines: tuple[str, ...]) -> Cell:
        if value is None or math.isnan(value):
            return Cell(MISSING, lines)
        if value <= 0 or high == low:
            shade = 0
        else:
            place = (math.log(value) - low) / (high - low) if value < math.inf else 1.0
            shade = max(0, min(_HEATS - 1, int(_HEATS * place)))
        return Cell(_digits(value), lines, value, shade)

    body = []
    for i, (name, values) in enumerate(rows):
        lines = small[i] if small else [()] * len(values)
        body.append((Cell(name), *(cell(v, s) for v, s in zip(values, lines, strict=True))))
    heads = (Column(corner, text=True), *(Column(name) for name in columns))
    return Table(caption, heads, tuple(body), kind="heat")


def _digits(value: float) -> str:
    """Two digits, or all before the point.

    >>> [_digits(value) for value in (0.01, 9.96, 42.4, 1234.5, 3e-5)]
    ['0.010', '10', '42', '1234', '3.0e-05']
    """
    return f"{value:#.2g}" if abs(value) < 9.95 else f"{value:.0f}"
