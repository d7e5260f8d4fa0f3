"""Rounding for a format that holds no scale below a limit, or small ones with few digits."""

import torch
from torch import Tensor

from fewbits import affine
from fewbits.methods.method import Method
from fewbits.scheme import QuantScheme
from fewbits.tensor import Note, QuantizedTensor


def round_held(
    method: Method,
    weight: Tensor,
    scheme: QuantScheme,
    stats: dict[str, Tensor],
    dtype: torch.dtype,
    least: float = 0.0,
) -> tuple[QuantizedTensor, list[Note]]:
    """What a method makes of a weight (out, in), with no scale below `least`.

    Groups whose scale would be smaller are rounded to nearest on a grid of that step: their weights are
    so close to zero that half a step, `least / 2`, is all that each can lose. Scales below the normal
    numbers of `dtype` are kept, and said: those lie far apart, so a step is wider than it need be.

    Args:
        dtype: of the scale.
        least: must be a number of that dtype; 0 if all of its numbers will do.
    """
    rounded, notes = method(weight, scheme, stats, dtype)
    if scheme.two_level:  # its scales are of its own making
        return rounded, notes
    small = rounded.scale < least
    count = int(small.sum())
    if not count:
        return rounded, [*notes, *_coarse(rounded.scale)]
    scale = torch.where(small, torch.full_like(rounded.scale, least), rounded.scale)
    points = rounded.zero_point
    if not scheme.symmetric:
        low = affine.parts_of(weight, scheme).amin(-1).float().clamp(max=0)
        wanted = (-low / least).round().clamp(0, scheme.max_code).to(torch.uint8)
        points = torch.where(small, wanted, points)
    nearest = affine.parts_of(affine.quantize(weight, scale, points, scheme), scheme)
    codes = torch.where(small[..., None], nearest, affine.parts_of(rounded.codes, scheme))
    what = f"{count} of {small.numel()} scales raised to {least:.3g}, the least that the format holds"
    held = QuantizedTensor(codes.reshape(weight.shape), scale, points, scheme, rounded.outliers)
    return held, [*notes, Note("clamp", "scales", what), *_coarse(scale)]


def _coarse(scale: Tensor) -> list[Note]:
    """A note of scales that are no normal numbers of their dtype: their neighbours lie far off."""
    limits = torch.finfo(scale.dtype)
    coarse = scale[(scale < limits.smallest_normal) & (scale > 0)]
    if not len(coarse):
        return []
    apart = limits.smallest_normal * limits.eps
    what = (
        f"{len(coarse)} of {scale.numel()} scales are below {limits.smallest_normal:.3g}, where "
        f"{scale.dtype} has fewer digits: steps are wider than needed by up to "
        f"{apart / float(coarse.min()):.2%}"
    )
    return [Note("fact", "scales", what)]
