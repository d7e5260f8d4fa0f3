"""--method llm-int8: which columns stay in 16 bit, what is written of them, and what is refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits import InputError, QuantizedLinear, QuantScheme, VerificationError, load, quantize, verify
from fewbits import stream as stream_room
from fewbits.checkpoint import hash_file, hash_json, hash_tensor
from fewbits.methods import LLMInt8
from fewbits.scheme import InputScheme
from models import tiny_checkpoint

IDS = torch.randint(48, (4, 32), generator=torch.Generator().manual_seed(3))
STATIC = QuantScheme.parse("w8-channel-a8-token-t2-static")
FIRST = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def static(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("static") / "out"
    return quantize(source, out, method="llm-int8", scheme=STATIC, calibration=IDS)


def tensors(folder):
    return load_file(folder / "model.safetensors")


@torch.no_grad()
def largest_inputs(folder, ids, matching=""):
    """The largest |x| of each input column, by linear, of the whole float model."""
    model, found = load(folder, dtype=torch.float32), {}

    def record(name):
        def hook(_module, args):
            x = args[0].reshape(-1, args[0].shape[-1]).abs().amax(0)
            found[name] = torch.maximum(found[name], x) if name in found else x

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and matching in name:
            module.register_forward_pre_hook(record(name))
    model(ids, use_cache=False)
    return found


# -- which columns -------------------------------------------------------------------------------------


def test_static_columns_are_those_whose_inputs_were_above_the_threshold(source, tmp_path, monkeypatch):
    monkeypatch.setattr(stream_room, "fast_dtype", lambda *_: None)  # its rounding moves inputs
    out = tmp_path / "out"
    result = quantize(source, out, method="llm-int8", scheme=STATIC, calibration=IDS)
    fitted = IDS[:-1]  # the last sample is held out
    written, seen = tensors(out), largest_inputs(source, fitted, "layers.0.")
    checked = 0
    for name, absmax in seen.items():
        if "down_proj" in name or "o_proj" in name:
            continue  # behind float products in another order: a value may fall on the other side
        if bool(((absmax - 2).abs() < 0.05).any()):  # hidden states are rounded to bfloat16 first
            absmax = absmax.where((absmax - 2).abs() >= 0.05, 0)
            expected = set((absmax > 2).nonzero()[:, 0].tolist())
            assert expected <= set(written[f"{name}.weight_outlier_columns"].tolist())
        else:
            expected = (absmax > 2).nonzero()[:, 0].tolist()
            assert written[f"{name}.weight_outlier_columns"].tolist() == expected
        checked += 1
    assert checked == 5
    kept = sum(m["outliers"] for block in result.ledger.blocks for m in block["matrices"])
    assert kept == sum(len(t) for n, t in written.items() if n.endswith("_outlier_columns")) > 0


def test_kept_columns_are_the_sources_bit_for_bit_and_their_codes_stand_for_zero(source, static):
    written, floats = tensors(static.out), tensors(source)
    names = [name for name in written if name.endswith("_outliers")]
    assert len(names) == 14
    model = load(static.out)
    for name in names:
        base = name.removesuffix("_outliers")
        columns = written[f"{base}_outlier_columns"].long()
        assert torch.equal(written[name], floats[base][:, columns])
        linear = model.get_submodule(base.removesuffix(".weight"))
        assert isinstance(linear, QuantizedLinear)
        dense = linear.weight
        assert torch.equal(dense[:, columns], floats[base][:, columns])
        rest = torch.ones(dense.shape[1], dtype=torch.bool)
        rest[columns] = False
        # Scales need not cover what is kept.
        scale = written[f"{base}_scale"].float()
        absmax = floats[base][:, rest].float().abs().amax(1, keepdim=True)
        assert bool(((scale * 127 / absmax - 1).abs() <= torch.finfo(torch.bfloat16).eps).all())


def test_without_a_large_input_it_is_plain_w8a8_and_says_so(source, tmp_path):
    scheme = replace(STATIC, inputs=InputScheme("token", 1e4, True))
    result = quantize(source, tmp_path / "out", method="llm-int8", scheme=scheme, calibration=IDS)
    assert not any("outlier" in name for name in tensors(tmp_path / "out"))
    assert any("leave out that inputs" in note.what for note in result.ledger.notes)
    assert any("plain W8A8" in note.what for note in result.ledger.notes)
    scheme = QuantScheme.parse("w8-channel-a8-token")
    plain = quantize(source, tmp_path / "plain", method="llm-int8", scheme=scheme, format="fewbits")
    ours, theirs = tensors(tmp_path / "out"), tensors(plain.out)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_calibration_decides_between_columns_found_once_and_in_each_call(source, tmp_path):
    dynamic = quantize(source, tmp_path / "dynamic", method="llm-int8")
    static = quantize(source, tmp_path / "static", method="llm-int8", calibration=IDS)
    assert dynamic.ledger.request["scheme"] == "w8-channel-a8-token-t6"
    assert static.ledger.request["scheme"] == "w8-channel-a8-token-t6-static"
    assert load(tmp_path / "dynamic").model.layers[0].mlp.up_proj.scheme.inputs == InputScheme()


def test_experts_in_one_tensor_have_their_columns_in_common(tmp_path):
    source = tiny_checkpoint(tmp_path / "source", "gpt_oss")
    out = tmp_path / "out"
    quantize(source, out, method="llm-int8", scheme=STATIC, calibration=IDS)
    verify(out, source)
    stacks = [t for n, t in tensors(out).items() if n.endswith("_outlier_columns") and t.ndim == 2]
    assert stacks
    assert all(bool((stack == stack[0]).all()) for stack in stacks)
    load(out)(IDS)


@pytest.mark.parametrize("ids", [IDS, IDS[:2, :2]], ids=["all reached", "some experts starved"])
@pytest.mark.parametrize("model_type", ["gpt_oss", "mixtral", "qwen3_moe"])
def test_experts_that_saw_nothing_do_not_end_the_run(tmp_path, model_type, ids):
    source = tiny_checkpoint(tmp_path / "source", model_type)
    out = tmp_path / "out"
    result = quantize(source, out, method="llm-int8", scheme=STATIC, calibration=ids)
    verify(out, source)
    assert bool(load(out)(IDS).logits.isfinite().all())
    matrices = [m for block in result.ledger.blocks for m in block["matrices"]]
    unseen = [m for m in matrices if m["steps"]]
    # Nobody knows their outliers: they are looked for in each call, not taken for absent.
    assert all(m["scheme"] == STATIC.dynamic.label for m in unseen)
    seen = [m for m in matrices if not m["steps"]]
    assert all(m["scheme"] == STATIC.label for m in seen)
    if len(ids) == 2:
        assert any(m["tokens"] == 0 for m in matrices)
        assert bool(unseen) == (model_type != "gpt_oss")  # in one tensor all have the same columns


@pytest.mark.parametrize(
    ("model_type", "changes"), [("llama", {}), ("opt", {"word_embed_proj_dim": 32})]
)
def test_what_calibration_does_not_reach_looks_for_outliers_in_each_call(tmp_path, model_type, changes):
    source = tiny_checkpoint(tmp_path / "source", model_type, **changes)
    out = tmp_path / "out"
    result = quantize(source, out, method="llm-int8", scheme=STATIC, calibration=IDS, head=True)
    verify(out, source)
    config = json.loads((out / "config.json").read_text())["quantization_config"]["weights"]
    outside = [name for name in config if ".layers." not in name]
    assert outside
    assert {config[name] for name in outside} == {STATIC.dynamic.label}
    assert {config[name] for name in config if name not in outside} == {STATIC.label}
    assert any(note.where in outside and note.kind == "fallback" for note in result.ledger.notes)
    load(out)(IDS)


# -- what is proven ------------------------------------------------------------------------------------


def tampered(out, folder, name, change):
    """A copy with one tensor changed and every file hash made to fit; the ledger's are not."""
    shutil.copytree(out, folder)
    weights = tensors(folder)
    weights[name] = change(weights[name])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    ledger = json.loads((folder / "fewbits.json").read_text())
    ledger["files"]["model.safetensors"] |= {
        "sha256": hash_file(folder / "model.safetensors"),
        "size_bytes": (folder / "model.safetensors").stat().st_size,
    }
    for entry in ledger["tensors"].values():
        for written in entry["written"]:
            if written["name"] == name:
                written["sha256"] = hash_tensor(weights[name])
    ledger.pop("sha256")
    (folder / "fewbits.json").write_text(json.dumps(ledger | {"sha256": hash_json(ledger)}))
    return folder


