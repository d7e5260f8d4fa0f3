"""QuantizedTensor, one convention for every method and format; Note, a line for the report."""

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from fewbits import affine, trellis
from fewbits.errors import InputError
from fewbits.scheme import LEVELS, QuantScheme


@dataclass(frozen=True, slots=True)
class Note:
    """A skip, a clamp or a fallback: what happened, where, and why."""

    kind: Literal["skip", "clamp", "fallback", "fact"]
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: {self.what}"


@dataclass(frozen=True, slots=True, eq=False)
class Outliers:
    """Columns of a weight that are kept as they are.

    Args:
        columns: (n,) int64, ascending; what they are is decided by the inputs, not by the weights.
        weight: (out, n), in the source's dtype.
    """

    columns: Tensor
    weight: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Levels:
    """Two levels of scales: what scales are made of, and least values, which zero points do not say.

    Args:
        steps: (out, in / 256, 2) float16: d of the scales, d of the least values.
        counts: (out, groups, 2) uint8, 0 to 63: how many of each.
    """

    steps: Tensor
    counts: Tensor

    @property
    def scale(self) -> Tensor:
        """(out, groups) float32, exactly."""
        return self._product(0)

    @property
    def offset(self) -> Tensor:
        """(out, groups) float32, exactly: `w = scale * code - offset`."""
        return self._product(1)

    def _product(self, which: int) -> Tensor:
        counts = self.counts[..., which].float()
        times = counts.shape[1] // max(1, self.steps.shape[1])
        return self.steps[..., which].float().repeat_interleave(times, 1) * counts


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedTensor:
    """A weight on its grid: `w ~ scale * (codes - zero_point)`, less the offset of two levels.

    Args:
        codes: (out, in) uint8, 0 <= code < 2**bits. Packed only inside formats and kernels.
        scale: (out, groups) in its on-disk dtype; (1, 1) for granularity "tensor".
        zero_point: like scale, uint8; mid-range everywhere if the scheme is symmetric.
        outliers: columns that are not on the grid; their codes stand for 0.
        order: (in,) int64, the input that each column of `codes` belongs to, where groups are not of
            neighbours: other tools write such weights. None: as they come.
        levels: of a scheme with two levels of scales; `scale` is what they give, zero points are 0.

    Raises:
        InputError: shapes that do not belong together.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    scheme: QuantScheme
    outliers: Outliers | None = None
    order: Tensor | None = None
    levels: Levels | None = None

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        grid = (1, 1) if self.scheme.granularity == "tensor" else (rows, self.scheme.groups(columns))
        if tuple(self.scale.shape) != grid or tuple(self.zero_point.shape) != grid:
            raise InputError(
                f"scale {tuple(self.scale.shape)} and zero point {tuple(self.zero_point.shape)} do "
                f"not fit codes {(rows, columns)} in {self.scheme.label}; accepted is {grid}"
            )
        upper, lower = (rows, columns // LEVELS, 2), (*grid, 2)
        found = self.levels and (tuple(self.levels.steps.shape), tuple(self.levels.counts.shape))
        if found != ((upper, lower) if self.scheme.two_level else None):
            raise InputError(f"levels of scales {found} do not fit {self.scheme.label}")
        if self.outliers is not None:
            kept, count = tuple(self.outliers.weight.shape), len(self.outliers.columns)
            if kept != (rows, count):
                raise InputError(
                    f"outliers {kept} do not fit; accepted are {count} columns of {rows} rows"
                )

    def parts(self) -> tuple[dict[str, Any], list[Tensor]]:
        """What it is made of: a description (JSON), and tensors; see `of_parts`."""
        levels = [] if self.levels is None else [self.levels.steps, self.levels.counts]
        kept = [] if self.outliers is None else [self.outliers.columns, self.outliers.weight]
        order = [] if self.order is None else [self.order]
        said = {"scheme": self.scheme.label, "levels": bool(levels), "outliers": bool(kept)}
        said["order"] = bool(order)
        return said, [self.codes, self.scale, self.zero_point, *levels, *kept, *order]

    @classmethod
    def of_parts(cls, said: dict[str, Any], tensors: list[Tensor]) -> Self:
        """A tensor of its parts; of `tensors` these are taken away."""
        codes, scale, zero_point = (tensors.pop(0) for _ in range(3))
        levels = Levels(tensors.pop(0), tensors.pop(0)) if said["levels"] else None
        outliers = Outliers(tensors.pop(0), tensors.pop(0)) if said["outliers"] else None
        order = tensors.pop(0) if said["order"] else None
        scheme = QuantScheme.parse(said["scheme"])
        return cls(codes, scale, zero_point, scheme, outliers, order, levels)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.codes.shape
        return rows, columns

    @property
    def offset(self) -> Tensor | None:
        """(out, groups) float32, what two levels of scales subtract; None: nothing."""
        return None if self.levels is None else self.levels.offset

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weights that the codes stand for, (out, in), in the scale's dtype by default."""
        weight = affine.dequantize(
            self.codes, self.scale, self.zero_point, self.scheme, dtype or self.scale.dtype, self.offset
        )
        if self.outliers is not None:
            weight[:, self.outliers.columns] = self.outliers.weight.to(weight.dtype)
        return (
            weight if self.order is None else torch.empty_like(weight).index_copy_(1, self.order, weight)
        )

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        codes, scale, zero_point = (t.to(device) for t in (self.codes, self.scale, self.zero_point))
        order = None if self.order is None else self.order.to(device)
        kept, levels = self.outliers, self.levels
        if kept is not None:
            kept = Outliers(kept.columns.to(device), kept.weight.to(device))
        if levels is not None:
            levels = Levels(levels.steps.to(device), levels.counts.to(device))
        return replace(
            self,
            codes=codes,
            scale=scale,
            zero_point=zero_point,
            outliers=kept,
            order=order,
            levels=levels,
        )

    def per_row(self) -> Self:
        """The same weights with granularity "channel" if it was "tensor": the scale repeated."""
        if self.scheme.granularity != "tensor":
            return self
        rows = self.shape[0]
        return replace(
            self,
            scale=self.scale.expand(rows, 1).contiguous(),
            zero_point=self.zero_point.expand(rows, 1).contiguous(),
            scheme=replace(self.scheme, granularity="channel"),
        )

    def coarsest(self) -> Self:
        """The same weights in the largest groups that share a scale: some formats repeat them."""
        size, columns = self.scheme.group_size, self.shape[1]
        if size is None or self.levels is not None:
            return self
        count = columns // size
        for times in range(count, 1, -1):
            if count % times == 0 and all(
                bool((part.view(len(part), -1, times) == part[:, ::times, None]).all())
                for part in (self.scale.contiguous(), self.zero_point.contiguous())
            ):
                return self._with_groups(times * size, slice(None, None, times))
        return self

    def regrouped(self, size: int | None) -> Self:
        """The same weights in smaller groups, their scales repeated; None: as they are.

        Args:
            size: columns, a divisor of a group's.
        """
        own = self.scheme.group_size or self.shape[1]
        if size is None or size == self.scheme.group_size:
            return self
        if self.levels is not None:
            raise InputError(f"{self.scheme.label} has no groups of {size}; accepted are those it has")
        return self.per_row()._with_groups(
            size, torch.arange(self.shape[1] // own).repeat_interleave(own // size)
        )

    def _with_groups(self, size: int, which: slice | Tensor) -> Self:
        whole = size == self.shape[1]
        return replace(
            self,
            scale=self.scale[:, which].contiguous(),
            zero_point=self.zero_point[:, which].contiguous(),
            scheme=replace(
                self.scheme,
                granularity="channel" if whole else "group",
                group_size=None if whole else size,
            ),
        )

    def rows(self, which: slice | Tensor) -> Self:
        """Some of its rows, of a trellis whole chains; of granularity "tensor" they have its one scale.

        Raises:
            InputError: other rows of a trellis.
        """
        if self.scheme.trellis:
            trellis.check_chains(torch.arange(self.shape[0])[which])
        own = slice(None) if self.scheme.granularity == "tensor" else which
        outliers = self.outliers
        if outliers is not None:
            outliers = replace(outliers, weight=outliers.weight[which])
        levels = self.levels
        if levels is not None:
            levels = Levels(levels.steps[which], levels.counts[which])
        return replace(
            self,
            codes=self.codes[which],
            scale=self.scale[own],
            zero_point=self.zero_point[own],
            outliers=outliers,
            levels=levels,
        )

    @classmethod
    def concatenate(cls, parts: list[Self]) -> Self:
        """Matrices over the same inputs, one below the other; all of one scheme."""
        if len(parts) == 1:
            return parts[0]
        rows = [part.per_row() for part in parts]
        if len({part.scheme for part in rows}) > 1:
            raise InputError("matrices of different schemes cannot be joined")
        kept = [part.outliers for part in rows]
        columns = [() if o is None else tuple(o.columns.tolist()) for o in kept]
        if len(set(columns)) > 1:
            raise InputError("matrices with different outlier columns cannot be joined")
        found = [o for o in kept if o is not None]
        orders = {None if part.order is None else tuple(part.order.tolist()) for part in rows}
        if len(orders) > 1:
            raise InputError("matrices whose columns are in different orders cannot be joined")
        levels = [part.levels for part in rows if part.levels is not None]
        return cls(
            torch.cat([part.codes for part in rows]),
            torch.cat([part.scale for part in rows]),
            torch.cat([part.zero_point for part in rows]),
            rows[0].scheme,
            Outliers(found[0].columns, torch.cat([o.weight for o in found])) if found else None,
            rows[0].order,
            Levels(torch.cat([x.steps for x in levels]), torch.cat([x.counts for x in levels]))
            if levels
            else None,
        )


def quantize_tensor(
    weight: Tensor, scheme: QuantScheme, scale_dtype: torch.dtype | None = None
) -> QuantizedTensor:
    """Round a weight (out, in) to the nearest points of its grid.

    Args:
        scale_dtype: the weight's own by default.

    Raises:
        InputError: not a finite floating-point matrix, or the groups do not fit.

    >>> weight = torch.tensor([[0.1, -0.7, 0.33, 0.7]])
    >>> quantized = quantize_tensor(weight, QuantScheme(4, "channel"))
    >>> quantized.codes
    tensor([[ 9,  1, 11, 15]], dtype=torch.uint8)
    >>> bool((dequantize(quantized) - weight).abs().max() <= quantized.scale.max() / 2)
    True
    """
    scale, zero_point = affine.choose_qparams(weight, scheme, scale_dtype)
    codes = affine.quantize(weight, scale, zero_point, scheme)
    return QuantizedTensor(codes, scale, zero_point, scheme)


def dequantize(quantized: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """The weights that the codes stand for, (out, in), in the scale's dtype by default.

    >>> dequantize(quantize_tensor(torch.tensor([[1.0, -2.0]]), QuantScheme(8, "tensor")))
    tensor([[ 1.0079, -2.0000]])
    """
    return quantized.dequantize(dtype)


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; no mask, which would be as large as the tensor, is made."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor.float() if tensor.dtype.itemsize == 1 else tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))
