"""How a weight becomes codes: one file per algorithm."""

from fewbits.methods.gptq import GPTQ
from fewbits.methods.held import round_held
from fewbits.methods.learned import Learned, Rounding
from fewbits.methods.llm_int8 import LLMInt8
from fewbits.methods.method import Method
from fewbits.methods.q4k import Q4K
from fewbits.methods.rtn import RTN
from fewbits.methods.weighted_rtn import WeightedRTN

METHODS: dict[str, type[Method]] = {
    "rtn": RTN,
    "weighted-rtn": WeightedRTN,
    "gptq": GPTQ,
    "llm-int8": LLMInt8,
    "q4_k": Q4K,
}

__all__ = [
    "GPTQ",
    "METHODS",
    "Q4K",
    "RTN",
    "LLMInt8",
    "Learned",
    "Method",
    "Rounding",
    "WeightedRTN",
    "round_held",
]
