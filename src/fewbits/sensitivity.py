"""What an error in each matrix costs in the end, in nats of KL, predicted by gradients.

For small errors the KL divergence of a model's predictions is half of the errors' square in the Fisher
information of those predictions. Tokens are drawn from the model's own predictions, and the gradients of
their log-probabilities pulled back, one block at a time. With x what a linear reads, g the gradient at
its output and P tokens drawn, an error E of its weight costs about

    1 / (2 P) sum_t (g_t . E x_t)^2  ~  sum_r rows_r E_r H E_r.T,    rows_r = 1 / (2 P) sum_t g_tr^2

where errors of different rows and tokens are taken to be independent, as in K-FAC (Martens and Grosse
2015, arXiv 1503.05671), and H is the mean of x.T @ x with tokens weighed by |g_t|^2 (GuidedQuant, Kim et
al. 2025, arXiv 2505.07004). What rounding leaves of E_r H E_r.T is what GPTQ's first pass leaves:
the squared rounding errors weighted by D of H = U D U.T (see `methods.gptq`), on the grid of least such
error. LOG.md says how well that predicts what is measured (2026-11-26).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.affine import dequantize, quantize
from fewbits.linear import float_weight
from fewbits.methods.gptq import factor
from fewbits.methods.grid import search_qparams
from fewbits.scheme import QuantScheme
from fewbits.stream import Stream
from fewbits.structure import find_head
from fewbits.trellis import CHAIN

_ROWS = 512  # of a matrix that are rounded, at most; the others are taken to lose alike; not tuned
_CHAINED_ROWS = 64  # alike, of a trellis, whose codes take longer to be found
# Of the fractions of a scale that methods try, without and with a trellis: what is lost is 1 to 3 % more
# (8 bits in small groups up to 10 %), and takes half of the time (LOG.md).
_EVERY = (3, 2)
_TOGETHER = 4096  # rows in float32 at a time; not tuned
_POSITIONS = 512  # that tokens are drawn at at a time, at least one sample; not tuned
_DAMP = 0.01  # of each column's H_kk, as GPTQ adds it

Linears = tuple[str, ...]  # that read one tensor


@dataclass(slots=True)
class Sensitivity:
    """Of linears that read one tensor.

    Args:
        linears: their paths.
        hessian: (in, in), the mean of x.T @ x, tokens weighed by their squared gradients at the outputs,
            of which each linear has the same say.
        rows: by linear, (out,): nats per token that a mean squared error of 1 at an output costs.
        weight: sum of the tokens' weights.
        tokens: that have weights, of all linears together.
        usual: by linear, the mean weight of the first tokens that have any, which all are divided by.
    """

    linears: Linears
    hessian: Tensor
    rows: dict[str, Tensor] = field(default_factory=dict)
    weight: float = 0.0
    tokens: int = 0
    usual: dict[str, float] = field(default_factory=dict)

    def finish(self, positions: int) -> None:
        """Sums become means."""
        self.hessian.div_(self.weight or 1.0)
        for rows in self.rows.values():
            rows.div_(2 * positions)


def draw_back(
    stream: Stream, states: Callable[[slice], Tensor], generator: torch.Generator, into: Tensor
) -> tuple[int, Sensitivity | None]:
    """Draw a token at each position that has logits, and pull back to the last block's output.

    Args:
        stream: of the samples.
        states: what the last block gives of some samples.
        generator: of the draw.
        into: (samples, length, hidden), the gradients.

    Returns:
        how many tokens were drawn, and what errors of the output head cost; None if it is no linear.
    """
    path = find_head(stream.network)
    head = None if path is None else stream.shell.get_submodule(path)
    weight = getattr(head, "weight", None)
    found = None
    if path is not None and isinstance(weight, Tensor) and hasattr(head, "every"):
        width = weight.shape[1]
        found = Sensitivity((path,), torch.zeros(width, width, device=stream.device))
    watched = {} if found is None else {found.linears: found}
    positions = 0
    with _watch(stream.shell, watched, stream.every) as settle:
        some = max(1, min(stream.batch, _POSITIONS * stream.every // stream.ids.shape[1]))
        for start in range(0, len(stream.ids), some):
            rows = slice(start, start + some)
            into[rows], drawn = stream.draw_back(states(rows), generator)
            positions += drawn
            settle()
    if found is not None:
        found.finish(positions)
    return positions, found


def find_fisher(gradients: Tensor, positions: int) -> Tensor:
    """What errors e of a block's output cost, as e.F.e nats a token, (hidden, hidden).

    Args:
        gradients: (samples, length, hidden) there.
        positions: that tokens were drawn at.
    """
    hidden = gradients.shape[-1]
    found = torch.zeros(hidden, hidden)
    for some in torch.split(gradients, max(1, _TOGETHER // gradients.shape[1])):
        rows = some.reshape(-1, hidden).float()
        found.addmm_(rows.t(), rows)
    return found.div_(2 * positions)


def pull_back(
    stream: Stream,
    number: int,
    block: nn.Module,
    inputs: Sequence[Linears],
    states: Callable[[slice], Tensor],
    gradients: Tensor,
    positions: int,
    into: Tensor | None,
) -> dict[Linears, Sensitivity]:
    """Take gradients through a block, and see what errors of its linears cost.

    Args:
        stream: of the samples.
        number: of the block.
        block: in float32.
        inputs: linears that read one tensor each.
        states: what the block is given of some samples.
        gradients: (samples, length, hidden) at its output.
        positions: that tokens were drawn at.
        into: gradients at its input; None: they are not wanted.
    """
    found: dict[Linears, Sensitivity] = {}
    for linears in inputs:
        width = float_weight(block.get_submodule(linears[0])).shape[1]
        found[linears] = Sensitivity(linears, torch.zeros(width, width, device=stream.device))
    with _watch(block, found) as settle:
        for rows in stream.batches(range(len(stream.ids))):
            result = stream.pull_back(number, block, states(rows), gradients[rows].float())
            settle()
            if into is not None:
                into[rows] = result
    for sensitivity in found.values():
        sensitivity.finish(positions)
    return found


@contextmanager
def _watch(
    module: nn.Module, found: dict[Linears, Sensitivity], every: int = 1
) -> Iterator[Callable[[], None]]:
    """Add up what passes the linears; to be settled after each backward pass."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}  # inputs and gradients of each call

    def watch(path: str) -> Callable[..., None]:
        def record(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].detach()[..., ::every, :].flatten(0, -2).float()

            def keep(gradient: Tensor) -> None:
                seen.setdefault(path, []).append((x, gradient.detach().flatten(0, -2).float()))

            if output.requires_grad:
                output.register_hook(keep)  # type: ignore[no-untyped-call]

        return record

    def settle() -> None:
        for linears, sensitivity in found.items():
            for path in linears:
                for x, gradient in seen.pop(path, ()):
                    _add(sensitivity, path, x, gradient)

    handles = [
        module.get_submodule(path).register_forward_hook(watch(path))
        for linears in found
        for path in linears
    ]
    try:
        yield settle
    finally:
        for handle in handles:
            handle.remove()


