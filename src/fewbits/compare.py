"""compare(): one model by every method, side by side: size, memory, speed, quality, with their errors.

Each candidate is quantized into a work folder of its own, which a later run finds again, and measured
against the float model: quality on the same windows, so that differences are paired; speed in turn,
round by round, so that what slows the machine down slows both.
"""

import hashlib
import json
import os
import platform
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from fewbits.budget import plan_memory
from fewbits.calibration import SEEDS, SELF, Calibration, Progress, check_seed
from fewbits.checkpoint import (
    CONFIG,
    LEDGER,
    MAX_SHARD_BYTES,
    carried_files,
    hash_file,
    hash_json,
    model_name,
    open_checkpoint,
    read_json,
    resolve,
)
from fewbits.comparison import FLOAT, RESULTS, Comparison, Row
from fewbits.disk import disk_errors, write_whole
from fewbits.errors import InputError
from fewbits.estimate import Estimate
from fewbits.evaluate import (
    DEFAULT_LENGTH,
    Evaluation,
    check_windows,
    context_of,
    evaluate,
    load_tokenizer,
    read_calibration_of,
)
from fewbits.fit import Size, fit
from fewbits.ledger import Ledger, plain
from fewbits.load import kernel_notes, load
from fewbits.measure import measure
from fewbits.memory import memory_bytes
from fewbits.methods import LLMInt8
from fewbits.outliers import inspect_outliers, weight_outliers
from fewbits.pipeline import BEST, BEST_METHOD, Quantized, check_statistics, quantize
from fewbits.plan import Plan, make_plan
from fewbits.ranks import ALONE, Ranks
from fewbits.recipe import LLM_INT8_SCHEME, Q4_K_SCHEME, Recipe, parse_method
from fewbits.scheme import InputScheme, QuantScheme
from fewbits.speed import compare_speed, measure_resident, measure_size, measure_speed
from fewbits.statistics import Statistics, read_statistics
from fewbits.structure import find_blocks, skeleton, text_config
from fewbits.tasks import TaskScores, check_tasks, evaluate_tasks
from fewbits.text import Text, read_text, windows

MEASURED, PARTIAL = "measured", "compare.partial.json"  # in the work folder
METHODS = ("int8-tensor", "int8", "llm-int8", "rtn", "gptq", "awq", "awq+gptq")
BITS = (4,)
_SIZE = "bpw"
_FIXED = {  # names that say their scheme
    "int8-tensor": ("rtn", QuantScheme(8, "tensor")),
    "int8": ("rtn", QuantScheme(8, "channel")),
    "llm-int8": ("llm-int8", replace(LLM_INT8_SCHEME, inputs=InputScheme(static=True))),
    "q4_k": ("q4_k", Q4_K_SCHEME),
}
_TRACED = 4096  # tokens on which the states behind each block are compared; not tuned
_KEYS = {"evaluation": {"evaluation", "block_errors"}, "tasks": {"tasks"}}
_OTHER_SEED = 1  # added to the seed where text and calibration are both the model's own
_SELF_SAMPLES = 64  # windows that the model writes to be judged on; not tuned


