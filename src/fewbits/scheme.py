"""QuantScheme: bits, what shares a scale, whether zero is fixed at mid-range, what becomes of inputs."""

import re
from dataclasses import dataclass, replace
from typing import Literal, Self

from fewbits.errors import InputError

Granularity = Literal["tensor", "channel", "group"]

BITS = (2, 3, 4, 8)
_LABEL = re.compile(
    r"w(?P<bits>\d+)-(?:g(?P<size>\d+)|(?P<name>channel|tensor))(?P<asym>-asym)?(?P<levels>-k)?(?P<trellis>-trellis)?"
    r"(?:-(?P<inputs>a8-.*))?"
)
LEVELS = 256  # columns that share the upper of two levels of scales
_INPUTS = re.compile(r"a8-(?P<name>token|tensor)(?:-t(?P<threshold>[0-9.e+-]+?)(?P<static>-static)?)?")


@dataclass(frozen=True, slots=True)
class InputScheme:
    """How the inputs of a matrix are rounded: to 8 bits, symmetric, their scale found in each call.

    LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339) multiplies the feature columns in which an input
    is larger than a threshold in 16 bit, and only the others as integers.

    Args:
        granularity: what shares a scale: each "token" (a row), or all tokens of a call ("tensor").
        threshold: columns with an |x| above it stay in 16 bit; 0: no column does.
        static: which columns was fixed by calibration, their weights kept in 16 bit; else they are
            found in each call.

    Raises:
        InputError: a threshold below 0, or static columns without a threshold.

    >>> InputScheme().label
    'a8-token-t6'
    """

    granularity: Literal["token", "tensor"] = "token"
    threshold: float = 6.0
    static: bool = False

    def __post_init__(self) -> None:
        if self.granularity not in ("token", "tensor"):
            raise InputError(f"granularity is {self.granularity!r}; accepted are 'token' and 'tensor'")
        if not 0 <= self.threshold < float("inf"):
            raise InputError(f"threshold is {self.threshold}; accepted are finite numbers from 0")
        if self.static and not self.threshold:
            raise InputError("threshold is 0: no column stays in 16 bit; accepted is static=False")

    @property
    def label(self) -> str:
        """Short name: `a8-token`, `a8-token-t6`, `a8-token-t6-static`."""
        exact = repr(float(self.threshold)).removesuffix(".0")
        outliers = f"-t{exact}" + ("-static" if self.static else "")
        return f"a8-{self.granularity}" + (outliers if self.threshold else "")

    @classmethod
    def parse(cls, label: str) -> Self:
        """The scheme that `label` names.

        Raises:
            InputError: not a label.
        """
        match = _INPUTS.fullmatch(label)
        try:
            threshold = float(match["threshold"] or 0) if match else -1.0
        except ValueError:
            threshold = -1.0
        if match is None or threshold < 0:
            raise InputError(
                f"{label!r} names no inputs; accepted are a8-token, a8-token-t6-static, ..."
            )
        return cls(match["name"], threshold, match["static"] is not None)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """The integer grid of one weight matrix.

    Args:
        bits: of one code: 2, 3, 4 or 8.
        granularity: what shares a scale: the whole "tensor", one output "channel" (a row), or a
            "group" of consecutive input columns of one row.
        group_size: input columns in a group; only with granularity "group".
        symmetric: the zero point is fixed at mid-range and not stored.
        inputs: how the matrix's inputs are rounded; None: they are not. Goes with 8 bits, symmetric,
            and one scale per channel or tensor: what products of integers can be made of.
        two_level: scales and least values of groups are themselves integers, of 6 bits, times two
            numbers that 256 columns share, as in Q4_K of llama.cpp. Goes with 4 bits in groups of 32,
            asymmetric.
        trellis: a value is told by codes of several rows together, see `fewbits.trellis`. Goes with 2, 3
            and 4 bits, symmetric, by group or channel.

    Raises:
        InputError: bits outside 2, 3, 4, 8, or what does not go together.

    >>> QuantScheme(4, "group", 128).label
    'w4-g128'
    >>> QuantScheme.parse("w8-channel-asym") == QuantScheme(8, symmetric=False)
    True
    """

    bits: int
    granularity: Granularity = "channel"
    group_size: int | None = None
    symmetric: bool = True
    inputs: InputScheme | None = None
    two_level: bool = False
    trellis: bool = False

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
        whole = self.granularity != "group"
        if self.inputs is not None and not (self.bits == 8 and self.symmetric and whole):
            raise InputError(
                f"inputs in 8 bits do not go with {self.bits} bits by {self.granularity}"
                f"{'' if self.symmetric else ', asymmetric'}; accepted are 8 bits by channel or tensor"
            )
        fine = (self.bits, self.group_size, self.symmetric) == (4, 32, False)
        if self.two_level and not fine:
            raise InputError(
                f"two levels of scales do not go with {replace(self, two_level=False).label}; "
                "accepted is w4-g32-asym-k"
            )

        if self.trellis and (self.bits == 8 or not self.symmetric or self.granularity == "tensor"):
            raise InputError(
                f"a trellis does not go with {replace(self, trellis=False).label}; accepted are 2, 3 "
                "and 4 bits, symmetric, by group or channel"
            )

    @property
    def label(self) -> str:
        """Short name, as in reports: `w4-g128`, `w4-g128-trellis`, `w8-channel-a8-token-t6`."""
        shared = f"g{self.group_size}" if self.granularity == "group" else self.granularity
        inputs = "" if self.inputs is None else f"-{self.inputs.label}"
        asymmetric = "" if self.symmetric else "-asym"
        kind = "-k" if self.two_level else "-trellis" if self.trellis else ""
        return f"w{self.bits}-{shared}{asymmetric}{kind}{inputs}"

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
                "'w8-tensor', each with an optional '-asym', 'w8-channel-a8-token-t6', "
                "'w4-g32-asym-k', 'w4-g128-trellis'"
            )
        size = match["size"]
        granularity: Granularity = "group" if size else match["name"]  # type: ignore[assignment]
        group_size = int(size) if size else None
        inputs = None if match["inputs"] is None else InputScheme.parse(match["inputs"])
        symmetric, levels, trellis = (
            match["asym"] is None,
            match["levels"] is not None,
            match["trellis"] is not None,
        )
        bits = int(match["bits"])
        return cls(bits, granularity, group_size, symmetric, inputs, levels, trellis)

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid: 8 for 4 bits; of a trellis, whose values have signs, 0."""
        return 0 if self.trellis else 1 << (self.bits - 1)

    @property
    def max_code(self) -> int:
        """The largest code: 15 for 4 bits."""
        return (1 << self.bits) - 1

    @property
    def dynamic(self) -> Self:
        """The same; outlier columns, where there are any, are found in each call."""
        if self.inputs is None or not self.inputs.static:
            return self
        return replace(self, inputs=replace(self.inputs, static=False))

    def groups(self, columns: int) -> int:
        """How many scales one row of `columns` inputs has.

        Raises:
            InputError: the group size, or what two levels of scales take, does not divide `columns`.
        """
        if self.group_size is None:
            return 1
        if self.two_level and columns % LEVELS:
            raise InputError(f"two levels of scales take multiples of {LEVELS} columns, not {columns}")
        if columns % self.group_size:
            raise InputError(f"group_size {self.group_size} does not divide {columns} columns")
        return columns // self.group_size