def _add(sensitivity: Sensitivity, path: str, x: Tensor, gradient: Tensor) -> None:
    """One call of a linear: inputs (tokens, in), gradients (tokens, out)."""
    squares = gradient.square()
    weights = squares.sum(1)
    mean = float(weights.mean())
    if mean:  # behind the last token that was drawn it is 0
        weights /= sensitivity.usual.setdefault(path, mean)
    sensitivity.hessian.addmm_(x.t() * weights, x)
    sensitivity.weight += float(weights.sum())
    sensitivity.tokens += int(weights.count_nonzero())
    rows = squares.sum(0)
    sensitivity.rows[path] = sensitivity.rows.get(path, 0) + rows


def error_weights(hessian: Tensor) -> Tensor:
    """What a squared rounding error costs in each column when later columns take up errors, (in,).

    D of the damped Hessian's factors, columns in order of falling diagonal; its diagonal where it has no
    factors.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    found = factor(hessian, order, _DAMP) if bool(torch.isfinite(hessian.sum())) else None
    if found is None:
        return hessian.diagonal().nan_to_num().clamp(min=0).clone()
    weights = torch.empty_like(found[1])
    weights[order] = found[1]
    return weights


def find_damage(
    weight: Tensor,
    rows: Tensor,
    columns: Tensor,
    schemes: Sequence[QuantScheme],
    scale_dtype: torch.dtype,
) -> dict[str, float]:
    """The KL, in nats per token, that rounding a matrix in each of some schemes is predicted to cost.

    Args:
        weight: (out, in).
        rows: (out,), see `Sensitivity`.
        columns: (in,), see `error_weights`.
        schemes: that fit the matrix.
        scale_dtype: of scales on disk.

    Returns:
        nats by label.
    """
    some = torch.linspace(0, len(weight) - 1, min(len(weight), _ROWS)).round().long().to(weight.device)
    share = _share(weight, rows, columns, some)
    chosen, cost = weight[some].float(), rows[some]
    few = slice(None, None, -(-len(some) // _CHAINED_ROWS))
    chained = _share(weight, rows, columns, some[few])
    found = {}
    for scheme in schemes:
        if scheme.trellis:
            squares = _squared_errors(chosen[few], scheme, columns, scale_dtype)
            found[scheme.label] = chained * float((squares @ columns) @ cost[few])
        else:
            squares = _squared_errors(chosen, scheme, columns, scale_dtype)
            found[scheme.label] = share * float((squares @ columns) @ cost)
    return found


def _squared_errors(
    weight: Tensor, scheme: QuantScheme, columns: Tensor, scale_dtype: torch.dtype
) -> Tensor:
    """Of rounding to nearest on the grid that is best for columns weighed so, (out, in)."""
    rows = len(weight)
    if scheme.trellis:  # rows of zeros fill up the last chain, and cost nothing
        weight = F.pad(weight, (0, 0, 0, -len(weight) % CHAIN))
    grid = search_qparams(weight, scheme, columns, scale_dtype, _EVERY[scheme.trellis])
    return (weight - dequantize(quantize(weight, *grid, scheme), *grid, scheme)).square_()[:rows]


def _share(weight: Tensor, rows: Tensor, columns: Tensor, some: Tensor) -> float:
    """How much all rows cost, of what some of them do, were all rounded equally well."""
    parts = torch.split(weight, _TOGETHER)  # an embedding may be large, and in another dtype
    whole = torch.cat([part.float().square() @ columns for part in parts]) * rows
    part = float(whole[some].sum())
    return float(whole.sum()) / part if part > 0 else 1.0


@dataclass(frozen=True, slots=True)
class LookupCosts:
    """What squared errors of an embedding cost where its rows are looked up.

    Args:
        known: (rows,) numbers of the rows that were looked up.
        costs: (rows, hidden), nats per token.
    """

    known: Tensor
    costs: Tensor

    def damage(
        self, weight: Tensor, columns: Tensor, schemes: Sequence[QuantScheme], dtype: torch.dtype
    ) -> dict[str, float]:
        """The KL that rounding costs there, by label; weight (vocabulary, hidden).

        Args:
            weight: (vocabulary, hidden).
            columns: (hidden,), what grids are chosen by.
            schemes: that fit.
            dtype: of scales on disk.
        """
        rows = weight[self.known].float()
        found = {}
        for scheme in schemes:
            squares = _squared_errors(rows, scheme, columns, dtype)
            found[scheme.label] = float((squares * self.costs).sum())
        return found


def find_lookup_costs(stream: Stream, weight: Tensor, gradients: Tensor, positions: int) -> LookupCosts:
    """What squared errors of an embedding cost, as gradients tell.

    Args:
        stream: of the samples.
        weight: (vocabulary, width).
        gradients: (samples, length, hidden), at the first block's input.
        positions: that tokens were drawn at.
    """
    known, place = stream.ids.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    costs = torch.zeros(len(known), weight.shape[1])
    squares = products = 0.0
    for some in stream.batches(range(len(stream.ids))):
        ids = stream.ids[some]
        given, gradient = stream.pull_back_to_embedding(ids, gradients[some].float())
        rows = weight[ids].float()
        squares += float(rows.square().sum())
        products += float((given.cpu() * rows).sum())
        costs.index_add_(0, place[some].flatten(), gradient.flatten(0, 1).square().cpu())
    factor = products / squares if squares > 0 else 1.0  # that some classes multiply their rows by
    return LookupCosts(known, costs.mul_(factor**2 / (2 * positions)))
