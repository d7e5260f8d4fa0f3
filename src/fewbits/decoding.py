"""Steps of `generate()` as one graph, which PyTorch's compiler makes.

Between the products of a block a step calls some forty small operations, and Python for each. While
weights stream through the caches that takes a quarter of a step; compiled, a tenth.
"""

from functools import update_wrapper
from types import MethodType
from typing import Any

import torch

from fewbits.errors import InputError
from fewbits.linear import ExpertLinears

# Python keeps what its functions hold in pieces of 16 KB. Where the end of one falls between a graph and
# the operations that it calls, each call takes a new piece from the system: 41 ms a step instead of 33.
# A function that asks for so many places has a larger piece, with room for all that it calls.
_ROOM = 2**14


def compile_steps(model: Any) -> None:
    """Let a transformers model on a CPU run what comes after the prompt, token by token, as one graph.

    `generate()` then keeps keys and values in a cache of a fixed size, for which graphs can be made: of
    the prompt and all that may follow, which every step goes through. It takes no other cache, and no
    assisting model. The first step compiles (12 to 17 s for 16 blocks of a Llama), and once more where
    the cache has another size; it needs a C++ compiler. Prompts and training run as before. The logits
    may differ in their last bits.

    Raises:
        InputError: it is not on a CPU, its class says that it cannot be one graph, or it is a mixture.
    """
    name = type(model).__name__
    if model.device.type != "cpu":
        raise InputError(
            f"compiled steps on {model.device}; accepted is a CPU: elsewhere transformers compiles by "
            "itself, with generate(cache_implementation='static')"
        )
    if not getattr(model, "_can_compile_fullgraph", False):
        raise InputError(f"compiled steps of {name}, which says that it cannot be one graph")
    if any(isinstance(module, ExpertLinears) for module in model.modules()):
        raise InputError(f"compiled steps of {name}: which experts run is known in each step alone")
    own = type(model).forward
    # Not `fullgraph`: a process that makes more graphs than PyTorch's limit (8) is warned, and goes on
    # without.
    compiled = torch.compile(own)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (compiled if _is_step(*args, **kwargs) else own)(self, *args, **kwargs)

    forward.__code__ = forward.__code__.replace(co_stacksize=_ROOM)
    # A method, so that copies of the model call their own.
    model.forward = MethodType(update_wrapper(forward, own), model)
    model.fewbits_compiled = True
    model.generation_config.cache_implementation = "static"


def fixed_cache(model: Any, tokens: int) -> Any:
    """A `StaticCache` for so many tokens, for one text, where steps are compiled; None where not."""
    if not getattr(model, "fewbits_compiled", False):
        return None
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=tokens)


def _is_step(input_ids: Any = None, *_: Any, past_key_values: Any = None, **__: Any) -> bool:
    from transformers.cache_utils import StaticCache

    one = isinstance(input_ids, torch.Tensor) and input_ids.shape[-1] == 1
    return one and type(past_key_values) is StaticCache and not torch.is_grad_enabled()
