"""The steps of a run, one block each: those of earlier processes are taken over, the rest is done."""

import secrets
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from fewbits.blockwise import (
    Block,
    Limits,
    Position,
    held_out_samples,
    quantize_blocks,
    states_bytes,
)
from fewbits.budget import plan_memory
from fewbits.calibration import SELF, Calibration, check_calibration
from fewbits.checkpoint import Checkpoint, Written, hash_file, hash_json, hash_tensor
from fewbits.disk import disk_errors
from fewbits.errors import InputError
from fewbits.evaluate import load_tokenizer, read_calibration_of
from fewbits.journal import HEAD, Journal, Others, Sheet, differences, force_states, map_bytes
from fewbits.learning import learned_samples
from fewbits.ledger import Codes, Entry, Ledger, comparable, describe_machine, plain, read_entry
from fewbits.load import check_forward, load
from fewbits.memory import available_bytes, memory_bytes
from fewbits.methods import RTN, round_held
from fewbits.plan import Plan
from fewbits.ranks import ALONE, KEPT, Ranks, share_out
from fewbits.recipe import Recipe
from fewbits.scheme import QuantScheme
from fewbits.statistics import Statistics
from fewbits.stream import CPU, TOKENS, fast_dtype
from fewbits.structure import skeleton, text_config
from fewbits.tensor import Note, QuantizedTensor, is_finite
from fewbits.text import Text
from fewbits.verify import Progress
from fewbits.wiring import Wiring

_LOOKED_UP_ROWS = 4096  # of an embedding in float32 at a time; not tuned
_OUTSIDE_VALUES = 2**24  # of a head or an embedding, rounded at a time; not tuned
SEEN_S = 30.0  # until a file server shows what another host has written; not tuned
_FORWARD = 1.5  # times the bytes that are written, to load them and run them on a few tokens; rough


