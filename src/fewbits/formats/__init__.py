"""Layouts of quantized weights on disk: one file each.

Every other tool's zero-point and layout convention is translated in exactly one of them.
"""

from typing import Any

from fewbits.formats.awq import AwqLayout
from fewbits.formats.compressed_tensors import CompressedTensors
from fewbits.formats.gguf import GgufLayout
from fewbits.formats.gptq import GptqLayout
from fewbits.formats.layout import Format, Integers, Names, ScaleRange
from fewbits.formats.own import Own
from fewbits.formats.placement import Placement

_LAYOUTS: tuple[Format, ...] = (
    CompressedTensors(),
    GptqLayout(1),
    GptqLayout(2),
    AwqLayout(),
    GgufLayout(),
    Own(),
)
FORMATS: dict[str, Format] = {layout.name: layout for layout in _LAYOUTS}


def format_of(config: dict[str, Any]) -> Format | None:
    """The format that wrote a `quantization_config`; None if it is not read."""
    return next((layout for layout in FORMATS.values() if layout.reads(config)), None)


__all__ = [
    "FORMATS",
    "AwqLayout",
    "CompressedTensors",
    "Format",
    "GgufLayout",
    "GptqLayout",
    "Integers",
    "Names",
    "Own",
    "Placement",
    "ScaleRange",
    "format_of",
]
