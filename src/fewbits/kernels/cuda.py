"""PyTorch's own CUDA kernel for 2, 3 and 4 bits in bfloat16: int4pack in the tinygemm layout.

The same arithmetic as on the CPU, `(c - 8) * scale + zero`; the layout wants rows in multiples of 8
and columns in multiples of 16 * inner_tiles.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.kernels.aten import int4_operands, kernel_group
from fewbits.kernels.reference import Kernel, no_product
from fewbits.tensor import QuantizedTensor

_GROUP_SIZES = (256, 128, 64, 32)
_ROWS, _INNER_TILES = 8, 8


class Int4PackCuda(Kernel):
    """`torch._weight_int4pack_mm`."""

    codes: Tensor
    scale_and_zero: Tensor

    @classmethod
    def refuses(cls, weight: QuantizedTensor, dtype: torch.dtype, device: torch.device) -> str | None:
        """More than 4 bits, no CUDA, another dtype than bfloat16, or columns that do not fit."""
        reason = no_product(weight, device, "cuda")
        if reason is not None:
            return reason
        if dtype != torch.bfloat16:
            return f"needs bfloat16, not {dtype}"
        if weight.scheme.bits > 4:
            return f"holds at most 4 bits, not {weight.scheme.bits}"
        if kernel_group(weight.scheme.group_size, weight.shape[1], _GROUP_SIZES) is None:
            return f"needs groups of a multiple of 32 columns, not {weight.scheme.group_size}"
        tile = 16 * _INNER_TILES
        if weight.scheme.group_size is not None and weight.shape[1] % tile:
            return f"needs columns in multiples of {tile}, not {weight.shape[1]}"
        return None

    def __init__(self, weight: QuantizedTensor, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(weight, dtype, device)
        out, columns = weight.shape
        sizes = (256, 128) if weight.scheme.group_size is None else _GROUP_SIZES
        group = kernel_group(weight.scheme.group_size, columns, sizes)
        assert group is not None
        self.group, self.out, self.padding = group, out, -columns % group
        codes, both = int4_operands(weight, group, out + -out % _ROWS, columns + self.padding, dtype)
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8).to(device)
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs, _INNER_TILES)
        self.register_buffer("codes", packed)
        self.register_buffer("scale_and_zero", both.to(device))

    def forward(self, x: Tensor) -> Tensor:
        """`x @ W.T`, in bfloat16 whatever x is: norms that were made float32 give such inputs."""
        rows = F.pad(x.reshape(-1, x.shape[-1]).to(self.dtype), (0, self.padding)).contiguous()
        y: Tensor = torch.ops.aten._weight_int4pack_mm(rows, self.codes, self.group, self.scale_and_zero)
        return y[:, : self.out].reshape(*x.shape[:-1], self.out).to(x.dtype)
