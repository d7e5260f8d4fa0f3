"""GPTQ: round one column after the other; columns not yet rounded take up the error.

Frantar et al. 2022, arXiv 2210.17323, Algorithm 1; H, U and E are matrices of the paper or of its
reading as LDLQ (Chee et al. 2023, arXiv 2307.13304, Theorem 6: the two are equal). With H = U D U.T, U
upper triangular with ones on its diagonal, the loss (w - q) H (w - q).T is the sum over columns k of
D_k (w_k + sum_{j<k} e_j U_jk - q_k)^2 for the errors e = w - q: each column is corrected by a product
with the errors made so far, and nothing has to be inverted.

Beyond the paper, each measured in LOG.md: columns in order of falling H_kk on grids that were chosen
before (so files need no `g_idx`); the grid of least error weighted by D, or of several near it the one
with which a row loses least; damping in proportion to each column's own H_kk; sweeps of coordinate
descent afterwards (Behdin et al. 2023, QuantEase, arXiv 2309.01885, section 3); a ladder of fallbacks
where H has no factor.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits import affine, native
from fewbits.errors import InputError
from fewbits.memory import hand_back_memory
from fewbits.methods.chains import Chains
from fewbits.methods.grid import search_qparams, shrunk
from fewbits.methods.weighted_rtn import WeightedRTN
from fewbits.scheme import QuantScheme
from fewbits.tensor import Note, QuantizedTensor

_BLOCK = 64  # columns corrected by one product, as the native library has it
_TRIED = 2**21  # weights whose grids are tried at a time: few copies of large matrices; not tuned
_OFF = 0.03  # by which scales that are tried differ; 0.02 and 0.05 gave less


@dataclass(frozen=True, slots=True)
class GPTQ:
    """Second-order rounding.

    Args:
        damp: of each column's H_kk, added to it; the paper's 1 %, there of their mean.
        act_order: round the columns with the largest inputs first.
        sweeps: how often each column is rounded again afterwards, given all the others.
        tries: how many grids are tried beside the one of least error, with scales 3 % off by chance: of
            each row the one with which least is lost. None for trellis codes.
        corrected: what is rounded are weights that make up for what rounding did before them in the
            block (see `fewbits.drift`), which is then run once more for each of its inputs.
    """

    damp: float = 0.01
    act_order: bool = True
    sweeps: int = 2
    tries: int = 8
    corrected: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.damp < 1:
            raise InputError(f"damp is {self.damp}; accepted are numbers between 0 and 1")
        if self.sweeps < 0:
            raise InputError(f"sweeps is {self.sweeps}; accepted are numbers from 0")
        if self.tries < 0:
            raise InputError(f"tries is {self.tries}; accepted are numbers from 0")

    @property
    def needs(self) -> frozenset[str]:
        """The Hessian of the inputs."""
        return frozenset({"hessian"})

    def __call__(
        self,
        weight: Tensor,
        scheme: QuantScheme,
        stats: dict[str, Tensor],
        scale_dtype: torch.dtype | None = None,
    ) -> tuple[QuantizedTensor, list[Note]]:
        """Codes for `weight` (out, in); `stats["hessian"]` is the mean of x.T @ x, (in, in).

        Notes say which steps of the ladder were taken: damping times 10, twice; negative eigenvalues
        raised; rounding to the nearest point of a weighted grid.
        """
        H = stats["hessian"].to(affine.working_dtype(weight))
        order = _order(H, self.act_order)
        found, notes = _factor_or_less(H, order, self.damp)
        if found is None:
            quantized, more = WeightedRTN()(weight, scheme, stats, scale_dtype)
            return quantized, notes + more
        importance = torch.empty_like(found.D)
        importance[order] = found.D
        scale, zero_point = search_qparams(weight, scheme, importance, scale_dtype)
        columns: Chains | _Columns
        if scheme.trellis:  # each try takes as long as all of the others' work
            columns = Chains.of(weight, scale, zero_point, scheme, order)
            columns.round_all(found.U, upper=True)
        else:
            near = _near(scale, self.tries)
            found.U = _in_squares(torch.split(found.U, _BLOCK), len(H))  # in its place: as large as H
            scale, columns = _best_of(near, weight, zero_point, scheme, order, found)
        if self.sweeps:
            H, diagonal = found.H, found.diagonal
            del found  # its U is as large as what follows
            if isinstance(columns, Chains):
                shares = H[order[:, None], order].div_(diagonal)
            else:
                rows = (H[some[:, None], order].div_(diagonal) for some in torch.split(order, _BLOCK))
                shares = _in_squares(rows, len(H))
            for _ in range(self.sweeps):  # the loss cannot become larger
                columns.round_all(shares)
        return QuantizedTensor(columns.codes_in(order), scale, zero_point, scheme), notes


def _near(scale: Tensor, tries: int) -> list[Tensor]:
    """The scale, and so many others, each of which is a little off."""
    generator, near = torch.Generator().manual_seed(0), [scale]
    for _ in range(tries):
        off = torch.randn(scale.shape, generator=generator, dtype=torch.float64)
        near.append(shrunk(scale, (1 + _OFF * off).to(scale.device)))
    return near


def _best_of(
    scales: list[Tensor],
    weight: Tensor,
    zero_point: Tensor,
    scheme: QuantScheme,
    order: Tensor,
    found: "_Factored",
) -> tuple[Tensor, "_Columns"]:
    """Of each row the scale with which least is lost; and the columns, rounded with it."""
    W = _in_order(weight, order)
    E = torch.empty_like(W)
    best, whole = torch.empty_like(scales[0]), scheme.granularity == "tensor"
    step = len(weight) if whole else max(64, _TRIED // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        own = slice(None) if whole else rows  # the scale that these rows have
        least, part = None, W[:, rows].contiguous()
        left = torch.zeros_like(part)  # whatever it holds: no error is asked for before it is made
        for scale in scales:
            columns = _Columns.of(part, scale[own], zero_point[own], scheme, order, left)
            lost = _together(columns.round_all(found.U, upper=True, costs=found.D), scale)
            if least is None:
                least, best[own], E[:, rows] = lost, scale[own], columns.E
                continue
            better = lost < least
            least = torch.where(better, lost, least)
            best[own] = torch.where(better[:, None], scale[own], best[own])
            E[:, rows] = torch.where(better, columns.E, E[:, rows])
        del part, left, columns
    if step < len(weight):
        hand_back_memory()  # of copies of some rows, which the allocator keeps
    return best, _Columns.of(W, best, zero_point, scheme, order, E)


def _together(lost: Tensor, scale: Tensor) -> Tensor:
    """Of rows that share their scale what all lose."""
    return lost.sum(0, keepdim=True) if len(scale) == 1 else lost


def _in_order(weight: Tensor, order: Tensor) -> Tensor:
    """(out, in) -> (in, out), each column in one piece of memory."""
    return weight.t()[order].to(affine.working_dtype(weight))


def _in_squares(rows: Iterable[Tensor], size: int) -> Tensor:
    """(size, size), given `_BLOCK` rows at a time, in squares, filled up: (n, n, _BLOCK, _BLOCK)."""
    count = -(-size // _BLOCK)
    result: Tensor | None = None
    for i, some in enumerate(rows):
        if result is None:
            result = some.new_zeros(count, count, _BLOCK, _BLOCK)
        whole = F.pad(some, (0, count * _BLOCK - size)).view(len(some), count, _BLOCK)
        result[i, :, : len(some)] = whole.transpose(0, 1)
    assert result is not None
    return result


def _order(H: Tensor, act_order: bool) -> Tensor:
    if act_order:
        return H.diagonal().argsort(descending=True, stable=True)
    return torch.arange(len(H), device=H.device)


@dataclass(slots=True)
class _Factored:
    """A Hessian that could be factored: `U @ diag(D) @ U.T` is H with the `diagonal`, both in order."""

    H: Tensor
    diagonal: Tensor
    U: Tensor
    D: Tensor


def _factor_or_less(H: Tensor, order: Tensor, damp: float) -> tuple[_Factored | None, list[Note]]:
    """The factors of the damped H, with more damping where needed, and what had to be done."""
    notes: list[Note] = []
    if not bool(torch.isfinite(H.sum())):  # the sum, since a mask would be as large as H
        return None, [Note("fallback", "", "the Hessian is not finite: weighted rounding instead")]
    for times in (1, 10, 100):
        factors = factor(H, order, damp * times)
        if factors is not None:
            return _Factored(H, _damped_diagonal(H, damp * times)[order], *factors), notes
        notes.append(Note("fallback", "", f"H has no Cholesky factor with damp {damp * times:g}"))
    try:
        values, vectors = torch.linalg.eigh(H)
    except RuntimeError:  # as torch calls a decomposition that does not converge
        what = "H has no eigenvalues that could be found: weighted rounding instead"
        return None, [*notes, Note("fallback", "", what)]
    least = damp * values.clamp(min=0).mean()
    raised = int((values < least).sum())
    notes.append(Note("fallback", "", f"{raised} eigenvalues of H raised to {damp:g} of their mean"))
    H = (vectors * values.clamp(min=least)) @ vectors.t()
    factors = factor(H, order, damp)
    if factors is not None:
        return _Factored(H, _damped_diagonal(H, damp)[order], *factors), notes
    notes.append(Note("fallback", "", "H has no Cholesky factor at all: weighted rounding instead"))
    return None, notes


def _damped_diagonal(H: Tensor, damp: float) -> Tensor:
    """H_kk and what is added to it; an input that is always zero gets a share of the mean."""
    diagonal = H.diagonal()
    return diagonal + damp * torch.where(diagonal > 0, diagonal, diagonal.mean())


def factor(H: Tensor, order: Tensor, damp: float) -> tuple[Tensor, Tensor] | None:
    """U and D with `U @ diag(D) @ U.T` equal to the damped H, its columns in the given order.

    Returns:
        U (in, in) upper triangular with ones on the diagonal, D (in,); None if there are none.
    """
    back = order.flip(0)  # Cholesky's factor is lower triangular: of the reversed matrix, turned round
    damped = H[back[:, None], back]
    damped.diagonal().copy_(_damped_diagonal(H, damp)[back])
    lower, failed = torch.linalg.cholesky_ex(damped)
    del damped
    if int(failed) or not bool(torch.isfinite(lower.diagonal()).all()):
        return None
    U = lower.flip(0, 1)
    del lower
    root = U.diagonal().clone()
    return U.div_(root), root.square()


@dataclass(slots=True)
class _Columns:
    """A matrix being rounded, (in, out): columns in the order of rounding, each in one piece of memory.

    Args:
        W: the weights.
        E: what rounding left of them, zero for columns not rounded yet.
        steps, inverse: of their grids, and 1 / step: (groups, out).
        points: (groups, out).
        groups: of each column, its row in them.
    """

    W: Tensor
    E: Tensor
    steps: Tensor
    inverse: Tensor
    points: Tensor
    groups: Tensor
    scheme: QuantScheme

    @classmethod
    def of(
        cls,
        W: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        scheme: QuantScheme,
        order: Tensor,
        E: Tensor | None = None,
    ) -> Self:
        """Nothing is rounded yet, or all is, and E was left."""
        expanded = (q.t().to(W.dtype).expand(-1, W.shape[1]) for q in (scale, zero_point))
        steps, points = (q.contiguous() for q in expanded)
        groups, E = order // (len(W) // scale.shape[1]), torch.zeros_like(W) if E is None else E
        return cls(W, E, steps, steps.reciprocal(), points, groups, scheme)

    def round_all(self, shares: Tensor, upper: bool = False, costs: Tensor | None = None) -> Tensor:
        """Round each column to the place nearest to where the errors of others leave it.

        Args:
            shares: of the error of the first column, what the second takes up, in squares: see
                `_in_squares`; what is on the diagonal does not count.
            upper: there is nothing below the diagonal.
            costs: (columns,), of the squared distance of a column from that place; by default 1.

        Returns:
            (rows,), the sum of these costs.
        """
        costs = torch.ones_like(self.W[:, 0]) if costs is None else costs
        library = native.library()
        if library is None or self.W.device.type != "cpu" or self.W.dtype != torch.float32:
            return _round_all(self, shares, upper, costs)
        grid = (self.steps, self.inverse, self.points.neg())
        most = self.scheme.max_code
        lost = library.round_columns(self.W, self.E, shares, grid, most, self.groups, upper, costs)
        assert lost is not None
        return lost

    def codes_in(self, order: Tensor) -> Tensor:
        """The codes (out, in), as the weight had them."""
        result = torch.empty(self.W.shape, dtype=torch.uint8, device=self.W.device)
        for start, group in enumerate(torch.split(self.groups, _BLOCK)):
            rows = slice(start * _BLOCK, start * _BLOCK + len(group))
            nearest = torch.sub(self.W[rows], self.E[rows]).mul_(self.inverse[group]).round_()
            result[order[rows]] = nearest.add_(self.points[group]).to(torch.uint8)
        return result.t().contiguous()


def _round_all(columns: _Columns, shares: Tensor, upper: bool, costs: Tensor) -> Tensor:
    """What `round_all` means; the library does the same, up to how sums are rounded."""
    # All views at once: a view costs as much as arithmetic on one column.
    W, E = columns.W.unbind(), columns.E.unbind()
    side = len(shares) * _BLOCK
    shares = shares.transpose(1, 2).reshape(side, side)[: len(W), : len(W)]
    low = columns.points.neg()
    grids = (columns.steps, columns.inverse, low, low + columns.scheme.max_code)
    places = list(zip(*(grid.unbind() for grid in grids), strict=True))
    groups, lost = columns.groups.tolist(), torch.zeros_like(columns.W[0])
    for start in range(0, len(W), _BLOCK):
        stop = min(start + _BLOCK, len(W))
        share = shares[: stop if upper else None, start:stop].t().contiguous()
        share[:, start:stop].diagonal().zero_()
        taken = share @ columns.E[: share.shape[1]]
        changed = torch.zeros_like(taken)
        inside = share[:, start:stop].unbind()
        for k, mine, w, change in zip(
            range(start, stop), inside, taken.unbind(), changed.unbind(), strict=True
        ):
            step, per_step, least, most = places[groups[k]]
            w.addmv_(changed.t(), mine)  # what those not rounded again yet have changed is 0
            value = W[k] * per_step
            wanted = torch.addcmul(value, w, per_step)
            nearest = wanted.round().clamp_(least, most)
            lost.addcmul_(wanted.sub_(nearest).mul_(step).square_(), costs[k])
            torch.neg(E[k], out=change)
            change.add_(torch.sub(value, nearest, out=E[k]).mul_(step))
    return lost
