"""What load() makes of a checkpoint computes what its codes say, for every kind of architecture."""

import json
import math
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from transformers.quantizers import auto

from checks import fast_kernel
from fewbits import InputError, QuantizedLinear, QuantScheme, VerificationError, load, quantize
from fewbits.checkpoint import resolve
from fewbits.load import check_forward, kernel_notes
from fewbits.structure import cache_argument
from models import TINY, VOCABULARY, tiny_checkpoint

LABELS = ("w8-channel", "w4-g32", "w4-g32-asym")
IDS = torch.arange(1, 17)[None] * 7 % VOCABULARY
MIXTURES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")
NOTHING, EXPERTS = "$^", r"\.experts\."  # patterns of names
_SUFFIXES = ("", "_packed", "_scale", "_zero_point", "_shape")
# Source matrices that multiply no activations, or are left in float on purpose.
_FLOAT = re.compile(r"embed|wte|wpe|lm_head|\.router\.|mlp\.gate\.weight|block_sparse_moe\.gate|_bias$")


def quantizable(name: str, tensor: Tensor) -> bool:
    return tensor.ndim >= 2 and not _FLOAT.search(name)


def stored_transposed(model_type: str, name: str) -> bool:
    return model_type == "gpt2" or (model_type == "gpt_oss" and "experts" in name)


def decode(tensors: dict[str, Tensor], name: str, bits: int, suffix: str) -> Tensor:
    """The float32 weight that the files say, by the formats' description and another tool's unpacker."""
    packed, scale = tensors[name + suffix], tensors[f"{name}_scale"].float()
    rows, columns = tensors[f"{name}_shape"].tolist()
    signed = unpack_from_int32(packed, bits, torch.Size((rows, columns))).float()
    if f"{name}_zero_point" in tensors:
        points = tensors[f"{name}_zero_point"]
        zero = unpack_from_int32(points, bits, torch.Size((rows, scale.shape[1])), packed_dim=0).float()
    else:
        zero = torch.zeros_like(scale)
    parts = signed.view(rows, scale.shape[1], -1)
    return ((parts - zero[..., None]) * scale[..., None]).view(rows, columns)  # exact: 9 + 8 bits fit


