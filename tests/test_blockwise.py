"""Calibrated quantization from folder to folder, for every kind of architecture."""

import json
import math
import re
import shutil
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from checks import RECORDED, Recording
from fewbits import (
    AWQ,
    GPTQ,
    InputError,
    QuantScheme,
    WeightedRTN,
    load,
    quantize,
    quantize_tensor,
    stream,
    verify,
)
from fewbits.blockwise import Position, _Run, quantize_blocks
from fewbits.budget import plan_memory
from fewbits.ledger import Codes, read_ledger
from fewbits.plan import make_plan
from fewbits.recipe import Recipe
from fewbits.structure import find_blocks, find_matrices, is_experts, skeleton
from fewbits.wiring import Wiring
from models import ALL, VOCABULARY, tiny_checkpoint, tiny_model

G32, W8 = QuantScheme(4, "group", 32), QuantScheme(8)
IDS = torch.randint(3, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(1))
HELD_OUT = IDS[-1:]
MORE_IDS = torch.randint(3, VOCABULARY, (24, 32), generator=torch.Generator().manual_seed(2))
NORMS = ("input_layernorm", "post_attention_layernorm")


pytestmark = pytest.mark.usefixtures("one_thread", "float32_products")


@dataclass
class Sources:
    """Tiny checkpoints and what became of them, each made once."""

    folder: Path
    made: dict[str, Path] = field(default_factory=dict)

    def source(self, model_type: str) -> Path:
        path = self.folder / model_type
        if not path.exists():
            torch.manual_seed(0)
            tiny_checkpoint(path, model_type)
        return path

    def out(self, model_type: str, method: Any, **more: Any) -> Path:
        key = repr((model_type, method, more))
        if key not in self.made:
            out = self.folder / f"{model_type}-{len(self.made)}"
            arguments = {"scheme": G32, "calibration": IDS} | more
            quantize(self.source(model_type), out, method=method, **arguments)
            self.made[key] = out
        return self.made[key]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Sources(tmp_path_factory.mktemp("tiny"))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def matrices_of(ledger) -> list[dict[str, Any]]:
    return [matrix for block in ledger.blocks for matrix in block["matrices"]]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return list(model.get_submodule(find_blocks(model)))


@contextmanager
def rounding_states(model: nn.Module, between: bool):
    """Hidden states are bfloat16 in front of the first block; also of all others."""

    def enter(_module, args, kwargs):
        if args:
            return (args[0].bfloat16().float(), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"].bfloat16().float()}

    blocks = blocks_of(model) if between else blocks_of(model)[:1]
    handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor, between: bool) -> Tensor:
    with rounding_states(model, between):
        return model(ids, use_cache=False).logits.float()


def kl(float_logits: Tensor, quantized_logits: Tensor) -> float:
    log_p, log_q = (F.log_softmax(x.double(), -1) for x in (float_logits, quantized_logits))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


# -- every architecture ------------------------------------------------------------------------------

QUICK = {"transforms": (AWQ(points=3),)}
CASES = [(m, method, more) for m in ALL for method, more in (("gptq", {}), ("gptq", QUICK))]
CASES += [(m, "awq", {}) for m in ("llama", "opt", "mixtral")]


@pytest.mark.parametrize(
    ("model_type", "method", "more"), CASES, ids=lambda value: "quick" if value == QUICK else None
)
def test_every_architecture_is_quantized_and_its_report_is_true(tiny, model_type, method, more):
    source, out = tiny.source(model_type), tiny.out(model_type, method, **more)
    checked, ledger = verify(out, source), read_ledger(out)
    assert checked.problems == []

    # Every tensor is accounted for, every matrix of a block quantized and reported.
    before, totals = tensors_of(source), ledger.totals
    model = skeleton(json.loads((source / "config.json").read_text()))
    found, _ = find_matrices(model, {name: tuple(t.shape) for name, t in before.items()})
    inside = {name: m for name, m in found.items() if m.block is not None}
    quantized = {name for name, entry in ledger.tensors.items() if entry.outcome == "quantized"}
    expected = {name for name, m in found.items() if not m.head and m.kind != "embedding"}
    assert quantized == expected >= inside.keys()
    outcomes = ("quantized", "copied", "folded", "dropped")
    assert sum(totals[o] for o in outcomes) == totals["source_tensors"] == len(before)
    assert checked.source_tensors == len(before)
    assert totals["dropped"] == 0
    reported = [m["name"] for m in matrices_of(ledger)]
    pieces = [[f"{n}[{i}]" for i in range(m.shape[0])] if m.stacked else [n] for n, m in inside.items()]
    assert sorted(reported) == sorted(name for names in pieces for name in names)
    assert [block["block"] for block in ledger.blocks] == list(range(len(blocks_of(model))))
    for block in ledger.blocks:
        for matrix in block["matrices"]:
            name = matrix["name"].partition("[")[0]
            assert inside[name].block == block["block"]
            if inside[name].kind != "expert" and "dt_proj" not in name:
                assert matrix["tokens"] == IDS[:-1].numel()
            assert matrix["scheme"] == "w4-g32"

    # What is folded is a norm, a bias, or a router; nothing else was changed, and nothing without AWQ.
    after = tensors_of(out)
    for name, entry in ledger.tensors.items():
        if entry.outcome == "folded":
            assert "awq" in ledger.request["method"]
            assert not torch.equal(after[name], before[name])
            assert after[name].dtype == before[name].dtype
            assert before[name].ndim == 1 or re.search(r"router|gate\.weight|_bias$", name), name

    outside = [m.module for name, m in found.items() if m.block is None]
    _check_kl(source, out, outside, ledger.blocks[-1]["kl"])


