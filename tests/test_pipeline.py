"""quantize() accounts for everything, twice the same, all or nothing; quantize_() in memory."""

import copy
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fewbits import (
    RTN,
    InputError,
    QuantizedLinear,
    QuantScheme,
    VerificationError,
    load,
    quantize,
    quantize_,
    quantize_tensor,
)
from fewbits.ledger import Codes, read_ledger
from models import VOCABULARY, tiny_checkpoint, tiny_model

G32, W8 = QuantScheme(4, "group", 32), QuantScheme(8)
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny llama, not to be changed."""
    return tiny_checkpoint(tmp_path_factory.mktemp("source") / "tiny-llama")


@pytest.fixture
def own_source(source, tmp_path):
    """A tiny llama, to be changed."""
    return Path(shutil.copytree(source, tmp_path / "tiny-llama"))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}


def contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "run.json")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


# -- the ledger ----------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("max_shard_bytes", [2**28, 20_000])
def test_the_ledger_accounts_for_every_tensor_and_byte_of_both_sides(
    tmp_path, model_type, max_shard_bytes
):
    tiny_checkpoint(tmp_path / "model", model_type)
    result = quantize(tmp_path / "model", tmp_path / "out", scheme=G32, max_shard_bytes=max_shard_bytes)
    ledger, before, after = result.ledger, tensors_of(tmp_path / "model"), tensors_of(tmp_path / "out")
    assert ledger == read_ledger(tmp_path / "out")
    assert sorted(ledger.tensors) == sorted(before)
    written = [w.name for entry in ledger.tensors.values() for w in entry.written]
    assert sorted(written) == sorted(after)  # each once
    assert {entry.outcome for entry in ledger.tensors.values()} == {"quantized", "copied"}

    def file_values(folder: Path) -> int:
        files = [path.read_bytes() for path in folder.glob("*.safetensors")]
        return sum(len(content) - 8 - int.from_bytes(content[:8], "little") for content in files)

    totals = ledger.totals
    assert totals["source_bytes"] == file_values(tmp_path / "model")
    assert totals["written_bytes"] == file_values(tmp_path / "out")
    assert totals["quantized"] + totals["copied"] == totals["source_tensors"] == len(before)
    for name, entry in ledger.tensors.items():
        assert (entry.size_bytes, entry.shape) == (before[name].nbytes, tuple(before[name].shape))
        if entry.outcome == "copied":
            assert after[name].dtype == before[name].dtype
            assert torch.equal(after[name], before[name])


@pytest.mark.parametrize("label", ["w4-g32", "w3-g32-asym", "w8-channel", "w8-tensor", "w2-channel"])
def test_the_written_codes_are_those_of_the_source_weight_rounded_to_nearest(source, tmp_path, label):
    scheme = QuantScheme.parse(label)
    result = quantize(source, tmp_path / "out", scheme=scheme)
    before = tensors_of(source)
    linears = {name for name in before if "_proj" in name}
    assert {n for n, e in result.ledger.tensors.items() if e.quantized} == linears
    for name in linears:
        expected = Codes.of([quantize_tensor(before[name], scheme)], stacked=False)
        assert result.ledger.tensors[name].quantized == expected


def test_the_result_tells_sizes_of_whole_files(source, tmp_path):
    result = quantize(source, tmp_path / "out", scheme=G32)
    size = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert result.weight_bytes == size
    assert result.source_weight_bytes == (source / "model.safetensors").stat().st_size
    parameters = sum(p.numel() for p in tiny_model("llama").parameters())
    assert result.bits_per_weight == 8 * size / parameters
    assert not result.reused
    json.dumps(result.to_json())


def test_no_path_of_this_machine_is_written(source, tmp_path):
    quantize(source, tmp_path / "out", scheme=G32)
    for content in contents(tmp_path / "out").values():
        assert str(tmp_path).encode() not in content
        assert str(source.parent).encode() not in content


# -- the same again ------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_the_same_input_gives_the_same_bytes(tmp_path, model_type):
    tiny_checkpoint(tmp_path / "model", model_type)
    for out in ("one", "two"):
        quantize(tmp_path / "model", tmp_path / out, scheme=G32, max_shard_bytes=50_000)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("kind", ["sharded", "torch", "torch sharded"])
def test_another_container_of_the_same_weights_gives_the_same_files(source, tmp_path, kind):
    folder, weights = tmp_path / "tiny-llama", tensors_of(source)
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    shutil.copy(source / "generation_config.json", folder)
    half = len(weights) // 2
    parts = [dict(list(weights.items())[:half]), dict(list(weights.items())[half:])]
    suffix = "safetensors" if kind == "sharded" else "bin"
    stem = "model" if kind == "sharded" else "pytorch_model"
    save = save_file if kind == "sharded" else torch.save
    if kind == "torch":
        save(weights, folder / "pytorch_model.bin")
    else:
        for i, part in enumerate(parts):
            save(part, folder / f"part-{i}.{suffix}")
        places = {name: f"part-{i}.{suffix}" for i, part in enumerate(parts) for name in part}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": places}))

    quantize(source, tmp_path / "expected", scheme=G32)
    result = quantize(folder, tmp_path / "out", scheme=G32)
    expected, found = contents(tmp_path / "expected"), contents(tmp_path / "out")
    assert expected.keys() == found.keys()
    assert {name for name in found if found[name] != expected[name]} == {"fewbits.json"}
    entries = read_ledger(tmp_path / "expected").tensors
    assert result.ledger.tensors == entries  # only the source's files differ


# -- an OUT that exists --------------------------------------------------------------------------


@pytest.mark.parametrize("content", [None, "config.json", "notes.txt"])
def test_an_out_that_fewbits_did_not_write_is_refused_and_left_alone(source, tmp_path, content):
    out = tmp_path / "out"
    out.mkdir()
    if content is not None:
        (out / content).write_text("{}")
    before = contents(out)
    with pytest.raises(InputError, match="out exists and was not written by fewbits; accepted is"):
        quantize(source, out, scheme=G32)
    assert contents(out) == before


def test_the_finished_result_of_the_same_run_is_verified_and_reused(source, tmp_path):
    first = quantize(source, tmp_path / "out", scheme=G32, overrides=(("*.down_proj", W8),))
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    again = quantize(source, tmp_path / "out", scheme=G32, overrides=(("*.down_proj", W8),))
    assert again.reused
    assert again.ledger == first.ledger
    assert again.verification.codes == 14
    assert again.verification.source_tensors == 21
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == times


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        ({"scheme": W8}, "scheme was 'w4-g32' and is 'w8-channel' now"),
        ({"head": True}, "head was False and is True now"),
        ({"format": "fewbits"}, "format was 'compressed-tensors' and is 'fewbits' now"),
        (
            {"overrides": (("*.q_proj", None),)},
            r"overrides was \[\] and is \[\['\*\.q_proj', 'float'\]\] now",
        ),
    ],
)
def test_the_result_of_other_arguments_is_refused_and_the_difference_named(
    source, tmp_path, arguments, difference
):
    quantize(source, tmp_path / "out", scheme=G32)
    before = contents(tmp_path / "out")
    with pytest.raises(InputError, match=rf"out holds another run: request\.{difference}; accepted is"):
        quantize(source, tmp_path / "out", **{"scheme": G32} | arguments)
    assert contents(tmp_path / "out") == before


def test_the_result_of_another_source_is_refused(own_source, tmp_path):
    quantize(own_source, tmp_path / "out", scheme=G32)
    config = json.loads((own_source / "config.json").read_text())
    (own_source / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.raises(
        InputError, match=r"holds another run: source\.config_sha256 was .* now; accepted is"
    ):
        quantize(own_source, tmp_path / "out", scheme=G32)


def test_a_result_whose_source_has_other_values_by_now_is_refused(own_source, tmp_path):
    quantize(own_source, tmp_path / "out", scheme=G32)
    tensors = tensors_of(own_source)
    tensors[f"{DOWN}.weight"][0, 0] += 1
    save_file(tensors, own_source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=rf"source tensor {DOWN}\.weight has other values"):
        quantize(own_source, tmp_path / "out", scheme=G32)


def test_a_finished_result_that_was_damaged_is_not_reused(source, tmp_path):
    quantize(source, tmp_path / "out", scheme=G32)
    with (tmp_path / "out" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    with pytest.raises(VerificationError, match="has other values"):
        quantize(source, tmp_path / "out", scheme=G32)


# -- errors --------------------------------------------------------------------------------------


def spoil(folder: Path, name: str, value: float) -> None:
    tensors = tensors_of(folder)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("label", ["w4-g32", "w8-tensor", "w4-channel-asym"])
def test_a_weight_that_is_not_finite_is_named_and_nothing_left_behind(
    own_source, tmp_path, value, label
):
    spoil(own_source, f"{DOWN}.weight", value)
    with pytest.raises(
        InputError, match=rf"model\.safetensors: {DOWN}\.weight: the weight contains NaN or infinity"
    ):
        quantize(own_source, tmp_path / "out", scheme=QuantScheme.parse(label), max_shard_bytes=10_000)
    assert list(tmp_path.iterdir()) == [own_source]


def test_a_copied_parameter_that_is_not_finite_is_refused(own_source, tmp_path):
    spoil(own_source, "model.norm.weight", float("nan"))
    with pytest.raises(InputError, match=r"model\.norm\.weight contains NaN or infinity"):
        quantize(own_source, tmp_path / "out", scheme=G32)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", ["quantize", "verify"])
def test_after_an_interruption_the_same_call_goes_on(source, tmp_path, stage):
    def interrupt(what: str, done: int, total: int) -> None:
        if what == stage and done == total // 2:
            assert list(tmp_path.iterdir())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", scheme=G32, max_shard_bytes=10_000, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    result = quantize(source, tmp_path / "out", scheme=G32, max_shard_bytes=10_000)
    assert result.run["resumed_steps"] > 0
    quantize(source, tmp_path / "whole", scheme=G32, max_shard_bytes=10_000)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_forward_pass_for_which_there_is_no_memory_is_said_to_be_left_out(
    source, tmp_path, monkeypatch
):
    def forward(_folder):
        ran.append(_folder.name)

    ran: list[str] = []
    monkeypatch.setattr("fewbits.steps.check_forward", forward)
    kept = quantize(source, tmp_path / "one", scheme=G32).ledger.notes
    assert ran == ["result"]
    monkeypatch.setattr("fewbits.steps.available_bytes", lambda: 0)
    notes = quantize(source, tmp_path / "two", scheme=G32).ledger.notes
    assert ran == ["result"]
    (more,) = [note for note in notes if note not in kept]
    assert (more.kind, more.where) == ("skip", "forward")


# -- files beside the weights --------------------------------------------------------------------


def test_what_clients_need_beside_weights_is_carried_over_bit_for_bit(own_source, tmp_path):
    carried = [
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
        "tokenizer.model", "chat_template.jinja", "additional_chat_templates/tools.jinja", "LICENSE",
    ]  # fmt: skip
    left = ["README.md", "training.py", "optimizer.pt", "events.log"]
    for i, name in enumerate(carried + left):
        (own_source / name).parent.mkdir(exist_ok=True)
        (own_source / name).write_bytes(bytes([i, 0, 255]) * 1000 + "größer\r\n".encode())
    quantize(own_source, tmp_path / "out", scheme=G32)
    before, after = contents(own_source), contents(tmp_path / "out")
    for name in [*carried, "generation_config.json"]:
        assert after[name] == before[name], name
    assert after.keys() == {
        *carried, "generation_config.json", "config.json", "fewbits.json", "model.safetensors",
    }  # fmt: skip


def test_the_config_is_the_sources_with_the_quantization_added(source, tmp_path):
    quantize(source, tmp_path / "out", scheme=G32)
    before = json.loads((source / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert after == before


# -- overrides -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["compressed-tensors", "fewbits"])
def test_overrides_show_in_the_ledger_and_in_the_loaded_model(source, tmp_path, layout):
    overrides = (("*.q_proj", W8), (r"re:.*\.1\.mlp\.up_proj", QuantScheme(2, "group", 32, False)))
    result = quantize(source, tmp_path / "out", scheme=G32, overrides=overrides, format=layout)
    assert result.ledger.request["overrides"] == [
        ["*.q_proj", "w8-channel"], [r"re:.*\.1\.mlp\.up_proj", "w2-g32-asym"],
    ]  # fmt: skip
    expected = {f"model.layers.{i}.self_attn.q_proj": "w8-channel" for i in range(2)}
    expected |= {"model.layers.1.mlp.up_proj": "w2-g32-asym", "model.layers.0.mlp.up_proj": "w4-g32"}
    loaded = load(tmp_path / "out")
    for module, label in expected.items():
        assert result.ledger.tensors[f"{module}.weight"].quantized.scheme == label
        assert loaded.get_submodule(module).scheme.label == label


@pytest.mark.parametrize(
    ("model_type", "pattern", "count"),
    [
        ("llama", "*.q_proj", 2),
        ("llama", "*.down_proj", 2),
        ("llama", "model.layers.0.*", 7),
        ("gpt2", "*.mlp.*", 4),
    ],
)
def test_a_weight_kept_in_float_shows_in_the_ledger_and_in_the_loaded_model(
    tmp_path, model_type, pattern, count
):
    tiny_checkpoint(tmp_path / "model", model_type)
    result = quantize(tmp_path / "model", tmp_path / "out", scheme=G32, overrides=((pattern, None),))
    loaded = load(tmp_path / "out")
    state = tensors_of(tmp_path / "model")
    floats = {
        name: m
        for name, m in loaded.named_modules()
        if isinstance(m, nn.Linear | Conv1D) and "weight" in m._parameters and name != "lm_head"
    }
    assert len(floats) == count
    for name, module in floats.items():
        assert result.ledger.tensors[f"{name}.weight"].outcome == "copied"
        assert torch.equal(module.weight, state[f"{name}.weight"])


@pytest.mark.parametrize("layout", [None, "fewbits"])
@pytest.mark.parametrize(
    ("pattern", "scheme"),
    [
        pytest.param("*.experts", None, id="all experts float"),
        pytest.param("*.layers.0.*", None, id="a block float"),
        pytest.param("*.w1.weight", None, id="half of a fused parameter float"),
        pytest.param("*.experts.0.*", None, id="one expert float"),
        pytest.param("*.w1.weight", W8, id="half of a fused parameter in another scheme"),
        pytest.param("*.experts.0.*", W8, id="one expert in another scheme"),
    ],
)
def test_overrides_of_experts_are_refused_before_work_or_give_what_can_be_loaded(
    tmp_path, layout, pattern, scheme
):
    tiny_checkpoint(tmp_path / "model", "mixtral")
    try:
        quantize(
            tmp_path / "model",
            tmp_path / "out",
            scheme=G32,
            overrides=((pattern, scheme),),
            format=layout,
        )
    except InputError:
        assert [p.name for p in tmp_path.iterdir()] == ["model"]
    else:
        logits = load(tmp_path / "out")(torch.arange(8)[None]).logits
        assert bool(torch.isfinite(logits).all())


def test_an_override_that_quantizes_a_tied_head_unties_it(tmp_path):
    tiny_checkpoint(tmp_path / "model", "qwen3")
    tensors = tensors_of(tmp_path / "model")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # stored all the same
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    quantize(tmp_path / "model", tmp_path / "out", scheme=G32, overrides=(("lm_head", W8),))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False  # or clients would take the embeddings instead


# -- memory --------------------------------------------------------------------------------------

_MEASURE = """
import sys, threading, time
from pathlib import Path
import fewbits.steps
from fewbits import QuantScheme, quantize

