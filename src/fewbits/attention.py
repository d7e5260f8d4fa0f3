"""Attention on a CPU: of a few new tokens to many old ones, and of whole texts in bfloat16.

PyTorch's kernel is made for many queries: for one, with 512 keys, it took 2.1 ms a block of a 1B model
in bfloat16 on one core, 32 heads that share 8 of keys. As products of matrices, of all queries that
share a head of keys, the same takes 0.2 ms, in float32 (torch 2.13, 2026-11-26); in the native library
0.12 ms, and 0.08 on two cores.

Of texts, as calibration and the first step of `generate()` run them, the native library takes a quarter
to 0.4 of the time of PyTorch's kernel, as exactly, where the processor has products of bfloat16.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.native import operators

FEW = 8  # queries, at most; not tuned
NAME, FEW_NAME = "fewbits", "fewbits-few"  # under which transformers finds it; for few queries alone
_FALLS_BACK = "fewbits_falls_back"
_MORE = ("position_bias", "cache", "softcap")  # of all that models hand over, what changes the result


def use_grouped_attention(model: Any, texts: bool = True) -> bool:
    """Let a transformers model that runs PyTorch's attention on a CPU attend so.

    Args:
        model: of transformers.
        texts: whether whole texts do too, whose last bits are then not those of PyTorch's kernel.

    Returns:
        Whether it does: others, and those that choose their attention by name, stay as they are.
    """
    chosen = getattr(model.config, "_attn_implementation", None)
    can = getattr(model, "_can_set_attn_implementation", lambda: False)
    if model.device.type != "cpu" or chosen != "sdpa" or not can():
        return False
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    name = NAME if texts else FEW_NAME
    AttentionInterface.register(name, attend if texts else partial(attend, texts=False))
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(name)
    return True


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    texts: bool = True,
    **others: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it; what nobody here does better goes to PyTorch's attention.

    Args:
        module: of the model; it may say whether it is causal.
        query: (batch, heads, queries, width).
        key, value: (batch, heads that share keys, keys, width), in the same dtype.
        attention_mask: (batch, 1 or heads, queries, keys), True where a query sees a key, or what is
            added to its score; None: all, or, of several queries, those before it.
        dropout: of weights.
        scaling: of scores; by default 1 / sqrt(width).
        texts: whether whole texts are attended to here, or by PyTorch.
        others: what else models hand over.

    Returns:
        (batch, queries, heads, width), in the dtype of the inputs, and no weights.
    """
    queries = query.shape[2]
    plain = all(others.get(name) is None for name in _MORE) and not dropout
    few = queries == 1 or (queries <= FEW and attention_mask is not None)
    if not plain and not torch.is_grad_enabled():
        module.__dict__[_FALLS_BACK] = True
    if query.device.type == "cpu" and plain and few:
        return grouped_attention(query, key, value, attention_mask, scaling), None
    causal = others.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if causal and attention_mask is None and 1 < queries < key.shape[2]:
        key, value = key[:, :, :queries], value[:, :, :queries]  # of a cache with room for more
    if texts and plain and attention_mask is None and _fits(query, key, value):
        scaling = query.shape[3] ** -0.5 if scaling is None else scaling
        return operators.attend(query, key, value, scaling, bool(causal)), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
    )


def attends_here(model: Any) -> bool:
    """Whether a model of transformers attends so, for all that its config says."""
    return getattr(model.config, "_attn_implementation", None) in (NAME, FEW_NAME)


def falls_back(module: nn.Module) -> bool:
    """Whether it has attended in a way that is PyTorch's alone, if all it does is `attend`."""
    return _FALLS_BACK in module.__dict__


def _fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the library attends so: a whole text in bfloat16, and nobody wants a gradient."""
    parts = (query, key, value)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in parts)
    right = all(t.dtype == torch.bfloat16 and t.device.type == "cpu" for t in parts)
    return right and not wanted and query.shape[2] == key.shape[2] and operators.has_bf16()


def grouped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scaling: float | None = None
) -> Tensor:
    """softmax(scaling * Q K.T + mask) V, in float32 throughout, rounded once.

    Args:
        query: (batch, heads, queries, width).
        key, value: (batch, groups, keys, width): each is shared by heads / groups neighbours.
        mask: (batch, 1 or heads, queries, keys): bool, or what is added.
        scaling: 1 / sqrt(width) by default.

    Returns:
        (batch, queries, heads, width of values) in one piece. A query that sees no key gets zeros.
    """
    batch, heads, queries, width = query.shape
    groups, keys = key.shape[1:3]
    if _is_native(query, key, value, mask) and operators.available():
        seen = operators.NOTHING if mask is None else mask
        scale = width**-0.5 if scaling is None else scaling
        result: Tensor = operators.attend_few(query, key, value, seen, scale)
        return result
    together = (batch, groups, heads // groups * queries, -1)
    q = query.float().mul(width**-0.5 if scaling is None else scaling).reshape(together)
    scores = q @ key.float().mT  # (batch, groups, heads of a group * queries, keys)
    if mask is not None:
        seen = mask[..., :keys].expand(batch, heads, queries, keys).reshape(scores.shape)
        scores = scores.masked_fill_(~seen, -torch.inf) if mask.dtype == torch.bool else scores + seen
    weights = scores.softmax(-1)
    if mask is not None and mask.dtype == torch.bool:
        weights = weights.nan_to_num_(0.0)
    result = (weights @ value.float()).reshape(batch, heads, queries, -1)
    return result.transpose(1, 2).to(query.dtype).contiguous()


def _is_native(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether the native library takes these; what it gives has no gradient."""
    inputs = (query, key, value)
    return (
        query.dtype in (torch.bfloat16, torch.float32)
        and all(each.dtype == query.dtype and each.stride(-1) == 1 for each in inputs)
        and all(each.device.type == "cpu" for each in inputs)
        and (
            mask is None
            or (mask.dtype == torch.bool and mask.stride(-1) == 1 <= key.shape[2] <= mask.shape[-1])
        )
        and not (torch.is_grad_enabled() and any(each.requires_grad for each in inputs))
    )
