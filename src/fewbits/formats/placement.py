"""Where a quantized weight stands in its model: all that a format needs to know to judge it."""

from dataclasses import dataclass

from fewbits.scheme import QuantScheme


@dataclass(frozen=True, slots=True)
class Placement:
    """One weight of the source, its module in the model, and its scheme.

    Args:
        module: path in the model, as clients build it.
        scheme: of the weight.
        expert: it belongs to a mixture's experts.
        stacked: all experts lie in one 3-D tensor on disk.
        transposed: stored (in, out) on disk.
        own_forward: its module is a linear by a forward of its own, which wraps itself round the weight.
        shape: (out, in) of one matrix; None where nobody asks.
        embedding: tokens are looked up in it; a head may be tied to it.
    """

    module: str
    scheme: QuantScheme
    expert: bool = False
    stacked: bool = False
    transposed: bool = False
    own_forward: bool = False
    shape: tuple[int, int] | None = None
    embedding: bool = False