fewbits.steps.available_bytes = lambda: 0  # the result as a whole is not run: that takes its memory

def anonymous():
    line = next(l for l in open("/proc/self/status") if l.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

def peak(model, out):
    highest, done = 0, threading.Event()
    def watch():
        nonlocal highest
        while not done.is_set():
            highest = max(highest, anonymous())
            time.sleep(0.001)
    thread = threading.Thread(target=watch)
    thread.start()
    quantize(model, out, scheme=QuantScheme(4, "group", 128), max_shard_bytes=4_000_000)
    done.set()
    thread.join()
    return highest

folder = Path(sys.argv[1])
peak(folder / "2", folder / "warm")  # imports and pools come first
print(peak(folder / "2", folder / "2-out"), peak(folder / "12", folder / "12-out"))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is read from /proc")
def test_anonymous_memory_does_not_grow_with_the_number_of_blocks(tmp_path):
    for blocks in (2, 12):
        tiny_checkpoint(
            tmp_path / str(blocks), num_hidden_layers=blocks, hidden_size=512, intermediate_size=1024,
            num_attention_heads=8, num_key_value_heads=8, head_dim=64,
        )  # fmt: skip
    command = [sys.executable, "-c", _MEASURE, str(tmp_path)]
    # glibc returns what is freed at once: the peak is what is in use, and the same again within 0.3 MB.
    glibc = {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | glibc)
    small, large = (int(word) for word in done.stdout.split())
    weights = (tmp_path / "12" / "model.safetensors").stat().st_size
    codes = sum(p.stat().st_size for p in (tmp_path / "12-out").glob("*.safetensors"))
    assert (weights, codes) > (60_000_000, 15_000_000)
    # Ten more blocks are 52 MB of weights and 13 MB of codes. Two blocks do not fill a shard: one of
    # difference is sound. It has room for ledger and module tree, 0.1 MB per block (2026-11-23).
    assert large - small < 4_000_000


# -- in memory -----------------------------------------------------------------------------------


def dequantized(weight: Tensor, scheme: QuantScheme) -> Tensor:
    return quantize_tensor(weight, scheme).dequantize()


def with_dequantized_weights(model: nn.Module, scheme: QuantScheme) -> nn.Module:
    """The float model that `quantize_` should equal, without its help."""
    head = model.get_output_embeddings()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) and module is not head:
                module.weight.copy_(dequantized(module.weight, scheme))
            elif isinstance(module, Conv1D):
                module.weight.copy_(dequantized(module.weight.t(), scheme).t())
        for name, parameter in model.named_parameters():
            if parameter.ndim == 3:
                assert "experts" in name
                parameter.copy_(torch.stack([dequantized(expert, scheme) for expert in parameter]))
    return model


