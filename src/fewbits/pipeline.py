"""quantize(): the one loop, from a float checkpoint to a verified quantized one; and quantize_()."""

import re
import shutil
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.blockwise import Block, Position, quantize_blocks, states_bytes
from fewbits.budget import plan_memory
from fewbits.calibration import (
    DEFAULT_SAMPLES,
    SELF,
    Calibration,
    check_calibration,
)
from fewbits.checkpoint import (
    CONFIG,
    LEDGER,
    MAX_SHARD_BYTES,
    RUN,
    carried_files,
    hash_file,
    hash_json,
    hash_tensor,
    read_json,
    resolve,
)
from fewbits.disk import disk_errors
from fewbits.errors import InputError
from fewbits.evaluate import load_tokenizer, read_calibration_of
from fewbits.journal import Journal, differences, discard
from fewbits.ledger import Codes, Entry, Ledger, plain, read_entry, read_ledger
from fewbits.linear import QuantizedLinear, replace_experts
from fewbits.load import check_forward, load
from fewbits.memory import available_bytes, memory_bytes, watch_memory
from fewbits.methods import RTN, LLMInt8, Method
from fewbits.plan import Plan, make_plan
from fewbits.recipe import DEFAULT_SCHEME, LLM_INT8_SCHEME, Recipe, parse_method
from fewbits.scheme import InputScheme, QuantScheme
from fewbits.stream import fast_dtype
from fewbits.structure import (
    EXPERT_PARAMETERS,
    Kind,
    Matrix,
    find_head,
    is_conv1d,
    is_experts,
    is_linear,
    skeleton,
    text_config,
)
from fewbits.tensor import Note, QuantizedTensor, quantize_tensor
from fewbits.text import Text
from fewbits.transforms import Transform
from fewbits.verify import Progress, Verification, verify
from fewbits.wiring import Wiring

_ACCEPTED = "accepted is a folder that does not exist yet, or the result of the same run"
_FORWARD = 1.5  # times the bytes that are written, to load them and run them on a few tokens; rough


