"""Q4_K end to end: from a float model to a file, and from files of llama.cpp's own to a model."""

import shutil
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from typer.testing import CliRunner

import fewbits
from checks import TWO_LEVEL, fast_kernel
from fewbits.checkpoint import open_checkpoint
from fewbits.cli import app
from fewbits.convert import convert, open_quantized
from fewbits.errors import InputError, VerificationError
from fewbits.gguf_file import open_gguf
from fewbits.integration import give_back
from fewbits.linear import QuantizedLinear
from fewbits.load import read_matrix
from fewbits.methods import Q4K
from models import tiny_checkpoint

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
GOLDEN = Path(__file__).parent.parent / "build" / "interop" / "golden"
IDS = torch.arange(3, 35).reshape(2, 16)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("source"), "llama", **WIDE)


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """Without a word of format or scheme."""
    out = tmp_path_factory.mktemp("made") / "out"
    fewbits.quantize(source, out, method="q4_k")
    return out


def weights_of(folder):
    view = open_quantized(folder)
    return {name: read_matrix(view.stored, matrix)[0] for name, matrix in view.quantized.items()}


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


def test_the_file_holds_what_the_method_chose(source, made):
    found = weights_of(made)
    floats = open_checkpoint(source)
    assert len(found) == 14
    for name, weight in found.items():
        wanted, _ = Q4K()(floats.read(name), TWO_LEVEL, {})
        assert weight.scheme == TWO_LEVEL
        assert torch.equal(weight.codes, wanted.codes), name
        assert torch.equal(weight.dequantize(), wanted.dequantize()), name


def test_the_gguf_library_reads_the_same_values_bit_for_bit(made):
    ours = weights_of(made)["model.layers.1.mlp.down_proj.weight"].dequantize()
    reader = gguf.GGUFReader(made / "model.gguf")
    [tensor] = [t for t in reader.tensors if t.name == "blk.1.ffn_down.weight"]
    assert tensor.tensor_type == Kind.Q4_K
    theirs = torch.from_numpy(gguf.quants.dequantize(tensor.data, Kind.Q4_K))
    assert torch.equal(ours, theirs)
    assert sum(t.tensor_type == Kind.Q4_K for t in reader.tensors) == 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_computes_what_its_weights_in_float_would(source, made, dtype):
    model, plain = fewbits.load(made, dtype=dtype), fewbits.load(source, dtype=torch.float32)
    linears = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    wanted = fast_kernel("int4pack" if dtype == torch.bfloat16 else "reference")
    assert {linear.kernel_name for linear in linears} == {wanted}
    for name, weight in weights_of(made).items():
        plain.get_parameter(name).data = weight.dequantize(torch.float32)
    exact = logits(plain)
    if dtype == torch.float32:
        assert torch.allclose(logits(model), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))
        return
    # bfloat16 changes the float model too: ours may be off by no more than twice that.
    rounded = logits(plain.to(torch.bfloat16)).float()
    error, usual = ((x - exact).square().mean().sqrt() for x in (logits(model).float(), rounded))
    assert error < 2 * usual


def test_a_flipped_bit_in_any_part_of_a_block_is_found(made, tmp_path):
    fewbits.verify(made)
    shutil.copytree(made, tmp_path / "copy")
    file = tmp_path / "copy" / "model.gguf"
    name = "model.layers.1.mlp.down_proj.weight"
    stored, begin, _ = open_gguf(made / "model.gguf").stored[f"{name}_blocks"]
    assert stored.kind == "Q4_K"
    sound = file.read_bytes()
    for offset in (0, 2, 4, 8, 12, 16, stored.size_bytes - 1):  # d, dmin, s, m, both, codes
        damaged = bytearray(sound)
        damaged[begin + offset] ^= 4
        file.write_bytes(damaged)
        with pytest.raises(VerificationError, match=f"{name}_blocks has other values"):
            fewbits.verify(tmp_path / "copy")


@pytest.mark.parametrize("part", ["steps", "counts", "codes"])
def test_other_parts_than_those_chosen_stop_quantize(source, tmp_path, monkeypatch, part):
    """What is written is decoded by another library and compared with what was chosen before."""
    from fewbits.formats.gguf_k import Q4KBlock

    write = Q4KBlock.write

    def wrong(self, weight):
        values = weight.codes if part == "codes" else getattr(weight.levels, part)
        values.view(torch.uint8).view(-1)[0] ^= 1
        result = write(self, weight)
        values.view(torch.uint8).view(-1)[0] ^= 1
        return result

    monkeypatch.setattr(Q4KBlock, "write", wrong)
    with pytest.raises(VerificationError, match="read back are not those that were chosen"):
        fewbits.quantize(source, tmp_path / "out", method="q4_k")


