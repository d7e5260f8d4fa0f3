"""Layouts of quantized weights on disk: one file each.

Every other tool's zero-point and layout convention is translated in exactly one of them.
"""

from typing import Any

from fewbits.formats.awq import AwqLayout
from fewbits.formats.bitsandbytes import BitsAndBytes
from fewbits.formats.compressed_tensors import CompressedTensors
from fewbits.formats.gguf import GgufLayout
from fewbits.formats.gptq import GptqLayout
from fewbits.formats.layout import Format, Headers, Integers, Names, Reader, ScaleRange
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
READ_ONLY: dict[str, Reader] = {layout.name: layout for layout in (BitsAndBytes(),)}


def format_of(config: dict[str, Any]) -> Reader | None:
    """The format that wrote a `quantization_config`; None if it is not read."""
    readers = (*FORMATS.values(), *READ_ONLY.values())
    return next((layout for layout in readers if layout.reads(config)), None)


__all__ = [
    "FORMATS",
    "READ_ONLY",
    "AwqLayout",
    "BitsAndBytes",
    "CompressedTensors",
    "Format",
    "GgufLayout",
    "GptqLayout",
    "Headers",
    "Integers",
    "Names",
    "Own",
    "Placement",
    "Reader",
    "ScaleRange",
    "format_of",
]
