"""The steps of a run, one block each: those of earlier processes are taken over, the rest is done."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.blockwise import Block, Position, quantize_blocks, states_bytes
from fewbits.budget import plan_memory
from fewbits.calibration import SELF, Calibration, check_calibration
from fewbits.checkpoint import Checkpoint, Written, hash_tensor
from fewbits.errors import InputError
from fewbits.evaluate import load_tokenizer, read_calibration_of
from fewbits.journal import Journal, differences
from fewbits.ledger import Codes, Entry, Ledger, comparable, plain, read_entry
from fewbits.load import check_forward, load
from fewbits.memory import available_bytes, memory_bytes
from fewbits.methods import RTN, round_held
from fewbits.plan import Plan
from fewbits.recipe import Recipe
from fewbits.scheme import QuantScheme
from fewbits.statistics import Statistics
from fewbits.stream import CPU, TOKENS, fast_dtype
from fewbits.structure import skeleton, text_config
from fewbits.tensor import Note, QuantizedTensor, is_finite
from fewbits.text import Text
from fewbits.verify import Progress
from fewbits.wiring import Wiring

_OUTSIDE_VALUES = 2**24  # of a head or an embedding, rounded at a time; not tuned
_FORWARD = 1.5  # times the bytes that are written, to load them and run them on a few tokens; rough


class Steps:
    """The steps of a run, those of earlier processes first: tensors outside of the blocks, then blocks.

    Args:
        plan, recipe: what is done.
        data: calibration, if the recipe needs it.
        asked: all that decides what comes out, as JSON: fewbits, request, source, made_with.
        journal: where the steps are kept.
        max_memory: bytes.
        progress: called with (what, done, total).
        statistics: that were measured before; then `data` is what they keep of their samples.
        device: where blocks are run and matrices rounded.
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
        statistics: Statistics | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.device = device
        self.plan, self.recipe, self.data, self.journal = plan, recipe, data, journal
        self.max_memory, self.progress, self.statistics = max_memory, progress, statistics
        self.stored = plan.checkpoint  # what the entries of the ledger speak of
        shape = None if data is None else tuple(data.ids.shape)
        shape = shape if statistics is None else statistics.shape
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
        self._entered: dict[str, Entry] = {}  # of the step that is being done
        self.names = plan.names()

    def _choose(self) -> dict[str, Any]:
        """What an earlier process would have settled: how much is run at a time, and what was found."""
        notes = list(self.plan.notes)
        if self.statistics is not None:
            what = "collected on the float model: later blocks are not fitted to what earlier ones give"
            notes += (Note("fact", "statistics", what), *self.statistics.notes)
        elif self.data is not None:
            notes += self.data.notes + tuple(calibration_notes(self.plan, self.data))
        if self.limits.tokens != TOKENS:
            what = f"--max-memory: {self.limits.tokens} tokens at a time instead of {TOKENS}"
            notes.append(Note("fact", "memory", what))
        return {
            "tokens": self.limits.tokens,
            "notes": [asdict(note) for note in notes],
            "modified": modified(self.plan),
        }

    def _states_bytes(self) -> int:
        """Of disk: those that were, those that are, those that will be."""
        if self.data is None:
            return 0
        samples, length = self.data.ids.shape
        held_out = None if self.statistics is None else self.statistics.held_out
        return 3 * states_bytes(samples, length, self.plan.hidden_size, held_out)

    def take(self) -> Ledger:
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
        """What was read of it must still be the same."""
        read = {entry.origin or name: entry.sha256 for name, entry in self.ledger.tensors.items()}
        check_unchanged(self.plan, self.journal, self.stored, read)

    def _commit(self, notes: list[Note], block: Block | None = None, states: bool = False) -> None:
        """A step that is finished goes to the journal, and from there to the ledger."""
        value = {
            "tensors": {name: asdict(entry) for name, entry in self._entered.items()},
            "notes": [asdict(note) for note in notes],
            "block": None if block is None else block.report.to_json(),
            "wirings": {} if block is None else {k: asdict(w) for k, w in block.wirings.items()},
        }
        self.journal.commit_step(value, states)
        self.ledger.tensors |= self._entered
        self._entered = {}
        self.ledger.notes += notes
        self.ledger.blocks += [] if block is None else [plain(block.report.to_json())]

    # -- steps to be done ------------------------------------------------------------------------

    def _outside(self) -> None:
        """What stands outside of the blocks."""
        notes: list[Note] = []
        for name in self.names[None]:
            if self.data is not None and name in self.plan.placements:
                _without_calibration(name, self.plan)
                if not self._stats_outside(name):
                    what = "outside of the blocks: rounded to nearest, without calibration"
                    notes.append(Note("fallback", name, what))
                if self.plan.matrices[name].kind == "embedding":
                    notes.append(Note("fact", name, "the blocks are calibrated on its floats"))
            self._write_one(name, self._round(name, notes), None, notes)
        self._commit(notes)

    def _stats_outside(self, name: str) -> dict[str, Tensor]:
        """What statistics know of a matrix outside of the blocks, as far as the method asks for it."""
        if self.statistics is None or self.recipe.method.needs != {"hessian"}:
            return {}
        hessian = self.statistics.outside(name, self.plan.matrices[name].rows_columns[1])
        return {} if hessian is None else {"hessian": hessian.to(self.device)}

    def _round(self, name: str, notes: list[Note]) -> list[QuantizedTensor] | None:
        """Round one source tensor outside of the blocks, or without calibration; None: no matrix."""
        plan = self.plan
        if name not in plan.placements:
            return None
        stats = self._stats_outside(name)
        method = RTN() if self.data is not None and not stats else self.recipe.method
        tensor, scheme = plan.checkpoint.read(plan.origins.get(name, name)), plan.placements[name].scheme
        scales = plan.format.scales(tensor.dtype)
        weights: list[QuantizedTensor] = []
        for piece in plan.matrices[name].slices(tensor):
            # Rows of a head or an embedding, which are many, do not touch each other.
            whole = not stats or scheme.two_level or scheme.granularity == "tensor"
            step = len(piece) if whole else max(1, _OUTSIDE_VALUES // piece.shape[1])
            parts = []
            for rows in torch.split(piece, step):
                try:
                    own = rows.to(self.device)
                    part, more = round_held(method, own, scheme, stats, scales.dtype, scales.least)
                except InputError as error:
                    raise InputError(f"{plan.place(name)}: {error}") from None
                parts.append(part.to(CPU))
                notes += [replace(note, where=name) for note in more]
            weights.append(QuantizedTensor.concatenate(parts))
        return weights

    def _without_data(self, numbers: list[int | None]) -> None:
        """Round and write one source tensor after the other."""
        total, steps = sum(len(names) for names in self.names.values()), len(self.journal.steps)
        done = sum(len(self.names[number]) for number in numbers[:steps])
        for number in numbers[steps:]:
            notes: list[Note] = []
            for name in self.names[number]:
                self._write_one(name, self._round(name, notes), None, notes)
                done += 1
                if self.progress is not None:
                    self.progress("quantize", done, total)
            self._commit(notes)

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
            self.statistics,
            self.device,
        )
        for block in blocks:
            number = block.report.block
            notes = list(block.notes)
            for name in self.names[number]:
                weights, changed = block.weights.get(name), block.changed.get(name)
                if weights is not None and weights[0].scheme != self.plan.placements[name].scheme:
                    _without_calibration(name, self.plan)
                self._write_one(name, weights, changed, notes)
            self._commit(notes, block, states=number != numbers[-1])
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
        codes = None
        if weights is not None:
            stacked = plan.matrices[name].stacked
            weights = [plan.format.held(weight) for weight in weights]
            stored = [plan.format.write(name, weight) for weight in weights]
            tensors = {
                key: torch.stack([s[key] for s in stored]) if stacked else stored[0][key]
                for key in stored[0]
            }
            _check_finite(name, tensors)
            written = [journal.add(key, value) for key, value in tensors.items()]
            codes = Codes.of(weights, stacked)
        else:
            value = plan.checkpoint.read(plan.origins.get(name, name)) if changed is None else changed
            if changed is not None:
                _check_finite(name, {name: changed})
            elif value.is_floating_point() and not is_finite(value):
                if name in plan.parameter_names:
                    raise InputError(
                        f"{plan.place(name)} contains NaN or infinity; accepted are finite weights"
                    )
                notes.append(Note("fact", name, "holds NaN or infinity; copied as it is"))
            written = [journal.add(name, value)]
        self._enter(name, written, codes, changed is not None)

    def _enter(self, name: str, written: list[Written], codes: Codes | None, folded: bool) -> None:
        """What became of a source tensor."""
        origin = self.plan.origins.get(name)
        held = hash_tensor(self.plan.checkpoint.read(origin or name))
        if self.statistics is not None:
            self.statistics.check_tensor(origin or name, held)
        self._entered[name] = Entry.of(
            self.plan.info(name),
            held,
            written,
            codes,
            folded=folded,
            origin=origin,
        )

    def check_forward(self) -> list[Note]:
        """Run what was written, where nothing else has shown that it computes.

        Blocks that were judged have been run, with the very values that their codes stand for. Loading
        the whole takes memory: where there is too little of it, a note says that it was not done.
        """
        if self.data is not None:
            return []
        needed = memory_bytes() + int(_FORWARD * self.plan.written_bytes)
        most = self.max_memory or memory_bytes() + available_bytes() // 2
        if needed > most:
            what = "not run: loading it may take {:.2f} GB, more than there is; `fewbits verify` runs it"
            return [Note("skip", "forward", what.format(needed / 1e9))]
        check_forward(self.journal.result)
        return []


