"""Steps of `generate()` on a CPU, token by token: threads that stay awake for one, and one as a graph.

Between two products of a step memory has nothing to do, and threads go to sleep. Run together, they wait
where they are, and read the beginning of the next weight. Between the products of a block there are also
some forty small operations, and Python for each: a quarter of a step; compiled, a tenth.
"""

import copy
import inspect
import weakref
from functools import partial
from typing import Any

import torch
from torch import nn

from fewbits.attention import attends_here, falls_back
from fewbits.errors import InputError
from fewbits.kernels import Native
from fewbits.linear import FloatLinear, QuantizedLinear
from fewbits.native.library import library
from fewbits.structure import given_cache

# Python keeps what its functions hold in pieces of 16 KB. Where the end of one falls between a graph and
# the operations that it calls, each call takes a new piece from the system: 41 ms a step instead of 33.
# A function that asks for so many places has a larger piece, with room for all that it calls.
_ROOM = 2**14
_FEW = 8  # texts whose steps are run together; of so many PyTorch's small operations have one thread
_SMALL = 32  # of this many bytes of codes, one that PyTorch multiplies by is not missed


def run_steps_together(model: Any, compiled: bool = False) -> None:
    """Let a transformers model on a CPU run what comes after the prompt with its threads awake.

    Args:
        model: any; for which it does, see `texts_together`.
        compiled: run it as one graph, too. `generate()` then keeps keys and values in a cache of a fixed
            size, for which graphs can be made: of the prompt and all that may follow, which every step
            goes through. It takes no other cache, and no assisting model. The first step compiles (12 to
            17 s for 16 blocks of a Llama), and once more where the cache has another size; it needs a
            C++ compiler. The logits may differ in their last bits.

    Prompts and training run as before, and steps of several threads at once are not run together.
    """
    model.forward = _Forward(model, compiled)
    model.fewbits_compiled = compiled
    if compiled:
        model.generation_config.cache_implementation = "static"


class _Forward:
    """`forward` of a model, which it does not keep alive; copies of the model have their own."""

    def __init__(self, model: Any, compiled: bool) -> None:
        self.__signature__ = inspect.signature(model.forward)
        self._model = weakref.ref(model)
        self._own = type(model).forward
        self._is_fixed = _find_fixed() if compiled else None
        # Not `fullgraph`: a process that makes more graphs than PyTorch's limit (8) is warned, and goes
        # on without. In one thread, where those of PyTorch's own have our work.
        self._alone = torch.compile(self._own) if compiled else self._own
        self._together = torch.compile(self._own, options={"cpp.threads": 1}) if compiled else self._own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model()
        if torch.compiler.is_compiling() or not _is_step(*args, **kwargs):
            return self._own(model, *args, **kwargs)
        fixed = self._is_fixed is None or self._is_fixed(**kwargs)
        found = library() if _are_together(model, *args, **kwargs) else None
        if found is None:
            return (self._alone if fixed else self._own)(model, *args, **kwargs)
        step = self._together if fixed else self._own
        return found.together(partial(step, model, *args, **kwargs))

    __call__.__code__ = __call__.__code__.replace(co_stacksize=_ROOM)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Forward":
        new = copy.copy(self)
        new._model = weakref.ref(memo.get(id(self._model()), self._model()))
        return new

    def __copy__(self) -> "_Forward":
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        # Once it was unpickled, its class's.
        return getattr, (self._model(), "forward")


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


def texts_together(model: nn.Module) -> int:
    """Of how many texts steps are run together: where products are ours, but for what is small.

    PyTorch's own operations would run in one thread while all are awake.
    """
    codes = floats = 0
    most = _FEW
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            size = sum(buffer.nbytes for buffer in module.buffers())
            codes, floats = (
                (codes + size, floats) if isinstance(module.kernel, Native) else (codes, floats + size)
            )
        elif falls_back(module):
            return 0
        elif isinstance(module, FloatLinear):
            most = module.ROWS
        elif not isinstance(module, nn.Embedding):
            own = module._parameters.values()
            floats += sum(each.nbytes for each in own if each is not None and each.ndim > 1)
    return most if floats * _SMALL <= codes else 0


def fixed_cache(model: Any, tokens: int) -> Any:
    """A `StaticCache` for so many tokens, for one text, where steps are compiled; None where not."""
    if not getattr(model, "fewbits_compiled", False):
        return None
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=tokens)


def _is_step(input_ids: Any = None, *_: Any, **__: Any) -> bool:
    one = isinstance(input_ids, torch.Tensor) and input_ids.ndim == 2 and input_ids.shape[1] == 1
    return one and input_ids.device.type == "cpu" and not torch.is_grad_enabled()


def _are_together(model: Any, input_ids: torch.Tensor, *_: Any, **given: Any) -> bool:
    """Whether a step is run together. Windows of keys are moved at each step, by PyTorch: it is not."""
    most = model.__dict__.get("fewbits_together")
    if most is None:
        most = model.fewbits_together = texts_together(model)
    windows = any(getattr(given_cache(given), "is_sliding", ()))
    return len(input_ids) <= most and attends_here(model) and not windows


def _find_fixed() -> Any:
    """What says of a call's arguments whether keys are in a cache that graphs can be made for."""
    from transformers import StaticCache

    return lambda **given: type(given_cache(given)) is StaticCache