def _check_kl(source: Path, out: Path, outside: list[str], told: float) -> None:
    """The last block's KL is that of the checkpoint on disk, but for what is outside of its blocks.

    States that are bfloat16 between blocks are rounded here by hooks. What is left are float32 sums in
    another order, after which a few states round to the other side.
    """
    model, loaded = load(source, dtype=torch.float32), load(out, dtype=torch.float32)
    for module in outside:
        loaded.set_submodule(module, model.get_submodule(module))
    measured = kl(logits(model, HELD_OUT, between=False), logits(loaded, HELD_OUT, between=True))
    assert told == pytest.approx(measured, rel=2e-3, abs=1e-7)


GAINS = ("llama", "gpt2", "bloom", "gemma2", "phi3", "qwen2", "mixtral", "qwen3_next", "stablelm")


def test_gptqs_output_error_is_below_that_of_round_to_nearest(tiny):
    logs = []
    for model_type in GAINS:
        errors = [m["error_to_rtn"] for m in matrices_of(read_ledger(tiny.out(model_type, "gptq")))]
        assert all(error < 1.2 for error in errors), model_type
        logs += [math.log(error) for error in errors]
    assert math.exp(sum(logs) / len(logs)) < 0.75


# -- what it is calibrated on ------------------------------------------------------------------------


@torch.no_grad()
def inputs_of(model: nn.Module, block: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Weights (out, in) of a block and what they multiply, from transformers' own modules."""
    found: dict[str, tuple[Tensor, list[Tensor]]] = {}

    def linear(name: str, weight: Tensor):
        def record(_module, args):
            found.setdefault(name, (weight, []))[1].append(args[0].reshape(-1, args[0].shape[-1]))

        return record

    def mixture(name: str):
        def record(module, args):
            hidden, chosen, _ = args
            for i in range(len(module.gate_up_proj)):
                x = hidden[(chosen == i).any(-1)]
                gate, up = (x @ module.gate_up_proj[i].T).chunk(2, -1)
                found.setdefault(f"{name}.{i}", (module.gate_up_proj[i], []))[1].append(x)
                middle = module.act_fn(gate) * up
                found.setdefault(f"{name}.{i}.down", (module.down_proj[i], []))[1].append(middle)

        return record

    handles = []
    for name, module in block.named_modules():
        if is_experts(module):
            handles.append(module.register_forward_pre_hook(mixture(name)))
        elif isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(linear(name, module.weight)))
        elif type(module).__name__ == "Conv1D":
            handles.append(module.register_forward_pre_hook(linear(name, module.weight.T)))
    with rounding_states(model, between=True):
        model(MORE_IDS[:-1], use_cache=False)
    for handle in handles:
        handle.remove()
    return [(weight, torch.cat(parts)) for weight, parts in found.values()]


@pytest.mark.parametrize(
    ("model_type", "panel"),
    [
        ("llama", 256),
        ("gpt2", 256),
        ("mixtral", 256),
        ("qwen3_moe", 256),
        ("llama", 40),
        ("mixtral", 32),
    ],
)
def test_hessians_are_of_the_inputs_that_quantized_blocks_before_give_the_float_block(
    tiny, monkeypatch, model_type, panel
):
    source = tiny.source(model_type)
    monkeypatch.setattr("fewbits.statistics.PANEL", panel)
    RECORDED.clear()
    out = tiny.folder / f"panels-{model_type}-{panel}"  # enough tokens, so that no expert is starved
    quantize(source, out, method=Recording(), scheme=G32, calibration=MORE_IDS)
    recorded, count = list(RECORDED), 0
    ledger = read_ledger(out)
    for number in range(2):
        model, original = load(out, dtype=torch.float32), load(source, dtype=torch.float32)
        blocks_of(model)[number] = block = blocks_of(original)[number]
        model.get_submodule(find_blocks(model))[number] = block
        original.config._experts_implementation = "eager"
        for weight, x in inputs_of(model, block):
            expected = (x.double().T @ x.double() / len(x)).float()
            given = [h for w, h in recorded if _holds(w, weight)]
            if not given:  # routers are no matrices to be rounded
                assert len(weight) == 4
                continue
            (hessian,) = given
            count += 1
            # Of mixtures too: a token more or less moves it by a hundredth.
            assert (hessian - expected).abs().max() <= 1e-3 * expected.abs().max()
            assert len(x) in {m["tokens"] for m in ledger.blocks[number]["matrices"]}
    assert count == {"llama": 14, "gpt2": 8}.get(model_type, 2 * (4 + 8))


def _holds(several: Tensor, one: Tensor) -> bool:
    """Matrices that share a Hessian are rounded as one; of experts, gate and up are."""
    if several.shape[1] != one.shape[1]:
        return False
    return bool((several == one[0]).all(-1).any() and (several == one[-1]).all(-1).any())


