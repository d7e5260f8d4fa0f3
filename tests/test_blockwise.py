"""Calibrated quantization from folder to folder, for every kind of architecture."""

import json
import math
import re
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewbits import GPTQ, AWQ, InputError, QuantScheme, WeightedRTN, load, quantize, quantize_tensor, verify
from fewbits.blockwise import estimate_memory
from fewbits.checkpoint import open_checkpoint
from fewbits.ledger import Codes, read_ledger
from fewbits.plan import make_plan
from fewbits.recipe import Recipe
from fewbits.structure import find_blocks, find_matrices, is_experts, skeleton
from models import ALL, VOCABULARY, tiny_checkpoint

G32, W8 = QuantScheme(4, "group", 32), QuantScheme(8)
IDS = torch.randint(3, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(1))
FITTED, HELD_OUT = IDS[:-1], IDS[-1:]
NORMS = ("input_layernorm", "post_attention_layernorm")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These models are too small for two: they would wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    """Hidden states are bfloat16 in front of the first block; also behind each one."""

    def rounded(value: Any) -> Any:
        if isinstance(value, tuple):
            return rounded(value[0]), *value[1:]
        return value.bfloat16().float()

    def enter(_module, args, kwargs):
        if args:
            return rounded(args), kwargs
        return args, kwargs | {"hidden_states": rounded(kwargs["hidden_states"])}

    blocks = blocks_of(model)
    handles = [blocks[0].register_forward_pre_hook(enter, with_kwargs=True)]
    if between:
        handles += [b.register_forward_hook(lambda _module, _args, output: rounded(output)) for b in blocks]
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

CASES = [(m, method) for m in ALL for method in ("gptq", "awq+gptq")]
CASES += [(m, "awq") for m in ("llama", "opt", "mixtral")]


@pytest.mark.parametrize(("model_type", "method"), CASES)
def test_every_architecture_is_quantized_and_its_report_is_true(tiny, model_type, method):
    source, out = tiny.source(model_type), tiny.out(model_type, method)
    checked, ledger = verify(out, source), read_ledger(out)
    assert checked.problems == []

    # Every tensor is accounted for, every matrix of a block quantized and reported.
    before, totals = tensors_of(source), ledger.totals
    model = skeleton(json.loads((source / "config.json").read_text()))
    found, _ = find_matrices(model, {name: tuple(t.shape) for name, t in before.items()})
    inside = {name: m for name, m in found.items() if m.block is not None}
    quantized = {name for name, entry in ledger.tensors.items() if entry.outcome == "quantized"}
    assert quantized == {name for name, m in found.items() if not m.head} >= inside.keys()
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
            assert inside[matrix["name"].partition("[")[0]].block == block["block"]
            assert matrix["scheme"] == "w4-g32"

    # What is folded is a norm, a bias, or a router; nothing else was changed, and nothing without AWQ.
    after = tensors_of(out)
    for name, entry in ledger.tensors.items():
        if entry.outcome == "folded":
            assert "awq" in method
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
