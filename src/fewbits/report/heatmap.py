"""The picture of an inspection: blocks by matrices, how large the inputs are and what that costs."""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbits.disk import disk_errors, write_whole
from fewbits.errors import InputError
from fewbits.outliers import Inspection, Row

_CELL, _AROUND = (1.35, 0.34), (1.3, 2.0)  # inches: of a cell, and what stands around all of them
_WIDE = 14.0  # inches; the panels of wider pictures stand one above the other
_NARROW = 18  # letters of a name that fit below a cell
_GRAY = "0.88"  # of blocks that have no such matrix, and where no color would say anything
# With a larger share of outlier columns hardly anything is in 8 bits that could be in error. Not tuned.
_FEW = 0.5
# Text stays text; ids depend on the content only.
_SETTINGS: Any = {"svg.fonttype": "none", "svg.hashsalt": "fewbits", "font.size": 9}


def check_plot(path: Path) -> None:
    """Refuse before the work what could not be drawn after it.

    Raises:
        InputError: another ending than .svg and .png, no such folder, or no matplotlib.
    """
    if path.suffix not in (".svg", ".png"):
        raise InputError(f"--plot is {path}; accepted are names that end in .svg or .png")
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"--plot is {path}; accepted is a file in a folder that exists")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise InputError(
            "--plot needs matplotlib: pip install 'fewbits[report]', or pip install matplotlib"
        ) from None


def write_heatmap(inspection: Inspection, model: str, path: Path) -> None:
    """Draw an inspection to an SVG or PNG file, which holds no time and no other path.

    Args:
        inspection: with at least one row.
        model: its name, for the title.
        path: of the file; one that is there is replaced.

    Raises:
        InputError: see `check_plot`.
        ResourceError: the disk failed.
    """
    check_plot(path)
    import matplotlib

    kind, written = path.suffix[1:], io.BytesIO()
    metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context(_SETTINGS):
        figure = _draw(inspection, model)
        figure.savefig(written, format=kind, dpi=150, metadata=metadata, facecolor="white")
    with disk_errors(path):
        write_whole(path, [written.getvalue()])