@dataclass(frozen=True, slots=True)
class Quantized:
    """A finished run: where, what the ledger says, what verification compared.

    `run` says how long it took and how much memory; it is no part of what is promised to be the same
    each time. `reused` tells that `out` held the finished result of the same run already.
    """

    out: Path
    ledger: Ledger
    verification: Verification
    weight_bytes: int
    source_weight_bytes: int
    parameters: int
    run: dict[str, Any]
    reused: bool = False

    @property
    def bits_per_weight(self) -> float:
        """Over whole files: everything in the weight files, per source parameter."""
        return 8 * self.weight_bytes / self.parameters

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "out": str(self.out),
            "request": self.ledger.request,
            "totals": self.ledger.totals,
            "weight_bytes": self.weight_bytes,
            "source_weight_bytes": self.source_weight_bytes,
            "bits_per_weight": self.bits_per_weight,
            "calibration": self.ledger.calibration,
            "blocks": self.ledger.blocks,
            "run": self.run,
            "notes": [asdict(note) for note in self.ledger.notes],
            "verified": asdict(self.verification),
            "reused": self.reused,
        }


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    method: str | Method | None = None,
    scheme: QuantScheme | None = None,
    overrides: tuple[tuple[str, QuantScheme | None], ...] = (),
    head: bool = False,
    transforms: tuple[Transform, ...] = (),
    calibration: str | Path | Text | Tensor | Calibration | None = None,
    samples: int = DEFAULT_SAMPLES,
    length: int | None = None,
    seed: int = 0,
    max_memory: int | None = None,
    format: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    restart: bool = False,
    progress: Progress | None = None,
) -> Quantized:
    """Quantize a checkpoint, write it, and prove that what was written is what was chosen.

    Whatever ends the process, the same call goes on after the last block that was finished, and ends in
    the same bytes; until then the work lies beside `out`, in `.NAME.partial`.

    Args:
        model: folder of a float checkpoint, or a hub id.
        out: folder to be made. If it holds the finished result of the same run it is verified and
            left as it is.
        method: rounds each matrix; round to nearest by default. A name like "gptq" or "awq+gptq"
            stands for a method and the transforms before it.
        scheme: 4 bits in groups of 128 by default; for "llm-int8" 8 bits by channel, inputs by token,
            with the outlier columns that calibration finds, or without it those of each call.
        overrides: (pattern, scheme or None for float); see `Recipe`.
        head: quantize the output head too.
        transforms: rewrite each block before it is rounded, like `AWQ()`.
        calibration: what calibrated methods and transforms run the model on; see
            `read_calibration`, also for samples, length and seed.
        max_memory: bytes of anonymous memory that the process may take; the work is divided so that
            it stays below. Refused where that cannot be done.
        format: "compressed-tensors" or "fewbits"; by default the first, and the second for a model
            that the first cannot hold.
        max_shard_bytes: of a weight file.
        restart: throw away what `out` and the unfinished work beside it hold.
        progress: called with (what, done, total).

    Raises:
        InputError: nothing was written; or `out` or the work beside it is another run's.
        ResourceError: the disk failed, or has too little room; what is finished is kept.
        VerificationError: what was read back differs from what was chosen or written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     result = quantize("reference/model", f"{folder}/int4", scheme=QuantScheme(4, "group", 128))
    >>> result.ledger.totals["quantized"], result.verification.problems
    (42, [])
    """
    began = time.monotonic()
    named, method = parse_method(method) if isinstance(method, str) else ((), method or RTN())
    scheme = scheme or _default_scheme(method, calibration is not None)
    if isinstance(method, LLMInt8):
        method = _static_or_not(scheme, overrides)
    recipe = Recipe(method, scheme, overrides, head, named + transforms)
    out = Path(out)
    if out.exists() and not (out / LEDGER).is_file():
        raise InputError(f"{out} exists and was not written by fewbits; {_ACCEPTED}")
    plan = make_plan(resolve(model), recipe, format)
    if restart:
        _throw_away(out)
    with watch_memory() as memory:
        given = (calibration, samples, length, seed)
        if out.exists():
            data = _read_calibration(plan, recipe, *given, None, progress)
            return _reuse(out, _ask(plan, recipe, data, model), plan, progress)
        with Journal(out) as journal:
            data = _read_calibration(plan, recipe, *given, journal, progress)
            run = _Run(
                plan, recipe, data, _ask(plan, recipe, data, model), journal, max_memory, progress
            )
            ledger = run.steps()
            journal.write_shards(max_shard_bytes)
            quantization = plan.format.config(plan.placements, plan.floats)
            journal.write_json(CONFIG, plan.config | {"quantization_config": quantization})
            journal.carry_over(plan.checkpoint.folder)
            ledger.notes += plan.checkpoint.notes + run.check_forward(memory.peak)
            ledger.files = _describe_files(journal.result)
            journal.write_json(LEDGER, ledger.to_json())
            verification = verify(journal.result, progress=progress)
            elapsed = round(time.monotonic() - began, 3)
            facts = {"elapsed_s": elapsed, "memory_bytes": asdict(memory), "max_memory": max_memory}
            journal.write_json(RUN, facts | {"resumed_steps": journal.resumed})
            journal.commit()
    return _result(out, plan, ledger, verification)


def _throw_away(out: Path) -> None:
    """A finished checkpoint of ours, and unfinished work for one."""
    discard(out)
    if out.exists():
        with disk_errors(out, "what was there may be there still"):
            shutil.rmtree(out)


def _ask(plan: Plan, recipe: Recipe, data: Calibration | None, model: str | Path) -> dict[str, Any]:
    """All that decides what comes out, as JSON: what was asked for, of what, and what does the work."""
    request = recipe.describe() | {"format": plan.format.name}
    request |= {} if data is None else {"calibration": _describe_calibration(plan, data)}
    return {
        "fewbits": version("fewbits"),
        "request": plain(request),
        "source": plain(_describe_source(model, plan)),
        "made_with": {} if data is None else _describe_machine(),
    }


def _describe_machine() -> dict[str, Any]:
    """What the last bits of sums depend on. Without calibration nothing is summed."""
    return {
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "threads": torch.get_num_threads(),
        "processor": torch.backends.cpu.get_cpu_capability(),
    }


def _default_scheme(method: Method, calibrated: bool) -> QuantScheme:
    if not isinstance(method, LLMInt8):
        return DEFAULT_SCHEME
    return replace(LLM_INT8_SCHEME, inputs=InputScheme(static=calibrated))


