"""convert(): what one format holds, another holds the same, or it is refused."""

import json
from itertools import pairwise

import pytest
import safetensors.torch
import torch

import fewbits
from fewbits.convert import convert, open_quantized
from fewbits.errors import InputError, VerificationError
from fewbits.formats import FORMATS
from fewbits.load import quantized_matrices, read_matrix
from fewbits.scheme import QuantScheme
from fewbits.structure import skeleton
from models import tiny_checkpoint

SYMMETRIC = ("compressed-tensors", "gptq", "gptq-v2", "awq", "gguf", "fewbits", "compressed-tensors")
ASYMMETRIC = ("compressed-tensors", "gptq-v2", "gguf", "awq", "fewbits", "gptq-v2", "compressed-tensors")
TRANSPOSED = ("fewbits", "gptq", "gguf", "awq", "gptq-v2", "fewbits")  # codes are (out, in) everywhere
NOT_IN_LLAMA_CPP = ("opt", "phi3")


def make(folder, label, format, model_type="llama", **changes):
    source = tiny_checkpoint(folder / f"source-{model_type}", model_type, **changes)
    # Outside of the blocks clients look for codes in the head only.
    more = {"overrides": (("model.decoder.project_*", None),)} if model_type == "opt" else {}
    out = folder / f"{label}-{format}"
    fewbits.quantize(source, out, scheme=QuantScheme.parse(label), format=format, **more)
    return out


def weights_of(folder):
    """By our own reader, which the suite of formats compares with others."""
    stored = open_quantized(folder).stored
    matrices = quantized_matrices(stored, skeleton(stored.config))
    return {name: w for name, m in matrices.items() for w in read_matrix(stored, m)}


def files_of(folder):
    names = ("model.safetensors", "config.json")
    return {name: (folder / name).read_bytes() for name in names}


