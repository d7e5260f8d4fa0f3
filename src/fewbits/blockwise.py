"""Calibrated quantization: block by block, each on what the quantized blocks before it really give.

For every block: rewrite it (`transforms`), collect the Hessians of all inputs in one run, or in several
where memory is short or weights make up for what was rounded before them (`drift`), round matrix after
matrix (`methods`), and take the samples through the rounded block. A block that came out much worse than
one rounded to nearest is rounded to nearest.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from hashlib import sha256
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.affine import choose_qparams, quantize
from fewbits.drift import make_up
from fewbits.errors import InputError
from fewbits.formats import ScaleRange
from fewbits.learning import BlockLearning, Samples, learned_samples
from fewbits.linear import ExpertLinears, float_weight
from fewbits.memory import hand_back_memory
from fewbits.methods import RTN, Method, Rounding, WeightedRTN, round_held
from fewbits.pieces import Piece, find_pieces
from fewbits.plan import Plan
from fewbits.ranks import ALONE, Ranks, share_out
from fewbits.recipe import Recipe
from fewbits.scheme import QuantScheme
from fewbits.statistics import (
    InputStats,
    Statistics,
    collect,
    divide_inputs,
    divide_samples,
    find_inputs,
    is_expert,
    share_absmax,
)
from fewbits.stream import CPU, TOKENS, Allocate, States, Stream
from fewbits.structure import Matrix
from fewbits.tensor import Note, QuantizedTensor, is_finite
from fewbits.trellis import CHAIN
from fewbits.wiring import Wiring, find_wiring, signature

_HELD_OUT = 32  # at most one sample in so many is kept for judging; not tuned
_JUDGED = 4096  # tokens that are kept for judging, and that transforms search with, at most; not tuned
_PROBE = 64  # tokens that the wiring is found with; not tuned
_COMPARED_ROWS = 128  # of each matrix, on which its error is compared with round to nearest; not tuned
_LENS = 256  # positions at which the logits after each block are compared; not tuned
KL_COPIES = 4  # of the logits of a sample that are in memory at a time
_EXPLODED = 4.0  # times the error of rounding to nearest, on held-out samples; not tuned

Folds = dict[str, list[Tensor]]  # by reader: what its columns were multiplied by, one after the other


@dataclass(frozen=True, slots=True)
class MatrixReport:
    """One rounded matrix.

    Args:
        name: source tensor; stacked experts have their number behind it.
        method: what was called to round it; `steps` say where it gave up for something simpler.
        scheme: label.
        tokens: that its Hessian was collected on.
        error_to_rtn: squared error of its output over that of rounding the same matrix to nearest (of
            the transformed one, where it was), estimated on some of its rows, on the calibration
            tokens; None without a Hessian.
        outliers: columns that are kept in 16 bit.
        steps: notes of the method: what it had to fall back to.
        error: squared error of its output over the squared output, on the same rows and tokens; None
            without a Hessian. Both errors are from the corrected weights, where those were.
        corrected: what was added to the weights, to make up for what was rounded before them, over the
            weights (Frobenius norms); None where nothing was.
    """

    name: str
    method: str
    scheme: str
    tokens: int
    error_to_rtn: float | None
    outliers: int = 0
    steps: tuple[str, ...] = ()
    error: float | None = None
    corrected: float | None = None


@dataclass(frozen=True, slots=True)
class BlockReport:
    """One block, on the held-out samples.

    Args:
        error: squared error of its output over the output's variance, both given the same states.
        nearest: the same error with all its matrices rounded to nearest instead.
        kl: divergence in nats, of the logits that the model's norm and head make of the states
            behind this block, from those that they make of the float model's. At the last block
            this is the KL of the quantized model with its head in float, and its inputs not rounded
            either. It holds the noise of bfloat16 states, and transforms chose what to fold on the
            same samples.
    """

    block: int
    error: float
    kl: float
    matrices: tuple[MatrixReport, ...]
    nearest: float

    def to_json(self) -> dict[str, Any]:
        """For the ledger."""
        return asdict(self)


@dataclass(slots=True)
class Block:
    """What became of the source tensors of one block.

    Args:
        weights: codes by source name; several of a stack.
        changed: source names of tensors that stay in float but were rewritten, and their values.
        wirings: that were found with this block, by kind of block.
        left_states: whether this rank has some for the next block.
    """

    report: BlockReport
    weights: dict[str, list[QuantizedTensor]] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    wirings: dict[str, Wiring] = field(default_factory=dict)
    left_states: bool = False


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run goes on that was interrupted.

    Args:
        blocks: that are done.
        states: bytes of what the next one is given, as the run had put them into the room it asked for:
            one room of each rank that had states.
        wirings: found so far, by kind of block.
    """

    blocks: int = 0
    states: Sequence[Tensor] = ()
    wirings: dict[str, Wiring] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is done at a time.

    Args:
        tokens: run through a block at a time, at least one sample.
        statistics_bytes: of Hessians at a time, at least one; None: all of a block.
    """

    tokens: int = TOKENS
    statistics_bytes: int | None = None


def quantize_blocks(
    plan: Plan,
    recipe: Recipe,
    ids: Tensor,
    progress: Callable[[str, int, int], None] | None = None,
    limits: Limits = Limits(),
    allocate: Allocate | None = None,
    start: Position = Position(),
    statistics: Statistics | None = None,
    device: torch.device = CPU,
    ranks: Ranks = ALONE,
    embedding: Tensor | None = None,
) -> Iterator[Block]:
    """Quantize the blocks of a model one after the other.

    Several ranks call this together, with the same arguments but for progress and allocate. Each runs
    its parts of the samples and rounds its matrices; every one of them has the same blocks.

    Args:
        plan: of the run.
        recipe: method and transforms; schemes are the plan's.
        ids: (samples, length) calibration tokens; the last of them are held out for judging.
        progress: called with (what, blocks done, blocks).
        limits: how much is done at a time. The bits of the result depend on the tokens.
        allocate: gives room for the states behind each block but the last, which the next one is given;
            what lies there when a block is yielded is what `start` takes. Not called where a rank has
            none: there are more ranks than parts.
        start: where to go on.
        statistics: of the float model, to be taken instead of those of the samples; then `ids` are its
            own, which transforms search with and blocks are judged on.
        device: where blocks are run and rounded; what is yielded is on the CPU.
        ranks: that do this together.
        embedding: (vocabulary, width), for blocks that learn, to begin with instead of the float one;
            the first rank has it.

    Raises:
        InputError: blocks that cannot be run on their own, tokens that the model cannot take, or a block
            whose output is not finite, or constant.
    """
    if len(ids) < 2:
        raise InputError(
            f"calibration has {len(ids)} sample; accepted are 2 or more, 1 of them held out"
        )
    run = _Run(plan, recipe, ids, limits, allocate, start, statistics, device, ranks)
    if recipe.learned is not None and run.samples is not None and ranks.tell(embedding is not None):
        run.stream.begin_with(ranks.tell_tensor(embedding), run.samples)
    del embedding
    what, count = "blocks", run.stream.count
    for number in range(start.blocks, count):
        if progress is not None:
            progress(what, number, count)
        waited = ranks.waited_s
        block = run.block(number)
        what = f"blocks, KL so far {block.report.kl:.3g}"
        if ranks.count > 1:  # whom the others wait for
            waits = ranks.gather(ranks.waited_s - waited)
            what += f", slowest rank {waits.index(min(waits))}"
        yield block
        del block  # its codes are written
    if progress is not None:
        progress(what, count, count)


def held_out_samples(samples: int, length: int) -> int:
    """How many of the calibration samples are kept for judging."""
    return max(1, min(samples // _HELD_OUT, _JUDGED // length))


def searched_samples(samples: int, length: int) -> int:
    """How many of the calibration samples, from the first, transforms search with."""
    return min(max(1, _JUDGED // length), samples - held_out_samples(samples, length))


def judged_positions(samples: int, length: int) -> int:
    """Of one sample, at which logits are compared."""
    return math.ceil(length / _every(held_out_samples(samples, length), length))


def _every(held_out: int, length: int) -> int:
    return max(1, held_out * length // _LENS)


def rounding_cost(rows: int, columns: int, hessian: bool) -> float:
    """Of what reads one input, about: a factor of its Hessian, and columns one by one."""
    return float(columns * columns * (columns + 3 * rows) if hessian else rows * columns)


def states_bytes(
    samples: int, length: int, hidden: int, held_out: int | None = None, learned: int = 0
) -> int:
    """Of the room behind a block: bfloat16 states, and those of the float model that are kept.

    Those are the samples held out, in float32, and those that are learned from.
    """
    held_out = held_out_samples(samples, length) if held_out is None else held_out
    return length * hidden * (2 * samples + 4 * held_out + 2 * learned)


@dataclass(frozen=True, slots=True)
class _Room:
    """Views of one piece of memory: states behind a block. Those of the float model the first rank has.

    Args:
        states: by samples, bfloat16.
        held_out: of the float model, of the samples held out, float32.
        learned: of the float model, of the samples that are learned from, bfloat16.
    """

    states: list[tuple[range, Tensor]]
    held_out: Tensor | None
    learned: Tensor | None


class _Run:
    """The state between blocks: the stream, the float model's held-out states, wirings found."""

    def __init__(
        self,
        plan: Plan,
        recipe: Recipe,
        ids: Tensor,
        limits: Limits,
        allocate: Allocate | None,
        start: Position,
        statistics: Statistics | None,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        self.plan, self.recipe, self.limits, self.statistics = plan, recipe, limits, statistics
        self.ranks, self.shape = ranks, ids.shape
        held_out = held_out_samples(*ids.shape) if statistics is None else statistics.held_out
        self.fitted, self.held_out = range(len(ids) - held_out), slice(len(ids) - held_out, len(ids))
        learns = recipe.learned is not None
        self.learned = slice(0, learned_samples(len(self.fitted), ids.shape[1]) if learns else 0)
        self.search = slice(0, min(max(1, _JUDGED // ids.shape[1]), len(self.fitted)))
        self.parts = divide_samples(self.fitted)
        self.own = self.parts[ranks.rank :: ranks.count]
        held, first = range(self.held_out.start, self.held_out.stop), None
        states = samples = None
        if start.states:
            found = [self._open(room, rank, len(start.states)) for rank, room in enumerate(start.states)]
            states, first = States(len(ids), [some for room in found for some in room.states]), found[0]
        else:
            samples = [*self.own, *(rows for _, rows in self._wanted_of_others(ranks.rank)), held]
        self.samples = samples  # that begin here; None: they are on their way
        self.stream = Stream(
            plan.checkpoint, ids, _every(held_out, ids.shape[1]), limits.tokens, allocate, states,
            device, samples,
        )  # fmt: skip
        states = self.stream.states
        kept = states[self.held_out].float() if first is None else first.held_out
        assert kept is not None
        self.float_states = kept
        self.float_learned: Any = states if first is None else first.learned
        self.room: _Room | None = None  # of the states behind the block in hand, when there is one
        self.wirings = dict(start.wirings)
        self.by_block: dict[int, list[Matrix]] = defaultdict(list)
        for name in plan.placements:
            matrix = plan.matrices[name]
            if matrix.block is not None:
                self.by_block[matrix.block].append(matrix)

    def _open(self, room: Tensor, rank: int, count: int) -> "_Room":
        """What lies in the room of one of so many ranks: states of its parts.

        In that of the first also of what is held out; at the front, which is aligned, those of the float
        model.
        """
        (_, length), hidden = self.shape, self.plan.hidden_size
        rows, floats, learned = list(self.parts[rank::count]), None, None
        if rank == 0:
            rows.append(range(self.held_out.start, self.held_out.stop))
            size = 4 * len(rows[-1]) * length * hidden
            floats, room = room[:size].view(torch.float32).view(-1, length, hidden), room[size:]
            size = 2 * self.learned.stop * length * hidden
            learned, room = room[:size].view(torch.bfloat16).view(-1, length, hidden), room[size:]
        states = room.view(torch.bfloat16).view(-1, length, hidden)
        rooms, done = [], 0
        for some in rows:
            rooms.append((some, states[done : done + len(some)]))
            done += len(some)
        return _Room(rooms, floats, learned)

    def _new_room(self) -> "_Room":
        """Behind the block in hand; nothing is written yet."""
        if self.room is None:
            (_, length), hidden, ranks = self.shape, self.plan.hidden_size, self.ranks
            held = self.held_out.stop - self.held_out.start if ranks.leads else 0
            learned = self.learned.stop if ranks.leads else 0
            size = states_bytes(sum(map(len, self.own)) + held, length, hidden, held, learned)
            empty = _Room([], None, None)
            self.room = (
                self._open(self.stream.allocate(size), ranks.rank, ranks.count) if size else empty
            )
        return self.room

    def _wanted_of_others(self, rank: int) -> list[tuple[int, range]]:
        """Parts that other ranks run, and of which samples a rank needs the states too.

        All need those that transforms search with, the first those that are learned from.
        """
        end = self.search.stop if self.recipe.transforms else 0
        end = max(end, self.learned.stop) if rank == 0 else end
        return [
            (i, range(part.start, min(part.stop, end)))
            for i, part in enumerate(self.parts)
            if i % self.ranks.count != rank and part.start < end
        ]

    def block(self, number: int) -> Block:
        """Quantize one block and take the samples through it."""
        block = self.stream.load(number)
        held_out = self.stream.states[self.held_out]
        self.float_states, wanted = self._run_all(number, block, self.float_states, held_out)
        if self.recipe.learned is not None:
            self._go_on_in_float(number, block)
        pieces = self._pieces(number)
        self._check_finite(block, pieces)
        self._check_output(number, wanted)
        nearest, judge = 0.0, self.ranks.count - 1  # the one with the fewest parts
        if self.ranks.rank == judge:
            for own, _, rounded, _ in self._nearest(block, pieces):
                own.copy_(rounded.dequantize(torch.float32))
            nearest = _error(self.stream.run_all(number, block, held_out), wanted)
            del block  # never two of them at a time
            block = self.stream.load(number)
        learns = self.recipe.learned is not None
        floats: dict[str, Tensor] | None = {} if learns and self.ranks.leads else None
        result = self._quantize(number, block, pieces, floats)
        error, got = self._judge(number, block, wanted)
        nearest = self.ranks.tell(nearest, judge)
        if learns and error <= _EXPLODED * nearest:
            if floats is not None:
                self._learn(number, block, pieces, floats, result)
            self._tell_learned(block, pieces, result)
            error, got = self._judge(number, block, wanted)
        elif not error <= _EXPLODED * nearest:  # not a number is no better
            del block, result
            block = self.stream.load(number)
            result = self._give_up(number, block, pieces, error, nearest)
            error, got = self._judge(number, block, wanted)
        kl = self._kl(got) if self.ranks.leads else 0.0
        if not math.isfinite(error + kl):
            raise InputError(
                f"block {number} gives NaN or infinity when it is quantized, also to nearest; accepted "
                f"is to leave it in float, by an override like '*.{number}.*=float'"
            )
        if number + 1 < self.stream.count:
            result.left_states = self._advance(number, block, got)
        result.report = BlockReport(number, error, kl, result.report.matrices, nearest)
        return result

    @property
    def _corrects(self) -> bool:
        """Whether weights make up for what was rounded before; the states of samples tell."""
        return self.recipe.corrected and self.statistics is None

    def _check_output(self, number: int, wanted: Tensor) -> None:
        """Of the block in float: what it computes must be worth keeping."""
        where = f"block {number} of {self.plan.checkpoint.folder} gives"
        if not (is_finite(wanted) and is_finite(self.float_states)):
            blame_weight(self.plan, number)
            raise InputError(f"{where} NaN or infinity in float; accepted are models that compute")
        if not float(wanted.var()) > 0:
            raise InputError(f"{where} the same value everywhere; accepted are models that compute")

    def _run_all(self, number: int, block: nn.Module, *states: Tensor) -> list[Tensor]:
        """What the block makes of several states, which ranks run in turn, in float32."""
        batches = [some[rows] for some in states for rows in self.stream.batches(range(len(some)))]
        outputs = self.ranks.share(len(batches), lambda i: self.stream.run(number, block, batches[i]))
        whole = torch.cat([output.to(self.stream.device) for output in outputs])
        return list(torch.split(whole, [len(some) for some in states]))

    def _judge(self, number: int, block: nn.Module, wanted: Tensor) -> tuple[float, Tensor]:
        """Squared error of its output over the output's variance, and the output; held-out samples."""
        (got,) = self._run_all(number, block, self.stream.states[self.held_out])
        return self.ranks.tell(_error(got, wanted)), got

    def _advance(self, number: int, block: nn.Module, got: Tensor) -> bool:
        """Take the states of this rank's samples through the block; whether it has any."""
        stream, ranks = self.stream, self.ranks
        room = self._new_room()
        rooms, left = list(room.states), bool(room.states)
        kept = range(self.held_out.start, self.held_out.stop)
        if not ranks.leads:
            rooms.append((kept, got.bfloat16().cpu()))
        states = States(len(stream.ids), rooms)
        with stream.in_fast_dtype(number, block):
            for part in self.own:  # as it was run when it was collected
                stream.advance(number, block, part, states)
        for rows in (rows for part in self.own for rows in stream.batches(part)):
            if not is_finite(states[rows]):
                raise InputError(
                    f"block {number} gives NaN or infinity on samples {rows.start} to {rows.stop - 1}; "
                    f"accepted is to leave it in float, by an override like '*.{number}.*=float'"
                )
        if room.held_out is not None:
            states[self.held_out] = got
            room.held_out.copy_(self.float_states)
        self._pass_states(states)
        stream.states = states  # what a later process would go on from
        self.float_learned, self.room = room.learned, None
        return left

    def _pass_states(self, states: States) -> None:
        """Let ranks have the states that they need of parts that others run."""
        (_, length), ranks = self.shape, self.ranks
        for rank in range(ranks.count):
            for i, rows in self._wanted_of_others(rank):
                giver = i % ranks.count
                if ranks.rank == giver:
                    ranks.send(states[rows.start : rows.stop], rank)
                elif ranks.rank == rank:
                    got = torch.empty(len(rows), length, self.plan.hidden_size, dtype=torch.bfloat16)
                    ranks.receive(got, giver)
                    states.rooms.append((rows, got))

    def _go_on_in_float(self, number: int, block: nn.Module) -> None:
        """What the float model has behind this block, of samples that are learned from; rank 0."""
        stream, wanted = self.stream, self._new_room().learned
        if wanted is None:
            return
        with stream.in_fast_dtype(number, block):
            for rows in stream.batches(range(len(wanted))):
                wanted[rows] = stream.run(number, block, self.float_learned[rows])

    def _learn(
        self,
        number: int,
        block: nn.Module,
        pieces: dict[str, list[Piece]],
        floats: dict[str, Tensor],
        result: Block,
    ) -> None:
        """Learn the rounding of a rounded block, and keep what is better on held-out samples."""
        assert self.recipe.learned is not None
        named = {piece.name: piece for parts in pieces.values() for piece in parts}
        codes = self._codes(pieces, result)
        if not named:
            return
        device = self.stream.device
        roundings = {
            name: Rounding.of(floats.pop(name), codes[name].to(device), self._scales(piece).least)
            for name, piece in named.items()
        }
        fisher = None
        if self.statistics is not None:
            fisher = self.statistics.fisher(number, self.plan.hidden_size)
        states = self.stream.states
        wanted = self._new_room().learned
        assert wanted is not None
        fitted = Samples(states, wanted)
        held_out = Samples(states[self.held_out], self.float_states)
        learning = BlockLearning(self.stream, number, block, named, fisher, fitted, held_out)
        found = learning.learn(self.recipe.learned, roundings)
        result.weights.clear()
        for name, rounding in roundings.items():
            result.weights.setdefault(named[name].source, []).append(rounding.best.to(CPU))
        unit = "square" if fisher is None else "nats"
        what = f"held-out error {found.before:.3g} -> {found.after:.3g} ({unit})"
        learnt = f"learned, best of step {found.step}: {what}"
        kept = "not learned, nothing was better: " + what
        where = self._prefix(number)[:-1]
        result.notes.append(Note("fact", where, "rounding " + (learnt if found.step else kept)))

    def _tell_learned(self, block: nn.Module, pieces: dict[str, list[Piece]], result: Block) -> None:
        """Let all ranks have the rounding that rank 0 has learned."""
        if self.ranks.count == 1:
            return
        said: list[Any] = []
        tensors: list[Tensor] = []
        if self.ranks.leads:
            for name, code in self._codes(pieces, result).items():
                about, own = code.parts()
                said.append([name, about])
                tensors += own
        notes = self.ranks.tell([asdict(note) for note in result.notes])
        told, given = self.ranks.exchange(said, tensors)[0]
        if not self.ranks.leads:
            result.weights.clear()
            result.notes[:] = [Note(**note) for note in notes]
            codes = {name: QuantizedTensor.of_parts(about, given) for name, about in told}
            self._store(block, pieces, codes, result)

    def _quantize(
        self,
        number: int,
        block: nn.Module,
        pieces: dict[str, list[Piece]],
        floats: dict[str, Tensor] | None = None,
    ) -> Block:
        """Round the matrices of a block; `floats` are to hold what they were."""
        result = Block(BlockReport(number, 0.0, 0.0, (), 0.0))
        wiring = self._wiring(number, block, result)
        self._note_unseen(number, wiring, result)
        folds = self._transform(number, block, wiring, pieces, result)
        self._check_alike(number, folds)
        codes: dict[str, QuantizedTensor] = {}
        together: list[list[MatrixReport]] = []
        noted = len(result.notes)
        for some in self._passes(block, wiring, pieces):
            stats = self._collect(number, block, wiring, pieces, some, folds, codes)
            hand_back_memory()  # of the run; what follows needs the most there is
            owners = self._owners(block, find_inputs(block, wiring, some), some)
            together += self._round(block, some, stats, owners, codes, result)
            del stats  # the largest there is
        if floats is not None:
            for linear, parts in pieces.items():
                whole = float_weight(block.get_submodule(linear))
                floats |= {piece.name: whole[piece.start : piece.stop].clone() for piece in parts}
        self._store(block, pieces, codes, result)
        self._note_changed(number, block, pieces, result)
        # In one order, in however many passes they were rounded.
        names = (piece.name for parts in pieces.values() for piece in parts)
        place = {name: i for i, name in enumerate(names)}
        together.sort(key=lambda alike: place[alike[0].name])
        matrices = tuple(report for alike in together for report in alike)
        order = {report.name: i for i, report in enumerate(matrices)}
        result.notes[noted:] = sorted(result.notes[noted:], key=lambda note: order[note.where])
        result.report = replace(result.report, matrices=matrices)
        return result

    def _nearest(
        self, block: nn.Module, pieces: dict[str, list[Piece]]
    ) -> Iterator[tuple[Tensor, Piece, QuantizedTensor, list[Note]]]:
        """Each weight of the block, its piece, and what rounding to nearest makes of it."""
        for linear, parts in pieces.items():
            whole = float_weight(block.get_submodule(linear))
            for piece in parts:
                own = whole[piece.start : piece.stop]
                # Nobody looks at inputs here: outlier columns are those of each call.
                scheme, scales = self._scheme(piece).dynamic, self._scales(piece)
                yield own, piece, *round_held(RTN(), own, scheme, {}, scales.dtype, scales.least)

    def _give_up(
        self,
        number: int,
        block: nn.Module,
        pieces: dict[str, list[Piece]],
        error: float,
        nearest: float,
    ) -> Block:
        """Round to nearest what the method made worse."""
        result = Block(BlockReport(number, 0.0, 0.0, (), 0.0))
        why = f"error {error:.3g} of the block, {nearest:.3g} if rounded to nearest: rounded to nearest"
        result.notes.append(Note("fallback", self._prefix(number)[:-1], why))
        codes = {}
        for _, piece, rounded, notes in self._nearest(block, pieces):
            codes[piece.name] = rounded
            result.notes += [replace(note, where=piece.name) for note in notes]
        self._store(block, pieces, codes, result)
        parts = [piece for some in pieces.values() for piece in some]
        reports = [
            MatrixReport(p.name, "RTN", self._scheme(p).dynamic.label, 0, None, steps=(why,))
            for p in parts
        ]
        result.report = replace(result.report, matrices=tuple(reports))
        return result

    def _store(
        self,
        block: nn.Module,
        pieces: dict[str, list[Piece]],
        codes: dict[str, QuantizedTensor],
        result: Block,
    ) -> None:
        """Put into the block what the codes stand for, all at the end: inputs were those in float."""
        for linear, parts in pieces.items():
            weight = float_weight(block.get_submodule(linear))
            for piece in parts:
                part = codes[piece.name].to(self.stream.device)
                weight[piece.start : piece.stop].copy_(part.dequantize(torch.float32))
                result.weights.setdefault(piece.source, []).append(part.to(CPU))

    def _codes(self, pieces: dict[str, list[Piece]], result: Block) -> dict[str, QuantizedTensor]:
        """By name of a piece."""
        queues = {source: iter(weights) for source, weights in result.weights.items()}
        return {piece.name: next(queues[piece.source]) for parts in pieces.values() for piece in parts}

    # -- where things are --------------------------------------------------------------------------

    def _prefix(self, number: int) -> str:
        return f"{self.stream.path}.{number}."

    def _pieces(self, number: int) -> dict[str, list[Piece]]:
        return find_pieces(self.by_block[number], self._prefix(number))

    def _check_finite(self, block: nn.Module, pieces: dict[str, list[Piece]]) -> None:
        """Name the weight before others, which are rounded or scaled together with it, are blamed."""
        for linear, parts in pieces.items():
            weight = float_weight(block.get_submodule(linear))
            for piece in parts:
                if not is_finite(weight[piece.start : piece.stop]):
                    place = self.plan.place(piece.source) + piece.name.removeprefix(piece.source)
                    raise InputError(
                        f"{place}: the weight contains NaN or infinity; accepted are finite weights"
                    )

    def _scheme(self, piece: Piece) -> QuantScheme:
        return self.plan.placements[piece.source].scheme

    def _scales(self, piece: Piece) -> ScaleRange:
        """Those that the format holds."""
        return self.plan.format.scales(self.plan.info(piece.source).dtype)

    def _wiring(self, number: int, block: nn.Module, result: Block) -> Wiring:
        """Found once for each distinct shape of a block."""
        kind = block_kind(block)
        if self.statistics is not None:
            return self.statistics.wiring(number, kind)
        if kind not in self.wirings:
            found = None
            if self.ranks.leads:
                wiring = find_block_wiring(self.stream, number, block, bool(self.recipe.transforms))
                found = asdict(wiring)
            self.wirings[kind] = Wiring.from_json(self.ranks.tell(found))
            result.wirings[kind] = self.wirings[kind]
        return self.wirings[kind]

    def _note_unseen(self, number: int, wiring: Wiring, result: Block) -> None:
        for path in wiring.unseen:
            where = self._prefix(number) + path
            result.notes.append(Note("fallback", where, "never called: rounded to nearest, if at all"))

    # -- the steps ---------------------------------------------------------------------------------

    def _transform(
        self,
        number: int,
        block: nn.Module,
        wiring: Wiring,
        pieces: dict[str, list[Piece]],
        result: Block,
    ) -> Folds:
        """What the columns of linears were multiplied by, and their inputs divided by, one by one."""
        stream, folded = self.stream, defaultdict[str, list[Tensor]](list)
        schemes = {linear: self._scheme(parts[0]) for linear, parts in pieces.items()}
        wiring = self._writable(number, wiring, result) if self.recipe.transforms else wiring
        for transform in self.recipe.transforms:
            notes, folds = transform(
                block,
                wiring,
                schemes,
                lambda: stream.run_all(number, block, stream.states[self.search]),
                lambda: stream.run_all(number, block, stream.states[self.held_out]),
                self.plan.checkpoint.dtype,
            )
            prefix = self._prefix(number)
            result.notes += [Note(note.kind, prefix + note.where, note.what) for note in notes]
            for reader, s in folds.items():
                folded[reader].append(s)
        return folded

    def _check_alike(self, number: int, folds: Folds) -> None:
        """All ranks transform their copy of the block: it must be the same."""
        if not self.recipe.transforms or self.ranks.count == 1:
            return
        digest = sha256()
        for reader, scales in sorted(folds.items()):
            digest.update(reader.encode())
            for scale in scales:
                digest.update(scale.cpu().numpy().tobytes())
        for rank, found in enumerate(self.ranks.gather(digest.hexdigest())):
            if found != digest.hexdigest():
                raise InputError(
                    f"block {number}: ranks {self.ranks.rank} and {rank} find other scales; accepted "
                    "are ranks whose processors compute the same bits"
                )

    def _owners(
        self, block: nn.Module, inputs: list[tuple[str, ...]], pieces: dict[str, list[Piece]]
    ) -> dict[tuple[str, ...], int]:
        """Which rank rounds what reads an input: by what that costs, about."""
        costs = []
        for linears in inputs:
            columns = float_weight(block.get_submodule(linears[0])).shape[1]
            rows = sum(piece.stop - piece.start for path in linears for piece in pieces[path])
            costs.append(rounding_cost(rows, columns, "hessian" in self.recipe.method.needs))
        return dict(zip(inputs, share_out(costs, self.ranks.count), strict=True))

    def _writable(self, number: int, wiring: Wiring, result: Block) -> Wiring:
        """Without the pairs that touch what transformers rebuilds from other tensors on disk."""
        prefix = self._prefix(number)
        located = self.stream.located.items()
        held = {
            target.parameter
            for name, target in located
            if target.converter is None or name in self.plan.matrices
        }
        pairs = []
        for pair in wiring.pairs:
            paths = [prefix + path for path in (pair.source, *pair.readers)]
            lost = [p for p in paths if held.isdisjoint({f"{p}.weight", p.rpartition(".")[0]})]
            if lost:
                what = f"not folded: {lost[0]} is rebuilt by transformers"
                result.notes.append(Note("skip", prefix + pair.source, what))
            else:
                pairs.append(pair)
        return replace(wiring, pairs=tuple(pairs))

    def _passes(
        self, block: nn.Module, wiring: Wiring, pieces: dict[str, list[Piece]]
    ) -> list[dict[str, list[Piece]]]:
        """Linears whose statistics are in memory at a time, in the order of their calls."""
        limit, inputs = self.limits.statistics_bytes, find_inputs(block, wiring, pieces)
        if self._corrects:  # each knows what came of those before it; experts are all as in float
            divided = [
                some
                for experts, alike in groupby(inputs, lambda linears: is_expert(block, linears[0]))
                for some in (
                    divide_inputs(block, list(alike), limit) if experts else [[i] for i in alike]
                )
            ] or [[]]
        elif limit is None or "hessian" not in self.recipe.method.needs:
            return [pieces]
        else:
            divided = divide_inputs(block, inputs, limit)
        passes = [{path for linears in some for path in linears} for some in divided]
        passes[-1] |= pieces.keys() - {path for paths in passes for path in paths}
        # In the order of the pieces: what is rounded as one is stacked alike, however it is divided.
        return [{path: pieces[path] for path in pieces if path in some} for some in passes]

    def _collect(
        self,
        number: int,
        block: nn.Module,
        wiring: Wiring,
        pieces: dict[str, list[Piece]],
        some: dict[str, list[Piece]],
        folds: Folds,
        codes: dict[str, QuantizedTensor],
    ) -> dict[str, InputStats]:
        """Statistics by linear, of some; linears that read one tensor have them in common."""
        needs = self.recipe.method.needs
        if not needs:
            return {}
        inputs = find_inputs(block, wiring, some)
        owners = self._owners(block, inputs, some)
        if self.statistics is None:
            corrects = self._corrects and not any(is_expert(block, i[0]) for i in inputs)
            rounded = self._rounded(block, pieces, codes) if corrects else None
            found = collect(
                self.stream, number, block, inputs, needs, self.fitted, None, self.ranks, owners, rounded
            )
        else:
            found = {
                i: self._stored(number, block, i, folds, owners[i] == self.ranks.rank) for i in inputs
            }
        stats = {path: stat for linears, stat in found.items() for path in linears}
        share_absmax(some, stats)
        return stats

    def _rounded(
        self, block: nn.Module, pieces: dict[str, list[Piece]], codes: dict[str, QuantizedTensor]
    ) -> dict[str, Tensor]:
        """Weights (out, in) of the linears that have codes, in the dtype that blocks are run in."""
        found = {}
        for linear, parts in pieces.items():
            done = [piece for piece in parts if piece.name in codes]
            if done:
                held = float_weight(block.get_submodule(linear))
                found[linear] = held.to(self.stream.fast_dtype or held.dtype, copy=True)
            for piece in done:
                part = codes[piece.name].to(self.stream.device).dequantize(torch.float32)
                found[linear][piece.start : piece.stop] = part
        return found

    def _stored(
        self, number: int, block: nn.Module, linears: tuple[str, ...], folds: Folds, own: bool
    ) -> InputStats:
        """What was measured on the float model's block, as it is after what was folded into this one."""
        assert self.statistics is not None
        width = float_weight(block.get_submodule(linears[0])).shape[1]
        needs = self.recipe.method.needs - (frozenset() if own else {"hessian"})
        stat = self.statistics.stats(number, linears, width, needs)
        stat = stat.to(self.stream.device)
        for s in folds.get(linears[0], []):
            stat.divide(s)
        return stat

    def _round(
        self,
        block: nn.Module,
        pieces: dict[str, list[Piece]],
        stats: dict[str, InputStats],
        owners: dict[tuple[str, ...], int],
        codes: dict[str, QuantizedTensor],
        result: Block,
    ) -> list[list[MatrixReport]]:
        """Round what reads one tensor together: a Hessian is factored once. Each rank rounds its own."""
        together: dict[Any, list[Piece]] = defaultdict(list)
        for linear, parts in pieces.items():
            for piece in parts:
                scheme, stat = self._scheme(piece), stats.get(linear)
                alone = piece.name if scheme.granularity == "tensor" else None
                key = (id(stat) if stat is not None else linear, scheme, self._scales(piece), alone)
                together[key].append(piece)
        by_linear = {path: rank for linears, rank in owners.items() for path in linears}
        targets = self._make_up(block, pieces, stats)
        said: dict[str, Any] = {}
        tensors: list[Tensor] = []
        for i, alike in enumerate(together.values()):
            if by_linear.get(alike[0].linear, 0) == self.ranks.rank:
                stat = stats.get(alike[0].linear)
                rounded, reports, notes = self._round_alike(block, alike, stat, targets)
                described = [one.parts() for one in rounded]
                said[str(i)] = {
                    "parts": [about for about, _ in described],
                    "reports": [asdict(report) for report in reports],
                    "notes": [asdict(note) for note in notes],
                }
                tensors += [tensor for _, own in described for tensor in own]
        groups, found = list(together.values()), dict[int, list[MatrixReport]]()
        for told, given in self.ranks.exchange(said, tensors):
            for key, value in told.items():
                for piece, about in zip(groups[int(key)], value["parts"], strict=True):
                    codes[piece.name] = QuantizedTensor.of_parts(about, given)
                found[int(key)] = [
                    MatrixReport(**report | {"steps": tuple(report["steps"])})
                    for report in value["reports"]
                ]
                result.notes += [Note(**note) for note in value["notes"]]
        return [found[i] for i in range(len(groups))]

    def _make_up(
        self, block: nn.Module, pieces: dict[str, list[Piece]], stats: dict[str, InputStats]
    ) -> dict[str, Tensor | None]:
        """Weights to round instead of the block's, by name of a piece; None where there are none."""
        together: dict[int, list[str]] = defaultdict(list)
        for linear in pieces:
            stat = stats.get(linear)
            if stat is not None and stat.drift is not None and stat.hessian is not None:
                together[id(stat)].append(linear)
        targets: dict[str, Tensor | None] = {}
        for linears in together.values():
            stat = stats[linears[0]]
            assert stat.hessian is not None
            drift, stat.drift = stat.drift, None  # as large as the Hessian: not needed again
            assert drift is not None
            if not bool(drift.any()):  # nothing before it was rounded
                continue
            weights = [float_weight(block.get_submodule(linear)) for linear in linears]
            found = make_up(torch.cat(weights), stat.hessian, drift, stat.tokens)
            heights = [len(weight) for weight in weights]
            wholes = [None] * len(linears) if found is None else torch.split(found, heights)
            for linear, whole in zip(linears, wholes, strict=True):
                for piece in pieces[linear]:
                    own = None if whole is None else whole[piece.start : piece.stop]
                    targets[piece.name] = own
        return targets

    def _round_alike(
        self,
        block: nn.Module,
        alike: list[Piece],
        stat: InputStats | None,
        targets: dict[str, Tensor | None],
    ) -> tuple[list[QuantizedTensor], list[MatrixReport], list[Note]]:
        scheme, scales = self._scheme(alike[0]), self._scales(alike[0])
        floats = [float_weight(block.get_submodule(p.linear))[p.start : p.stop] for p in alike]
        made = [targets.get(piece.name) for piece in alike]
        weights = [own if other is None else other for own, other in zip(floats, made, strict=True)]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        method, why = self._method(block, alike[0].linear, stat)
        if isinstance(method, RTN):
            scheme = scheme.dynamic  # nobody has seen its inputs
        given = {} if stat is None else stat.given
        try:
            rounded, notes = round_held(method, weight, scheme, given, scales.dtype, scales.least)
        except InputError as error:
            raise InputError(f"{alike[0].name}: {error}") from None
        notes = notes if why is None else [Note("fallback", "", why), *notes]
        if any(piece.name in targets and targets[piece.name] is None for piece in alike):
            notes.append(
                Note(
                    "fallback",
                    "",
                    "not corrected: H has no Cholesky factor, or what makes up is not finite",
                )
            )
        steps = tuple(note.what for note in notes)
        parts, reports, told, start = [], [], list[Note](), 0
        for piece, own, before, after in zip(alike, weights, floats, made, strict=True):
            part = rounded.rows(slice(start, start + len(own)))
            start += len(own)
            hessian = None if stat is None else stat.hessian
            lost, ratio = (None, None) if hessian is None else _errors(own, part, hessian, scales.dtype)
            parts.append(part)
            told += [replace(note, where=piece.name) for note in notes]
            tokens = 0 if stat is None else stat.tokens
            name, kept = type(method).__name__, part.outliers
            outliers = 0 if kept is None else len(kept.columns)
            moved = None if after is None else float((after - before).norm() / before.norm())
            reports.append(
                MatrixReport(piece.name, name, scheme.label, tokens, ratio, outliers, steps, lost, moved)
            )
        return parts, reports, told

    def _method(
        self, block: nn.Module, linear: str, stat: InputStats | None
    ) -> tuple[Method, str | None]:
        """The recipe's method, or a simpler one where there is too little to go on."""
        method = self.recipe.method
        if not method.needs:
            return method, None
        shared = stat is not None and stat.absmax is not None and bool(stat.absmax.any())
        if stat is None or (stat.tokens == 0 and not shared):  # other experts may have seen tokens
            return RTN(), "no calibration token reached it: rounded to nearest"
        columns = 0 if stat.hessian is None else len(stat.hessian)
        if is_expert(block, linear) and stat.tokens < columns and not isinstance(method, WeightedRTN):
            why = f"only {stat.tokens} calibration tokens for {columns} inputs: weighted rounding"
            return WeightedRTN(), why
        return method, None

    def _note_changed(
        self, number: int, block: nn.Module, pieces: dict[str, list[Piece]], result: Block
    ) -> None:
        """Find what transforms changed of what stays in float, and round it to its dtype."""
        prefix, checkpoint = self._prefix(number), self.plan.checkpoint
        names = [n for n, t in self.stream.located.items() if t.parameter.startswith(prefix)]
        for name in names:
            if name in result.weights:
                continue
            parts, whole = self._parts(name, block, prefix)
            source = checkpoint.read(name)
            if parts and not _equal(whole(parts), source.to(self.stream.device)):
                for part in parts:  # what is run from here on is what will be written
                    part.copy_(part.to(source.dtype))
                result.changed[name] = whole(parts).to(CPU, source.dtype).clone()

    def _parts(
        self, name: str, block: nn.Module, prefix: str
    ) -> tuple[list[Tensor], Callable[[list[Tensor]], Tensor]]:
        """Where the block holds a source tensor now, and how to join that to its shape there."""
        target, matrix = self.stream.located[name], self.plan.matrices.get(name)
        if matrix is not None and matrix.kind == "expert":
            return self._expert_parts(matrix, block, prefix)
        held = block.state_dict(keep_vars=True).get(target.parameter.removeprefix(prefix))
        found = [held.detach()] if held is not None and target.converter is None else []
        return found, lambda parts: parts[0]

    def _expert_parts(
        self, matrix: Matrix, block: nn.Module, prefix: str
    ) -> tuple[list[Tensor], Callable[[list[Tensor]], Tensor]]:
        linears = block.get_submodule(f"{matrix.module.removeprefix(prefix)}.{matrix.parameter}")
        assert isinstance(linears, ExpertLinears)
        if matrix.expert is None:
            weights = [float_weight(linear) for linear in linears]
            return (
                weights,
                lambda parts: torch.stack(parts).mT if matrix.transposed else torch.stack(parts),
            )
        rows = matrix.rows_columns[0]
        own = slice(matrix.part * rows, (matrix.part + 1) * rows)
        return [float_weight(linears[matrix.expert])[own]], lambda parts: parts[0]

    def _kl(self, states: Tensor) -> float:
        total, count = 0.0, 0
        for i in range(len(states)):
            log_p = F.log_softmax(self.stream.logits(self.float_states[i : i + 1]), -1)
            log_q = F.log_softmax(self.stream.logits(states[i : i + 1].float()), -1)
            for p, q in zip(torch.split(log_p, 32, 1), torch.split(log_q, 32, 1), strict=True):
                kl = (p.exp() * (p - q)).sum(-1)
                total, count = total + float(kl.sum()), count + kl.numel()
        return total / count


def blame_weight(plan: Plan, number: int) -> None:
    """Name the tensor of a block that is itself not finite, if there is one.

    Raises:
        InputError: there is one.
    """
    for name in (name for name, block in plan.blocks.items() if block == number):
        tensor = plan.checkpoint.read(name)
        if tensor.is_floating_point() and not is_finite(tensor):
            raise InputError(f"{plan.place(name)} contains NaN or infinity; accepted are finite weights")


def block_kind(block: nn.Module) -> str:
    """A hash of what blocks with the same wiring have in common."""
    return sha256(repr(signature(block)).encode()).hexdigest()


def find_block_wiring(stream: Stream, number: int, block: nn.Module, with_pairs: bool) -> Wiring:
    """Of a block, found on a few tokens of the stream."""
    run = partial(stream.run, number, block, stream.states[:1, :_PROBE])
    return find_wiring(block, run, with_pairs)


def _error(got: Tensor, wanted: Tensor) -> float:
    """Squared error over the variance of what is wanted."""
    return float((got - wanted).square().mean() / wanted.var())


def _equal(value: Tensor, source: Tensor) -> bool:
    """Whether a float32 value is still the source's, as float32 holds that; NaN equals NaN."""
    source = source.to(value.dtype)
    return bool(((value == source) | (value.isnan() & source.isnan())).all())


def _errors(
    weight: Tensor, rounded: QuantizedTensor, hessian: Tensor, dtype: torch.dtype
) -> tuple[float | None, float | None]:
    """Squared output error over the squared output, and over that of round to nearest; some rows."""
    rows = _compared_rows(len(weight), rounded.scheme)
    if rounded.scheme.two_level:
        nearest, _ = RTN()(weight[rows], rounded.scheme, {}, dtype)
    else:
        scale, zero_point = choose_qparams(weight, rounded.scheme, dtype)
        own = slice(None) if rounded.scheme.granularity == "tensor" else rows
        codes = quantize(weight[rows], scale[own], zero_point[own], rounded.scheme)
        nearest = QuantizedTensor(codes, scale[own], zero_point[own], rounded.scheme)
    rounded, weight = rounded.rows(rows), weight[rows]
    ours, theirs = (
        _cost(weight - other.dequantize(torch.float32), hessian) for other in (rounded, nearest)
    )
    whole = _cost(weight, hessian)
    return (ours / whole if whole > 0 else None, ours / theirs if theirs > 0 else None)


def _compared_rows(count: int, scheme: QuantScheme) -> Tensor:
    """Numbers of rows, spread evenly; of a trellis whole chains."""
    unit = CHAIN if scheme.trellis else 1
    units = count // unit
    first = torch.linspace(0, units - 1, min(units, max(1, _COMPARED_ROWS // unit))).long() * unit
    return (first[:, None] + torch.arange(unit)).flatten()


def _cost(error: Tensor, hessian: Tensor) -> float:
    return float(((error @ hessian) * error).sum())
