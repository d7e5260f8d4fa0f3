"""QuantScheme: how many bits, what shares a scale, and whether zero is fixed at mid-range."""

import re
from dataclasses import dataclass
from typing import Literal, Self

from fewbits.errors import InputError

Granularity = Literal["tensor", "channel", "group"]

BITS = (2, 3, 4, 8)
_LABEL = re.compile(r"w(?P<bits>\d+)-(?:g(?P<size>\d+)|(?P<name>channel|tensor))(?P<asym>-asym)?")


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """The integer grid of one weight matrix.

    Args:
        bits: of one code: 2, 3, 4 or 8.
        granularity: what shares a scale: the whole "tensor", one output "channel" (a row), or a
            "group" of consecutive input columns of one row.
        group_size: input columns in a group; only with granularity "group".
        symmetric: the zero point is fixed at mid-range and not stored.

    Raises:
        InputError: bits outside 2, 3, 4, 8, or a group size that does not go with the granularity.

    >>> QuantScheme(4, "group", 128).label
    'w4-g128'
    >>> QuantScheme.parse("w8-channel-asym")
    QuantScheme(bits=8, granularity='channel', group_size=None, symmetric=False)
    """

    bits: int
    granularity: Granularity = "channel"
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise InputError(f"bits is {self.bits}; accepted are 2, 3, 4 and 8")
        if self.granularity not in ("tensor", "channel", "group"):
            raise InputError(
                f"granularity is {self.granularity!r}; accepted are 'tensor', 'channel' and 'group'"
            )
        if self.granularity == "group" and (self.group_size is None or self.group_size < 1):
            raise InputError(f"group_size is {self.group_size}; a group needs at least 1 column")
        if self.granularity != "group" and self.group_size is not None:
            raise InputError(
                f"group_size is {self.group_size} with granularity {self.granularity!r}; "
                "it goes with granularity 'group' only"
            )

    @property
    def label(self) -> str:
        """Short name, as in reports: `w4-g128`, `w8-channel`, `w8-tensor-asym`."""
        shared = f"g{self.group_size}" if self.granularity == "group" else self.granularity
        return f"w{self.bits}-{shared}" + ("" if self.symmetric else "-asym")

    @classmethod
    def parse(cls, label: str) -> Self:
        """The scheme that `label` names.

        Raises:
            InputError: not a label.
        """
        match = _LABEL.fullmatch(label)
        if match is None:
            raise InputError(
                f"{label!r} names no scheme; accepted are labels like 'w4-g128', 'w8-channel', "
                "'w8-tensor', each with an optional '-asym'"
            )
        size = match["size"]
        granularity: Granularity = "group" if size else match["name"]  # type: ignore[assignment]
        return cls(int(match["bits"]), granularity, int(size) if size else None, match["asym"] is None)

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid: 8 for 4 bits."""
        return 1 << (self.bits - 1)

    @property
    def max_code(self) -> int:
        """The largest code: 15 for 4 bits."""
        return (1 << self.bits) - 1

    def groups(self, columns: int) -> int:
        """How many scales one row of `columns` inputs has.

        Raises:
            InputError: the group size does not divide `columns`.
        """
        if self.group_size is None:
            return 1
        if columns % self.group_size:
            raise InputError(f"group_size {self.group_size} does not divide {columns} columns")
        return columns // self.group_size
