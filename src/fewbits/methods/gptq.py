"""GPTQ: round one column after the other; columns not yet rounded take up the error.

Frantar et al. 2022, arXiv 2210.17323, Algorithm 1; H, U and E are matrices of the paper or of its
reading as LDLQ (Chee et al. 2023, arXiv 2307.13304, Theorem 6: the two are equal). With H = U D U.T, U
upper triangular with ones on its diagonal, the loss (w - q) H (w - q).T is the sum over columns k of
D_k (w_k + sum_{j<k} e_j U_jk - q_k)^2 for the errors e = w - q: each column is corrected by a product
with the errors made so far, and nothing has to be inverted.

Beyond the paper, each measured in LOG.md: columns in order of falling H_kk on grids that were chosen
before (so files need no `g_idx`); the grid of least error weighted by D; damping in proportion to each
column's own H_kk; a ladder of fallbacks where H has no factor.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits import affine
from fewbits.errors import InputError
from fewbits.methods.grid import search_qparams
from fewbits.methods.weighted_rtn import WeightedRTN
from fewbits.scheme import QuantScheme
from fewbits.tensor import Note, QuantizedTensor

_BLOCK = 64  # columns corrected by one product; not tuned


@dataclass(frozen=True, slots=True)
class GPTQ:
    """Second-order rounding.

    Args:
        damp: of each column's H_kk, added to it; the paper's 1 %, there of their mean.
        act_order: round the columns with the largest inputs first.
    """

    damp: float = 0.01
    act_order: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.damp < 1:
            raise InputError(f"damp is {self.damp}; accepted are numbers between 0 and 1")

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
        U, D, notes = _factor_or_less(H, order, self.damp)
        if U is None or D is None:
            quantized, more = WeightedRTN()(weight, scheme, stats, scale_dtype)
            return quantized, notes + more
        importance = torch.empty_like(D)
        importance[order] = D
        scale, zero_point = search_qparams(weight, scheme, importance, scale_dtype)
        codes = _round(weight, scale, zero_point, scheme, U, order)
        return QuantizedTensor(codes, scale, zero_point, scheme), notes


def _order(H: Tensor, act_order: bool) -> Tensor:
    if act_order:
        return H.diagonal().argsort(descending=True, stable=True)
    return torch.arange(len(H), device=H.device)


def _factor_or_less(
    H: Tensor, order: Tensor, damp: float
) -> tuple[Tensor | None, Tensor | None, list[Note]]:
    """The factors of the damped H, with more damping where needed, and what had to be done."""
    notes: list[Note] = []
    if not bool(torch.isfinite(H.sum())):  # the sum, since a mask would be as large as H
        return None, None, [Note("fallback", "", "the Hessian is not finite: weighted rounding instead")]
    for times in (1, 10, 100):
        factors = factor(H, order, damp * times)
        if factors is not None:
            return *factors, notes
        notes.append(Note("fallback", "", f"H has no Cholesky factor with damp {damp * times:g}"))
    values, vectors = torch.linalg.eigh(H)
    least = damp * values.clamp(min=0).mean()
    raised = int((values < least).sum())
    notes.append(Note("fallback", "", f"{raised} eigenvalues of H raised to {damp:g} of their mean"))
    factors = factor((vectors * values.clamp(min=least)) @ vectors.t(), order, damp)
    if factors is not None:
        return *factors, notes
    notes.append(Note("fallback", "", "H has no Cholesky factor at all: weighted rounding instead"))
    return None, None, notes


def factor(H: Tensor, order: Tensor, damp: float) -> tuple[Tensor, Tensor] | None:
    """U and D with `U @ diag(D) @ U.T` equal to the damped H, its columns in the given order.

    Returns:
        U (in, in) upper triangular with ones on the diagonal, D (in,); None if there are none.
    """
    back = order.flip(0)  # Cholesky's factor is lower triangular: of the reversed matrix, turned round
    damped = H[back[:, None], back]
    # An input that is always zero has no weight of its own.
    damped.diagonal().add_(damp * torch.where(H.diagonal() > 0, H.diagonal(), H.diagonal().mean())[back])
    lower, failed = torch.linalg.cholesky_ex(damped)
    del damped
    if int(failed) or not bool(torch.isfinite(lower.diagonal()).all()):
        return None
    U = lower.flip(0, 1)
    del lower
    root = U.diagonal().clone()
    return U.div_(root), root.square()


def _round(
    weight: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantScheme, U: Tensor, order: Tensor
) -> Tensor:
    """Codes (out, in). Works on transposed matrices, whose columns lie together in memory."""
    W = weight.t()[order].to(U.dtype)
    columns, rows = W.shape
    group = order // (columns // scale.shape[1])
    scales = scale.t().to(U.dtype).expand(-1, rows).contiguous()
    points = zero_point.t().to(U.dtype).expand(-1, rows).contiguous()
    places = group.tolist()
    E, codes = torch.zeros_like(W), torch.empty(W.shape, dtype=torch.uint8, device=W.device)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        corrected = torch.addmm(W[start:stop], U[:start, start:stop].t(), E[:start])
        for k in range(start, stop):
            step, point = scales[places[k]], points[places[k]]
            w = corrected[k - start].addmv_(E[start:k].t(), U[start:k, k])
            code = affine.nearest_(w, step, point, scheme)
            codes[k] = code
            torch.sub(W[k], code.sub_(point).mul_(step), out=E[k])
    result = torch.empty_like(codes)
    result[order] = codes
    return result.t().contiguous()
