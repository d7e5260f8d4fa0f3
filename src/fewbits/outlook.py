"""Everything that `fewbits plan` says of a model: plan, forecast, and advice together."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbits import cost as machine
from fewbits.advice import Advice, advise, read_measured
from fewbits.calibration import DEFAULT_LENGTH
from fewbits.checkpoint import Checkpoint, model_name, open_headers
from fewbits.comparison import RESULTS, default_work
from fewbits.cost import Rates, Work, count_work, probe
from fewbits.errors import InputError
from fewbits.forecast import (
    Choice,
    Cost,
    Forecast,
    Observed,
    Tensors,
    choices,
    fitting_group,
    forecast,
    forecast_quantized,
)
from fewbits.formats import Format
from fewbits.memory import hand_back_memory
from fewbits.memory import memory_bytes as memory_bytes_now
from fewbits.plan import Plan, Survey, make_plan, survey
from fewbits.recipe import DEFAULT_SCHEME, Recipe, parse_method, parse_override
from fewbits.scale import NETWORK_BYTES_S, Group, estimate_share
from fewbits.scheme import QuantScheme
from fewbits.structure import text_config
from fewbits.tensor import Note

DEVICES = ("cpu", "cuda")
_ALONE = Group()


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is to be printed.

    Args:
        plan: of the method and scheme asked for, by default round to nearest; None for a model that is
            quantized already.
    """

    plan: Plan | None
    scheme: str | None
    checkpoint: Checkpoint
    forecast: Forecast
    advice: Advice
    notes: tuple[Note, ...]

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        value: dict[str, Any] = {
            "parameters": self.forecast.parameters,
            "tensors": len(self.checkpoint.tensors),
            "source_bytes": sum(info.size_bytes for info in self.checkpoint.tensors.values()),
            "notes": [str(note) for note in self.notes],
        }
        if self.plan is not None:
            written = self.plan.written_bytes
            value |= {
                "format": self.plan.format.name,
                "scheme": self.scheme,
                "quantized": len(self.plan.placements),
                "written_bytes": written,
                "bits_per_weight": 8 * written / self.plan.parameters,
                "float_modules": self.plan.floats,
            }
        return value | {"forecast": self.forecast.to_json(), "advice": self.advice.to_json()}


def look_ahead(
    model: str | Path,
    *,
    method: str | None = None,
    scheme: QuantScheme | None = None,
    symmetric: bool = True,
    bits: int | None = None,
    overrides: tuple[str, ...] = (),
    head: bool = False,
    embeddings: bool = False,
    format: str | None = None,
    clients: tuple[str, ...] = (),
    tensor_parallel: int = 1,
    memory_bytes: int | None = None,
    device: str = "cpu",
    batch: int = 1,
    context: int | None = None,
    task: str | None = None,
    measured: Path | None = None,
    calibration: str | None = None,
    samples: int = 128,
    length: int | None = None,
    measure: bool = True,
    group: Group = _ALONE,
) -> Outlook:
    """Plan, forecast and advice of a model, from its headers alone.

    Args:
        model: folder, whose weight files may end behind their headers, or a hub id.
        method: as on the command line; None: a table of all.
        scheme: asked for; None: the default, in smaller groups where 128 columns do not fit.
        symmetric: of the table's schemes.
        bits: of the table's rows in groups; None: 4 and 3.
        overrides, head, embeddings, format, clients, tensor_parallel: as for `fewbits.quantize`;
            overrides as PATTERN=SCHEME.
        memory_bytes, device, batch, context: that the result shall run in; see `forecast`.
        task: see `advise`.
        measured: result of `fewbits compare`; where it is None that of this model, if there is one.
        calibration, samples, length: of `fewbits.quantize`, for its time.
        measure: probe this machine, to tell time and memory of quantizing.
        group: ranks that quantize together; then time, memory and traffic are of the slowest.

    Raises:
        InputError: as `make_plan`, `forecast` and `advise`.
    """
    if device not in DEVICES:
        raise InputError(f"--device is {device!r}; accepted are {', '.join(DEVICES)}")
    began = machine.clock()
    checkpoint = open_headers(model)
    name = model_name(model)
    running: dict[str, Any] = {
        "memory_bytes": memory_bytes, "device": device, "batch": batch, "context": context
    }  # fmt: skip
    made, label, judged, notes = None, None, None, list(checkpoint.notes)
    if checkpoint.config.get("quantization_config") is not None:
        found = forecast_quantized(checkpoint, name=name, **running)
    else:
        seen = survey(checkpoint)
        chosen, why = _scheme(seen, scheme)
        transforms, rounder, learned = parse_method("rtn" if method in (None, "int8") else str(method))
        parsed = tuple(map(parse_override, overrides))
        rounding = Recipe(
            rounder, chosen, parsed, head, transforms, embeddings=embeddings, learned=learned
        )
        made = make_plan(seen, rounding, format, clients, tensor_parallel)
        label, notes = chosen.label, [*notes, *why, *made.notes]
        wanted = _wanted(method, chosen, scheme, symmetric, bits)
        hand_back_memory()  # of headers and imports; a run does so too before it is watched
        before = memory_bytes_now()
        took = machine.clock() - began
        cost, rates = None, None
        if measure:
            cost, rates = _cost(made, seen, calibration, samples, length, took, before, group)
            notes += _group_notes(group)
            if calibration is None:
                what = "reading calibration text takes time too, which --calibration FILE adds"
                notes.append(Note("fact", "time", what))
        running["format_name"] = format
        found = forecast(made, seen, chosen, wanted, name=name, cost=cost, **running)
        found.rates = {} if rates is None else rates.to_json()
        everything = choices(chosen.group_size, symmetric, (4, 3))
        if wanted != everything:  # advice goes by all there is, whatever rows are shown
            judged = forecast(made, seen, chosen, everything, name=name, **running)
    judged = judged or found
    numbers, unused = _measured(measured, model, found)
    notes += [] if unused is None else [Note("skip", "measured", unused)]
    return Outlook(made, label, checkpoint, found, advise(judged, task, numbers), tuple(notes))


