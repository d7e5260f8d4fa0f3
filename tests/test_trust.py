"""Runs that ended well while the checkpoint was bad: each found by an attack on an earlier version."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fewbits
from fewbits import InputError, QuantScheme, VerificationError
from models import tiny_checkpoint

G32 = QuantScheme(4, "group", 32)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    tiny_checkpoint(folder, "llama")
    return folder


def rewrite(folder, change):
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def test_mixed_schemes_reach_clients_also_where_the_source_names_modules_otherwise(source, tmp_path):
    """A source without the base model's prefix: clients match the names of their own modules."""
    rewrite(source, lambda t: {name.removeprefix("model."): tensor for name, tensor in t.items()})
    out = tmp_path / "out"
    overrides = (("*.0.*", QuantScheme(8)), ("*.1.*.q_proj", None))
    fewbits.quantize(source, out, scheme=G32, overrides=overrides)
    ids = torch.arange(16)[None]
    ours = fewbits.load(out, dtype=torch.float32)(ids).logits
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(ids).logits
    # Equal weights in float32: only the order of sums differs, as between any two float32 runs.
    assert (ours - theirs).abs().max() < 1e-5 * ours.abs().max()


def test_what_stays_in_float_is_ignored_by_clients_also_if_it_is_no_part_of_the_model(source, tmp_path):
    extra = {"model.layers.2.mlp.up_proj.weight": torch.randn(96, 64).bfloat16()}
    rewrite(source, lambda tensors: tensors | extra)
    fewbits.quantize(source, tmp_path / "out", scheme=G32)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    import re

    name = "model.layers.2.mlp.up_proj"
    assert any(re.match(i.removeprefix("re:"), name) for i in config["ignore"])
    assert not any(re.match(i.removeprefix("re:"), name.replace("2", "1")) for i in config["ignore"])


@pytest.mark.parametrize(
    "name", ["model.layers.0.input_layernorm.weight", "model.layers.1.self_attn.k_proj.weight"]
)
def test_a_source_that_lacks_a_parameter_is_refused_before_any_work(source, tmp_path, name):
    rewrite(source, lambda tensors: {n: t for n, t in tensors.items() if n != name})
    with pytest.raises(InputError, match=f"needs {name}"):
        fewbits.quantize(source, tmp_path / "out", scheme=G32)


def test_a_source_that_lacks_an_expert_is_refused_before_any_work(tmp_path):
    source = tmp_path / "source"
    tiny_checkpoint(source, "mixtral")
    gone = "model.layers.1.block_sparse_moe.experts.2."
    rewrite(source, lambda tensors: {n: t for n, t in tensors.items() if not n.startswith(gone)})
    with pytest.raises(InputError, match="expert 2 is not whole"):
        fewbits.quantize(source, tmp_path / "out", scheme=G32)


def test_a_source_whose_shapes_are_not_those_of_its_config_is_refused(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    config["intermediate_size"] += 32
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config\.json asks for"):
        fewbits.quantize(source, tmp_path / "out", scheme=G32)


def test_a_whole_file_is_read_before_shards_as_transformers_does(source, tmp_path):
    stale = {name: torch.zeros_like(t) for name, t in load_file(source / "model.safetensors").items()}
    save_file(stale, source / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    index = {"weight_map": dict.fromkeys(stale, "model-00001-of-00001.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    fewbits.quantize(source, tmp_path / "out", scheme=G32)
    weight = fewbits.load(tmp_path / "out").model.embed_tokens.weight
    assert torch.equal(weight, load_file(source / "model.safetensors")["model.embed_tokens.weight"])


def test_a_changed_chat_template_makes_it_another_run(source, tmp_path):
    (source / "chat_template.jinja").write_text("old")
    fewbits.quantize(source, tmp_path / "out", scheme=G32)
    (source / "chat_template.jinja").write_text("new")
    with pytest.raises(InputError, match=r"another run: source\.carried\.chat_template\.jinja was"):
        fewbits.quantize(source, tmp_path / "out", scheme=G32)


def test_a_file_that_clients_would_read_but_the_ledger_does_not_know_is_found(source, tmp_path):
    fewbits.quantize(source, tmp_path / "out", scheme=G32)
    (tmp_path / "out/README.md").write_text("a card is for people")
    fewbits.verify(tmp_path / "out")
    (tmp_path / "out/adapter_config.json").write_text("{}")
    with pytest.raises(VerificationError, match=r"adapter_config\.json is not in the ledger"):
        fewbits.verify(tmp_path / "out")


def test_a_dangling_link_is_no_place_to_write(source, tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="exists"):
        fewbits.quantize(source, tmp_path / "out", scheme=G32)


def test_an_unknown_method_is_named(source, tmp_path):
    with pytest.raises(InputError, match="unknown; accepted are rtn"):
        fewbits.quantize(source, tmp_path / "out", scheme=G32, method=object())


@torch.no_grad()
def test_modules_that_use_a_weight_bare_get_it_dequantized():
    linear = torch.nn.Linear(96, 33, dtype=torch.bfloat16)
    for scheme in (G32, QuantScheme(8), QuantScheme(4, "group", 8, symmetric=False)):
        quantized = fewbits.QuantizedLinear.from_float(linear, scheme)
        assert torch.equal(quantized.weight, fewbits.quantize_tensor(linear.weight, scheme).dequantize())
    layer = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    x = torch.randn(2, 5, 64)
    before = layer(x)
    fewbits.quantize_(layer, QuantScheme(8))
    # 8 bits move each weight by at most 1/254 of its row's largest; the layer norms keep outputs near 1.
    assert 0 < (layer(x) - before).abs().max() < 0.1


def test_a_result_that_runs_nowhere_fails_the_forward_check(source, tmp_path):
    from fewbits.load import check_forward

    fewbits.quantize(source, tmp_path / "out", scheme=G32)
    check_forward(tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "broken")
    rewrite(tmp_path / "broken", lambda t: {n: x for n, x in t.items() if "embed_tokens" not in n})
    with pytest.raises(VerificationError, match="embed_tokens"):
        check_forward(tmp_path / "broken")
