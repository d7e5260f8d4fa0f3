"""bitsandbytes in 8 bits, as transformers saves it: LLM.int8(), read and not written.

    X.weight          int8 (out, in)   q, so our code - 128
    X.SCB             float32 (out,)   absmax of each row, so 127 steps
    X.weight_format   uint8 ()         0: rows as they are. Others, of old versions, suited single GPUs

    config.json  "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": true,
      "llm_int8_threshold": 6.0, "llm_int8_skip_modules": ["lm_head"]}

Inputs are rounded by token in each call, but for columns with an |x| above the threshold, whose weights
are multiplied out: our `w8-channel-a8-token-t6`. In 4 bits it has a table of 16 floats (nf4, fp4), which
is no grid of integers. Read in bitsandbytes 0.50.2 and transformers 5.23.0, 2026-11-26.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import InputError
from fewbits.formats.gptq import setting
from fewbits.formats.layout import Names, Stored
from fewbits.formats.packed import find
from fewbits.scheme import InputScheme, QuantScheme
from fewbits.tensor import QuantizedTensor
from fewbits.untrusted import shown

_STEPS = 127  # of a row's absmax
_ROWS = 0  # X.weight_format


@dataclass(frozen=True, slots=True)
class BitsAndBytes:
    """`load_in_8bit`.

    >>> tensors = {"X.weight": torch.tensor([[-127, 0, 64]], dtype=torch.int8), "X.SCB": torch.ones(1)}
    >>> weight = BitsAndBytes().read("X.weight", tensors, QuantScheme(8))
    >>> weight.codes.tolist(), weight.dequantize().tolist()
    ([[1, 128, 192]], [[-1.0, 0.0, 0.5039370059967041]])
    """

    @property
    def name(self) -> str:
        """As in config.json; no `--format` has it."""
        return "bitsandbytes"

    @property
    def quant_method(self) -> str:
        """The same."""
        return self.name

    def reads(self, config: dict[str, Any]) -> bool:
        """By the method, or by what configurations had before they named one."""
        old = config.get("quant_method") is None and {"load_in_8bit", "load_in_4bit"} & config.keys()
        return config.get("quant_method") == self.name or bool(old)

    def read(self, name: str, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        """Codes as they are, and scales in float32."""
        signed, absmax = find(name, "", tensors), find(_base(name), ".SCB", tensors)
        if signed.dtype != torch.int8 or signed.ndim != 2:
            raise InputError(
                f"{name} is {signed.dtype} with {signed.ndim} axes; accepted is a matrix of int8"
            )
        if tuple(absmax.shape) != (len(signed),) or not absmax.is_floating_point():
            raise InputError(
                f"{_base(name)}.SCB is {tuple(absmax.shape)} of {absmax.dtype}; accepted are "
                f"{len(signed)} floats"
            )
        order = tensors.get(f"{_base(name)}.weight_format")
        if order is not None and order.flatten().tolist() != [_ROWS]:
            raise InputError(
                f"{_base(name)}.weight_format is {shown(order.tolist())}; accepted is {_ROWS}, rows"
            )
        return QuantizedTensor(
            (signed.to(torch.int16) + scheme.middle).to(torch.uint8),
            (absmax.float() / _STEPS)[:, None],
            torch.full((len(signed), 1), scheme.middle, dtype=torch.uint8),
            scheme,
        )

    def tensors(self, name: str) -> Names:
        """Codes and absmax; old files do not say in which order the codes are."""
        return Names((name, f"{_base(name)}.SCB"), (f"{_base(name)}.weight_format",))

    def shape(self, config: dict[str, Any], name: str, stored: Stored) -> tuple[int, ...]:
        """Of the codes."""
        return stored.tensors[name].shape

    def scheme_of(self, config: dict[str, Any], name: str, module: str) -> QuantScheme | None:
        """One for all."""
        _check_config(config)
        threshold = setting(config, ("llm_int8_threshold",), float, 6.0)
        return QuantScheme(8, "channel", inputs=InputScheme("token", threshold))

    def quantized_names(self, config: dict[str, Any], tensors: Iterable[str]) -> set[str]:
        """By what stands beside the codes: an `X.weight` alone is a float."""
        _check_config(config)
        ends = (".SCB", ".weight_format")
        return {
            f"{name.removesuffix(end)}.weight" for name in tensors for end in ends if name.endswith(end)
        }


def _base(name: str) -> str:
    return name.removesuffix(".weight")


def _check_config(config: dict[str, Any]) -> None:
    """Refuse what holds no such codes."""
    if setting(config, ("load_in_4bit", "_load_in_4bit"), bool, False):
        kind = shown(config.get("bnb_4bit_quant_type", "fp4"))
        raise InputError(
            f"bitsandbytes in 4 bits ({kind}) has floats in a table, no grid of integers; accepted are "
            "8 bits (load_in_8bit), or the model in float"
        )
    whole = setting(config, ("llm_int8_has_fp16_weight",), bool, False)
    if whole or not setting(config, ("load_in_8bit", "_load_in_8bit"), bool, False):
        raise InputError(
            "bitsandbytes without load_in_8bit, or with weights in 16 bits, is not read; accepted is "
            "load_in_8bit"
        )