def with_finer_scales(folder):
    """A file of GPTQ as other tools write it: float16 scales that bfloat16 does not hold."""
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    for name, tensor in stored.items():
        if name.endswith(".scales"):
            stored[name] = (tensor.view(torch.int16) | 1).view(torch.float16)  # eleven digits
    safetensors.torch.save_file(stored, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("model_type", ["llama", "opt", "mixtral", "phi3"])
@pytest.mark.parametrize(("label", "chain"), [("w4-g32", SYMMETRIC), ("w4-channel", SYMMETRIC)])
def test_a_chain_of_symmetric_conversions_ends_in_the_files_it_began_with(
    tmp_path, model_type, label, chain
):
    if model_type in NOT_IN_LLAMA_CPP:
        chain = [format for format in chain if format != "gguf"]
    first = now = make(tmp_path, label, chain[0], model_type)
    whole = weights_of(first)
    for before, after in pairwise(chain):
        now = convert(now, tmp_path / f"{before}-{after}", format=after).out
        found = weights_of(now)
        assert found.keys() == whole.keys()
        for name, weight in whole.items():
            assert torch.equal(found[name].codes, weight.codes), (after, name)
            same = found[name].coarsest()
            assert torch.equal(same.scale.double(), weight.coarsest().scale.double()), (after, name)
            assert torch.equal(same.zero_point, weight.coarsest().zero_point), (after, name)
    assert files_of(now) == files_of(first)


@pytest.mark.parametrize(("model_type", "chain"), [("gpt2", TRANSPOSED), ("gpt_oss", ("fewbits",) * 2)])
def test_weights_that_the_source_stores_transposed_are_converted(tmp_path, model_type, chain):
    first = now = make(tmp_path, "w4-g32", chain[0], model_type)
    for before, after in pairwise(chain):
        result = convert(now, tmp_path / f"{before}-{after}", format=after)
        fewbits.verify(result.out, now)
        now = result.out
    assert files_of(now) == files_of(first)


@pytest.mark.parametrize("label", ["w4-g32-asym", "w4-channel-asym"])
def test_a_chain_of_asymmetric_conversions_ends_in_the_files_it_began_with(tmp_path, label):
    first = now = make(tmp_path, label, ASYMMETRIC[0])
    for before, after in pairwise(ASYMMETRIC):
        now = convert(now, tmp_path / f"{before}-{after}", format=after).out
    assert files_of(now) == files_of(first)


@pytest.mark.parametrize("label", ["w8-channel", "w8-g32", "w4-g64"])
def test_gguf_gives_back_the_groups_that_it_repeats(tmp_path, label):
    first = make(tmp_path, label, "compressed-tensors", hidden_size=128, intermediate_size=192)
    there = convert(first, tmp_path / "there", format="gguf").out
    assert {w.scheme.group_size for w in weights_of(there).values()} == {32}
    assert files_of(convert(there, tmp_path / "back", format="compressed-tensors").out) == files_of(
        first
    )


@pytest.mark.parametrize("label", ["w8-channel", "w8-g32", "w3-g32", "w2-g32-asym", "w8-channel-asym"])
def test_other_bits_go_to_gptq_and_back(tmp_path, label):
    first = make(tmp_path, label, "compressed-tensors")
    there = convert(first, tmp_path / "there", format="gptq-v2").out
    assert files_of(convert(there, tmp_path / "back", format="compressed-tensors").out) == files_of(
        first
    )


def test_the_ledger_accounts_for_every_tensor_of_the_source(tmp_path):
    first = make(tmp_path, "w4-g32-asym", "gptq-v2")
    result = convert(first, tmp_path / "awq", format="awq")
    stored = safetensors.torch.load_file(first / "model.safetensors")
    entries = result.ledger.tensors
    assert {name for name, entry in entries.items() if entry.origin is None} == set(stored)
    parts = (".qweight", ".qzeros", ".scales", ".g_idx")
    converted = {name for name, entry in entries.items() if entry.outcome == "converted"}
    assert converted == {name for name in stored if name.endswith(parts)}
    quantized = [entry for entry in entries.values() if entry.quantized is not None]
    assert len(quantized) == len(converted) / len(parts)
    assert fewbits.verify(result.out, first).source_tensors == len(stored)


def test_a_source_that_was_changed_is_noticed(tmp_path):
    first = make(tmp_path, "w4-g32", "gptq")
    out = convert(first, tmp_path / "out", format="awq").out
    stored = safetensors.torch.load_file(first / "model.safetensors")
    name = next(name for name in stored if name.endswith(".qzeros"))
    stored[name][0, 0] ^= 1
    safetensors.torch.save_file(stored, first / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError, match="qzeros has other values"):
        fewbits.verify(out, first)


@pytest.mark.parametrize(
    ("label", "format", "reason"),
    [
        ("w4-g32-asym", "gptq", "version 1 cannot hold a zero point of 0"),
        ("w8-channel", "awq", "4 bits, not 8"),
        ("w3-g32", "awq", "4 bits, not 3"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_or_rounded_with_its_loss(tmp_path, label, format, reason):
    first = make(tmp_path, label, "compressed-tensors")
    with pytest.raises(InputError, match=reason):
        convert(first, tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()
    result = convert(first, tmp_path / "out", format=format, requantize=True)
    notes = [note for note in result.ledger.notes if note.what.startswith("requantized")]
    assert {note.where for note in notes} == weights_of(first).keys()
    after = weights_of(result.out)
    for note in notes:
        exact = weights_of(first)[note.where].dequantize(torch.float64)
        error = (after[note.where].dequantize(torch.float64) - exact).square().sum()
        stated = float(note.what.split("squared error ")[1].split(" ")[0])
        assert stated == pytest.approx(float(error / exact.square().sum()), rel=0.01)
        assert stated > 0


def test_scales_that_the_models_dtype_cannot_hold_are_refused_or_rounded(tmp_path):
    first = make(tmp_path, "w4-g32", "gptq")  # of a bfloat16 model
    with_finer_scales(first)
    exact = convert(first, tmp_path / "v2", format="gptq-v2").out  # float16 too
    assert all(torch.equal(w.scale, weights_of(first)[n].scale) for n, w in weights_of(exact).items())
    with pytest.raises(
        InputError, match=r"not every scale is a number of torch\.bfloat16.*--requantize"
    ):
        convert(first, tmp_path / "ct", format="compressed-tensors")
    assert not (tmp_path / "ct").exists()
    exact = weights_of(first)
    rounded = convert(first, tmp_path / "ct", format="compressed-tensors", requantize=True)
    assert any(note.what.startswith("requantized") for note in rounded.ledger.notes)
    for name, weight in weights_of(rounded.out).items():  # nothing but the scales is rounded
        assert torch.equal(weight.codes, exact[name].codes)
        assert torch.equal(weight.scale, exact[name].scale.bfloat16())


def test_what_a_client_would_not_load_is_said_or_refused_beforehand(tmp_path):
    first = make(tmp_path, "w4-g32", "fewbits")
    with pytest.raises(InputError, match=r"vLLM 0\.33\.0 .*does not read gguf"):
        convert(first, tmp_path / "out", format="gguf", clients=("vllm",))
    with pytest.raises(InputError, match=r"vLLM.*would not load.*down_proj"):  # 48 columns each
        convert(first, tmp_path / "out", format="gptq", tensor_parallel=2)
    assert not (tmp_path / "out").exists()
    assert convert(first, tmp_path / "out", format="gptq", clients=("gptqmodel",)).out.is_dir()


def test_a_refusal_throws_nothing_away(tmp_path):
    first = make(tmp_path, "w4-g32", "gptq")
    out = convert(first, tmp_path / "out", format="compressed-tensors").out
    before = files_of(out)
    with_finer_scales(first)
    with pytest.raises(InputError, match="not every scale"):
        convert(first, out, format="compressed-tensors", restart=True)
    assert files_of(out) == before


def test_weights_whose_inputs_were_rounded_keep_their_codes_where_that_has_no_layout(tmp_path):
    first = make(tmp_path, "w8-channel-a8-token", "fewbits")
    with pytest.raises(InputError, match="inputs in 8 bits"):
        convert(first, tmp_path / "out", format="gguf")
    found = weights_of(convert(first, tmp_path / "out", format="gguf", requantize=True).out)
    for name, weight in weights_of(first).items():
        assert torch.equal(found[name].codes, weight.codes)


def test_floats_and_unknown_formats_are_refused(tmp_path):
    source = tiny_checkpoint(tmp_path / "source", "llama")
    with pytest.raises(InputError, match="is in float; accepted are quantized checkpoints"):
        convert(source, tmp_path / "out", format="gptq")
    with pytest.raises(InputError, match="format 'exl2' is unknown; accepted are compressed-tensors, "):
        convert(source, tmp_path / "out", format="exl2")
    assert not (tmp_path / "out").exists()


def test_the_same_conversion_again_verifies_and_another_is_refused(tmp_path):
    first = make(tmp_path, "w4-g32", "compressed-tensors")
    convert(first, tmp_path / "out", format="gptq")
    assert convert(first, tmp_path / "out", format="gptq").reused
    with pytest.raises(InputError, match=r"request\.format was 'gptq' and is 'awq' now"):
        convert(first, tmp_path / "out", format="awq")
    assert convert(first, tmp_path / "out", format="awq", restart=True).out.is_dir()


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_runs_as_the_float_model_its_codes_stand_for(tmp_path, format):
    label = "w4-g32" if format in ("gptq", "awq") else "w4-g32-asym"
    out = make(tmp_path, label, format)
    view, folder = open_quantized(out), tmp_path / "float"
    floats = {name: view.read(name).float() for name in view.tensors}
    floats |= {name: w.dequantize(torch.float32) for name, w in weights_of(out).items()}
    folder.mkdir()
    safetensors.torch.save_file(floats, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(view.config))
    ids = torch.arange(2, 34).view(2, 16)
    ours, exact = (fewbits.load(path, dtype=torch.float32)(ids).logits for path in (out, folder))
    assert torch.allclose(ours, exact, rtol=1e-4, atol=1e-5)


def test_the_source_is_never_thrown_away(tmp_path):
    first = make(tmp_path, "w4-g32", "gptq")
    for out in (first, tmp_path):
        with pytest.raises(InputError, match="is the source, or holds it"):
            convert(first, out, format="awq", restart=True)
    assert weights_of(first)


@pytest.mark.parametrize("format", ["compressed-tensors", "gguf"])
def test_a_file_alone_is_converted_without_what_lies_about_beside_it(tmp_path, format):
    first = make(tmp_path, "w4-g32", "gguf")
    (tmp_path / "downloads").mkdir()
    alone = (first / "model.gguf").rename(tmp_path / "downloads" / "some.gguf")
    (tmp_path / "downloads" / "private.txt").write_text("secret")
    (tmp_path / "downloads" / "tokenizer.json").write_text("{}")
    result = convert(alone, tmp_path / "out", format=format)
    assert result.ledger.source["name"] == "some.gguf"
    weights = "model.gguf" if format == "gguf" else "model.safetensors"
    assert {p.name for p in result.out.iterdir()} == {weights, "config.json", "fewbits.json", "run.json"}
    skipped = [note.where for note in result.ledger.notes if note.kind == "skip"]
    assert skipped == ["tokenizer"] + ["tokenizer.json"] * (format == "gguf")


# -- what a format has in one scheme ------------------------------------------------------------------

NARROW = (
    ("*.down_proj", QuantScheme(8, "group", 32)),
    ("*.k_proj", QuantScheme(3)),
    ("*.v_proj", QuantScheme(4, "group", 64, symmetric=False)),  # is as the others in awq
)


def mixed(folder, overrides, label="w4-g64", model_type="llama", **changes):
    source = tiny_checkpoint(folder / "source", model_type, **changes)
    scheme = QuantScheme.parse(label)
    return fewbits.quantize(
        source, folder / "mixed", scheme=scheme, format="fewbits", overrides=overrides
    ).out


def losses(result):
    """What each weight that was rounded anew lost, as its note says."""
    notes = [note for note in result.ledger.notes if "squared error" in note.what]
    return {note.where: float(note.what.split("squared error ")[1].split(" ")[0]) for note in notes}


def test_weights_of_several_schemes_become_one_where_the_format_has_one(tmp_path):
    first = mixed(tmp_path, NARROW, intermediate_size=192)
    with pytest.raises(InputError, match="it holds 4 bits"):
        convert(first, tmp_path / "out", format="awq")
    result = convert(first, tmp_path / "out", format="awq", requantize=True)
    fewbits.verify(result.out, first)
    before, after, lost = weights_of(first), weights_of(result.out), losses(result)
    assert lost.keys() == {name for name in before if "down_proj" in name or "k_proj" in name}
    assert {weight.scheme.label for weight in after.values()} == {"w4-g64-asym"}  # that of most
    for name, weight in before.items():
        if name not in lost:
            assert torch.equal(after[name].codes, weight.codes)
        exact = weight.dequantize(torch.float64)
        error = (after[name].dequantize(torch.float64) - exact).square().sum() / exact.square().sum()
        assert lost.get(name, 0.0) == pytest.approx(float(error), rel=0.01)


def test_the_one_scheme_has_groups_that_every_weight_can_have(tmp_path):
    first = mixed(tmp_path, (("*.down_proj", QuantScheme(4, "group", 32)),))  # of 96 columns
    result = convert(first, tmp_path / "out", format="awq", requantize=True)
    assert {weight.scheme.label for weight in weights_of(result.out).values()} == {"w4-g32-asym"}
    assert losses(result).keys() == {n for n in weights_of(first) if "down_proj" not in n}


@pytest.mark.parametrize("format", ["compressed-tensors", "awq"])
def test_experts_of_several_schemes_become_one(tmp_path, format):
    overrides = (("*.layers.1.*experts*", QuantScheme(8)),)
    first = mixed(tmp_path, overrides, "w4-g32", model_type="mixtral", num_hidden_layers=3)
    with pytest.raises(InputError, match=r"all experts in one scheme|4 bits, not 8"):
        convert(first, tmp_path / "out", format=format)
    result = convert(first, tmp_path / "out", format=format, requantize=True)
    fewbits.verify(result.out, first)
    assert losses(result).keys() == {
        name for name in weights_of(first) if "layers.1." in name and "experts" in name
    }
    found = {(w.scheme.bits, w.scheme.group_size) for w in weights_of(result.out).values()}
    assert found == {(4, 32)}


def test_experts_that_the_model_joins_become_one(tmp_path):
    """No run of ours writes such a file; others give each expert what it is worth."""
    first, other = (make(tmp_path, label, "fewbits", "mixtral") for label in ("w4-g32", "w8-channel"))
    name = "model.layers.0.block_sparse_moe.experts.1.w3.weight"
    low, high = (safetensors.torch.load_file(f / "model.safetensors") for f in (first, other))
    spliced = low | {key: tensor for key, tensor in high.items() if key.startswith(name)}
    safetensors.torch.save_file(spliced, first / "model.safetensors", {"format": "pt"})
    config = json.loads((first / "config.json").read_text())
    config["quantization_config"]["weights"][name] = "w8-channel"
    (first / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="joins these weights into one"):
        convert(first, tmp_path / "out", format="fewbits")
    result = convert(first, tmp_path / "out", format="fewbits", requantize=True)
    assert losses(result).keys() == {name}
    assert {weight.scheme.label for weight in weights_of(result.out).values()} == {"w4-g32"}


@pytest.mark.parametrize("source_format", ["fewbits", "gptq-v2", "gguf"])
def test_a_head_whose_codes_have_no_place_is_written_in_float(tmp_path, source_format):
    source = tiny_checkpoint(tmp_path / "source", "llama")
    first = tmp_path / "first"
    scheme = QuantScheme(4, "group", 32)
    fewbits.quantize(source, first, scheme=scheme, format=source_format, head=True)
    with pytest.raises(InputError, match="no codes in a head"):
        convert(first, tmp_path / "out", format="awq")
    result = convert(first, tmp_path / "out", format="awq", requantize=True)
    fewbits.verify(result.out, first)
    exact = weights_of(first)["lm_head.weight"].dequantize(torch.float32)
    written = safetensors.torch.load_file(result.out / "model.safetensors")["lm_head.weight"]
    assert torch.equal(written, exact.bfloat16())
    [(name, lost)] = losses(result).items()
    error = (written.float() - exact).square().sum() / exact.square().sum()
    assert (name, lost) == ("lm_head.weight", pytest.approx(float(error), rel=0.01))
    assert result.ledger.tensors[name].outcome == "dequantized"
    assert weights_of(result.out).keys() == weights_of(first).keys() - {name}
    assert result.ledger.parameters == parameters_of(source)
    ids = torch.arange(2, 34).view(2, 16)
    floats, codes = (fewbits.load(path, dtype=torch.float32)(ids).logits for path in (result.out, first))
    assert (floats - codes).abs().max() < 0.02 * codes.abs().max()  # bfloat16 is off by 2**-9


def parameters_of(folder):
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    return sum(tensor.numel() for tensor in stored.values())
