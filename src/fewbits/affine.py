"""The affine grid: w ~ scale * (code - zero_point), with 0 <= code < 2**bits.

Arithmetic is float32 (float64 for float64 weights) whatever the weight's dtype. The scale is rounded
to the dtype it has on disk *before* codes are chosen, so what is stored is what was optimized.

With a trellis, codes are looked up first: w ~ scale * value (see `fewbits.trellis`).
"""

import torch
from torch import Tensor

from fewbits import trellis
from fewbits.errors import InputError
from fewbits.scheme import QuantScheme

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SLICE = 2**24  # weights in float32 at a time, 64 MB: large heads need no large copies; not tuned


def choose_qparams(
    weight: Tensor, scheme: QuantScheme, scale_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The scale and zero point that just cover each part of the weight that shares them.

    Symmetric: `absmax / (2**(bits-1) - 1)`, so that the largest weight lies on the grid, not between
    two codes. Asymmetric: the range of the weights, widened to contain zero, in `2**bits - 1` steps.

    A trellis: `rms / UNIT`, which is best for normal weights; 0 where all of them are 0.

    Args:
        weight: (out, in), floating point.
        scale_dtype: of the scale on disk; the weight's own by default.

    Returns:
        scale (out, groups) in `scale_dtype` and zero_point (out, groups) uint8; one group per row for
        granularity "channel"; (1, 1) for "tensor".

    Raises:
        InputError: the weight is not a finite floating-point matrix, or groups do not fit.
    """
    if weight.ndim != 2 or weight.dtype not in _DTYPES or weight.numel() == 0:
        raise InputError(
            f"a weight of shape {tuple(weight.shape)} and dtype {weight.dtype} cannot be "
            "quantized; accepted are floating-point matrices (out, in) of 16, 32 or 64 bits"
        )
    low, high = torch.aminmax(parts_of(weight, scheme), dim=-1)
    low, high = low.to(working_dtype(weight)), high.to(working_dtype(weight))
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise InputError("the weight contains NaN or infinity; accepted are finite weights")
    if scheme.two_level:
        raise InputError(
            f"{scheme.label} is rounded to by method q4_k alone; accepted are other schemes"
        )
    if scheme.trellis:
        return _choose_trellis(weight, scheme, scale_dtype or weight.dtype)
    absmax = torch.maximum(low.abs(), high.abs())
    low, high = low.clamp(max=0), high.clamp(min=0)  # zero must be on the grid
    if scheme.symmetric:
        steps = scheme.middle - 1
        wanted, least = _divided(absmax, steps), _divided(absmax, steps + 0.5)
        scale = _round_scale(wanted, least, scale_dtype or weight.dtype)
        return scale, torch.full_like(scale, scheme.middle, dtype=torch.uint8)
    # The zero point rounds too, so the scale may not be rounded down: both could clip the same weight.
    span = _divided(high - low, scheme.max_code)
    scale = _round_scale(span, span, scale_dtype or weight.dtype)
    zero_point = (-low / scale.to(low.dtype)).round().clamp(0, scheme.max_code)
    return scale, zero_point.to(torch.uint8)


def _divided(x: Tensor, number: float) -> Tensor:
    """x / number on every device: CUDA multiplies by a number's inverse, which may be a digit off."""
    return x / torch.full_like(x, number)


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantScheme) -> Tensor:
    """The nearest code of each weight, clamped to the grid; ties go to the even multiple of scale.

    Args:
        weight: (out, in). Not modified.
        scale, zero_point: as `choose_qparams` returns them.

    Returns:
        codes (out, in), uint8.
    """
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for rows in slices(len(weight), weight.shape[1], scheme, _SLICE):
        own = slice(None) if scheme.granularity == "tensor" else rows  # the scale that these rows have
        parts = parts_of(weight[rows], scheme).to(working_dtype(weight), copy=True)
        if scheme.trellis:
            codes[rows] = encode(parts, scale[rows].to(parts.dtype), scheme).reshape(codes[rows].shape)
            continue
        nearest_(parts, scale[own].to(parts.dtype)[..., None], zero_point[own][..., None], scheme)
        codes[rows] = parts.to(torch.uint8).reshape(-1, weight.shape[1])
    return codes