@pytest.mark.parametrize("label", ["w4-g32", "w8-channel", "w3-g32-asym", "w8-tensor"])
@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", "llama"])
@torch.no_grad()
def test_a_model_quantized_in_place_computes_what_its_dequantized_weights_do(model_type, label):
    scheme, ids = QuantScheme.parse(label), torch.arange(1, 17)[None] * 7 % VOCABULARY
    model = tiny_model(model_type).float()
    reference = with_dequantized_weights(copy.deepcopy(model), scheme)
    reference.config._experts_implementation = "eager"  # the default has no float64
    single = reference(ids).logits.double()
    exact = reference.double()(ids).logits
    assert quantize_(model, scheme) is model
    others = [m for n, m in model.named_modules() if n != "lm_head" and isinstance(m, nn.Linear)]
    assert others
    assert all(isinstance(m, QuantizedLinear) for m in others)
    # The same operations on the same weights with sums in another order: rounding errors add up like a
    # random walk, and a sum one by one errs at most sqrt(16) times as much as one in 16 lanes.
    assert (model(ids).logits - exact).abs().max() <= 4 * (single - exact).abs().max()


def test_a_plain_module_is_quantized_and_its_biases_kept():
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Sequential(nn.Linear(32, 8, bias=False)))
    weights = [model[0].weight.detach().clone(), model[2][0].weight.detach().clone()]
    bias, x = model[0].bias.detach().clone(), torch.randn(5, 64)
    quantize_(model, G32)
    assert [type(m) for m in (model[0], model[2][0])] == [QuantizedLinear] * 2
    first, second = (dequantized(w, G32).double() for w in weights)
    hidden = x.double() @ first.t() + bias
    exact = hidden.relu() @ second.t()
    # A sum of n products errs by at most (n + 1) eps of its terms' sizes; the second layer adds to it.
    eps, sizes = torch.finfo(torch.float32).eps, x.double().abs() @ first.abs().t() + bias.abs()
    bound = (66 * eps * sizes) @ second.abs().t() + 34 * eps * (hidden.abs() @ second.abs().t())
    assert bool(((model(x) - exact).abs() <= bound).all())


