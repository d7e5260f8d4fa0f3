"""The grid that loses least: the scale of each group chosen by weighted rounding error, not by range.

A smaller scale clips the few largest weights and rounds all the others more finely. What an error costs
is told by calibration: a weight for each column, or the Hessian of the inputs, of which the
blocks along the diagonal are used, so that errors of neighbours may cancel each other. AWQ (Lin et al.
2023, arXiv 2306.00978) searches its clipping so, and llama.cpp its importance matrices.
"""

import math

import torch
from torch import Tensor

from fewbits import native, trellis
from fewbits.affine import choose_qparams, encode, nearest_, parts_of, slices, working_dtype
from fewbits.scheme import QuantScheme

# Of the scale that covers the range, by bits: from what clips too much to a little over the range, which
# comes first, so that ties keep it. Not tuned, beyond seeing that the best are inside.
_LEAST = {2: 0.2, 3: 0.4, 4: 0.55, 8: 0.85}
_MOST, _STEPS = 1.05, 24
_TRELLIS = (1.0, 0.9, 1.1, 1.2, 1.35, 1.5)  # larger where a few weights are far from the others
_BLOCK = 128  # columns whose errors are weighed together, at most; not tuned
_SLICE = 2**18  # weights at a time: they stay in the cache through all candidates; not tuned


def search_qparams(
    weight: Tensor,
    scheme: QuantScheme,
    importance: Tensor,
    scale_dtype: torch.dtype | None = None,
    every: int = 1,
) -> tuple[Tensor, Tensor]:
    """The scale, among fractions of the one that covers the range, of least weighted error.

    Args:
        weight: (out, in).
        importance: (in,), what a squared error costs in each column; or (in, in), the Hessian.
        scale_dtype: of the scale on disk; the weight's own by default.
        every: try the first of so many fractions, where a coarse answer will do.

    Returns:
        scale and zero point, as `choose_qparams` gives them; the zero point is the same.

    Raises:
        InputError: as `choose_qparams`.
    """
    scale, zero_point = choose_qparams(weight, scheme, scale_dtype)
    columns = weight.shape[1]
    cost = _blocks(importance.to(working_dtype(weight)), columns // scheme.groups(columns))
    whole = scheme.granularity == "tensor"
    tried = candidates(scheme)[::every]
    errors = []
    for rows in slices(len(weight), columns, scheme, _SLICE):
        own = slice(None) if whole else rows  # the scale that these rows have
        errors.append(_errors(weight[rows], scale[own], zero_point[own], scheme, cost, tried))
    if whole:
        total = torch.stack([e.sum((1, 2)) for e in errors]).sum(0)[:, None, None]
    else:
        total = torch.cat(errors, 1)
    best = total.argmin(0)
    shrinks = torch.tensor(tried, dtype=torch.float64, device=weight.device)
    return shrunk(scale, shrinks[best]), zero_point


def candidates(scheme: QuantScheme) -> tuple[float, ...]:
    """The fractions of the scale that `choose_qparams` gives which are tried."""
    if scheme.trellis:
        return _TRELLIS
    return (1.0, *torch.linspace(_LEAST[scheme.bits], _MOST, _STEPS).tolist())


def _blocks(importance: Tensor, group: int) -> Tensor:
    """Costs by block of columns inside of groups: (blocks, size); of a Hessian (blocks, size, size)."""
    size = group if importance.ndim == 1 else _divisor(group)
    if importance.ndim == 1:
        return importance.reshape(-1, size).contiguous()  # a diagonal lies far apart in memory
    starts = range(0, len(importance), size)
    return torch.stack([importance[i : i + size, i : i + size] for i in starts])


def _divisor(group: int) -> int:
    return next(size for size in range(min(group, _BLOCK), 0, -1) if group % size == 0)


def _errors(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    scheme: QuantScheme,
    cost: Tensor,
    tried: tuple[float, ...],
) -> Tensor:
    """Weighted squared error of each candidate: (candidates, rows, groups); rows first if "tensor"."""
    dtype, rows = working_dtype(weight), weight.shape[0]
    groups = weight.shape[1] // max(1, math.prod(parts_of(weight[:1], scheme).shape[2:]))
    found = native.library()
    plain = cost.ndim == 2 and not scheme.trellis and scheme.granularity != "tensor"
    if found is not None and plain and weight.device.type == "cpu" and dtype == torch.float32:
        steps = torch.stack([shrunk(scale, shrink).float() for shrink in tried])
        points, costs = zero_point.float(), cost.flatten()
        return found.grid_errors(weight.float(), steps, points, scheme.max_code, costs)
    parts = weight.to(dtype).reshape(rows, groups, -1)
    points = zero_point.to(dtype)[..., None]
    error = torch.empty_like(parts)
    errors = []
    for shrink in tried:
        step = shrunk(scale, shrink).to(dtype)[..., None]
        if scheme.trellis:
            codes = encode(parts, step[..., 0], scheme).reshape(len(parts), -1)
            error.copy_(trellis.values(codes, scheme.bits).view(parts.shape))
        else:
            nearest_(error.copy_(parts), step, points, scheme).sub_(points)
        error.mul_(step).sub_(parts)
        errors.append(_weighted(error, cost).reshape(rows, groups, -1).sum(-1))
    return torch.stack(errors)


def _weighted(error: Tensor, cost: Tensor) -> Tensor:
    """Cost of errors (rows, ...) by block: (rows, blocks)."""
    split = error.reshape(len(error), *cost.shape[:2])
    if cost.ndim == 2:
        return (split.square_() * cost).sum(-1)
    return (torch.matmul(split.transpose(0, 1), cost).transpose(0, 1) * split).sum(-1)


def shrunk(scale: Tensor, shrink: float | Tensor) -> Tensor:
    """The scale times a fraction, rounded to its dtype; as it is where that would leave nothing."""
    smaller = (scale.double() * shrink).to(scale.dtype)
    return torch.where(torch.isfinite(smaller) & (smaller > 0), smaller, scale)