@dataclass(slots=True)
class Said:
    """What one rank says of its share of a step.

    Args:
        entries: of the ledger, by their names; by the source tensor that was written.
        notes: by source tensor.
        step, states: what it forced to the disk; see `Others`.
    """

    entries: dict[str, dict[str, Entry]]
    notes: dict[str, list[Note]]
    step: str
    states: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """To be sent."""
        return {
            "entries": {
                name: {key: asdict(entry) for key, entry in own.items()}
                for name, own in self.entries.items()
            },
            "notes": {name: [asdict(note) for note in notes] for name, notes in self.notes.items()},
            "step": self.step,
            "states": self.states,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """What `to_json` gave."""
        entries = {
            name: {key: read_entry(entry) for key, entry in own.items()}
            for name, own in value["entries"].items()
        }
        notes = {name: [Note(**note) for note in notes] for name, notes in value["notes"].items()}
        return cls(entries, notes, value["step"], value["states"])


class Page:
    """What one rank writes of a step: source tensors as codes, rewritten or as they are.

    Args:
        plan, recipe: of the run.
        calibrated: whether the model is run; then matrices outside of the blocks are rounded without it.
        statistics: that were measured before.
        device: where matrices are rounded.
        add: writes a tensor.
    """

    def __init__(
        self,
        plan: Plan,
        recipe: Recipe,
        calibrated: bool,
        statistics: Statistics | None,
        device: torch.device,
        add: Callable[[str, Tensor], Written],
    ) -> None:
        self.plan, self.recipe, self.calibrated = plan, recipe, calibrated
        self.statistics, self.device, self.add = statistics, device, add
        self.entries: dict[str, dict[str, Entry]] = defaultdict(dict)
        self.notes: dict[str, list[Note]] = defaultdict(list)

    def said(self, step: str, states: dict[str, Any] | None) -> Said:
        """Of all that was written."""
        return Said(self.entries, self.notes, step, states)

    def fill(self, names: Iterable[str]) -> None:
        """Round, outside of the blocks or without calibration, and write."""
        for name in names:
            notes = self.notes[name]
            if self.calibrated and name in self.plan.placements:
                _without_calibration(name, self.plan)
                if not self._stats_outside(name):
                    what = "outside of the blocks: rounded to nearest, without calibration"
                    notes.append(Note("fallback", name, what))
                if self.plan.matrices[name].kind == "embedding":
                    what = "its codes" if self.recipe.learned else "its floats"
                    notes.append(Note("fact", name, f"the blocks are calibrated on {what}"))
            self._write(name, self._round(name, notes), None)

    def fill_block(self, names: Iterable[str], block: Block) -> None:
        """Write what became of the tensors of a block."""
        for name in names:
            self._write(name, block.weights.get(name), block.changed.get(name))

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
        method = RTN() if self.calibrated and not stats else self.recipe.method
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

    def _write(self, name: str, weights: list[QuantizedTensor] | None, changed: Tensor | None) -> None:
        """Write one source tensor as codes, rewritten, or as it is, and say what became of it."""
        plan = self.plan
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
            written = [self.add(key, value) for key, value in tensors.items()]
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
                self.notes[name].append(Note("fact", name, "holds NaN or infinity; copied as it is"))
            written = [self.add(name, value)]
        self._enter(name, written, codes, changed is not None)

    def _enter(self, name: str, written: list[Written], codes: Codes | None, folded: bool) -> None:
        """What became of a source tensor."""
        origin = self.plan.origins.get(name)
        held = hash_tensor(self.plan.checkpoint.read(origin or name))
        if self.statistics is not None:
            self.statistics.check_tensor(origin or name, held)
        self.entries[name][name] = Entry.of(
            self.plan.info(name),
            held,
            written,
            codes,
            folded=folded,
            origin=origin,
        )


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
        ranks: that do this together; the others `follow`.
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
        ranks: Ranks = ALONE,
    ) -> None:
        self.device, self.ranks = device, ranks
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
        fitted = samples - (held_out_samples(samples, length) if held_out is None else held_out)
        learned = learned_samples(fitted, length) if self.recipe.learned else 0
        return 3 * states_bytes(samples, length, self.plan.hidden_size, held_out, learned)

    def take(self) -> Ledger:
        """Do what is left, and say in the ledger what became of everything."""
        for value in self.journal.steps:
            self._take_over(value)
        if self.journal.resumed:
            self._check_source()
        self._tell_others()
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
            self._note_scheme(name, entry)
        self.ledger.notes += [Note(**note) for note in value["notes"]]
        self.ledger.blocks += [] if value["block"] is None else [value["block"]]

    def _note_scheme(self, name: str, entry: Entry) -> None:
        """The plan says what was really used."""
        if entry.quantized is not None:
            scheme, place = QuantScheme.parse(entry.quantized.scheme), self.plan.placements[name]
            if scheme != place.scheme:
                self.plan.placements[name] = replace(place, scheme=scheme)

    def _check_source(self) -> None:
        """What was read of it must still be the same."""
        read = {entry.origin or name: entry.sha256 for name, entry in self.ledger.tensors.items()}
        check_unchanged(self.plan, self.journal, self.stored, read)

    def _page(self) -> Page:
        return Page(
            self.plan, self.recipe, self.data is not None, self.statistics, self.device, self.journal.add
        )

    def _commit(
        self, number: int | None, page: Page, block: Block | None = None, states: bool = False
    ) -> None:
        """A step that all ranks have finished goes to the journal, and from there to the ledger."""
        pages = [Said.from_json(value) for value in self.ranks.gather(page.said("", None).to_json())]
        whose = share_names(self.plan, self.names[number], self.ranks.count)
        entered = {k: e for name, rank in whose.items() for k, e in pages[rank].entries[name].items()}
        notes = [] if block is None else list(block.notes)
        notes += [note for name, rank in whose.items() for note in pages[rank].notes.get(name, [])]
        value = {
            "tensors": {name: asdict(entry) for name, entry in entered.items()},
            "notes": [asdict(note) for note in notes],
            "block": None if block is None else block.report.to_json(),
            "wirings": {} if block is None else {k: asdict(w) for k, w in block.wirings.items()},
        }
        written = [
            (rank, w)
            for name, rank in whose.items()
            for entry in pages[rank].entries[name].values()
            for w in entry.written
        ]
        others = [Others(said.step, said.states) for said in pages[1:]]
        self.journal.commit_step(value, states, others, written if others else None)
        self.ledger.tensors |= entered
        for name, entry in entered.items():
            self._note_scheme(name, entry)
        self.ledger.notes += notes
        self.ledger.blocks += [] if block is None else [plain(block.report.to_json())]

    # -- steps to be done ------------------------------------------------------------------------

    def _tell_others(self) -> None:
        """What the other ranks need to know to do their share."""
        journal, ids = self.journal, None if self.data is None else self.data.ids
        self.ranks.tell(
            {
                "do": "steps",
                "folder": str(journal.folder.resolve()),
                "request": hash_file(journal.folder / HEAD),
                "process": secrets.token_hex(4),
                "done": len(journal.steps),
                "states": journal.states_files,
                "wirings": self._wirings(),
                "limits": asdict(self.limits),
                "calibrated": ids is not None,
                "statistics": None if self.statistics is None else str(self.statistics.folder),
                "made_with": self.ledger.made_with,
                "format": self.plan.format.name,
                "allocation": {n: s and s.label for n, s in self.recipe.allocation.items()},
                "head": self.recipe.head,
                "embeddings": self.recipe.embeddings,
                "schemes": hash_schemes(self.plan),
            }
        )
        if ids is not None:
            self.ranks.tell_tensor(ids)

    def _wirings(self) -> dict[str, Any]:
        return {kind: w for value in self.journal.steps for kind, w in value["wirings"].items()}

    def _outside(self) -> None:
        """What stands outside of the blocks."""
        page = self._page()
        page.fill(share_of(self.plan, self.names[None], self.ranks))
        self._commit(None, page)

    def _without_data(self, numbers: list[int | None]) -> None:
        """Round and write one source tensor after the other."""
        total, steps = sum(len(names) for names in self.names.values()), len(self.journal.steps)
        done = sum(len(self.names[number]) for number in numbers[:steps])
        for number in numbers[steps:]:
            page, own = self._page(), share_of(self.plan, self.names[number], self.ranks)
            for i, name in enumerate(own):
                page.fill([name])
                if self.progress is not None and i + 1 < len(own):
                    self.progress("quantize", done + i + 1, total)
            self._commit(number, page)
            done += len(self.names[number])
            if self.progress is not None:
                self.progress("quantize", done, total)

    def _with_data(self, numbers: list[int | None]) -> None:
        """Write each block as soon as it is done."""
        assert self.data is not None
        done = len(self.journal.steps) - 1
        if done == len(numbers) - 1:
            return
        wirings = {kind: Wiring.from_json(stated) for kind, stated in self._wirings().items()}
        start = Position(done, self.journal.all_states(), wirings)
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
            self.ranks,
            self._looked_up() if done == 0 else None,
        )
        for block in blocks:
            number, page = block.report.block, self._page()
            page.fill_block(share_of(self.plan, self.names[number], self.ranks), block)
            self._commit(number, page, block, states=number != numbers[-1])
            del block  # before the next one is made

    def _looked_up(self) -> Tensor | None:
        """The embedding as it was written, where blocks learn to make up for what it lost."""
        plan, written = self.plan, {w.name for w in self.journal.written}
        names = [n for n in plan.placements if plan.matrices[n].kind == "embedding"]
        if self.recipe.learned is None or len(names) != 1:
            return None
        (name,) = names
        stored = [key for key in plan.format.tensors(name).every if key in written]
        tensors = {key: self.journal.read(key) for key in stored}
        held = plan.format.read(name, tensors, plan.placements[name].scheme)
        dtype = plan.checkpoint.dtype
        weight = torch.empty(held.shape, dtype=dtype)
        for start in range(0, len(weight), _LOOKED_UP_ROWS):
            rows = slice(start, start + _LOOKED_UP_ROWS)
            weight[rows] = held.rows(rows).dequantize(dtype)
        return weight

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