@dataclass
class Case:
    """A source, its quantized checkpoint, and what float models of its codes compute."""

    model_type: str
    source: Path
    out: Path
    known: dict[str, tuple[Tensor, float]] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        return json.loads((self.out / "config.json").read_text())

    @property
    def standard(self) -> bool:
        return self.config()["quantization_config"]["quant_method"] == "compressed-tensors"

    def ledger(self) -> dict[str, dict[str, Any]]:
        return json.loads((self.out / "fewbits.json").read_text())["tensors"]

    def write_dequantized(self, folder: Path, rounded: str) -> None:
        """The source with dequantized weights; those whose names match `rounded` as bfloat16."""
        state = {n: t.float() for n, t in load_file(self.source / "model.safetensors").items()}
        tensors = load_file(self.out / "model.safetensors")
        for name, entry in self.ledger().items():
            if entry["quantized"] is None:
                continue
            bits, suffix = int(entry["quantized"]["scheme"][1]), "_packed" if self.standard else ""
            if len(entry["shape"]) == 3:
                parts = {name + s: tensors[name + s] for s in _SUFFIXES if name + s in tensors}
                pieces = [{k: t[i] for k, t in parts.items()} for i in range(entry["shape"][0])]
                weight = torch.stack([decode(piece, name, bits, suffix) for piece in pieces])
            else:
                weight = decode(tensors, name, bits, suffix)
            weight = weight.mT if stored_transposed(self.model_type, name) else weight
            assert list(weight.shape) == entry["shape"]
            weight = weight.bfloat16().float() if re.search(rounded, name) else weight
            state[name] = weight.contiguous()
        folder.mkdir()
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        config = {key: value for key, value in self.config().items() if key != "quantization_config"}
        (folder / "config.json").write_text(json.dumps(config))

    def reference(self, dtype: torch.dtype, rounded: str = NOTHING) -> nn.Module:
        """The float model of those weights, by transformers alone."""
        folder = self.out.with_name(f"{self.out.name}-{['', NOTHING, EXPERTS].index(rounded)}")
        if not folder.exists():
            self.write_dequantized(folder, rounded)
        eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **eager).eval()

    @torch.no_grad()
    def logits_and_bound(self, rounded: str = NOTHING) -> tuple[Tensor, float]:
        """In float64, and how far float32 may be from them.

        A float32 model of the same weights does the same operations with its sums in another order:
        rounding errors add up like a random walk, so summing one by one instead of in 16 lanes errs
        at most sqrt(16) times as much as transformers' own float32 model does.
        """
        if rounded not in self.known:
            exact = self.reference(torch.float64, rounded)(IDS).logits
            single = self.reference(torch.float32, rounded)(IDS).logits
            self.known[rounded] = exact, 4 * float((single - exact).abs().max())
        return self.known[rounded]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """By model type, label and other arguments of quantize(), made once."""
    sources: dict[str, Path] = {}
    made: dict[str, Case] = {}

    def get(model_type: str, label: str, **more: Any) -> Case:
        if model_type not in sources:
            sources[model_type] = tiny_checkpoint(
                tmp_path_factory.mktemp(model_type) / "model", model_type
            )
        key = repr((model_type, label, more))
        if key not in made:
            out = sources[model_type].with_name(f"{label}-{len(made)}")
            quantize(sources[model_type], out, scheme=QuantScheme.parse(label), **more)
            made[key] = Case(model_type, sources[model_type], out)
        return made[key]

    return get


# -- what is loaded computes what the codes say --------------------------------------------------


@pytest.mark.parametrize("model_type", TINY)
def test_every_matrix_that_multiplies_activations_is_quantized_and_nothing_else(case, model_type):
    this = case(model_type, "w4-g32")
    expected = {n for n, t in load_file(this.source / "model.safetensors").items() if quantizable(n, t)}
    assert {n for n, entry in this.ledger().items() if entry["quantized"]} == expected
    assert expected


OTHERS = ("w2-g32", "w3-g32", "w3-channel-asym", "w4-channel", "w8-tensor", "w8-channel-asym", "w8-g32")


