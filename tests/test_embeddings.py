"""Embeddings as codes: rows that are looked up, and the head that is tied to them."""

import json

import gguf
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import fewbits
import fewbits.plan
from fewbits import InputError, QuantizedLinear, QuantScheme
from fewbits.attention import use_grouped_attention
from fewbits.convert import convert
from fewbits.formats.layout import FLOAT_EMBEDDINGS
from fewbits.gguf_file import open_gguf
from fewbits.integration import give_back
from fewbits.ledger import read_ledger
from fewbits.linear import QuantizedEmbedding
from fewbits.load import open_model, stream_floats
from fewbits.plan import make_plan, survey
from fewbits.recipe import EMBEDDING_SCHEME, Recipe
from fewbits.structure import find_embedding, find_matrices, find_tied_head, row_factor, skeleton
from fewbits.tensor import quantize_tensor
from models import TINY, VOCABULARY, tiny_checkpoint

IDS = torch.arange(1, 25).view(2, 12) * 7 % VOCABULARY
TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}


def name_of(folder):
    """Of the embedding, as the checkpoint calls it."""
    source = open_model(folder)
    matrices, _ = find_matrices(skeleton(source.config), {n: i.shape for n, i in source.tensors.items()})
    [name] = [name for name, matrix in matrices.items() if matrix.kind == "embedding"]
    return name


def only_embeddings(folder, out, label="w8-channel", **more):
    """A checkpoint in which all else is float, and what was done."""
    name = name_of(folder)
    overrides = (("*", None), (name, QuantScheme.parse(label)))
    return fewbits.quantize(folder, out, overrides=overrides, **more)


def float_model(folder, scheme):
    """The source as transformers loads it, its embedding replaced by what the codes stand for.

    It attends, and multiplies by floats, as quantized models do: PyTorch's last bits are others.
    """
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    use_grouped_attention(model)
    stream_floats(model)
    weight = model.get_input_embeddings().weight
    weight.data = quantize_tensor(weight.data, scheme).dequantize()
    return model


@torch.no_grad()
def hidden_and_logits(model):
    """What the head reads, and what comes out."""
    seen = []
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    logits = model(IDS, use_cache=False).logits
    handle.remove()
    return seen[0], logits


# -- what they compute -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [*((kind, {}) for kind in TINY), ("llama", TIED), ("gemma3_text", UNTIED), ("mixtral", TIED)],
)
def test_a_model_computes_what_its_dequantized_embedding_gives(tmp_path, model_type, changes):
    source = tiny_checkpoint(tmp_path / "source", model_type, **changes)
    done = only_embeddings(source, tmp_path / "out")
    model, expected = fewbits.load(tmp_path / "out"), float_model(source, QuantScheme(8))
    assert isinstance(model.get_input_embeddings(), QuantizedEmbedding)
    assert torch.equal(model.get_input_embeddings().weight, expected.get_input_embeddings().weight)
    found, logits = hidden_and_logits(model)
    wanted, others = hidden_and_logits(expected)
    assert torch.equal(found, wanted)  # rows are the very same, so is all that is computed of them
    tied = find_tied_head(skeleton(open_model(source).config)) is not None
    head = model.get_output_embeddings()
    assert isinstance(head, QuantizedLinear) == tied
    if tied:  # a kernel errs at most twice as much as torch in the same dtype
        weight = give_back(head).dequantize(torch.float64)
        exact = F.linear(wanted.double(), weight)
        own = F.linear(wanted, weight.to(wanted.dtype)).double()
        assert (head(found).double() - exact).abs().max() <= 2 * (own - exact).abs().max()
    else:
        assert torch.equal(logits, others)
    assert done.ledger.totals["quantized"] == 1
    assert done.ledger.totals["copied"] == done.ledger.totals["source_tensors"] - 1
    assert done.verification.tensors == done.ledger.totals["source_tensors"] + 2  # codes, scale, shape


@pytest.mark.parametrize("label", ["w4-g32", "w4-g32-asym", "w3-channel", "w2-g32", "w8-tensor"])
def test_rows_are_looked_up_in_any_scheme(label):
    scheme = QuantScheme.parse(label)
    codes = quantize_tensor(torch.randn(24, 64).bfloat16(), scheme)
    embedding = QuantizedEmbedding(codes)
    ids = torch.tensor([[23, 0, 7], [7, 7, 1]])
    assert torch.equal(embedding(ids), F.embedding(ids, codes.dequantize()))
    assert torch.equal(embedding.weight, codes.dequantize())
    single = QuantizedEmbedding(codes, torch.float32)
    assert torch.equal(single(ids), F.embedding(ids, codes.dequantize(torch.float32)))
    assert embedding(ids[:, :0]).shape == (2, 0, 64)
    with pytest.raises(InputError, match="cannot be written to"):
        embedding.weight.data = torch.zeros(24, 64)


