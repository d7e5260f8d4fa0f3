"""The plots of the page, as inline SVG: text stays text, and colors are those of the page's CSS.

matplotlib draws with colors that stand for CSS variables; they are put in where it writes its styles.
"""

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, TypeGuard

WIDE, NARROW = 860, 356  # CSS pixels, which are the units of an SVG
_FONT = 12.0, 10.0  # likewise
_COLORS = 8  # of series, in page.css
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1, 2)))
_LETTERS = 26, 22  # of a name in a plot
# Stand for what a style sheet decides.
_INK, _MUTED, _LINE, _PAPER = "#010200", "#010201", "#010202", "#010203"
_MEANT = {_INK: "currentColor", _MUTED: "var(--muted)", _LINE: "var(--line)", _PAPER: "var(--paper)"}
_SERIES = [f"#0103{i:02x}" for i in range(_COLORS)]
_MEANT |= {color: f"var(--s{i})" for i, color in enumerate(_SERIES)}
_SETTINGS: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "fewbits", "text.parse_math": False, "text.usetex": False,
    "axes.edgecolor": _MUTED, "axes.labelcolor": _INK, "text.color": _INK, "xtick.color": _MUTED,
    "ytick.color": _MUTED, "xtick.labelcolor": _INK, "ytick.labelcolor": _INK, "axes.linewidth": 0.8,
    "axes.spines.top": False, "axes.spines.right": False, "font.family": "DejaVu Sans",
}  # fmt: skip
_Box = tuple[float, float, float, float]  # left, bottom, right, top


@dataclass(frozen=True, slots=True)
class Point:
    """One model: how large, how far from the float model, how fast.

    Args:
        name: shown.
        size: bits per weight.
        kl, error: in nats, and its standard error.
        speed: decoding, in units of the source's; None where not timed.
    """

    name: str
    size: float
    kl: float
    error: float | None
    speed: float | None


