"""What LLM.int8() is about: which input columns are outliers, and what they cost in 8 bits.

Dettmers et al. 2022, arXiv 2208.07339: in large models a few features of the hidden states are tens of
times larger than all others. One scale per token must cover them, and little of the 8 bits is left for
the rest; with those columns in 16 bit there is enough. Here the float model is run block by block on
calibration tokens, and every input of a quantizable matrix is looked at.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.affine import choose_qparams, dequantize, quantize
from fewbits.calibration import SELF, Progress
from fewbits.checkpoint import resolve
from fewbits.errors import InputError
from fewbits.evaluate import read_calibration_of
from fewbits.linear import float_weight
from fewbits.methods import RTN
from fewbits.plan import Plan, make_plan
from fewbits.recipe import Recipe
from fewbits.scheme import QuantScheme
from fewbits.stream import Stream
from fewbits.structure import Matrix, find_blocks, skeleton
from fewbits.text import Text
from fewbits.wiring import Wiring, find_wiring, signature

THRESHOLD = 6.0  # Dettmers et al. 2022, section 3.2
SAMPLES, LENGTH = 16, 512  # of calibration: maxima settle on few tokens, and a model writes them quickly
_W8 = QuantScheme(8)
_JUDGED = 256  # tokens that the errors of a matrix are computed on; not tuned
_JUDGED_EXPERT = 16  # at least, of each expert: all of a mixture share the number above; not tuned
_PROBE = 64  # tokens that the wiring is found with; not tuned


@dataclass(frozen=True, slots=True)
class MatrixError:
    """What 8 bits do to the output of one matrix W (out, in) on inputs x (tokens, in).

    All are means over the same tokens of |.|^2 summed over the outputs, without the bias, in float32.
    x is what the float model gives. q(W) is W rounded to 8 bits, symmetric, one scale per output channel
    in the dtype of the tensor on disk; q(x) is x rounded to the nearest of -127..127 times max|x| / 127
    of each token. x' and W' are x and W with the outlier columns at 0: no scale has to cover them.

    Args:
        name: source tensor; stacked experts have their number behind it.
        output: |x W^T|^2.
        plain: |q(x) q(W)^T - x W^T|^2, W8A8 of all columns.
        kept: |q(x') q(W')^T - x' W'^T|^2: the outlier columns are multiplied as they are, which 16 bits
            are taken to do without an error, so that their share of both products cancels.
    """

    name: str
    output: float
    plain: float
    kept: float

    @property
    def ratio(self) -> float | None:
        """Error share of the outlier columns: plain / kept; None where kept leaves no error."""
        return self.plain / self.kept if self.kept > 0 else None


@dataclass(frozen=True, slots=True)
class InputReport:
    """One tensor that matrices of a block read, over all tokens of calibration.

    Args:
        block: number.
        name: of its readers inside the block, like `self_attn.q/k/v_proj`.
        expert: whose input it is; None outside of mixtures. Each expert has the tokens routed to it.
        features: columns.
        tokens: that were seen; 0: its readers were never called, or no token was routed there.
        columns: the outliers: numbers of the features with an |x| > threshold on any token.
        largest: |x|.
        median: over features, of the largest |x| of each.
        outlier_tokens: tokens with at least one |x| > threshold.
        matrices: its readers, and their errors on some of the tokens.
    """

    block: int
    name: str
    expert: int | None
    features: int
    tokens: int
    columns: tuple[int, ...]
    largest: float
    median: float
    outlier_tokens: int
    matrices: tuple[MatrixError, ...]

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        ratios = [{"error_ratio": matrix.ratio} for matrix in self.matrices]
        matrices = [asdict(m) | more for m, more in zip(self.matrices, ratios, strict=True)]
        return asdict(self) | {"matrices": matrices}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table, one cell of the picture: an input, or those of all experts of a mixture.

    Args:
        experts: how many are put together; 0: it is no mixture.
        outliers: outlier columns; of experts the sum.
        largest, median: of experts the largest of any.
        token_share: tokens with an outlier, of all; of experts both are sums. None without tokens.
        plain, kept: squared errors over the squared output, all matrices and experts summed, each
            weighted with its tokens; see `MatrixError`. None without an output.
        ratio: plain / kept, which is 1 without outliers; None where kept leaves no error.
    """

    block: int
    name: str
    experts: int
    features: int
    outliers: int
    largest: float
    median: float
    token_share: float | None
    plain: float | None
    kept: float | None
    ratio: float | None


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was found.

    Args:
        threshold: of |x|.
        calibration: which tokens, see `Calibration.to_json`.
        inputs: by block, in call order.
        skipped: quantizable matrices outside of the blocks, which were not looked at.
        notes: of calibration.
    """

    threshold: float
    calibration: dict[str, Any]
    inputs: tuple[InputReport, ...]
    skipped: tuple[str, ...]
    notes: tuple[str, ...]

    def rows(self) -> list[Row]:
        """Each input, those of a mixture's experts together."""
        together: dict[tuple[int, str], list[InputReport]] = defaultdict(list)
        for report in self.inputs:
            together[report.block, report.name].append(report)
        return [_row(reports) for reports in together.values()]

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"inputs": [report.to_json() for report in self.inputs]}