def _static_or_not(
    scheme: QuantScheme, overrides: tuple[tuple[str, QuantScheme | None], ...]
) -> LLMInt8:
    """The method collects what the schemes ask for."""
    schemes = (scheme, *(other for _, other in overrides))
    return LLMInt8(any(s is not None and s.inputs is not None and s.inputs.static for s in schemes))


def _result(
    out: Path, plan: Plan, ledger: Ledger, verification: Verification, reused: bool = False
) -> Quantized:
    weights = sum(f["size_bytes"] for n, f in ledger.files.items() if n.endswith(".safetensors"))
    source = sum(plan.checkpoint.file_bytes.values())
    run = read_json(out / RUN) if (out / RUN).is_file() else {}  # no part of what was promised
    return Quantized(out, ledger, verification, weights, source, plan.parameters, run, reused)


def _describe_source(model: str | Path, plan: Plan) -> dict[str, Any]:
    """Which checkpoint it was: never a path of this machine."""
    checkpoint = plan.checkpoint
    sizes = {
        name: {"size_bytes": size, "header_bytes": checkpoint.header_bytes[name]}
        for name, size in checkpoint.file_bytes.items()
    }
    name = Path(model).resolve().name if Path(model).is_dir() else str(model)
    carried = {name: hash_file(checkpoint.folder / name) for name in carried_files(checkpoint.folder)}
    return {
        "name": name,
        "config_sha256": hash_json(checkpoint.config),
        "files": sizes,
        "carried": carried,
    }


def _describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {
            "size_bytes": path.stat().st_size,
            "sha256": hash_file(path),
        }
        for path in files
    }


def _reuse(out: Path, asked: dict[str, Any], plan: Plan, progress: Progress | None) -> Quantized:
    """Verify the finished result of the same run; refuse anything else."""
    ledger = read_ledger(out)
    held = {
        "fewbits": ledger.version,
        "request": ledger.request,
        "source": ledger.source,
        "made_with": ledger.made_with,
    }
    found = differences(_comparable(held), _comparable(asked))
    if found:
        raise InputError(
            f"{out} holds another run: {', '.join(found)}; {_ACCEPTED}, or --restart to throw it away"
        )
    verification = verify(out, plan.checkpoint.folder, progress)
    discard(out)  # of a process that was stopped between the last two steps
    return _result(out, plan, ledger, verification, reused=True)


def _comparable(asked: dict[str, Any]) -> dict[str, Any]:
    """Without where the source lay, and on which machine a finished result was made."""
    source = {k: v for k, v in asked["source"].items() if k != "name"}
    libraries = {k: v for k, v in asked["made_with"].items() if k in ("torch", "transformers")}
    return asked | {"source": source, "made_with": libraries}