@pytest.mark.parametrize(
    ("model_type", "label"),
    [(m, label) for m in TINY for label in LABELS] + [("llama", o) for o in OTHERS],
)
@torch.no_grad()
def test_logits_are_those_of_the_dequantized_weights(case, model_type, label):
    this = case(model_type, label)
    exact, bound = this.logits_and_bound()
    loaded = load(this.out, dtype=torch.float32)
    assert loaded.dtype == torch.float32
    assert (loaded(IDS).logits - exact).abs().max() <= bound
    # The bound would see one code that is off: quantization itself moves the logits far more.
    source = AutoModelForCausalLM.from_pretrained(this.source, dtype=torch.float32)(IDS).logits
    assert (source - exact).abs().max() > 1000 * bound


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "gpt_oss"])
@torch.no_grad()
def test_one_step_of_one_scale_is_seen_in_the_logits(case, tmp_path, model_type):
    # So the comparison above can fail: the smallest change that a file can hold is beyond its bound.
    this = case(model_type, "w4-g32")
    shutil.copytree(this.out, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    name = next(n for n in sorted(tensors) if n.endswith("_scale"))
    tensors[name].view(torch.int16).view(-1)[0] += 1
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    exact, bound = this.logits_and_bound()
    assert (load(tmp_path / "out", dtype=torch.float32)(IDS).logits - exact).abs().max() > bound


@pytest.mark.parametrize("model_type", TINY)
def test_generation_gives_the_tokens_of_the_dequantized_weights(case, model_type):
    this = case(model_type, "w4-g32")
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    found = load(this.out, dtype=torch.float32).generate(IDS, **settings)
    assert found.shape == (1, IDS.shape[1] + 6)
    assert torch.equal(found, this.reference(torch.float32).generate(IDS, **settings))


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt2"])
def test_generation_works_in_the_checkpoints_own_dtype(case, model_type):
    model = load(case(model_type, "w8-channel").out)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape[1] == 19


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("model_type", MIXTURES)
def test_every_expert_and_nearly_all_of_a_mixtures_blocks_is_quantized(case, model_type, label):
    this = case(model_type, label)
    ledger = this.ledger()
    experts = {n: e for n, e in ledger.items() if ".experts." in n and not n.endswith("_bias")}
    assert experts
    assert all(entry["quantized"] for entry in experts.values())
    blocks = {n: math.prod(e["shape"]) for n, e in ledger.items() if ".layers." in n}
    quantized = sum(count for name, count in blocks.items() if ledger[name]["quantized"])
    assert quantized > 0.95 * sum(blocks.values())

    loaded, mixtures = load(this.out), 0
    for module in loaded.modules():
        if hasattr(module, "down_proj") and isinstance(module.down_proj, nn.ModuleList):
            mixtures += 1
            for linears in (module.gate_up_proj, module.down_proj):
                assert len(linears) == 4
                assert all(type(linear) is QuantizedLinear for linear in linears)
                assert {linear.scheme.label for linear in linears} == {label}
    assert mixtures == (1 if model_type == "deepseek_v3" else 2)
    assert not any(p.ndim == 3 for p in loaded.parameters())


# -- plain transformers --------------------------------------------------------------------------

STANDARD = [(m, label) for m in TINY for label in LABELS if m not in ("gpt2", "gpt_oss")
            and not (m in MIXTURES and label.endswith("-asym"))]  # fmt: skip
# compressed-tensors 0.19 and later: loaded when dequantized at once only, which rounds to bfloat16
DEQUANTIZED_ONLY = [(m, label) for m, label in STANDARD if label.endswith("-asym") or m == "falcon"]


def in_float32(model: nn.Module) -> nn.Module:
    """With its bfloat16 experts, which dtype=float32 does not reach, as float32 too."""
    for parameter in model.parameters():
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()
    return model.eval()


@pytest.mark.parametrize(("model_type", "label"), [c for c in STANDARD if c not in DEQUANTIZED_ONLY])
@torch.no_grad()
def test_plain_transformers_computes_the_same(case, model_type, label):
    this = case(model_type, label)
    assert this.standard
    exact, bound = this.logits_and_bound(EXPERTS if model_type in MIXTURES else NOTHING)
    plain = AutoModelForCausalLM.from_pretrained(this.out, dtype=torch.float32)
    assert (in_float32(plain)(IDS).logits - exact).abs().max() <= bound


MIXED = {"*.q_proj": QuantScheme(8), "*.1.mlp.up_proj": QuantScheme(2, "group", 32)}


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        pytest.param("llama", {"overrides": tuple(MIXED.items())}, id="several schemes"),
        pytest.param("llama", {"overrides": (("*.q_proj", None),)}, id="some in float"),
        pytest.param(
            "mixtral", {"overrides": (("*.self_attn.*", QuantScheme(8)),)}, id="other attention"
        ),
        pytest.param("mixtral", {"overrides": (("*.self_attn.*", None),)}, id="float attention"),
        pytest.param("llama", {"head": True}, id="head"),
        pytest.param("qwen3", {"head": True}, id="tied head"),
    ],
)
@torch.no_grad()
def test_plain_transformers_computes_the_same_for_every_recipe(case, model_type, more):
    this = case(model_type, "w4-g32", **more)
    assert this.standard
    exact, bound = this.logits_and_bound(EXPERTS if model_type in MIXTURES else NOTHING)
    plain = AutoModelForCausalLM.from_pretrained(this.out, dtype=torch.float32)
    assert (in_float32(plain)(IDS).logits - exact).abs().max() <= bound
    exact, bound = this.logits_and_bound()
    assert (load(this.out, dtype=torch.float32)(IDS).logits - exact).abs().max() <= bound


