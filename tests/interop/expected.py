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


GARBAGE = "loads it without an exception, and computes something else"

REFUSED = [
    # fewbits has a format of its own for these, which no other client reads.
    Rule("fewbits", "compressed-tensors", "*", "gpt2", "weights stored (in, out) have no layout in it"),
    Rule(
        "fewbits", "compressed-tensors", "* asymmetric", "mixtral",
        "its clients do not load asymmetric experts",
    ),
    Rule("fewbits", "gptq", "* asymmetric", "*", "version 1 cannot hold a zero point of 0"),
    Rule("fewbits", "awq", "int8", "*", "it holds 4 bits, not 8"),
    Rule("fewbits", "gguf", "*", "opt", "llama.cpp does not know this architecture"),
]  # fmt: skip
WITHOUT_OPTION = "You set `ignore_mismatched_sizes` to `False`"  # of asymmetric ones
UNREAD = [
    # 3-bit codes lie across words since 0.18.
    Rule("*0.17", "compressed-tensors", "int3", "*", "You set `ignore_mismatched_sizes` to `False`"),
    # What of it is in the blocks has 3 bits: its embedding takes most of that size.
    Rule("*0.17", "compressed-tensors", "mixed", "opt", "You set `ignore_mismatched_sizes` to `False`"),
    # Its modules are made for one number of bits; what `dynamic` says of others is not read.
    Rule(
        "transformers, gptqmodel", "gptq*", "mixed", "*", "You set `ignore_mismatched_sizes` to `False`"
    ),
    # Experts have the source's names, as vLLM reads them; here modules of other names are looked for,
    # and what is not found is random.
    Rule("gptqmodel", "gptq*", "*", "mixtral", "Missing required quantized weights in checkpoint"),
    Rule("gptqmodel", "awq", "*", "mixtral", GARBAGE),
    Rule("transformers, gptqmodel", "*", "*", "mixtral", GARBAGE),
    Rule("transformers", "gguf", "*", "mixtral", GARBAGE),  # as a llama, without experts
    # It looks for nn.Linear where gpt2 has Conv1D.
    Rule("transformers, gptqmodel", "gptq*", "int4*", "gpt2", "has no attribute 'weight'"),
    Rule("transformers, gptqmodel", "gptq*", "*", "gpt2", "has no attribute 'normal_'"),
    Rule(
        "transformers, gptqmodel", "awq", "*", "gpt2", "cannot access local variable 'has_been_replaced'"
    ),
]


def find(rules: list[Rule], client: str, layout: str, scheme: str, model: str) -> Rule | None:
    """The first rule for a case."""
    given = (client, layout, scheme, model)
    return next((r for r in rules if all(map(fnmatchcase, given, r[:4]))), None)