class _Run:
    """The steps of a run, those of earlier processes first: tensors outside of the blocks, then blocks.

    Args:
        plan, recipe: what is done.
        data: calibration, if the recipe needs it.
        asked: see `_ask`.
        journal: where the steps are kept.
        max_memory: bytes.
        progress: called with (what, done, total).
    """

    def __init__(
        self,
        plan: Plan,
        recipe: Recipe,
        data: Calibration | None,
        asked: dict[str, Any],
        journal: Journal,
        max_memory: int | None,
        progress: Progress | None,
    ) -> None:
        self.plan, self.recipe, self.data, self.journal = plan, recipe, data, journal
        self.max_memory, self.progress = max_memory, progress
        checkpoint, shape = plan.checkpoint, None if data is None else tuple(data.ids.shape)
        budget = plan_memory(plan, recipe, shape, memory_bytes(), max_memory)  # type: ignore[arg-type]
        self.limits = budget.limits
        journal.begin(
            asked,
            self._choose,
            None if data is None else data.ids,
            2 * plan.written_bytes + self._states_bytes(),
        )
        self.limits = replace(self.limits, tokens=journal.choices["tokens"])
        notes = [Note(**note) for note in journal.choices["notes"]]
        self.ledger = Ledger(
            asked["fewbits"],
            asked["request"],
            asked["source"],
            notes=notes,
            made_with=asked["made_with"],
        )
        self.ledger.calibration = asked["request"].get("calibration", {})
        self.names: dict[int | None, list[str]] = defaultdict(list)
        for name in sorted(checkpoint.tensors.keys() | plan.origins.keys(), key=_natural):
            self.names[plan.blocks.get(name)].append(name)

    def _choose(self) -> dict[str, Any]:
        """What an earlier process would have settled: how much is run at a time, and what was found."""
        notes = list(self.plan.notes)
        if self.data is not None:
            notes += self.data.notes + tuple(_check_calibration(self.plan, self.data))
        return {
            "tokens": self.limits.tokens,
            "notes": [asdict(note) for note in notes],
            "modified": _modified(self.plan),
        }

    def _states_bytes(self) -> int:
        """Of disk: those that were, those that are, those that will be."""
        if self.data is None:
            return 0
        samples, length = self.data.ids.shape
        return 3 * states_bytes(samples, length, self.plan.hidden_size)

    def steps(self) -> Ledger:
        """Do what is left, and say in the ledger what became of everything."""
        for value in self.journal.steps:
            self._take_over(value)
        if self.journal.resumed:
            self._check_source()
        numbers = [None, *sorted(n for n in self.names if n is not None)]
        if not self.journal.steps:
            self._outside()
        if self.data is None:
            self._without_data(numbers)
        else:
            self._with_data(numbers)
        self.plan.checkpoint.close()
        self.ledger.notes += _outlier_notes(self.ledger)
        return self.ledger

    # -- steps that are done ---------------------------------------------------------------------

    def _take_over(self, value: dict[str, Any]) -> None:
        """A step of an earlier process; its schemes are those that were really used."""
        for name, stated in value["tensors"].items():
            entry = self.ledger.tensors[name] = read_entry(stated)
            if entry.quantized is not None:
                scheme, place = QuantScheme.parse(entry.quantized.scheme), self.plan.placements[name]
                if scheme != place.scheme:
                    self.plan.placements[name] = replace(place, scheme=scheme)
        self.ledger.notes += [Note(**note) for note in value["notes"]]
        self.ledger.blocks += [] if value["block"] is None else [value["block"]]

    def _check_source(self) -> None:
        """Where its files were touched since, what was read of them must still be the same."""
        if _modified(self.plan) == self.journal.choices["modified"]:
            return
        for name, entry in self.ledger.tensors.items():
            if hash_tensor(self.plan.checkpoint.read(entry.origin or name)) != entry.sha256:
                raise InputError(
                    f"{self.plan.checkpoint.folder} was changed since the run began: {name} has other "
                    "values; accepted are the same weights, or --restart"
                )

    def _commit(
        self, names: list[str], notes: list[Note], block: Block | None = None, states: bool = False
    ) -> None:
        """A step that is finished goes to the journal, and from there to the ledger."""
        value = {
            "tensors": {name: asdict(self.ledger.tensors[name]) for name in names},
            "notes": [asdict(note) for note in notes],
            "block": None if block is None else block.report.to_json(),
            "wirings": {} if block is None else {k: asdict(w) for k, w in block.wirings.items()},
        }
        self.journal.commit_step(value, states)
        self.ledger.notes += notes
        self.ledger.blocks += [] if block is None else [plain(block.report.to_json())]

    # -- steps to be done ------------------------------------------------------------------------

    def _outside(self) -> None:
        """What stands outside of the blocks."""
        notes: list[Note] = []
        for name in self.names[None]:
            weights = None
            if name in self.plan.placements:
                method = self.recipe.method
                if self.data is not None:
                    _without_calibration(name, self.plan)
                    method = RTN()
                    what = "outside of the blocks: rounded to nearest, without calibration"
                    notes.append(Note("fallback", name, what))
                weights = _round(name, self.plan, method, notes)
            self._write_one(name, weights, None, notes)
        self._commit(self.names[None], notes)

    def _without_data(self, numbers: list[int | None]) -> None:
        """Round and write one source tensor after the other."""
        total = sum(len(names) for names in self.names.values())
        for number in numbers[len(self.journal.steps) :]:
            notes: list[Note] = []
            for name in self.names[number]:
                placed = name in self.plan.placements
                weights = _round(name, self.plan, self.recipe.method, notes) if placed else None
                self._write_one(name, weights, None, notes)
                if self.progress is not None:
                    self.progress("quantize", len(self.ledger.tensors), total)
            self._commit(self.names[number], notes)

    def _with_data(self, numbers: list[int | None]) -> None:
        """Write each block as soon as it is done."""
        assert self.data is not None
        done = len(self.journal.steps) - 1
        if done == len(numbers) - 1:
            return
        wirings = {
            kind: Wiring.from_json(stated)
            for value in self.journal.steps
            for kind, stated in value["wirings"].items()
        }
        start = Position(done, self.journal.states(), wirings)
        blocks = quantize_blocks(
            self.plan,
            self.recipe,
            self.data.ids,
            self.progress,
            self.limits,
            self.journal.new_states,
            start,
        )
        for block in blocks:
            number = block.report.block
            notes = list(block.notes)
            for name in self.names[number]:
                weights, changed = block.weights.get(name), block.changed.get(name)
                if weights is not None and weights[0].scheme != self.plan.placements[name].scheme:
                    _without_calibration(name, self.plan)
                self._write_one(name, weights, changed, notes)
            self._commit(self.names[number], notes, block, states=number != numbers[-1])
            del block, weights, changed  # before the next one is made

    def _write_one(
        self,
        name: str,
        weights: list[QuantizedTensor] | None,
        changed: Tensor | None,
        notes: list[Note],
    ) -> None:
        """Write one source tensor as codes, rewritten, or as it is, and enter it in the ledger."""
        plan, journal = self.plan, self.journal
        tensor = plan.checkpoint.read(plan.origins.get(name, name))
        codes = None
        if weights is not None:
            stacked = plan.matrices[name].stacked
            stored = [plan.format.write(name, weight) for weight in weights]
            tensors = {
                key: torch.stack([s[key] for s in stored]) if stacked else stored[0][key]
                for key in stored[0]
            }
            _check_finite(name, tensors)
            written = [journal.add(key, value) for key, value in tensors.items()]
            codes = Codes.of(weights, stacked)
        else:
            value = tensor if changed is None else changed
            if changed is not None:
                _check_finite(name, {name: changed})
            elif tensor.is_floating_point() and not _finite(tensor):
                if name in plan.parameter_names:
                    raise InputError(f"{name} contains NaN or infinity; accepted are finite weights")
                notes.append(Note("fact", name, "holds NaN or infinity; copied as it is"))
            written = [journal.add(name, value)]
        self.ledger.tensors[name] = Entry.of(
            plan.info(name),
            hash_tensor(tensor),
            written,
            codes,
            folded=changed is not None,
            origin=plan.origins.get(name),
        )

    def check_forward(self, peak: int) -> list[Note]:
        """Run what was written, where nothing else has shown that it computes.

        Blocks that were judged have been run, with the very values that their codes stand for. Loading
        the whole takes memory: where there is too little of it, a note says that it was not done.
        """
        if self.data is not None:
            return []
        needed = memory_bytes() + int(_FORWARD * self.plan.written_bytes)
        most = available_bytes() + memory_bytes() if self.max_memory is None else self.max_memory
        if needed > most:
            what = "not run: loading it may take {:.2f} GB, more than there is; `fewbits verify` runs it"
            return [Note("skip", "forward", what.format(needed / 1e9))]
        check_forward(self.journal.result)
        return []


