"""The table of models side by side: size, quality with its error, speed."""

from dataclasses import dataclass
from typing import Any

from rich.table import Table

from fewbits.comparison import Comparison
from fewbits.comparison import Row as ComparisonRow
from fewbits.estimate import Estimate
from fewbits.evaluate import Evaluation
from fewbits.outliers import Inspection
from fewbits.speed import Size, Speed
from fewbits.tasks import compare_scores

_SMALL = 1_000_000_000  # parameters, below which decoding is not bound by reading weights; not tuned


@dataclass(frozen=True, slots=True)
class Row:
    """One model of the table."""

    name: str
    size: Size
    evaluation: Evaluation
    speed: Speed | None

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "model": self.name,
            "method": self.size.method,
            "weight_bytes": self.size.weight_bytes,
            "parameters": self.size.parameters,
            "bits_per_weight": self.size.bits_per_weight,
            "evaluation": self.evaluation.to_json(),
            "speed": None if self.speed is None else self.speed.to_json(),
        }


def bytes_text(count: float) -> str:
    """In decimal units.

    >>> bytes_text(11_540_000)
    '11.5 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def evaluation_table(rows: list[Row]) -> Table:
    """A row for each model."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    timed = any(row.speed is not None for row in rows)
    for heading in ("model", "method"):
        table.add_column(heading, no_wrap=True)
    headings = ["bits/weight", "size", "perplexity", "ratio", "KL (nats)", "KL 99 %"]
    headings += ["top-1 agreed", "flips"]
    for heading in headings + ["prefill tok/s", "decode tok/s"] * timed:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        result = row.evaluation
        cells = [row.name, row.size.method, f"{row.size.bits_per_weight:.2f}"]
        cells += [bytes_text(row.size.weight_bytes), str(result.perplexity)]
        cells += [_cell(result.perplexity_ratio), _cell(result.kl), _cell(result.kl_99)]
        cells += [_percent(result.top1_agreement), _percent(result.flips)]
        if timed:
            speed = row.speed
            cells += ["", ""] if speed is None else [f"{speed.prefill:.0f}", f"{speed.decode:.0f}"]
        table.add_row(*cells)
    return table


def _cell(estimate: Estimate | None) -> str:
    return "" if estimate is None else str(estimate)


