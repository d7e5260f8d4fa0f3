"""Reading headers strictly, reading torch files safely, finding a model."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits import InputError, QuantScheme, quantize
from fewbits.checkpoint import hash_tensor, open_checkpoint, read_header, resolve
from fewbits.journal import Journal
from models import tiny_checkpoint

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw_file(folder: Path, header: Any, values: bytes = b"", *, length: int | None = None) -> Path:
    """A safetensors file from its parts; `length` overrides what it says of its header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / MODEL
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + values)
    return path


def folder_of(folder: Path, **shards: dict[str, torch.Tensor]) -> Path:
    """A checkpoint folder with one file per argument and an index over them."""
    (folder / "config.json").write_text("{}")
    weight_map = {}
    for shard, tensors in shards.items():
        save_file(tensors, folder / f"{shard}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"{shard}.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


# -- headers -------------------------------------------------------------------------------------


def test_a_header_gives_every_name_dtype_shape_and_its_own_size(tmp_path):
    tensors = {
        "a": torch.zeros(3, 5, dtype=torch.bfloat16), "b": torch.zeros((), dtype=torch.int64),
        "c": torch.zeros(0, 4), "d": torch.zeros(2, 2, dtype=torch.float8_e4m3fn),
    }  # fmt: skip
    save_file(tensors, tmp_path / MODEL, metadata={"format": "pt"})
    infos, header_bytes = read_header(tmp_path / MODEL)
    assert {i.name: (i.dtype, i.shape, i.size_bytes) for i in infos} == {
        name: (t.dtype, tuple(t.shape), t.nbytes) for name, t in tensors.items()
    }
    assert header_bytes + sum(i.size_bytes for i in infos) == (tmp_path / MODEL).stat().st_size


@pytest.mark.parametrize(
    ("header", "values"),
    [
        pytest.param(b"{not json", b"", id="no JSON"),
        pytest.param(b"\xff\xfe\xff", b"", id="no text"),
        pytest.param(b"[]", b"", id="a list"),
        pytest.param(b"[" * 100_000, b"", id="endless nesting"),
        pytest.param({"a": "F32"}, b"", id="an entry that is no object"),
        pytest.param({"a": F32 | {"dtype": "F37"}}, bytes(8), id="unknown dtype"),
        pytest.param({"a": F32 | {"dtype": ["F32"]}}, bytes(8), id="dtype that is a list"),
        pytest.param({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), id="no offsets"),
        pytest.param({"a": F32 | {"shape": [3]}}, bytes(8), id="shape against offsets"),
        pytest.param({"a": F32 | {"shape": [-2]}}, bytes(8), id="negative shape"),
        pytest.param({"a": F32 | {"shape": 2}}, bytes(8), id="shape that is a number"),
        pytest.param({"a": F32 | {"data_offsets": [8, 0]}}, bytes(8), id="offsets backwards"),
        pytest.param({"a": F32, "b": F32}, bytes(8), id="two at one place"),
        pytest.param({"a": F32, "b": F32 | {"data_offsets": [4, 12]}}, bytes(12), id="overlap"),
        pytest.param({"a": F32, "b": F32 | {"data_offsets": [12, 20]}}, bytes(20), id="gap"),
        pytest.param({"a": F32 | {"data_offsets": [4, 12]}}, bytes(12), id="gap at the start"),
        pytest.param({"a": F32}, bytes(12), id="bytes after the last"),
        pytest.param({"a": F32}, bytes(7), id="truncated values"),
        pytest.param({}, bytes(4), id="values of no tensor"),
    ],
)
def test_a_corrupt_header_is_refused_and_the_file_named(tmp_path, header, values):
    path = raw_file(tmp_path, header, values)
    with pytest.raises(InputError) as refused:
        read_header(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_file_that_the_corrupt_ones_are_made_from_is_accepted(tmp_path):
    infos, _ = read_header(raw_file(tmp_path, {"a": F32}, bytes(8)))
    assert [i.name for i in infos] == ["a"]


@pytest.mark.parametrize("length", [10**4, 2**63, 2**64 - 1])
def test_a_header_length_beyond_the_file_is_refused_without_reading_it(tmp_path, length):
    with pytest.raises(InputError, match="header does not fit"):
        read_header(raw_file(tmp_path, {"a": F32}, bytes(8), length=length))


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path = raw_file(tmp_path, {"a": F32}, bytes(8))
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"truncated or corrupt|corrupt header"):
            read_header(path)


# -- folders -------------------------------------------------------------------------------------


def test_a_sharded_folder_is_read_like_a_whole_one(tmp_path):
    folder = folder_of(tmp_path, one={"a": torch.arange(3)}, two={"b": torch.arange(4)})
    checkpoint = open_checkpoint(folder)
    assert {n: i.file for n, i in checkpoint.tensors.items()} == {
        "a": "one.safetensors",
        "b": "two.safetensors",
    }
    assert torch.equal(checkpoint.read("b"), torch.arange(4))


def test_a_missing_shard_is_named(tmp_path):
    folder = folder_of(tmp_path, one={"a": torch.arange(3)}, two={"b": torch.arange(4)})
    (folder / "two.safetensors").unlink()
    with pytest.raises(InputError, match=r"two\.safetensors is missing"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["../x.safetensors", "sub/x.safetensors", "{outside}/x.safetensors"])
def test_an_index_cannot_reach_outside_its_folder(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "sub").mkdir()
    name = name.format(outside=tmp_path)
    save_file({"a": torch.arange(3)}, folder / name)
    (folder / "config.json").write_text("{}")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InputError, match="is not the name of a file beside it") as refused:
        open_checkpoint(folder)
    assert name in str(refused.value)


