"""Attention on a CPU: of few queries, and of whole texts in bfloat16."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fewbits import native
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
@pytest.mark.parametrize("native", [True, False])
def test_it_is_attention(dtype, groups, kind, native, monkeypatch):
    if not native:
        monkeypatch.setattr("fewbits.attention.operators.available", lambda: False)
    query, key = torch.randn(2, 6, 3, 16).to(dtype), torch.randn(2, groups, 20, 16).to(dtype)
    value = torch.randn(2, groups, 20, 8).to(dtype)
    mask = None
    if kind != "none":
        mask = torch.rand(2, 6 if kind == "heads" else 1, 3, 20) < 0.6
        mask[1, :, 2] = False  # sees nothing
    if kind == "added":
        mask = torch.randn(2, 1, 3, 20)
    found = grouped_attention(query, key, value, mask, 0.3).transpose(1, 2)
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


# -- whole texts in bfloat16 ---------------------------------------------------------------------------


def text(tokens: int, width: int = 16, groups: int = 2, values: int = 16):
    query = torch.randn(2, tokens, 4, width).bfloat16().transpose(1, 2)
    key = torch.randn(2, tokens, groups, width).bfloat16().transpose(1, 2)
    value = torch.randn(2, groups, tokens, values).bfloat16()
    return query, key, value


@pytest.fixture
def library(monkeypatch):
    monkeypatch.delenv("FEWBITS_NATIVE", raising=False)
    found = native.library()
    if found is None or not found.has_bf16:
        pytest.skip("the native library has no products of bfloat16 here")
    return found


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("tokens", "width", "groups", "values"),
    [(1, 16, 2, 16), (63, 15, 4, 7), (64, 64, 1, 64), (65, 80, 2, 130), (200, 64, 4, 32)],
)
def test_the_library_attends_in_texts(library, tokens, width, groups, values, causal):
    query, key, value = text(tokens, width, groups, values)
    found = library.attend(query, key, value, 0.3, causal)
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril() if causal else None
    wanted = exact(query, key, value, None if mask is None else mask[None, None], 0.3)
    # A weight is off by 2^-9, as bfloat16 rounds it, and by what the score in its exponent is: products
    # are exact, and summed, scaled and subtracted to 2^-24 of their size. The result is rounded once.
    size = 0.3 * width * query.abs().max().double() * key.abs().max()
    weight = 2**-9 + 2**-18 + (width + 8) * 2**-24 * size + tokens * 2**-24
    bound = 2 * weight * value.abs().max() + 2**-9 * wanted.abs()
    assert ((found.transpose(1, 2).double() - wanted).abs() <= bound).all()


def test_the_bits_of_texts_do_not_depend_on_threads_or_neighbours(library):
    query, key, value = text(150, 64)
    whole = library.attend(query, key, value, 0.2, True, threads=1)
    assert torch.equal(library.attend(query, key, value, 0.2, True, threads=5), whole)
    assert torch.equal(library.attend(query[1:], key[1:], value[1:], 0.2, True), whole[1:])


def test_rows_of_large_scores_and_of_what_is_not_finite(library):
    query, key, value = text(130)
    large = library.attend(100 * query, 100 * key, value, 1.0, True).transpose(1, 2)
    wanted = exact(
        100 * query, 100 * key, value, torch.ones(1, 1, 130, 130, dtype=torch.bool).tril(), 1.0
    )
    assert ((large.double() - wanted).abs() <= 0.02 * value.abs().max()).all()  # scores of 10^5 to 2^-8
    key[0, 0, 100] = torch.nan
    found = library.attend(query, key, value, 1.0, True)
    assert bool(found[0, 100:, :2].isnan().all())
    assert bool(found[0, :100].isfinite().all())
    assert bool(found[1].isfinite().all())


def test_texts_in_bfloat16_without_mask_and_gradient_are_the_librarys(library, monkeypatch):
    calls = []
    taken = type(library).attend
    monkeypatch.setattr(type(library), "attend", lambda *a, **o: calls.append(a[-1]) or taken(*a, **o))
    module = torch.nn.Module()
    parts = text(20)
    for given, mask, more in (
        (parts, None, {}),
        (parts, None, {"is_causal": False}),
        (parts, torch.ones(2, 1, 20, 20, dtype=torch.bool).tril(), {}),
        (tuple(t.float() for t in parts), None, {}),
        (tuple(t.clone().requires_grad_() for t in parts), None, {}),
        ((parts[0][:, :, :10], *parts[1:]), None, {"is_causal": False}),
    ):
        module.num_key_value_groups = 2
        found, _ = attend(module, *given, mask, scaling=0.25, **more)
        assert found.shape == (2, given[0].shape[2], 4, 16)
    assert calls == [True, False]


@torch.no_grad()
def test_a_text_in_a_cache_with_room_for_more_sees_itself_alone(library):
    query, key, value = text(20)
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = (t.to(dtype) for t in (query[:, :, :10], key, value))
        found, _ = attend(module, q, k, v, None, scaling=0.25)
        expected, _ = attend(module, q, k[:, :, :10], v[:, :, :10], None, scaling=0.25)
        plain = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25, enable_gqa=True)
        assert torch.equal(found, expected)
        assert (found - plain.transpose(1, 2)).abs().max() < 0.03