@pytest.mark.parametrize(
    ("model_type", "starved"),
    [("llama", 0), ("gpt2", 0), ("mixtral", 0), ("granitemoe", 0), ("gpt_oss", 2)],
)
def test_the_written_codes_are_those_of_the_method_on_the_recorded_hessians(tiny, model_type, starved):
    compared = 0
    RECORDED.clear()
    out = tiny.folder / f"recorded-{model_type}"
    result = quantize(tiny.source(model_type), out, method=Recording(), scheme=G32, calibration=MORE_IDS)
    reported = [m for m in matrices_of(result.ledger) if m["method"] == "Recording"]  # not starved
    matrices, expected = iter(reported), dict[str, list]()
    for weight, hessian in RECORDED:
        rounded, notes = GPTQ()(weight, G32, {"hessian": hessian}, torch.bfloat16)
        assert not notes
        start = 0
        while start < len(weight):  # what was rounded as one stands together in the report
            name, _, expert = next(matrices)["name"].partition("[")
            shape = result.ledger.tensors[name].quantized.shape
            part = rounded.rows(slice(start, start + shape[-2]))
            assert not expert or len(expected.get(name, [])) == int(expert[:-1])
            expected.setdefault(name, []).append(part)
            start += shape[-2]
    assert next(matrices, None) is None
    for name, parts in expected.items():
        codes, stacked = result.ledger.tensors[name].quantized, len(parts) > 1
        if len(parts) == codes.matrices:
            assert codes == Codes.of(parts, stacked), name
            compared += 1
    assert compared == sum(e.outcome == "quantized" for e in result.ledger.tensors.values()) - starved


def test_the_error_of_a_matrix_is_that_of_its_output_over_that_of_round_to_nearest(tiny, tmp_path):
    RECORDED.clear()
    source, before = tiny.source("llama"), tensors_of(tiny.source("llama"))
    ledger = quantize(
        source, tmp_path / "out", method=Recording(), scheme=G32, calibration=MORE_IDS
    ).ledger
    loaded = load(tmp_path / "out", dtype=torch.float32)
    for matrix in matrices_of(ledger):
        weight = before[matrix["name"]].float()
        (hessian,) = [h for w, h in RECORDED if _holds(w, weight)]
        ours = weight - loaded.get_submodule(matrix["name"].removesuffix(".weight")).weight
        nearest = weight - quantize_tensor(before[matrix["name"]], G32).dequantize(torch.float32)
        costs = [
            float(torch.trace(e.double() @ hessian.double() @ e.double().T)) for e in (ours, nearest)
        ]
        assert matrix["error_to_rtn"] == pytest.approx(costs[0] / costs[1], rel=1e-4)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """A mixture of 32 experts, one for each token, with 40 tokens to calibrate on."""
    folder = tmp_path_factory.mktemp("sparse")
    tiny_checkpoint(folder / "model", "qwen3_moe", num_experts=32, num_experts_per_tok=1)
    ids = IDS[:6, :8]
    for method in ("gptq", "awq+gptq"):
        quantize(folder / "model", folder / method, method=method, scheme=G32, calibration=ids)
    return folder


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
def test_starved_experts_are_named_and_rounded_by_what_there_is(sparse, method):
    ledger, before = read_ledger(sparse / method), tensors_of(sparse / "model")
    notes: dict[str, list[str]] = {}
    for note in ledger.notes:
        notes.setdefault(note.where, []).append(note.what)
    for block in ledger.blocks:
        experts = [m for m in block["matrices"] if ".experts." in m["name"]]
        assert len(experts) == 3 * 32
        for kind in ("gate_proj", "up_proj", "down_proj"):
            assert sum(m["tokens"] for m in experts if kind in m["name"]) == 40
        for matrix in experts:
            columns = before[matrix["name"]].shape[1]
            if matrix["tokens"] == 0:
                assert matrix["method"] == "RTN"
                assert matrix["error_to_rtn"] in (None, 1.0)
                expected = "no calibration token reached it: rounded to nearest"
            elif matrix["tokens"] < columns:
                assert matrix["method"] == "WeightedRTN"
                assert matrix["error_to_rtn"] < 1
                expected = f"only {matrix['tokens']} calibration tokens for {columns} inputs: weighted"
            assert matrix["steps"][0].startswith(expected)
            assert any(what.startswith(expected) for what in notes[matrix["name"]])
        assert min(m["tokens"] for m in experts) == 0 < max(m["tokens"] for m in experts)
        assert {m["method"] for m in block["matrices"] if m not in experts} == {"GPTQ"}
        assert {m["tokens"] for m in block["matrices"] if m not in experts} == {40}


def test_an_expert_without_a_token_is_rounded_to_nearest(sparse):
    ledger, before = read_ledger(sparse / "gptq"), tensors_of(sparse / "model")
    idle = [m["name"] for m in matrices_of(ledger) if m["tokens"] == 0]
    assert idle
    for name in idle:
        expected = Codes.of([quantize_tensor(before[name], G32)], stacked=False)
        assert ledger.tensors[name].quantized == expected


def test_products_in_bfloat16_cost_next_to_nothing(tiny, tmp_path, monkeypatch):
    """Of a single tiny model the KL moves by a tenth, up or down, with any rounding; not of all."""
    monkeypatch.setattr(stream, "fast_dtype", lambda *_: torch.bfloat16)
    changes = []
    for model_type in ("llama", "gpt2", "cohere", "qwen3_moe"):
        source, slow, fast = tiny.source(model_type), tiny.out(model_type, "gptq"), tmp_path / model_type
        ledger = quantize(source, fast, method="gptq", scheme=G32, calibration=IDS).ledger
        expected, *found = (
            logits(load(folder, dtype=torch.float32), HELD_OUT, between=False)
            for folder in (source, slow, fast)
        )
        before, after = (kl(expected, other) for other in found)
        assert ledger.blocks[-1]["kl"] == pytest.approx(after, rel=0.1)
        changes.append(math.log(after / before))
    assert abs(sum(changes)) / len(changes) < 0.1


