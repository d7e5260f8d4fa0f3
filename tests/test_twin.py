"""The outlier twin of `benchmarks/twin.py`: the same function, other activations."""

import sys
from pathlib import Path

import pytest
import torch

from fewbits import load
from models import tiny_checkpoint

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from twin import make_twin, write_twin

REFERENCE = Path(__file__).parent.parent / "reference/model"
NORMS = ("input_layernorm", "post_attention_layernorm")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The reference model and its twin, in float32."""
    folder = tmp_path_factory.mktemp("twin") / "twin"
    write_twin(REFERENCE, folder)
    return load(REFERENCE, dtype=torch.float32), load(folder, dtype=torch.float32)


def some_ids(model):
    return torch.randint(model.config.vocab_size, (2, 64))


@torch.no_grad()
def test_it_computes_the_same_function(models):
    original, twin = models
    ids = some_ids(original)
    # Powers of two change no mantissa: products and sums are the same bits in the same order.
    assert torch.equal(original(ids).logits, twin(ids).logits)


@torch.no_grad()
def norm_outputs(model, ids):
    """Largest magnitude per channel behind every norm of a block."""
    found = {}
    for name, module in model.named_modules():
        if name.endswith(NORMS):
            module.register_forward_hook(
                lambda _, __, out, name=name: found.update({name: out.abs().amax((0, 1))})
            )
    model(ids)
    return found


def test_one_channel_in_a_hundred_is_an_outlier(models):
    original, twin = models
    ids = some_ids(original)
    plain, large = norm_outputs(original, ids), norm_outputs(twin, ids)
    assert len(plain) == 2 * original.config.num_hidden_layers
    places = set()
    for name in plain:
        ratios = large[name] / plain[name]
        channels = tuple(torch.nonzero(ratios != 1).flatten().tolist())
        assert len(channels) == 3  # 1 % of 256, rounded up
        assert {float(ratios[c]) for c in channels} <= {32.0, 64.0}
        assert large[name].max() > 5 * plain[name].max()
        places.add(channels)
    assert len(places) == len(plain)  # drawn for each norm


def test_seeds_give_different_twins():
    tensors = {f"model.layers.0.{norm}.weight": torch.ones(64) for norm in NORMS}
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    tensors |= {f"model.layers.0.{name}.weight": torch.ones(8, 64) for name in names}
    one, same, other = make_twin(tensors, 1), make_twin(tensors, 1), make_twin(tensors, 2)
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(one[norm], same[norm])
    assert not torch.equal(one[norm], other[norm])


def test_what_cannot_be_twinned_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no norm by the names of Llama"):
        write_twin(tiny_checkpoint(tmp_path / "gpt2", "gpt2"), tmp_path / "twin")
    tensors = {f"model.layers.0.{norm}.weight": torch.full((64,), 1e38) for norm in NORMS}
    with pytest.raises(ValueError, match="scaled exactly"):
        make_twin(tensors, 0)
