"""LLM.int8(): columns with outlying inputs stay in 16 bit, all others become 8-bit integers.

Dettmers et al. 2022, arXiv 2208.07339. What makes a column an outlier are its *inputs*: there the paper
looks in each call, and so does the kernel where the scheme is not static. A static scheme has them
found once, by calibration: nothing is searched for at run time, their weights keep their 16 bits, and
the scales of all other weights do not have to cover them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.errors import InputError
from fewbits.scheme import QuantScheme
from fewbits.tensor import Note, Outliers, QuantizedTensor, quantize_tensor


@dataclass(frozen=True, slots=True)
class LLMInt8:
    """Round to nearest, but for the columns in which calibration found inputs above the threshold.

    Args:
        static: there are schemes with static columns: the largest inputs must be collected.
    """

    static: bool = False

    @property
    def needs(self) -> frozenset[str]:
        """The largest |x| of each input, where columns are static."""
        return frozenset({"absmax"} if self.static else ())

    def __call__(
        self,
        weight: Tensor,
        scheme: QuantScheme,
        stats: dict[str, Tensor],
        scale_dtype: torch.dtype | None = None,
    ) -> tuple[QuantizedTensor, list[Note]]:
        """Codes for `weight` (out, in); `stats["absmax"]` is (in,), where the scheme is static.

        Raises:
            InputError: as `quantize_tensor`, or the scheme is static and there is no `absmax`.
        """
        inputs = scheme.inputs
        if inputs is None or not inputs.static:
            return quantize_tensor(weight, scheme, scale_dtype), []
        if "absmax" not in stats:
            raise InputError(
                f"scheme {scheme.label} without calibration; accepted is {scheme.dynamic.label}"
            )
        if bool(stats["absmax"].isnan().any()):
            raise InputError("its inputs hold NaN; accepted are finite ones")
        columns = (stats["absmax"] > inputs.threshold).nonzero()[:, 0]
        if not len(columns):
            return quantize_tensor(weight, scheme, scale_dtype), []
        rest = weight.clone()
        rest[:, columns] = 0
        rounded = quantize_tensor(rest, scheme, scale_dtype)
        kept = weight[:, columns].to(scale_dtype or weight.dtype)
        outliers = Outliers(columns, kept)
        return QuantizedTensor(rounded.codes, rounded.scale, rounded.zero_point, scheme, outliers), []
