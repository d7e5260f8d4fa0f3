"""fewbits shrinks a language model 4-8x after training and proves that the result is good."""

import os as _os

from fewbits.memory import uncollected as _uncollected

if {"RANK", "WORLD_SIZE"} <= _os.environ.keys():  # read when torch is imported
    # One of several ranks: of a connection that breaks torch warns in thirty lines, fewbits in one.
    _os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")

with _uncollected():  # imports make a million objects that stay: a tenth of the time went into looking
    from fewbits.calibration import Calibration, read_calibration
    from fewbits.compare import Candidate, compare
    from fewbits.comparison import Comparison
    from fewbits.convert import convert
    from fewbits.errors import FewbitsError, InputError, ResourceError, VerificationError
    from fewbits.estimate import Estimate
    from fewbits.evaluate import Evaluation, evaluate
    from fewbits.inplace import quantize_
    from fewbits.integration import Config
    from fewbits.integration import register as _register
    from fewbits.linear import QuantizedLinear
    from fewbits.load import load
    from fewbits.measure import Measured, measure
    from fewbits.methods import GPTQ, RTN, WeightedRTN
    from fewbits.pipeline import Quantized, quantize
    from fewbits.recipe import Recipe
    from fewbits.scheme import QuantScheme
    from fewbits.tensor import Note, QuantizedTensor, dequantize, quantize_tensor
    from fewbits.transforms import AWQ
    from fewbits.verify import Verification, verify

__all__ = [
    "AWQ",
    "GPTQ",
    "RTN",
    "Calibration",
    "Candidate",
    "Comparison",
    "Config",
    "Estimate",
    "Evaluation",
    "FewbitsError",
    "InputError",
    "Measured",
    "Note",
    "QuantScheme",
    "Quantized",
    "QuantizedLinear",
    "QuantizedTensor",
    "Recipe",
    "ResourceError",
    "Verification",
    "VerificationError",
    "WeightedRTN",
    "compare",
    "convert",
    "dequantize",
    "evaluate",
    "load",
    "measure",
    "quantize",
    "quantize_",
    "quantize_tensor",
    "read_calibration",
    "verify",
]

_register()  # for checkpoints of ours that transformers is to open