def test_a_tensor_in_two_shards_is_named_with_both(tmp_path):
    folder = folder_of(
        tmp_path, one={"a": torch.arange(3)}, two={"a": torch.arange(3), "b": torch.ones(1)}
    )
    (folder / INDEX).write_text(
        json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})
    )
    with pytest.raises(InputError, match=r"two\.safetensors: tensor a is also in one\.safetensors"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "listed", [{"a": "one.safetensors", "c": "one.safetensors"}, {"b": "one.safetensors"}]
)
def test_an_index_that_lists_what_a_shard_does_not_hold_is_refused(tmp_path, listed):
    folder = folder_of(tmp_path, one={"a": torch.arange(3)})
    (folder / INDEX).write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(InputError, match=r"does not hold tensor [bc], which the index lists"):
        open_checkpoint(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a"]}])
def test_an_index_without_a_map_is_refused(tmp_path, index):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match="has no weight_map"):
        open_checkpoint(tmp_path)


def test_a_folder_without_config_is_refused(tmp_path):
    save_file({"a": torch.arange(3)}, tmp_path / MODEL)
    with pytest.raises(InputError, match=r"has no config\.json"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", [b"{", b"", b"[]", b"3", b"\xff"])
def test_a_config_that_is_no_json_object_is_refused(tmp_path, text):
    save_file({"a": torch.arange(3)}, tmp_path / MODEL)
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(InputError, match=r"config\.json (is not JSON|holds a)"):
        open_checkpoint(tmp_path)


def test_a_folder_without_weights_is_refused_and_told_what_is_accepted(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"has no weights; accepted are model\.safetensors or"):
        open_checkpoint(tmp_path)


# -- torch files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
def test_torch_files_are_read_whole_or_sharded(tmp_path, sharded):
    state = {"a": torch.randn(3, 4).bfloat16(), "b": torch.randn(4, 3).t(), "c": torch.tensor(7)}
    (tmp_path / "config.json").write_text("{}")
    if sharded:
        torch.save({"a": state["a"]}, tmp_path / "x-1.bin")
        torch.save({"b": state["b"], "c": state["c"]}, tmp_path / "x-2.bin")
        weight_map = {"a": "x-1.bin", "b": "x-2.bin", "c": "x-2.bin"}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tensors.keys() == state.keys()
    for name, tensor in state.items():
        info = checkpoint.tensors[name]
        assert (info.dtype, info.shape) == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(checkpoint.read(name), tensor)
        checkpoint.close()  # dropping the mapping between two reads must not matter


class _Hostile:
    """Pickles as a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_is_refused_and_runs_none(tmp_path, legacy):
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": _Hostile(tmp_path / "ran")}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match=r"pytorch_model\.bin cannot be read as tensors") as refused:
        open_checkpoint(tmp_path)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)  # it is hostile indeed
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [[torch.ones(2)], {"a": 3}, {"model": {"a": torch.ones(2)}}])
def test_a_torch_file_with_anything_but_tensors_by_name_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text("{}")
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="does not hold a plain dictionary of tensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("size", [0, 10, 500])
def test_a_truncated_torch_file_is_refused(tmp_path, size):
    (tmp_path / "config.json").write_text("{}")
    torch.save({"a": torch.randn(100)}, tmp_path / "pytorch_model.bin")
    os.truncate(tmp_path / "pytorch_model.bin", size)
    with pytest.raises(InputError, match="cannot be read as tensors"):
        open_checkpoint(tmp_path)


def test_an_old_torch_file_is_read_and_its_cost_noted(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    torch.save(
        {"a": torch.arange(5)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False
    )
    checkpoint = open_checkpoint(tmp_path)
    assert torch.equal(checkpoint.read("a"), torch.arange(5))
    assert [note.kind for note in checkpoint.notes] == ["fallback"]


def shared_storage() -> dict[str, dict[str, torch.Tensor]]:
    base = torch.arange(24.0).view(4, 6)
    return {
        "tied": {"a": base, "b": base},
        "a view of the start": {"a": base, "b": base[:2]},
        "a view of the middle": {"a": base, "b": base[1:3]},
        "transposed": {"a": base, "b": base.t()},
        "halves": {"a": base[:2], "b": base[2:]},
        "two empty ones": {"a": base[:0], "b": base[:0]},
    }


@pytest.mark.parametrize("kind", shared_storage())
def test_tensors_that_share_storage_in_a_torch_file_are_written_apart(tmp_path, kind):
    state = shared_storage()[kind]
    (tmp_path / "config.json").write_text("{}")
    torch.save(state, tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path)
    with Journal(tmp_path / "out") as journal:
        journal.begin({})
        for name in checkpoint.tensors:
            journal.add(name, checkpoint.read(name))
        journal.commit_step({})
        journal.write_shards()
        journal.commit()
    written = load_file(tmp_path / "out" / MODEL)
    assert written.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(written[name], tensor)


# -- finding a model -----------------------------------------------------------------------------


def test_a_folder_is_itself(tmp_path):
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path


def test_one_value_of_a_column_has_the_hash_of_that_value():
    column = torch.arange(3.0)[:, None].expand(3, 2).contiguous()[:, :1]
    assert hash_tensor(column[1:2]) == hash_tensor(torch.tensor([1.0]))


def test_a_file_is_refused_as_a_model(tmp_path):
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(InputError, match=r"is a file; accepted are a folder, a \.gguf file and"):
        resolve(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["two words", "a/b/c", "/no/such/folder", "a\nb", "hub:a/b"])
def test_a_name_that_can_be_no_model_is_refused_without_asking_the_hub(monkeypatch, name):
    monkeypatch.setattr("fewbits.checkpoint._download", lambda _: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match="no such folder; accepted are"):
        resolve(name)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty cache of hub models, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def put_snapshot(cache: Path, repository: str) -> Path:
    """The folder of a repository's snapshot, laid out as the hub's client does."""
    commit, folder = "0123456789" * 4, cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    return folder / "snapshots" / commit


def test_a_hub_id_is_served_from_the_cache_without_network(tmp_path, hub_cache):
    snapshot = put_snapshot(hub_cache, "owner/name")
    tiny_checkpoint(snapshot)
    assert resolve("owner/name").samefile(snapshot)
    result = quantize("owner/name", tmp_path / "out", scheme=QuantScheme(8))
    assert result.ledger.source["name"] == "owner/name"


def test_a_hub_id_that_cannot_be_had_is_one_clear_line(hub_cache):
    with pytest.raises(InputError) as refused:
        resolve("owner/name")
    message = str(refused.value)
    assert message.startswith("owner/name: no such folder, and the hub did not give it (")
    assert message.endswith("accepted are a folder and a hub id like owner/name")
    assert "\n" not in message


@pytest.fixture
def torn_snapshot(hub_cache):
    """A snapshot whose download broke off, and the shard that it lacks, as (path, content)."""
    snapshot = put_snapshot(hub_cache, "owner/name")
    tiny_checkpoint(snapshot, max_shard_size="100KB")
    lost = sorted(snapshot.glob("*.safetensors"))[-1]
    content = lost.read_bytes()
    lost.unlink()
    return snapshot, lost, content


def test_a_snapshot_with_a_shard_missing_is_refused_without_network(torn_snapshot):
    with pytest.raises(InputError, match="owner/name: no such folder, and the hub did not give it"):
        resolve("owner/name")


def test_a_snapshot_with_a_shard_missing_is_completed_from_the_hub(torn_snapshot, monkeypatch):
    snapshot, lost, content = torn_snapshot
    names = [lost.name, *(path.name for path in snapshot.iterdir())]

    def download(_: str, *, local_files_only: bool = False, **__: Any) -> str:
        if not local_files_only:
            lost.write_bytes(content)
        return str(snapshot)

    listed = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: listed)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    open_checkpoint(resolve("owner/name"))
