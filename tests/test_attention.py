"""Attention of few queries on a CPU."""

import copy

import pytest
import torch

from fewbits.attention import FEW, NAME, attend, grouped_attention, use_grouped_attention
from models import VOCABULARY, tiny_model


def exact(query, key, value, mask, scaling):
    """From the definition, in float64: one query after the other."""
    batch, heads, queries, _ = query.shape
    result = torch.zeros(batch, heads, queries, value.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // key.shape[1])
            for i in range(queries):
                scores = (key[b, g].double() @ query[b, h, i].double()) * scaling
                if mask is not None:
                    own = mask.expand(batch, heads, -1, -1)[b, h, i]
                    scores = (
                        scores.masked_fill(~own, -torch.inf) if own.dtype == torch.bool else scores + own
                    )
                if bool((scores > -torch.inf).any()):
                    result[b, h, i] = scores.softmax(0) @ value[b, g].double()
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize("kind", ["none", "bool", "heads", "added"])
def test_it_is_attention(dtype, groups, kind):
    query, key = torch.randn(2, 6, 3, 16).to(dtype), torch.randn(2, groups, 20, 16).to(dtype)
    value = torch.randn(2, groups, 20, 8).to(dtype)
    mask = None
    if kind != "none":
        mask = torch.rand(2, 6 if kind == "heads" else 1, 3, 20) < 0.6
        mask[1, :, 2] = False  # sees nothing
    if kind == "added":
        mask = torch.randn(2, 1, 3, 20)
    found = grouped_attention(query, key, value, mask, 0.3)
    wanted = exact(query, key, value, mask, 0.3)
    assert found.dtype == dtype
    # Weights are off by less than their scores: 16 products, whose sum of magnitudes is below 40.
    eps = torch.finfo(torch.float32).eps
    bound = 40 * 20 * eps * value.abs().max() + torch.finfo(dtype).eps / 2 * wanted.abs()
    assert ((found.double() - wanted).abs() <= bound).all()


def test_it_is_taken_for_few_queries_only(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "fewbits.attention.grouped_attention", lambda q, *_: calls.append(q.shape[2]) or q
    )
    module = torch.nn.Module()
    for queries, mask in ((1, None), (1, True), (FEW, True), (FEW, None), (FEW + 1, True)):
        x = torch.randn(1, 2, queries, 8)
        given = None if mask is None else torch.ones(1, 1, queries, queries, dtype=torch.bool)
        attend(module, x, x, x, given, is_causal=True)
    assert calls == [1, 1, FEW]
    x = torch.randn(1, 2, 1, 8)
    attend(module, x, x, x, None, dropout=0.1)
    attend(module, x, x, x, None, position_bias=torch.zeros(1, 2, 1, 1))
    assert calls == [1, 1, FEW]


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gpt2", "mixtral"])
def test_models_write_the_same_words(kind):
    torch.manual_seed(0)
    model = tiny_model(kind).float().eval()
    other = copy.deepcopy(model)
    taken = use_grouped_attention(other)
    assert taken == (model.config._attn_implementation == "sdpa")
    assert (other.config._attn_implementation == NAME) == taken
    ids = torch.randint(3, VOCABULARY, (2, 12))
    padded = torch.ones_like(ids)
    padded[1, :5] = 0
    arguments = {"attention_mask": padded, "max_new_tokens": 8, "do_sample": False}
    plain, ours = (
        m.generate(ids, return_dict_in_generate=True, output_logits=True, **arguments)
        for m in (model, other)
    )
    for a, b in zip(plain.logits, ours.logits, strict=True):
        assert (a - b).abs().max() <= 1e-4 * a.abs().max()
    assert torch.equal(plain.sequences, ours.sequences)
