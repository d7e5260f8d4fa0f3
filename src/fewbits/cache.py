"""Keys and values that grow in place, as each step of `generate()` adds a few to many.

transformers' own layer copies all of them at each step: 1.2 ms of a step of a 1B model after 512 tokens,
and more with each that comes (transformers 5.23, 2026-11-26).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from fewbits.structure import given_cache

_LEAST = 64  # tokens that a room has beyond what is needed, and an eighth of that; not tuned


def use_growing_cache(model: nn.Module) -> None:
    """Let the caches that a transformers model makes on a CPU grow in place."""
    model.register_forward_pre_hook(_replace_layers, with_kwargs=True)


def _replace_layers(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
    """What is exactly of transformers' own kinds; what it holds stays."""
    cache = None if torch.compiler.is_compiling() else given_cache(kwargs)
    if type(cache) is not DynamicCache:
        return
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[number] = GrowingLayer.of(layer)


@dataclass(slots=True)
class _Room:
    """A tensor with room for more tokens, shared by all copies of a layer.

    Args:
        tensor: (batch, heads, tokens, width).
        filled: tokens that are there.
        view: of those, as it was given out last.
    """

    tensor: Tensor
    filled: int
    view: Tensor


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A `DynamicLayer` whose keys and values are views of tensors that have room for more.

    Nothing that was given out is ever written to: a layer that was cropped, reordered or copied moves to
    a new room when it grows.
    """

    @classmethod
    def of(cls, layer: DynamicLayer) -> "GrowingLayer":
        """The same keys and values."""
        new = cls.__new__(cls)
        new.__dict__.update(layer.__dict__)
        return new

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add (batch, heads, new tokens, width), and give all."""
        keys, values = (self.keys, self.values) if self.is_initialized else (None, None)
        if not (_continues(keys, key_states) and _continues(values, value_states)):
            return super().update(key_states, value_states, *args, **kwargs)
        assert keys is not None and values is not None  # noqa: PT018
        rooms = self.__dict__.get("_rooms", (None, None))
        self._rooms = (_grown(rooms[0], keys, key_states), _grown(rooms[1], values, value_states))
        self.keys, self.values = (room.view for room in self._rooms)
        return self.keys, self.values


def _continues(old: Tensor | None, new: Tensor) -> bool:
    """Whether new tokens can be written behind old ones."""
    return (
        old is not None
        and old.device.type == "cpu"
        and old.dtype == new.dtype
        and old.ndim == new.ndim == 4
        and old.shape[:2] == new.shape[:2]
        and old.shape[3] == new.shape[3]
        and not (torch.is_grad_enabled() and (old.requires_grad or new.requires_grad))
        and not torch.compiler.is_compiling()
        and old.is_inference() == new.is_inference() == torch.is_inference_mode_enabled()
    )


def _grown(room: _Room | None, old: Tensor, new: Tensor) -> _Room:
    begin, end = old.shape[2], old.shape[2] + new.shape[2]
    if room is None or room.view is not old or room.filled != begin or room.tensor.shape[2] < end:
        batch, heads, _, width = old.shape
        tensor = old.new_empty(batch, heads, end + _LEAST + end // 8, width)
        tensor[:, :, :begin] = old
        room = _Room(tensor, begin, old)
    room.tensor[:, :, begin:end] = new
    room.filled, room.view = end, room.tensor[:, :, :end]
    return room