def share_names(plan: Plan, names: Iterable[str], count: int) -> dict[str, int]:
    """Which of so many ranks writes each source tensor of a step, by their sizes."""
    names = list(names)
    sizes = [float(plan.info(name).size_bytes) for name in names]
    return dict(zip(names, share_out(sizes, count), strict=True))


def share_of(plan: Plan, names: Iterable[str], ranks: Ranks) -> list[str]:
    """The source tensors of a step that this rank writes."""
    return [name for name, rank in share_names(plan, names, ranks.count).items() if rank == ranks.rank]


def hash_schemes(plan: Plan) -> str:
    """Of what becomes of each matrix: all ranks must have the same plan."""
    return hash_json({name: place.scheme.label for name, place in plan.placements.items()})


def follow(
    plan: Plan,
    recipe: Recipe,
    statistics: Statistics | None,
    device: torch.device,
    ranks: Ranks,
    told: dict[str, Any],
) -> None:
    """Do this rank's share of the steps that rank 0 leads.

    Args:
        plan, recipe, statistics, device: as rank 0 has them.
        ranks: of which this is not the first.
        told: what `Steps` told.

    Raises:
        InputError: this rank does not see what rank 0 sees, or would compute other bits.
    """
    folder, ids = Path(told["folder"]), ranks.tell_tensor(None) if told["calibrated"] else None
    _check_shared(folder, told, ranks)
    if told["schemes"] != hash_schemes(plan):
        raise InputError(f"rank {ranks.rank} has another plan than rank 0; accepted are the same files")
    made_with = {} if ids is None else describe_machine(device)
    found = differences(told["made_with"], plain(made_with))
    if found:
        text = ", ".join(found).replace(" was ", " of rank 0 is ").replace(" now", " here")
        raise InputError(f"rank {ranks.rank}: {text}; accepted are ranks that compute the same bits")
    names = plan.names()
    numbers = [None, *sorted(n for n in names if n is not None)]
    out = folder.parent / folder.name[1:].removesuffix(".partial")

    def new_sheet(step: int) -> Sheet:
        whose = f"{step:05}.{told['process']}-{ranks.rank}"
        return Sheet(out, folder / f"step-{whose}", folder / f"states-{whose}", KEPT)

    def new_page(sheet: Sheet) -> Page:
        return Page(plan, recipe, ids is not None, statistics, device, sheet.add)

    def finish(page: Page, sheet: Sheet, left_states: bool) -> None:
        with disk_errors(out, KEPT):
            sheet.force()
            states = force_states(sheet.states) if left_states else None
        ranks.gather(page.said(sheet.path.name, states).to_json())

    done = told["done"]
    for step in range(done, len(numbers) if ids is None else 1):
        sheet = new_sheet(step)
        page = new_page(sheet)
        page.fill(share_of(plan, names[numbers[step]], ranks))
        finish(page, sheet, False)
    if ids is None or done == len(numbers):
        return
    sheet = new_sheet(max(1, done))
    states = [map_bytes(folder / name, (folder / name).stat().st_size) for name in told["states"]]
    wirings = {kind: Wiring.from_json(stated) for kind, stated in told["wirings"].items()}

    def allocate(size: int) -> Tensor:
        return sheet.new_states(size)

    for block in quantize_blocks(
        plan, recipe, ids, None, Limits(**told["limits"]), allocate,
        Position(max(0, done - 1), states, wirings), statistics, device, ranks,
    ):  # fmt: skip
        page = new_page(sheet)
        page.fill_block(share_of(plan, names[block.report.block], ranks), block)
        finish(page, sheet, block.left_states)
        sheet = new_sheet(block.report.block + 2)
        del block, page


def _check_shared(folder: Path, told: dict[str, Any], ranks: Ranks) -> None:
    """Whether this rank sees the unfinished work that rank 0 has; a file server may take a moment."""
    until = time.monotonic() + SEEN_S
    head = folder / HEAD
    while not (head.is_file() and hash_file(head) == told["request"]):
        if time.monotonic() > until:
            raise InputError(
                f"rank {ranks.rank} on {socket.gethostname()} does not see {folder}; accepted is OUT on "
                "a file system that all ranks share, under the same path"
            )
        time.sleep(0.1)


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