@pytest.mark.parametrize("native", ["0", "1"])
@pytest.mark.parametrize(
    "label", ["w8-channel", "w8-g32-asym", "w4-g32", "w3-channel-asym", "w2-g64", "w4-g32-asym"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_tied_head_is_asked_for_its_rows(label, dtype, native, monkeypatch):
    monkeypatch.setenv("FEWBITS_NATIVE", native)
    codes = quantize_tensor(torch.randn(70, 192).bfloat16(), QuantScheme.parse(label))
    embedding, head = QuantizedEmbedding(codes, dtype), QuantizedLinear(codes, dtype=dtype)
    ids = torch.tensor([[69, 0, 31], [32, 64, 32]])
    expected = embedding(ids)
    shared = embedding.share(head)
    assert shared == (head.kernel_name != "int4pack")
    assert (embedding.kernel is head.kernel) == shared
    assert torch.equal(embedding(ids), expected)
    assert torch.equal(embedding(ids[0].int()), expected[0])
    assert torch.equal(embedding.weight, codes.dequantize(dtype))
    for wrong in (-1, 70):
        with pytest.raises(IndexError, match=f"token {wrong}; accepted are 0 to 69"):
            embedding(torch.tensor([3, wrong]))


def test_a_look_up_is_one_operation_in_compiled_graphs():
    codes = quantize_tensor(torch.randn(70, 64).bfloat16(), QuantScheme(8))
    embedding = QuantizedEmbedding(codes)
    ids = torch.tensor([[69, 0, 31]])
    expected = embedding(ids)
    embedding.share(QuantizedLinear(codes))
    assert torch.equal(torch.compile(embedding, backend="eager", fullgraph=True)(ids), expected)


def test_a_scale_of_the_class_is_kept(tmp_path):
    source = tiny_checkpoint(tmp_path / "source", "gemma3_text")
    only_embeddings(source, tmp_path / "out")
    embedding = fewbits.load(tmp_path / "out").get_input_embeddings()
    assert float(embedding.factor) == 8  # sqrt(64)
    assert torch.equal(embedding(IDS), embedding.weight[IDS] * 8)


class Scaled(nn.Embedding):
    """As models have it that scale in float32."""

    def forward(self, ids):
        return super().forward(ids) * 7.3


class Squashed(nn.Embedding):
    def forward(self, ids):
        return torch.tanh(super().forward(ids))


class Shifted(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids + 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_only_a_factor_is_taken_for_one(dtype):
    assert row_factor(nn.Embedding(5, 3), dtype) == 1
    assert row_factor(Scaled(5, 3), dtype) == 7.3
    for other in (Squashed(5, 3), Shifted(5, 3), nn.Embedding(5, 3, max_norm=1.0), nn.Linear(3, 3)):
        assert row_factor(other, dtype) is None


def test_an_embedding_that_does_more_stays_in_float_and_says_so(tmp_path, monkeypatch):
    source = tiny_checkpoint(tmp_path / "source")

    def changed(config):
        model = skeleton(config)
        with torch.device("meta"):
            model.set_input_embeddings(Squashed(VOCABULARY, 64))
        return model

    monkeypatch.setattr(fewbits.plan, "skeleton", changed)
    plan = make_plan(source, Recipe(scheme=QuantScheme(8)))
    assert any("Squashed does more than look up" in note.what for note in plan.notes)
    with pytest.raises(InputError, match=r"--embeddings: .* Squashed does more than look up"):
        make_plan(source, Recipe(embeddings=True))


# -- what is chosen --------------------------------------------------------------------------------


def chosen(folder, **recipe):
    plan = make_plan(folder, Recipe(scheme=QuantScheme(4, "group", 32), **recipe))
    return {n: p.scheme.label for n, p in plan.placements.items() if "layers" not in n}, plan


def test_the_recipe_says_what_embeddings_become(tmp_path):
    source = tiny_checkpoint(tmp_path / "source")
    name, four = "model.embed_tokens.weight", QuantScheme(4)
    assert chosen(source)[0] == {}
    assert chosen(source, embeddings=True)[0] == {name: EMBEDDING_SCHEME.label}
    assert chosen(source, overrides=(("*embed_tokens", four),))[0] == {name: "w4-channel"}
    assert chosen(source, embeddings=True, overrides=((name, None),))[0] == {}
    # A pattern for everything has always meant what multiplies.
    assert chosen(source, overrides=(("*", four),))[0] == {"lm_head.weight": "w4-channel"}
    both = {name: "w4-channel", "lm_head.weight": "w4-channel"}
    assert chosen(source, embeddings=True, overrides=(("*", four),))[0] == both
    assert chosen(source, allocation={name: four})[0] == {name: "w4-channel"}
    with pytest.raises(InputError, match="numbers of tokens; accepted is w8-channel"):
        chosen(source, overrides=((name, QuantScheme.parse("w8-channel-a8-token-t6")),))


def test_a_tied_head_shares_the_codes(tmp_path):
    source = tiny_checkpoint(tmp_path / "source", **TIED)
    name = "model.embed_tokens.weight"
    assert chosen(source, head=True)[0] == {"lm_head.weight": "w4-g32"}  # apart, as ever
    for head in (False, True):
        found, plan = chosen(source, head=head, embeddings=True)
        assert found == {name: "w8-channel"}
        assert plan.config["tie_word_embeddings"] is True
        assert plan.origins == {}
        assert "lm_head" not in plan.floats
        assert any(
            note.where == "lm_head" and "multiplies by its codes" in note.what for note in plan.notes
        )
    found, plan = chosen(source, head=True, embeddings=True, allocation={name: None})
    assert found == {}
    assert plan.config["tie_word_embeddings"] is True
    plan = chosen(source, embeddings=True)[1]
    done = fewbits.quantize(
        source, tmp_path / "out", scheme=QuantScheme(4, "group", 32), embeddings=True
    )
    assert done.ledger.totals["written_bytes"] == plan.written_bytes
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert not any("lm_head" in key for key in stored)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    model = fewbits.load(tmp_path / "out")
    codes = [give_back(m) for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    assert torch.equal(codes[0].codes, codes[1].codes)
    assert torch.equal(codes[0].scale, codes[1].scale)
    assert model.get_input_embeddings().kernel is model.get_output_embeddings().kernel


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "gptq-v2", "awq"])
def test_formats_whose_clients_look_up_floats_refuse(tmp_path, format):
    source = tiny_checkpoint(tmp_path / "source")
    with pytest.raises(InputError, match=FLOAT_EMBEDDINGS):
        make_plan(source, Recipe(scheme=QuantScheme(4, "group", 32), embeddings=True), format)


def test_without_a_format_it_is_our_own_and_a_note_says_why(tmp_path):
    _, plan = chosen(tiny_checkpoint(tmp_path / "source"), embeddings=True)
    assert plan.format.name == "fewbits"
    assert any(note.kind == "fallback" and FLOAT_EMBEDDINGS in note.what for note in plan.notes)


@pytest.mark.parametrize("changes", [TIED, UNTIED])
def test_floats_are_told_to_formats_as_before(tmp_path, changes):
    _, plan = chosen(tiny_checkpoint(tmp_path / "source", **changes))
    assert plan.format.name == "compressed-tensors"
    assert plan.floats == ["lm_head"]


# -- GGUF ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [TIED, UNTIED])
@pytest.mark.parametrize(("label", "kind"), [("w8-channel", "Q8_0"), ("w4-g32", "Q4_0")])
def test_gguf_holds_them_as_llama_cpp_does(tmp_path, changes, label, kind):
    source = tiny_checkpoint(tmp_path / "source", **changes)
    only_embeddings(source, tmp_path / "out", label, format="gguf")
    path = tmp_path / "out" / "model.gguf"
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    held = tensors["token_embd.weight"]
    assert held.tensor_type.name == kind
    assert ("output.weight" in tensors) == (changes is UNTIED)
    weight = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    codes = quantize_tensor(weight, QuantScheme.parse(label))
    decoded = torch.from_numpy(gguf.quants.dequantize(held.data, held.tensor_type).copy())
    model = fewbits.load(path, dtype=torch.float32)
    assert torch.equal(model.get_input_embeddings().weight, decoded)
    assert torch.equal(decoded, codes.dequantize(torch.float32))
    assert isinstance(model.get_output_embeddings(), QuantizedLinear) == (changes is TIED)
    again = convert(path, tmp_path / "own", format="fewbits")
    back = convert(tmp_path / "own", tmp_path / "back", format="gguf")
    assert again.ledger.totals["written_bytes"] < again.source_weight_bytes
    assert (back.out / "model.gguf").read_bytes() == path.read_bytes()


def test_a_format_for_linears_gets_the_embedding_of_gguf_multiplied_out(tmp_path):
    source = tiny_checkpoint(tmp_path / "source", **TIED)
    scheme = QuantScheme(8, "group", 32)
    fewbits.quantize(source, tmp_path / "out", scheme=scheme, embeddings=True, format="gguf")
    done = convert(tmp_path / "out", tmp_path / "other", format="compressed-tensors")
    notes = [note.what for note in done.ledger.notes if note.where == "model.embed_tokens.weight"]
    assert any(what.startswith("dequantized to") for what in notes)
    exact = open_gguf(tmp_path / "out" / "model.gguf")
    assert "model.embed_tokens.weight_blocks" in exact.tensors
    found = fewbits.load(tmp_path / "other").get_input_embeddings().weight
    assert torch.equal(found, fewbits.load(tmp_path / "out").get_input_embeddings().weight)


# -- models with them ------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [TIED, UNTIED])
def test_from_pretrained_opens_them_and_saves_them_again(tmp_path, changes):
    source = tiny_checkpoint(tmp_path / "source", **changes)
    scheme = QuantScheme(4, "group", 32)
    fewbits.quantize(source, tmp_path / "out", scheme=scheme, embeddings=True)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(opened.get_input_embeddings(), QuantizedEmbedding)
    opened.save_pretrained(tmp_path / "saved")
    stored, saved = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "saved"))
    assert stored.keys() == saved.keys()
    assert all(torch.equal(stored[name], saved[name]) for name in stored)
    wanted = fewbits.load(tmp_path / "out")
    again = fewbits.load(tmp_path / "saved")
    for model in (opened, again):
        assert torch.equal(hidden_and_logits(model)[1], hidden_and_logits(wanted)[1])


