"""Steps of `generate()` on a CPU, token by token: threads that stay awake for one, and one as a graph.

Between two products of a step memory has nothing to do, and threads go to sleep. Run together, they wait
where they are, and read the beginning of the next weight. Between the products of a block there are also
some forty small operations, and Python for each: a quarter of a step; compiled, a tenth.
"""

from functools import partial, update_wrapper
from types import MethodType
from typing import Any

import torch
from torch import nn

from fewbits.attention import falls_back
from fewbits.errors import InputError
from fewbits.kernels import Native
from fewbits.linear import FloatLinear, QuantizedLinear
from fewbits.native.library import library

# Python keeps what its functions hold in pieces of 16 KB. Where the end of one falls between a graph and
# the operations that it calls, each call takes a new piece from the system: 41 ms a step instead of 33.
# A function that asks for so many places has a larger piece, with room for all that it calls.
_ROOM = 2**14
_FEW_ROWS = 8  # PyTorch's own operations, of so many rows, run in one thread anyway
_SMALL = 32  # of this many bytes of codes, one that PyTorch multiplies by is not missed


def run_steps_together(model: Any, compiled: bool = False) -> None:
    """Let a transformers model on a CPU run what comes after the prompt with its threads awake.

    Args:
        model: with quantized weights, for which see `multiplies_natively`, or any where compiled.
        compiled: run it as one graph, too. `generate()` then keeps keys and values in a cache of a fixed
            size, for which graphs can be made: of the prompt and all that may follow, which every step
            goes through. It takes no other cache, and no assisting model. The first step compiles (12 to
            17 s for 16 blocks of a Llama), and once more where the cache has another size; it needs a
            C++ compiler. The logits may differ in their last bits.

    Prompts and training run as before.
    """
    own = type(model).forward
    # Not `fullgraph`: a process that makes more graphs than PyTorch's limit (8) is warned, and goes on
    # without. In one thread, for those of PyTorch's own have our work.
    graph = torch.compile(own, options={"cpp.threads": 1}) if compiled else None
    is_fixed = _find_fixed() if compiled else None

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_step(*args, **kwargs):
            return own(self, *args, **kwargs)
        step = own if is_fixed is None or not is_fixed(**kwargs) else graph
        assert step is not None
        together = self.__dict__.get("fewbits_together")
        if together is None:
            together = self.fewbits_together = multiplies_natively(self)
        found = library() if together else None
        if found is None:
            return step(self, *args, **kwargs)
        return found.together(partial(step, self, *args, **kwargs))

    forward.__code__ = forward.__code__.replace(co_stacksize=_ROOM)
    # A method, so that copies of the model call their own.
    model.forward = MethodType(update_wrapper(forward, own), model)
    model.fewbits_compiled = compiled
    if compiled:
        model.generation_config.cache_implementation = "static"


def check_compiled(network: nn.Module, device: torch.device, mixture: bool) -> None:
    """Refuse steps that cannot be one graph.

    Args:
        network: of the class of the model.
        device: where it shall run.
        mixture: whether it has quantized experts.

    Raises:
        InputError: it is not on a CPU, its class says that it cannot be one graph, or it is a mixture.
    """
    name = type(network).__name__
    if device.type != "cpu":
        raise InputError(
            f"compiled steps on {device}; accepted is a CPU: elsewhere transformers compiles by "
            "itself, with generate(cache_implementation='static')"
        )
    if not getattr(network, "_can_compile_fullgraph", False):
        raise InputError(f"compiled steps of {name}, which says that it cannot be one graph")
    if mixture:
        raise InputError(f"compiled steps of {name}: which experts run is known in each step alone")


def multiplies_natively(model: nn.Module) -> bool:
    """Whether steps are products and attention of the native library, but for what is small.

    PyTorch's own operations would run in one thread while all are awake.
    """
    codes = floats = 0
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            size = sum(buffer.nbytes for buffer in module.buffers())
            codes, floats = (
                (codes + size, floats) if isinstance(module.kernel, Native) else (codes, floats + size)
            )
        elif falls_back(module):
            return False
        elif not isinstance(module, FloatLinear | nn.Embedding):
            own = module._parameters.values()
            floats += sum(each.nbytes for each in own if each is not None and each.ndim > 1)
    return floats * _SMALL <= codes


def fixed_cache(model: Any, tokens: int) -> Any:
    """A `StaticCache` for so many tokens, for one text, where steps are compiled; None where not."""
    if not getattr(model, "fewbits_compiled", False):
        return None
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=tokens)


def _is_step(input_ids: Any = None, *_: Any, **__: Any) -> bool:
    one = isinstance(input_ids, torch.Tensor) and input_ids.ndim == 2 and input_ids.shape[1] == 1
    few = one and input_ids.shape[0] <= _FEW_ROWS and input_ids.device.type == "cpu"
    return few and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _find_fixed() -> Any:
    """What says of a call's arguments whether keys are in a cache that graphs can be made for."""
    from transformers import StaticCache

    return lambda past_key_values=None, **_: type(past_key_values) is StaticCache