@pytest.mark.parametrize(
    ("model_type", "label"), [*DEQUANTIZED_ONLY, ("llama", "w4-g32"), ("mixtral", "w4-g32")]
)
@torch.no_grad()
def test_plain_transformers_computes_the_same_but_for_bfloat16_when_it_dequantizes(
    case, model_type, label
):
    this = case(model_type, label)
    exact, bound = this.logits_and_bound("")  # every weight rounded
    plain = AutoModelForCausalLM.from_pretrained(
        this.out, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    assert (in_float32(plain)(IDS).logits - exact).abs().max() <= bound


@pytest.mark.parametrize(("model_type", "label"), DEQUANTIZED_ONLY)
@torch.no_grad()
def test_what_plain_transformers_cannot_run_without_it_raises_instead_of_running_garbage(
    case, model_type, label
):
    this = case(model_type, label)
    try:
        plain = AutoModelForCausalLM.from_pretrained(this.out, dtype=torch.float32)
        logits = in_float32(plain)(IDS).logits
    except (RuntimeError, AttributeError):
        return
    exact, bound = this.logits_and_bound()  # a later release of it may
    assert (logits - exact).abs().max() <= bound


@pytest.mark.parametrize(
    ("model_type", "label"),
    [(m, label) for m in ("gpt2", "gpt_oss") for label in LABELS]
    + [(m, "w4-g32-asym") for m in MIXTURES if m != "gpt_oss"],
)
def test_plain_transformers_refuses_our_own_format_instead_of_running_garbage(
    case, model_type, label, monkeypatch
):
    this = case(model_type, label)
    assert not this.standard
    for known in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
        monkeypatch.delitem(known, "fewbits", raising=False)  # as where fewbits was not imported
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(this.out)


# -- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("label", "most"), [("w8-channel", 0.52), ("w4-g128", 0.27)])
def test_quantized_linears_take_a_fraction_of_their_bfloat16_bytes(tmp_path, label, most):
    tiny_checkpoint(tmp_path / "model", hidden_size=256, intermediate_size=512, head_dim=64)
    result = quantize(tmp_path / "model", tmp_path / "out", scheme=QuantScheme.parse(label))
    model, source = load(tmp_path / "out"), load_file(tmp_path / "model" / "model.safetensors")
    held = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    floats = sum(t.nbytes for name, t in source.items() if not quantizable(name, t))
    frequencies = sum(b.nbytes for name, b in model.named_buffers() if "inv_freq" in name)
    linears = sum(t.nbytes for name, t in source.items() if quantizable(name, t))
    assert linears == result.ledger.totals["quantized_source_bytes"]
    assert sum(held.values()) - floats - frequencies <= most * linears
    assert (
        sum(held.values()) - floats - frequencies >= 0.9 * most * linears
    )  # nothing is hidden elsewhere


# -- other checkpoints ---------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "gemma3_text"])
@torch.no_grad()
def test_a_float_checkpoint_is_loaded_as_transformers_does(case, model_type):
    folder = case(model_type, "w4-g32").source
    loaded, plain = load(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == plain.dtype == torch.bfloat16
    assert loaded.state_dict().keys() == plain.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert torch.equal(loaded(IDS).logits, plain.eval()(IDS).logits)
    assert loaded.generation_config == plain.generation_config


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_dtype_that_is_asked_for_is_the_models(case, dtype):
    model = load(case("llama", "w8-channel").out, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(IDS).logits.dtype == dtype


@pytest.mark.parametrize("format", ["compressed-tensors", "fewbits"])
@pytest.mark.parametrize("max_shard_bytes", [2**28, 1])
@torch.no_grad()
def test_shards_and_formats_make_no_difference(case, tmp_path, format, max_shard_bytes):
    this = case("llama", "w4-g32")
    scheme = QuantScheme(4, "group", 32)
    quantize(
        this.source, tmp_path / "out", scheme=scheme, format=format, max_shard_bytes=max_shard_bytes
    )
    assert torch.equal(load(tmp_path / "out")(IDS).logits, load(this.out)(IDS).logits)


# -- what cannot be loaded -----------------------------------------------------------------------


@pytest.fixture
def copied(case, tmp_path):
    """A checkpoint to be damaged."""

    def get(model_type: str, label: str) -> Path:
        return Path(shutil.copytree(case(model_type, label).out, tmp_path / "out"))

    return get


def edit(folder: Path, key: str, value: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("method", ["exl2", "quanto", None])
def test_an_unknown_quantization_is_refused_with_those_that_are_read(copied, method):
    folder = copied("llama", "w4-g32")
    edit(folder, "quant_method", method)
    with pytest.raises(InputError, match=f"quant_method {method!r}, which is not read; accepted are"):
        load(folder)


def test_a_later_version_of_our_own_format_is_refused(copied):
    folder = copied("gpt2", "w4-g32")
    edit(folder, "version", 2)
    with pytest.raises(InputError, match="version 2 is not read; accepted is 1"):
        load(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("type", "float", "is not read"), ("strategy", "block", "is not read")],
)
def test_a_kind_of_compressed_tensors_that_is_not_read_is_refused(copied, key, value, message):
    folder = copied("llama", "w4-g32")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        load(folder)


@pytest.mark.parametrize("target", [r"re:^model\.layers\.(\d+\.mlp.*$", "Conv2d"])
def test_a_config_whose_targets_fit_no_module_is_refused(copied, target):
    folder = copied("llama", "w4-g32")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = [target]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError):
        load(folder)


LINEAR, CONV1D = "model.layers.1.mlp.up_proj.weight", "transformer.h.1.mlp.c_fc.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.{}.weight"


@pytest.mark.parametrize(
    ("model_type", "label", "weight", "suffix"),
    [
        (model_type, label, weight, suffix)
        for model_type, label, weight in (
            ("llama", "w4-g32-asym", LINEAR),
            ("gpt2", "w4-g32-asym", CONV1D),
            ("mixtral", "w4-g32-asym", EXPERT.format("3.w2")),
            ("mixtral", "w4-g32", EXPERT.format("1.w2")),
            ("mixtral", "w4-g32", EXPERT.format("0.w1")),
        )
        for suffix in ("_packed", "_scale", "_zero_point", "_shape")
        if suffix != "_zero_point" or label.endswith("-asym")
    ],
)
def test_a_missing_part_of_a_quantized_weight_is_refused(copied, model_type, label, weight, suffix):
    folder = copied(model_type, label)
    tensors = load_file(folder / "model.safetensors")
    # In our own format the codes have the weight's own name.
    del tensors[weight + suffix if weight + suffix in tensors else weight]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"up_proj|c_fc|experts"):
        load(folder)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("quantized", [True, False])
def test_a_missing_float_tensor_is_named(case, copied, model_type, quantized):
    folder = copied(model_type, "w4-g32") if quantized else case(model_type, "w4-g32").source
    name = {"llama": "model.norm.weight", "gpt2": "transformer.ln_f.bias"}[model_type]
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    other = (
        folder if quantized else Path(shutil.copytree(folder, copied(model_type, "w4-g32") / "float"))
    )
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=f"the model needs tensor {re.escape(name)}, which is not there"
    ):
        load(other)


