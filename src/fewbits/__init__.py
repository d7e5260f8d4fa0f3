"""fewbits shrinks a language model 4-8x after training and proves that the result is good."""

from fewbits.errors import FewbitsError, InputError, ResourceError, VerificationError
from fewbits.evaluate import Estimate, Evaluation, evaluate
from fewbits.linear import QuantizedLinear
from fewbits.load import load
from fewbits.methods import RTN
from fewbits.pipeline import Quantized, quantize, quantize_
from fewbits.recipe import Recipe
from fewbits.scheme import QuantScheme
from fewbits.tensor import Note, QuantizedTensor, dequantize, quantize_tensor
from fewbits.verify import Verification, verify

__all__ = [
    "RTN",
    "Estimate",
    "Evaluation",
    "FewbitsError",
    "InputError",
    "Note",
    "QuantScheme",
    "Quantized",
    "QuantizedLinear",
    "QuantizedTensor",
    "Recipe",
    "ResourceError",
    "Verification",
    "VerificationError",
    "dequantize",
    "evaluate",
    "load",
    "quantize",
    "quantize_",
    "quantize_tensor",
    "verify",
]