# -- recipes -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def twin(tiny):
    """The tiny llama with outliers: what a norm gives is folded for sure, from any exponent."""
    folder = tiny.folder / "twin"
    shutil.copytree(tiny.source("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    readers = {"input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
               "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"]}  # fmt: skip
    for i in range(2):
        for norm, read in readers.items():
            tensors[f"model.layers.{i}.{norm}.weight"][[3, 40]] *= 64
            for name in read:
                tensors[f"model.layers.{i}.{name}.weight"][:, [3, 40]] /= 64
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("method", ["awq", "awq+gptq"])
def test_readers_that_stay_in_float_are_rewritten_with_the_norm(tiny, twin, tmp_path, method):
    overrides = (("*.q_proj", None), ("*.0.mlp.up_proj", None), ("*.k_proj", W8))
    result = quantize(
        twin, tmp_path / "out", method=method, scheme=G32, overrides=overrides, calibration=IDS
    )
    ledger, before, after = result.ledger, tensors_of(twin), tensors_of(tmp_path / "out")
    folded = {name for name, entry in ledger.tensors.items() if entry.outcome == "folded"}
    norms = {f"model.layers.{i}.{norm}.weight" for i in range(2) for norm in NORMS}
    floats = {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    assert folded == norms | floats | {"model.layers.0.mlp.up_proj.weight"}
    for name in floats:  # by powers of two, so exactly
        norm = name.replace("self_attn.q_proj", "input_layernorm")
        ratio = before[norm].float() / after[norm].float()
        assert torch.equal(after[name].float(), before[name].float() * ratio)
        assert ratio.max() > 4 * ratio.min()
    schemes = {m["name"].rsplit(".", 2)[1]: m["scheme"] for m in matrices_of(ledger)}
    assert schemes["k_proj"] == "w8-channel"
    assert schemes["v_proj"] == "w4-g32"
    totals = ledger.totals
    assert (totals["quantized"], totals["folded"], totals["copied"]) == (11, 7, 3)
    assert result.verification.problems == []
    assert verify(tmp_path / "out", twin).source_tensors == 21
    _check_kl(twin, tmp_path / "out", [], ledger.blocks[-1]["kl"])


@pytest.mark.parametrize("method", ["awq", "awq+gptq"])
def test_outliers_cost_awq_nothing(tiny, twin, method):
    """What they cost the method alone is taken away."""

    def last_kl(folder, out, **how):
        return quantize(folder, out, scheme=G32, calibration=IDS, **how).ledger.blocks[-1]["kl"]

    plain = last_kl(
        twin,
        tiny.folder / f"plain-{method}",
        method=method.removeprefix("awq+") if "+" in method else WeightedRTN(),
    )
    folded = last_kl(twin, tiny.folder / f"folded-{method}", method=method)
    assert folded < 0.7 * plain


@pytest.mark.parametrize(
    ("model_type", "method"), [("llama", "gptq"), ("qwen3", "gptq"), ("qwen3", "awq")]
)
def test_a_head_is_rounded_to_nearest_and_said_to_be(tiny, model_type, method):
    source, out = tiny.source(model_type), tiny.out(model_type, method, head=True)
    ledger, before = read_ledger(out), tensors_of(source)
    origin = "lm_head.weight" if "lm_head.weight" in before else "model.embed_tokens.weight"
    expected = Codes.of([quantize_tensor(before[origin], G32)], stacked=False)
    assert ledger.tensors["lm_head.weight"].quantized == expected
    notes = {note.where: note.what for note in ledger.notes}
    assert notes["lm_head.weight"].startswith("outside of the blocks: rounded to nearest")
    assert verify(out, source).problems == []
    # The blocks do not know: the same as without.
    without = read_ledger(tiny.out(model_type, method))
    assert ledger.blocks == without.blocks
    _check_kl(source, out, ["lm_head"], ledger.blocks[-1]["kl"])


@pytest.mark.parametrize("model_type", ["opt", "gpt2"])
def test_the_bias_of_a_linear_that_is_a_source_is_folded_with_its_rows(tiny, model_type):
    ledger = read_ledger(tiny.out(model_type, "awq+gptq"))
    name = {"opt": r"self_attn\.v_proj|fc1", "gpt2": r"attn\.c_attn"}[model_type]
    folds = {n.where for n in ledger.notes if n.what.startswith("folded")}
    sources = {where.partition(" -> ")[0] for where in folds if re.search(rf"({name}) ->", where)}
    assert sources
    biases = {
        n
        for n, e in ledger.tensors.items()
        if e.outcome == "folded" and re.search(rf"({name})\.bias", n)
    }
    assert {bias.removesuffix(".bias") for bias in biases} == sources


def test_a_folded_bias_is_run_as_it_is_written(tiny, tmp_path):
    """Large ones, so that their rounding shows beside that of the weights, which have 8 bits."""
    folder = Path(shutil.copytree(tiny.source("gpt2"), tmp_path / "gpt2"))
    tensors = load_file(folder / "model.safetensors")
    for i in range(2):
        tensors[f"transformer.h.{i}.attn.c_attn.bias"][128:] *= 100
        tensors[f"transformer.h.{i}.attn.c_proj.weight"][::3] /= 64  # folded for sure
        tensors[f"transformer.h.{i}.attn.c_attn.weight"][:, 128:][:, ::3] *= 64
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    result = quantize(folder, tmp_path / "out", method="awq", scheme=W8, calibration=IDS)
    for i in range(2):
        assert result.ledger.tensors[f"transformer.h.{i}.attn.c_attn.bias"].outcome == "folded"
    _check_kl(folder, tmp_path / "out", [], result.ledger.blocks[-1]["kl"])


@pytest.mark.parametrize("label", ["w2-channel", "w3-g32-asym", "w8-tensor", "w4-channel-asym"])
def test_any_scheme_is_calibrated(tiny, label):
    source = tiny.source("llama")
    out = tiny.out("llama", "awq+gptq", scheme=QuantScheme.parse(label))
    assert verify(out, source).problems == []
    _check_kl(source, out, [], read_ledger(out).blocks[-1]["kl"])


def test_what_transformers_rebuilds_from_other_tensors_is_not_folded(twin, tmp_path, monkeypatch):
    def rebuilt(model, names, locate=stream.locate):
        targets = locate(model, names)
        name = "model.layers.0.input_layernorm.weight"
        return targets | ({name: replace(targets[name], converter=object())} if name in targets else {})

    monkeypatch.setattr(stream, "locate", rebuilt)
    ledger = quantize(twin, tmp_path / "out", method="awq", scheme=G32, calibration=IDS).ledger
    (note,) = [note for note in ledger.notes if note.kind == "skip" and "rebuilt" in note.what]
    assert note.where == "model.layers.0.input_layernorm"
    outcomes = [ledger.tensors[f"model.layers.{i}.input_layernorm.weight"].outcome for i in range(2)]
    assert outcomes == ["copied", "folded"]


# -- the same again ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("model_type", "method"), [("llama", "awq+gptq"), ("mixtral", "gptq")])
def test_the_same_input_gives_the_same_bytes(tiny, tmp_path, model_type, method):
    first = tiny.out(model_type, method)
    quantize(
        tiny.source(model_type), tmp_path / "two", method=method, scheme=G32, calibration=IDS.clone()
    )
    one, two = contents(first), contents(tmp_path / "two")
    assert one.pop("run.json")
    assert two.pop("run.json")
    assert one == two


@pytest.mark.parametrize(("model_type", "method"), [("llama", "awq+gptq"), ("mixtral", "gptq")])
def test_hessians_in_several_passes_give_the_same_bytes(tiny, tmp_path, monkeypatch, model_type, method):
    passes: list[int] = []

    def one_at_a_time(*args, real=plan_memory):
        budget = real(*args)
        return replace(budget, limits=replace(budget.limits, statistics_bytes=1))

    def counting(self, *args, real=_Run._passes):
        found = real(self, *args)
        passes.append(len(found))
        return found

    monkeypatch.setattr("fewbits.steps.plan_memory", one_at_a_time)
    monkeypatch.setattr(_Run, "_passes", counting)
    quantize(tiny.source(model_type), tmp_path / "out", method=method, scheme=G32, calibration=IDS)
    assert len(passes) == 2
    assert min(passes) >= 4
    one, several = contents(tiny.out(model_type, method)), contents(tmp_path / "out")
    assert one.pop("run.json")
    assert several.pop("run.json")
    assert one == several


def test_the_finished_result_of_the_same_run_is_reused_without_work(tiny, monkeypatch):
    out = tiny.out("llama", "gptq")
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    monkeypatch.setattr("fewbits.steps.quantize_blocks", None)
    again = quantize(tiny.source("llama"), out, method="gptq", scheme=G32, calibration=IDS)
    assert again.reused
    assert again.verification.source_tensors == 21
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"calibration": IDS.flip(0)}, ["request.calibration.sha256 was"]),
        ({"calibration": IDS[:5]}, ["calibration.samples was 8 and is 5 now"]),
        ({"seed": 7}, ["calibration.seed was 0 and is 7 now"]),
        ({"method": "awq+gptq"}, ["method was 'gptq' and is 'awq+gptq' now", "transforms was []"]),
        ({"method": GPTQ(damp=0.05)}, ["options.damp was 0.01 and is 0.05 now"]),
        ({"method": "rtn", "calibration": None}, ["method was 'gptq' and is 'rtn' now"]),
    ],
)
def test_the_result_of_another_run_is_refused_and_the_difference_named(tiny, arguments, words):
    out = tiny.out("llama", "gptq")
    before = contents(out)
    with pytest.raises(InputError, match="holds another run: ") as refused:
        quantize(
            tiny.source("llama"),
            out,
            **{"method": "gptq", "scheme": G32, "calibration": IDS} | arguments,
        )
    for word in words:
        assert word in str(refused.value)
    assert "\n" not in str(refused.value)
    assert contents(out) == before