def test_a_float_tensor_of_another_shape_is_refused(copied):
    folder = copied("llama", "w4-g32")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(65, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.norm\.weight"):
        load(folder)


@pytest.mark.parametrize("shape", [(64, 95), (63, 96), (64, 104), (96, 64)])
def test_codes_that_do_not_fit_their_stated_shape_are_refused(copied, shape):
    folder = copied("llama", "w4-g32")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight_shape"] = torch.tensor(shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError):
        load(folder)


def test_a_quantized_weight_that_the_model_does_not_have_is_named(copied):
    folder = copied("llama", "w4-g32")
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.startswith("model.layers.1.mlp.up_proj.")]:
        tensors[name.replace("layers.1", "layers.7")] = tensors[name].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"model\.layers\.7\.mlp\.up_proj\.weight is quantized, but no matrix"
    ):
        load(folder)


def test_a_run_on_a_few_tokens_passes_what_is_sound_and_finds_what_is_not_finite(case, copied):
    check_forward(case("llama", "w4-g32").out)
    folder = copied("llama", "w4-g32")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][5] = torch.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match="gives logits that are not finite"):
        check_forward(folder)


def test_a_name_that_is_no_model_is_refused_as_by_resolve():
    for name in ("no such model", "no/such/model"):
        with pytest.raises(InputError) as refused:
            load(name)
        with pytest.raises(InputError, match=re.escape(str(refused.value))):
            resolve(name)