def _draw(inspection: Inspection, model: str) -> Any:
    from matplotlib.figure import Figure

    rows = inspection.rows()
    grid = _Grid(
        list(dict.fromkeys(row.name for row in rows)),
        sorted({row.block for row in rows}),
        {(row.block, row.name): row for row in rows},
    )
    width, height = _CELL[0] * len(grid.names), _CELL[1] * len(grid.blocks)
    stacked = 2 * width > _WIDE and width > height + _AROUND[1]
    down, across = (2, 1) if stacked else (1, 2)
    size = (across * (width + _AROUND[0]), down * (height + _AROUND[1]) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    left, right = figure.subplots(down, across, sharey=True)
    _draw_sizes(figure, left, grid, inspection.threshold)
    _draw_ratios(figure, right, grid)
    for axes in (left, right) if stacked else (left,):
        axes.set_ylabel("block")
    left.invert_yaxis()  # the right one's too: it is shared
    data = inspection.calibration
    figure.suptitle(
        f"Outliers among the inputs of {model}\ncalibration: {data['source']}, "
        f"{data['samples']} x {data['length']} tokens",
        fontsize=10,
    )
    return figure


@dataclass(frozen=True, slots=True)
class _Grid:
    """What stands where: `names` from left to right, `blocks` from top to bottom."""

    names: list[str]
    blocks: list[int]
    cells: dict[tuple[int, str], Row]


def _draw_sizes(figure: Any, axes: Any, grid: _Grid, threshold: float) -> None:
    from matplotlib.colors import LogNorm

    largest = [row.largest for row in grid.cells.values() if row.largest > 0] or [1.0]
    low, high = min(largest), max(*largest, 1.01 * min(largest))
    bar = _panel(
        figure, axes, grid, lambda row: row.largest, lambda row: str(row.outliers),
        LogNorm(low, high), "viridis",
    )  # fmt: skip
    bar.set_label("largest |x|")
    title = f"number: outlier columns, |x| > {threshold:g}\ncolor: largest |x|"
    if low < threshold < high:
        title += " (red: the threshold)"
        bar.ax.axhline(threshold, color="white", linewidth=3)
        bar.ax.axhline(threshold, color="red", linewidth=1.5)
    axes.set_title(title, fontsize=9)


def _draw_ratios(figure: Any, axes: Any, grid: _Grid) -> None:
    from matplotlib.colors import LogNorm

    def value(row: Row) -> float | None:
        few = row.outliers <= _FEW * row.features * max(1, row.experts)
        return max(1.0, row.ratio) if few and row.ratio is not None else None

    rows = list(grid.cells.values())
    ratios = [ratio for row in rows if (ratio := value(row)) is not None]
    norm = LogNorm(1, max(2.0, *ratios, 1.0))
    bar = _panel(figure, axes, grid, value, lambda row: _times(row.ratio), norm, "magma")
    bar.set_label("error ratio")
    title = "output error, squared: W8A8 over\nW8A8 with the outlier columns in 16 bit"
    gray = any(value(row) is None and row.token_share is not None for row in rows)
    note = f"\n(gray: more than {_FEW:.0%} of the columns are outliers)"
    axes.set_title(title + note * gray, fontsize=9)


def _panel(
    figure: Any,
    axes: Any,
    grid: _Grid,
    value: Callable[[Row], float | None],
    text: Callable[[Row], str],
    norm: Any,
    colors: str,
) -> Any:
    """One heat map with a text in each cell; returns its color bar."""
    from matplotlib import colormaps

    known = {place: value(row) or math.nan for place, row in grid.cells.items()}
    values = [[known.get((block, name), math.nan) for name in grid.names] for block in grid.blocks]
    axes.set_facecolor(_GRAY)
    mesh = axes.pcolormesh(values, norm=norm, cmap=colors, edgecolors="white", linewidth=0.5)
    for (block, name), row in grid.cells.items():
        number, color = known[block, name], "black"
        if not math.isnan(number):
            red, green, blue, _ = colormaps[colors](norm(number))
            color = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
        label = text(row) if row.token_share is not None else "not reached"
        x, y = grid.names.index(name) + 0.5, grid.blocks.index(block) + 0.5
        axes.text(x, y, label, color=color, ha="center", va="center", fontsize=8)
    labels = [_label([row for row in grid.cells.values() if row.name == name]) for name in grid.names]
    axes.set_xticks([x + 0.5 for x in range(len(labels))], labels)
    axes.set_yticks([y + 0.5 for y in range(len(grid.blocks))], list(map(str, grid.blocks)))
    axes.tick_params(length=0, labelsize=8)
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=max(15, 2.5 * len(grid.blocks)))
    bar.minorticks_off()
    bar.set_ticks(ticks := _ticks(norm.vmin, norm.vmax), labels=[f"{tick:.3g}" for tick in ticks])
    return bar


def _label(rows: list[Row]) -> str:
    """The rows' name on several lines, as narrow as their cells, and what it stands for."""
    parts = rows[0].name.replace(" + ", "\n+ ").replace(".", ".\n").split("\n")
    lines = "\n".join(p if len(p) <= _NARROW else p.replace("/", "/\n") for p in parts)
    features = "/".join(map(str, sorted({row.features for row in rows})))
    experts = max(row.experts for row in rows)
    return f"{lines}\n({features} columns" + (f"\nof {experts} experts)" if experts else ")")


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers for a logarithmic scale; its ends where there are too few.

    >>> _ticks(0.5, 300), _ticks(1, 12), _ticks(3.1, 3.2)
    ([1.0, 10.0, 100.0], [1.0, 2.0, 5.0, 10.0], [3.1, 3.2])
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 2, 5), (1, 2, 3, 4, 5, 6, 7, 8, 9)):
        ticks = [float(f"{step}e{power}") for power in powers for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            return ticks
    return [low, high]


def _times(ratio: float | None) -> str:
    """A ratio in two digits or more.

    >>> [_times(ratio) for ratio in (1.04, 12.3, 345.6, 98765.4)]
    ['1.0', '12', '346', '1e+05']
    """
    if ratio is None:
        return "-"
    return f"{ratio:.1f}" if ratio < 9.95 else f"{ratio:.0f}" if ratio < 9999.5 else f"{ratio:.0e}"