@pytest.mark.parametrize(
    ("suffix", "change"),
    [("_outliers", lambda t: t * 2), ("_outlier_columns", lambda t: (t + 1) % 64)],
)
def test_a_changed_column_is_found(static, tmp_path, suffix, change):
    folder = tampered(static.out, tmp_path / "copy", FIRST + suffix, change)
    with pytest.raises(VerificationError, match="outliers read back are not those"):
        verify(folder)


def test_the_ledger_accounts_for_the_kept_columns(source, static):
    verify(static.out, source)
    entry = static.ledger.tensors[FIRST]
    assert {w.name.removeprefix(FIRST) for w in entry.written} == {
        "", "_scale", "_shape", "_outliers", "_outlier_columns",
    }  # fmt: skip
    assert entry.quantized is not None
    assert entry.quantized.outliers is not None


# -- what is refused -----------------------------------------------------------------------------------


def test_it_is_never_labelled_as_what_its_integers_alone_would_be(source, static, tmp_path):
    config = json.loads((static.out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "fewbits"
    assert config["quantization_config"]["weights"][FIRST] == STATIC.label
    with pytest.raises(InputError, match="have no layout in pack-quantized"):
        quantize(source, tmp_path / "out", method="llm-int8", format="compressed-tensors")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "llm-int8", "scheme": QuantScheme(8)}, "says nothing of inputs"),
        ({"method": "rtn", "scheme": STATIC, "calibration": IDS}, "for method llm-int8"),
        ({"method": "gptq", "scheme": STATIC, "calibration": IDS}, "for method llm-int8"),
        ({"method": "llm-int8", "scheme": STATIC}, "needs calibration"),
        (
            {"method": "llm-int8", "scheme": QuantScheme(8, inputs=InputScheme()), "calibration": IDS},
            "takes no calibration",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(source, tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        quantize(source, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_the_schemes_decide_what_is_collected(source, tmp_path):
    result = quantize(source, tmp_path / "out", method=LLMInt8(static=True))
    assert result.ledger.request["options"] == {"static": False}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuantScheme(4, inputs=InputScheme()), "do not go with 4 bits"),
        (lambda: QuantScheme(8, "group", 32, inputs=InputScheme()), "do not go with 8 bits by group"),
        (lambda: QuantScheme(8, symmetric=False, inputs=InputScheme()), "asymmetric"),
        (lambda: InputScheme(threshold=-1.0), "threshold is -1"),
        (lambda: InputScheme(threshold=float("nan")), "threshold is nan"),
        (lambda: InputScheme(threshold=0, static=True), "no column stays"),
        (lambda: LLMInt8()(torch.ones(2, 4), STATIC, {}), "without calibration"),
        (lambda: QuantizedLinear.from_float(torch.nn.Linear(4, 2), STATIC), "without calibration"),
        (
            lambda: LLMInt8(True)(torch.ones(2, 2), STATIC, {"absmax": torch.tensor([1.0, torch.nan])}),
            "inputs hold NaN",
        ),
        (lambda: InputScheme("row"), "'token' and 'tensor'"),
        (lambda: QuantScheme.parse("w8-channel-a8-token-t6.1.2"), "names no inputs"),
        (lambda: QuantScheme.parse("w8-channel-a8-token-static"), "names no inputs"),
        (lambda: QuantScheme.parse("w4-channel-a8-token"), "do not go with 4 bits"),
    ],
)
def test_a_scheme_that_no_product_of_integers_can_follow_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize("threshold", [0, 0.5, 6, 6.25, 100, 1e-3, 12345.5, 6.1234567, 1e-7, 1e20])
@pytest.mark.parametrize("static", [False, True])
def test_a_label_names_its_scheme(granularity, threshold, static):
    if static and not threshold:
        return
    scheme = QuantScheme(8, "channel", inputs=InputScheme(granularity, threshold, static))
    assert QuantScheme.parse(scheme.label) == scheme