# -- memory ------------------------------------------------------------------------------------------


def test_too_little_memory_is_refused_with_what_is_needed(tiny, tmp_path):
    def run(limit):
        quantize(tiny.source("llama"), tmp_path / "out", method="gptq", scheme=G32, calibration=IDS,
                 max_memory=limit)  # fmt: skip

    with pytest.raises(
        InputError, match=r"--max-memory is 0\.10 GB.*accepted is [\d.]+GB or more$"
    ) as told:
        run(10**8)
    assert list(tmp_path.iterdir()) == []
    run(int(1e9 * float(re.search(r"accepted is ([\d.]+)GB", str(told.value))[1])))
    assert contents(tmp_path / "out").keys() == contents(tiny.out("llama", "gptq")).keys()


def test_states_are_in_files_of_their_own(tiny, tmp_path, monkeypatch):
    made = []

    def from_file(path, *args, real=torch.from_file, **kwargs):
        made.append((Path(path).name, kwargs["size"]))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(torch, "from_file", from_file)
    quantize(tiny.source("llama"), tmp_path / "out", method="gptq", scheme=G32, calibration=IDS)
    embedded = 2 * IDS.numel() * 64  # bfloat16
    assert made == [("states.new", embedded), ("states.new", embedded + 4 * IDS.shape[1] * 64)]