@dataclass(frozen=True, slots=True)
class Candidate:
    """One row to be: a method as `quantize` takes it, and one scheme for all matrices, or a size.

    Args:
        name: of its row and folder.
        method: see `parse_method`; or "best".
        scheme: of all matrices; with `best` what gives the size, if nothing else does.
        bits_per_weight: of the whole files, at most: schemes are chosen.

    >>> [candidate.name for candidate in Candidate.all(["int8", "gptq", "awq=w3-g64"], [4, 3], "none")]
    ['int8', 'gptq-w4-channel', 'gptq-w3-channel', 'awq-w3-g64']
    >>> [candidate.name for candidate in Candidate.all(["best", "gptq=w3-g64"], sizes=[5, 3.5])]
    ['best-5bpw', 'best-3.5bpw', 'gptq-w3-g64']
    """

    name: str
    method: str
    scheme: QuantScheme
    bits_per_weight: float | None = None

    @classmethod
    def all(
        cls,
        methods: list[str] | None = None,
        bits: list[int] | None = None,
        group_size: str = "128",
        sizes: list[float] | None = None,
    ) -> list[Self]:
        """Every method with every number of bits and of every size, those that say theirs once; the
        most bits first.

        Args:
            methods: names; `int8-tensor`, `int8`, `llm-int8`, `q4_k`, or a method, or METHOD=SCHEME, or
                METHOD=3.7bpw; by default the first three, rtn, gptq, awq and awq+gptq, and with sizes
                these and best.
            bits: for the methods that do not say; by default 4, and with sizes none.
            group_size: likewise; a number, or "none" for one scale per channel.
            sizes: bits per weight of whole files, of the methods that do not say and that a size can be
                given.

        Raises:
            InputError: a name that is none of these, or one of them twice.
        """
        found: list[Self] = []
        sizes = [] if sizes is None else sizes
        bits = list(() if sizes else BITS) if bits is None else bits
        usual = (*METHODS, BEST) if sizes else METHODS
        for text in usual if methods is None else methods:
            method, equals, label = text.partition("=")
            if text in _FIXED:
                found.append(cls(text, *_FIXED[text]))
            elif equals and label.endswith(_SIZE):
                found.append(cls._of_size(method, _read_size(label), group_size))
            elif equals:
                found.append(cls._of(method, QuantScheme.parse(label)))
            else:
                found += [cls._of(method, _grouped(number, group_size)) for number in bits]
                found += [cls._of_size(method, size, group_size) for size in sizes]
        found.sort(key=lambda candidate: -(candidate.bits_per_weight or candidate.scheme.bits))
        names = [candidate.name for candidate in found]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise InputError(f"{min(twice)} is there twice; accepted is each candidate once")
        if not found:
            raise InputError(f"nothing to compare; accepted are {', '.join(METHODS)}")
        return found

    @classmethod
    def _of(cls, method: str, scheme: QuantScheme) -> Self:
        candidate = cls(f"{method}-{scheme.label}", method, scheme)
        parse_method(candidate._rounding)  # a name that is one
        return candidate

    @classmethod
    def _of_size(cls, method: str, size: float, group_size: str) -> Self:
        Size(size)  # a number that is one
        own = cls._of(method, _grouped(BITS[0], group_size))
        return cls(f"{method}-{size:g}{_SIZE}", method, own.scheme, size)

    @property
    def calibrated(self) -> bool:
        """Whether it takes tokens to run the model on."""
        return self.fitted or self.recipe.needs_calibration

    @property
    def fitted(self) -> bool:
        """Whether schemes are chosen by what rounding was measured to cost."""
        return self.bits_per_weight is not None or self.method == BEST

    @property
    def _rounding(self) -> str:
        """As `parse_method` takes it."""
        return BEST_METHOD if self.method == BEST else self.method

    @property
    def recipe(self) -> Recipe:
        """As `quantize` makes it; with a size, before schemes are chosen."""
        transforms, method, learned = parse_method(self._rounding)
        if self.method == "llm-int8":
            inputs = self.scheme.inputs
            method = LLMInt8(static=inputs is not None and inputs.static)
        return Recipe(method, self.scheme, transforms=transforms, learned=learned)


def _read_size(label: str) -> float:
    try:
        return float(label.removesuffix(_SIZE))
    except ValueError:
        raise InputError(f"size {label!r}; accepted are bits per weight, like 3.7{_SIZE}") from None


def _check_candidates(candidates: list[Candidate]) -> None:
    """Names are those of rows and folders."""
    names = [candidate.name for candidate in candidates]
    if not names:
        raise InputError("no candidate is given; accepted are those of Candidate.all, or None for all")
    for name in names:
        if names.count(name) > 1 or name == FLOAT or not re.fullmatch(r"[\w.+-]+", name):
            raise InputError(f"candidate {name!r}; accepted are names once, of letters, digits, . + - _")


