"""Rewrites of a float block that leave its output alone and make it easier to round: one file each."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from fewbits.scheme import QuantScheme
from fewbits.tensor import Note
from fewbits.transforms.awq import AWQ
from fewbits.wiring import Wiring


class Transform(Protocol):
    """A frozen dataclass of options; calling it changes a block in place."""

    def __call__(
        self,
        block: nn.Module,
        wiring: Wiring,
        schemes: dict[str, QuantScheme],
        search: Callable[[], Tensor],
        held_out: Callable[[], Tensor],
        dtype: torch.dtype,
    ) -> tuple[list[Note], dict[str, Tensor]]:
        """Rewrite the block.

        Args:
            block: float32, its experts split.
            wiring: of the block.
            schemes: of its linears that will be rounded, by path inside it.
            search: runs the block as it stands on the samples to search with; its hidden states.
            held_out: the same on others, which decide what is kept.
            dtype: in which what is not rounded will be written.

        Returns:
            notes, and the folds: by path of a module, what its columns (in,) were multiplied by and the
            tensor that it reads divided by; modules that read one tensor have the same.
        """


TRANSFORMS: dict[str, type[Transform]] = {"awq": AWQ}

__all__ = ["AWQ", "TRANSFORMS", "Transform"]