def _row(reports: list[InputReport]) -> Row:
    first, tokens = reports[0], sum(r.tokens for r in reports)
    output, plain, kept = (
        sum(r.tokens * getattr(m, what) for r in reports for m in r.matrices)
        for what in ("output", "plain", "kept")
    )
    return Row(
        first.block,
        first.name,
        0 if first.expert is None else len(reports),
        first.features,
        sum(len(r.columns) for r in reports),
        max(r.largest for r in reports),
        max(r.median for r in reports),
        sum(r.outlier_tokens for r in reports) / tokens if tokens else None,
        plain / output if output > 0 else None,
        kept / output if output > 0 else None,
        plain / kept if kept > 0 else None,
    )


def inspect_outliers(
    model: str | Path,
    *,
    calibration: str | Path | Text | Tensor = SELF,
    samples: int = SAMPLES,
    length: int | None = None,
    seed: int = 0,
    threshold: float = THRESHOLD,
    progress: Progress | None = None,
) -> Inspection:
    """Run a float model block by block and measure the outliers among the inputs of its matrices.

    Args:
        model: folder of a float checkpoint, or a hub id.
        calibration: what it is run on, by default text that it writes itself; see `read_calibration`,
            also for samples and seed.
        length: tokens of a sample; 512 by default, at most the context.
        threshold: an |x| above it makes its column an outlier.
        progress: called with (what, done, total).

    Raises:
        InputError: no float checkpoint, blocks that cannot be run on their own, tokens that the model
            does not know, states that are not finite, or a threshold that is not above 0.
    """
    if not 0 < threshold < float("inf"):
        raise InputError(f"threshold is {threshold}; accepted are finite numbers above 0")
    plan = make_plan(resolve(model), Recipe(RTN(), _W8))
    data = read_calibration_of(
        plan.checkpoint.folder, calibration, samples, length, seed, progress, most=LENGTH
    )
    stream = Stream(plan.checkpoint, data.ids)
    inspector, inputs = _Inspector(plan, stream, threshold), list[InputReport]()
    for number in range(stream.count):
        if progress is not None:
            progress("blocks", number, stream.count)
        inputs += inspector.block(number)
    if progress is not None:
        progress("blocks", stream.count, stream.count)
    plan.checkpoint.close()
    skipped = tuple(name for name in plan.placements if plan.matrices[name].block is None)
    return Inspection(threshold, data.to_json(), tuple(inputs), skipped, tuple(map(str, data.notes)))


@dataclass(frozen=True, slots=True)
class WeightReport:
    """How far the largest weight of a matrix stands out.

    Args:
        name: source tensor; a stack of experts is one.
        block: number; None outside of the blocks.
        module: name inside the block, or whole outside.
        rms: root of the mean square.
        largest: |w| over that; a normal distribution has 4 to 6 in matrices of this size.
        beyond: share of weights with an |w| above 6 times that.
    """

    name: str
    block: int | None
    module: str
    rms: float
    largest: float
    beyond: float


def weight_outliers(plan: Plan) -> list[WeightReport]:
    """Of all matrices that a plan quantizes, read one at a time."""
    path, reports = find_blocks(skeleton(plan.checkpoint.config)), []
    for name in plan.placements:
        matrix = plan.matrices[name]
        weight = plan.checkpoint.read(plan.origins.get(name, name)).float().abs()
        rms = float(weight.square().mean().sqrt())
        unit = rms or 1.0
        inside = matrix.module.removeprefix(f"{path}.{matrix.block}.")
        beyond = float((weight > THRESHOLD * unit).float().mean())
        largest = float(weight.max()) / unit
        reports.append(WeightReport(name, matrix.block, inside, rms, largest, beyond))
    plan.checkpoint.close()
    return reports


