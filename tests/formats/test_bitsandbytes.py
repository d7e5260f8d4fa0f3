"""bitsandbytes in 8 bits: what its own linear wrote (bitsandbytes_golden.py), and whole checkpoints."""

import json

import pytest
import torch
from bitsandbytes_golden import GOLDEN, THRESHOLD
from safetensors.torch import load_file, save_file

import fewbits
from fewbits.convert import convert, open_quantized
from fewbits.errors import InputError
from fewbits.formats import BitsAndBytes
from fewbits.kernels.int8 import Int8Inputs
from fewbits.scheme import InputScheme, QuantScheme
from models import tiny_checkpoint

READER = BitsAndBytes()
SCHEME = QuantScheme(8, "channel", inputs=InputScheme("token", THRESHOLD))
CONFIG = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": THRESHOLD}


def rms(values):
    return float(values.double().square().mean().sqrt())


def test_the_weights_are_those_that_it_dequantizes_itself():
    golden = load_file(GOLDEN)
    weight = READER.read("X.weight", golden, SCHEME)
    assert torch.equal(weight.codes.int() - 128, golden["X.weight"].int())
    # It multiplies by a float32 of 1 / 127, we divide: two roundings each.
    assert torch.allclose(weight.dequantize(torch.float32), golden["dequantized"], rtol=2**-22, atol=0)


def test_a_product_is_what_its_own_linear_makes_of_it():
    golden = load_file(GOLDEN)
    inputs, theirs = golden["inputs"].float(), golden["outputs"].double()
    weight = READER.read("X.weight", golden, SCHEME)
    ours = Int8Inputs(weight, torch.float32, torch.device("cpu"))(inputs).double()
    exact = inputs.double() @ weight.dequantize(torch.float64).t()
    # It takes only values above the threshold out of a row's absmax, we the whole column: rows where the
    # column's value is one of neither kind are rounded in other steps.
    column = (inputs.abs() > THRESHOLD).any(0)
    kept, rest = inputs[:, column].abs().amax(1), inputs[:, ~column].abs().amax(1)
    alike = (kept > THRESHOLD) | (kept <= rest)
    assert bool(column.any())
    assert int(alike.sum()) > len(alike) / 2
    # Two roundings of inputs that know nothing of each other were 2**0.5 of one apart.
    assert rms(ours[alike] - theirs[alike]) < rms(ours[alike] - exact[alike]) / 2


def bitsandbytes_checkpoint(folder, model_type="llama", dtype=torch.bfloat16):
    """What transformers saves of a model that it quantized at load time, without bitsandbytes."""
    source = tiny_checkpoint(folder / "source", model_type)
    floats = {name: t.to(dtype) for name, t in load_file(source / "model.safetensors").items()}
    tensors = dict(floats)
    for name, weight in floats.items():
        if weight.ndim == 2 and name.endswith("proj.weight"):
            base, absmax = name.removesuffix(".weight"), weight.float().abs().amax(1)
            tensors[name] = (weight.float() * (127 / absmax)[:, None]).round().to(torch.int8)
            tensors[f"{base}.SCB"] = absmax
            tensors[f"{base}.weight_format"] = torch.tensor(0, dtype=torch.uint8)
    out = folder / "bitsandbytes"
    out.mkdir()
    config = json.loads((source / "config.json").read_text())
    config |= {"quantization_config": CONFIG, "dtype": str(dtype).removeprefix("torch.")}
    (out / "config.json").write_text(json.dumps(config))
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def change(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= values
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_checkpoint_runs_on_its_integers_and_converts_with_all_of_them(tmp_path, dtype):
    first = bitsandbytes_checkpoint(tmp_path, dtype=dtype)
    view = open_quantized(first)
    assert {scheme.label for scheme in view.schemes.values()} == {"w8-channel-a8-token-t6"}
    before = {name: view.weights(name)[0] for name in view.quantized}
    assert len(before) == 14
    ids = torch.arange(2, 34).view(2, 16)
    logits = fewbits.load(first, dtype=torch.float32)(ids).logits
    if dtype == torch.float32:
        result = convert(first, tmp_path / "out", format="fewbits")
        assert torch.equal(fewbits.load(result.out)(ids).logits, logits)
    else:
        with pytest.raises(InputError, match=r"not every scale is a number of torch\.bfloat16"):
            convert(first, tmp_path / "out", format="fewbits")
        result = convert(first, tmp_path / "out", format="fewbits", requantize=True)
    fewbits.verify(result.out, first)
    view = open_quantized(result.out)
    for name, weight in before.items():
        [found] = view.weights(name)
        assert torch.equal(found.codes, weight.codes)
        assert torch.equal(found.scale, weight.scale.to(dtype))


def test_what_is_not_8_bits_in_rows_is_refused_in_one_line(tmp_path):
    first = bitsandbytes_checkpoint(tmp_path)
    tensors = load_file(first / "model.safetensors")
    for changes, reason in (
        ({"load_in_8bit": False, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "4 bits .'nf4'"),
        ({"load_in_8bit": False, "load_in_4bit": False}, "without load_in_8bit"),
        ({"load_in_4bit": False, "llm_int8_has_fp16_weight": True}, "weights in 16 bits"),
        ({"load_in_8bit": True, "llm_int8_threshold": "six"}, "llm_int8_threshold"),
        ({"llm_int8_threshold": -1.0}, "threshold is -1"),
    ):
        change(first, **{"llm_int8_has_fp16_weight": False, "load_in_8bit": True} | changes)
        for read in (fewbits.load, open_quantized):
            with pytest.raises(InputError, match=reason) as refusal:
                read(first)
            assert "\n" not in str(refusal.value)
    change(first, llm_int8_threshold=6.0)
    base = "model.layers.1.mlp.up_proj"
    for name, wrong, reason in (
        (f"{base}.SCB", torch.ones(3), r"up_proj\.SCB is \(3,\)"),
        (f"{base}.SCB", torch.ones(96, dtype=torch.int32), r"up_proj\.SCB is .*int32"),
        (f"{base}.weight_format", torch.tensor(2, dtype=torch.uint8), "weight_format is"),
        (f"{base}.weight", torch.zeros(96, 64), "float32"),
        (f"{base}.SCB", None, r"up_proj\.SCB is missing"),
        (f"{base}.weight", None, r"up_proj\.weight is missing"),
    ):
        changed = {k: t for k, t in (tensors | {name: wrong}).items() if t is not None}
        save_file(changed, first / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match=reason):
            fewbits.load(first)


def test_codes_whose_steps_are_lost_are_not_taken_for_floats(tmp_path):
    first = bitsandbytes_checkpoint(tmp_path)
    tensors = load_file(first / "model.safetensors")
    for end in ("SCB", "weight_format"):
        del tensors[f"model.layers.1.mlp.up_proj.{end}"]
    save_file(tensors, first / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"up_proj"):
        fewbits.load(first)