def _modified(plan: Plan) -> dict[str, int]:
    """When each weight file was last written."""
    checkpoint = plan.checkpoint
    return {f: (checkpoint.folder / f).stat().st_mtime_ns for f in checkpoint.file_bytes}


def _check_finite(name: str, tensors: dict[str, Tensor]) -> None:
    """Of what is to be written: a scale, or a scaled weight, may be more than its dtype holds."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not _finite(tensor):
            raise InputError(
                f"{key} would hold NaN or infinity: a value is beyond what {tensor.dtype} holds; "
                f"accepted is to leave {name} in float"
            )


def _without_calibration(name: str, plan: Plan) -> None:
    """Nobody has seen this weight's inputs: its outlier columns are found in each call."""
    placement = plan.placements[name]
    plan.placements[name] = replace(placement, scheme=placement.scheme.dynamic)


def _outlier_notes(ledger: Ledger) -> list[Note]:
    """In how many columns calibration found what the schemes ask for."""
    asked = {
        name: entry.quantized
        for name, entry in ledger.tensors.items()
        if entry.quantized is not None and "-static" in entry.quantized.scheme
    }
    rounds = any(
        "-a8-" in e.quantized.scheme for e in ledger.tensors.values() if e.quantized is not None
    )
    what = "errors and KL of the blocks leave out that inputs are rounded too"
    notes = [Note("fact", "blocks", what)] if rounds else []
    if not asked:
        return notes
    some = [name for name, codes in asked.items() if codes.outliers is not None]
    kept = sum(w.size_bytes for n in some for w in ledger.tensors[n].written if "_outlier" in w.name)
    whole = sum(ledger.tensors[name].size_bytes for name in asked)
    what = (
        f"{len(some)} of {len(asked)} weights keep columns in 16 bit, {kept / whole:.1%} of their bytes "
        "before; a higher threshold keeps fewer"
    )
    if not some:
        what = "no input was above the threshold: all columns are integers (plain W8A8)"
    return [*notes, Note("fact", "outliers", what)]


