"""Slow references written from the definitions: one weight and one bit at a time.

They share no code with fewbits except QuantScheme and QuantizedTensor, whose fields they read.
"""

from itertools import product

import torch
from torch import Tensor

from fewbits.scheme import QuantScheme
from fewbits.tensor import QuantizedTensor


def place_of_scale(row: int, column: int, scheme: QuantScheme) -> tuple[int, int]:
    """Where the scale of one weight stands."""
    if scheme.granularity == "tensor":
        return 0, 0
    return row, 0 if scheme.group_size is None else column // scheme.group_size


def spread(values: Tensor, shape: tuple[int, int], scheme: QuantScheme) -> Tensor:
    """Scales or zero points, (out, groups), repeated for every weight: (out, in) float64."""
    result = torch.empty(shape, dtype=torch.float64)
    for row, column in product(range(shape[0]), range(shape[1])):
        result[row, column] = values[place_of_scale(row, column, scheme)].item()
    return result


def nearest_codes(weight: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantScheme) -> Tensor:
    """Every code is tried on every weight, in exact integers; of two as near, the even multiple."""
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    for row, column in product(range(weight.shape[0]), range(weight.shape[1])):
        place = place_of_scale(row, column, scheme)
        w, s = _common_integers(weight[row, column].item(), scale[place].item())
        z = int(zero_point[place])
        errors = [(abs(w - s * (code - z)), (code - z) % 2) for code in range(2**scheme.bits)]
        codes[row, column] = min(range(2**scheme.bits), key=errors.__getitem__)
    return codes


def _common_integers(first: float, second: float) -> tuple[int, int]:
    """Two floats as multiples of one power of two, which every float is."""
    (a, below_a), (b, below_b) = first.as_integer_ratio(), second.as_integer_ratio()
    below = max(below_a, below_b)
    return a * (below // below_a), b * (below // below_b)


def dequantized(codes: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantScheme) -> Tensor:
    """`scale * (code - zero_point)` in float64, exact for scales of up to 44 bits."""
    rows, columns = codes.shape
    scales, points = (spread(t, (rows, columns), scheme) for t in (scale, zero_point))
    return scales * (codes.double() - points)


def parts(weight: Tensor, scheme: QuantScheme) -> dict[tuple[int, int], list[float]]:
    """The weights that share a scale, by its place."""
    shared: dict[tuple[int, int], list[float]] = {}
    for row, column in product(range(weight.shape[0]), range(weight.shape[1])):
        place = place_of_scale(row, column, scheme)
        shared.setdefault(place, []).append(weight[row, column].item())
    return shared


def pack_bits(row: list[int], bits: int) -> list[int]:
    """One row as int32 words: element i is put at bit i * bits of one long integer."""
    stream = 0
    for i, code in enumerate(row):
        stream |= code << (i * bits)
    words = -(-len(row) * bits // 32)
    unsigned = [(stream >> (32 * word)) & 0xFFFFFFFF for word in range(words)]
    return [word - 2**32 if word >= 2**31 else word for word in unsigned]


def half_step(value: Tensor, dtype: torch.dtype) -> Tensor:
    """At most how far rounding to `dtype` moves each value: half of its spacing there, float64."""
    limits = torch.finfo(dtype)
    relative = value.double().abs() * (limits.eps / 2)
    return relative.clamp(min=limits.smallest_normal * limits.eps / 2)  # subnormals are evenly spaced


def gptq_codes(
    weight: Tensor,
    hessian: Tensor,
    quantized: QuantizedTensor,
    order: list[int],
    damp: float,
    sweeps: int = 0,
) -> Tensor:
    """GPTQ from its definition, on the grid of `quantized`: round a column, then move the columns that
    are still free to where they make the least squared output error, given what was rounded. In a sweep
    each column alone is free.
    """
    scheme, weight, hessian = quantized.scheme, weight.double(), hessian.double()
    hessian = hessian + damp * hessian.diagonal().diag()
    scale = spread(quantized.scale, tuple(weight.shape), scheme)
    point = spread(quantized.zero_point, tuple(weight.shape), scheme)
    free, rounded = weight.clone(), weight.clone()
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    for i, k in enumerate(order):
        code = (free[:, k] / scale[:, k] + point[:, k]).round().clamp(0, 2**scheme.bits - 1)
        codes[:, k] = code.to(torch.uint8)
        rounded[:, k] = scale[:, k] * (code - point[:, k])
        done, rest = order[: i + 1], order[i + 1 :]
        if rest:
            pull = (weight - rounded)[:, done] @ hessian[done][:, rest]
            free[:, rest] = weight[:, rest] + torch.linalg.solve(hessian[rest][:, rest], pull.T).T
    for k in order * sweeps:
        others = [j for j in order if j != k]
        best = weight[:, k] + (weight - rounded)[:, others] @ hessian[others, k] / hessian[k, k]
        code = (best / scale[:, k] + point[:, k]).round().clamp(0, 2**scheme.bits - 1)
        codes[:, k] = code.to(torch.uint8)
        rounded[:, k] = scale[:, k] * (code - point[:, k])
    return codes


def best_shrinks(
    weight: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantScheme, hessian: Tensor,
    shrinks: list[float],
) -> Tensor:  # fmt: skip
    """The index of the shrink of least error for each scale; only costs inside of a group count."""
    shape, places = tuple(weight.shape), {}
    for row, column in product(range(shape[0]), range(shape[1])):
        places.setdefault(place_of_scale(row, column, scheme), []).append((row, column))
    best = torch.zeros(scale.shape, dtype=torch.int64)
    for place, members in places.items():
        found = []
        for shrink in shrinks:
            step = (scale[place].double() * shrink).to(scale.dtype).double()
            error = {}
            for row, column in members:
                code = (weight[row, column].double() / step + zero_point[place]).round()
                code = code.clamp(0, 2**scheme.bits - 1)
                error[row, column] = step * (code - zero_point[place].double()) - weight[row, column]
            rows = {row for row, _ in members}
            cost = 0.0
            for row in rows:
                columns = [c for r, c in members if r == row]
                e = torch.stack([error[row, c] for c in columns])
                cost += float(e @ hessian[columns][:, columns].double() @ e)
            found.append(cost)
        best[place] = min(range(len(shrinks)), key=lambda i: found[i])
    return best
