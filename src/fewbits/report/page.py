"""The report as one self-contained HTML page: of a comparison, and of a single run.

Every figure is computed from what was measured; what was not measured is said to be missing.
"""

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fewbits.comparison import FLOAT, Comparison, Difference, Row
from fewbits.disk import disk_errors, write_whole
from fewbits.errors import InputError
from fewbits.estimate import Estimate, within_noise
from fewbits.ledger import Ledger
from fewbits.outliers import InputReport, Inspection, MatrixError
from fewbits.outliers import Row as InputRow
from fewbits.pipeline import Quantized
from fewbits.report.allocation import allocation_section, read_schemes
from fewbits.report.parts import (
    DELTA,
    MISSING,
    TIMES,
    Cell,
    Column,
    Command,
    Details,
    Facts,
    Items,
    Page,
    Part,
    Section,
    Table,
    Words,
    estimate_cell,
    estimate_text,
    heat_table,
    number_cell,
    render,
)
from fewbits.report.parts import Figure as PageFigure
from fewbits.report.plots import Line, Point, lines, pareto_front, trade_off
from fewbits.report.table import bytes_text
from fewbits.tasks import compare_scores

_CLOSE = 1.01  # ratio of perplexities that the summary calls close; not tuned
_SMALL = 1e9  # parameters; below, a forward pass is mostly overhead. Not tuned.
_MOST_PLACES = 3  # of one note that are named
_MOST_TENSORS = 3000  # rows of the table of tensors
_Alike = dict[str, list[str]]  # by row, those that it cannot be told from by KL
_EXPERT = re.compile(r"(?:(?<=\.)|(?<=\[)|^)\d+(?=\.|\]|$)")


def comparison_page(comparison: Comparison, command: str) -> str:
    """The page of a comparison.

    Args:
        comparison: with its float row, at least.
        command: makes it again, in a shell.
    """
    model, differences = comparison.model, comparison.differences()
    alike = _alike(differences)
    sections = [
        _models(comparison, alike),
        _trade_off(comparison, alike),
        _positions(comparison),
        _blocks(comparison),
        _matrices(comparison),
        _outliers(comparison),
        _notes(comparison),
        _ledgers(comparison),
        _data(comparison),
        _differences(differences),
        _origin(comparison, command),
    ]
    page = Page(
        f"{model['name']}, quantized {_count(len(comparison.rows) - 1, 'way')}",
        f"{model['parameters']:,} parameters in {model['dtype']}, {bytes_text(model['weight_bytes'])}. "
        f"Measured on {comparison.created}.",
        tuple(_summary(comparison, alike)),
        tuple(sections),
        f"Made by fewbits {comparison.versions.get('fewbits', '')} on {comparison.created}. "
        "This page loads nothing and can be kept as one file.",
    )
    return render(page)


def run_page(result: Quantized, command: str) -> str:
    """The page of one quantized model.

    Args:
        result: of `quantize`.
        command: makes it again, in a shell.
    """
    ledger = result.ledger
    request, name = ledger.request, str(ledger.source["name"])
    sections = [
        _run_quality(result),
        _run_sizes(result),
        *_run_allocation(result),
        _run_blocks(ledger),
        _run_tensors(ledger),
        _run_notes(ledger),
        _run_calibration(ledger),
        _run_origin(result, command),
    ]
    what = f"{request['method']} {ledger.scheme}"
    page = Page(
        f"{name}, quantized by {what}",
        f"{result.parameters:,} parameters, from {bytes_text(result.source_weight_bytes)} to "
        f"{bytes_text(result.weight_bytes)}.",
        tuple(_run_summary(result)),
        tuple(sections),
        f"Made by fewbits {ledger.version}. This page loads nothing and can be kept as one file.",
    )
    return render(page)


def check_page(path: Path) -> None:
    """Refuse before the work what could not be written after it.

    Raises:
        InputError: another ending than .html, no such folder, or a library is missing.
    """
    if path.suffix != ".html":
        raise InputError(f"--html is {path}; accepted are names that end in .html")
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"--html is {path}; accepted is a file in a folder that exists")
    try:
        import jinja2  # noqa: F401
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"--html needs {error.name or 'jinja2 and matplotlib'}: pip install 'fewbits[report]'"
        ) from None


def write_page(html: str, path: Path) -> None:
    """Write a page; a file that is there is replaced.

    Raises:
        InputError: see `check_page`.
        ResourceError: the disk failed.
    """
    check_page(path)
    with disk_errors(path):
        write_whole(path, [html.encode()])


# -- the summary -------------------------------------------------------------------------------------


def _summary(comparison: Comparison, alike: _Alike) -> Iterator[str]:
    rows = comparison.rows[1:]
    if not rows:
        yield "No quantized model was measured."
        return
    judged = [row for row in rows if _judged(row, "perplexity_ratio") is not None]
    if judged:
        close = _smallest_close(judged)
        nearest = min(judged, key=_kl)
        smallest = min(judged, key=lambda row: (row.weight_bytes, _kl(row)))
        also = " By KL it is also the nearest to the float model." * (nearest is close)
        yield _about_close(close, comparison, alike) + also
        if nearest is not close:
            what = _quality(nearest, comparison, alike)
            yield f"Nearest to the float model is {nearest.name}: {what}."
        if smallest not in (close, nearest):
            yield f"Smallest of all is {smallest.name}: {_quality(smallest, comparison, alike)}."
    else:
        least = min(rows, key=lambda row: row.weight_bytes)
        yield (
            f"Quality was not measured. The smallest model is {least.name}, with "
            f"{bytes_text(least.weight_bytes)}."
        )
    yield _about_speed(comparison)