# -- what is refused, and what goes wrong ------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "gptq"}, r"^method gptq needs calibration; accepted are a text file"),
        ({"method": "awq"}, r"^method awq needs calibration; "),
        ({"method": "rtn", "calibration": IDS}, r"^method rtn takes no calibration; accepted with it"),
        (
            {"method": "gptq", "calibration": IDS[:1]},
            r"^calibration has 1 sample; accepted are 2 or more",
        ),
        ({"method": "gptq", "calibration": IDS.int()}, r"^calibration ids are \(8, 32\) torch\.int32"),
        ({"method": "gptq", "calibration": IDS + VOCABULARY}, r"gives token \d+, but the model knows"),
        (
            {"method": "gptq", "calibration": IDS.view(2, 128)},
            r"samples of 128 tokens; accepted is .* 64",
        ),
        ({"method": "gptq+awq", "calibration": IDS}, r"^method 'gptq\+awq' is unknown; accepted are"),
        ({"method": "awq+awq", "calibration": IDS}, r"^method 'awq\+awq' is unknown"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(tiny, tmp_path, arguments, message):
    with pytest.raises(InputError, match=message) as refused:
        quantize(tiny.source("llama"), tmp_path / "out", scheme=G32, **arguments)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["gptq", "awq", "awq+gptq"])
@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("llama", "model.layers.1.self_attn.k_proj.weight"),
        ("llama", "model.layers.0.mlp.down_proj.weight"),
        ("llama", "model.layers.1.post_attention_layernorm.weight"),
        ("llama", "model.embed_tokens.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.2.w3.weight"),
    ],
)
def test_a_weight_that_is_not_finite_is_named_and_nothing_left_behind(
    tiny, tmp_path, model_type, name, method
):
    folder = Path(shutil.copytree(tiny.source(model_type), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[5] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=rf"model\.safetensors: {re.escape(name)}:? .*contains NaN or infinity"
    ):
        quantize(folder, tmp_path / "out", method=method, scheme=G32, calibration=IDS)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(("stage", "at"), [("blocks", 0), ("blocks", 1), ("blocks", 2), ("verify", 9)])
def test_after_an_interruption_the_same_call_goes_on(tiny, tmp_path, stage, at):
    def interrupt(what: str, done: int, total: int) -> None:
        if what.startswith(stage) and done == at:
            assert list(tmp_path.iterdir())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tiny.source("llama"), tmp_path / "out", method="gptq", scheme=G32, calibration=IDS,
                 max_shard_bytes=10_000, max_memory=None, progress=interrupt)  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    quantize(tiny.source("llama"), tmp_path / "out", method="gptq", scheme=G32, calibration=IDS,
             max_shard_bytes=10_000)  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert read_ledger(tmp_path / "out").tensors == read_ledger(tiny.out("llama", "gptq")).tensors


@dataclass(frozen=True, slots=True)
class Harmful(GPTQ):
    """GPTQ that spoils what it makes of one weight."""

    victim: str = ""  # the sum of its values; options are JSON
    harm: str = "flip"

    def __call__(self, weight, scheme, stats, scale_dtype=None):
        rounded, notes = super(Harmful, self).__call__(weight, scheme, stats, scale_dtype)
        if str(float(weight.sum())) != self.victim:
            return rounded, notes
        if self.harm == "flip":
            return replace(rounded, codes=rounded.codes.flip(0)), notes
        return replace(rounded, scale=rounded.scale * math.nan), notes


@pytest.mark.parametrize("harm", ["flip", "nan"])
def test_a_block_that_a_method_makes_far_worse_is_rounded_to_nearest_and_said_to_be(
    tiny, tmp_path, harm
):
    source, name = tiny.source("llama"), "model.layers.0.mlp.down_proj.weight"
    before = tensors_of(source)
    method = Harmful(victim=str(float(before[name].float().sum())), harm=harm)
    ledger = quantize(source, tmp_path / "out", method=method, scheme=G32, calibration=IDS).ledger
    bad, good = ledger.blocks
    assert bad["error"] == bad["nearest"]  # on the same samples, from the same states
    (note,) = [n for n in ledger.notes if n.where == "model.layers.0"]
    assert note.kind == "fallback"
    said = re.fullmatch(r"error (\S+) of the block, (\S+) if rounded to nearest: .*", note.what)
    assert said is not None
    assert not float(said[1]) <= 4 * bad["nearest"]  # NaN is no number either
    assert float(said[2]) == pytest.approx(bad["nearest"], rel=1e-2)
    assert len(bad["matrices"]) == 7
    for matrix in bad["matrices"]:
        assert (matrix["method"], matrix["steps"]) == ("RTN", [note.what])
        expected = Codes.of([quantize_tensor(before[matrix["name"]], G32)], stacked=False)
        assert ledger.tensors[matrix["name"]].quantized == expected
    assert {m["method"] for m in good["matrices"]} == {"Harmful"}  # and what it does well is kept
    assert good["error"] < good["nearest"]
    _check_kl(source, tmp_path / "out", [], good["kl"])


