"""What is known of the inputs of a block's linears: collected while it runs, or kept in a folder.

`fewbits measure` makes such a folder; from it any method can be had without the text it was made on.
Its Hessians are those of the float model. On the reference model that costs nothing: KL of GPTQ in a run
and from the folder 0.01773 and 0.01768 ± 0.00039 at 4 bits, 0.0738 and 0.0733 ± 0.0017 at 3, 0.337 and
0.336 ± 0.007 at 2 (groups of 128, 128, 32; 67 windows, 2026-11-26).


    statistics.json          of which model, on which text, what was found; hashes of all there is
    statistics.safetensors   or shards of it
    run.json                 seconds and memory, no part of what is promised

    ids                          (samples, length) int64: to search with and learn from, then held out
    0.self_attn.q_proj.hessian   of what q_proj of block 0 reads, and with it k_proj and v_proj
    0.self_attn.q_proj.absmax    (in,) float32
    0.output.fisher              (hidden, hidden): F of block 0's output: errors e cost e.F.e nats
    lm_head.weight.hessian       (in, in) of a head, or embedding, by its source tensor: see `outside`

A Hessian is symmetric, and kept are its lower panels, float32, one after the other, each by rows:
columns 0 to 255 of all rows, columns 256 to 511 of the rows from 256 on, and so on. Of n columns, a
multiple of 256, these are n (n + 256) / 2 values: 36 MB for 4096 columns, of 67 MB for all.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from fewbits import native
from fewbits.checkpoint import (
    Checkpoint,
    Written,
    hash_file,
    hash_json,
    hash_tensor,
    read_header,
)
from fewbits.errors import InputError, VerificationError
from fewbits.journal import differences
from fewbits.ledger import plain
from fewbits.linear import ExpertLinears, float_weight, set_float_weight
from fewbits.pieces import Piece
from fewbits.ranks import ALONE, Ranks
from fewbits.recipe import Recipe
from fewbits.stream import CPU, Stream
from fewbits.tensor import Note
from fewbits.untrusted import check_file, check_types, counts, parse_json, read_bytes, shown
from fewbits.wiring import Wiring

STATISTICS, STEM = "statistics.json", "statistics"
PANEL = 256  # columns of a Hessian that are added to by one product; not tuned
# Of the samples of calibration. More could be run by more processes at a time; then bits are others.
PARTS = 8
_MAX_JSON = 2**27  # bytes; 15,000 experts take about 3 * 10**7, 2000 for each


# -- collected ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class InputStats:
    """What is known of a linear's inputs over its tokens, as far as the method asks for it.

    Args:
        hessian: the mean of x.T @ x, (in, in); None until `finish`.
        absmax: the largest |x|, (in,).
        tokens: that were seen.
        panels: the sum of x.T @ x while it is collected: the lower panels, columns from `PANEL` to
            `PANEL` of the rows from there on.
        drift: the mean of (w - x).T @ x, (in, in), where w is what the inputs were before matrices of
            the block were rounded (see `drift`); their sum until `finish`. None if none were.
    """

    hessian: Tensor | None = None
    absmax: Tensor | None = None
    tokens: int = 0
    panels: list[Tensor] | None = None
    drift: Tensor | None = None

    @classmethod
    def of(cls, width: int, needs: frozenset[str], device: torch.device = CPU) -> Self:
        """Of no tokens yet."""
        shapes = _panel_shapes(width) if "hessian" in needs else []
        panels = [torch.zeros(shape, device=device) for shape in shapes]
        return cls(
            absmax=torch.zeros(width, device=device) if "absmax" in needs else None,
            panels=panels or None,
        )

    @property
    def sums(self) -> list[Tensor] | None:
        """All that is summed over tokens: the panels, and behind them the drift."""
        more = [] if self.drift is None else [self.drift]
        return None if self.panels is None else [*self.panels, *more]

    @property
    def given(self) -> dict[str, Tensor]:
        """As methods take them."""
        both = {"hessian": self.hessian, "absmax": self.absmax}
        return {name: value for name, value in both.items() if value is not None}

    def add(self, x: Tensor) -> None:
        """Inputs (tokens, in).

        Products of bfloat16 are exact in float32, in which they are summed.
        """
        self.tokens += len(x)
        if self.absmax is not None and len(x):
            torch.maximum(self.absmax, x.abs().amax(0).float(), out=self.absmax)
        library = native.library()
        fits = x.dtype == torch.bfloat16 and x.device.type == "cpu"
        if self.panels and fits and library is not None and library.has_bf16:
            library.gram(x, self.panels)
            return
        x, start = x.float(), 0
        for panel in self.panels or []:  # below the diagonal only: it is symmetric
            panel.addmm_(x[:, start:].t(), x[:, start : start + panel.shape[1]])
            start += panel.shape[1]

    def add_drifted(self, before: Tensor, x: Tensor) -> None:
        """Inputs (tokens, in), and what they were before matrices of the block were rounded."""
        self.add(x)
        assert self.drift is not None
        # In their own dtype: of a sum over many tokens, that is near enough. Where other tokens come, as
        # to an expert, nothing can be compared, and the report tells of no correction.
        if len(x) and before.shape == x.shape:
            self.drift += (before - x).t() @ x

    def see(self, other: Self) -> None:
        """Count what was seen of other samples; their sums are added apart."""
        self.tokens += other.tokens
        if self.absmax is not None and other.absmax is not None:
            torch.maximum(self.absmax, other.absmax, out=self.absmax)

    def finish(self) -> None:
        """Make a mean of the sum, and fill in what is above the panels on the diagonal."""
        if self.panels is None:
            return
        width = len(self.panels[0])
        hessian, start = self.panels[0].new_empty(width, width), 0
        for panel in self.panels:
            hessian[start:, start : start + panel.shape[1]] = panel.div_(max(1, self.tokens))
            start += panel.shape[1]
        _mirror(hessian, len(self.panels[0][0]))
        self.hessian, self.panels = hessian, None
        if self.drift is not None:
            self.drift.div_(max(1, self.tokens))

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        hessian, absmax = (None if t is None else t.to(device) for t in (self.hessian, self.absmax))
        return replace(self, hessian=hessian, absmax=absmax)

    def divide(self, s: Tensor) -> None:
        """As they are of inputs that were divided by s (in,)."""
        if self.hessian is not None:
            self.hessian.div_(s[:, None]).div_(s)
        if self.absmax is not None:
            self.absmax.div_(s.abs())


def _panel_shapes(width: int) -> list[tuple[int, int]]:
    """Of the lower panels of (in, in)."""
    return [(width - start, min(PANEL, width - start)) for start in range(0, width, PANEL)]


def _mirror(hessian: Tensor, panel: int) -> None:
    """What is above the panels on the diagonal."""
    for start in range(0, len(hessian), panel):
        hessian[start : start + panel, start + panel :] = hessian[
            start + panel :, start : start + panel
        ].t()


def pack_hessian(hessian: Tensor) -> Tensor:
    """The lower panels of (in, in), one after the other."""
    starts = range(0, len(hessian), PANEL)
    return torch.cat([hessian[start:, start : start + PANEL].reshape(-1) for start in starts])


def unpack_hessian(panels: Tensor, columns: int, panel: int = PANEL) -> Tensor:
    """All of (in, in).

    >>> hessian = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 5.0], [3.0, 5.0, 6.0]])
    >>> torch.equal(unpack_hessian(pack_hessian(hessian), 3), hessian)
    True
    >>> unpack_hessian(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), 3, panel=1)
    tensor([[1., 2., 3.],
            [2., 4., 5.],
            [3., 5., 6.]])
    """
    hessian = torch.empty(columns, columns)
    done = 0
    for start in range(0, columns, panel):
        part = hessian[start:, start : start + panel]
        part.copy_(panels[done : done + part.numel()].view(part.shape))
        done += part.numel()
    _mirror(hessian, panel)
    return hessian


def panel_values(columns: int, panel: int = PANEL) -> int:
    """How many values the lower panels of (in, in) have.

    >>> panel_values(512), 512 * (512 + 256) // 2
    (196608, 196608)
    """
    return sum((columns - start) * min(panel, columns - start) for start in range(0, columns, panel))


def find_inputs(block: nn.Module, wiring: Wiring, linears: Collection[str]) -> list[tuple[str, ...]]:
    """Which of these linears have statistics in common, in the order of their calls.

    Those that read one tensor have; in a mixture each expert has tokens of its own.
    """
    found: list[tuple[str, ...]] = []
    for group in wiring.groups:
        some = [path for path in group.linears if path in linears]
        shared = tuple(path for path in some if not is_expert(block, path))
        found += [shared] if shared else []
        found += [(path,) for path in some if is_expert(block, path)]
    return found


def divide_inputs(
    block: nn.Module, inputs: list[tuple[str, ...]], limit: int | None
) -> list[list[tuple[str, ...]]]:
    """Those whose Hessians are in memory at a time, at least one; the limit is in bytes."""
    passes: list[list[tuple[str, ...]]] = [[]]
    held = 0
    for linears in inputs:
        size = 4 * _width(block, linears[0]) ** 2
        if limit is not None and passes[-1] and held + size > limit:
            passes.append([])
            held = 0
        passes[-1].append(linears)
        held += size
    return passes


def divide_samples(samples: range) -> list[range]:
    """The parts of calibration samples that are summed alone, as equal as can be.

    >>> divide_samples(range(10, 14)), len(divide_samples(range(124)))
    ([range(10, 11), range(11, 12), range(12, 13), range(13, 14)], 8)
    """
    count = min(PARTS, len(samples))
    ends = [samples.start + i * len(samples) // count for i in range(count + 1)]
    return [range(start, stop) for start, stop in pairwise(ends)]


def collect(
    stream: Stream,
    number: int,
    block: nn.Module,
    inputs: list[tuple[str, ...]],
    needs: frozenset[str],
    samples: range,
    into: Tensor | None = None,
    ranks: Ranks = ALONE,
    owners: dict[tuple[str, ...], int] | None = None,
    rounded: Mapping[str, Tensor] | None = None,
) -> dict[tuple[str, ...], InputStats]:
    """Run samples through a block and look at what its linears read.

    Each part of the samples is summed alone, and the sums are added in the order of the parts: so the
    bits are the same whichever rank runs a part.

    Args:
        stream: at this block.
        number: of the block.
        block: as it stands.
        inputs: linears that read one tensor; see `find_inputs`.
        needs: "hessian", "absmax".
        samples: of the stream.
        into: what the block makes of them is written here; None: it is run only as far as needed.
        ranks: that run the parts in turn; each holds the states of its own.
        owners: by input, the rank that gets the Hessian; tokens and absmax all get.
        rounded: weights (out, in) of linears that were rounded before those of the one input that is
            looked at then: its statistics are of the block with them, and how it drifted from without.
    """
    stats = {i: InputStats.of(_width(block, i[0]), needs - {"hessian"}, stream.device) for i in inputs}
    sums: dict[tuple[str, ...], list[Tensor]] = {}
    parts = divide_samples(samples)
    with stream.in_fast_dtype(number, block):
        rounded = rounded and _as_they_run(block, rounded)
        for first in range(0, len(parts), ranks.count):
            now = parts[first : first + ranks.count]
            found: dict[tuple[str, ...], InputStats] = {}
            if ranks.rank < len(now):
                found = _collect_part(
                    stream, number, block, inputs, needs, now[ranks.rank], into, rounded
                )
            for linears in inputs:
                own = found.pop(linears, None)
                if own is not None:
                    stats[linears].see(own)
                if "hessian" in needs:
                    given = None if own is None else own.sums
                    owner = 0 if owners is None else owners[linears]
                    width = _width(block, linears[0])
                    shapes = _panel_shapes(width) + ([(width, width)] if rounded else [])
                    total = sums.get(linears)
                    for giver in range(len(now)):
                        total = _add_part(ranks, giver, owner, given, total, shapes, stream.device)
                    if total is not None:
                        sums[linears] = total
    counts = ranks.gather([stat.tokens for stat in stats.values()])
    ranks.largest([stat.absmax for stat in stats.values() if stat.absmax is not None])
    for i, (linears, stat) in enumerate(stats.items()):
        stat.tokens = sum(count[i] for count in counts)
        stat.panels = sums.pop(linears, None)
        if stat.panels is not None and rounded:
            stat.drift = stat.panels.pop()
        stat.finish()
    return stats


def _collect_part(
    stream: Stream,
    number: int,
    block: nn.Module,
    inputs: list[tuple[str, ...]],
    needs: frozenset[str],
    part: range,
    into: Tensor | None,
    rounded: Mapping[str, Tensor] | None,
) -> dict[tuple[str, ...], InputStats]:
    """Run one part of the samples."""
    found = {i: InputStats.of(_width(block, i[0]), needs, stream.device) for i in inputs}
    if rounded:
        ((linears, stat),) = found.items()
        width = _width(block, linears[0])
        stat.drift = torch.zeros(width, width, device=stream.device)
        for rows in stream.batches(part):
            before = _read(stream, number, block, linears[0], rows)
            with _other_weights(block, rounded):
                stat.add_drifted(before, _read(stream, number, block, linears[0], rows))
        return found
    with _hooks(block, {linears[0]: stat.add for linears, stat in found.items()}, into is None):
        for rows in stream.batches(part):
            with suppress(_AllSeen):
                output = stream.run(number, block, stream.states[rows])
                if into is not None:
                    into[rows] = output
    return found


def _read(stream: Stream, number: int, block: nn.Module, linear: str, rows: slice) -> Tensor:
    """What a linear reads of some samples, (tokens, in), when it is first called."""
    found: list[Tensor] = []
    with _hooks(block, {linear: found.append}, stop=True), suppress(_AllSeen):
        stream.run(number, block, stream.states[rows])
    return found[0] if found else torch.empty(0, _width(block, linear), device=stream.device)


@contextmanager
def _other_weights(block: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Let linears have other weights (out, in) until it is left."""
    modules = {path: block.get_submodule(path) for path in weights}
    held = {path: float_weight(module) for path, module in modules.items()}
    try:
        for path, module in modules.items():
            set_float_weight(module, weights[path])
        yield
    finally:
        for path, module in modules.items():
            set_float_weight(module, held[path])


