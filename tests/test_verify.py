"""verify() finds every change of a checkpoint, says where, and trusts none of our own decoders."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewbits import InputError, QuantScheme, VerificationError, packing, quantize, verify
from fewbits.checkpoint import hash_file, hash_json, hash_tensor
from models import tiny_checkpoint

LABELS = ("w4-g32", "w4-g32-asym", "w8-channel", "w8-tensor", "w3-g32", "w2-g32")
WEIGHT = "model.layers.1.mlp.down_proj.weight"
COPIED = "model.layers.0.input_layernorm.weight"
CARRIED = ("tokenizer.json", "chat_template.jinja", "generation_config.json", "LICENSE",
           "additional_chat_templates/tools.jinja")  # fmt: skip
SHARD_BYTES = 30_000  # several shards


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tiny_checkpoint(tmp_path_factory.mktemp("source"))
    (folder / "additional_chat_templates").mkdir()
    for name in CARRIED:
        if not (folder / name).exists():
            (folder / name).write_text(f'"{name} {"x" * 40}"')
    return folder


@pytest.fixture(scope="module")
def quantized(source, tmp_path_factory):
    """A result by label, made once and not to be changed."""
    made: dict[str, Path] = {}

    def get(label: str) -> Path:
        if label not in made:
            made[label] = tmp_path_factory.mktemp("quantized") / label
            quantize(source, made[label], scheme=QuantScheme.parse(label), max_shard_bytes=SHARD_BYTES)
        return made[label]

    return get


@pytest.fixture
def copied(quantized, tmp_path):
    """A result by label, to be damaged."""

    def get(label: str) -> Path:
        return Path(shutil.copytree(quantized(label), tmp_path / label))

    return get


def place(folder: Path, tensor: str) -> tuple[Path, int, int]:
    """The file of a tensor, and where in it its values begin and end."""
    for path in folder.glob("*.safetensors"):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        if tensor in header:
            begin, end = header[tensor]["data_offsets"]
            return path, start + begin, start + end
    raise AssertionError(tensor)


def flip(path: Path, offset: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


def found(folder: Path, *named: str, source: Path | None = None) -> str:
    """Verification fails, and names everything it should; the message."""
    with pytest.raises(VerificationError) as failed:
        verify(folder, source)
    message = str(failed.value)
    for name in named:
        assert name in message
    return message


# -- what is sound passes ------------------------------------------------------------------------


@pytest.mark.parametrize("label", LABELS)
def test_a_sound_checkpoint_passes_and_everything_in_it_was_compared(quantized, source, label):
    result = verify(quantized(label), source)
    ledger = json.loads((quantized(label) / "fewbits.json").read_text())
    parts = 3 + label.endswith("-asym")
    assert (result.codes, result.tensors) == (14, 14 * parts + 7)
    assert result.source_tensors == 21
    files = [path for path in quantized(label).rglob("*") if path.is_file()]
    assert result.files == len(files) - 2  # the ledger itself, and times and peaks
    assert len([name for name in ledger["files"] if name.endswith(".safetensors")]) > 1
    assert result.problems == []


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("label", ["w3-g32-asym", "w8-tensor"])
def test_transposed_and_stacked_weights_pass(tmp_path, model_type, label):
    tiny_checkpoint(tmp_path / "model", model_type)
    quantize(tmp_path / "model", tmp_path / "out", scheme=QuantScheme.parse(label))
    result = verify(tmp_path / "out", tmp_path / "model")
    assert result.codes == {"gpt2": 8, "mixtral": 32, "gpt_oss": 12}[model_type]


@pytest.mark.parametrize("label", LABELS)
def test_verification_does_without_our_own_unpacker(quantized, monkeypatch, label):
    folder = quantized(label)
    monkeypatch.setattr(packing, "unpack", lambda *_: pytest.fail("our own unpacker was used"))
    monkeypatch.setattr(packing, "pack", lambda *_: pytest.fail("our own packer was used"))
    assert verify(folder).codes == 14


def test_progress_is_told_to_its_end(quantized, source):
    told: list[tuple[str, int, int]] = []
    verify(quantized("w4-g32"), source, lambda *what: told.append(what))
    assert [t for t in told if t[0] == "verify"] == [("verify", i + 1, 21) for i in range(21)]
    assert told[-1] == ("compare with source", 21, 21)


def test_a_folder_that_fewbits_did_not_write_is_refused(source):
    with pytest.raises(InputError, match=r"has no fewbits\.json"):
        verify(source)


# -- one flipped bit -----------------------------------------------------------------------------

PARTS = [
    (label, part)
    for label in LABELS
    for part in ("_packed", "_scale", "_shape", "_zero_point", "copied")
    if part != "_zero_point" or label.endswith("-asym")
]


@pytest.mark.parametrize(("label", "part"), PARTS)
def test_a_flipped_bit_in_any_kind_of_tensor_is_found_and_named(copied, label, part):
    folder = copied(label)
    tensor = COPIED if part == "copied" else WEIGHT + part
    path, begin, end = place(folder, tensor)
    for offset, bit in ((begin, 0), ((begin + end) // 2, 3), (end - 1, 7)):
        flip(path, offset, bit)
        message = found(folder, f"tensor {tensor} has other values", f"{path.name} was changed")
        assert message.count("has other values") == 1  # and no other is blamed
        flip(path, offset, bit)
    verify(folder)  # the damage is undone


def test_a_flipped_bit_anywhere_in_a_header_is_found_and_the_file_named(copied):
    folder = copied("w4-g32-asym")
    path, _, _ = place(folder, WEIGHT + "_packed")
    length = int.from_bytes(path.read_bytes()[:8], "little")
    # All of the length; of the JSON every 151st byte, so that all bits and all kinds of entries are hit.
    places = [(i, bit) for i in range(8) for bit in (0, 7)]
    places += [(8 + i, i % 8) for i in range(0, length, 151)]
    for offset, bit in places:
        flip(path, offset, bit)
        found(folder, path.name)
        flip(path, offset, bit)
    verify(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "fewbits.json", "model.safetensors.index.json", *CARRIED]
)
def test_a_flipped_bit_in_any_other_file_is_found_and_the_file_named(copied, name):
    folder = copied("w4-g32")
    size = (folder / name).stat().st_size
    step = max(1, size // 10)
    for offset in range(0, size, step):
        flip(folder / name, offset, offset // step % 8)
        found(folder, name)
        flip(folder / name, offset, offset // step % 8)
    verify(folder)


def test_every_flip_in_a_pattern_of_the_config_is_found(source, tmp_path):
    # With several schemes config.json holds regular expressions; some flips leave no valid one.
    folder = tmp_path / "out"
    overrides = (("*.down_proj", QuantScheme(8)),)
    quantize(source, folder, scheme=QuantScheme(4, "group", 32), overrides=overrides)
    content = (folder / "config.json").read_bytes()
    start = content.index(b'"re:')
    for offset in range(start, content.index(b"\n", start), 3):
        for bit in (0, 3, 5):
            flip(folder / "config.json", offset, bit)
            found(folder, "config.json")
            flip(folder / "config.json", offset, bit)
    verify(folder)


# -- files and tensors ---------------------------------------------------------------------------


def test_a_missing_shard_is_named_with_its_tensors(copied):
    folder = copied("w4-g32")
    path, _, _ = place(folder, WEIGHT + "_packed")
    path.unlink()
    found(folder, f"{path.name} is missing", f"tensor {WEIGHT}_packed is missing")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", *CARRIED])
def test_any_other_missing_file_is_named(copied, name):
    folder = copied("w4-g32")
    (folder / name).unlink()
    found(folder, f"{name} is missing")


@pytest.mark.parametrize("size", ["empty", "in the header", "in the values", "one byte"])
def test_a_truncated_shard_is_named(copied, size):
    folder = copied("w4-g32")
    path, begin, _ = place(folder, WEIGHT + "_packed")
    content = path.read_bytes()
    path.write_bytes(
        content[: {"empty": 0, "in the header": 40, "in the values": begin + 3}.get(size, -1)]
    )
    found(folder, f"{path.name} has {path.stat().st_size} bytes instead of {len(content)}", WEIGHT)


def rewrite(path: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """Another sound safetensors file in the place of one."""
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_renamed_tensor_is_named_under_both_names(copied):
    folder = copied("w4-g32")
    path, _, _ = place(folder, COPIED)
    rewrite(path, lambda tensors: tensors.update({"model.other.weight": tensors.pop(COPIED)}))
    found(
        folder,
        f"tensor {COPIED} is missing",
        "tensor model.other.weight is not in the ledger",
        path.name,
    )


def test_an_extra_tensor_is_named(copied):
    folder = copied("w4-g32")
    path, _, _ = place(folder, COPIED)
    rewrite(path, lambda tensors: tensors.update(extra=torch.zeros(3)))
    found(folder, "tensor extra is not in the ledger", path.name)


def test_an_extra_weight_file_that_clients_would_prefer_is_named(copied):
    # transformers takes model.safetensors and does not look at the index beside it
    folder = copied("w4-g32")
    save_file({COPIED: torch.zeros(64)}, folder / "model.safetensors", metadata={"format": "pt"})
    found(folder, "model.safetensors")


@pytest.mark.parametrize("tensor", [COPIED, WEIGHT + "_packed", WEIGHT + "_scale"])
def test_a_shard_written_anew_with_other_values_is_found_and_the_tensor_named(copied, tensor):
    folder = copied("w4-g32")
    path, _, _ = place(folder, tensor)
    rewrite(
        path, lambda tensors: tensors[tensor].view(-1)[:2].copy_(tensors[tensor].view(-1)[:2] * 2 + 1)
    )
    found(folder, f"tensor {tensor} has other values", f"{path.name} was changed")


@pytest.mark.parametrize("change", ["dtype", "shape"])
def test_another_dtype_or_shape_is_found_and_the_tensor_named(copied, change):
    folder = copied("w4-g32")
    path, _, _ = place(folder, COPIED)
    other = {"dtype": lambda t: t.view(torch.float16), "shape": lambda t: t.view(2, -1)}[change]
    rewrite(path, lambda tensors: tensors.update({COPIED: other(tensors[COPIED])}))
    found(folder, f"tensor {COPIED} has another dtype or shape")


def test_a_shard_that_took_the_place_of_another_is_found(copied):
    folder = copied("w4-g32")
    one, two, *_ = sorted(folder.glob("*.safetensors"))
    shutil.copyfile(one, two)
    found(folder, two.name, "is missing")


# -- a writer that is consistent with itself, and wrong ------------------------------------------


def forge(folder: Path) -> None:
    """Make the ledger agree with the files as they are now, but for what was chosen."""
    ledger = json.loads((folder / "fewbits.json").read_text())
    tensors = {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}
    for entry in ledger["tensors"].values():
        for written in entry["written"]:
            tensor = tensors[written["name"]]
            written |= {"sha256": hash_tensor(tensor), "shape": list(tensor.shape)}
            written["size_bytes"] = tensor.nbytes
    for name in ledger["files"]:
        path = folder / name
        ledger["files"][name] = {"size_bytes": path.stat().st_size, "sha256": hash_file(path)}
    del ledger["sha256"]
    (folder / "fewbits.json").write_text(json.dumps(ledger | {"sha256": hash_json(ledger)}))


@pytest.mark.parametrize(
    ("label", "part"), [p for p in PARTS if p[1] in ("_packed", "_scale", "_zero_point")]
)
def test_integers_other_than_the_chosen_ones_are_found_by_decoding_alone(copied, label, part):
    folder = copied(label)
    path, begin, end = place(folder, WEIGHT + part)
    flip(path, (begin + end) // 2, 3)
    forge(folder)
    if (label, part) == ("w8-tensor", "_scale"):
        found(folder, f"{WEIGHT}: its one scale is not the same in every row")
    else:
        name = {"_packed": "codes", "_scale": "scale", "_zero_point": "zero_point"}[part]
        found(folder, f"{WEIGHT}: the {name} read back are not those that were chosen")


def test_a_copied_tensor_that_is_not_the_sources_is_found(copied):
    folder = copied("w4-g32")
    path, begin, _ = place(folder, COPIED)
    flip(path, begin, 0)
    forge(folder)
    found(folder, f"tensor {COPIED} is not the source's, bit for bit")


@pytest.mark.parametrize("shape", [(64, 95), (63, 96), (96, 64), (64, 97), (65, 96), (0, 0), (-1, 96)])
def test_a_shape_that_does_not_belong_to_the_codes_is_found(copied, shape):
    folder = copied("w4-g32-asym")
    path, _, _ = place(folder, f"{WEIGHT}_shape")
    rewrite(path, lambda tensors: tensors.update({f"{WEIGHT}_shape": torch.tensor(shape)}))
    forge(folder)
    found(folder, WEIGHT)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_bits", 8), ("num_bits", 3), ("group_size", 64), ("symmetric", False), ("strategy", "channel"),
     ("type", "float")],
)  # fmt: skip
def test_a_config_that_tells_clients_another_scheme_is_found(copied, key, value):
    folder = copied("w4-g32")
    config = json.loads((folder / "config.json").read_text())
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert weights[key] != value
    weights[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    found(folder, "config.json")
    forge(folder)
    found(folder, "config.json", "'float' is not read" if key == "type" else "model.layers.")


def test_a_config_with_another_quant_method_is_found(copied):
    folder = copied("w4-g32")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "gptq"
    (folder / "config.json").write_text(json.dumps(config))
    forge(folder)
    found(folder, "config.json says quant_method 'gptq'")


@pytest.mark.parametrize("ignore", [["lm_head", WEIGHT.removesuffix(".weight")], []])
def test_a_config_that_tells_clients_to_ignore_the_wrong_modules_is_found(copied, ignore):
    folder = copied("w4-g32")
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    config["quantization_config"]["ignore"] = ignore
    (folder / "config.json").write_text(json.dumps(config))
    forge(folder)
    found(folder, "config.json", "lm_head" if not ignore else WEIGHT.removesuffix(".weight"))


_pack = packing.pack


def swapped(codes: Tensor, bits: int) -> Tensor:
    codes = codes.clone()
    codes[:, [0, 1]] = codes[:, [1, 0]]
    return _pack(codes, bits)


PACKERS = {
    "two codes swapped": swapped,
    "one code off": lambda codes, bits: _pack(torch.cat([codes[:, :1] ^ 1, codes[:, 1:]], 1), bits),
    "highest bits first": lambda codes, bits: (
        _pack(codes, bits).view(torch.uint8).flip(1).view(torch.int32)
    ),
    "rows rolled": lambda codes, bits: _pack(codes.roll(1, 0), bits),
    "a word lost": lambda codes, bits: _pack(codes, bits)[:, :-1].contiguous(),
    "a row lost": lambda codes, bits: _pack(codes, bits)[:-1].contiguous(),
}


@pytest.mark.parametrize("bug", PACKERS)
@pytest.mark.parametrize("label", LABELS)
def test_a_bug_in_the_packer_stops_quantize_until_it_is_mended_and_the_work_is_thrown_away(
    source, tmp_path, monkeypatch, label, bug
):
    scheme, out = QuantScheme.parse(label), tmp_path / "out"
    monkeypatch.setattr("fewbits.packing.pack", PACKERS[bug])
    for _ in range(2):  # the second time it finds what the first has packed
        with pytest.raises(VerificationError) as failed:
            quantize(source, out, scheme=scheme)
        # All weights are wrong. Where none can be unpacked, the first that is to run is named.
        assert re.search(r"model\.layers\.0\.(self_attn|mlp)\.\w+_proj\.weight", str(failed.value))
        assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
        monkeypatch.undo()
    assert quantize(source, out, scheme=scheme, restart=True).verification.problems == []
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("part", ["_scale", "_shape", "_zero_point"])
def test_a_format_that_writes_something_else_stops_quantize(source, tmp_path, monkeypatch, part):
    from fewbits.formats import CompressedTensors

    write = CompressedTensors.write

    def wrong(self: Any, name: str, weight: Any) -> dict[str, Tensor]:
        tensors = write(self, name, weight)
        return tensors | {name + part: tensors[name + part] + 1}

    monkeypatch.setattr(CompressedTensors, "write", wrong)
    with pytest.raises(VerificationError, match=r"model\.layers\.0\.(self_attn|mlp)\.\w+_proj\.weight"):
        quantize(source, tmp_path / "out", scheme=QuantScheme.parse("w4-g32-asym"))
    assert not (tmp_path / "out").exists()


# -- the source ----------------------------------------------------------------------------------


@pytest.fixture
def other_source(source, tmp_path):
    return Path(shutil.copytree(source, tmp_path / "other"))


@pytest.mark.parametrize("name", [WEIGHT, COPIED])
def test_a_changed_source_tensor_is_found_and_named(quantized, other_source, name):
    path, begin, _ = place(other_source, name)
    flip(path, begin, 0)
    message = found(quantized("w4-g32"), f"source tensor {name} has other values", source=other_source)
    assert "failed verification (1)" in message


def test_source_tensors_that_came_or_went_are_found_and_named(quantized, other_source):
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["extra"] = tensors.pop(COPIED)

    rewrite(other_source / "model.safetensors", edit)
    found(
        quantized("w4-g32"),
        f"source tensor {COPIED} is not in the source",
        "source tensor extra is not in the ledger",
        source=other_source,
    )


def test_a_changed_source_config_is_found(quantized, other_source):
    config = json.loads((other_source / "config.json").read_text())
    (other_source / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    found(quantized("w4-g32"), "config.json", source=other_source)