def _about_speed(comparison: Comparison) -> str:
    """The fastest, and how many are as fast as far as known: their timings are independent."""
    timed = [row for row in comparison.rows[1:] if row.decode_ratio is not None]
    if not timed:
        return "Speed was not measured."
    fast = max(timed, key=lambda row: _of(row.decode_ratio))
    alike = [row for row in timed if row is not fast and _as_fast(row.decode_ratio, fast.decode_ratio)]
    doubt = f" ({_count(len(alike), 'other')} within two standard errors of it)" if alike else ""
    sentence = (
        f"Fastest at decoding is {fast.name}: {fast.decode_ratio} times the speed of the float model in "
        f"bfloat16{doubt}."
    )
    small = bool(comparison.model["parameters"] < _SMALL)
    return sentence + _overhead(comparison) * small


def _as_fast(slow: Estimate | None, fast: Estimate | None) -> bool:
    if slow is None or fast is None:
        return False
    error = None
    if slow.error is not None and fast.error is not None:
        error = math.hypot(slow.error, fast.error)
    return within_noise(Estimate(fast.value - slow.value, error))


def _overhead(comparison: Comparison) -> str:
    return (
        f" With {comparison.model['parameters']:,} parameters a forward pass is mostly overhead: its "
        "speed says little about large models."
    )


def _smallest_close(rows: Sequence[Row]) -> Row:
    """Of those with a perplexity close to the float model's; the closest where there is none."""
    close = [row for row in rows if _ratio(row) <= _CLOSE]
    if not close:
        return min(rows, key=_ratio)
    return min(close, key=lambda row: (row.weight_bytes, _kl(row)))


def _about_close(row: Row, comparison: Comparison, alike: _Alike) -> str:
    limit = f"{100 * (_CLOSE - 1):.0f} %"
    if _ratio(row) <= _CLOSE:
        start = (
            f"The smallest model whose perplexity is within {limit} of the float model's is {row.name}"
        )
    else:
        start = f"No model has a perplexity within {limit} of the float model's; nearest is {row.name}"
    return f"{start}: {_quality(row, comparison, alike)}."


def _quality(row: Row, comparison: Comparison, alike: _Alike) -> str:
    """Size and quality in words."""
    whole, kl = comparison.rows[0].weight_bytes, _judged(row, "kl")
    words = (
        f"{bytes_text(row.weight_bytes)}, {whole / row.weight_bytes:.2f} times smaller; "
        f"{_judged(row, 'perplexity_ratio')} times the perplexity"
    )
    if kl is not None:
        words += f"; KL {kl} nats"
    others = alike.get(row.name, [])
    return words + f"; not told apart by KL from {_and(others)}" * bool(others)


def _judged(row: Row, what: str) -> Estimate | None:
    """An estimate of its evaluation, if there is one."""
    found: Estimate | None = None if row.evaluation is None else getattr(row.evaluation, what)
    return found


def _ratio(row: Row) -> float:
    return _of(_judged(row, "perplexity_ratio"))


def _kl(row: Row) -> float:
    return _of(_judged(row, "kl"))


def _of(estimate: Estimate | None) -> float:
    """Its value; infinity where none is known, or a model gave no numbers."""
    return math.inf if estimate is None or math.isnan(estimate.value) else estimate.value


def _alike(differences: Iterable[Difference]) -> _Alike:
    """By row, those that it cannot be told from; see `Comparison.within_noise_of`."""
    found = defaultdict[str, list[str]](list)
    for difference in differences:
        if difference.measure == "kl" and difference.noise:
            found[difference.first].append(difference.second)
            found[difference.second].append(difference.first)
    return dict(found)


# -- all models --------------------------------------------------------------------------------------

_WORDS = (
    ("bits/weight", "all bytes of the weight files over the parameters of the float model"),
    ("memory", "what loading and one forward pass add to a fresh process; it holds libraries too"),
    ("prefill, decode", "tokens read and written per second, and that over the float model in bfloat16"),
    ("perplexity", "exp of the mean surprise per token, of the text: lower is better"),
    ("ratio", "perplexity over that of the float model, on the same windows"),
    ("KL", "Kullback-Leibler divergence from the float model's next-token distribution, per token, in "
     "nats: how much a model changed, 0 if not at all. It sees changes that perplexity averages away"),
    ("KL 99 %", "its 99th percentile over tokens: how far the worst of a hundred is off"),
    ("top-1 agreed", "tokens after which both models find the same successor most likely"),
    ("flips", "tokens or questions that exactly one of the two models gets right: equal accuracy can "
     "hide many (Dutta et al. 2024)"),
    (DELTA, "accuracy less that of the float model, on the same questions"),
    ("±", "one standard error, over windows of text, questions, or rounds of timing. Two rows differ "
     "for certain when their paired difference is well above two of its own errors"),
    ("≈", "cannot be told apart by KL: the paired difference from those rows is less than two of its "
     "standard errors"),
)  # fmt: skip