def _as_they_run(block: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In the dtype in which the block has those of the same linears now."""
    return {path: w.to(float_weight(block.get_submodule(path)).dtype) for path, w in weights.items()}


def _add_part(
    ranks: Ranks,
    giver: int,
    owner: int,
    given: list[Tensor] | None,
    total: list[Tensor] | None,
    shapes: list[tuple[int, int]],
    device: torch.device,
) -> list[Tensor] | None:
    """Add the sum of one part to those of the parts before, at the rank that gets it."""
    if ranks.rank == giver != owner:
        assert given is not None
        for panel in given:
            ranks.send(panel, owner)
    if ranks.rank != owner:
        return None
    if giver == owner and total is None:
        return given
    if total is None:
        total = [torch.empty(shape, device=device) for shape in shapes]
        for panel in total:
            ranks.receive(panel, giver)
        return total
    for i, panel in enumerate(total):
        if giver == owner:
            assert given is not None
            panel.add_(given[i])
        else:
            more = torch.empty_like(panel)
            ranks.receive(more, giver)
            panel.add_(more)
    return total


class _AllSeen(Exception):  # noqa: N818
    """All linears that are watched were reached: what comes after them is of no use."""


@contextmanager
def _hooks(
    block: nn.Module, takers: Mapping[str, Callable[[Tensor], None]], stop: bool
) -> Iterator[None]:
    """Hand every input (tokens, in) of some linears on while the block runs."""
    needed = set(takers)
    pending, experts = set(needed), any(is_expert(block, path) for path in takers)

    def watch(path: str, take: Callable[[Tensor], None]) -> Callable[..., None]:
        def record(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            take(args[0].reshape(-1, args[0].shape[-1]))
            pending.discard(path)
            if stop and not pending and not experts:  # an expert may be called again, or later
                pending.update(needed)
                raise _AllSeen

        return record

    handles = [
        block.get_submodule(path).register_forward_pre_hook(watch(path, take))
        for path, take in takers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def share_absmax(pieces: dict[str, list[Piece]], stats: dict[str, InputStats]) -> None:
    """Experts that lie in one tensor on disk have their columns in common, seen by any of them."""
    stacks: dict[str, list[Tensor]] = defaultdict(list)
    for linear, parts in pieces.items():
        found = stats[linear].absmax if linear in stats else None
        for piece in parts:
            if piece.expert is not None and found is not None:
                stacks[piece.source].append(found)
    for stack in stacks.values():
        largest = torch.stack(stack).amax(0)
        for absmax in stack:
            absmax.copy_(largest)


def is_expert(block: nn.Module, path: str) -> bool:
    """Whether a linear of the block is one of a mixture's."""
    return isinstance(block.get_submodule(path.rpartition(".")[0]), ExpertLinears)


def _width(block: nn.Module, path: str) -> int:
    return float_weight(block.get_submodule(path)).shape[1]


# -- kept --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Input:
    """What some linears of a block read.

    Args:
        linears: by path inside the block; tensors are named after the first.
        columns: features.
        tokens: that were seen.
    """

    linears: tuple[str, ...]
    columns: int
    tokens: int


@dataclass(frozen=True, slots=True)
class MeasuredBlock:
    """What is known of one block: which of the wirings is its own, and what its linears read."""

    kind: str
    inputs: tuple[Input, ...]


def tensor_name(number: int, linears: tuple[str, ...], what: str) -> str:
    """Of a tensor in a folder of statistics.

    >>> tensor_name(0, ("self_attn.q_proj", "self_attn.k_proj"), "hessian")
    '0.self_attn.q_proj.hessian'
    """
    return f"{number}.{linears[0]}.{what}"


def fisher_name(number: int) -> str:
    """Of what errors of a block's output cost."""
    return f"{number}.output.fisher"


def outside_name(source: str) -> str:
    """Of the Hessian of a source tensor that stands outside of the blocks."""
    return f"{source}.hessian"


@dataclass(slots=True)
class Statistics:
    """A folder of statistics, with its tensors unread.

    Args:
        folder: where it lies.
        version: of fewbits.
        request: what was asked for; `calibration` in it says on which text.
        source: the model, as in a ledger.
        made_with: what the last bits of sums depend on.
        held_out: how many of `ids`, at the end, are kept for judging.
        wirings: by kind of block.
        blocks: in their order.
        sources: sha256 of each source tensor.
        tensors: all that is in the weight files, by name.
        files: their sizes and hashes.
        damage: predicted KL in nats per token, by source tensor and label of a scheme; may be empty.
        folded: the same, of matrices whose inputs AWQ can scale, after that.
        notes: on the text, and the run.
        panel: columns of a panel of a Hessian.
    """

    folder: Path
    version: str
    request: dict[str, Any]
    source: dict[str, Any]
    made_with: dict[str, Any]
    held_out: int
    wirings: dict[str, Wiring]
    blocks: tuple[MeasuredBlock, ...]
    sources: dict[str, str]
    tensors: dict[str, Written]
    files: dict[str, dict[str, Any]]
    damage: dict[str, dict[str, float]] = field(default_factory=dict)
    folded: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()
    panel: int = PANEL
    _shards: Checkpoint | None = field(default=None, repr=False)
    _inputs: dict[tuple[int, str], Input] = field(default_factory=dict, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Ready to be written; holds a hash of itself."""
        value = {
            "fewbits": self.version,
            "request": self.request,
            "source": self.source,
            "made_with": self.made_with,
            "held_out": self.held_out,
            "panel": self.panel,
            "wirings": {kind: asdict(wiring) for kind, wiring in self.wirings.items()},
            "blocks": [asdict(block) for block in self.blocks],
            "damage": self.damage,
            "folded": self.folded,
            "notes": [asdict(note) for note in self.notes],
            "sources": self.sources,
            "tensors": {name: asdict(written) for name, written in self.tensors.items()},
            "files": self.files,
        }
        return value | {"sha256": hash_json(plain(value))}

    def damage_of(self, recipe: Recipe) -> dict[str, dict[str, float]]:
        """The damage that schemes are chosen by: after folds, where a recipe has them and they help."""
        if not recipe.transforms:
            return self.damage
        return {
            name: {label: min(cost, self.folded.get(name, nats)[label]) for label, cost in nats.items()}
            for name, nats in self.damage.items()
        }

    @property
    def sha256(self) -> str:
        """Of statistics.json, and so of all it speaks of."""
        return str(self.to_json()["sha256"])

    @property
    def calibration(self) -> dict[str, Any]:
        """The text, as in a ledger."""
        found: dict[str, Any] = self.request["calibration"]
        return found

    @property
    def shape(self) -> tuple[int, int]:
        """Samples and length of the calibration that was measured on."""
        return self.calibration["samples"], self.calibration["length"]

    @property
    def size_bytes(self) -> int:
        """Of all weight files."""
        return sum(stated["size_bytes"] for stated in self.files.values())

    @property
    def ids(self) -> Tensor:
        """The samples (n, length) to search with and to learn from; behind them those held out."""
        return self.read("ids")

    def samples(self, count: int) -> Tensor:
        """The first of `ids`, at most so many, and behind them those held out."""
        ids, held_out = self.ids, self.held_out
        kept = min(count, len(ids) - held_out)
        return torch.cat([ids[:kept], ids[len(ids) - held_out :]])

    def read(self, name: str) -> Tensor:
        """A tensor, mapped. Do not modify.

        Raises:
            InputError: there is none, or it is not what was written.
        """
        if name not in self.tensors:
            raise InputError(f"{self.folder} holds no {shown(name)}; accepted is what measure wrote")
        if self._shards is None:
            self._shards = _open_shards(self.folder, list(self.files))
        stated, info = self.tensors[name], self._shards.tensors.get(name)
        if info is None:
            raise InputError(f"{self.folder} holds no {shown(name)}: a file of it was changed")
        tensor = self._shards.read(name)
        held = str(info.dtype).removeprefix("torch."), info.shape, hash_tensor(tensor)
        if held != (stated.dtype, stated.shape, stated.sha256):
            raise InputError(
                f"{self.folder / info.file}: {shown(name)} was changed since it was measured; accepted "
                "is what measure wrote"
            )
        return tensor

    def wiring(self, number: int, kind: str) -> Wiring:
        """Of a block.

        Raises:
            InputError: this block is of another kind.
        """
        if number >= len(self.blocks) or self.blocks[number].kind != kind:
            raise InputError(
                f"{self.folder}: block {number} is made of other modules than when it was measured, "
                f"with transformers {self.made_with.get('transformers')}; accepted is to measure again"
            )
        return self.wirings[kind]

    def stats(
        self, number: int, linears: tuple[str, ...], width: int, needs: frozenset[str]
    ) -> InputStats:
        """Of what some linears of a block read, as far as it is needed.

        Raises:
            InputError: they were not measured, or do not read one tensor of this width.
        """
        if not self._inputs:
            self._inputs = {
                (i, path): one
                for i, block in enumerate(self.blocks)
                for one in block.inputs
                for path in one.linears
            }
        found = {self._inputs.get((number, path)) for path in linears}
        one = found.pop()
        if found or one is None or one.columns != width:
            raise InputError(
                f"{self.folder}: {', '.join(linears)} of block {number} with {width} inputs were not "
                "measured together; accepted is to measure again"
            )
        stats = InputStats(tokens=one.tokens)
        if "hessian" in needs:
            name = tensor_name(number, one.linears, "hessian")
            panels = self._floats(name, panel_values(width, self.panel))
            stats.hessian = unpack_hessian(panels, width, self.panel)
        if "absmax" in needs:
            stats.absmax = self._floats(tensor_name(number, one.linears, "absmax"), width).clone()
        return stats

    def fisher(self, number: int, width: int) -> Tensor | None:
        """What errors of a block's output cost, (hidden, hidden); None: it was not measured."""
        name = fisher_name(number)
        if name not in self.tensors:
            return None
        return unpack_hessian(self._floats(name, panel_values(width, self.panel)), width, self.panel)

    def outside(self, source: str, width: int) -> Tensor | None:
        """What errors of a row of a head or an embedding cost, (in, in); None: nobody knows.

        Of a head it is the Hessian of what it reads, tokens weighed by their squared gradients; of an
        embedding the squared gradients of its rows, on the diagonal; of both in one the sum.
        """
        name = outside_name(source)
        if name not in self.tensors:
            return None
        return unpack_hessian(self._floats(name, panel_values(width, self.panel)), width, self.panel)

    def _floats(self, name: str, count: int) -> Tensor:
        tensor = self.read(name)
        if tensor.dtype != torch.float32 or tensor.shape != (count,):
            raise InputError(
                f"{self.folder}: {shown(name)} is {tuple(tensor.shape)} {tensor.dtype}; accepted are "
                f"{count} float32"
            )
        return tensor

    def check_source(self, source: dict[str, Any]) -> None:
        """Whether it is of this model, as headers tell.

        Args:
            source: as in a ledger.

        Raises:
            InputError: it is not; the differences are named.
        """
        found = differences(_weights_of(self.source), _weights_of(source))
        if found:
            raise InputError(
                f"{self.folder} was measured on another model: {', '.join(found)}; accepted are "
                "statistics of the model that is quantized"
            )

    def check_tensor(self, name: str, sha256: str) -> None:
        """Whether a source tensor has the values that were measured.

        Raises:
            InputError: it has not.
        """
        if self.sources.get(name) != sha256:
            raise InputError(
                f"{self.folder} was measured on another model: {name} has other values; accepted are "
                "statistics of the model that is quantized"
            )

    def verify(self) -> None:
        """Read everything, and compare it with what was written.

        Raises:
            VerificationError: a file or a tensor is not what it should be.
        """
        try:
            for name, stated in self.files.items():
                path = self.folder / name
                if check_file(path, self.folder) != stated["size_bytes"]:
                    raise InputError(f"{path} has another size than was written")
                if hash_file(path) != stated["sha256"]:
                    raise InputError(f"{path} was changed since it was written")
            for name in self.tensors:
                self.read(name)
        except InputError as error:
            raise VerificationError(f"{error}; --restart measures again") from None


def _weights_of(source: dict[str, Any]) -> dict[str, Any]:
    """Neither where it lay nor what lies beside the weights."""
    return {key: source.get(key) for key in ("config_sha256", "files")}


def _open_shards(folder: Path, files: list[str]) -> Checkpoint:
    shards = Checkpoint(folder, {}, {}, {}, {})
    for file in files:
        if file.endswith(".safetensors"):
            shards.tensors |= {info.name: info for info in read_header(folder / file)[0]}
    return shards


def read_statistics(folder: str | Path) -> Statistics:
    """What a folder of statistics says; its tensors are read when they are needed.

    Raises:
        InputError: there is none, or it was changed after it was written.
    """
    folder = Path(folder)
    path = folder / STATISTICS
    if not path.is_file():
        raise InputError(f"{folder} has no {STATISTICS}; accepted is a folder that measure wrote")
    try:
        value = parse_json(read_bytes(path, _MAX_JSON, folder))
        stated = value.pop("sha256")
        if stated != hash_json(value):
            raise InputError(f"{path} was changed: its own hash does not match")
        statistics = _from_json(folder, value)
        check_types(statistics, Statistics, "it")
        _check_values(statistics)
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{path} is not of this version: {error}") from None
    return statistics


def _from_json(folder: Path, value: dict[str, Any]) -> Statistics:
    blocks = [
        MeasuredBlock(
            block["kind"],
            tuple(Input(tuple(i["linears"]), i["columns"], i["tokens"]) for i in block["inputs"]),
        )
        for block in value["blocks"]
    ]
    return Statistics(
        folder, value["fewbits"], value["request"], value["source"], value["made_with"],
        value["held_out"],
        {kind: Wiring.from_json(wiring) for kind, wiring in value["wirings"].items()},
        tuple(blocks), value["sources"],
        {name: Written(**w | {"shape": tuple(w["shape"])}) for name, w in value["tensors"].items()},
        value["files"], value["damage"], value["folded"], tuple(Note(**note) for note in value["notes"]),
        value["panel"],
    )  # fmt: skip


def _check_values(statistics: Statistics) -> None:
    """Refuse what the types allow and no run writes."""
    check_types(statistics.calibration, dict[str, Any], "calibration")
    samples, length = statistics.shape
    kinds = {block.kind for block in statistics.blocks}
    if not counts([samples, length]) or statistics.panel < 1 or statistics.held_out < 1:
        raise ValueError("samples, length, panel and held_out are numbers from 1")
    ids = statistics.tensors["ids"].shape
    if len(ids) != 2 or ids[1] != length or not statistics.held_out < ids[0] <= samples:
        raise ValueError(f"ids are {shown(ids)}, of {samples} samples of {length} tokens")
    if not kinds <= statistics.wirings.keys():
        raise ValueError("a block is of a kind that has no wiring")
    for name, stated in statistics.files.items():
        if not name.isprintable() or "\\" in name or "/" in name or name in ("", ".", ".."):
            raise ValueError(f"{shown(name)} is no file inside of its folder")
        check_types(stated["sha256"], str, f"sha256 of {name}")
        if not counts([stated["size_bytes"]]):
            raise ValueError(f"{shown(stated['size_bytes'])} is no size")
