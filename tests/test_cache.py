"""Keys and values that grow in place, against transformers' own."""

import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from fewbits.cache import GrowingLayer, use_growing_cache
from fewbits.structure import cache_of
from models import VOCABULARY, tiny_model


def filled(tokens=5):
    """A layer of transformers, and one of ours, with the same keys and values."""
    states = torch.randn(2, 3, tokens, 4), torch.randn(2, 3, tokens, 6)
    cache = DynamicCache()
    cache.update(*states, 0)
    return copy.deepcopy(cache.layers[0]), GrowingLayer.of(cache.layers[0])


def grow(layers, times):
    """Add the same tokens to all of them, one at a time."""
    for _ in range(times):
        states = torch.randn(2, 3, 1, 4), torch.randn(2, 3, 1, 6)
        for layer in layers:
            layer.update(*states)


def assert_alike(plain, ours):
    assert torch.equal(plain.keys, ours.keys)
    assert torch.equal(plain.values, ours.values)
    assert plain.get_seq_length() == ours.get_seq_length()


def test_it_holds_what_was_added_in_a_tensor_that_is_seldom_made_anew():
    plain, ours = filled()
    places = set()
    for _ in range(200):
        grow((plain, ours), 1)
        assert_alike(plain, ours)
        places.add(ours.keys.data_ptr())
    assert len(places) < 5


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.crop(-2),
        lambda layer: layer.batch_select_indices(torch.tensor([1])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.reset(),
    ],
    ids=["crop", "select", "repeat", "reset"],
)
def test_what_changes_it_changes_it_as_transformers_own(change):
    layers = filled()
    grow(layers, 3)
    for layer in layers:
        change(layer)
    batch = 2 if layers[0].keys is None else len(layers[0].keys)
    for _ in range(3):
        states = torch.randn(batch, 3, 1, 4), torch.randn(batch, 3, 1, 6)
        for layer in layers:
            layer.update(*states)
    assert_alike(*layers)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
def test_what_was_given_out_is_never_written_to(how):
    plain, ours = filled()
    grow((plain, ours), 2)
    given, other = ours.keys, how(ours)
    kept, alike = given.clone(), copy.deepcopy(plain)
    grow((plain, ours), 3)
    grow((alike, other), 3)  # from the same place, with other tokens
    ours.crop(-4)
    plain.crop(-4)
    grow((plain, ours), 2)
    assert torch.equal(given, kept)
    assert_alike(plain, ours)
    assert_alike(alike, other)


def test_other_dtypes_and_gradients_are_left_to_transformers():
    for states in (
        (torch.randn(2, 3, 1, 4).double(), torch.randn(2, 3, 1, 6).double()),
        (torch.randn(2, 3, 1, 4, requires_grad=True), torch.randn(2, 3, 1, 6)),
    ):
        plain, ours = filled()
        for layer in (plain, ours):
            layer.update(*states)
        assert_alike(plain, ours)
        assert ours.keys.dtype == plain.keys.dtype
        assert ours.keys.requires_grad == plain.keys.requires_grad


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
def test_models_write_the_same_words(arguments):
    torch.manual_seed(0)
    model = tiny_model("llama").float().eval()
    other = copy.deepcopy(model)
    use_growing_cache(other)
    ids = torch.randint(3, VOCABULARY, (2, 12))
    results = []
    for each in (model, other):
        torch.manual_seed(1)
        results.append(each.generate(ids, max_new_tokens=20, return_dict_in_generate=True, **arguments))
    assert torch.equal(results[0].sequences, results[1].sequences)
    assert all(type(layer) is GrowingLayer for layer in cache_of(results[1]).layers)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_found_by_both_of_its_names(name):
    class Model(nn.Module):
        def forward(self, **given):
            return given

    model, cache = Model(), DynamicCache()
    cache.update(torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4), 0)
    use_growing_cache(model)
    model(**{name: cache})
    assert [type(layer) for layer in cache.layers] == [GrowingLayer]
