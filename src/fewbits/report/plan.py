"""What `fewbits plan` found, for people: a table of methods, facts, and the advice."""

from collections.abc import Iterator

from rich.table import Table

from fewbits.advice import Advice
from fewbits.forecast import COMPONENTS, Forecast, Row
from fewbits.outlook import Outlook
from fewbits.report.table import bytes_text


def headline(outlook: Outlook) -> str:
    """What the run that was asked for would do."""
    found, plan = outlook.forecast, outlook.plan
    if plan is None:
        size = bytes_text(found.rows[0].weight_bytes)
        return f"{found.name}: quantized already ({found.quantized}), {size}"
    written = plan.written_bytes
    bits = 8 * written / plan.parameters
    return (
        f"{len(plan.placements)} of {len(plan.checkpoint.tensors)} tensors in {outlook.scheme}, format "
        f"{plan.format.name}: {bytes_text(plan.source_bytes)} -> {bytes_text(written)}, "
        f"{bits:.2f} bits per weight"
    )


def forecast_table(forecast: Forecast) -> Table:
    """A row for each method: bytes by component, what running takes, what making takes."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("method", no_wrap=True)
    components = [name for name in COMPONENTS if any(row.components.get(name) for row in forecast.rows)]
    timed = any(row.cost is not None for row in forecast.rows)
    headings = ["size", "bits/weight", *components, "to run"]
    headings += ["fits"] * (forecast.memory_bytes is not None)
    shared = any(row.cost is not None and row.cost.received_bytes for row in forecast.rows)
    for heading in headings + ["time to make", "peak memory"] * timed + ["traffic"] * shared:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in forecast.rows:
        cells = _cells(row, components, forecast.memory_bytes is not None, timed)
        traffic = 0 if row.cost is None else row.cost.received_bytes
        table.add_row(row.name, *cells, *([bytes_text(traffic)] if traffic else []))
    return table


def _cells(row: Row, components: list[str], asked: bool, timed: bool) -> list[str]:
    if row.refused is not None:
        return ["-"]
    cells = [bytes_text(row.weight_bytes), f"{row.bits_per_weight:.2f}"]
    cells += [bytes_text(row.components.get(name, 0)) for name in components]
    cells.append(bytes_text(row.needed_bytes))
    if asked:
        cells.append("yes" if row.fits else "no")
    if timed:
        cost = row.cost
        cells += ["", ""] if cost is None else [time_text(cost.elapsed_s), bytes_text(cost.peak_bytes)]
    return cells


def time_text(elapsed_s: float) -> str:
    """In the unit that reads best.

    >>> [time_text(s) for s in (4.26, 75, 5400, 400_000)]
    ['4.3 s', '75 s', '90 min', '111 h']
    """
    if elapsed_s < 10:
        return f"{elapsed_s:.1f} s"
    if elapsed_s < 600:
        return f"{elapsed_s:.0f} s"
    return f"{elapsed_s / 60:.0f} min" if elapsed_s < 36_000 else f"{elapsed_s / 3600:.0f} h"


def forecast_lines(forecast: Forecast) -> Iterator[str]:
    """One fact a line."""
    what = f"{forecast.batch} x {forecast.context} tokens"
    if forecast.kv_cache_bytes is None:
        yield f"KV cache for {what}: not known"
    else:
        yield f"KV cache for {what}: {bytes_text(forecast.kv_cache_bytes)}"
    yield f"activations and libraries while it runs: {bytes_text(forecast.overhead_bytes)}, roughly"
    if forecast.memory_bytes is not None:
        best = "nothing of this" if forecast.best is None else f"{forecast.best} is the best that"
        yield f"in {bytes_text(forecast.memory_bytes)}: {best} fits"
    refused: dict[str, list[str]] = {}
    for row in forecast.rows:
        if row.refused is not None:
            refused.setdefault(row.refused, []).append(row.name)
    for reason, names in refused.items():
        yield f"{', '.join(names)}: {reason}"
    yield from (str(note) for note in forecast.notes)


def advice_lines(advice: Advice) -> Iterator[str]:
    """The verdict, then every reason with its source."""
    yield f"advice: {advice.verdict}"
    for remark in advice.remarks:
        verdict = "" if remark.verdict is None else f" -> {remark.verdict}"
        yield f"* {remark.rule}{verdict}: {remark.reason} [{remark.source}]"