def test_the_error_of_rounding_to_nearest_is_that_of_a_block_that_is(tiny, tmp_path):
    """Both runs give the first block the same states."""
    source = tiny.source("llama")
    first = read_ledger(tiny.out("llama", "gptq")).blocks[0]

    @dataclass(frozen=True, slots=True)
    class Nearest(GPTQ):
        def __call__(self, weight, scheme, stats, scale_dtype=None):
            return quantize_tensor(weight, scheme, scale_dtype=torch.bfloat16), []

    ledger = quantize(source, tmp_path / "out", method=Nearest(), scheme=G32, calibration=IDS).ledger
    assert ledger.blocks[0]["error"] == ledger.blocks[0]["nearest"] == first["nearest"]
    assert first["error"] < first["nearest"]


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@torch.no_grad()
def test_the_error_of_rounding_to_nearest_is_that_of_transformers_own_block(tiny, model_type):
    out = tiny.out(model_type, "gptq")
    model, quantized = (load(folder, dtype=torch.float32) for folder in (tiny.source(model_type), out))
    names = [m["name"].removesuffix(".weight") for m in matrices_of(read_ledger(out))]
    for number, (block, rounded) in enumerate(zip(blocks_of(model), blocks_of(quantized), strict=True)):
        outputs: list[Tensor] = []

        def keep(_module, _args, output, outputs=outputs):
            outputs.append(output[0] if isinstance(output, tuple) else output)

        handle = block.register_forward_hook(keep)
        logits(model, HELD_OUT, between=True)
        inside = [
            n for n, m in block.named_modules() if any(name.endswith(f".{number}.{n}") for name in names)
        ]
        for name in inside:
            module = block.get_submodule(name)
            conv = type(module).__name__ == "Conv1D"
            weight = module.weight.T if conv else module.weight
            nearest = quantize_tensor(weight.bfloat16(), G32).dequantize(torch.float32)
            module.weight.copy_(nearest.T if conv else nearest)
        logits(model, HELD_OUT, between=True)
        handle.remove()
        wanted, got = (output.double() for output in outputs)
        told = read_ledger(out).blocks[number]["nearest"]
        assert told == pytest.approx(float((got - wanted).square().mean() / wanted.var()), rel=1e-4)
        for name in inside:  # what the next block is given
            module, other = block.get_submodule(name), rounded.get_submodule(name)
            conv = type(module).__name__ == "Conv1D"
            module.weight.copy_(other.weight.T if conv else other.weight)
    assert len(names) == sum(1 for m in read_ledger(out).tensors.values() if m.outcome == "quantized")


@dataclass(frozen=True, slots=True)
class Overflowing(AWQ):
    """Moves so much from a norm of one block to its readers that float16 cannot hold these."""

    victim: str = ""  # the sum of the norm

    def __call__(self, block, wiring, schemes, search, held_out, dtype):
        norm, readers = block.input_layernorm, ("q_proj", "k_proj", "v_proj")
        if str(float(norm.weight.sum())) != self.victim:
            return [], {}
        norm.weight.data /= 2.0**18
        for reader in readers:
            weight = block.self_attn.get_submodule(reader).weight
            weight.data = weight.data * 2.0**18
        s = torch.full((norm.weight.numel(),), 2.0**18)
        return [], {f"self_attn.{reader}": s for reader in readers}


@pytest.mark.parametrize("rounder", [GPTQ(), WeightedRTN()], ids=["gptq", "awq"])
def test_a_block_with_a_folded_weight_beyond_its_dtype_is_rounded_to_nearest(tmp_path, rounder):
    tiny_model("llama").half().save_pretrained(tmp_path / "model")
    before = tensors_of(tmp_path / "model")
    kept, norm = (f"model.layers.0.{n}.weight" for n in ("self_attn.q_proj", "input_layernorm"))
    assert not torch.isfinite(before[kept] * 2.0**18).all()
    transform = Overflowing(victim=str(float(before[norm].float().sum())))
    result = quantize(
        tmp_path / "model", tmp_path / "out", method=rounder, transforms=(transform,), scheme=G32,
        overrides=(("*.q_proj", None),), calibration=IDS,
    )  # fmt: skip
    ledger, after = result.ledger, tensors_of(tmp_path / "out")
    bad, good = ledger.blocks
    (note,) = [n for n in ledger.notes if n.where == "model.layers.0"]
    assert note.kind == "fallback"
    assert re.fullmatch(r"error (nan|inf) of the block, \S+ if rounded to nearest: .*", note.what)
    assert [m["method"] for m in bad["matrices"]] == ["RTN"] * 6
    assert all(m["method"] == type(rounder).__name__ for m in good["matrices"])
    assert bad["error"] == bad["nearest"]
    assert math.isfinite(bad["error"] + bad["kl"] + good["kl"])
    for name in (kept, norm):  # as if nothing had been tried
        assert ledger.tensors[name].outcome == "copied"
        assert torch.equal(after[name], before[name])
    assert result.verification.problems == []


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (1, {"mlp.gate_proj": 1e30, "mlp.up_proj": 1e30}, "gives NaN or infinity in float"),
        (0, {"mlp.gate_proj": 1e30, "mlp.up_proj": 1e30}, "gives NaN or infinity in float"),
        (0, {"embed_tokens": 0.0}, "gives the same value everywhere"),
    ],
)
def test_a_block_that_computes_nothing_in_float_is_refused_and_named(
    tiny, tmp_path, number, change, message, method
):
    folder = Path(shutil.copytree(tiny.source("llama"), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    for name, factor in change.items():
        whole = name if name == "embed_tokens" else f"layers.{number}.{name}"
        tensors[f"model.{whole}.weight"] *= factor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"^block {number} of {folder} {message}") as refused:
        quantize(folder, tmp_path / "out", method=method, scheme=G32, calibration=IDS)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("transforms", [(), (AWQ(points=3),)])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "gemma2"])