def _grouped(bits: int, group_size: str) -> QuantScheme:
    if group_size == "none":
        return QuantScheme(bits, "channel")
    if not (group_size.isascii() and group_size.isdigit()):
        raise InputError(f"--group-size is {group_size!r}; accepted are a number and none")
    return QuantScheme(bits, "group", int(group_size))


def compare(
    model: str | Path,
    work: str | Path,
    *,
    candidates: list[Candidate] | None = None,
    text: str | Path | Text | None = SELF,
    length: int | None = None,
    limit: int | None = None,
    calibration: str | Path | Text | Tensor | None = None,
    statistics: str | Path | None = None,
    samples: int = 128,
    sample_length: int | None = None,
    seed: int = 0,
    format: str | None = None,
    tasks: tuple[str, ...] = (),
    task_data: Path | None = None,
    task_limit: int | None = None,
    shots: int | None = None,
    max_memory: int | None = None,
    speed: bool = True,
    inspect: bool = True,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Comparison:
    """Quantize a model by several methods and measure what each costs and saves.

    Args:
        model: folder of a float checkpoint, or a hub id.
        work: folder for the quantized models, what was measured of each, and `compare.json` with all of
            it; what is there already is used.
        candidates: see `Candidate.all`; by default its methods at 4 bits in groups of 128.
        text: what quality is measured on, see `read_text`; "self" is text that the model writes, with
            another seed than that of calibration; None measures no quality.
        length, limit: see `evaluate`.
        calibration, samples, sample_length, seed: see `quantize`; text that the model writes, if
            neither this nor `statistics` is given.
        statistics: folder that `measure` made of this model, instead of calibration: every row that
            would be calibrated is made from it. Without it, what rows of a given size need is measured
            once, in the work folder.
        format: of every quantized model; see `quantize`.
        tasks, task_data, task_limit, shots: see `evaluate_tasks`.
        max_memory: bytes that each `quantize` may take; not what measuring takes, which loads whole
            models.
        speed: time each model against the source; nothing else may run on the machine then.
        inspect: look for outliers.
        progress: called with (what, done, total).
        ranks: processes that call this together; they share quantizing and the windows of the text. What
            it returns is whole on rank 0.

    Raises:
        InputError: anything that can be known before the work.
        ResourceError: the disk failed; the same call goes on with what is there.
    """
    candidates = Candidate.all() if candidates is None else candidates
    _check_candidates(candidates)
    folder, work = resolve(model), Path(work)
    if work.exists() and not work.is_dir():
        raise InputError(f"{work} is a file; accepted is a folder, or none yet")
    if calibration is not None and statistics is not None:
        raise InputError("calibration and statistics are both given; accepted is one of them")
    plans = [_plan(folder, candidate, format) for candidate in candidates]
    check_windows(length, limit, context_of(text_config(skeleton(read_json(folder / CONFIG)))))
    check_seed(seed)
    if task_limit is not None and task_limit < 1:
        raise InputError(f"task limit is {task_limit}; accepted are numbers of questions from 1")
    if tasks:
        check_tasks(tasks, task_data, shots)
        load_tokenizer(folder)
    judged = None if text is None else _Judged.of(folder, text, length, limit, seed, progress, ranks)
    stats = None if statistics is None else read_statistics(statistics)
    data = None
    if stats is not None:
        check_statistics(stats, folder, model, samples, sample_length, seed)
    elif any(candidate.calibrated for candidate in candidates):

        def read() -> Calibration:
            source = SELF if calibration is None else calibration
            return read_calibration_of(folder, source, samples, sample_length, seed, progress)

        data = _tell_calibration(read, ranks)
    study = _Study(
        folder, work, judged, data, stats, format, tasks, task_data, task_limit, shots, max_memory,
        speed, progress, ranks,
    )  # fmt: skip
    if ranks.leads:
        study.check_memory(candidates, plans)
    with disk_errors(work):
        work.mkdir(parents=True, exist_ok=True)
    found = study.start(str(model), plans[0])
    if inspect and ranks.leads:
        found = replace(found, **_inspect(folder, study.tokens, found.notes, progress))
    rows = [study.float_row()]
    for candidate in candidates:
        rows.append(study.row(candidate))
        found = replace(found, rows=tuple(rows))
        if ranks.leads:
            _write_json(work / PARTIAL, found.to_json())
    if ranks.leads:
        os.replace(work / PARTIAL, work / RESULTS)  # until here that of an earlier run stays
    return found


def _plan(folder: Path, candidate: Candidate, format: str | None) -> Plan:
    """What would be written; of one whose schemes are chosen, such that its size can be kept."""
    recipe = candidate.recipe
    if candidate.fitted:
        fitted = fit(
            folder, recipe, Size(candidate.bits_per_weight), None, format=format, clients=(),
            tensor_parallel=1, max_shard_bytes=MAX_SHARD_BYTES,
        )  # fmt: skip
        recipe, format = fitted.recipe, fitted.format
    return make_plan(folder, recipe, format)


def _tell_calibration(read: Callable[[], Calibration], ranks: Ranks) -> Calibration:
    """What rank 0 reads, or lets the model write, at every rank."""
    own = read() if ranks.leads else None
    ids = ranks.tell_tensor(None if own is None else own.ids)
    said = ranks.tell(None if own is None else [own.source, own.seed])
    return Calibration(ids, *said) if own is None else own


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """Whole or not at all."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, [json.dumps(value, indent=1).encode()])


@dataclass(frozen=True, slots=True)
class _Judged:
    """The text that quality is measured on, and some of its windows to trace through the blocks."""

    text: Text | Calibration
    tokenizer: Any
    length: int | None
    limit: int | None
    traced: Tensor

    @classmethod
    def of(
        cls,
        folder: Path,
        source: str | Path | Text,
        length: int | None,
        limit: int | None,
        seed: int,
        progress: Progress | None,
        ranks: Ranks = ALONE,
    ) -> Self:
        tokenizer = load_tokenizer(folder)
        if isinstance(source, str) and source == SELF:
            count = _SELF_SAMPLES if limit is None else limit

            def read() -> Calibration:
                other = (seed + _OTHER_SEED) % SEEDS
                return read_calibration_of(folder, SELF, count, length, other, progress)

            text: Text | Calibration = _tell_calibration(read, ranks)
            pieces = list(text.ids) if isinstance(text, Calibration) else []
        else:
            text = source if isinstance(source, Text) else read_text(source)
            pieces = windows(text, tokenizer, length or DEFAULT_LENGTH)
        if not pieces:
            raise InputError(
                f"{text.name if isinstance(text, Text) else SELF} holds no window of 2 tokens"
            )
        context = context_of(text_config(skeleton(read_json(folder / CONFIG))))
        longest = max(map(len, pieces))
        longest = longest if context is None else min(longest, context)
        whole = [piece[:longest] for piece in pieces if len(piece) >= longest]
        step = max(1, len(whole) * longest // _TRACED)
        return cls(text, tokenizer, length, limit, torch.stack(whole[::step]))

    @property
    def name(self) -> str:
        return self.text.name if isinstance(self.text, Text) else self.text.source


@dataclass(slots=True)
class _Study:
    """What all rows share."""

    folder: Path
    work: Path
    judged: _Judged | None
    data: Calibration | None
    statistics: Statistics | None
    format: str | None
    tasks: tuple[str, ...]
    task_data: Path | None
    task_limit: int | None
    shots: int | None
    max_memory: int | None
    timed: bool
    progress: Progress | None
    ranks: Ranks
    _source: str | None = None
    _reference: Any = None
    _fast: Any = None

    def start(self, model: str, plan: Plan) -> Comparison:
        """Everything but the rows."""
        notes, judged, text = [], self.judged, None
        if judged is not None:
            text = {"name": judged.name, "sha256": judged.text.sha256}
            if self.calibrated_on is not None and self.calibrated_on["source"] == judged.name != SELF:
                notes.append(
                    f"fact: {judged.name} is the text to judge on and that to calibrate on: what was "
                    "calibrated looks better than it is"
                )
        return Comparison(
            _describe_model(model, plan),
            (),
            text,
            self.calibrated_on,
            None,
            (),
            _describe_machine(),
            _versions(),
            datetime.now(UTC).strftime("%Y-%m-%d"),
            tuple(notes),
        )

    @property
    def calibrated_on(self) -> dict[str, Any] | None:
        """The data that methods are calibrated on, as in a ledger; None if no method takes any."""
        if self.statistics is not None:
            return self.statistics.calibration
        return None if self.data is None else self.data.to_json()

    @property
    def tokens(self) -> Tensor | None:
        """Some of them, to look for outliers with."""
        if self.statistics is not None:
            return self.statistics.ids
        return None if self.data is None else self.data.ids

    @property
    def source(self) -> str:
        """A hash of the source, its weights included: one trained further has the same config."""
        if self._source is None:
            checkpoint = open_checkpoint(self.folder)
            names = sorted({*checkpoint.file_bytes, *carried_files(self.folder)})
            files = {name: hash_file(self.folder / name) for name in names}
            self._source = hash_json({"config": checkpoint.config, "files": files})
        return self._source

    @property
    def reference(self) -> Any:
        """The source, loaded once, in its own dtype."""
        if self._reference is None:
            self._reference = load(self.folder)
        return self._reference

    @property
    def fast(self) -> Any:
        """The source in bfloat16, that speeds are compared with."""
        if self._fast is None:
            own = self.reference.dtype == torch.bfloat16
            self._fast = self.reference if own else load(self.folder, dtype=torch.bfloat16)
        return self._fast

    def float_row(self) -> Row:
        """Of the source; it is compared with itself."""
        size = measure_size(self.folder)
        row = Row(FLOAT, "", size.method, size.weight_bytes, size.bits_per_weight)
        row = self._judge(row, self.folder, self.reference)
        if self.timed and self.ranks.leads:
            one = Estimate(1.0, None)
            row = replace(
                row, speed=measure_speed(self.fast), prefill_ratio=one, decode_ratio=one,
                resident_bytes=measure_resident(self.folder, torch.bfloat16),
            )  # fmt: skip
        return row

    def row(self, candidate: Candidate) -> Row:
        """Quantize one candidate, if that was not done before, and measure it."""
        made = self._quantize(candidate)
        ledger, run = made.ledger, made.run
        memory = run.get("memory_bytes")
        row = Row(
            candidate.name,
            ledger.request["method"],
            ledger.scheme,
            made.weight_bytes,
            made.bits_per_weight,
            quantize_s=run.get("elapsed_s"),
            quantize_peak_bytes=memory and memory["peak"] - memory["before"],
            ledger=_describe_ledger(ledger, made.out),
            notes=tuple(map(str, ledger.notes)),
        )
        network = load(made.out)
        row = self._judge(row, made.out, network)
        if self.timed and self.ranks.leads:
            if network.dtype != torch.bfloat16:
                network = load(made.out, dtype=torch.bfloat16)
            timed = compare_speed(network, self.fast)
            row = replace(
                row,
                speed=timed.model,
                prefill_ratio=timed.prefill,
                decode_ratio=timed.decode,
                resident_bytes=measure_resident(made.out, torch.bfloat16),
                notes=(*row.notes, *kernel_notes(network)),
            )
        return row

    def check_memory(self, candidates: list[Candidate], plans: list[Plan]) -> None:
        """Refuse a budget that cannot be kept before the work, as far as that is known: models that are
        loaded to be measured come on top.
        """
        for candidate, plan in zip(candidates, plans, strict=True):
            if self.max_memory is not None and not self._out(candidate).exists():
                told = self.calibrated_on if candidate.recipe.needs_calibration else None
                shape = None if told is None else (told["samples"], told["length"])
                plan_memory(plan, candidate.recipe, shape, memory_bytes(), self.max_memory)

    def _out(self, candidate: Candidate) -> Path:
        """Its folder: another source, version or calibration has another."""
        what: list[Any] = [candidate.recipe.describe(), version("fewbits")]
        what += [self._calibrated_by if candidate.calibrated else None, self.source]
        what += [candidate.bits_per_weight, self.format] if candidate.fitted or self.format else []
        digest = hashlib.sha256(json.dumps(what, default=list).encode()).hexdigest()
        return self.work / f"{candidate.name}-{digest[:8]}"

    @property
    def _calibrated_by(self) -> str | None:
        """A hash of what methods are calibrated by."""
        if self.statistics is not None:
            return self.statistics.sha256
        return None if self.data is None else self.data.sha256

    def _quantize(self, candidate: Candidate) -> Quantized:
        kept = self._statistics_for(candidate)
        needs = candidate.calibrated and kept is None
        return quantize(
            self.folder,
            self._out(candidate),
            method=candidate.method,
            scheme=candidate.scheme,
            bits_per_weight=candidate.bits_per_weight,
            calibration=self.data if needs else None,
            statistics=kept,
            format=self.format,
            max_memory=self.max_memory,
            progress=_named(self.progress, candidate.name),
            ranks=self.ranks,
        )

    def _statistics_for(self, candidate: Candidate) -> Path | None:
        """Those that were given; or for a size those that are measured once for all of them."""
        if self.statistics is not None:
            return self.statistics.folder if candidate.calibrated else None
        if not candidate.fitted:
            return None
        assert self.data is not None
        what = hash_json({"samples": self.data.sha256, "of": self.source, "by": version("fewbits")})
        folder = self.work / f"statistics-{what[:8]}"
        if self.ranks.leads and not folder.exists():
            measure(
                self.folder, folder, calibration=self.data, max_memory=self.max_memory,
                progress=self.progress,
            )  # fmt: skip
        return folder

    def _judge(self, row: Row, folder: Path, network: Any) -> Row:
        """Quality, where it was asked for and no earlier run has measured it."""
        ledger = folder / LEDGER
        which = hash_file(ledger) if ledger.is_file() else self.source
        progress, reused = _named(self.progress, row.name), []
        if self.judged is not None:
            asked: list[Any] = [which, self.judged.text.sha256, self.judged.length, self.judged.limit]
            value, again = self._once("evaluation", asked, lambda: self._evaluate(network, progress))
            row = replace(
                row,
                evaluation=Evaluation.from_json(value["evaluation"]),
                block_errors=tuple(value["block_errors"]),
            )
            reused += ["evaluation"] if again else []
        if self.tasks:
            asked = [which, *self.tasks, _state(self.task_data), self.task_limit, self.shots]
            value, again = self._once("tasks", asked, lambda: self._score(network, progress))
            scores = tuple(map(TaskScores.from_json, value["tasks"]))
            notes = (str(note) for each in scores for note in each.notes)
            row = replace(row, tasks=scores, notes=(*row.notes, *notes))
            reused += ["tasks"] if again else []
        return replace(row, reused=tuple(reused))

    def _once(
        self, kind: str, asked: list[Any], measure: Callable[[], dict[str, Any]]
    ) -> tuple[dict[str, Any], bool]:
        """What was measured, and whether an earlier run did it."""
        digest = hash_json({"asked": asked, "version": version("fewbits")})
        path = self.work / MEASURED / f"{kind}-{digest[:16]}.json"
        if self.ranks.tell(path.is_file()):
            value = read_json(path)
            if value.keys() != _KEYS[kind]:
                raise InputError(f"{path} is no measurement; without the file it is made again")
            return value, True
        value = measure()
        if self.ranks.leads:
            _write_json(path, value)
        return value, False

    def _evaluate(self, network: Any, progress: Progress | None) -> dict[str, Any]:
        judged = self.judged
        assert judged is not None
        measured = evaluate(
            network, self.reference, text=judged.text, tokenizer=judged.tokenizer,
            length=judged.length, limit=judged.limit, progress=progress, ranks=self.ranks,
        )  # fmt: skip
        leads = self.ranks.leads
        errors = block_errors(network, self.reference, judged.traced) if leads else []
        return {"evaluation": measured.to_json(per_window=True), "block_errors": errors}

    def _score(self, network: Any, progress: Progress | None) -> dict[str, Any]:
        if not self.ranks.leads:
            return {"tasks": []}
        scores = evaluate_tasks(
            network, load_tokenizer(self.folder), self.tasks, data=self.task_data,
            limit=self.task_limit, shots=self.shots, progress=progress,
        )  # fmt: skip
        return {"tasks": [each.to_json() for each in scores]}


def _state(folder: Path | None) -> list[Any]:
    """Which files a folder holds, and when they were written."""
    files = [] if folder is None else sorted(path for path in folder.rglob("*") if path.is_file())
    stats = [(path, path.stat()) for path in files]
    return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def _named(progress: Progress | None, name: str) -> Progress | None:
    return (
        None if progress is None else lambda what, done, total: progress(f"{name}: {what}", done, total)
    )


@torch.no_grad()
def block_errors(model: Any, reference: Any, ids: Tensor) -> list[float]:
    """Squared error of the states behind each block over the squared states, for tokens (n, length).

    Errors of earlier blocks are in it: both models go on from what they have. Transforms that fold
    scales into a block leave the states between blocks alone: all methods can be compared by it.
    """
    errors, sizes = defaultdict[int, float](float), defaultdict[int, float](float)
    for window in ids:
        with _states(model) as ours, _states(reference) as theirs:
            for network in {id(model): model, id(reference): reference}.values():
                network(window[None].to(network.device), use_cache=False)
        for number, wanted in theirs.items():
            errors[number] += float((ours[number] - wanted).double().square().sum())
            sizes[number] += float(wanted.double().square().sum())
    return [errors[number] / sizes[number] if sizes[number] else 0.0 for number in sorted(sizes)]


@contextmanager
def _states(model: Any) -> Iterator[dict[int, Tensor]]:
    """The hidden states behind each block of a model while it runs, (tokens, features) in float32."""
    states: dict[int, Tensor] = {}

    def keep(number: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            states[number] = hidden.reshape(-1, hidden.shape[-1]).float().cpu()

        return hook

    blocks = model.get_submodule(find_blocks(model))
    handles = [block.register_forward_hook(keep(i)) for i, block in enumerate(blocks)]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _inspect(
    folder: Path, ids: Tensor | None, notes: tuple[str, ...], progress: Progress | None
) -> dict[str, Any]:
    """Outliers among weights and inputs; where inputs cannot be looked at, why."""
    plan = make_plan(folder, Recipe(scheme=QuantScheme(8)))
    weights = tuple(plain(asdict(report)) for report in weight_outliers(plan))
    try:
        tokens: Any = SELF if ids is None else ids[:16, :512]
        inputs = inspect_outliers(folder, calibration=tokens, progress=_named(progress, "inspect"))
    except InputError as error:
        notes = (*notes, f"skip: outliers of inputs were not looked at: {error}")
        return {"outliers": None, "weight_outliers": weights, "notes": notes}
    return {"outliers": plain(inputs.to_json()), "weight_outliers": weights}


# -- what and where ----------------------------------------------------------------------------------


def _describe_model(model: str, plan: Plan) -> dict[str, Any]:
    checkpoint = plan.checkpoint
    return {
        "name": model_name(model),
        "parameters": plan.parameters,
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "weight_bytes": sum(checkpoint.file_bytes.values()),
        "config_sha256": hash_json(checkpoint.config),
    }


def _describe_ledger(ledger: Ledger, out: Path) -> dict[str, Any]:
    said: dict[str, Any] = {
        "sha256": hash_file(out / LEDGER),
        "request": ledger.request,
        "totals": ledger.totals,
        "calibration": ledger.calibration,
        "blocks": ledger.blocks,
    }
    return {key: plain(value) for key, value in said.items()}


def _describe_machine() -> dict[str, Any]:
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _processor() -> str:
    """The name of its model where the system tells."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    names = ("fewbits", "torch", "transformers", "safetensors", "compressed-tensors")
    return {"python": platform.python_version()} | {name: version(name) for name in names}