def _percent(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    error = None if estimate.error is None else 100 * estimate.error
    return f"{Estimate(100 * estimate.value, error)} %"


def comparison_tables(comparison: Comparison) -> list[Table]:
    """What each model takes, how good it is, how it does on tasks; as far as it was measured."""
    rows, tables = comparison.rows, []
    for lines in (
        [_cost_cells(row) for row in rows],
        [_quality_cells(row, comparison) for row in rows],
        [_task_cells(row, rows[0]) for row in rows],
    ):
        headings = [h for h in lines[-1] if any(line.get(h) for line in lines)]
        if not headings:
            continue
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("#", justify="right", no_wrap=True)
        table.add_column("model", no_wrap=True)
        for heading in headings:
            table.add_column(heading, justify="left" if heading == "scheme" else "right", no_wrap=True)
        for number, (row, line) in enumerate(zip(rows, lines, strict=True)):
            table.add_row(str(number), row.name, *(line.get(heading, "") for heading in headings))
        tables.append(table)
    return tables


def _cost_cells(row: ComparisonRow) -> dict[str, str]:
    speed = row.speed
    return {
        "scheme": row.scheme,
        "bits/weight": f"{row.bits_per_weight:.2f}",
        "size": bytes_text(row.weight_bytes),
        "resident": "" if row.resident_bytes is None else bytes_text(row.resident_bytes),
        "prefill tok/s": "" if speed is None else f"{speed.prefill:.0f}",
        "times bf16": _cell(row.prefill_ratio),
        "decode tok/s": "" if speed is None else f"{speed.decode:.0f}",
        "times bf16 ": _cell(row.decode_ratio),
        "made in": "" if row.quantize_s is None else f"{row.quantize_s:.3g} s",
    }


def _quality_cells(row: ComparisonRow, comparison: Comparison) -> dict[str, str]:
    quality = row.evaluation
    if quality is None:
        return {}
    numbers = {other.name: str(i) for i, other in enumerate(comparison.rows)}
    alike = [numbers[name] for name in comparison.within_noise_of(row.name)]
    return {
        "perplexity": str(quality.perplexity),
        "ratio": _cell(quality.perplexity_ratio),
        "KL (nats)": _cell(quality.kl),
        "as good as": ", ".join(alike),
        "KL 99 %": _cell(quality.kl_99),
        "top-1 agreed": _percent(quality.top1_agreement),
        "flips": _percent(quality.flips),
    }


def _task_cells(row: ComparisonRow, source: ComparisonRow) -> dict[str, str]:
    cells = {}
    for ours, theirs in zip(row.tasks, source.tasks, strict=False):
        paired = compare_scores(ours, theirs)
        cells[ours.task] = _percent(ours.accuracy)
        if row is not source:
            cells[f"{ours.task}: more"] = _percent(paired.difference)
            cells[f"{ours.task}: flips"] = _percent(paired.flips)
            cells[f"{ours.task}: changed"] = _percent(paired.changed)
    return cells


def blocks_table(blocks: list[dict[str, Any]]) -> Table:
    """How each calibrated block came out, from the ledger's own words."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    headings = [
        "block",
        "output error",
        "to rtn's",
        "KL so far (nats)",
        "matrices",
        "their error to rtn's",
        "fell back",
    ]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for block in blocks:
        matrices = block["matrices"]
        errors = [m["error_to_rtn"] for m in matrices if m["error_to_rtn"] is not None]
        ratios = f"{min(errors):.2f} to {max(errors):.2f}" if errors else ""
        fallen = sum(bool(matrix["steps"]) for matrix in matrices)
        cells = (
            block["block"],
            f"{block['error']:.3g}",
            f"{block['error'] / block['nearest']:.2f}" if block["nearest"] else "",
            f"{block['kl']:.3g}",
            len(matrices),
            ratios,
            fallen,
        )
        table.add_row(*map(str, cells))
    return table


def outliers_table(inspection: Inspection) -> Table:
    """A row for each input of a block, those of a mixture's experts together."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("block", justify="right", no_wrap=True)
    table.add_column("read by", no_wrap=True)
    headings = ["columns", "outliers", "largest |x|", "median", "tokens with one"]
    headings += ["error of W8A8", "outliers in 16 bit", "ratio"]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in inspection.rows():
        name = f"{row.name} ({row.experts} experts)" if row.experts else row.name
        cells = [str(row.block), name, str(row.features)]
        if row.token_share is None:
            table.add_row(*cells, "not reached")
            continue
        cells += [str(row.outliers), f"{row.largest:.3g}", f"{row.median:.3g}", _share(row.token_share)]
        cells += [_share(row.plain), _share(row.kept), "" if row.ratio is None else f"{row.ratio:.3g}"]
        table.add_row(*cells)
    return table


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.3g} %"


def comparison_facts(comparison: Comparison) -> list[str]:
    """What the table was measured on and with, a line each."""
    source, facts = comparison.rows[0], []
    quality, speed = source.evaluation, source.speed
    if quality is not None:
        facts.append(
            f"{quality.tokens} tokens in {quality.windows} windows of at most {quality.length}, from "
            f"{quality.text} (sha256 {quality.text_sha256[:16]}); "
            "errors are standard errors; as good as: "
            "rows whose KL differs by less than two of them, paired by window"
        )
    data = comparison.calibration
    if data is not None:
        facts.append(
            f"calibration: {data['source']}, {data['samples']} x {data['length']} tokens (sha256 "
            f"{data['sha256'][:16]})"
        )
    if speed is not None:
        machine = comparison.machine
        facts.append(
            f"prefill of {speed.prompt} tokens, decoding of {speed.new_tokens}; times bf16: over the "
            f"source in bfloat16, timed in turn; {machine['processor']}, {speed.threads} threads"
        )
    if comparison.model["parameters"] < _SMALL:
        facts.append("a model this small is slowed by overhead, not by its weights")
    return facts