def _round(name: str, plan: Plan, method: Method, notes: list[Note]) -> list[QuantizedTensor]:
    """Round one source tensor, a matrix or a stack of them, without calibration."""
    tensor = plan.checkpoint.read(plan.origins.get(name, name))
    weights: list[QuantizedTensor] = []
    for piece in plan.matrices[name].slices(tensor):
        try:
            weight, more = method(piece, plan.placements[name].scheme, {})
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        weights.append(weight)
        notes += more
    return weights


# -- calibration -------------------------------------------------------------------------------


def _read_calibration(
    plan: Plan,
    recipe: Recipe,
    source: str | Path | Text | Tensor | Calibration | None,
    samples: int,
    length: int | None,
    seed: int,
    journal: Journal | None,
    progress: Progress | None,
) -> Calibration | None:
    """The samples that the recipe needs; None if it needs none.

    What a model has written itself is taken from the journal of an earlier process: it took long.
    """
    name = recipe.name
    if not recipe.needs_calibration:
        if source is not None:
            raise InputError(
                f"method {name} takes no calibration; accepted with it are gptq, awq, and llm-int8 "
                "whose threshold is above 0"
            )
        return None
    if source is None:
        raise InputError(
            f"method {name} needs calibration; accepted are a text file, a .jsonl file, "
            f"hub:owner/name/config:split:column, and {SELF} for text that the model writes itself"
        )
    given = isinstance(source, Tensor | Calibration)
    if samples < 2 and not given:
        raise InputError(f"--samples is {samples}; accepted are 2 or more, some of which are held out")
    read = partial(read_calibration_of, plan.checkpoint.folder, source, samples, length, seed, progress)
    if source != SELF or journal is None:
        return read()
    journal.keep = True
    ids, stated = journal.calibration(), (journal.earlier or {}).get("request", {})
    stated = stated.get("request", {}).get("calibration", {})
    wanted = {"source": SELF, "samples": samples, "seed": seed}
    same = all(stated.get(key) == value for key, value in wanted.items())
    if ids is None or not same or length not in (None, ids.shape[1]):
        return read()
    return Calibration(ids, SELF, seed)


def _describe_calibration(plan: Plan, data: Calibration) -> dict[str, Any]:
    """The data, and what the model is run in: both decide what comes out."""
    products = fast_dtype(plan.checkpoint.dtype) or torch.float32
    return data.to_json() | {"products": str(products).removeprefix("torch.")}


def _check_calibration(plan: Plan, data: Calibration) -> list[Note]:
    """Whether the data is enough, before the hours are spent."""
    matrices = [plan.matrices[name] for name in plan.placements]
    widths = {m.source: m.rows_columns[1] for m in matrices if m.kind != "expert"}
    experts = {m.source: m.rows_columns[1] for m in matrices if m.kind == "expert"}
    try:
        tokenizer = load_tokenizer(plan.checkpoint.folder)
    except InputError:
        tokenizer = None
    config = skeleton(plan.checkpoint.config).config
    # Loaded as a whole it must stay on the disk, mapped; experts are stacked into new memory.
    mapped = not experts and getattr(config, "dtype", None) in (None, plan.checkpoint.dtype)
    wanted = mapped and tokenizer is not None and data.source != SELF
    model = load(plan.checkpoint.folder) if wanted else None
    routing = _routing(plan) if experts else None
    unknown = Note(
        "skip", "calibration", "tokens per expert: the config does not tell how many are chosen"
    )
    return ([unknown] if experts and routing is None else []) + check_calibration(
        data,
        widths=widths or experts,
        experts=routing,
        tokenizer=tokenizer,
        model=model,
        expert_width=max(experts.values(), default=None),
    )


