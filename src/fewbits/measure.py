"""measure(): a float model run once over its calibration, and what its linears read kept in a folder.

The model is streamed block by block, as `quantize` does it, and each block is a step of the journal.
Then gradients are taken back from the last block to the first, a step each, and tell what rounding each
matrix would cost (`sensitivity`). What lies in the folder is said in `statistics`.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.allocate import measured_schemes
from fewbits.blockwise import (
    blame_weight,
    block_kind,
    find_block_wiring,
    held_out_samples,
    searched_samples,
)
from fewbits.budget import input_widths, plan_memory
from fewbits.calibration import DEFAULT_SAMPLES, Calibration
from fewbits.checkpoint import MAX_SHARD_BYTES, RUN, Written, hash_tensor, read_json, resolve
from fewbits.errors import InputError
from fewbits.journal import Journal, discard, throw_away
from fewbits.learning import learned_samples
from fewbits.ledger import describe_files, describe_machine, describe_source, plain
from fewbits.linear import float_weight
from fewbits.load import find_device
from fewbits.memory import Memory, hand_back_memory, memory_bytes, watch_memory
from fewbits.methods import GPTQ
from fewbits.pieces import Piece, find_pieces
from fewbits.plan import Plan, make_plan
from fewbits.recipe import Recipe
from fewbits.scheme import QuantScheme
from fewbits.sensitivity import (
    Sensitivity,
    draw_back,
    error_weights,
    find_damage,
    find_fisher,
    find_lookup_costs,
    pull_back,
)
from fewbits.statistics import (
    STATISTICS,
    STEM,
    Input,
    InputStats,
    MeasuredBlock,
    Statistics,
    collect,
    divide_inputs,
    find_inputs,
    fisher_name,
    outside_name,
    pack_hessian,
    panel_values,
    read_statistics,
    tensor_name,
    unpack_hessian,
)
from fewbits.steps import (
    calibration_notes,
    check_same,
    check_unchanged,
    describe_calibration,
    modified,
    read_samples,
)
from fewbits.stream import CPU, TOKENS, Stream
from fewbits.structure import Matrix, find_head, find_tied_head
from fewbits.tensor import Note, is_finite
from fewbits.text import Text
from fewbits.transforms import AWQ
from fewbits.verify import Progress
from fewbits.wiring import ScalePair, Wiring

# All that may be asked of statistics later; with the memory that it would take to do it at once.
_RECIPE = Recipe(GPTQ(), QuantScheme(8), transforms=(AWQ(),))
_NEEDS = frozenset({"hessian", "absmax"})
_ACCEPTED = "accepted is a folder that does not exist yet, or the result of the same measurement"
KEPT_TOKENS = 16384  # whose states are kept for a pass from the last block to the first; not tuned
_DRAWN = 4096  # tokens that are drawn from the model's predictions on them, at most; not tuned
_DRAWN_OF_ONE = 512  # of one sample, whose logits are in memory together; not tuned
_DRAW_SEED = 0  # of that draw


@dataclass(frozen=True, slots=True)
class Measured:
    """A finished measurement.

    `run` says how long it took and how much memory; `reused` that the folder held it already.
    """

    statistics: Statistics
    run: dict[str, Any]
    reused: bool = False

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.statistics.folder

    @property
    def size_bytes(self) -> int:
        """Of the weight files."""
        return self.statistics.size_bytes

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        statistics = self.statistics
        return {
            "stats": str(self.folder),
            "sha256": statistics.sha256,
            "size_bytes": self.size_bytes,
            "blocks": len(statistics.blocks),
            "inputs": sum(len(block.inputs) for block in statistics.blocks),
            "calibration": statistics.calibration,
            "damage": statistics.damage,
            "run": self.run,
            "notes": [asdict(note) for note in statistics.notes],
            "reused": self.reused,
        }


def measure(
    model: str | Path,
    stats: str | Path,
    *,
    calibration: str | Path | Text | Tensor | Calibration,
    samples: int = DEFAULT_SAMPLES,
    length: int | None = None,
    seed: int = 0,
    max_memory: int | None = None,
    device: str | torch.device = "cpu",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    restart: bool = False,
    progress: Progress | None = None,
) -> Measured:
    """Run a float model over calibration once, and keep what any method needs to know of it.

    `quantize(..., statistics=stats)` then takes any method, bits and format without the text. For an
    input of n features the folder takes about 2 n^2 bytes: of a 7B Llama 11 GB, of the reference model
    14 MB. Whatever ends the process, the same call goes on after the last finished block.

    Args:
        model: folder of a float checkpoint, or a hub id.
        stats: folder to be made. If it holds the same measurement it is verified and left as it is.
        calibration: what the model is run on; see `read_calibration`, also for samples, length and seed.
        max_memory: bytes of anonymous memory that the process may take; refused where that cannot be.
        device: "cpu" or "cuda": where blocks are run.
        max_shard_bytes: of a weight file.
        restart: throw away what `stats` and the unfinished work beside it hold.
        progress: called with (what, done, total).

    Raises:
        InputError: nothing was written; or `stats` or the work beside it is another's.
        ResourceError: the disk failed, or has too little room; what is finished is kept.
        VerificationError: what was read back differs from what was written.

    >>> import tempfile, fewbits
    >>> ids = torch.randint(0, 500, (4, 32))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     stats = f"{folder}/stats"
    ...     blocks = len(measure("reference/model", stats, calibration=ids).statistics.blocks)
    ...     out = f"{folder}/out"
    ...     result = fewbits.quantize("reference/model", out, method="gptq", statistics=stats)
    >>> blocks, result.ledger.totals["quantized"]
    (6, 42)
    """
    began = time.monotonic()
    stats, source, place = Path(stats), resolve(model), find_device(device)
    _check_folder(stats, source)
    plan = make_plan(source, _RECIPE, "fewbits")
    with watch_memory() as memory:
        read = partial(read_samples, plan, samples, length, seed, progress)
        if restart:  # after all that may be refused
            calibration = read(calibration)
            throw_away(stats)
        if stats.exists():
            return _reuse(stats, _ask(plan, read(calibration), model, place))
        with Journal(stats) as journal:
            data = read(calibration, journal)
            asked = _ask(plan, data, model, place)
            run = Measurement(plan, data, asked, journal, max_memory, progress, KEPT_TOKENS, place)
            run.take()
            return run.finish(began, memory, max_shard_bytes)


def _check_folder(stats: Path, source: Path) -> None:
    """Refuse a folder that is there and not ours, or that holds the source."""
    own, where = stats.resolve(), source.resolve()
    if own == where or own in where.parents:
        raise InputError(f"{stats} is the source, or holds it; accepted is another folder")
    if stats.exists() and not (stats / STATISTICS).is_file():
        raise InputError(f"{stats} exists and holds no statistics; {_ACCEPTED}")


def _ask(plan: Plan, data: Calibration, model: str | Path, device: torch.device) -> dict[str, Any]:
    """All that decides what comes out, as JSON, as of a run of `quantize`."""
    if len(data.ids) < 2:
        raise InputError(
            f"calibration has {len(data.ids)} sample; accepted are 2 or more, 1 of them held out"
        )
    return {
        "fewbits": version("fewbits"),
        "request": plain({"calibration": describe_calibration(plan, data)}),
        "source": plain(describe_source(model, plan.checkpoint)),
        "made_with": describe_machine(device),
    }


def _reuse(stats: Path, asked: dict[str, Any]) -> Measured:
    """Verify the finished result of the same measurement; refuse anything else."""
    held = read_statistics(stats)
    check_same(held, asked, f"{stats} holds another measurement", _ACCEPTED)
    held.verify()
    discard(stats)  # of a process that was stopped between the last two steps
    return _result(stats, reused=True)


def _result(stats: Path, reused: bool = False) -> Measured:
    run = read_json(stats / RUN) if (stats / RUN).is_file() else {}  # no part of what was promised
    return Measured(read_statistics(stats), run, reused)


class Measurement:
    """The steps of a measurement: one for each block, those of earlier processes first.

    Steps behind those of the blocks may add a `damage` to their value and tensors of their own; what
    they find there of the forward pass are `inputs`, `hessian` and `states`, by number of block.

    Args:
        plan: of a run that would quantize every matrix.
        data: calibration.
        asked: all that decides what comes out, as JSON: fewbits, request, source, made_with.
        journal: where the steps are kept.
        max_memory: bytes.
        progress: called with (what, done, total).
        kept_tokens: at most so many of the first samples, at least one sample, whose states before each
            block and behind the last one are kept until the folder is finished; 0: none.
        device: where blocks are run.
    """

    def __init__(
        self,
        plan: Plan,
        data: Calibration,
        asked: dict[str, Any],
        journal: Journal,
        max_memory: int | None = None,
        progress: Progress | None = None,
        kept_tokens: int = 0,
        device: torch.device = CPU,
    ) -> None:
        self.device = device
        self.plan, self.asked, self.journal, self.progress = plan, plain(asked), journal, progress
        self.data, self.max_memory = data, max_memory
        samples, length = data.ids.shape
        self.held_out = held_out_samples(samples, length)
        self.fitted = data.ids[: samples - self.held_out]
        kept = max(1, kept_tokens // length) if kept_tokens else 0
        self.kept = min(kept, len(self.fitted))  # samples
        back = self.kept * length
        budget = plan_memory(plan, _RECIPE, (samples, length), memory_bytes(), max_memory, back)
        self.limits = budget.limits
        self.by_block: dict[int, list[Matrix]] = {}
        for matrix in plan.matrices.values():
            if matrix.block is not None and matrix.source in plan.placements:
                self.by_block.setdefault(matrix.block, []).append(matrix)
        state = 2 * length * plan.hidden_size  # bytes of a sample's; of its gradient twice as many
        count = 1 + max(plan.blocks.values(), default=0)
        needed = 2 * self.expected_bytes + state * self.kept * (count + 1)
        needed += state * max(3 * len(self.fitted), 2 * 2 * self.kept)  # there, or back
        journal.begin(asked, self._choose, data.ids, needed)

    @property
    def expected_bytes(self) -> int:
        """Of the weight files, from above."""
        widths = [n for found in input_widths(self.plan).values() for n in found]
        outside = [m.rows_columns[1] for m in self.plan.matrices.values() if m.block is None]
        outside *= 2 if self.kept else 0  # a head that is tied to its embedding has one of its own
        values = sum(panel_values(n) + n for n in widths) + sum(map(panel_values, outside))
        if self.kept:
            values += (1 + max(self.plan.blocks.values(), default=0)) * panel_values(
                self.plan.hidden_size
            )
        return self.fitted.nbytes + 4 * values

    def _choose(self) -> dict[str, Any]:
        """What an earlier process would have settled."""
        notes = [*self.data.notes, *calibration_notes(self.plan, self.data)]
        if self.limits.tokens != TOKENS:
            what = f"--max-memory: {self.limits.tokens} tokens at a time instead of {TOKENS}"
            notes.append(Note("fact", "memory", what))
        return {
            "tokens": self.limits.tokens,
            "notes": [asdict(note) for note in notes],
            "modified": modified(self.plan),
            "kept": self.kept,
        }

    @property
    def blocks(self) -> list[dict[str, Any]]:
        """Values of the steps that are blocks."""
        return [value for value in self.journal.steps if value.get("block") is not None]

    def inputs(self, number: int) -> tuple[Input, ...]:
        """What the linears of a block read."""
        found = self.blocks[number]["inputs"]
        return tuple(Input(tuple(i["linears"]), i["columns"], i["tokens"]) for i in found)

    def hessian(self, number: int, one: Input) -> Tensor:
        """Of what some linears of a block read, (in, in)."""
        panels = self.journal.read(tensor_name(number, one.linears, "hessian"))
        return unpack_hessian(panels, one.columns)

    def states(self, number: int) -> Tensor:
        """What a block was given, (samples, length, hidden) bfloat16, of the samples that are kept.

        Behind the last block stands what it gave.
        """
        return self.journal.read(f"{number}.states")

    # -- forward -----------------------------------------------------------------------------------

    def take(self) -> None:
        """Do the steps that are left."""
        journal, done = self.journal, len(self.blocks)
        self.kept = journal.choices["kept"]
        if journal.resumed:
            check_unchanged(self.plan, journal, self.plan.checkpoint, self._sources())
        count = 1 + max(self.plan.blocks.values())
        if done < count:
            self._run_forward(done, count)
        self._pull_back(count)
        self.plan.checkpoint.close()

    def _run_forward(self, done: int, count: int) -> None:
        """Run the blocks that are left."""
        journal = self.journal
        room = journal.states()
        shape = (*self.fitted.shape, self.plan.hidden_size)
        states = None if room is None else room.view(torch.bfloat16).view(shape)
        tokens = journal.choices["tokens"]
        new_states, checkpoint = journal.new_states, self.plan.checkpoint
        stream = Stream(checkpoint, self.fitted, 1, tokens, new_states, states, self.device)
        wirings = {kind: w for value in self.blocks for kind, w in value["wirings"].items()}
        known = {kind: Wiring.from_json(stated) for kind, stated in wirings.items()}
        what = f"blocks, statistics of up to {self.expected_bytes / 1e9:.3g} GB"
        for number in range(done, count):
            self._say(what, number, count)
            self._forward(stream, number, number == count - 1, known)
        self._say(what, count, count)

    def _say(self, what: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(what, done, total)

    def _forward(self, stream: Stream, number: int, last: bool, known: dict[str, Wiring]) -> None:
        """Look at what the linears of one block read, and take the samples through it."""
        journal = self.journal
        if number == 0:
            samples, length = self.data.ids.shape
            fitted = samples - self.held_out
            found = self.data.ids[
                : max(searched_samples(samples, length), learned_samples(fitted, length))
            ]
            journal.add("ids", torch.cat([found, self.data.ids[samples - self.held_out :]]))
        if self.kept:
            journal.add(f"{number}.states", stream.states[: self.kept])
        block = stream.load(number)
        kind, new = block_kind(block), {}
        if kind not in known:
            known[kind] = new[kind] = find_block_wiring(stream, number, block, with_pairs=True)
        pieces = find_pieces(self.by_block.get(number, []), f"{stream.path}.{number}.")
        inputs = find_inputs(block, known[kind], pieces)
        passes = divide_inputs(block, inputs, self.limits.statistics_bytes)
        into = None if last else journal.new_states(stream.states.nbytes)
        states = None if into is None else into.view(torch.bfloat16).view(stream.states.shape)
        measured: list[Input] = []
        for i, some in enumerate(passes):
            goes_on = states if i == len(passes) - 1 else None
            stats = collect(stream, number, block, some, _NEEDS, range(len(self.fitted)), goes_on)
            measured += self._keep(number, stats)
            del stats  # the largest there is
        if last and self.kept:
            output = torch.empty_like(stream.states[: self.kept])
            stream.advance(number, block, range(self.kept), output)
            self._check_finite(number, output)
            journal.add(f"{number + 1}.states", output)
        if states is not None:
            for rows in stream.batches(range(len(self.fitted))):
                self._check_finite(number, states[rows])
            stream.states = states
        self._commit(number, kind, measured, new, states is not None)
        del block
        hand_back_memory()

    def _keep(self, number: int, stats: dict[tuple[str, ...], InputStats]) -> list[Input]:
        """Write statistics, and drop each as soon as it is written."""
        found = []
        for linears in list(stats):
            stat = stats.pop(linears)
            assert stat.hessian is not None
            assert stat.absmax is not None
            self._check_finite(number, stat.hessian)
            self.journal.add(tensor_name(number, linears, "hessian"), pack_hessian(stat.hessian))
            self.journal.add(tensor_name(number, linears, "absmax"), stat.absmax)
            found.append(Input(linears, len(stat.absmax), stat.tokens))
        return found

    def _check_finite(self, number: int, tensor: Tensor) -> None:
        if is_finite(tensor):
            return
        blame_weight(self.plan, number)
        raise InputError(
            f"block {number} of {self.plan.checkpoint.folder} gives NaN or infinity in float; accepted "
            "are models that compute"
        )

    def _commit(
        self,
        number: int,
        kind: str,
        inputs: list[Input],
        wirings: dict[str, Wiring],
        states: bool,
    ) -> None:
        plan, wanted = self.plan, {number, None} if number == 0 else {number}
        names = [name for name in plan.checkpoint.tensors if plan.blocks.get(name) in wanted]
        value = {
            "block": number,
            "kind": kind,
            "inputs": [asdict(one) for one in inputs],
            "wirings": {kind: asdict(wiring) for kind, wiring in wirings.items()},
            "sources": {name: hash_tensor(plan.checkpoint.read(name)) for name in sorted(names)},
        }
        self.journal.commit_step(value, states)

    # -- backward ----------------------------------------------------------------------------------

    def _pull_back(self, count: int) -> None:
        """Take gradients from the predictions to the first block, as far as that is left."""
        journal, done = self.journal, len(self.journal.steps) - count
        if not self.kept or done > count:
            return
        ids = self.fitted[: self.kept]
        every = max(1, ids.numel() // _DRAWN, ids.shape[1] // _DRAWN_OF_ONE)
        tokens = journal.choices["tokens"]
        states = self.states(count - done)
        stream = Stream(self.plan.checkpoint, ids, every, tokens, states=states, device=self.device)
        stream.loaded.clear()  # the first block, which comes last here
        what = "blocks back, what rounding costs"
        for number in range(count - done, -1, -1):
            self._say(what, count - number, count)
            self._step_back(stream, number, number == count)
            hand_back_memory()
        self._say(what, count, count)

    def _step_back(self, stream: Stream, number: int, first: bool) -> None:
        """Draw from the predictions, or go through one block; what it maps is let go with it."""
        journal, shape = self.journal, (*stream.ids.shape, self.plan.hidden_size)
        into = None if number == 0 else journal.new_states(4 * math.prod(shape))
        gradients = None if into is None else into.view(torch.float32).view(shape)
        stream.states = torch.empty(0)  # let go before others are read
        stream.states = self.states(number)
        if first:
            assert gradients is not None
            value = self._draw_back(stream, gradients)
        else:
            room = journal.states()
            assert room is not None
            value = self._block_back(stream, number, room.view(torch.float32).view(shape), gradients)
        journal.commit_step(value, into is not None)

    def _draw_back(self, stream: Stream, gradients: Tensor) -> dict[str, Any]:
        """Draw from the predictions; what rounding the head would cost."""
        generator = torch.Generator().manual_seed(_DRAW_SEED)
        states = stream.states
        positions, found = draw_back(stream, lambda rows: states[rows], generator, gradients)
        damage: dict[str, dict[str, float]] = {}
        for name in self._heads(stream):
            if found is not None and found.linears[0] in found.rows:
                rows, weight = found.rows[found.linears[0]], self._head(stream)
                self.journal.add(outside_name(name), pack_hessian(found.hessian))
                damage[name] = self._damage(weight, rows, error_weights(found.hessian))
        cost = 0.0 if found is None else sum(float(rows.sum()) for rows in found.rows.values())
        return {"drawn": positions, "damage": damage, "cost": cost}

    def _heads(self, stream: Stream) -> list[str]:
        """Names of the output head's tensor: its own, or the one it would have were it not tied."""
        path = find_tied_head(stream.network)
        names = [m.source for m in self.plan.matrices.values() if m.head]
        return names or ([] if path is None else [f"{path}.weight"])

    def _head(self, stream: Stream) -> Tensor:
        weight = stream.shell.get_submodule(find_head(stream.network)).weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    def _block_back(
        self, stream: Stream, number: int, given: Tensor, gradients: Tensor | None
    ) -> dict[str, Any]:
        """Take gradients through one block; what rounding each of its matrices would cost."""
        drawn = next(v["drawn"] for v in self.journal.steps if "drawn" in v)
        fisher = find_fisher(given, drawn)
        self.journal.add(fisher_name(number), pack_hessian(fisher))
        del fisher
        states, block = stream.states, stream.load(number)
        wanted = torch.empty_like(given) if number == 0 else gradients
        prefix = f"{stream.path}.{number}."
        pieces = find_pieces(self.by_block.get(number, []), prefix)
        inputs = [one.linears for one in self.inputs(number)]
        passes = divide_inputs(block, inputs, self.limits.statistics_bytes)
        damage: dict[str, dict[str, float]] = {}
        folded: dict[str, dict[str, float]] = {}
        pairs = self._wiring(number).pairs
        for i, some in enumerate(passes):
            into = wanted if i == len(passes) - 1 else None
            found = pull_back(stream, number, block, some, lambda rows: states[rows], given, drawn, into)
            for linears in list(found):
                one = found.pop(linears)
                self._complete(number, one)
                self._add_damage(block, pieces, one, damage)
                scales = _fold(block, pairs, one)
                if scales is not None:
                    one.hessian.div_(scales).div_(scales[:, None])
                    self._add_damage(block, pieces, one, folded, scales)
        if wanted is not None and not is_finite(wanted):
            blame_weight(self.plan, number)
            raise InputError(
                f"the gradient of block {number} of {self.plan.checkpoint.folder} holds NaN or "
                "infinity; accepted are models that compute"
            )
        if number == 0 and wanted is not None:
            self._add_embedding(stream, wanted, drawn, damage)
        return {"damage": damage, "folded": folded}

    def _complete(self, number: int, found: Sensitivity) -> None:
        """Fewer tokens than columns, as of experts, are filled up by those of the forward pass."""
        columns, seen = len(found.hessian), found.tokens // len(found.linears)
        if seen >= columns:
            return
        (one,) = (i for i in self.inputs(number) if i.linears == found.linears)
        other = self.hessian(number, one).to(found.hessian.device)
        own, whole = (float(h.diagonal().sum()) for h in (found.hessian, other))
        size = own / whole if own > 0 and whole > 0 else 1.0
        found.hessian.mul_(seen / columns).add_(other, alpha=size * (columns - seen) / columns)

    def _add_damage(
        self,
        block: nn.Module,
        pieces: dict[str, list[Piece]],
        found: Sensitivity,
        damage: dict[str, dict[str, float]],
        scales: Tensor | None = None,
    ) -> None:
        """Of the matrices that linears which read one tensor are made of; of a stack the sum.

        Args:
            block: that they are in.
            pieces: by linear.
            found: what their errors cost.
            damage: by source name and label, to be added to.
            scales: (in,), that columns of the weights are multiplied by before.
        """
        columns = error_weights(found.hessian)
        for path in found.linears:
            weight = float_weight(block.get_submodule(path))
            weight = weight if scales is None else weight * scales
            # An expert that no token was sent to adds nothing to a mean over tokens.
            rows = found.rows.get(path, torch.zeros(len(weight), device=weight.device))
            for piece in pieces[path]:
                own = slice(piece.start, piece.stop)
                nats = self._damage(weight[own], rows[own], columns)
                total = damage.setdefault(piece.source, dict.fromkeys(nats, 0.0))
                for label, value in nats.items():
                    total[label] += value

    def _damage(self, weight: Tensor, rows: Tensor, columns: Tensor) -> dict[str, float]:
        schemes = measured_schemes(weight.shape[1])
        return find_damage(weight, rows, columns, schemes, self.plan.checkpoint.dtype)

    def _add_embedding(
        self,
        stream: Stream,
        gradients: Tensor,
        drawn: int,
        damage: dict[str, dict[str, float]],
    ) -> None:
        """What rounding the embedding would cost, and with it a head that is tied to it."""
        tied = find_tied_head(stream.network)
        for name in (m.source for m in self.plan.matrices.values() if m.kind == "embedding"):
            weight = self.plan.checkpoint.read(name)
            lookup = find_lookup_costs(stream, weight, gradients, drawn)
            hessian = torch.diag(lookup.costs.sum(0))
            head = f"{tied}.weight"
            found = self._found_damage().get(head, {})
            if found:  # errors of a row are read twice: as it is looked up, and by the head
                cost = next(v["cost"] for v in self.journal.steps if "cost" in v)
                panels = self.journal.read(outside_name(head))
                hessian += cost * unpack_hessian(panels, weight.shape[1])
            self.journal.add(outside_name(name), pack_hessian(hessian))
            schemes, dtype = measured_schemes(weight.shape[1]), self.plan.checkpoint.dtype
            columns = error_weights(hessian)
            nats = lookup.damage(weight, columns, schemes, dtype)
            damage[name] = {label: value + found.get(label, 0.0) for label, value in nats.items()}

    def _found_damage(self, kind: str = "damage") -> dict[str, dict[str, float]]:
        return {n: d for value in self.journal.steps for n, d in value.get(kind, {}).items()}

    def _wiring(self, number: int) -> Wiring:
        kind = self.blocks[number]["kind"]
        return Wiring.from_json(next(v["wirings"][kind] for v in self.blocks if kind in v["wirings"]))

    # -- the folder --------------------------------------------------------------------------------

    def _sources(self) -> dict[str, str]:
        return {name: s for value in self.blocks for name, s in value["sources"].items()}

    def finish(self, began: float, memory: Memory, max_shard_bytes: int) -> Measured:
        """Make the folder of all steps, read it back, and move it to its place.

        Args:
            began: `time.monotonic()` when the run began.
            memory: of this process, while it is watched.
            max_shard_bytes: of a weight file.
        """
        journal = self.journal
        journal.write_shards(max_shard_bytes, STEM, _is_kept)
        statistics = self._statistics()
        journal.write_json(STATISTICS, statistics.to_json())
        read_statistics(journal.result).verify()
        elapsed = round(time.monotonic() - began, 3)
        facts = {"elapsed_s": elapsed, "memory_bytes": asdict(memory), "max_memory": self.max_memory}
        journal.write_json(RUN, facts | {"resumed_steps": journal.resumed})
        journal.commit()
        return _result(journal.out)

    def _statistics(self) -> Statistics:
        journal, asked = self.journal, self.asked
        wirings: dict[str, Any] = {}
        for value in journal.steps:
            wirings |= value.get("wirings", {})
        kinds = [value["kind"] for value in self.blocks]
        blocks = [MeasuredBlock(kind, self.inputs(i)) for i, kind in enumerate(kinds)]
        tensors: dict[str, Written] = {w.name: w for w in journal.written if _is_kept(w.name)}
        return Statistics(
            journal.result,
            asked["fewbits"],
            asked["request"],
            asked["source"],
            asked["made_with"],
            self.held_out,
            {kind: Wiring.from_json(wiring) for kind, wiring in wirings.items()},
            tuple(blocks),
            self._sources(),
            tensors,
            describe_files(journal.result),
            self._found_damage(),
            self._found_damage("folded"),
            tuple(Note(**note) for note in journal.choices["notes"]),
        )


def _fold(block: nn.Module, pairs: Sequence[ScalePair], found: Sensitivity) -> Tensor | None:
    """What AWQ would multiply columns by, half way between inputs and weights; None: nothing can.

    Outliers that were moved between a norm and its readers are moved back by it, whatever the exponent.
    """
    if not any(set(found.linears) <= set(pair.readers) for pair in pairs):
        return None
    x = found.hessian.diagonal().clamp(min=0).sqrt()
    w = sum(float_weight(block.get_submodule(path)).abs().sum(0) for path in found.linears)
    ratio = x / w
    usable = torch.isfinite(ratio) & (ratio > 0)
    return torch.where(usable, ratio, torch.ones_like(ratio)).sqrt()


def _is_kept(name: str) -> bool:
    """Of the tensors of all steps, those that the finished folder has: not states."""
    return not name.endswith(".states")
