"""PyTorch's own CPU kernels: int4pack for 2, 3 and 4 bits, int8pack for 8 bits.

int4pack computes `(c - 8) * scale + zero` for 4-bit c, groups of 32, 64, 128 or 256 columns, and rows
in multiples of 16. Fewer bits fit by moving the codes to the middle of its grid; rows, and columns of
whole-row scales, are padded with weights that are zero. Of two levels of scales, zero is
`8 * scale - offset`: the weight in the middle of a group, which bfloat16 moves no further than it would
the weights themselves. int8pack computes `q * scale` for int8 q and one scale per row, so for symmetric
grids. Its columns are padded to a multiple of 32: it reads whole vectors, and past the end of shorter
rows (it crashed at 172).

Both are vectorized for bfloat16 only. In float32 and float16 they take 30 to 75 times as long as a float
matmul of 512 rows (torch 2.13, 2026-11-23), so those dtypes are left to the reference kernel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.kernels.reference import Kernel, no_product
from fewbits.tensor import QuantizedTensor

_GROUP_SIZES = (256, 128, 64, 32)
_ROWS = 16
_INT8_COLUMNS = 32


def kernel_group(group_size: int | None, columns: int, sizes: tuple[int, ...]) -> int | None:
    """The largest of `sizes` that divides a group; for whole rows, the one that pads least."""
    if group_size is not None:
        return next((size for size in sizes if group_size % size == 0), None)
    return min(sizes, key=lambda size: (-columns % size, -size))


def scales_lost(weight: QuantizedTensor, dtype: torch.dtype) -> str | None:
    """Why the scales cannot be held in `dtype`: float16 has no digits left for very small ones."""
    exact = weight.scale.double()
    lost = (exact.to(dtype).double() - exact).abs() > torch.finfo(dtype).eps * exact.abs()
    return f"has scales too small or too large for {dtype}" if bool(lost.any()) else None


def int4_operands(
    weight: QuantizedTensor, group: int, rows: int, columns: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Codes around 8, padded to (rows, columns), int32; and (columns / group, rows, 2) scale, zero."""
    weight = weight.per_row()
    out, inputs = weight.shape
    middle = weight.scheme.middle
    codes = weight.codes.to(torch.int32) + (8 - middle)
    codes = F.pad(codes, (0, columns - inputs, 0, rows - out), value=8)
    scale = weight.scale.float()
    zero = scale * (middle - weight.zero_point.float())
    if weight.offset is not None:
        zero -= weight.offset
    both = torch.stack([scale, zero], -1)  # (out, groups, 2)
    groups = columns // group
    if weight.scheme.group_size is None:
        both = both.expand(out, groups, 2)
    else:
        both = both.repeat_interleave(groups // both.shape[1], 1)
    both = F.pad(both, (0, 0, 0, 0, 0, rows - out))
    return codes, both.transpose(0, 1).contiguous().to(dtype)


class Int4Pack(Kernel):
    """`torch._weight_int4pack_mm_for_cpu`."""

    codes: Tensor
    scale_and_zero: Tensor

    @classmethod
    def refuses(cls, weight: QuantizedTensor, dtype: torch.dtype, device: torch.device) -> str | None:
        """More than 4 bits, another device or dtype, or groups that are no multiple of 32."""
        reason = no_product(weight, device, "cpu")
        if reason is not None:
            return reason
        if dtype != torch.bfloat16:
            return f"is fast in bfloat16 only, not in {dtype}"
        if weight.scheme.bits > 4:
            return f"holds at most 4 bits, not {weight.scheme.bits}"
        if kernel_group(weight.scheme.group_size, weight.shape[1], _GROUP_SIZES) is None:
            return f"needs groups of a multiple of 32 columns, not {weight.scheme.group_size}"
        return scales_lost(weight, dtype)

    def __init__(self, weight: QuantizedTensor, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(weight, dtype, device)
        out, columns = weight.shape
        group = kernel_group(weight.scheme.group_size, columns, _GROUP_SIZES)
        assert group is not None
        self.group, self.out, self.padding = group, out, -columns % group
        codes, both = int4_operands(weight, group, out + -out % _ROWS, columns + self.padding, dtype)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        self.register_buffer("codes", packed)
        self.register_buffer("scale_and_zero", both)

    def forward(self, x: Tensor) -> Tensor:
        """`x @ W.T`, in bfloat16 whatever x is: norms that were made float32 give such inputs."""
        rows = F.pad(x.reshape(-1, x.shape[-1]).to(self.dtype), (0, self.padding)).contiguous()
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows, self.codes, self.group, self.scale_and_zero
        )
        return y[:, : self.out].reshape(*x.shape[:-1], self.out).to(x.dtype)


class Int8Pack(Kernel):
    """`torch._weight_int8pack_mm`."""

    codes: Tensor
    scale: Tensor

    @classmethod
    def refuses(cls, weight: QuantizedTensor, dtype: torch.dtype, device: torch.device) -> str | None:
        """Other than 8 bits, another device or dtype, groups, or zero points."""
        reason = no_product(weight, device, "cpu")
        if reason is not None:
            return reason
        if dtype != torch.bfloat16:
            return f"is fast in bfloat16 only, not in {dtype}"
        if weight.scheme.bits != 8:
            return f"holds 8 bits, not {weight.scheme.bits}"
        if weight.scheme.group_size is not None:
            return f"needs one scale per row, not groups of {weight.scheme.group_size}"
        if not weight.scheme.symmetric:
            return "rounds the product to bfloat16 before a zero point's share could be added"
        return scales_lost(weight, dtype)

    def __init__(self, weight: QuantizedTensor, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(weight, dtype, device)
        weight = weight.per_row()
        signed = (weight.codes.to(torch.int16) - 128).to(torch.int8)
        self.padding = -weight.shape[1] % _INT8_COLUMNS
        self.register_buffer("codes", F.pad(signed, (0, self.padding)).contiguous())
        self.register_buffer("scale", weight.scale[:, 0].to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """`x @ W.T`, in bfloat16 whatever x is: norms that were made float32 give such inputs."""
        rows = F.pad(x.reshape(-1, x.shape[-1]).to(self.dtype), (0, self.padding)).contiguous()
        y: Tensor = torch.ops.aten._weight_int8pack_mm(rows, self.codes, self.scale)
        return y.reshape(*x.shape[:-1], y.shape[-1]).to(x.dtype)

    def rows(self, which: Tensor, dtype: torch.dtype) -> Tensor:
        """Some rows of the weight, each value rounded once."""
        codes = self.codes[which, : self.shape[1]].float()
        return (codes * self.scale[which, None].float()).to(dtype)
