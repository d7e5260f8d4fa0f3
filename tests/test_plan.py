"""Preflight: every offender named before any work, estimates that come true, fallbacks that are told."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fewbits import RTN, InputError, QuantScheme, Recipe, load, quantize, quantize_tensor
from fewbits.plan import make_plan
from models import TINY, tiny_checkpoint, tiny_model

G32 = QuantScheme(4, "group", 32)


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a model type, made once."""
    made: dict[str, Path] = {}

    def get(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = tiny_checkpoint(tmp_path_factory.mktemp(model_type), model_type)
        return made[model_type]

    return get


# -- what does not fit ---------------------------------------------------------------------------


def test_every_weight_that_a_group_size_does_not_divide_is_named_before_any_work(tmp_path, monkeypatch):
    # 80 columns in q, k, v, gate, up; 128 in o; 96 in down: groups of 64 fit o only.
    tiny_checkpoint(tmp_path / "model", hidden_size=80)
    monkeypatch.setattr(RTN, "__call__", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(InputError) as refused:
        quantize(tmp_path / "model", tmp_path / "out", scheme=QuantScheme(4, "group", 64))
    message = str(refused.value)
    for block in range(2):
        for name in ("q", "k", "v"):
            assert f"layers.{block}.self_attn.{name}_proj.weight (80 columns, groups of 64)" in message
        for name, columns in (("gate", 80), ("up", 80), ("down", 96)):
            assert f"layers.{block}.mlp.{name}_proj.weight ({columns} columns, groups of 64)" in message
        assert f"layers.{block}.self_attn.o_proj" not in message
    assert "12 of 14 weights" in message
    assert "accepted for all of them are divisors of 16" in message
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_an_override_that_does_not_fit_is_named_with_its_own_group_size(checkpoint):
    recipe = Recipe(RTN(), G32, overrides=(("*.1.mlp.down_proj", QuantScheme(4, "group", 64)),))
    with pytest.raises(
        InputError, match=r"1 of 14 .*layers\.1\.mlp\.down_proj.*\(96 columns, groups of 64"
    ):
        make_plan(checkpoint("llama"), recipe)


def test_transposed_and_stacked_weights_are_measured_along_their_inputs(checkpoint):
    # gpt2's attn.c_attn is (64, 192) on disk with 64 inputs; gpt_oss' gate_up_proj (4, 64, 192).
    scheme = QuantScheme(4, "group", 96)
    for model_type, name in (("gpt2", "attn.c_attn"), ("gpt_oss", "experts.gate_up_proj")):
        with pytest.raises(InputError) as refused:
            make_plan(checkpoint(model_type), Recipe(RTN(), scheme))
        assert f"{name}" in str(refused.value)
        assert "(64 columns, groups of 96)" in str(refused.value)
        assert "(96 columns" not in str(refused.value)
        assert "(192 columns" not in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_weight_that_is_no_float_is_named(tmp_path, dtype):
    tiny_checkpoint(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=rf"1 of 14 .*{name} \(shape \(96, 64\), {dtype}"):
        make_plan(tmp_path, Recipe(RTN(), G32))


# -- what is no float model that transformers knows ----------------------------------------------


def test_a_quantized_source_is_refused(tmp_path, checkpoint):
    quantize(checkpoint("llama"), tmp_path / "out", scheme=G32)
    with pytest.raises(
        InputError, match=r"is quantized already \(compressed-tensors\); accepted are float"
    ):
        quantize(tmp_path / "out", tmp_path / "again", scheme=G32)


def test_a_quantization_config_of_null_is_no_quantization(tmp_path):
    tiny_checkpoint(tmp_path)
    edit_config(tmp_path, quantization_config=None)
    assert len(make_plan(tmp_path, Recipe(RTN(), G32)).placements) == 14


@pytest.mark.parametrize("model_type", ["llama-17", "", None, "clip"])
def test_a_model_type_that_transformers_does_not_know_is_refused(tmp_path, model_type):
    tiny_checkpoint(tmp_path)
    edit_config(tmp_path, model_type=model_type)
    with pytest.raises(InputError, match="transformers") as refused:
        make_plan(tmp_path, Recipe(RTN(), G32))
    assert "\n" not in str(refused.value)


def test_a_config_without_model_type_is_refused(tmp_path):
    tiny_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["model_type"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="names no model_type"):
        make_plan(tmp_path, Recipe(RTN(), G32))


# -- recipes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["*.down_prj", "re:.*down", "layers.0", "lm_head.wait"])
def test_a_pattern_that_matches_nothing_is_refused_with_examples(checkpoint, pattern):
    with pytest.raises(InputError) as refused:
        make_plan(checkpoint("llama"), Recipe(RTN(), G32, overrides=((pattern, None),)))
    assert repr(pattern) in str(refused.value)
    assert "model.layers.0.mlp.down_proj" in str(refused.value)


def test_a_pattern_that_is_no_regular_expression_is_refused(checkpoint):
    with pytest.raises(InputError, match=r"'re:\*\.q' is no regular expression"):
        make_plan(checkpoint("llama"), Recipe(RTN(), G32, overrides=(("re:*.q", None),)))


def test_the_last_pattern_that_matches_decides(checkpoint):
    eight = QuantScheme(8)
    overrides = (("*.mlp.*", eight), ("*.1.mlp.up_proj", None), (r"re:.*\.1\.mlp\.(gate|up)_proj", G32))
    plan = make_plan(checkpoint("llama"), Recipe(RTN(), QuantScheme(2), overrides))
    schemes = {name: placement.scheme for name, placement in plan.placements.items()}
    expected = {
        "self_attn.q_proj": (QuantScheme(2), QuantScheme(2)),
        "mlp.gate_proj": (eight, G32),
        "mlp.up_proj": (eight, G32),
        "mlp.down_proj": (eight, eight),
    }
    for part, by_block in expected.items():
        found = tuple(schemes[f"model.layers.{block}.{part}.weight"] for block in range(2))
        assert found == by_block, part


def test_a_recipe_that_quantizes_nothing_is_refused(checkpoint):
    with pytest.raises(InputError, match="nothing to quantize"):
        make_plan(checkpoint("llama"), Recipe(RTN(), G32, overrides=(("*", None),)))


# -- estimates -----------------------------------------------------------------------------------


def values_bytes(folder: Path) -> int:
    """Bytes of tensor values in a folder's safetensors files, headers not counted."""
    total = 0
    for path in folder.glob("*.safetensors"):
        total += path.stat().st_size - 8 - int.from_bytes(path.open("rb").read(8), "little")
    return total


LABELS = ("w2-g32", "w3-g32-asym", "w4-g32", "w4-channel-asym", "w8-tensor", "w8-tensor-asym")
CASES = [("llama", label) for label in LABELS] + [
    (model_type, label)
    for model_type in ("gpt2", "mixtral", "gpt_oss", "deepseek_v3", "phi3")
    for label in ("w4-g32", "w3-g32-asym")
]


@pytest.mark.parametrize("head", [False, True], ids=["", "head"])
@pytest.mark.parametrize(("model_type", "label"), CASES)
def test_the_estimated_size_is_the_written_size(tmp_path, checkpoint, model_type, label, head):
    folder, scheme = checkpoint(model_type), QuantScheme.parse(label)
    estimate = make_plan(folder, Recipe(RTN(), scheme, head=head))
    result = quantize(folder, tmp_path / "out", scheme=scheme, head=head)
    assert estimate.written_bytes == result.ledger.totals["written_bytes"]
    assert estimate.written_bytes == values_bytes(tmp_path / "out")
    assert estimate.source_bytes == values_bytes(folder)


def test_parameters_are_counted_from_the_source(checkpoint):
    plan = make_plan(checkpoint("llama"), Recipe(RTN(), G32))
    assert plan.parameters == sum(p.numel() for p in tiny_model("llama").parameters())


# -- formats -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "label", "reason"),
    [
        ("gpt2", "w4-g32", "weights stored (in, out)"),
        ("gpt_oss", "w8-channel", "experts that are fused in one tensor"),
        ("mixtral", "w4-g32-asym", "asymmetric experts"),
    ],
)
def test_falling_back_to_our_own_format_is_noted_with_the_reason(checkpoint, model_type, label, reason):
    recipe = Recipe(RTN(), QuantScheme.parse(label))
    plan = make_plan(checkpoint(model_type), recipe)
    assert plan.format.name == "fewbits"
    (note,) = [note for note in plan.notes if note.where == "format"]
    assert note.kind == "fallback"
    assert reason in note.what
    with pytest.raises(
        InputError, match="--format compressed-tensors cannot hold this model"
    ) as refused:
        make_plan(checkpoint(model_type), recipe, "compressed-tensors")
    assert reason in str(refused.value)


@pytest.mark.parametrize("model_type", sorted(TINY.keys() - {"gpt2", "gpt_oss", "falcon"}))
def test_the_standard_format_is_taken_without_a_note_where_it_fits(checkpoint, model_type):
    plan = make_plan(checkpoint(model_type), Recipe(RTN(), G32))
    assert plan.format.name == "compressed-tensors"
    assert plan.notes == []


@pytest.mark.parametrize(("model_type", "label"), [("falcon", "w4-g32"), ("llama", "w4-g32-asym")])
def test_what_transformers_loads_with_an_option_only_is_noted(checkpoint, model_type, label):
    plan = make_plan(checkpoint(model_type), Recipe(RTN(), QuantScheme.parse(label)))
    assert plan.format.name == "compressed-tensors"
    (note,) = plan.notes
    assert note.kind == "fact"
    assert "CompressedTensorsConfig(dequantize=True)" in note.what


def test_our_own_format_is_written_when_asked_for(checkpoint):
    plan = make_plan(checkpoint("llama"), Recipe(RTN(), G32), "fewbits")
    assert plan.format.name == "fewbits"
    assert plan.notes == []


def test_an_unknown_format_is_refused_with_those_there_are(checkpoint):
    with pytest.raises(InputError, match="'gguf7' is unknown; accepted are compressed-tensors, gptq, "):
        make_plan(checkpoint("llama"), Recipe(RTN(), G32), "gguf7")


# -- the head ------------------------------------------------------------------------------------

HEADS = {"llama": "lm_head", "gpt_neox": "embed_out", "qwen3": "lm_head", "gpt2": "lm_head"}
EMBEDDINGS = {"qwen3": "model.embed_tokens", "gpt2": "transformer.wte"}  # of the tied ones


@pytest.mark.parametrize("model_type", HEADS)
def test_the_head_stays_in_float_unless_asked_for(checkpoint, model_type):
    plan = make_plan(checkpoint(model_type), Recipe(RTN(), G32))
    assert not any(p.module == HEADS[model_type] for p in plan.placements.values())
    assert HEADS[model_type] in plan.floats


@pytest.mark.parametrize("model_type", HEADS)
def test_a_quantized_head_multiplies_by_its_codes_and_leaves_the_embeddings_alone(
    tmp_path, checkpoint, model_type
):
    source, head, tied = checkpoint(model_type), HEADS[model_type], model_type in EMBEDDINGS
    result = quantize(source, tmp_path / "out", scheme=G32, head=True)
    entry = result.ledger.tensors[f"{head}.weight"]
    assert entry.quantized is not None
    assert entry.origin == (f"{EMBEDDINGS[model_type]}.weight" if tied else None)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    embeddings = original.get_input_embeddings().weight
    if tied:
        copied = safe_open(tmp_path / "out" / "model.safetensors", "pt")
        assert torch.equal(copied.get_tensor(f"{EMBEDDINGS[model_type]}.weight"), embeddings)
        assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False

    loaded = load(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(loaded.get_input_embeddings().weight, embeddings.float())
    weight = quantize_tensor(original.get_output_embeddings().weight.detach(), G32).dequantize(
        torch.float64
    )
    x = torch.randn(5, 64)
    exact = x.double() @ weight.t()
    # Sums of 64 products, in any order: each of the 64 roundings is at most eps of the sum of sizes.
    bound = 64 * torch.finfo(torch.float32).eps * (x.abs().double() @ weight.abs().t())
    assert bool(((loaded.get_output_embeddings()(x).double() - exact).abs() <= bound).all())


def test_a_tied_head_that_is_stored_all_the_same_is_quantized_in_place(tmp_path):
    tiny_checkpoint(tmp_path / "model", "qwen3")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    result = quantize(tmp_path / "model", tmp_path / "out", scheme=G32, head=True)
    assert result.ledger.tensors["lm_head.weight"].quantized is not None
    assert result.ledger.tensors["lm_head.weight"].origin is None
    assert result.ledger.totals["source_tensors"] == len(tensors)