def test_conversion_keeps_the_blocks_or_says_why_not(made, tmp_path):
    again = convert(made, tmp_path / "gguf", format="gguf").out
    assert (again / "model.gguf").read_bytes() == (made / "model.gguf").read_bytes()
    for name in ("compressed-tensors", "gptq", "gptq-v2", "awq", "fewbits"):
        with pytest.raises(InputError, match="two levels of scales have a layout in gguf only"):
            convert(made, tmp_path / name, format=name)
        assert not (tmp_path / name).exists()
    rounded = convert(made, tmp_path / "new", format="gptq-v2", requantize=True)
    notes = [note.what for note in rounded.ledger.notes if note.what.startswith("requantized")]
    assert len(notes) == 14
    assert all("from w4-g32-asym-k to w4-g32-asym" in what for what in notes)


def test_kernels_do_not_give_the_levels_back(made):
    linear = fewbits.load(made).get_submodule("model.layers.0.mlp.up_proj")
    with pytest.raises(InputError, match="w4-g32-asym-k cannot be saved"):
        give_back(linear)


def test_a_file_of_llama_cpp_s_own_quantizer_runs_on_its_integers():
    """Q4_K_M, the reference model: most matrices are Q4_K, some Q6_K, which are given as floats."""
    folder = GOLDEN / "Q4_K_M"
    if not (folder / "model.gguf").is_file():
        pytest.skip("make interop has llama.cpp make it")
    found, reader = weights_of(folder), gguf.GGUFReader(folder / "model.gguf")
    checkpoint = open_gguf(folder / "model.gguf")
    kinds = {t.name: t for t in reader.tensors}
    two = [n for n, t in kinds.items() if t.tensor_type == Kind.Q4_K and n.startswith("blk")]
    assert len(two) == len(found) > 0
    assert {weight.scheme for weight in found.values()} == {TWO_LEVEL}
    assert any("of Q6_K" in note.what for note in checkpoint.notes)
    for name, weight in found.items():
        stored, _, _ = checkpoint.stored[f"{name}_blocks"]
        theirs = torch.from_numpy(gguf.quants.dequantize(kinds[stored.name].data, Kind.Q4_K))
        heads = stored.place.heads
        if heads:  # pairs of a rotation stand side by side there
            theirs = theirs.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(theirs.shape)
        assert torch.equal(weight.dequantize(), theirs), name
    model = fewbits.load(folder, dtype=torch.bfloat16)
    linears = [m.kernel_name for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert linears == [fast_kernel("int4pack")] * len(two)
    assert bool(torch.isfinite(logits(model)).all())


def test_some_weights_may_have_other_schemes(source, tmp_path):
    other = (("*.down_proj", fewbits.QuantScheme(8, "group", 32)), ("*.k_proj", None))
    result = fewbits.quantize(source, tmp_path / "out", method="q4_k", overrides=other)
    schemes = {name: weight.scheme.label for name, weight in weights_of(result.out).items()}
    assert {n.split(".")[-2]: s for n, s in schemes.items() if "down" in n} == {"down_proj": "w8-g32"}
    assert "model.layers.0.self_attn.k_proj.weight" not in schemes
    assert schemes["model.layers.0.self_attn.q_proj.weight"] == "w4-g32-asym-k"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bits", "8"], ["--bits 8", "accepted is 4"]),
        (["--group-size", "128"], ["--group-size 128", "accepted is 32"]),
        (["--per-tensor"], ["--per-tensor"]),
        (["--threshold", "3"], ["--threshold", "llm-int8"]),
        (["--format", "awq"], ["--format awq", "two levels of scales"]),
        (["--format", "fewbits"], ["--format fewbits", "two levels of scales"]),
    ],
)
def test_what_does_not_go_with_the_method_is_one_line(source, tmp_path, options, words):
    command = ["quantize", str(source), str(tmp_path / "out"), "--method", "q4_k", *options]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) == 1
    assert all(word in result.stderr for word in words), result.stderr
    assert list(tmp_path.iterdir()) == []


def test_calibration_lets_columns_count_by_their_inputs(source, tmp_path):
    ids = torch.randint(3, 96, (8, 32), generator=torch.Generator().manual_seed(0))
    result = fewbits.quantize(source, tmp_path / "out", method="q4_k", calibration=ids, head=True)
    assert result.ledger.request["options"]["weighted"]
    assert result.ledger.request["format"] == "gguf"
    reports = [matrix for block in result.ledger.blocks for matrix in block["matrices"]]
    assert [matrix["method"] for matrix in reports] == ["Q4K"] * 14
    ratios = [matrix["error_to_rtn"] for matrix in reports]
    assert sum(ratios) / len(ratios) < 1  # beside all columns alike
    found = weights_of(result.out)
    assert len(found) == 15  # the head, which nobody has looked at the inputs of
    name = "lm_head.weight"
    wanted, _ = Q4K()(open_checkpoint(source).read(name), TWO_LEVEL, {})
    assert torch.equal(found[name].dequantize(), wanted.dequantize())
    assert bool(torch.isfinite(logits(fewbits.load(result.out))).all())


def test_rows_that_are_no_whole_blocks_are_named(tmp_path):
    narrow = tiny_checkpoint(tmp_path / "narrow", "llama", hidden_size=256, intermediate_size=96)
    with pytest.raises(InputError, match=r"4 of 14 .*\(96 columns, blocks of 256\).*override"):
        fewbits.quantize(narrow, tmp_path / "out", method="q4_k")