def test_blocks_after_an_interruption_are_those_of_the_whole_run(tmp_path, model_type, transforms):
    layers = "n_layer" if model_type == "gpt2" else "num_hidden_layers"
    tiny_checkpoint(tmp_path / "model", model_type, **{layers: 3})
    recipe = Recipe(GPTQ(), G32, transforms=transforms)
    plan = make_plan(tmp_path / "model", recipe)
    rooms: list[Tensor] = []

    def allocate(size: int) -> Tensor:
        rooms.append(torch.full((size,), 255, dtype=torch.uint8))
        return rooms[-1]

    whole, positions = [], [Position()]
    wirings: dict[str, Any] = {}
    for block in quantize_blocks(plan, recipe, IDS, allocate=allocate):
        whole.append(block)
        wirings |= {kind: asdict(wiring) for kind, wiring in block.wirings.items()}
        read = {kind: Wiring.from_json(w) for kind, w in json.loads(json.dumps(wirings)).items()}
        positions.append(Position(len(whole), [rooms[-1].clone()], read))
    assert len(whole) == 3
    for start in positions[:-1]:
        rest = list(quantize_blocks(plan, recipe, IDS, start=start))
        assert len(rest) == 3 - start.blocks
        for one, other in zip(whole[start.blocks :], rest, strict=True):
            assert (one.report, one.notes) == (other.report, other.notes)
            assert one.weights.keys() == other.weights.keys()
            pairs = [p for n in one.weights for p in zip(one.weights[n], other.weights[n], strict=True)]
            for a, b in pairs:
                assert torch.equal(a.codes, b.codes)
                assert torch.equal(a.scale, b.scale)
                assert torch.equal(a.zero_point, b.zero_point)
            assert one.changed.keys() == other.changed.keys()
            assert all(torch.equal(v, other.changed[n]) for n, v in one.changed.items())


def test_a_hessian_without_a_factor_never_loses_the_run(tiny, tmp_path, monkeypatch):
    def failing(matrix, *args, **kwargs):
        return torch.zeros_like(matrix), torch.tensor(1)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing)
    ledger = quantize(
        tiny.source("llama"), tmp_path / "out", method="gptq", scheme=G32, calibration=IDS
    ).ledger
    noted = {(note.where, note.what) for note in ledger.notes if note.kind == "fallback"}
    for matrix in matrices_of(ledger):
        assert len(matrix["steps"]) == 5
        assert "weighted rounding" in matrix["steps"][-1]
        assert {(matrix["name"], step) for step in matrix["steps"]} <= noted
    weighted = read_ledger(tiny.out("llama", WeightedRTN()))
    assert {n: e.quantized for n, e in ledger.tensors.items()} == {
        n: e.quantized for n, e in weighted.tensors.items()
    }
    assert [b["kl"] for b in ledger.blocks] == [b["kl"] for b in weighted.blocks]


def test_only_some_positions_are_judged_where_there_are_many(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("fewbits.blockwise._LENS", 8)
    source = tiny.source("llama")
    result = quantize(source, tmp_path / "out", method="gptq", scheme=G32, calibration=IDS)
    float_logits = logits(load(source, dtype=torch.float32), HELD_OUT, between=False)[:, ::4]
    measured = logits(load(tmp_path / "out", dtype=torch.float32), HELD_OUT, between=True)[:, ::4]
    told = result.ledger.blocks[-1]["kl"]
    assert told == pytest.approx(kl(float_logits, measured), rel=2e-3)
    assert told != pytest.approx(read_ledger(tiny.out("llama", "gptq")).blocks[-1]["kl"], rel=2e-3)


def test_the_kl_of_each_block_is_that_of_the_model_quantized_up_to_there(tiny):
    source, out = tiny.source("llama"), tiny.out("llama", "gptq")
    ledger = read_ledger(out)
    assert json.loads((out / "fewbits.json").read_text())["blocks"] == ledger.blocks
    # The float model's states behind block 0, and the quantized one's, through its own norm and head.
    seen = []
    for folder, between in ((source, False), (out, True)):
        model = load(folder, dtype=torch.float32)
        blocks = model.get_submodule(find_blocks(model))
        del blocks[1:]
        seen.append(logits(model, HELD_OUT, between))
    assert ledger.blocks[0]["kl"] == pytest.approx(kl(*seen), rel=2e-3)