def encode(parts: Tensor, scale: Tensor, scheme: QuantScheme) -> Tensor:
    """Codes of a trellis for parts (rows, groups, columns) of a weight and scales (rows, groups)."""
    steps = scale[..., None].expand_as(parts)
    return trellis.encode(parts.flatten(1), steps.flatten(1), scheme.bits).reshape(parts.shape)


def slices(rows: int, columns: int, scheme: QuantScheme, values: int) -> list[slice]:
    """Rows that are gone through together, of about so many values; of a trellis, whole chains."""
    unit, copies = (trellis.CHAIN, 4) if scheme.trellis else (1, 1)  # chains are found on copies
    step = max(1, values // copies // columns // unit) * unit
    return [slice(start, start + step) for start in range(0, rows, step)]


def nearest_(weight: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantScheme) -> Tensor:
    """The nearest codes as floats, in place of the weights; scale and zero point broadcast to them."""
    return weight.div_(scale).round_().add_(zero_point).clamp_(0, scheme.max_code)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    scheme: QuantScheme,
    dtype: torch.dtype = torch.float32,
    offset: Tensor | None = None,
) -> Tensor:
    """`scale * (code - zero_point)`, computed in float32 and then rounded to `dtype`: (out, in).

    With an offset (out, groups), that is subtracted in float32, whatever `dtype`: as llama.cpp does.
    """
    values = trellis.values(codes, scheme.bits) if scheme.trellis else codes
    return scaled(values, scale, zero_point, scheme, dtype, offset)


def scaled(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    scheme: QuantScheme,
    dtype: torch.dtype = torch.float32,
    offset: Tensor | None = None,
) -> Tensor:
    """As `dequantize`, where the codes of a trellis have been looked up."""
    working = torch.float64 if dtype == torch.float64 and offset is None else torch.float32
    parts = parts_of(codes, scheme).to(working, copy=True)
    parts.sub_(zero_point.to(working)[..., None]).mul_(scale.to(working)[..., None])
    if offset is not None:
        parts.sub_(offset.to(working)[..., None])
    return parts.reshape(codes.shape).to(dtype)


def parts_of(weight: Tensor, scheme: QuantScheme) -> Tensor:
    """View (out, in) as (out, groups, columns), or (1, 1, out * in) for granularity "tensor"."""
    if scheme.granularity == "tensor":
        return weight.reshape(1, 1, -1)
    return weight.reshape(weight.shape[0], scheme.groups(weight.shape[1]), -1)


def working_dtype(weight: Tensor) -> torch.dtype:
    """Of the arithmetic: float32, or float64 for float64 weights."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _choose_trellis(weight: Tensor, scheme: QuantScheme, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows = slices(len(weight), weight.shape[1], scheme, _SLICE)
    squares = [parts_of(weight[r], scheme).to(working_dtype(weight)).square().mean(-1) for r in rows]
    exact = torch.cat(squares).sqrt_()
    # By a tensor: CUDA multiplies by the inverse of a number.
    exact.div_(exact.new_tensor(trellis.UNIT[scheme.bits]))
    scale = _round_scale(exact, exact / 2, dtype) * (exact > 0)
    return scale, torch.zeros_like(scale, dtype=torch.uint8)


def _round_scale(exact: Tensor, least: Tensor, dtype: torch.dtype) -> Tensor:
    """`exact` in `dtype`, one step up where it fell below `least` and would clip; 1 where it is 0.

    A symmetric grid has room for a scale rounded down, unless it is subnormal: those lie far apart.
    """
    scale = exact.to(dtype)
    steps = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    above = (scale.view(steps) + 1).view(dtype)  # the next positive float of the dtype
    scale = torch.where(scale.to(least.dtype) < least, above, scale)
    if not torch.isfinite(scale).all():
        raise InputError(f"the weight's range needs a scale that {dtype} cannot hold")
    return torch.where(exact == 0, torch.ones_like(scale), scale)
