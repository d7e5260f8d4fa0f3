"""`from_pretrained` with our config, and what `save_pretrained` writes of it."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import QuantizationConfigMixin

import fewbits
from checks import without_native
from fewbits import InputError, QuantizedLinear, QuantScheme
from fewbits.integration import _Finder, give_back
from fewbits.kernels import KERNELS
from fewbits.load import kernel_notes
from fewbits.scheme import InputScheme
from models import VOCABULARY, tiny_checkpoint, tiny_model

SCHEMES = {
    "int8": QuantScheme(8),
    "llm-int8": QuantScheme(8, inputs=InputScheme()),
    "int4": QuantScheme(4, "group", 32),
}
# Conv1D; experts of a name each; experts in one tensor, transposed, with biases; a tied head; biases
MODELS = ["llama", "gpt2", "mixtral", "gpt_oss", "qwen3", "opt"]
IDS = torch.arange(12).reshape(2, 6) % VOCABULARY


def config(kind, **options):
    return fewbits.Config(kind, **({"group_size": 32} if kind == "int4" else {}) | options)


def open_model(folder, **options):
    options = {"attn_implementation": "eager"} | options
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


def quantized(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(model_type):
        if model_type not in made:
            made[model_type] = tiny_checkpoint(tmp_path_factory.mktemp(model_type) / "model", model_type)
        return made[model_type]

    return folder


@pytest.mark.parametrize("kind", SCHEMES)
@pytest.mark.parametrize("model_type", MODELS)
class TestRoundTrip:
    def test_it_computes_what_quantize_in_memory_does(self, folders, model_type, kind):
        model = open_model(folders(model_type), quantization_config=config(kind))
        expected = fewbits.quantize_(open_model(folders(model_type)), SCHEMES[kind])
        assert quantized(model).keys() == quantized(expected).keys()
        assert torch.equal(logits(model), logits(expected))
        assert model.generate(IDS, max_new_tokens=3, min_new_tokens=3).shape == (2, 9)
        assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])
        assert isinstance(model.get_output_embeddings(), nn.Linear)

    def test_what_it_saves_computes_the_same_however_it_is_opened(
        self, folders, model_type, kind, tmp_path
    ):
        model = open_model(folders(model_type), quantization_config=config(kind))
        model.save_pretrained(tmp_path / "out")
        stored = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
        assert (stored["quant_method"], stored["version"]) == ("fewbits", 1)
        assert set(stored["weights"].values()) == {SCHEMES[kind].label}
        again = open_model(tmp_path / "out")
        assert torch.equal(logits(again), logits(model))
        assert quantized(again).keys() == quantized(model).keys()
        own = fewbits.load(tmp_path / "out")
        own.set_attn_implementation("eager")
        assert torch.equal(logits(own), logits(model))
        again.save_pretrained(tmp_path / "twice")
        model.save_pretrained(tmp_path / "again")
        first = tensors(tmp_path / "out")
        for other in (tensors(tmp_path / "twice"), tensors(tmp_path / "again")):
            assert first.keys() == other.keys()
            assert all(torch.equal(first[name], other[name]) for name in first)

    def test_it_opens_what_fewbits_quantize_wrote(self, folders, model_type, kind, tmp_path):
        out = fewbits.quantize(
            folders(model_type), tmp_path / "out", scheme=SCHEMES[kind], format="fewbits"
        ).out
        model = open_model(out)
        own = fewbits.load(out)
        own.set_attn_implementation("eager")
        assert torch.equal(logits(model), logits(own))
        direct = open_model(folders(model_type), quantization_config=config(kind))
        assert torch.equal(logits(model), logits(direct))
        direct.save_pretrained(tmp_path / "saved")
        written, saved = tensors(out), tensors(tmp_path / "saved")
        assert written.keys() == saved.keys()
        assert all(torch.equal(written[name], saved[name]) for name in written)


def tensors(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("model_type", MODELS)
def test_transformers_finds_every_key_in_its_place(folders, model_type, tmp_path):
    for folder, options in (
        (folders(model_type), {"quantization_config": config("int8")}),
        (tmp_path / "out", {}),
    ):
        model, info = open_model(folder, output_loading_info=True, **options)
        assert not any(info.values()), info
        model.save_pretrained(tmp_path / "out")


def test_a_config_of_another_width_is_refused(folders, tmp_path):
    open_model(folders("llama"), quantization_config=config("int8")).save_pretrained(tmp_path / "out")
    for source, options in (
        (folders("llama"), {"quantization_config": config("int8")}),
        (tmp_path / "out", {}),
    ):
        changed = tmp_path / "changed"
        shutil.copytree(source, changed)
        settings = json.loads((changed / "config.json").read_text())
        (changed / "config.json").write_text(json.dumps(settings | {"intermediate_size": 64}))
        with pytest.raises(InputError, match=r"but the model has"):
            open_model(changed, **options)
        shutil.rmtree(changed)


@pytest.mark.parametrize("kind", SCHEMES)
def test_adapters_are_trained_and_saved_alone(folders, tmp_path, kind):
    peft = pytest.importorskip("peft")
    model = open_model(folders("llama"), quantization_config=config(kind))
    torch.manual_seed(0)
    model.add_adapter(
        peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    model(IDS, labels=IDS).loss.backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora" in name for name in trained)
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter/model.safetensors").exists()
    again = open_model(folders("llama"), quantization_config=config(kind))
    again.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_a_base_inside_adapters_is_not_saved(folders, tmp_path, model_type):
    peft = pytest.importorskip("peft")
    model = open_model(folders(model_type), quantization_config=config("int8"))
    expected = logits(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.q_proj is now a peft\..*unload\(\)"):
        wrapped.base_model.model.save_pretrained(tmp_path / "base")
    wrapped.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("model*"))
    wrapped.unload().save_pretrained(tmp_path / "unloaded")
    assert torch.equal(logits(open_model(tmp_path / "unloaded")), expected)


def test_shards(folders, tmp_path):
    model = open_model(folders("llama"), quantization_config=config("int8"))
    model.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert torch.equal(logits(open_model(tmp_path / "out")), logits(model))
    own = fewbits.load(tmp_path / "out")
    own.set_attn_implementation("eager")
    assert torch.equal(logits(own), logits(model))


def test_other_dtypes(folders, tmp_path):
    for dtype in (torch.float32, torch.float16):
        model = open_model(folders("llama"), quantization_config=config("int8"), dtype=dtype)
        expected = fewbits.quantize_(open_model(folders("llama"), dtype=dtype), SCHEMES["int8"])
        assert logits(model).dtype == dtype
        assert torch.equal(logits(model), logits(expected))
        model.save_pretrained(tmp_path / str(dtype))
        assert torch.equal(logits(open_model(tmp_path / str(dtype))), logits(model))
    auto = open_model(folders("llama"), quantization_config=config("int8"), dtype="auto")
    assert logits(auto).dtype == torch.bfloat16


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps(folders, tmp_path, device_map):
    pytest.importorskip("accelerate")
    model = open_model(folders("llama"), quantization_config=config("int4"), device_map=device_map)
    assert torch.equal(
        logits(model), logits(open_model(folders("llama"), quantization_config=config("int4")))
    )
    model.save_pretrained(tmp_path / "out")
    again = open_model(tmp_path / "out", device_map=device_map)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])  # without biases, and with some
def test_hooks_of_a_device_map_stay(folders, tmp_path, monkeypatch, model_type):
    """Of linears that are entries of their own; two spellings of the CPU are two devices."""
    modeling = pytest.importorskip("accelerate.utils.modeling")
    # Or it would move parameters from one spelling to the other, after which they are none.
    monkeypatch.setattr(modeling, "check_device_same", lambda one, other: one.type == other.type)
    whole, other = torch.device("cpu"), torch.device("cpu", 0)
    expected = open_model(folders(model_type), quantization_config=config("int8"))
    paths = list(quantized(expected))[:3]
    places = {"": whole} | dict.fromkeys(paths, other)
    expected.save_pretrained(tmp_path / "out")
    for folder, options in (
        (folders(model_type), {"quantization_config": config("int8")}),
        (tmp_path / "out", {}),
    ):
        model = open_model(folder, device_map=places, **options)
        assert model.hf_device_map == places
        for path in paths:
            linear = quantized(model)[path]
            assert linear._hf_hook.execution_device == other
            moved = []
            linear._hf_hook.pre_forward = lambda m, *a, moved=moved, **k: (moved.append(m), (a, k))[1]
            logits(model)
            assert moved == [linear]
        assert torch.equal(logits(model), logits(expected))


def test_nothing_is_offloaded(folders, tmp_path):
    pytest.importorskip("accelerate")
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    with pytest.raises(InputError, match="offload"):
        open_model(
            folders("llama"), quantization_config=config("int8"), device_map=places,
            offload_folder=tmp_path,
        )  # fmt: skip


def test_skipped_modules_stay_in_float_also_when_saved(folders, tmp_path):
    model = open_model(folders("llama"), quantization_config=config("int8", skip=("*.down_proj",)))
    assert not any(name.endswith("down_proj") for name in quantized(model))
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(open_model(tmp_path / "out")), logits(model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "nf4"}, "kind is 'nf4'; accepted are 'int8', 'llm-int8', 'int4'"),
        ({"kind": "int8", "threshold": 5.0}, "goes with 'llm-int8' only"),
        ({"kind": "int8", "group_size": 64}, "goes with 'int4' only"),
        ({"kind": "llm-int8", "threshold": -1.0}, "threshold is -1.0"),
        ({"kind": "int4", "group_size": 0}, "group_size is 0"),
        ({"kind": "int8", "skip": "lm_head"}, "sequence of patterns"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(InputError, match=message):
        fewbits.Config(**arguments)


def test_options_reach_the_scheme():
    assert fewbits.Config("int8").scheme.label == "w8-channel"
    assert fewbits.Config("int4").scheme.label == "w4-g128"
    assert fewbits.Config("llm-int8").scheme.label == "w8-channel-a8-token-t6"
    assert fewbits.Config("llm-int8", threshold=0).scheme.label == "w8-channel-a8-token"
    assert isinstance(fewbits.Config("int8"), QuantizationConfigMixin)
    assert "w8-channel" in repr(fewbits.Config("int8"))


@pytest.mark.parametrize("skip", [("*",), ("model.layers.*",)])
def test_a_request_that_leaves_nothing_is_refused(folders, skip):
    message = rf"skip is {re.escape(repr(skip))}, which leaves none of 14 matrices"
    with pytest.raises(InputError, match=message):
        open_model(folders("llama"), quantization_config=config("int8", skip=skip))


def test_names_that_no_matrix_has_are_refused(folders, tmp_path):
    shutil.copytree(folders("llama"), tmp_path / "model")
    renamed = {f"my.{name}": tensor for name, tensor in tensors(folders("llama")).items()}
    save_file(renamed, tmp_path / "model/model.safetensors", {"format": "pt"})
    mapping = {r"^my\.": ""}
    plain = open_model(tmp_path / "model", key_mapping=mapping)
    assert torch.equal(logits(plain), logits(open_model(folders("llama"))))
    with pytest.raises(InputError, match=r"none of its \d+ tensors, like my\..*key_mapping"):
        open_model(tmp_path / "model", quantization_config=config("int8"), key_mapping=mapping)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_slow_kernel_is_told_of(folders, tmp_path, caplog, kind, monkeypatch):
    without_native(monkeypatch)
    for dtype, notes in ((torch.bfloat16, 0), (torch.float32, 1)):
        for folder, options in (
            (folders("llama"), {"quantization_config": config(kind)}),
            (tmp_path / "out", {}),
        ):
            caplog.clear()
            model = open_model(folder, dtype=dtype, **options)
            said = [r.getMessage() for r in caplog.records if r.name == "fewbits.integration"]
            assert said == kernel_notes(model)
            assert len(said) == notes
            assert all("run reference" in line for line in said)
            model.save_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "int4", "group_size": 128}, "group_size 128 does not divide its 96 columns"),
        ({"kind": "int8", "skip": ("nothing",)}, "'nothing' matches no"),
    ],
)
def test_what_does_not_fit_the_model(folders, options, message):
    with pytest.raises(InputError, match=message):
        open_model(folders("llama"), quantization_config=fewbits.Config(**options))


def test_experts_of_one_parameter_are_skipped_together(folders):
    with pytest.raises(InputError, match="skip the whole or nothing"):
        open_model(
            folders("mixtral"), quantization_config=config("int8", skip=("*.experts.1.w1.weight",))
        )


def test_weights_that_cannot_be_rounded(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=r"layers.1.mlp.up_proj.weight: .*NaN"):
        open_model(tmp_path / "model", quantization_config=config("int8"))


def test_a_bias_that_is_in_no_file_is_zero(folders, tmp_path):
    model = open_model(folders("opt"))
    tensors = {n: t.clone() for n, t in model.state_dict().items() if n != "lm_head.weight"}
    del tensors["model.decoder.layers.1.fc1.bias"]
    shutil.copytree(folders("opt"), tmp_path / "model")
    save_file(tensors, tmp_path / "model/model.safetensors", {"format": "pt"})
    model, info = open_model(
        tmp_path / "model", quantization_config=config("int8"), output_loading_info=True
    )
    assert info["missing_keys"] == {"model.decoder.layers.1.fc1.bias"}
    assert not model.model.decoder.layers[1].fc1.bias.any()
    assert model.model.decoder.layers[0].fc1.bias.any()
    assert not any(p.requires_grad for m in quantized(model).values() for p in m.parameters())


def test_only_whole_checkpoints_are_quantized(folders, tmp_path):
    open_model(folders("llama")).save_pretrained(tmp_path, variant="other")
    with pytest.raises(InputError, match="has no weights"):
        open_model(tmp_path, variant="other", quantization_config=config("int8"))


def test_a_checkpoint_that_is_quantized_already_is_not_quantized_again(folders, tmp_path):
    model = open_model(folders("llama"), quantization_config=config("int8"))
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="is quantized with FewbitsCheckpoint"):
        open_model(tmp_path / "out", quantization_config=config("int4"))
    out = fewbits.quantize(folders("llama"), tmp_path / "other", scheme=SCHEMES["int4"]).out
    with pytest.raises(ValueError, match="is quantized with CompressedTensorsConfig"):
        open_model(out, quantization_config=config("int8"))


def test_a_config_can_be_used_twice(folders):
    shared = config("int8")
    for model_type in ("llama", "gpt2"):
        model = open_model(folders(model_type), quantization_config=shared)
        assert quantized(model)
    assert shared.to_dict() == {"quant_method": "fewbits", "scheme": "w8-channel", "skip": []}


@pytest.mark.parametrize("order", ["fewbits, transformers", "transformers, fewbits"])
def test_either_may_be_imported_first(folders, tmp_path, order):
    model = open_model(folders("gpt2"), quantization_config=config("int8"))
    model.save_pretrained(tmp_path / "out")
    code = (
        f"import {order}\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})\n"
        "assert any(isinstance(m, fewbits.QuantizedLinear) for m in model.modules())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_config_may_come_before_transformers(folders):
    code = (
        "import fewbits\n"
        "config = fewbits.Config('int8')\n"
        "import transformers\n"
        f"folder = {str(folders('gpt2'))!r}\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)\n"
        "assert any(isinstance(m, fewbits.QuantizedLinear) for m in model.modules())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_who_only_asks_for_a_spec_does_not_end_the_registration(tmp_path, monkeypatch):
    (tmp_path / "fewbits_probed.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    told = []
    finder = _Finder("fewbits_probed", lambda: told.append(sys.modules["fewbits_probed"].value))
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    for _ in range(2):
        assert importlib.util.find_spec("fewbits_probed").origin == str(tmp_path / "fewbits_probed.py")
        assert not told
        assert finder in sys.meta_path
    importlib.import_module("fewbits_probed")
    assert told == [3]
    assert finder not in sys.meta_path


def test_importing_does_not_import_transformers():
    code = "import sys, fewbits; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("label", "columns"),
    [("w4-g128", 256), ("w4-g32-asym", 64), ("w3-g96", 192), ("w2-channel-asym", 40), ("w4-channel", 72),
     ("w8-channel", 172), ("w8-channel-a8-token-t6", 172), ("w8-tensor-a8-tensor", 64),
     ("w8-tensor", 64), ("w8-g32-asym", 64), ("w3-channel-asym", 50)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("native", [True, False])
def test_kernels_give_their_codes_back(label, columns, dtype, native, monkeypatch):
    if not native:
        without_native(monkeypatch)
    weight = torch.randn(20, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    given = fewbits.quantize_tensor(weight, QuantScheme.parse(label))
    back = give_back(QuantizedLinear(given, None, dtype))
    given = given.per_row()
    assert torch.equal(back.codes, given.codes)
    assert torch.equal(back.scale, given.scale)
    assert torch.equal(back.zero_point, given.zero_point)
    assert back.scheme == given.scheme


def test_every_kernel_is_understood():
    torch_s = {"int4pack", "int8pack"}
    assert set(KERNELS) == torch_s | {"native", "native-int8", "triton", "int8", "reference"}