def _models(comparison: Comparison, alike: _Alike) -> Section:
    rows = comparison.rows
    numbers = {row.name: i for i, row in enumerate(rows)}
    tasks = rows[0].tasks
    columns = (
        Column("model", text=True),
        Column("method", "and scheme", text=True),
        Column("bits", "per weight"),
        Column("size", "of files"),
        Column("memory", "resident"),
        Column("prefill", "tokens/s"),
        Column("decode", "tokens/s"),
        Column("perplexity"),
        Column("ratio", "to float"),
        Column("KL", "nats"),
        Column("KL 99 %", "nats"),
        Column("top-1", "agreed"),
        Column("flips", "of tokens"),
        *(Column(scores.task, "accuracy, change, flips") for scores in tasks),
    )
    body = tuple(_model(row, rows[0], numbers, alike) for row in rows)
    caption = "All models. The headings sort; the float model stays on top."
    missing = []
    if comparison.text is None:
        missing.append("Quality on text was not measured: no perplexity, KL, agreement or flips.")
    if not tasks:
        missing.append("No tasks were asked for.")
    if not any(row.speed for row in rows):
        missing.append("Speed and memory were not measured.")
    elif comparison.model["parameters"] < _SMALL:
        missing.append(_overhead(comparison).strip())
    if any(row.reused for row in rows):
        reused = [f"{row.name} ({_and(row.reused)})" for row in rows if row.reused]
        missing.append(f"Taken from an earlier run on the same inputs: {'; '.join(reused)}.")
    parts: list[Part] = [Table(caption, columns, body, sortable=True, pinned=1)]
    parts += [Words(sentence, muted=True) for sentence in missing]
    parts.append(Details("What the words mean", (Facts(_WORDS),)))
    return Section("models", "All models side by side", tuple(parts))


def _model(row: Row, reference: Row, numbers: dict[str, int], alike: _Alike) -> tuple[Cell, ...]:
    speed = row.speed
    name = Cell(row.name, (f"row {numbers[row.name]}",) * (row.name != FLOAT))
    cells = [name, Cell(row.method or row.scheme, (row.scheme,) * bool(row.method))]
    cells.append(number_cell(row.bits_per_weight, f"{row.bits_per_weight:.2f}"))
    for count in (row.weight_bytes, row.resident_bytes):
        cells.append(number_cell(count, None if count is None else bytes_text(count)))
    for what, ratio in (("prefill", row.prefill_ratio), ("decode", row.decode_ratio)):
        rate = None if speed is None else getattr(speed, what)
        value, _, error = str(ratio or "").partition(" ± ")
        small = (f"{TIMES} {value}",) * bool(value) + (f"± {error}",) * bool(error)
        cells.append(number_cell(rate, None if rate is None else f"{rate:.0f}", small))
    cells.append(estimate_cell(_judged(row, "perplexity")))
    cells.append(estimate_cell(_judged(row, "perplexity_ratio")))
    others = alike.get(row.name, [])
    marks = (f"≈ row {', '.join(str(numbers[other]) for other in others)}",) if others else ()
    hidden = f"cannot be told apart from {_and(others)}" if others else ""
    cells.append(estimate_cell(_judged(row, "kl"), marks, hidden))
    cells.append(estimate_cell(_judged(row, "kl_99")))
    cells.append(estimate_cell(_judged(row, "top1_agreement"), percent=True))
    cells.append(estimate_cell(_judged(row, "flips"), percent=True))
    ours = {scores.task: scores for scores in row.tasks}
    for scores in reference.tasks:
        mine = ours.get(scores.task)
        if mine is None:
            cells.append(Cell(MISSING))
            continue
        against = compare_scores(mine, scores)
        changed = (
            f"{DELTA} {estimate_text(against.difference, percent=True)}",
            f"flips {estimate_text(against.flips, percent=True)}",
        )
        cells.append(estimate_cell(against.accuracy, changed * (row is not reference), percent=True))
    return tuple(cells)


# -- plots -------------------------------------------------------------------------------------------


def _trade_off(comparison: Comparison, alike: _Alike) -> Section:
    points = [
        Point(
            row.name, row.bits_per_weight, kl.value, kl.error,
            None if row.decode_ratio is None else row.decode_ratio.value,
        )
        for row in comparison.rows[1:]
        if (kl := _judged(row, "kl")) is not None and 0 < kl.value < math.inf
    ]  # fmt: skip
    title = "Size, quality and speed"
    if not points:
        return Section("trade-off", title, (Words("KL was not measured: there is nothing to draw."),))
    front = [points[i].name for i in pareto_front([(p.size, p.kl) for p in points])]
    timed = any(point.speed is not None for point in points)
    what = (
        f"Filled and joined: {_and(front)}. No other model is at most as large and at most as far from "
        "the float model. Bars are standard errors."
    )
    what += " The larger a circle, the faster it decodes." * timed
    near = [p.name for p in points if p.name not in front and set(front) & set(alike.get(p.name, []))]
    what += f" Not told apart from one of them by KL: {_and(near)}." * bool(near)
    what += " A name that finds no room is left out; the table has all."
    text = "; ".join(f"{p.name}: {p.size:.2f} bits per weight, KL {p.kl:.3g}" for p in points)
    wide, narrow = trade_off(points, "KL over bits per weight", f"{text}. {what}", "trade-off-")
    return Section("trade-off", title, (PageFigure(what, wide, narrow),))


def _positions(comparison: Comparison) -> Section:
    title = "KL over the position in the text"
    rows = [row for row in comparison.rows[1:] if row.evaluation and row.evaluation.kl_by_position]
    rows = [row for row in rows if any(0 < p.kl.value < math.inf for p in _bins(row))]
    if not rows:
        return Section("positions", title, (Words("KL was not measured by position."),))
    bins = _bins(rows[0])
    names = [f"{b.start} to {b.stop - 1}" for b in bins]
    series = [
        Line(
            row.name, tuple(b.kl.value for b in _bins(row)), tuple(b.kl.error for b in _bins(row)), *look
        )
        for row, look in zip(rows, _looks(rows), strict=True)
        if len(_bins(row)) == len(bins)
    ]
    ticks = [str(b.start) for b in bins]
    labels = ("first position of the bin (tokens of text before)", "KL (nats)")
    what = (
        "Does a model drift as the text before a token grows? Mean KL of the tokens in each bin; bands "
        "are standard errors. Lines of one method have one color, those of one scheme one dash."
    )
    wide, narrow = lines(
        series, ticks, labels, title, f"{what} The table below has it all.", "positions-"
    )
    columns = (Column("model", text=True), *(Column(name, "tokens") for name in names))
    body = tuple((Cell(row.name), *(estimate_cell(b.kl) for b in _bins(row))) for row in rows)
    table = Table("Mean KL in nats, by position", columns, body)
    return Section(
        "positions", title, (PageFigure(what, wide, narrow), Details("The numbers", (table,)))
    )