def test_overrides_and_head_are_obeyed_in_memory():
    model = quantize_(
        tiny_model("llama"), G32, overrides=(("*.q_proj", None), ("*.o_proj", W8)), head=True
    )
    attention = model.model.layers[1].self_attn
    assert type(attention.q_proj) is nn.Linear
    assert attention.o_proj.scheme == W8
    assert attention.k_proj.scheme == G32
    assert model.lm_head.scheme == G32


def test_a_tied_head_is_quantized_apart_from_its_embeddings():
    model = tiny_model("qwen3")
    embeddings = model.get_input_embeddings().weight
    before = embeddings.detach().clone()
    assert model.lm_head.weight is embeddings
    quantize_(model, G32, head=True)
    assert isinstance(model.lm_head, QuantizedLinear)
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_a_module_that_is_called_from_two_places_is_replaced_in_both():
    shared = nn.Linear(64, 64)
    model = quantize_(nn.Sequential(shared, nn.ReLU(), shared), G32)
    assert model[0] is model[2]
    assert isinstance(model[2], QuantizedLinear)


def plain_model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 16))


def spoilt_model() -> nn.Module:
    model = tiny_model("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 5, 7] = torch.nan
    return model


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (plain_model, {"scheme": G32}, r"1\.weight: .*group_size 32 does not divide 48"),
        (plain_model, {"scheme": W8, "overrides": (("2", None),)}, "pattern '2' matches no"),
        (spoilt_model, {"scheme": G32}, r"model\.layers\.1\.mlp\.experts\.down_proj: .*NaN"),
        (spoilt_model, {"scheme": QuantScheme(4, "group", 64)}, "does not divide"),
    ],
)
def test_an_error_leaves_the_model_as_it_was(make: Any, arguments, message):
    model = make()
    modules = [(name, type(module)) for name, module in model.named_modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        quantize_(model, **arguments)
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(), state[name].nan_to_num())


