"""The definition of correct: unpack, dequantize to the dtype of x, multiply.

Slow for one row, and never wrong: it takes every scheme, shape, dtype and device. Inputs are multiplied
as they are, also where a scheme would have them rounded. The float weights
exist for a few rows at a time only.
"""

from abc import abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits import packing, trellis
from fewbits.affine import scaled
from fewbits.tensor import QuantizedTensor

_SLICE = 2**22  # weights dequantized at a time: 16 MB in float32; not tuned


class Kernel(nn.Module):
    """A weight in the layout that one implementation multiplies by. Called as `kernel(x)`.

    `shape` is (out, in), `dtype` that of the inputs it was made for; `adds_bias` whether it may be
    called with a bias as well, and rounds once.
    """

    adds_bias: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def refuses(cls, weight: QuantizedTensor, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why this kernel cannot hold the weight for inputs of `dtype`; None if it can."""

    @abstractmethod
    def __init__(self, weight: QuantizedTensor, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.shape, self.dtype = weight.shape, dtype

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """`x @ W.T`: (..., in) -> (..., out), in the dtype of x."""

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight, (out, in), made anew at each call.

        The product with the identity gives it from any layout, each value exactly; a kernel that rounds
        its inputs, or knows a shorter way, has its own.
        """
        buffer = next(self.buffers())  # a module may have been moved since it was made
        one = torch.eye(self.shape[1], dtype=self.dtype, device=buffer.device)
        weight: Tensor = self(one)
        return weight.t().to(dtype).contiguous()

    def rows(self, which: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of that weight, (n, in), by their numbers (n,).

        All of it is made for them: a kernel whose layout lets it take some alone has its own.
        """
        return self.weight(dtype)[which]


def no_product(
    weight: QuantizedTensor, device: torch.device, where: str, *, trellis: bool = False
) -> str | None:
    """Why a kernel for one kind of device ("cpu", "cuda") that rounds no inputs cannot run; or None.

    Args:
        trellis: whether it takes the codes of one.
    """
    if weight.scheme.trellis and not trellis:
        return "has no table for the codes of a trellis"
    if device.type != where:
        return f"is for {'the CPU' if where == 'cpu' else where.upper()}, not {device.type}"
    return None if weight.scheme.inputs is None else "takes inputs as they are, not in 8 bits"


class Reference(Kernel):
    """Codes stay packed; each call dequantizes slices of rows and multiplies by them."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    offset: Tensor | None
    columns: Tensor | None
    outliers: Tensor | None

    @classmethod
    def refuses(cls, weight: QuantizedTensor, dtype: torch.dtype, device: torch.device) -> str | None:
        """Never."""
        return None

    def __init__(self, weight: QuantizedTensor, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(weight, dtype, device)
        weight = weight.per_row()
        self.scheme = weight.scheme
        self.register_buffer("codes", packing.pack(weight.codes, weight.scheme.bits).to(device))
        self.register_buffer("scale", weight.scale.to(device))
        self.register_buffer("zero_point", weight.zero_point.to(device))
        offset = weight.offset
        self.register_buffer("offset", None if offset is None else offset.to(device))
        kept = weight.outliers
        self.register_buffer("columns", None if kept is None else kept.columns.to(device))
        self.register_buffer("outliers", None if kept is None else kept.weight.to(device))

    def forward(self, x: Tensor) -> Tensor:
        """`x @ W.T`, slice by slice of output rows."""
        rows, columns = self.shape
        step = max(1, _SLICE // columns)
        parts = [F.linear(x, self._rows(slice(i, i + step), x.dtype)) for i in range(0, rows, step)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """(out, in), each value rounded once."""
        return self._rows(slice(None), dtype)

    def rows(self, which: Tensor, dtype: torch.dtype) -> Tensor:
        """Some of its rows, each value rounded once."""
        return self._rows(which, dtype)

    def _rows(self, which: slice | Tensor, dtype: torch.dtype) -> Tensor:
        codes = self._values(which) if self.scheme.trellis else self._unpacked(which)
        scale, zero_point = self.scale[which], self.zero_point[which]
        offset = None if self.offset is None else self.offset[which]
        weight = scaled(codes, scale, zero_point, self.scheme, dtype, offset)
        if self.outliers is not None:
            weight[:, self.columns] = self.outliers[which].to(dtype)
        return weight

    def _unpacked(self, which: slice | Tensor) -> Tensor:
        return packing.unpack(self.codes[which], self.scheme.bits, self.shape[1])

    def _values(self, which: slice | Tensor) -> Tensor:
        bits, rows = self.scheme.bits, torch.arange(self.shape[0], device=self.codes.device)[which]
        return trellis.look_up([self._unpacked(rows) for rows in trellis.before(rows, bits)], bits)