def check_unchanged(plan: Plan, journal: Journal, stored: Checkpoint, hashes: dict[str, str]) -> None:
    """Where files of the source were touched since the run began, tensors must still be the same.

    Args:
        plan, journal: of the run.
        stored: the source.
        hashes: sha256 of the tensors that were read of it, by name.

    Raises:
        InputError: one is not.
    """
    if modified(plan) == journal.choices["modified"]:
        return
    for name, sha256 in hashes.items():
        if hash_tensor(stored.read(name)) != sha256:
            raise InputError(
                f"{stored.folder} was changed since the run began: {name} has other values; accepted "
                "are the same weights, or --restart"
            )


def check_same(held: Ledger | Statistics, asked: dict[str, Any], what: str, accepted: str) -> None:
    """Whether a finished result is that of the same request.

    Args:
        held: what it says of itself.
        asked: all that decides what comes out, as JSON.
        what: the folder, and what it would hold else.
        accepted: instead.

    Raises:
        InputError: it is not; the differences are named.
    """
    before = {
        "fewbits": held.version,
        "request": held.request,
        "source": held.source,
        "made_with": held.made_with,
    }
    found = differences(comparable(before), comparable(asked))
    if found:
        raise InputError(f"{what}: {', '.join(found)}; {accepted}, or --restart to throw it away")