def test_a_linear_itself_is_refused_with_what_to_use():
    with pytest.raises(InputError, match=r"itself a linear; use QuantizedLinear\.from_float"):
        quantize_(nn.Linear(64, 64), G32)


def test_a_source_file_stays_as_it_was(source, tmp_path):
    before = contents(source)
    quantize(source, tmp_path / "out", scheme=G32)
    assert contents(source) == before
    with safe_open(source / "model.safetensors", "pt") as file:  # and is not held open for writing
        assert len(file.keys()) == 21


# -- what is written must compute ----------------------------------------------------------------


@pytest.mark.parametrize("unfinished", [False, True])
def test_restart_throws_away_what_is_there_but_not_before_all_is_read(source, tmp_path, unfinished):
    def stop(what: str, done: int, total: int) -> None:
        if what == "verify":
            raise KeyboardInterrupt

    if unfinished:
        with pytest.raises(KeyboardInterrupt):
            quantize(source, tmp_path / "out", scheme=G32, progress=stop)
    else:
        quantize(source, tmp_path / "out", scheme=G32)
    before = contents(tmp_path)
    for arguments in ({"scheme": QuantScheme(4, "group", 7)}, {"scheme": W8, "calibration": "no.txt"}):
        with pytest.raises(InputError):
            quantize(source, tmp_path / "out", restart=True, **arguments)
        assert contents(tmp_path) == before
    result = quantize(source, tmp_path / "out", scheme=W8, restart=True)
    assert result.ledger.request["scheme"] == "w8-channel"
    assert (result.run["resumed_steps"], result.reused) == (0, False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_how_much_memory_a_run_took_is_told(source, tmp_path):
    result = quantize(source, tmp_path / "out", scheme=G32, max_memory=3 * 10**9)
    assert result.run == json.loads((tmp_path / "out" / "run.json").read_text())
    assert result.run["max_memory"] == 3 * 10**9
    memory = result.run["memory_bytes"]
    assert 10**8 < memory["before"] <= memory["peak"] < 3 * 10**9
    assert result.run["resumed_steps"] == 0


@dataclass(frozen=True, slots=True)
class Overflowing(RTN):
    """Rounding to nearest whose scale is too large for one weight."""

    def __call__(self, weight, scheme, stats, scale_dtype=None):
        rounded, notes = super(Overflowing, self).__call__(weight, scheme, stats, scale_dtype)
        if weight.shape[1] == 96:  # down_proj
            rounded = replace(rounded, scale=(rounded.scale.float() + 1e38 * 4).to(rounded.scale.dtype))
        return rounded, notes


def test_a_scale_beyond_what_its_dtype_holds_is_refused_and_the_weight_named(source, tmp_path):
    with pytest.raises(InputError) as refused:
        quantize(source, tmp_path / "out", method=Overflowing(), scheme=G32)
    name = DOWN.replace("layers.1", "layers.0")
    assert str(refused.value) == (
        f"{name}.weight_scale would hold NaN or infinity: a value is beyond what torch.bfloat16 holds; "
        f"accepted is to leave {name}.weight in float"
    )
    assert not list(tmp_path.iterdir())


def test_a_result_that_does_not_compute_is_never_at_out(tmp_path):
    folder = tiny_checkpoint(tmp_path / "model")
    tensors = tensors_of(folder)
    for name in ("gate", "up"):
        tensors[DOWN.replace("down", name) + ".weight"] *= 1e30  # finite, and so are their scales
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match="result gives logits that are not finite"):
        quantize(folder, tmp_path / "out", scheme=G32)
    assert not (tmp_path / "out").exists()