# -- block by block ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of a linear that are one source matrix, or one expert's of a stack."""

    name: str
    source: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class _Input:
    """One tensor and the quantizable linears of the block that read it, by path inside the block."""

    linears: tuple[str, ...]
    name: str
    expert: int | None


class _Inspector:
    """What stays the same from block to block."""

    def __init__(self, plan: Plan, stream: Stream, threshold: float) -> None:
        self.plan, self.stream, self.threshold = plan, stream, threshold
        self.wirings: dict[Any, Wiring] = {}

    def block(self, number: int) -> list[InputReport]:
        """Look at one block, and take the samples through it."""
        stream = self.stream
        block = stream.load(number)
        prefix = f"{stream.path}.{number}."
        inside = [m for name in self.plan.placements if (m := self.plan.matrices[name]).block == number]
        parts = _parts(inside, prefix)
        experts = {path for m in inside if m.kind == "expert" for path in _linears(m, prefix)}
        inputs = _inputs(self._wiring(number, block), parts, experts)
        # One run does all: nothing of this block changes between looking at it and going on.
        seen = {given: self._watcher(block, given, len(experts)) for given in inputs}
        with _hooks(block, {given.linears[0]: watcher for given, watcher in seen.items()}):
            stream.advance(number, block, range(len(stream.states)), stream.states)
        return [self._report(number, block, given, seen[given], parts) for given in inputs]

    def _wiring(self, number: int, block: nn.Module) -> Wiring:
        """Found once for each distinct shape of a block."""
        shape = signature(block)
        if shape not in self.wirings:
            run = partial(self.stream.run, number, block, self.stream.states[:1, :_PROBE])
            self.wirings[shape] = find_wiring(block, run, with_pairs=False)
        return self.wirings[shape]

    def _watcher(self, block: nn.Module, given: _Input, experts: int) -> "_Watcher":
        features = float_weight(block.get_submodule(given.linears[0])).shape[1]
        shared = given.expert is not None
        return _Watcher(
            features, self.threshold, max(_JUDGED_EXPERT, _JUDGED // experts) if shared else _JUDGED
        )

    def _report(
        self,
        number: int,
        block: nn.Module,
        given: _Input,
        seen: "_Watcher",
        parts: dict[str, list[_Part]],
    ) -> InputReport:
        if not bool(torch.isfinite(seen.absmax).all()):
            named = parts[given.linears[0]][0].name
            raise InputError(f"{named}: its inputs hold NaN or infinity; accepted are finite ones")
        columns = (seen.absmax > self.threshold).nonzero()[:, 0]
        errors = []
        for linear in given.linears:
            weight = float_weight(block.get_submodule(linear)).float()
            for part in parts[linear]:
                dtype = self.plan.info(part.source).dtype
                three = (
                    _errors(weight[part.start : part.stop], seen.kept, columns, dtype)
                    if len(seen.kept)
                    else (0.0, 0.0, 0.0)
                )
                errors.append(MatrixError(part.name, *three))
        return InputReport(
            number,
            given.name,
            given.expert,
            len(seen.absmax),
            seen.tokens,
            tuple(columns.tolist()),
            float(seen.absmax.max()),
            float(seen.absmax.median()),
            seen.outlier_tokens,
            tuple(errors),
        )


class _Watcher:
    """What is remembered of an input: the largest |x| of each feature, and `most` of its tokens."""

    def __init__(self, features: int, threshold: float, most: int) -> None:
        self.threshold, self.most = threshold, most
        self.absmax = torch.zeros(features)
        self.tokens = self.outlier_tokens = 0
        self.kept, self.ranks = torch.empty(0, features), torch.empty(0)
        self.generator = torch.Generator().manual_seed(0)

    def add(self, x: Tensor) -> None:
        """Look at tokens (..., features)."""
        x = x.detach().reshape(-1, x.shape[-1])
        if not len(x):
            return
        size = x.abs()
        self.absmax = torch.maximum(self.absmax, size.amax(0).float())
        self.outlier_tokens += int((size.amax(1).float() > self.threshold).sum())
        self.tokens += len(x)
        # The lowest of random ranks: drawn evenly from all tokens, however many there will be. Every
        # so manieth would meet the first token of each sample too often, and that is an odd one.
        ranks = torch.rand(len(x), generator=self.generator)
        low = ranks.topk(min(self.most, len(x)), largest=False).indices
        ranks, kept = torch.cat([self.ranks, ranks[low]]), torch.cat([self.kept, x[low].float()])
        low = ranks.topk(min(self.most, len(ranks)), largest=False).indices
        self.ranks, self.kept = ranks[low], kept[low]


@contextmanager
def _hooks(block: nn.Module, watchers: dict[str, _Watcher]) -> Iterator[None]:
    """Show the inputs of linears to their watchers while the block runs."""

    def watch(watcher: _Watcher) -> Callable[..., None]:
        return lambda _module, args: watcher.add(args[0])

    handles = [
        block.get_submodule(path).register_forward_pre_hook(watch(watcher))
        for path, watcher in watchers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# -- which matrices there are --------------------------------------------------------------------------


def _linears(matrix: Matrix, prefix: str) -> list[str]:
    """The linears of a block that a source matrix is rows of; several of a stack."""
    module = matrix.module.removeprefix(prefix)
    if matrix.kind != "expert":
        return [module]
    numbers = range(matrix.shape[0]) if matrix.expert is None else [matrix.expert]
    return [f"{module}.{matrix.parameter}.{i}" for i in numbers]


def _parts(matrices: list[Matrix], prefix: str) -> dict[str, list[_Part]]:
    """The source matrices of each linear, from its first row on."""
    parts: dict[str, list[_Part]] = defaultdict(list)
    for matrix in sorted(matrices, key=lambda m: (m.expert or 0, m.part)):
        for i, linear in enumerate(_linears(matrix, prefix)):
            start = parts[linear][-1].stop if parts[linear] else 0
            name = f"{matrix.source}[{i}]" if matrix.stacked else matrix.source
            parts[linear].append(_Part(name, matrix.source, start, start + matrix.rows_columns[0]))
    return parts


def _inputs(wiring: Wiring, parts: dict[str, list[_Part]], experts: set[str]) -> list[_Input]:
    """Linears that read one tensor together; an expert, which reads some of its rows, alone."""
    inputs: list[_Input] = []
    for group in wiring.groups:
        shared = tuple(path for path in group.linears if path in parts and path not in experts)
        inputs += [_Input(shared, shared_name(shared), None)] if shared else []
        inputs += [_expert_input(path) for path in group.linears if path in experts]
    # Their weights are used without them, or not at all: they have a line too, without tokens.
    for path in wiring.unseen:
        if path in parts:
            inputs.append(_expert_input(path) if path in experts else _Input((path,), path, None))
    return inputs


def _expert_input(path: str) -> _Input:
    name, _, number = path.rpartition(".")
    return _Input((path,), name, int(number))


def shared_name(paths: tuple[str, ...]) -> str:
    """A short name for modules that read one tensor.

    >>> shared_name(("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc"))
    'attn.q/k/v_proj + mlp.fc'
    """
    named = []
    for parent, alike in groupby(paths, key=lambda path: path.rpartition(".")[0]):
        leaves = [path.rpartition(".")[2] for path in alike]
        ends = {leaf.rpartition("_")[2] for leaf in leaves}
        if len(leaves) > 1 and len(ends) == 1 and all("_" in leaf for leaf in leaves):
            leaf = "/".join(leaf.rpartition("_")[0] for leaf in leaves) + f"_{ends.pop()}"
        else:
            leaf = "/".join(leaves)
        named.append(f"{parent}.{leaf}" if parent else leaf)
    return " + ".join(named)


# -- errors --------------------------------------------------------------------------------------------


def _errors(
    weight: Tensor, x: Tensor, columns: Tensor, dtype: torch.dtype
) -> tuple[float, float, float]:
    """`output`, `plain` and `kept` of `MatrixError` for weight (out, in) and x (tokens, in), float32."""
    wanted = x @ weight.t()
    output = _mean_square(wanted)
    plain = _mean_square(_round_tokens(x) @ _round_weight(weight, dtype).t() - wanted)
    if not len(columns):
        return output, plain, plain
    x, weight = x.clone(), weight.clone()
    x[:, columns], weight[:, columns] = 0, 0
    error = _round_tokens(x) @ _round_weight(weight, dtype).t() - x @ weight.t()
    return output, plain, _mean_square(error)


def _mean_square(y: Tensor) -> float:
    return float(y.double().square().sum()) / len(y)


def _round_tokens(x: Tensor) -> Tensor:
    """x (tokens, in) to 8 bits, symmetric, one scale per token; a token of zeros stays."""
    scale = x.abs().amax(1, keepdim=True) / 127
    return (x / scale.where(scale > 0, 1.0)).round().clamp(-127, 127) * scale


def _round_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Weight (out, in) to 8 bits, one scale of this dtype per channel."""
    scale, zero_point = choose_qparams(weight, _W8, dtype)
    return dequantize(quantize(weight, scale, zero_point, _W8), scale, zero_point, _W8)