@pytest.mark.parametrize("changes", [TIED, UNTIED])
def test_a_model_generates(tmp_path, changes):
    source = tiny_checkpoint(tmp_path / "source", **changes)
    only_embeddings(source, tmp_path / "out")
    model = fewbits.load(tmp_path / "out")
    ids = model.generate(IDS[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert ids.shape == (1, 16)


@pytest.mark.parametrize("changes", [TIED, UNTIED])
def test_an_embedding_of_codes_is_not_resized(tmp_path, changes):
    source = tiny_checkpoint(tmp_path / "source", **changes)
    only_embeddings(source, tmp_path / "out")
    model = fewbits.load(tmp_path / "out")
    with pytest.raises(InputError, match="resize its embeddings there"):
        model.resize_token_embeddings(VOCABULARY + 8)
    before = hidden_and_logits(model)
    assert model.resize_token_embeddings(VOCABULARY) is model.get_input_embeddings()
    model.tie_weights()  # as some tools do to any model
    assert torch.equal(hidden_and_logits(model)[1], before[1])


def test_calibrated_methods_round_them_to_nearest(tmp_path):
    source = tiny_checkpoint(tmp_path / "source", **TIED)
    ids = torch.randint(3, VOCABULARY, (4, 32))
    scheme = QuantScheme(4, "group", 32)
    done = fewbits.quantize(
        source, tmp_path / "out", method="gptq", scheme=scheme, embeddings=True, calibration=ids
    )
    name = "model.embed_tokens.weight"
    assert any(note.where == name and "rounded to nearest" in note.what for note in done.ledger.notes)
    weight = load_file(source / "model.safetensors")[name]
    found = fewbits.load(tmp_path / "out").get_input_embeddings().weight
    assert torch.equal(found, quantize_tensor(weight, EMBEDDING_SCHEME).dequantize())
    assert read_ledger(tmp_path / "out").request["embeddings"] is True


def test_the_embedding_is_found_by_what_the_model_says():
    config = {"model_type": "gpt2", **TINY["gpt2"]}
    assert find_embedding(skeleton(config)) == "transformer.wte"
    assert find_tied_head(skeleton(config)) == "lm_head"
    assert find_tied_head(skeleton(config | UNTIED)) is None
    assert find_embedding(nn.Sequential(nn.Embedding(3, 3))) is None


def test_a_survey_has_them_among_its_matrices(tmp_path):
    seen = survey(open_model(tiny_checkpoint(tmp_path / "source")))
    matrix = seen.matrices["model.embed_tokens.weight"]
    assert (matrix.kind, matrix.rows_columns, matrix.block) == ("embedding", (VOCABULARY, 64), None)