def test_a_quantized_float16_checkpoint_runs_in_bfloat16_on_a_cpu_and_says_so(tmp_path):
    source = tiny_checkpoint(tmp_path / "source", "llama")
    config = json.loads((source / "config.json").read_text()) | {"dtype": "float16"}
    tensors = load_file(source / "model.safetensors")
    halves = {name: tensor.to(torch.float16) for name, tensor in tensors.items()}
    save_file(halves, source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_text(json.dumps(config))
    quantize(source, tmp_path / "out", scheme=QuantScheme(4, "group", 32), format="gptq")
    fast, asked = load(tmp_path / "out"), load(tmp_path / "out", dtype=torch.float16)
    assert (fast.dtype, asked.dtype, load(source).dtype) == (torch.bfloat16, *[torch.float16] * 2)
    kernels = {m.kernel_name for m in fast.modules() if isinstance(m, QuantizedLinear)}
    assert kernels == {fast_kernel("int4pack")}
    assert kernel_notes(fast) == [
        "fact: the checkpoint is in torch.float16, the model runs in torch.bfloat16"
    ]


def test_8_bit_inputs_that_were_asked_for_and_are_not_taken_are_said(tmp_path):
    if fast_kernel("int8pack") != "native":
        pytest.skip("no native library")
    source = tiny_checkpoint(tmp_path / "source", "llama")
    for bits in (4, 8):
        quantize(source, tmp_path / str(bits), scheme=QuantScheme(bits, "group", 32))
    said = kernel_notes(load(tmp_path / "8", int8_inputs=True))
    assert len(said) == 1
    assert said[0].startswith("fallback: ")
    assert "keep their inputs: native-int8 loses more" in said[0]
    assert kernel_notes(load(tmp_path / "8")) == []
    assert kernel_notes(load(tmp_path / "4", int8_inputs=True)) == []


def test_steps_with_a_static_cache_are_one_graph_that_computes_the_same(case):
    """`torch.compile(fullgraph=True)` takes a whole quantized model, attention and head included."""
    from transformers import StaticCache

    model = load(case("llama", "w4-g32-asym").out)
    found = []
    with torch.no_grad():
        for forward in (model, torch.compile(model.forward, backend="aot_eager", fullgraph=True)):
            past = StaticCache(config=model.config, max_cache_len=24)
            name = cache_argument(model)
            model(IDS, **{name: past})
            for step in range(3):
                given = {name: past, "position_ids": torch.tensor([[16 + step]])}
                found.append(forward(torch.tensor([[5 + step]]), **given).logits)
    assert all(torch.equal(a, b) for a, b in zip(found[:3], found[3:], strict=True))