def _scheme(seen: Survey, asked: QuantScheme | None) -> tuple[QuantScheme, list[Note]]:
    """The one asked for; else 4 bits in groups of 128, or in smaller ones where those do not fit."""
    if asked is not None:
        return asked, []
    size = fitting_group(seen)
    if size == DEFAULT_SCHEME.group_size:
        return DEFAULT_SCHEME, []
    scheme = QuantScheme(4) if size is None else QuantScheme(4, "group", size)
    what = f"groups of 128 do not divide the columns of all weights: {scheme.label} instead"
    return scheme, [Note("fallback", "scheme", what)]


def _wanted(
    method: str | None, chosen: QuantScheme, asked: QuantScheme | None, symmetric: bool, bits: int | None
) -> list[Choice]:
    if method is not None:
        return [Choice("rtn" if method == "int8" else method, chosen)]
    if asked is not None and asked.granularity == "tensor":
        return [Choice(name, chosen) for name in ("awq+gptq", "gptq", "awq", "rtn")]
    if asked is not None and bits == 8 and asked.granularity == "group":
        return [Choice("rtn", chosen), *choices(chosen.group_size, symmetric, ())]
    widths = (4, 3) if bits is None else (bits,) if bits != 8 else ()
    return choices(chosen.group_size, symmetric, widths)


def _measured(
    path: Path | None, model: str | Path, found: Forecast
) -> tuple[dict[str, Any] | None, str | None]:
    if path is not None:
        return read_measured(path, found.config_sha256)
    place = default_work(model) / RESULTS
    if not place.is_file():
        return None, None
    try:
        return read_measured(place, found.config_sha256)
    except InputError as error:  # nobody asked for it
        return None, str(error)


def _cost(
    plan: Plan,
    seen: Survey,
    calibration: str | None,
    samples: int,
    length: int | None,
    survey_s: float,
    baseline_bytes: int,
    group: Group,
) -> tuple[Callable[[Choice, Counter[Tensors], Observed, Format], Cost], Rates]:
    """What tells the cost of a row, and what the machine was measured to do."""
    config = text_config(seen.model)
    text = None if calibration is None else Path(calibration)
    context = getattr(config, "max_position_embeddings", None) or DEFAULT_LENGTH
    rates = probe(
        plan,
        min(DEFAULT_LENGTH, context) if length is None else length,
        text if text is not None and text.is_file() else None,
        survey_s,
        baseline_bytes,
    )
    counted: list[Work] = []

    def cost(choice: Choice, groups: Counter[Tensors], observed: Observed, layout: Format) -> Cost:
        if not counted:
            readers = observed.readers
            counted.append(count_work(plan, groups, readers, config, samples, length, calibration))
        return estimate_share(choice, groups, counted[0], rates, layout, group)

    return cost, rates


def _group_notes(group: Group) -> list[Note]:
    if group == _ALONE:
        return []
    what = f"{group.count} together: time, memory and traffic are of the slowest, over a network of "
    notes = [Note("fact", "ranks", f"{what}{8 * NETWORK_BYTES_S / 1e9:.0f} Gbit/s")]
    if group.gpus:
        what = "rates are those of the data sheet of an H100, at 40 to 70 % of it: not measured here"
        notes.append(Note("fact", "GPUs", what))
    return notes