def _bins(row: Row) -> Sequence[Any]:
    return row.evaluation.kl_by_position if row.evaluation is not None else ()


def _looks(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """Number of a color for each method, and of a dash for each scheme."""
    methods, schemes = ([getattr(row, what) for row in rows] for what in ("method", "scheme"))
    colors, dashes = (list(dict.fromkeys(values)) for values in (methods, schemes))
    return [(colors.index(m), dashes.index(s)) for m, s in zip(methods, schemes, strict=True)]


# -- errors ------------------------------------------------------------------------------------------


def _blocks(comparison: Comparison) -> Section:
    title = "Error behind each block"
    rows = [row for row in comparison.rows[1:] if row.block_errors]
    if not rows:
        what = "The states behind the blocks were not compared."
        return Section("blocks", title, (Words(what),))
    count = max(len(row.block_errors) for row in rows)
    padded = [(row.name, [*row.block_errors, *[None] * (count - len(row.block_errors))]) for row in rows]
    table = heat_table(
        "Squared error of the states over the squared states, by block", "model",
        [str(i) for i in range(count)], padded,
    )  # fmt: skip
    what = (
        "Each model and the float model read the same text; behind each block their hidden states are "
        "compared. Errors of earlier blocks are in it. Darker (in the dark: brighter) is worse."
    )
    return Section("blocks", title, (Words(what), table))


def _matrices(comparison: Comparison) -> Section:
    title = "Error of each matrix"
    parts: list[Part] = []
    maps = list(_error_maps(comparison))
    every = [m["error"] for _, _, blocks in maps for b in blocks for m in b["matrices"]]
    for name, how, blocks in maps:
        table = _matrix_map(f"Relative squared output error, {name}", blocks, every)
        if table is not None:
            words = (Words(how, muted=True),) * bool(how)
            parts.append(Details(name, (*words, table), open=not parts))
    if not parts:
        return Section("matrices", title, (Words("No row has errors by matrix: none was calibrated."),))
    what = (
        "Squared error of a matrix's output over the squared output, on the calibration tokens. Where "
        "experts were put together the mean is shown, and the worst below it. All maps have one scale."
    )
    return Section("matrices", title, (Words(what), *parts))


def _error_maps(comparison: Comparison) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """A name, how it was come by, and blocks as in the ledger; derived ones of rtn in front."""
    seen = set[str]()
    for row in comparison.rows[1:]:
        request = (row.ledger or {}).get("request", {})
        if not row.ledger or not row.ledger.get("blocks"):
            continue
        if not request.get("transforms") and row.scheme not in seen:
            derived = _rounded_to_nearest(row.ledger["blocks"])
            if any(m["error"] is not None for block in derived for m in block["matrices"]):
                seen.add(row.scheme)
                how = (
                    f"Derived, not run: the error of {row.name} over its own ratio to rounding to "
                    "nearest, so for the inputs that its blocks were given."
                )
                yield f"rtn {row.scheme}, derived from {row.name}", how, derived
        yield row.name, "", row.ledger["blocks"]


def _rounded_to_nearest(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The errors that rounding to nearest has in place of what was done."""

    def error(matrix: dict[str, Any]) -> float | None:
        if matrix["error"] is None or not matrix["error_to_rtn"]:
            return None
        return float(matrix["error"] / matrix["error_to_rtn"])

    return [
        block | {"matrices": [matrix | {"error": error(matrix)} for matrix in block["matrices"]]}
        for block in blocks
    ]


def _matrix_map(
    caption: str, blocks: list[dict[str, Any]], shades: Sequence[float | None] = ()
) -> Table | None:
    """Blocks by matrices; experts together. None where no error is known; see `heat_table`."""
    cells = defaultdict[tuple[int, str], list[float]](list)
    experts = defaultdict[str, int](int)
    kinds = dict[str, None]()
    for block in blocks:
        counts = defaultdict[str, int](int)
        for matrix in block["matrices"]:
            kind = _kind(matrix["name"], block["block"])
            kinds[kind] = None
            counts[kind] += 1
            if matrix["error"] is not None:
                cells[block["block"], kind].append(matrix["error"])
        for kind, count in counts.items():
            experts[kind] = max(experts[kind], count)
    if not cells:
        return None
    names = sorted(kinds)
    values, small = [], []
    for block in blocks:
        found = [cells.get((block["block"], kind), []) for kind in names]
        values.append((str(block["block"]), [statistics.fmean(f) if f else None for f in found]))
        small.append([(f"worst {max(f):.2g}",) if len(f) > 1 else () for f in found])
    labels = [f"{kind} ({experts[kind]})" if experts[kind] > 1 else kind for kind in names]
    return heat_table(caption, "block", labels, values, small, shades)


def _kind(name: str, block: int | None) -> str:
    """A matrix inside its block, without the numbers of experts.

    >>> _kind("model.layers.3.mlp.experts.17.up_proj.weight", 3)
    'mlp.experts.*.up_proj'
    """
    inside = name if block is None else name.partition(f".{block}.")[2] or name
    return _EXPERT.sub("*", inside.replace(".weight", ""))


# -- outliers ----------------------------------------------------------------------------------------


def _outliers(comparison: Comparison) -> Section:
    parts: list[Part] = []
    if comparison.outliers is None:
        parts.append(Words("Inputs were not searched for outliers."))
    else:
        parts += _input_outliers(comparison.outliers)
    if comparison.weight_outliers:
        parts += _weight_outliers(comparison.weight_outliers)
    else:
        parts.append(Words("Weights were not searched for outliers."))
    return Section("outliers", "Outliers in the float model", tuple(parts))


def _input_outliers(value: dict[str, Any]) -> Iterator[Part]:
    rows = _inspection(value).rows()
    threshold, data = value["threshold"], value["calibration"]
    columns = sum(row.outliers for row in rows)
    yield Words(
        f"A few columns of the inputs can be far larger than the rest; rounding tokens to 8 bits then "
        f"leaves the rest little. An outlier column holds an |x| above {threshold:g}; {columns:,} were "
        f"found in {data['samples']} samples of {data['length']} tokens."
    )
    names = list(dict.fromkeys(row.name for row in rows))
    blocks = sorted({row.block for row in rows})
    cells = {(row.block, row.name): row for row in rows}

    def value_of(row: InputRow | None) -> float | None:
        return None if row is None or row.token_share is None else row.largest

    def count_of(row: InputRow | None) -> tuple[str, ...]:
        if row is None or row.token_share is None:
            return ("not reached",) if row is not None else ()
        return (f"{row.outliers} of {row.features * max(1, row.experts)}",)

    grid = [[cells.get((block, name)) for name in names] for block in blocks]
    yield heat_table(
        "Largest |x| of each input; below it, how many of its columns are outliers", "block", names,
        [(str(b), [value_of(row) for row in line]) for b, line in zip(blocks, grid, strict=True)],
        [[count_of(row) for row in line] for line in grid],
    )  # fmt: skip
    ratios = [
        (str(block), [None if row is None else row.ratio for row in line])
        for block, line in zip(blocks, grid, strict=True)
    ]
    table = heat_table(
        "Output error with all columns in 8 bits over that with outlier columns in 16 bit", "block",
        names, ratios,
    )  # fmt: skip
    yield Details("What the outliers cost in 8 bits", (table,))
    if value["skipped"]:
        yield Words(f"Not looked at, outside of the blocks: {_and(value['skipped'])}.", muted=True)


def _inspection(value: dict[str, Any]) -> Inspection:
    """From what `Inspection.to_json` gave."""
    inputs = []
    for given in value["inputs"]:
        matrices = tuple(
            MatrixError(m["name"], m["output"], m["plain"], m["kept"]) for m in given["matrices"]
        )
        inputs.append(InputReport(**given | {"matrices": matrices, "columns": tuple(given["columns"])}))
    return Inspection(
        value["threshold"], value["calibration"], tuple(inputs), tuple(value["skipped"]),
        tuple(value["notes"]),
    )  # fmt: skip


def _weight_outliers(weights: Sequence[dict[str, Any]]) -> Iterator[Part]:
    """Maps of the largest weight; matrices outside of the blocks below."""
    groups = defaultdict[tuple[int | None, str], list[dict[str, Any]]](list)
    for weight in weights:
        groups[weight["block"], _EXPERT.sub("*", weight["module"])].append(weight)
    kinds = sorted({kind for block, kind in groups if block is not None})
    blocks = sorted({block for block, _ in groups if block is not None})
    values, small = [], []
    for block in blocks:
        found = [groups.get((block, kind), []) for kind in kinds]
        values.append((str(block), [max(w["largest"] for w in f) if f else None for f in found]))
        small.append([_beyond(f) for f in found])
    if blocks:
        yield heat_table(
            "Largest |w| of each matrix over its root mean square; below, the share of weights beyond 6",
            "block", kinds, values, small,
        )  # fmt: skip
    outside = [f"{k}: {max(w['largest'] for w in f):.2g}" for (b, k), f in groups.items() if b is None]
    if outside:
        yield Words(f"Largest |w| over the root mean square outside of the blocks: {_and(outside)}.")
    yield Words("A normal distribution has 4 to 6 in matrices of this size.", muted=True)


def _beyond(weights: list[dict[str, Any]]) -> tuple[str, ...]:
    worst = max((w["beyond"] for w in weights), default=0.0)
    return (f"{100 * worst:.2g} %",) if worst > 0 else ()


# -- notes, ledgers, data ----------------------------------------------------------------------------


def _notes(comparison: Comparison) -> Section:
    parts: list[Part] = [Words(
        "What was skipped, clamped or had to fall back, and facts worth knowing, as the runs wrote "
        "them. Those of calibration are further down."
    )]  # fmt: skip
    if comparison.notes:
        parts.append(Items(tuple(_grouped(comparison.notes))))
    for row in comparison.rows:
        notes = [note for note in row.notes if not _about_calibration(note)]
        if notes:
            summary = f"{row.name}: {_kinds(notes)}"
            parts.append(Details(summary, (Items(tuple(_grouped(notes))),), open=_alarming(notes)))
    quiet = [row.name for row in comparison.rows if all(map(_about_calibration, row.notes))]
    if quiet:
        parts.append(Words(f"Nothing to note: {_and(quiet)}.", muted=True))
    return Section("notes", "Skips, fallbacks and notes", tuple(parts))


def _about_calibration(note: str) -> bool:
    return note.split(": ", 2)[1:2] == ["calibration"]


def _alarming(notes: Iterable[str]) -> bool:
    return any(not note.startswith("fact") for note in notes)


def _kinds(notes: Sequence[str]) -> str:
    """How many of each kind, the grave ones first."""
    kinds = [note.partition(":")[0] for note in notes]
    grave = ["fallback", "clamp", "skip"]
    order = [kind for kind in grave if kind in kinds] + sorted(set(kinds) - set(grave))
    return ", ".join(_count(kinds.count(kind), kind) for kind in order)


def _grouped(notes: Iterable[str]) -> Iterator[str]:
    """Each kind of note once, with the first places where it was met; facts last."""
    places = defaultdict[tuple[str, str], list[str]](list)
    for note in notes:
        kind, _, rest = note.partition(": ")
        where, _, what = rest.partition(": ")
        places[kind, what or where].append(where if what else "")
    for (kind, what), wheres in sorted(places.items(), key=lambda item: item[0][0] == "fact"):
        some = [where for where in wheres[:_MOST_PLACES] if where]
        more = f" and {len(wheres) - len(some)} more" if len(wheres) > len(some) > 0 else ""
        yield f"{kind}: {', '.join(some)}{more}: {what}" if some else f"{kind}: {what}"


def _ledgers(comparison: Comparison) -> Section:
    rows = [row for row in comparison.rows[1:] if row.ledger]
    if not rows:
        return Section("ledgers", "Ledgers", (Words("No row has a ledger."),))
    columns = (
        Column("model", text=True), Column("tensors", "of the source"), Column("quantized"),
        Column("copied"), Column("folded"), Column("dropped"), Column("source", "bytes"),
        Column("written", "bytes"), Column("quantized", "of it before"),
        Column("quantized", "of it now"), Column("time", "s"), Column("peak", "added memory"),
    )  # fmt: skip
    what = (
        "What became of every source tensor. Folded ones took in scales of AWQ and stay in float. Bytes "
        "are without the headers of files."
    )
    body = tuple(
        (
            Cell(row.name),
            *_totals((row.ledger or {})["totals"]),
            number_cell(row.quantize_s, None if row.quantize_s is None else f"{row.quantize_s:.1f}"),
            number_cell(
                row.quantize_peak_bytes,
                None if row.quantize_peak_bytes is None else bytes_text(row.quantize_peak_bytes),
            ),
        )
        for row in rows
    )
    table = Table("Sums of each ledger", columns, body, sortable=True)
    return Section("ledgers", "Ledgers", (Words(what), table))


def _totals(totals: dict[str, int]) -> list[Cell]:
    counts = ("source_tensors", "quantized", "copied", "folded", "dropped")
    sizes = ("source_bytes", "written_bytes", "quantized_source_bytes", "quantized_written_bytes")
    cells = [number_cell(totals[key], f"{totals[key]:,}") for key in counts]
    return cells + [number_cell(totals[key], f"{totals[key]:,}") for key in sizes]


def _data(comparison: Comparison) -> Section:
    parts: list[Part] = []
    quality = comparison.rows[0].evaluation if comparison.rows else None
    if comparison.text is None:
        parts.append(Words("No text was given to judge on."))
    else:
        pairs = [("judged on", str(comparison.text["name"])), ("sha256", str(comparison.text["sha256"]))]
        if quality is not None:
            pairs.append((
                "measured", f"{quality.tokens:,} predicted tokens in {quality.windows:,} windows of at "
                f"most {quality.length:,}",
            ))  # fmt: skip
        parts.append(Facts(tuple(pairs)))
    for scores in comparison.rows[0].tasks if comparison.rows else ():
        parts.append(Facts((
            ("task", f"{scores.task}: {len(scores.correct):,} questions from {scores.source}, "
             f"{_count(scores.shots, 'worked example')}, {scores.metric}"),
            ("sha256", scores.sha256),
        )))  # fmt: skip
    if comparison.calibration is None:
        parts.append(Words("No method took calibration data."))
    else:
        parts.append(Facts(_calibration_facts(comparison.calibration)))
        notes = [n for row in comparison.rows for n in row.notes if _about_calibration(n)]
        parts.append(Items(tuple(_grouped(dict.fromkeys(notes)))))
    return Section("data", "Text and calibration", tuple(p for p in parts if p != Items(())))


def _calibration_facts(data: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    return (
        ("calibrated on", str(data["source"])),
        ("sha256 of the ids", str(data["sha256"])),
        (
            "samples",
            f"{data['samples']:,} of {data['length']:,} tokens, {data['tokens']:,} in all; "
            f"seed {data['seed']}",
        ),
        *((("products", str(data["products"])),) if "products" in data else ()),
    )


def _differences(found: list[Difference]) -> Section:
    title = "Which rows differ"
    if not found:
        return Section("differences", title, (Words("No two quantized rows were measured alike."),))
    units = {"kl": "KL, nats", "loss": "loss, nats"}
    columns = (
        Column("first", text=True), Column("second", text=True), Column("measure", text=True),
        Column("difference", "first less second"), Column("told apart", text=True),
    )  # fmt: skip
    body = tuple(
        (
            Cell(d.first), Cell(d.second), Cell(units.get(d.measure, f"{d.measure}, accuracy")),
            estimate_cell(d.estimate, percent=d.measure not in units), Cell("no" if d.noise else "yes"),
        )
        for d in found
    )  # fmt: skip
    table = Table("Differences of any two quantized models", columns, body, sortable=True)
    noise = sum(d.noise for d in found)
    what = (
        f"Every two rows, paired by window or question, so that what both find hard cancels. Of "
        f"{_count(len(found), 'difference')} {noise} are less than two standard errors: their sign is "
        "not known. With so many pairs, one in twenty that are equal looks different by chance."
    )
    details = Details(f"All {len(found)} differences", (table,), long=True)
    return Section("differences", title, (Words(what), details))


def _origin(comparison: Comparison, command: str) -> Section:
    model, machine = comparison.model, comparison.machine
    speed = next((row.speed for row in comparison.rows if row.speed), None)
    pairs = [("model", str(model["name"])), ("sha256 of its config", str(model["config_sha256"]))]
    pairs += _machine(machine)
    if speed is not None:
        pairs.append((
            "timed", f"prefill of {speed.prompt} tokens, then {speed.new_tokens} one by one, on "
            f"{_count(speed.threads, 'thread')}, in turn with the float model",
        ))  # fmt: skip
    pairs.append(("versions", ", ".join(f"{name} {v}" for name, v in comparison.versions.items())))
    pairs.append(("made on", comparison.created))
    parts: list[Part] = [Facts(tuple(pairs))]
    ledgers = [row for row in comparison.rows if row.ledger]
    if ledgers:
        columns = (Column("model", text=True), Column("sha256 of fewbits.json", text=True))
        body = tuple(
            (Cell(row.name), Cell(str((row.ledger or {})["sha256"]), code=True)) for row in ledgers
        )
        parts.append(Details("Hashes of the ledgers", (Table("Ledger of each model", columns, body),)))
    parts += [Words("To make it again:"), Command(command)]
    return Section("origin", "How this was made", tuple(parts))


def _machine(machine: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = []
    for key, value in machine.items():
        text = bytes_text(value) if key.endswith("_bytes") and value is not None else str(value)
        pairs.append((key.removesuffix("_bytes").replace("_", " "), text))
    return pairs


# -- a single run ------------------------------------------------------------------------------------


def _run_summary(result: Quantized) -> Iterator[str]:
    totals, verified = result.ledger.totals, result.verification
    yield (
        f"{bytes_text(result.source_weight_bytes)} became {bytes_text(result.weight_bytes)}, "
        f"{result.source_weight_bytes / result.weight_bytes:.2f} times less: "
        f"{result.bits_per_weight:.2f} bits per weight over whole files. "
        f"{totals['quantized']:,} of {totals['source_tensors']:,} tensors are quantized."
    )
    if verified.problems:
        yield f"Verification found {_count(len(verified.problems), 'problem')}: {verified.problems[0]}"
    else:
        yield (
            f"All was read back and compared: {verified.codes:,} tensors of codes, {verified.files:,} "
            "files, no difference."
        )
    last = result.ledger.blocks[-1] if result.ledger.blocks else None
    if last is not None:
        yield f"KL behind the last block, on held-out calibration samples: {last['kl']:.3g} nats."


def _run_quality(result: Quantized) -> Section:
    out = result.out.name
    name = str(result.ledger.source["name"])
    return Section("quality", "How good is it?", (
        Words("Quality was not measured by this run. These commands measure it, with standard errors: "
              "the first for this model, the second for several methods side by side."),
        Command(f"fewbits evaluate {_shell(out)} --reference {_shell(name)} --text TEXT"),
        Command(f"fewbits compare {_shell(name)} WORK --text TEXT --html report.html"),
    ))  # fmt: skip


def _shell(word: str) -> str:
    import shlex

    return shlex.quote(word)


def _run_sizes(result: Quantized) -> Section:
    totals, run = result.ledger.totals, result.run
    sizes = (
        ("weight files", result.source_weight_bytes, result.weight_bytes),
        ("tensors", totals["source_bytes"], totals["written_bytes"]),
        ("quantized tensors", totals["quantized_source_bytes"], totals["quantized_written_bytes"]),
    )
    columns = (
        Column("what", text=True), Column("before", "bytes"), Column("now", "bytes"), Column("ratio"),
    )  # fmt: skip
    body = tuple(
        (
            Cell(what),
            Cell(f"{before:,}"),
            Cell(f"{now:,}"),
            Cell(f"{before / now:.2f}" if now else MISSING),
        )
        for what, before, now in sizes
    )
    memory = run.get("memory_bytes")
    pairs = [
        ("source tensors", f"{totals['source_tensors']:,}"),
        *((outcome, f"{totals[outcome]:,}") for outcome in ("quantized", "copied", "folded", "dropped")),
        ("time", f"{run['elapsed_s']:.1f} s" if "elapsed_s" in run else "not known"),
        (
            "memory",
            f"{bytes_text(memory['peak'])} at most, {bytes_text(memory['before'])} of it before the run"
            if memory
            else "not known",
        ),
    ]
    if result.reused:
        pairs.append(("reused", "the finished result of the same run was there; it was verified again"))
    table = Table("Sizes before and now", columns, body)
    return Section("sizes", "Size, time and memory", (table, Facts(tuple(pairs))))


def _run_allocation(result: Quantized) -> Iterator[Section]:
    """Where there was a budget."""
    request, blocks = result.ledger.request, result.ledger.blocks
    if "allocation" not in request or "budget" not in request:
        return
    budget = request["budget"]
    if "memory_bytes" in budget:
        asked = bytes_text(budget["memory_bytes"])
    elif "bits_per_weight" in budget:
        asked = f"{budget['bits_per_weight']:g} bits per weight"
    else:
        asked = f"no more than {request['scheme']} for all takes"
    yield allocation_section(
        read_schemes(request["allocation"]),
        damage=budget["predicted"],
        bits_per_weight=result.bits_per_weight,
        price=budget["price"],
        asked=asked,
        realized=blocks[-1]["kl"] if blocks else None,
    )


def _run_blocks(ledger: Ledger) -> Section:
    title = "Error by block and matrix"
    blocks = ledger.blocks
    if not blocks:
        what = "Nothing was calibrated, so no block was run: there are no errors to show."
        return Section("blocks", title, (Words(what),))
    parts: list[Part] = []
    drawn = {"KL so far": "kl", "output error": "error"}
    series = [
        Line(name, tuple(float(block[key]) for block in blocks), color=i)
        for i, (name, key) in enumerate(drawn.items())
        if any(0 < block[key] < math.inf for block in blocks)
    ]
    what = (
        "KL so far: nats, of the model's own head on the states behind each block, all earlier blocks "
        "quantized. Output error: squared, over the variance, of that block alone. Both on held-out "
        "samples."
    )
    if series:
        ticks = [str(block["block"]) for block in blocks]
        text = "; ".join(f"block {b['block']}: KL {b['kl']:.3g}, error {b['error']:.3g}" for b in blocks)
        wide, narrow = lines(series, ticks, ("block", "nats, or share"), title, text, "blocks-")
        parts.append(PageFigure(what, wide, narrow))
    parts.append(Details("Block by block", (_block_table(blocks),)))
    table = _matrix_map("Relative squared output error of each matrix", blocks)
    if table is None:
        parts.append(Words("This method keeps no error by matrix."))
    else:
        parts.append(Words("Squared error of a matrix's output over the squared output, on calibration "
                           "tokens; of experts the mean and the worst."))  # fmt: skip
        parts.append(table)
    derived = _matrix_map("Rounded to nearest instead: the same error", _rounded_to_nearest(blocks))
    if derived is not None:
        how = Words(
            "Derived, not run: each error over its ratio to rounding the same matrix to nearest."
        )
        parts.append(Details("Had they been rounded to nearest", (how, derived)))
    return Section("blocks", title, tuple(parts))


def _block_table(blocks: list[dict[str, Any]]) -> Table:
    columns = (
        Column("block"), Column("output error"), Column("KL so far", "nats"), Column("matrices"),
        Column("error to rtn's", "median"), Column("fell back", "matrices"),
    )  # fmt: skip
    body = []
    for block in blocks:
        matrices = block["matrices"]
        ratios = [m["error_to_rtn"] for m in matrices if m["error_to_rtn"] is not None]
        middle = statistics.median(ratios) if ratios else None
        fallen = sum(bool(m["steps"]) for m in matrices)
        cells = (number_cell(block["error"]), number_cell(block["kl"]), number_cell(len(matrices)))
        head = Cell(str(block["block"]), value=block["block"])
        body.append((head, *cells, number_cell(middle), number_cell(fallen)))
    return Table("How each block came out", columns, tuple(body), sortable=True)


def _run_tensors(ledger: Ledger) -> Section:
    columns = (
        Column("tensor", text=True), Column("outcome", text=True), Column("shape", text=True),
        Column("stored as", text=True), Column("before", "bytes"), Column("now", "bytes"),
    )  # fmt: skip
    body = []
    for name, entry in list(ledger.tensors.items())[:_MOST_TENSORS]:
        now = sum(written.size_bytes for written in entry.written)
        kept = entry.quantized.scheme if entry.quantized is not None else entry.dtype
        reasons = tuple(filter(None, (entry.reason, entry.origin and f"made from {entry.origin}")))
        body.append((
            Cell(name), Cell(entry.outcome, reasons),
            Cell(f" {TIMES} ".join(map(str, entry.shape)) or "scalar"), Cell(kept),
            number_cell(entry.size_bytes, f"{entry.size_bytes:,}"), number_cell(now, f"{now:,}"),
        ))  # fmt: skip
    table = Table("What became of each source tensor", columns, tuple(body), sortable=True)
    count = len(ledger.tensors)
    shown = f"The first {_MOST_TENSORS:,} of {count:,} are shown; fewbits.json has all of them."
    words = (Words(shown),) * (count > _MOST_TENSORS)
    details = Details(f"All {count:,} tensors" if not words else "Tensors", (*words, table), long=True)
    return Section("tensors", "Outcome of each tensor", (details,))


def _run_notes(ledger: Ledger) -> Section:
    notes = [str(note) for note in ledger.notes if note.where != "calibration"]
    if not notes:
        return Section("notes", "Skips, fallbacks and notes", (Words("Nothing to note."),))
    parts = (Words(f"{_kinds(notes)}."), Items(tuple(_grouped(notes))))
    return Section("notes", "Skips, fallbacks and notes", parts)


def _run_calibration(ledger: Ledger) -> Section:
    if not ledger.calibration:
        return Section("data", "Calibration", (Words("This run took no calibration data."),))
    notes = tuple(_grouped(str(note) for note in ledger.notes if note.where == "calibration"))
    parts: tuple[Part, ...] = (Facts(_calibration_facts(ledger.calibration)),)
    return Section("data", "Calibration", parts + (Items(notes),) * bool(notes))


def _run_origin(result: Quantized, command: str) -> Section:
    ledger = result.ledger
    source, request = ledger.source, ledger.request
    pairs = [
        ("fewbits", ledger.version),
        ("method", str(request["method"])),
        ("scheme", ledger.scheme),
        ("format", str(request.get("format", ""))),
        ("source", str(source["name"])),
        ("sha256 of its config", str(source["config_sha256"])),
    ]
    columns = (Column("file", text=True), Column("size", "bytes"), Column("sha256", text=True))
    body = tuple(
        (Cell(name), number_cell(f["size_bytes"], f"{f['size_bytes']:,}"), Cell(f["sha256"], code=True))
        for name, f in ledger.files.items()
    )
    parts = (
        Facts(tuple(pairs)), Table("Files that were written", columns, body),
        Words("To make it again:"), Command(command),
    )  # fmt: skip
    return Section("origin", "How this was made", parts)


# -- words -------------------------------------------------------------------------------------------


def _count(number: int, what: str) -> str:
    """A number and what is counted.

    >>> _count(1, "fact"), _count(2, "fact")
    ('1 fact', '2 facts')
    """
    return f"{number:,} {what}" + "s" * (number != 1)


def _and(words: Sequence[str]) -> str:
    """A list in words.

    >>> _and(["a"]), _and(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
