"""LLM.int8(): int8 inputs times int8 weights, and columns with outlying inputs in 16 bit.

Dettmers et al. 2022, arXiv 2208.07339, section 3: each row of inputs is divided by its own absmax / 127
and rounded, the product of integers is summed in int32 (`torch._int_mm`) and scaled in float32, and the
columns with an |x| above the threshold are left out of all that and multiplied in the dtype of x.

On the CPU all products read one buffer of codes. `_int_mm` first lays its right operand out anew, 5 ms
for 4096 x 4096: for up to `_SWAPPED_ROWS` rows the weights therefore stand on the left. Up to
`_FEW_ROWS` rows of bfloat16 are not rounded at all: `torch._weight_int8pack_mm` takes them as they are,
from the same codes, in no more time (measured with one thread, AVX-512, torch 2.13).

On CUDA `_int_mm` wants more than 16 rows and multiples of 8: rows and outputs are padded. That path is
written from the documentation of torch and has not been run.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.errors import InputError
from fewbits.kernels.reference import Kernel
from fewbits.tensor import QuantizedTensor

_FEW_ROWS = 4
_SWAPPED_ROWS = 128
_SLICE = 2**18  # values rounded, or scaled, at a time: 1 MB in float32, which stays in the cache
_COLUMNS = 32  # `_weight_int8pack_mm` reads whole vectors; CUDA wants multiples of 8
_CUDA_ROWS, _CUDA_OUT = 32, 8
_MOST_COLUMNS = (2**31 - 1) // (128 * 127)  # a sum of more products may not fit int32
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Int8Inputs(Kernel):
    """`torch._int_mm`, its operands rounded as `weight.scheme` says.

    A NaN or an infinity makes its own row NaN or infinite, and no other.
    """

    codes: Tensor  # (out, in) int8, padded with 0
    scale: Tensor  # (out,) float32
    columns: Tensor | None  # (n,) int64, of a static scheme
    outliers: Tensor | None  # (out, n)

    @classmethod
    def refuses(cls, weight: QuantizedTensor, dtype: torch.dtype, device: torch.device) -> str | None:
        """Inputs that are not to be rounded, another device or dtype, or sums that int32 cannot hold."""
        if weight.scheme.inputs is None:
            return "rounds inputs to 8 bits, and the scheme leaves them as they are"
        if device.type not in ("cpu", "cuda"):
            return f"is for CPU and CUDA, not {device.type}"
        if dtype not in _DTYPES:
            return f"scales in float32, too coarse for {dtype}"
        if weight.shape[1] > _MOST_COLUMNS:
            return f"sums at most {_MOST_COLUMNS} columns in int32, not {weight.shape[1]}"
        return None

    def __init__(self, weight: QuantizedTensor, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(weight, dtype, device)
        assert weight.scheme.inputs is not None
        self.inputs = weight.scheme.inputs
        weight = weight.per_row()
        signed = (weight.codes.to(torch.int16) - 128).to(torch.int8)
        kept = weight.outliers
        if kept is not None:
            signed[:, kept.columns] = 0
        out = -weight.shape[0] % _CUDA_OUT if device.type == "cuda" else 0
        signed = F.pad(signed, (0, -weight.shape[1] % _COLUMNS, 0, out)).contiguous()
        self.register_buffer("codes", signed.to(device))
        self.register_buffer("scale", weight.scale[:, 0].float().to(device))
        self.register_buffer("columns", None if kept is None else kept.columns.to(device))
        self.register_buffer("outliers", None if kept is None else kept.weight.to(device))
        # The scales that `_weight_int8pack_mm` takes are bfloat16 too, and must be the same ones.
        exact = torch.equal(self.scale.bfloat16().float(), self.scale)
        self.few = _FEW_ROWS if device.type == "cpu" and exact else 0

    def forward(self, x: Tensor) -> Tensor:
        """About `x @ W.T`, summed in float32 where it was rounded to int8.

        Raises:
            InputError: x has other columns than the weight.
        """
        if x.shape[-1] != self.shape[1]:
            raise InputError(f"inputs have {x.shape[-1]} columns; accepted are {self.shape[1]}")
        rows = x.reshape(-1, x.shape[-1])
        if not len(rows):
            y = rows.new_empty(0, self.shape[0])
        elif len(rows) <= self.few and x.dtype == torch.bfloat16:
            y = self._unrounded(rows)
        else:
            y = self._rounded(rows)
        return y.reshape(*x.shape[:-1], self.shape[0])

    def weight(self, dtype: torch.dtype) -> Tensor:
        """(out, in), each value exactly."""
        out, columns = self.shape
        weight = self.codes[:out, :columns].float().mul_(self.scale[:, None]).to(dtype)
        if self.columns is not None and self.outliers is not None:
            weight[:, self.columns] = self.outliers.to(dtype)
        return weight

    def _unrounded(self, rows: Tensor) -> Tensor:
        """For inputs that keep their 16 bits there is nothing to search for."""
        padded = F.pad(rows, (0, self.codes.shape[1] - rows.shape[1])).contiguous()
        y: Tensor = torch.ops.aten._weight_int8pack_mm(padded, self.codes, self.scale.bfloat16())
        if self.columns is not None and self.outliers is not None:
            y.addmm_(rows[:, self.columns], self.outliers.to(rows.dtype).t())
        return y

    def _rounded(self, rows: Tensor) -> Tensor:
        columns, weight = self._kept(rows)
        step = step_of(rows, columns, self.inputs.granularity == "tensor")
        codes = to_codes(rows, columns, step, self.codes.shape[1])
        y = self._scaled(self._product(codes), step, rows.dtype)
        if columns is not None and weight is not None:
            y.addmm_(rows[:, columns], weight.t())
        return y

    def _kept(self, rows: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The columns that stay in 16 bit, and their weights (out, n) in the dtype of the inputs."""
        if self.columns is not None and self.outliers is not None:
            return self.columns, self.outliers.to(rows.dtype)
        if self.inputs.static or not self.inputs.threshold:
            return None, None
        # In float64, as the threshold is. A NaN hides what else its column holds, so that goes along.
        columns = (~(rows.abs().amax(0).double() <= self.inputs.threshold)).nonzero()[:, 0]
        if not len(columns):
            return None, None
        weight = self.codes[: self.shape[0]].index_select(1, columns).float()
        return columns, weight.mul_(self.scale[:, None]).to(rows.dtype)

    def _product(self, codes: Tensor) -> Tensor:
        """(rows, in) int8 times the weights' codes: (rows, out) int32."""
        if codes.device.type == "cuda":
            padded = F.pad(codes, (0, 0, 0, max(-len(codes) % 8, _CUDA_ROWS - len(codes))))
            return torch._int_mm(padded, self.codes.t())[: len(codes), : self.shape[0]]
        if len(codes) <= _SWAPPED_ROWS:
            return torch._int_mm(self.codes, codes.t()).t().contiguous()
        return torch._int_mm(codes, self.codes.t())

    def _scaled(self, product: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
        """The product (rows, out) in units of both scales."""
        y = torch.empty(product.shape, dtype=dtype, device=product.device)
        for part in slices(product):
            y[part] = product[part].float().mul_(self.scale).mul_(step[part])
        return y


def slices(matrix: Tensor) -> list[slice]:
    """Runs of rows that fit the cache."""
    count = max(1, _SLICE // matrix.shape[1])
    return [slice(i, i + count) for i in range(0, len(matrix), count)]


def step_of(rows: Tensor, columns: Tensor | None, shared: bool) -> Tensor:
    """What a code of 1 stands for in each row, (rows, 1) float32: absmax / 127 over the other columns.

    Args:
        columns: that do not count.
        shared: all rows get the largest; but those with a NaN or an infinity keep that to themselves.
    """
    parts = []
    for part in slices(rows):
        sizes = rows[part].abs()
        if columns is not None:
            sizes.index_fill_(1, columns, 0)
        parts.append(sizes.amax(1, keepdim=True).float())
    largest = torch.cat(parts)
    if shared:
        finite = largest.isfinite()
        largest = torch.where(finite, torch.where(finite, largest, 0).max(), largest)
    # A normal number even for zeros and subnormals, so that its inverse is finite.
    # By a tensor: CUDA multiplies by the inverse of a number.
    return largest.div_(largest.new_tensor(127)).clamp_min_(torch.finfo(torch.float32).tiny)


def to_codes(rows: Tensor, columns: Tensor | None, step: Tensor, width: int) -> Tensor:
    """`round(rows / step)` as int8, 0 in `columns` and in those that fill up to `width`.

    Where the step is NaN or infinite the codes mean nothing: any integer times it is no finite number.
    """
    codes = torch.zeros(len(rows), width, dtype=torch.int8, device=rows.device)
    inverse = step.reciprocal()
    for part in slices(rows):
        scaled = rows[part].to(torch.float32, copy=True)
        if columns is not None:
            scaled.index_fill_(1, columns, 0)
        codes[part, : rows.shape[1]] = scaled.mul_(inverse[part]).round_()
    return codes