def _routing(plan: Plan) -> tuple[int, int] | None:
    """How many experts a block has, and how many of them a token is sent to; None if it is not told."""
    config = text_config(skeleton(plan.checkpoint.config))
    chosen = getattr(config, "num_experts_per_tok", None)
    shared = [m for m in plan.matrices.values() if m.kind == "expert"]
    counts = {m.shape[0] if m.stacked else (m.expert or 0) + 1 for m in shared}
    return (max(counts), chosen) if isinstance(chosen, int) and counts else None


def _finite(tensor: Tensor) -> bool:
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor.float() if tensor.dtype.itemsize == 1 else tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key: `layers.2` before `layers.10`."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def quantize_(
    model: nn.Module,
    scheme: QuantScheme,
    *,
    overrides: tuple[tuple[str, QuantScheme | None], ...] = (),
    head: bool = False,
) -> nn.Module:
    """Round every linear of a model to the nearest codes, in place; its output head stays in float.

    Takes any `nn.Module` with linears; in models of transformers also `Conv1D` and fused experts.

    Args:
        overrides: (pattern, scheme or None for float); see `Recipe`.
        head: quantize the output head too, apart from embeddings it may be tied to.

    Returns:
        The same model.

    Raises:
        InputError: the scheme does not fit a module, or a pattern matches none; the model is
            unchanged.

    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)).bfloat16()
    >>> quantize_(model, QuantScheme(8, "channel"), overrides=(("2", None),))
    Sequential(
      (0): QuantizedLinear(
        64, 32, w8-channel, int8pack
        (kernel): Int8Pack()
      )
      (1): ReLU()
      (2): Linear(in_features=32, out_features=4, bias=True)
    )
    """
    matrices = {matrix.source: matrix for matrix in _in_memory(model)}
    schemes = Recipe(RTN(), scheme, overrides, head).assign(matrices.values())
    made = {
        name: _replacement(model, matrices[name], chosen)
        for name, chosen in schemes.items()
        if chosen is not None
    }  # all of them before the first is put in place: an error leaves the model as it was
    for name, replacement in made.items():
        matrix = matrices[name]
        if isinstance(replacement, list):
            replace_experts(model.get_submodule(matrix.module), matrix.parameter, replacement)
        else:
            shared = model.get_submodule(matrix.module)
            places = [path for path, m in model.named_modules(remove_duplicate=False) if m is shared]
            for path in places:
                model.set_submodule(path, replacement)
    return model


def _in_memory(model: nn.Module) -> list[Matrix]:
    head = find_head(model)
    matrices = []
    for path, module in model.named_modules():
        if is_experts(module):
            for name in EXPERT_PARAMETERS:
                weight = getattr(module, name, None)
                if isinstance(weight, Tensor) and weight.ndim == 3:
                    shape, transposed = tuple(weight.shape), bool(module.is_transposed)
                    matrices.append(
                        Matrix(f"{path}.{name}", path, name, "expert", shape, transposed=transposed)
                    )
        elif is_linear(module) or is_conv1d(module):
            if not path:
                raise InputError("the model is itself a linear; use QuantizedLinear.from_float")
            kind: Kind = "conv1d" if is_conv1d(module) else "linear"
            matrices.append(
                Matrix(
                    f"{path}.weight",
                    path,
                    "weight",
                    kind,
                    tuple(module.weight.shape),
                    transposed=kind == "conv1d",
                    head=path == head,
                )
            )
    return matrices


def _replacement(
    model: nn.Module, matrix: Matrix, scheme: QuantScheme
) -> QuantizedLinear | list[QuantizedLinear]:
    module = model.get_submodule(matrix.module)
    try:
        if matrix.kind != "expert":
            return QuantizedLinear.from_float(module, scheme)
        weight = getattr(module, matrix.parameter).detach()
        return [
            QuantizedLinear(quantize_tensor(piece, scheme), None, weight.dtype, weight.device)
            for piece in matrix.slices(weight)
        ]
    except InputError as error:
        raise InputError(f"{matrix.source}: {error}") from None