def modified(plan: Plan) -> dict[str, int]:
    """When each weight file was last written."""
    checkpoint = plan.checkpoint
    return {f: (checkpoint.folder / f).stat().st_mtime_ns for f in checkpoint.file_bytes}


def _check_finite(name: str, tensors: dict[str, Tensor]) -> None:
    """Of what is to be written: a scale, or a scaled weight, may be more than its dtype holds."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not is_finite(tensor):
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


def read_samples(
    plan: Plan,
    samples: int,
    length: int | None,
    seed: int,
    progress: Progress | None,
    source: str | Path | Text | Tensor | Calibration,
    journal: Journal | None = None,
) -> Calibration:
    """Calibration samples for a model, as `read_calibration` says.

    What a model has written itself is taken from the journal of an earlier process: it took long.
    """
    given = isinstance(source, Tensor | Calibration)
    if samples < 2 and not given:
        raise InputError(f"--samples is {samples}; accepted are 2 or more, some of which are held out")
    found = None
    if isinstance(source, str) and source == SELF and journal is not None:
        found = _written_before(journal, samples, length, seed)
        journal.keep = True
    if found is not None:
        return found
    return read_calibration_of(plan.checkpoint.folder, source, samples, length, seed, progress)


def _written_before(journal: Journal, samples: int, length: int | None, seed: int) -> Calibration | None:
    """What the model wrote for an earlier process that asked for the same."""
    ids, stated = journal.calibration(), (journal.earlier or {}).get("request", {})
    stated = stated.get("request", {}).get("calibration", {})
    wanted = {"source": SELF, "samples": samples, "seed": seed}
    same = all(stated.get(key) == value for key, value in wanted.items())
    if ids is None or not same or length not in (None, ids.shape[1]):
        return None
    return Calibration(ids, SELF, seed)


def describe_calibration(plan: Plan, data: Calibration) -> dict[str, Any]:
    """The data, and what the model is run in: both decide what comes out."""
    products = fast_dtype(plan.checkpoint.dtype) or torch.float32
    return data.to_json() | {"products": str(products).removeprefix("torch.")}


def calibration_notes(plan: Plan, data: Calibration) -> list[Note]:
    """Whether the data is enough, before the hours are spent."""
    matrices = [m for n in plan.placements if (m := plan.matrices[n]).kind != "embedding"]
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
