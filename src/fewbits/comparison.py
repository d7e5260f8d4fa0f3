"""What `compare` found: a row for each model, and how any two of them differ."""

from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Self

from fewbits.checkpoint import read_json
from fewbits.errors import InputError
from fewbits.estimate import Estimate, within_noise
from fewbits.evaluate import Evaluation, Measure
from fewbits.speed import Speed
from fewbits.tasks import TaskScores, compare_scores
from fewbits.untrusted import check_types

FLOAT = "float"  # name of the first row, the source
RESULTS = "compare.json"  # in the work folder


def default_work(model: str | Path) -> Path:
    """Where the quantized models of a comparison go, and what was measured of them.

    >>> default_work("owner/name").as_posix()
    'fewbits-compare/owner--name'
    """
    folder = Path(model)
    name = folder.resolve().name if folder.is_dir() else str(model).replace("/", "--")
    return Path("fewbits-compare", name)


@dataclass(frozen=True, slots=True)
class Row:
    """One model of the table.

    Args:
        name: of the candidate; "float" for the source.
        method, scheme: of its ledger; of the source "" and its dtype.
        weight_bytes: of the weight files, everything in them included.
        bits_per_weight: the same over the parameters of the float model.
        resident_bytes: what loading and one forward pass add to a fresh process; None where unknown.
        quantize_s, quantize_peak_bytes: of the run that made it, and what memory it took beyond that
            before; None for the source.
        evaluation: on the text, against the source; None if no text was asked for.
        tasks: scores, in the order asked for.
        speed: alone; None if not asked for.
        prefill_ratio, decode_ratio: tokens per second over those of the source, both in bfloat16, timed
            in turn.
        block_errors: squared error of the states behind each block over the squared states, accumulated
            from the first block on.
        ledger: request, totals, blocks and calibration of its ledger, and the hash of the whole.
        notes: of the ledger and the kernels.
        reused: the parts that an earlier run had measured.
    """

    name: str
    method: str
    scheme: str
    weight_bytes: int
    bits_per_weight: float
    resident_bytes: int | None = None
    quantize_s: float | None = None
    quantize_peak_bytes: int | None = None
    evaluation: Evaluation | None = None
    tasks: tuple[TaskScores, ...] = ()
    speed: Speed | None = None
    prefill_ratio: Estimate | None = None
    decode_ratio: Estimate | None = None
    block_errors: tuple[float, ...] = ()
    ledger: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    reused: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As in `compare.json`."""
        value = {name: getattr(self, name) for name in self.__slots__}
        value["evaluation"] = self.evaluation and self.evaluation.to_json(per_window=True)
        value["tasks"] = [scores.to_json() for scores in self.tasks]
        value["speed"] = self.speed and self.speed.to_json()
        for name in ("prefill_ratio", "decode_ratio"):
            value[name] = value[name] and asdict(value[name])
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """What `to_json` gave."""
        value = dict(value)
        value["evaluation"] = value["evaluation"] and Evaluation.from_json(value["evaluation"])
        value["tasks"] = tuple(TaskScores.from_json(scores) for scores in value["tasks"])
        value["speed"] = value["speed"] and Speed(**value["speed"])
        for name in ("prefill_ratio", "decode_ratio"):
            value[name] = value[name] and Estimate(**value[name])
        for name in ("block_errors", "notes", "reused"):
            value[name] = tuple(value[name])
        return cls(**value)


@dataclass(frozen=True, slots=True)
class Difference:
    """How two rows differ: `first` minus `second`, paired by window or question."""

    first: str
    second: str
    measure: str  # "kl" and "loss" in nats per token, or a task's name, in shares
    estimate: Estimate

    @property
    def noise(self) -> bool:
        """Whether less than two standard errors."""
        return within_noise(self.estimate)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `compare` measured.

    Args:
        model: name, parameters, dtype, weight_bytes and config_sha256 of the source.
        rows: the source first.
        text: name and sha256 of what quality was measured on; None if it was not.
        calibration: see `Calibration.to_json`; None if no method took it.
        outliers: of inputs, see `Inspection.to_json`; None if not looked at.
        weight_outliers: of weights, by matrix.
        machine, versions: where, and with what.
        created: day, UTC.
        notes: of the comparison as a whole.
    """

    model: dict[str, Any]
    rows: tuple[Row, ...]
    text: dict[str, Any] | None
    calibration: dict[str, Any] | None
    outliers: dict[str, Any] | None
    weight_outliers: tuple[dict[str, Any], ...]
    machine: dict[str, Any]
    versions: dict[str, str]
    created: str
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As in `compare.json`."""
        value = {name: getattr(self, name) for name in self.__slots__}
        return value | {
            "rows": [row.to_json() for row in self.rows],
            "differences": [asdict(d) | {"noise": d.noise} for d in self.differences()],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """What `to_json` gave."""
        value = {name: value[name] for name in cls.__slots__}
        value["rows"] = tuple(Row.from_json(row) for row in value["rows"])
        for name in ("weight_outliers", "notes"):
            value[name] = tuple(value[name])
        return cls(**value)

    def differences(self) -> list[Difference]:
        """Of every two quantized rows, by every measure."""
        found = []
        measures: tuple[Measure, ...] = ("kl", "loss")
        for a, b in combinations(self.rows[1:], 2):
            if a.evaluation is not None and b.evaluation is not None:
                for measure in measures:
                    estimate = a.evaluation.difference(b.evaluation, measure)
                    found.append(Difference(a.name, b.name, measure, estimate))
            for ours, theirs in zip(a.tasks, b.tasks, strict=False):
                estimate = compare_scores(ours, theirs).difference
                found.append(Difference(a.name, b.name, ours.task, estimate))
        return found

    def within_noise_of(self, name: str, measure: str = "kl") -> list[str]:
        """The rows that a row cannot be told from by a measure."""
        return [
            d.second if d.first == name else d.first
            for d in self.differences()
            if name in (d.first, d.second)
            and d.measure == measure
            and d.noise
            and d.estimate.error is not None
        ]


def read_comparison(path: Path) -> Comparison:
    """What a run left in its work folder.

    Raises:
        InputError: missing, or of another version.
    """
    try:
        found = Comparison.from_json(read_json(path))
        check_types(found, Comparison, "it")
        found.differences()  # rows that are not of the same windows and questions
        return found
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        if isinstance(error, InputError) and str(path) in str(error):
            raise
        raise InputError(f"{path} was not written by this version of compare: {error}") from None
