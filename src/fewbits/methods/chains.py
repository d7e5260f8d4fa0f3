"""Columns of a trellis being rounded: as `gptq._Columns`, but codes of a column are found together."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fewbits import affine, trellis
from fewbits.scheme import QuantScheme

_BLOCK = 64  # columns corrected by one product; not tuned


@dataclass(slots=True)
class Chains:
    """A matrix being rounded, (in, out): columns in the order of rounding, each in one piece of memory.

    Args:
        W: the weights.
        E: what rounding left of them, zero for columns not rounded yet.
        codes: of columns rounded so far.
        steps: (groups, out), in float32.
        groups: of each column, its row in them.
    """

    W: Tensor
    E: Tensor
    codes: Tensor
    steps: Tensor
    groups: list[int]
    scheme: QuantScheme

    @classmethod
    def of(
        cls, weight: Tensor, scale: Tensor, zero_point: Tensor, scheme: QuantScheme, order: Tensor
    ) -> Self:
        """Nothing is rounded yet."""
        W = weight.t()[order].to(affine.working_dtype(weight))
        steps = scale.t().float().contiguous()
        groups = (order // (len(W) // scale.shape[1])).tolist()
        codes = torch.zeros(W.shape, dtype=torch.uint8, device=W.device)
        return cls(W, torch.zeros_like(W), codes, steps, groups, scheme)

    def round_all(self, shares: Tensor, upper: bool = False) -> None:
        """Round each column at the best place given the errors of others.

        Args:
            shares: (columns, columns), of the error of the first, what the second takes up; what lies on
                the diagonal does not count.
            upper: columns take up the errors of those before them alone, not of all others.
        """
        bits = self.scheme.bits
        for start in range(0, len(self.W), _BLOCK):
            stop = min(start + _BLOCK, len(self.W))
            share = shares[: stop if upper else None, start:stop].t().contiguous()
            share[:, start:stop].fill_diagonal_(0)
            if upper:
                share[:, start:stop].tril_()
            taken = share @ self.E[: share.shape[1]]
            changed = torch.zeros_like(taken)
            for i, k in enumerate(range(start, stop)):
                target = taken[i].addmv_(changed.t(), share[i, start:stop]).add_(self.W[k])
                step = self.steps[self.groups[k]]
                self.codes[k] = trellis.encode(target[:, None], step[:, None], bits)[:, 0]
                rounded = trellis.values(self.codes[k][:, None], bits)[:, 0].to(step.dtype) * step
                error = self.W[k] - rounded
                changed[i] = error - self.E[k]
                self.E[k] = error

    def codes_in(self, order: Tensor) -> Tensor:
        """The codes (out, in), as the weight had them."""
        result = torch.empty_like(self.codes)
        result[order] = self.codes
        return result.t().contiguous()