@dataclass(frozen=True, slots=True)
class Line:
    """A value with its error over positions that all lines share; None where it is not known.

    `color` and `dash` are numbers: lines with the same one look alike.
    """

    name: str
    values: tuple[float | None, ...]
    errors: tuple[float | None, ...] = ()
    color: int = 0
    dash: int = 0


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points no other one beats: none is at most as large in both, and smaller in one.

    >>> pareto_front([(4, 0.02), (4, 0.03), (3, 0.1), (8, 0.001), (8, 0.02)])
    [0, 2, 3]
    """
    front, best = list[int](), math.inf
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        x, y = points[i]
        last = points[front[-1]] if front else None
        if y < best or (x, y) == last:
            front.append(i)
            best = y
    return sorted(front)


def trade_off(points: Sequence[Point], title: str, text: str, prefix: str) -> tuple[str, str]:
    """KL over bits per weight; areas are decoding speeds, the front is filled and joined.

    Args:
        points: with a KL above 0.
        title, text: for who cannot see it.
        prefix: of the ids, unique on its page.

    Returns:
        The SVG for wide screens and that for phones.
    """
    return _both(lambda axes, wide: _draw_trade_off(axes, points, wide), 400, 330, title, text, prefix)


def lines(
    series: Sequence[Line],
    ticks: Sequence[str],
    labels: tuple[str, str],
    title: str,
    text: str,
    prefix: str,
) -> tuple[str, str]:
    """Values above 0 on a logarithmic scale, each line named at its end. See `trade_off`.

    Args:
        series: with one value for each tick.
        ticks: below the axis.
        labels: of the two axes.
        title, text, prefix: see `trade_off`.
    """
    least = round(1.35 * _FONT[0] * len(series)) + 80

    def draw(axes: Any, wide: bool) -> None:
        _draw_lines(axes, series, ticks, labels, wide)

    return _both(draw, max(360, least), max(300, least), title, text, prefix)


def _both(
    draw: Callable[[Any, bool], None], tall: int, low: int, title: str, text: str, prefix: str
) -> tuple[str, str]:
    wide = _svg(lambda axes: draw(axes, True), WIDE, tall, _FONT[0], title, text, f"{prefix}w")
    narrow = _svg(lambda axes: draw(axes, False), NARROW, low, _FONT[1], title, text, f"{prefix}n")
    return wide, narrow


def _svg(
    draw: Callable[[Any], None], width: int, height: int, font: float, title: str, text: str, prefix: str
) -> str:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    written = io.StringIO()
    with matplotlib.rc_context(_SETTINGS | {"font.size": font}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's fonts draw the text
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        FigureCanvasAgg(figure)  # measures text
        left, below, above = 5.2 * font, 4 * font, 1.2 * font
        frame = (left / width, below / height, 1 - (left + font) / width, 1 - (below + above) / height)
        axes = figure.add_axes(frame, facecolor="none")
        draw(axes)
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    return _inline(written.getvalue(), width, height, title, text, prefix)


def _inline(svg: str, width: int, height: int, title: str, text: str, prefix: str) -> str:
    """What matplotlib wrote, as a part of a page: ids of its own, colors of the page, a text for it."""
    inner = re.sub(r"<(metadata|style)\b.*?</\1>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.S)
    inner = inner[inner.index(">") + 1 : inner.rindex("</svg>")]
    inner = re.sub(r"<defs>\s*</defs>", "", inner)
    inner = re.sub(r'<g id="[a-z]+_?[\d._a-z]*">', "<g>", inner)
    inner = re.sub(r'\bid="', f'id="{prefix}', inner)
    inner = re.sub(r'xlink:href="#', f'href="#{prefix}', inner)
    inner = inner.replace("url(#", f"url(#{prefix}")
    inner = re.sub(r'style="[^"]*"', lambda found: _style(found.group()), inner)
    head = (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-labelledby="{prefix}t {prefix}d">'
        f'<title id="{prefix}t">{escape(title)}</title><desc id="{prefix}d">{escape(text)}</desc>'
    )
    return head + re.sub(r"\n\s*", "\n", inner) + "</svg>"


def _style(style: str) -> str:
    style = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", style)
    return re.sub(r"#010[23][0-9a-f]{2}", lambda found: _MEANT.get(found.group(), "inherit"), style)


def _short(name: str, wide: bool) -> str:
    """On one line, of the length that plots have room for."""
    name = "".join(letter if letter.isprintable() else " " for letter in name)
    most = _LETTERS[0] if wide else _LETTERS[1]
    return name if len(name) <= most else name[: most - 1] + "…"


# -- size, quality, speed ----------------------------------------------------------------------------


def _draw_trade_off(axes: Any, points: Sequence[Point], wide: bool) -> None:
    front = pareto_front([(point.size, point.kl) for point in points])
    most = 260.0 if wide else 130.0  # square pixels of the fastest; not tuned
    fastest = max((p.speed for p in points if p.speed is not None), default=None)
    areas = [most / 3 if p.speed is None or not fastest else most * p.speed / fastest for p in points]
    axes.set_yscale("log")
    _frame(axes, points, wide)
    joined = sorted(front, key=lambda i: (points[i].size, points[i].kl))
    xs, ys = [points[i].size for i in joined], [points[i].kl for i in joined]
    axes.plot(xs, ys, color=_SERIES[0], linewidth=1.2, dashes=(3, 2), zorder=1)
    for i, (point, area) in enumerate(zip(points, areas, strict=True)):
        color = _SERIES[0] if i in front else _MUTED
        if point.error:
            low = min(point.error, 0.9 * point.kl)
            bars = axes.errorbar(
                point.size, point.kl, [[low], [point.error]], color=color, capsize=3, zorder=2
            )
            for part in (*bars[1], *bars[2]):
                part.set_linewidth(1.2)
        fill = color if i in front else _PAPER
        axes.scatter(
            [point.size],
            [point.kl],
            s=area,
            facecolor=fill,
            edgecolor=color,
            linewidth=1.4,
            zorder=4 if i in front else 3,
        )
    order = front + [i for i in range(len(points)) if i not in front]
    _place_names(axes, points, areas, order, front, wide)
    axes.set_xlabel("bits per weight, whole files")
    axes.set_ylabel("KL from the float model (nats)")


def _frame(axes: Any, points: Sequence[Point], wide: bool) -> None:
    """Room for names around the points."""
    sizes, kls = [p.size for p in points], [p.kl for p in points]
    across = max(max(sizes) - min(sizes), 0.05 * max(sizes))
    share = 0.12 if wide else 0.2
    axes.set_xlim(min(sizes) - share * across, max(sizes) + (share + 0.08) * across)
    down = max(math.log(max(kls) / min(kls)), 0.5)
    axes.set_ylim(min(kls) * math.exp(-0.15 * down), max(kls) * math.exp(0.15 * down))
    _log_ticks(axes)
    axes.grid(color=_LINE, linewidth=0.7)
    axes.set_axisbelow(True)


def _log_ticks(axes: Any) -> None:
    """Plain numbers, a few of them, on a logarithmic axis from bottom to top."""
    low, high = axes.get_ylim()
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), tuple(range(1, 10))):
        ticks = [float(f"{step}e{power}") for power in powers for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            break
    axes.minorticks_off()
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])


def _place_names(
    axes: Any,
    points: Sequence[Point],
    areas: Sequence[float],
    order: Sequence[int],
    front: list[int],
    wide: bool,
) -> None:
    """Each name where it covers no point and no other name, if there is such a place."""
    figure = axes.figure
    renderer = figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    limits = (frame.x0 + 2, frame.y0 + 2, frame.x1 + 5, frame.y1 + 6)
    places = [tuple(axes.transData.transform((p.size, p.kl))) for p in points]
    taken: list[_Box] = []
    for (x, y), area in zip(places, areas, strict=True):
        r = math.sqrt(area / math.pi) + 2
        taken.append((x - r, y - r, x + r, y + r))
    for i in order:
        label = axes.text(
            0, 0, _short(points[i].name, wide), zorder=5, fontweight="bold" if i in front else "normal"
        )
        size = label.get_window_extent(renderer)
        (x, y), radius = places[i], math.sqrt(areas[i] / math.pi)
        for left, bottom in _around(x, y, radius + 4, size.width, size.height):
            box = (left, bottom, left + size.width, bottom + size.height)
            inside = box[0] >= limits[0] and box[1] >= limits[1]
            inside = inside and box[2] <= limits[2] and box[3] <= limits[3]
            if inside and not any(_overlap(box, other) for other in taken):
                break
        else:
            label.remove()  # its row in the table has everything
            continue
        taken.append(box)
        label.set_position(axes.transData.inverted().transform((left, bottom)))
        near = (min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3]))
        if math.dist(near, (x, y)) > radius + 8:
            ends = axes.transData.inverted().transform([(x, y), near])
            axes.plot(ends[:, 0], ends[:, 1], color=_MUTED, linewidth=0.7, zorder=1)


def _around(
    x: float, y: float, gap: float, width: float, height: float
) -> Iterator[tuple[float, float]]:
    """Places for the lower left corner of a name, the best first: beside, then further and further."""
    for step in range(8):
        far = gap + step * 0.8 * height
        for up in (0.0, *(s * 0.6 * height * k for k in range(1, step + 2) for s in (1, -1))):
            yield x + far, y + up - height / 2
            yield x - far - width, y + up - height / 2
        yield x - width / 2, y + far
        yield x - width / 2, y - far - height


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# -- lines -------------------------------------------------------------------------------------------


def _draw_lines(
    axes: Any, series: Sequence[Line], ticks: Sequence[str], labels: tuple[str, str], wide: bool
) -> None:
    axes.set_yscale("log")
    values = [v for line in series for v in line.values if _drawn(v)]
    down = max(math.log(max(values) / min(values)), 0.5)
    axes.set_ylim(min(values) * math.exp(-0.08 * down), max(values) * math.exp(0.08 * down))
    for line in series:
        color, dash = _SERIES[line.color % _COLORS], _DASHES[line.dash % len(_DASHES)]
        known = [(x, v) for x, v in enumerate(line.values) if _drawn(v)]
        axes.plot(*zip(*known, strict=True), color=color, linestyle=dash, linewidth=1.6, zorder=3)
        if any(line.errors):
            bands = [(x, v, line.errors[x] or 0.0) for x, v in known]
            lows = [max(v - e, 0.1 * v) for _, v, e in bands]
            axes.fill_between(
                [x for x, _, _ in bands], lows, [v + e for _, v, e in bands], color=color, alpha=0.22,
                linewidth=0, zorder=2,
            )  # fmt: skip
    _log_ticks(axes)
    axes.grid(axis="y", color=_LINE, linewidth=0.7)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    _name_ends(axes, series, len(ticks), wide)
    every = max(1, math.ceil(len(ticks) / (20 if wide else 8)))
    axes.set_xticks(range(0, len(ticks), every), ticks[::every])


def _drawn(value: float | None) -> TypeGuard[float]:
    """Whether a logarithmic scale has a place for it."""
    return value is not None and 0 < value < math.inf


def _name_ends(axes: Any, series: Sequence[Line], count: int, wide: bool) -> None:
    """The name of each line right of its end, moved up or down where they would overlap."""
    renderer = axes.figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    found = [axes.text(0, 0, _short(line.name, wide), va="center", zorder=4) for line in series]
    width = max(label.get_window_extent(renderer).width for label in found)
    height = found[0].get_window_extent(renderer).height + 3
    lead = 18.0  # pixels between a line and its name
    room = min(0.6, (width + lead) / frame.width)
    last = max(count - 1, 1)
    axes.set_xlim(-0.02 * last, last / (1 - room))
    ends = []
    for line in series:
        x = max(i for i, v in enumerate(line.values) if _drawn(v))
        ends.append(axes.transData.transform((x, line.values[x])))
    start = axes.transData.transform((last, 1.0))[0] + lead
    heights = _spread([float(y) for _, y in ends], height, frame.y0, frame.y1)
    for label, (x, y), up in zip(found, ends, heights, strict=True):
        label.set_position(axes.transData.inverted().transform((start, up)))
        path = [(x, y), (start - 3, up)]
        points = axes.transData.inverted().transform(path)
        axes.plot(points[:, 0], points[:, 1], color=_MUTED, linewidth=0.7, zorder=1)


def _spread(wanted: list[float], height: float, low: float, high: float) -> list[float]:
    """Places at least a height apart, in the order of what is wanted, between low and high if they fit.

    >>> _spread([5.0, 4.0, 100.0], 10, 0, 100)
    [15.0, 5.0, 95.0]
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    places = [0.0] * len(wanted)
    floor = low + height / 2
    for i in order:
        places[i] = max(wanted[i], floor)
        floor = places[i] + height
    ceiling = high - height / 2
    for i in reversed(order):
        places[i] = min(places[i], ceiling)
        ceiling = places[i] - height
    return places
