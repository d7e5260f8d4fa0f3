"""GGUF: the blocks of llama.cpp that hold our integers as they are: Q8_0, Q4_0, Q4_1 and Q4_K.

    X.weight_blocks   uint8 (out, in / 32 * bytes of a block)   each row: its blocks, one after the other

    config.json  "quantization_config": {"quant_method": "gguf", "version": 1,
                                         "weights": {"X.weight": "w4-g32", ...}}

A block is 32 columns of one row, or 256 in Q4_K (see fewbits.formats.gguf_k). Larger groups of a
multiple of 32 columns, and whole rows, are held exactly by repeating their scale; they are read back as
groups of 32. The tensors are those that the container reads and writes by the source's names (see
fewbits.gguf_file), (out, in) whatever the source's orientation; the configuration stands in no file, but
is made from the types of the tensors.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fewbits.errors import InputError
from fewbits.formats.gguf_k import Q4KBlock, as_bytes, as_halves, elsewhere
from fewbits.formats.layout import (
    Headers,
    Integers,
    Names,
    ScaleRange,
    Stored,
    as_float16,
    float16_scales,
)
from fewbits.formats.placement import Placement
from fewbits.scheme import QuantScheme
from fewbits.tensor import QuantizedTensor

VERSION = 1
BLOCK = 32  # columns
_END = "_blocks"


class Block(Protocol):
    """One type of block, of `size_bytes`; rows of them are (out, in / columns * size_bytes)."""

    @property
    def kind(self) -> str:
        """As ggml calls it."""

    @property
    def label(self) -> str:
        """Of the scheme that it holds."""

    @property
    def columns(self) -> int:
        """Of a weight, in one block."""

    @property
    def size_bytes(self) -> int:
        """Of the whole."""

    def write(self, weight: QuantizedTensor) -> Tensor:
        """Rows of blocks of a weight, as `GgufLayout.held` gives it.

        Raises:
            InputError: a number that it does not hold.
        """

    def read(self, stored: Tensor) -> QuantizedTensor:
        """The inverse.

        Raises:
            InputError: a zero point is no integer.
        """

    def decode(self, stored: Tensor, rows: int) -> Integers:
        """What `read` gives, by the gguf library, whose float32 values are exact."""


class _One(ABC):
    """Blocks of 32 columns with one scale: n of them are (n, `size_bytes`) uint8.

    `head_bytes` come before the codes.
    """

    kind: str
    label: str
    columns = BLOCK
    size_bytes: int
    head_bytes: int

    @abstractmethod
    def pack(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Blocks of (n, 32) codes, (n,) float16 scales and (n,) zero points."""

    @abstractmethod
    def unpack(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The inverse.

        Raises:
            InputError: a zero point is no integer.
        """

    def write(self, weight: QuantizedTensor) -> Tensor:
        """Rows of blocks."""
        codes = weight.codes.reshape(-1, BLOCK)
        blocks = self.pack(codes, weight.scale.reshape(-1), weight.zero_point.reshape(-1))
        return blocks.reshape(weight.shape[0], -1)

    def read(self, stored: Tensor) -> QuantizedTensor:
        """The inverse."""
        parts = self.unpack(stored.reshape(-1, self.size_bytes))
        codes, scale, zero_point = (part.reshape(len(stored), -1) for part in parts)
        return QuantizedTensor(codes, scale, zero_point, QuantScheme.parse(self.label))

    def decode(self, stored: Tensor, rows: int) -> Integers:
        """By the gguf library, whose float32 values are exact: they need 19 bits at most.

        A scale is what code 1 has above code 0; codes are what blocks with a scale of 1 and no m give.
        """
        blocks = stored.reshape(-1, self.size_bytes).clone()
        changed, values = blocks.clone(), []
        for code in (0, 1):
            changed[:, self.head_bytes :] = code
            values.append(elsewhere(changed, self.kind, rows, BLOCK)[:, 0])
        none, one = values
        scale = one - none
        points = (-none / scale).round()
        blocks[:, : self.head_bytes] = 0
        blocks[:, 1] = 0x3C  # 1 in float16
        codes = elsewhere(blocks, self.kind, rows, BLOCK)
        scheme = QuantScheme.parse(self.label)
        if scheme.symmetric:
            codes, points = codes + scheme.middle, torch.full(scale.shape, float(scheme.middle))
        return Integers(
            codes.to(torch.uint8).reshape(rows, -1),
            scale.to(torch.float16).reshape(rows, -1),
            points.to(torch.uint8).reshape(rows, -1),
        )


class Q80(_One):
    """Q8_0: 8 bits, symmetric; `w = d * q`.

        byte    0-1          2      3     ...   33
                d, float16   q[0]   q[1]  ...   q[31]      q = code - 128, int8

    >>> codes = torch.arange(128, 160, dtype=torch.uint8)[None]
    >>> Q80().pack(codes, torch.tensor([1.0]).half(), torch.tensor([128]))[0, :5].tolist()
    [0, 60, 0, 1, 2]
    """

    kind, label, size_bytes, head_bytes = "Q8_0", "w8-g32", 34, 2

    def pack(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Code 128 becomes 0: the highest bit is the other one."""
        return torch.cat([as_bytes(scale), codes ^ 128], 1)

    def unpack(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All blocks are read."""
        scale = as_halves(blocks[:, :2])
        return blocks[:, 2:] ^ 128, scale, torch.full(scale.shape, 128, dtype=torch.uint8)


class Q40(_One):
    """Q4_0: 4 bits, symmetric; `w = d * (code - 8)`.

        byte    0-1          2                   ...   17
                d, float16   code[16]  code[0]   ...   code[31]  code[15]      high, low half

    llama.cpp's own quantizer gives d the opposite sign of the weight that is largest; then scales are
    negative, and stay so: code 0 would have no place on the mirrored grid.

    >>> codes = (torch.arange(32, dtype=torch.uint8) // 2)[None]  # 0, 0, 1, 1, ... 15, 15
    >>> blocks = Q40().pack(codes, torch.tensor([-2.0]).half(), torch.tensor([8]))
    >>> blocks[0, :6].tolist() == [0x00, 0xC0, 0x80, 0x80, 0x91, 0x91]
    True
    """

    kind, label, size_bytes, head_bytes = "Q4_0", "w4-g32", 18, 2

    def pack(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Codes are stored as they are."""
        return torch.cat([as_bytes(scale), _halve(codes)], 1)

    def unpack(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All blocks are read."""
        scale = as_halves(blocks[:, :2])
        return _double(blocks[:, 2:]), scale, torch.full(scale.shape, 8, dtype=torch.uint8)


class Q41(_One):
    """Q4_1: 4 bits, asymmetric; `w = d * code + m`.

        byte    0-1          2-3          4                   ...   19
                d, float16   m, float16   code[16]  code[0]   ...   code[31]  code[15]

    m is float16(-d * zero point). So a client's weights are off by what that rounds, 2**-11 of m at most
    (no more than 15/2048 of a step); the zero point is round(-m / d), exactly, and ours are not.

    >>> codes = torch.full((1, 32), 0xA, dtype=torch.uint8)
    >>> blocks = Q41().pack(codes, torch.tensor([0.5]).half(), torch.tensor([4]))
    >>> blocks[0, :5].tolist() == [0x00, 0x38, 0x00, 0xC0, 0xAA]  # d = 0.5, m = -2
    True
    """

    kind, label, size_bytes, head_bytes = "Q4_1", "w4-g32-asym", 20, 4

    def pack(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Refuses a scale of 0, from which no zero point can be read, and an m beyond float16."""
        if bool((scale == 0).any()):
            raise InputError("a scale of 0 holds no zero point in Q4_1; accepted are others")
        least = _least(scale, zero_point)
        if not bool(torch.isfinite(least).all()):
            raise InputError("a scale times its zero point is beyond float16, which Q4_1 has for it")
        return torch.cat([as_bytes(scale), as_bytes(least), _halve(codes)], 1)

    def unpack(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Refuses an m that is no zero point of 4 bits: others than us may write any."""
        scale, least = as_halves(blocks[:, :2]), as_halves(blocks[:, 2:4])
        found = (-least.float() / scale.float()).round()
        zero_point = found.nan_to_num(16, 16, 16).clamp(0, 16).to(torch.uint8)
        if not bool(((zero_point < 16) & (_least(scale, zero_point) == least)).all()):
            raise InputError("its m is no whole number of steps; accepted are -d times 0 to 15")
        return _double(blocks[:, 4:]), scale, zero_point


BLOCKS: tuple[Block, ...] = (Q80(), Q40(), Q41(), Q4KBlock())


def block_of(scheme: QuantScheme) -> Block | None:
    """The block that holds a scheme's integers, whatever its groups; None if none does."""
    if scheme.trellis:
        return None
    levels = scheme.two_level
    wanted = QuantScheme(scheme.bits, "group", BLOCK, scheme.symmetric, two_level=levels).label
    return next((block for block in BLOCKS if block.label == wanted), None)


@dataclass(frozen=True, slots=True)
class GgufLayout:
    """Weights as rows of blocks; the block's type is the scheme's."""

    @property
    def name(self) -> str:
        """As in `--format`."""
        return "gguf"

    @property
    def quant_method(self) -> str:
        """The same."""
        return self.name

    def reads(self, config: dict[str, Any]) -> bool:
        """By the method."""
        return config.get("quant_method") == self.name

    def scales(self, dtype: torch.dtype) -> ScaleRange:
        """Those that are float16 too."""
        return float16_scales(dtype)

    def refuses(self, placement: Placement, scheme: QuantScheme) -> str | None:
        """What has no block: other bits, 8 bits asymmetric, groups that are no multiple of a block."""
        if scheme.inputs is not None:
            return "inputs in 8 bits, and columns in 16 bits, have no block in it"
        if placement.stacked:
            return "experts that are fused in one tensor on disk have no place in it yet"
        block = block_of(scheme)
        if block is None:
            kind = f"{scheme.bits} bits" + ("" if scheme.symmetric else ", asymmetric")
            return f"{kind}: no block holds these integers; accepted are 4 bits, and 8 bits symmetric"
        if scheme.group_size is not None and scheme.group_size % BLOCK:
            return (
                f"groups of {scheme.group_size} are no whole blocks; accepted are multiples of {BLOCK}"
            )
        if placement.shape is not None and placement.shape[1] % block.columns:
            return (
                f"rows of {placement.shape[1]} are no whole blocks; accepted are multiples of "
                f"{block.columns}"
            )
        return None

    def alike(self, name: str, placement: Placement) -> tuple[str, Hashable] | None:
        """The experts of one stack are one tensor, of one type."""
        if not placement.expert:
            return None
        block = block_of(placement.scheme)
        stack = re.sub(r"^(.*)\.\d+\.", r"\1.*.", name)
        return stack, None if block is None else block.label

    def held(self, weight: QuantizedTensor) -> QuantizedTensor:
        """In groups of 32, with scales in float16; two levels of scales as they are."""
        if weight.levels is not None:
            return weight
        weight = weight.per_row()
        columns = weight.shape[1]
        group = weight.scheme.group_size or columns
        if group % BLOCK:
            raise InputError(f"groups of {group} are no whole blocks; accepted are multiples of {BLOCK}")
        times, scheme = group // BLOCK, replace(weight.scheme, granularity="group", group_size=BLOCK)
        return replace(
            weight,
            scale=as_float16(weight.scale).repeat_interleave(times, 1),
            zero_point=weight.zero_point.repeat_interleave(times, 1),
            scheme=scheme,
        )

    def write(self, name: str, weight: QuantizedTensor) -> dict[str, Tensor]:
        """`X.weight` -> `X.weight_blocks`."""
        reason = self.refuses(Placement(name, weight.scheme, shape=weight.shape), weight.scheme)
        if weight.outliers is not None:
            reason = "columns in 16 bits have no block in it"
        if weight.order is not None:
            reason = "groups that are not of neighbouring columns have no block in it"
        block = block_of(weight.scheme)
        if reason is not None or block is None:
            raise InputError(f"{name}: {self.name}: {reason}")
        held = self.held(weight)
        try:
            return {name + _END: block.write(held)}
        except InputError as error:
            raise InputError(f"{name}: {error}") from None

    def read(self, name: str, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedTensor:
        """The inverse of `write`; of other tools' blocks too."""
        stored, block = _stored(name, tensors, scheme)
        try:
            return block.read(stored)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None

    def decode(
        self, name: str, tensors: Mapping[str, Tensor], scheme: QuantScheme, shape: tuple[int, int]
    ) -> Integers:
        """By the gguf library."""
        stored, block = _stored(name, tensors, scheme)
        found = block.decode(stored, shape[0])
        if found.codes.shape != shape:
            raise InputError(f"{name} is {tuple(found.codes.shape)} instead of {shape}")
        return found

    def tensors(self, name: str) -> Names:
        """The one."""
        return Names((name + _END,))

    def shape(self, config: dict[str, Any], name: str, stored: Stored) -> tuple[int, ...]:
        """Of the bytes, by the size of a block."""
        scheme, shape = self.scheme_of(config, name, ""), stored.tensors[name + _END].shape
        block = None if scheme is None else block_of(scheme)
        if block is None or len(shape) != 2 or shape[1] % block.size_bytes:
            raise InputError(f"{name}{_END} {shape} holds no rows of blocks")
        return shape[0], shape[1] // block.size_bytes * block.columns

    def written_bytes(self, rows: int, columns: int, scheme: QuantScheme, itemsize: int) -> int:
        """Of its blocks."""
        block = block_of(scheme)
        assert block is not None, "refused before"
        return rows * (columns // block.columns) * block.size_bytes

    def headers(
        self, name: str, shape: tuple[int, int], scheme: QuantScheme, dtype: torch.dtype
    ) -> Headers:
        """Of the one."""
        rows, columns = shape
        return {name + _END: (torch.uint8, (rows, self.written_bytes(1, columns, scheme, 0)))}

    def config(self, placements: Mapping[str, Placement], floats: list[str]) -> dict[str, Any]:
        """Every weight by name, as it is read."""
        weights: dict[str, str] = {}
        stacks: dict[str, Hashable] = {}  # all experts of one kind and block
        for name, placement in placements.items():
            block = block_of(placement.scheme)
            if block is None:
                raise InputError(f"{name}: gguf holds no {placement.scheme.label}")
            weights[name] = block.label
            stack, label = self.alike(name, placement) or (name, block.label)
            if stacks.setdefault(stack, label) != label:
                raise InputError(
                    f"{stack}: gguf has all experts in one tensor of one type, not {stacks[stack]} and "
                    f"{block.label}; accepted is one scheme for them"
                )
        return {"quant_method": self.name, "version": VERSION, "weights": weights}

    def remarks(self, placements: Mapping[str, Placement]) -> list[str]:
        """What a client computes otherwise."""
        schemes = [placement.scheme for placement in placements.values()]
        if any(not scheme.symmetric and not scheme.two_level for scheme in schemes):
            return [
                "asymmetric weights: its clients have -scale * zero_point in float16, which moves a "
                "weight by up to 15/2048 of a step"
            ]
        return []

    def quantized_names(self, config: dict[str, Any], tensors: Iterable[str]) -> set[str]:
        """As the configuration lists them."""
        return set(config["weights"])

    def scheme_of(self, config: dict[str, Any], name: str, module: str) -> QuantScheme | None:
        """By name."""
        if config.get("version") != VERSION:
            raise InputError(
                f"quant_method gguf, version {config.get('version')} is not read; accepted is {VERSION}"
            )
        label = config["weights"].get(name)
        return None if label is None else QuantScheme.parse(label)


def _stored(name: str, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> tuple[Tensor, Block]:
    """The rows of bytes, and the block that they are made of."""
    if name + _END not in tensors:
        raise InputError(f"{name}: the checkpoint has no tensor {name + _END!r}")
    stored = tensors[name + _END]
    block = next((block for block in BLOCKS if block.label == scheme.label), None)
    if block is None:
        accepted = ", ".join(block.label for block in BLOCKS)
        raise InputError(f"{name}: no block holds {scheme.label}; accepted are {accepted}")
    if stored.dtype != torch.uint8 or stored.ndim != 2 or stored.shape[1] % block.size_bytes:
        raise InputError(
            f"{name}{_END} is {tuple(stored.shape)} of {stored.dtype}; accepted in {scheme.label} are "
            f"rows of {block.size_bytes} bytes for each {block.columns} columns"
        )
    return stored, block


def _halve(codes: Tensor) -> Tensor:
    """(n, 32) -> (n, 16): the second half above the first."""
    return codes[:, :16] | (codes[:, 16:] << 4)


def _double(stored: Tensor) -> Tensor:
    return torch.cat([stored & 15, stored >> 4], 1)


def _least(scale: Tensor, zero_point: Tensor) -> Tensor:
    """m of Q4_1; the product of 11 and 4 bits is exact before it is rounded. 0 has no sign."""
    return (0 - scale.float() * zero_point.float()).to(torch.float16)
