"""Cells without numbers, each with the words that the refusal or the client's message must hold."""

from fnmatch import fnmatchcase
from typing import NamedTuple


class Rule(NamedTuple):
    """For all cases that the four patterns match."""

    client: str
    format: str
    scheme: str
    model: str
    message: str


REFUSED = [
    # fewbits has a format of its own for these, which no other client reads.
    Rule("fewbits", "compressed-tensors", "*", "gpt2", "weights stored (in, out) have no layout in it"),
    Rule(
        "fewbits", "compressed-tensors", "* asymmetric", "mixtral",
        "its clients do not load asymmetric experts",
    ),
]  # fmt: skip
WITHOUT_OPTION = "You set `ignore_mismatched_sizes` to `False`"  # of asymmetric ones
UNREAD = [
    # 3-bit codes lie across words since 0.18.
    Rule("*0.17", "compressed-tensors", "int3", "*", "You set `ignore_mismatched_sizes` to `False`"),
]


def find(rules: list[Rule], client: str, layout: str, scheme: str, model: str) -> Rule | None:
    """The first rule for a case."""
    given = (client, layout, scheme, model)
    return next((r for r in rules if all(map(fnmatchcase, given, r[:4]))), None)
