"""The ledger: what it says survives the disk, what it sums adds up, and nobody edits it unseen."""

import hashlib
import json
from typing import Any

import pytest
import torch

from fewbits import InputError, Note, QuantScheme, quantize_tensor
from fewbits.checkpoint import TensorInfo, Written, hash_file, hash_json, hash_tensor, hash_tensors
from fewbits.ledger import Codes, Entry, Ledger, plain, read_ledger

FILE = "fewbits.json"


def sample() -> Ledger:
    """A linear, a stack of experts, a copied norm, and a head made from tied embeddings."""
    generator = torch.Generator().manual_seed(0)
    scheme = QuantScheme(4, "group", 32, symmetric=False)
    ledger = Ledger(
        "1.2.3", {"method": "rtn", "overrides": [["*", "float"]]}, {"name": "x", "files": {}}
    )
    for name, count, origin in (
        ("a.weight", 1, None),
        ("experts", 3, None),
        ("head.weight", 1, "embed"),
    ):
        weights = [
            quantize_tensor(torch.randn(8, 64, generator=generator), scheme) for _ in range(count)
        ]
        shape = (8, 64) if count == 1 else (count, 8, 64)
        info = TensorInfo(name, torch.bfloat16, shape, "model.safetensors")
        written = [Written(name + "_packed", "int32", (8, 8), 256 * count, "1" * 64)]
        ledger.tensors[name] = Entry.of(
            info, "0" * 64, written, Codes.of(weights, count > 1), origin=origin
        )
    for name, count in (("embed", 640), ("norm.weight", 64)):
        info = TensorInfo(name, torch.float32, (count,), "model.safetensors")
        ledger.tensors[name] = Entry.of(
            info, "2" * 64, [Written(name, "float32", (count,), 4 * count, "2" * 64)], None
        )
    ledger.notes.append(Note("fallback", "format", "Grund: größer"))
    ledger.files["model.safetensors"] = {"size_bytes": 7, "sha256": "3" * 64}
    return ledger


def put(folder: Any, value: dict[str, Any]) -> None:
    (folder / FILE).write_text(json.dumps(value), encoding="utf-8")


def test_a_ledger_read_back_is_the_one_that_was_written(tmp_path):
    put(tmp_path, sample().to_json())
    assert read_ledger(tmp_path) == sample()


def test_totals_count_source_tensors_once_and_made_ones_only_as_written():
    assert sample().totals == {
        "source_tensors": 4,
        "quantized": 2,
        "copied": 2,
        "folded": 0,
        "converted": 0,
        "dequantized": 0,
        "dropped": 0,
        "source_bytes": 2 * 8 * 64 + 3 * 2 * 8 * 64 + 4 * 640 + 4 * 64,
        "written_bytes": 5 * 256 + 4 * 640 + 4 * 64,
        "quantized_source_bytes": 5 * 2 * 8 * 64,
        "quantized_written_bytes": 5 * 256,
    }


def every_leaf(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, item in items for leaf in every_leaf(item, (*path, key))]
    return [path]


def test_a_change_of_any_value_is_found():
    value = json.loads(json.dumps(plain(sample().to_json())))
    stated = value.pop("sha256")
    assert hash_json(value) == stated
    leaves = every_leaf(value)
    assert len(leaves) > 80
    for path in leaves:
        changed = json.loads(json.dumps(value))
        owner = changed
        for key in path[:-1]:
            owner = owner[key]
        old = owner[path[-1]]
        owner[path[-1]] = old + 1 if isinstance(old, int) else f"{old}x"
        assert hash_json(changed) != stated, path


def test_a_changed_ledger_is_refused(tmp_path):
    value = plain(sample().to_json())
    value["totals"]["written_bytes"] += 1
    put(tmp_path, value)
    with pytest.raises(InputError, match=r"fewbits\.json was changed: its own hash does not match"):
        read_ledger(tmp_path)


def test_a_ledger_without_its_hash_is_refused(tmp_path):
    value = plain(sample().to_json())
    del value["sha256"]
    put(tmp_path, value)
    with pytest.raises(InputError, match="its own hash does not match"):
        read_ledger(tmp_path)


def test_the_order_of_keys_does_not_matter(tmp_path):
    value = plain(sample().to_json())
    put(tmp_path, dict(reversed(value.items())))
    assert read_ledger(tmp_path) == sample()


@pytest.mark.parametrize(
    ("key", "other"),
    [
        ("tensors", []),
        ("tensors", {"a": []}),
        ("tensors", {"a": {"outcome": "copied"}}),
        ("notes", [{"sort": "skip"}]),
        ("notes", 3),
        ("files", None),
    ],
)
def test_a_sound_file_that_is_no_ledger_is_refused(tmp_path, key, other):
    value = plain(sample().to_json())
    del value["sha256"]
    if other is None:
        del value[key]
    else:
        value[key] = other
    put(tmp_path, value | {"sha256": hash_json(value)})
    with pytest.raises(InputError, match="is not a ledger of this version"):
        read_ledger(tmp_path)


def test_no_ledger_is_said_so(tmp_path):
    with pytest.raises(InputError, match=r"has no fewbits\.json"):
        read_ledger(tmp_path)


def sha256(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_codes_are_hashed_by_value_before_packing():
    scheme = QuantScheme(3, "group", 32, symmetric=False)
    weights = [quantize_tensor(torch.randn(4, 64), scheme) for _ in range(2)]
    codes = Codes.of(weights, stacked=True)
    assert (codes.scheme, codes.matrices, codes.shape) == ("w3-g32-asym", 2, (2, 4, 64))
    assert codes.codes == sha256(*(bytes(w.codes.flatten().tolist()) for w in weights))
    assert codes.zero_point == sha256(*(bytes(w.zero_point.flatten().tolist()) for w in weights))
    assert codes.scale == sha256(*(w.scale.numpy().tobytes() for w in weights))


def test_a_hash_is_of_the_values_in_row_major_order():
    tensor = torch.arange(12, dtype=torch.int16).view(3, 4)
    assert hash_tensor(tensor.t()) == hash_tensor(tensor.t().contiguous())
    assert hash_tensor(tensor.t()) != hash_tensor(tensor)
    assert hash_tensor(tensor) == sha256(tensor.numpy().tobytes())
    assert hash_tensor(torch.tensor(3.0)) == sha256(torch.tensor(3.0).numpy().tobytes())
    assert hash_tensor(torch.empty(0, 3)) == sha256()
    assert hash_tensors([tensor[0], tensor[1:]]) == hash_tensor(tensor)


def test_a_hash_tells_zero_from_minus_zero():
    assert hash_tensor(torch.tensor([0.0])) != hash_tensor(torch.tensor([-0.0]))


def test_a_file_is_hashed_as_a_whole(tmp_path):
    (tmp_path / "x").write_bytes(bytes(range(256)) * 5000)
    assert hash_file(tmp_path / "x") == sha256(bytes(range(256)) * 5000)
