"""Statistics of a float model, kept in a folder, and what is quantized from them without the text."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field, replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewbits import (
    AWQ,
    GPTQ,
    InputError,
    QuantScheme,
    ResourceError,
    VerificationError,
    WeightedRTN,
    load,
    measure,
    quantize,
    verify,
)
from fewbits.blockwise import _Run, held_out_samples, quantize_blocks
from fewbits.budget import plan_memory
from fewbits.journal import Journal, partial_folder
from fewbits.ledger import read_ledger
from fewbits.measure import Measurement
from fewbits.plan import make_plan
from fewbits.recipe import Recipe
from fewbits.scheme import InputScheme
from fewbits.statistics import (
    PANEL,
    STATISTICS,
    InputStats,
    Statistics,
    pack_hessian,
    panel_values,
    read_statistics,
    unpack_hessian,
)
from fewbits.structure import find_blocks, is_experts
from fewbits.wiring import scale_readers, scale_source
from models import VOCABULARY, tiny_checkpoint

G32 = QuantScheme(4, "group", 32)
IDS = torch.randint(3, VOCABULARY, (24, 32), generator=torch.Generator().manual_seed(2))
FITTED = IDS[:-1]
BOTH = frozenset({"hessian", "absmax"})
STATIC = QuantScheme(8, inputs=InputScheme("token", 1.5, static=True))


pytestmark = pytest.mark.usefixtures("one_thread", "float32_products")


@dataclass
class Tiny:
    """Tiny checkpoints and their statistics, each made once."""

    folder: Path
    made: dict[Any, Path] = field(default_factory=dict)

    def source(self, model_type: str, **changes: Any) -> Path:
        key = ("source", model_type, str(changes))
        if key not in self.made:
            torch.manual_seed(0)
            path = self.folder / f"{model_type}-{len(self.made)}"
            self.made[key] = tiny_checkpoint(path, model_type, **changes)
        return self.made[key]

    def stats(self, model_type: str, **changes: Any) -> Path:
        key = ("stats", model_type, str(changes))
        if key not in self.made:
            source = self.source(model_type, **changes)
            path = self.folder / f"stats-{len(self.made)}"
            measure(source, path, calibration=IDS)
            self.made[key] = path
        return self.made[key]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny(tmp_path_factory.mktemp("tiny"))


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files but that which says how long it took."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "run.json")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def weights(folder: Path) -> dict[str, Tensor]:
    return {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return list(model.get_submodule(find_blocks(model)))


# -- Hessians ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, PANEL - 1, PANEL, PANEL + 1, 3 * PANEL, 3 * PANEL + 40])
def test_a_hessian_comes_back_from_its_panels_to_the_last_bit(columns):
    x = torch.randn(7, columns)
    hessian = x.T @ x
    hessian = torch.tril(hessian) + torch.tril(hessian, -1).T
    panels = pack_hessian(hessian)
    assert panels.numel() == panel_values(columns) == columns * (columns + PANEL) // 2 or columns % PANEL
    assert panels.numel() == panel_values(columns)
    assert torch.equal(unpack_hessian(panels, columns), hessian)


@torch.no_grad()
def inputs_of(folder: Path) -> dict[str, Tensor]:
    """What every linear and every expert of transformers' own model reads, float64, by our names.

    Hidden states are bfloat16 between blocks.
    """
    model = load(folder, dtype=torch.float32)
    model.config._experts_implementation = "eager"
    found: dict[str, list[Tensor]] = {}

    def enter(_module, args, kwargs):
        if args:
            return (args[0].bfloat16().float(), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"].bfloat16().float()}

    def linear(name: str):
        return lambda _module, args: found.setdefault(name, []).append(args[0].flatten(0, -2))

    def mixture(name: str):
        def record(module, args):
            hidden, chosen, _ = args
            for i in range(len(module.gate_up_proj)):
                x = hidden[(chosen == i).any(-1)]
                gate, up = (x @ module.gate_up_proj[i].T).chunk(2, -1)
                found.setdefault(f"{name}.gate_up_proj.{i}", []).append(x)
                found.setdefault(f"{name}.down_proj.{i}", []).append(module.act_fn(gate) * up)

        return record

    for number, block in enumerate(blocks_of(model)):
        block.register_forward_pre_hook(enter, with_kwargs=True)
        for name, module in block.named_modules():
            if is_experts(module):
                module.register_forward_pre_hook(mixture(f"{number}.{name}"))
            elif isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
                module.register_forward_pre_hook(linear(f"{number}.{name}"))
    model(FITTED, use_cache=False)
    return {name: torch.cat(parts).double() for name, parts in found.items()}


@pytest.mark.parametrize(
    ("model_type", "experts"), [("llama", 0), ("gpt2", 0), ("mixtral", 4), ("qwen3_moe", 4)]
)
def test_hessians_are_those_of_transformers_own_model(tiny, model_type, experts):
    statistics = read_statistics(tiny.stats(model_type))
    wanted, seen = inputs_of(tiny.source(model_type)), set()
    for number, block in enumerate(statistics.blocks):
        assert sum("expert" in i.linears[0] for i in block.inputs) == 2 * experts
        for one in block.inputs:
            stats = statistics.stats(number, one.linears, one.columns, BOTH)
            for path in one.linears:
                x = wanted[f"{number}.{path}"]
                seen.add(f"{number}.{path}")
                assert stats.tokens == one.tokens == len(x)
                # States are rounded to bfloat16 between blocks; after float32 sums in another order
                # some are rounded to the other side, and move a value by up to 2^-8 of it.
                scale = (x.T @ x / len(x)).abs().max()
                assert (stats.hessian - x.T @ x / len(x)).abs().max() <= 1e-3 * scale
                assert (stats.absmax - x.abs().amax(0)).abs().max() <= 2**-7 * x.abs().max()
    assert wanted.keys() - seen == {n for n in wanted if re.search(r"\.(gate|router)$", n)}


def test_what_reads_one_tensor_is_kept_once(tiny):
    statistics = read_statistics(tiny.stats("llama"))
    assert [len(one.linears) for one in statistics.blocks[0].inputs] == [3, 1, 2, 1]
    firsts = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    kinds = ("hessian", "absmax")
    names = {f"{i}.{path}.{what}" for i in range(2) for path in firsts for what in kinds}
    names |= {f"{i}.output.fisher" for i in range(2)}
    names |= {"ids", "lm_head.weight.hessian", "model.embed_tokens.weight.hessian"}
    assert weights(statistics.folder).keys() == names == statistics.tensors.keys()
    widths = [one.columns for block in statistics.blocks for one in block.inputs]
    values = sum(panel_values(n) + n for n in widths) + 4 * panel_values(64)
    held = statistics.ids
    assert sum(t.nbytes for t in weights(statistics.folder).values()) == 4 * values + held.nbytes
    assert statistics.held_out == held_out_samples(*IDS.shape)
    assert torch.equal(held, IDS)  # all of so few are learned from
    assert statistics.calibration["sha256"] == quantize_calibration(IDS)


def quantize_calibration(ids: Tensor) -> str:
    from fewbits import Calibration

    return Calibration(ids, "token ids", 0).sha256


def test_only_samples_for_search_learning_and_judging_are_kept(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("fewbits.blockwise._JUDGED", 96)
    monkeypatch.setattr("fewbits.blockwise._HELD_OUT", 6)
    monkeypatch.setattr("fewbits.learning.LEARNED_TOKENS", 4 * IDS.shape[1])
    stats = tmp_path / "stats"
    measure(tiny.source("llama"), stats, calibration=IDS)
    statistics = read_statistics(stats)
    assert statistics.held_out == 3
    assert torch.equal(statistics.ids, torch.cat([IDS[:4], IDS[-3:]]))
    assert torch.equal(statistics.samples(3), torch.cat([IDS[:3], IDS[-3:]]))
    assert torch.equal(statistics.samples(9), statistics.ids)
    # The first block is searched with and judged on the same samples as in a run on all of them.
    for method in ("gptq", "awq"):
        one, two = (
            quantize(
                tiny.source("llama"),
                tmp_path / f"{method}-{name}",
                scheme=G32,
                **METHODS[method],
                **given,
            ).ledger
            for name, given in (("one", {"statistics": stats}), ("two", {"calibration": IDS}))
        )
        assert one.calibration == two.calibration
        assert method == "awq" or one.blocks[0] == two.blocks[0]
        assert one.blocks[0]["nearest"] == two.blocks[0]["nearest"]
        first, second = (
            [n for n in ledger.notes if n.where.startswith("model.layers.0.")] for ledger in (one, two)
        )
        assert first == second
        assert bool(first) == (method == "awq")


# -- quantizing from it ------------------------------------------------------------------------------

QUICK = (AWQ(points=3),)
METHODS = {
    "gptq": {"method": "gptq"},
    "awq": {"transforms": QUICK, "method": WeightedRTN()},
    "awq+gptq": {"transforms": QUICK, "method": GPTQ()},
    "weighted-rtn": {"method": WeightedRTN()},
    "llm-int8": {"method": "llm-int8", "scheme": STATIC},
}


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("name", METHODS)
def test_every_calibrated_method_works_from_statistics(tiny, tmp_path, name, model_type):
    source, how = tiny.source(model_type), {"scheme": G32} | METHODS[name]
    result = quantize(source, tmp_path / "out", statistics=tiny.stats(model_type), **how)
    ledger, statistics = result.ledger, read_statistics(tiny.stats(model_type))
    assert verify(tmp_path / "out", source).problems == []
    assert ledger.request["statistics"] == statistics.sha256
    assert ledger.calibration == statistics.calibration
    assert [note.where for note in ledger.notes].count("statistics") == 1
    matrices = [matrix for block in ledger.blocks for matrix in block["matrices"]]
    rounded = {e.quantized.scheme for e in ledger.tensors.values() if e.quantized}
    assert rounded == {how["scheme"].label}
    if model_type == "llama":
        assert {m["tokens"] for m in matrices} == {FITTED.numel()}
    if name != "llm-int8":
        assert all(block["error"] < block["nearest"] for block in ledger.blocks)


def test_another_scheme_and_format_need_no_other_statistics(tiny, tmp_path):
    stats = tiny.stats("llama")
    for label, format in (("w3-g32-asym", "gptq-v2"), ("w4-g32-asym", "awq"), ("w8-channel", None)):
        out = tmp_path / label
        quantize(
            tiny.source("llama"), out, method="gptq", scheme=QuantScheme.parse(label), format=format,
            statistics=stats, overrides=(("*.q_proj", None),),
        )  # fmt: skip
        assert verify(out, tiny.source("llama")).problems == []


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("llama", "gptq"), ("mixtral", "gptq"), ("gpt_oss", "weighted-rtn"), ("gpt_oss", "llm-int8")],
)
def test_of_one_block_the_weights_are_those_of_the_calibrated_run(tiny, tmp_path, model_type, name):
    """Nothing lies before it: what it is given is what the float model gives it."""
    layers = {"num_hidden_layers": 1}
    layers |= {"layer_types": ["full_attention"]} if model_type == "gpt_oss" else {}
    source, how = tiny.source(model_type, **layers), {"scheme": G32} | METHODS[name]
    quantize(source, tmp_path / "one", statistics=tiny.stats(model_type, **layers), **how)
    quantize(source, tmp_path / "two", calibration=IDS, **how)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert {file for file in one if one[file] != two[file]} == {"fewbits.json"}
    first, second = (read_ledger(tmp_path / out) for out in ("one", "two"))
    assert first.blocks == second.blocks
    assert first.tensors == second.tensors
    if name == "llm-int8":
        assert any(entry.quantized.outliers for entry in first.tensors.values() if entry.quantized)


def test_hessians_of_few_at_a_time_give_the_same_bytes(tiny, tmp_path, monkeypatch):
    def one_at_a_time(*args, real=plan_memory):
        budget = real(*args)
        return replace(budget, limits=replace(budget.limits, statistics_bytes=1))

    quantize(tiny.source("mixtral"), tmp_path / "one", method="gptq", scheme=G32,
             statistics=tiny.stats("mixtral"))  # fmt: skip
    monkeypatch.setattr(sys.modules[Measurement.__module__], "plan_memory", one_at_a_time)
    monkeypatch.setattr("fewbits.steps.plan_memory", one_at_a_time)
    measure(tiny.source("mixtral"), tmp_path / "stats", calibration=IDS)
    assert contents(tmp_path / "stats") == contents(tiny.stats("mixtral"))
    quantize(tiny.source("mixtral"), tmp_path / "two", method="gptq", scheme=G32,
             statistics=tmp_path / "stats")  # fmt: skip
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_statistics_in_several_files_are_the_same(tiny, tmp_path):
    source, stats = tiny.source("llama"), tmp_path / "stats"
    measure(source, stats, calibration=IDS, max_shard_bytes=50_000)
    assert len(list(stats.glob("statistics-*-of-*.safetensors"))) > 2
    assert {p.suffix for p in stats.iterdir()} == {".json", ".safetensors"}
    one, two = weights(stats), weights(tiny.stats("llama"))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    result = quantize(source, tmp_path / "out", method="gptq", scheme=G32, statistics=stats)
    other = quantize(source, tmp_path / "two", method="gptq", scheme=G32, statistics=tiny.stats("llama"))
    assert result.ledger.tensors == other.ledger.tensors


@dataclass(frozen=True, slots=True)
class Folding(AWQ):
    """Folds something into all there is."""

    def __call__(self, block, wiring, schemes, search, held_out, dtype):
        folds: dict[str, Tensor] = {}
        for pair in wiring.pairs:
            s = torch.rand(pair.rows.count) + 0.5
            scale_source(block, pair, s)
            scale_readers(block, pair, s)
            folds |= dict.fromkeys(pair.readers, s)
        return [], folds


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_a_folded_hessian_is_that_of_the_folded_block(tiny, monkeypatch, model_type):
    """The first block's: what is collected on it as it stands, and what is kept, divided.

    An input of the folded block is that of the block before, divided by s, but for float32 roundings on
    the way there, of relative size n eps in a sum of n products (Higham 2002, 3.5); a product of two has
    twice that, and is summed over tokens.
    """
    recipe = Recipe(GPTQ(), G32, transforms=(Folding(), Folding()))  # one after the other
    plan, statistics = (
        make_plan(tiny.source(model_type), recipe),
        read_statistics(tiny.stats(model_type)),
    )
    compared = []
    real = _Run._collect

    def collect(self, number, block, wiring, pieces, some, folds, codes):
        self.statistics = None
        wanted = real(self, number, block, wiring, pieces, some, folds, codes)
        self.statistics = statistics
        found = real(self, number, block, wiring, pieces, some, folds, codes)
        for path, stat in wanted.items():
            ours = found[path]
            assert stat.tokens == ours.tokens
            sizes = stat.hessian.diagonal().double().sqrt()
            error = (stat.hessian - ours.hessian).double().abs() / (sizes[:, None] * sizes + 1e-30)
            bound = 2 * (2 * 96 + stat.tokens) * torch.finfo(torch.float32).eps
            assert error.max() <= bound, path
            compared.append(len(folds.get(path, [])))
        return found

    monkeypatch.setattr(_Run, "_collect", collect)
    next(quantize_blocks(plan, recipe, statistics.ids, statistics=statistics))
    assert set(compared) == {0, 2}


def test_stats_of_divided_inputs_are_divided():
    x, s = torch.randn(50, 12), torch.rand(12) + 0.5
    found, expected = InputStats.of(12, BOTH), InputStats.of(12, BOTH)
    found.add(x), expected.add(x / s)
    found.finish(), expected.finish()
    found.divide(s)
    assert torch.allclose(found.hessian, expected.hessian, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.absmax, expected.absmax)


def test_no_text_is_read_again(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a b c " * 500)
    source = Path(shutil.copytree(tiny.source("llama"), tmp_path / "model"))
    shutil.copy(Path(__file__).parent.parent / "reference/model/tokenizer.json", source)
    shutil.copy(Path(__file__).parent.parent / "reference/model/tokenizer_config.json", source)
    with pytest.MonkeyPatch.context() as patch:  # a vocabulary larger than the model's
        patch.setattr(
            "fewbits.calibration.tokenize", lambda document, _: [ord(c) % 90 + 3 for c in document]
        )
        measure(source, tmp_path / "stats", calibration=text, samples=8, length=32, seed=3)
    text.unlink()
    result = quantize(source, tmp_path / "out", method="gptq", scheme=G32, statistics=tmp_path / "stats")
    told = result.ledger.calibration
    assert (told["source"], told["samples"], told["seed"]) == ("text.txt", 8, 3)


# -- the same again ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "at", "steps"),
    [
        *(("blocks,", 0, 0), ("blocks,", 1, 1), ("blocks,", 2, 2)),
        *(("blocks back", 0, 2), ("blocks back", 1, 3), ("blocks back", 2, 4)),
    ],
)
def test_an_interrupted_measurement_goes_on_to_the_same_bytes(tiny, tmp_path, way, at, steps):
    def interrupt(what: str, done: int, total: int) -> None:
        if what.startswith(way) and done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(tiny.source("mixtral"), tmp_path / "stats", calibration=IDS, progress=interrupt)
    assert [p.name for p in tmp_path.iterdir()] == ([".stats.partial"] if steps else [])
    result = measure(tiny.source("mixtral"), tmp_path / "stats", calibration=IDS)
    assert result.run["resumed_steps"] == steps
    assert [p.name for p in tmp_path.iterdir()] == ["stats"]
    assert contents(tmp_path / "stats") == contents(tiny.stats("mixtral"))


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
def test_an_interrupted_run_from_statistics_goes_on_to_the_same_bytes(tiny, tmp_path, method):
    def run(out, progress=None):
        return quantize(
            tiny.source("llama"), out, scheme=G32, statistics=tiny.stats("llama"), progress=progress,
            **METHODS[method],
        )  # fmt: skip

    def interrupt(what: str, done: int, total: int) -> None:
        if what.startswith("blocks") and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", interrupt)
    assert run(tmp_path / "out").run["resumed_steps"] == 2
    run(tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert run(tmp_path / "out").reused


_KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
from fewbits import stream
from test_measure import IDS, measure
torch.set_num_threads(1)
stream.fast_dtype = lambda *_: None
def kill(what, done, total):
    if done == 1:
        os.kill(os.getpid(), signal.SIGKILL)
measure(sys.argv[2], sys.argv[3], calibration=IDS, progress=kill)
"""


def test_a_killed_measurement_goes_on_to_the_same_bytes(tiny, tmp_path):
    command = [sys.executable, "-c", _KILLED, str(Path(__file__).parent)]
    command += [str(tiny.source("llama")), str(tmp_path / "stats")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == [".stats.partial"]
    assert measure(tiny.source("llama"), tmp_path / "stats", calibration=IDS).run["resumed_steps"] == 1
    assert contents(tmp_path / "stats") == contents(tiny.stats("llama"))


def test_a_finished_measurement_is_verified_and_reused(tiny):
    stats = tiny.stats("llama")
    before = {p: p.stat().st_mtime_ns for p in stats.rglob("*")}
    again = measure(tiny.source("llama"), stats, calibration=IDS)
    assert again.reused
    assert {p: p.stat().st_mtime_ns for p in stats.rglob("*")} == before
    with pytest.raises(InputError, match=r"holds another measurement: .*sha256 was .* --restart"):
        measure(tiny.source("llama"), stats, calibration=IDS.flip(0))
    assert {p: p.stat().st_mtime_ns for p in stats.rglob("*")} == before


def test_restart_measures_again_and_other_folders_are_left_alone(tiny, tmp_path):
    stats = Path(shutil.copytree(tiny.stats("llama"), tmp_path / "stats"))
    measure(tiny.source("llama"), stats, calibration=IDS.flip(0), restart=True)
    assert contents(stats) != contents(tiny.stats("llama"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").write_text("data")
    with pytest.raises(InputError, match="exists and holds no statistics"):
        measure(tiny.source("llama"), tmp_path / "other", calibration=IDS, restart=True)
    assert (tmp_path / "other" / "precious").read_text() == "data"


# -- what is refused ---------------------------------------------------------------------------------


def refused(tiny, tmp_path, message, stats, model_type="llama", source=None, error=InputError, **more):
    arguments = {"method": "gptq", "scheme": G32, "statistics": stats} | more
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=message) as told:
        quantize(source or tiny.source(model_type), tmp_path / "out", **arguments)
    assert "\n" not in str(told.value)
    assert sorted(tmp_path.iterdir()) == before


def test_statistics_of_another_model_are_refused_and_the_difference_named(tiny, tmp_path):
    refused(tiny, tmp_path, r"measured on another model: config_sha256 was .*files\.model", 
            tiny.stats("llama"), "mixtral")  # fmt: skip
    source = Path(shutil.copytree(tiny.source("llama"), tmp_path / "tuned"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] += 1  # headers cannot tell
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    refused(tiny, tmp_path, r"another model: model\.layers\.1\.mlp\.down_proj\.weight has other values",
            tiny.stats("llama"), source=source)  # fmt: skip


@pytest.mark.parametrize("damage", ["bit", "size", "json", "missing"])
def test_changed_statistics_are_refused(tiny, tmp_path, damage):
    stats = Path(shutil.copytree(tiny.stats("llama"), tmp_path / "stats"))
    path = stats / "statistics.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "bit":
        hessian = load_file(path)["1.self_attn.q_proj.hessian"].numpy().tobytes()
        content[content.index(hessian) + 100] ^= 1
        path.write_bytes(content)
    elif damage == "size":
        path.write_bytes(content[:-4])
    elif damage == "json":
        value = json.loads((stats / STATISTICS).read_text())
        value["blocks"][0]["inputs"][0]["tokens"] += 1
        (stats / STATISTICS).write_text(json.dumps(value))
    else:
        path.unlink()
    messages = {"bit": "was changed since it was measured", "size": "truncated or corrupt",
                "json": "its own hash does not match", "missing": "cannot be read"}  # fmt: skip
    refused(tiny, tmp_path, messages[damage], stats)
    error = InputError if damage == "json" else VerificationError
    with pytest.raises(error):
        measure(tiny.source("llama"), stats, calibration=IDS)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"calibration": IDS}, "calibration and statistics are both given; accepted is one of them"),
        ({"method": "rtn"}, "method rtn takes no statistics; accepted with it are gptq"),
        ({"samples": 7}, "samples is 7, and .* was measured with 24; accepted is to leave it away"),
        ({"length": 16}, "length is 16, and .* was measured with 32"),
        ({"seed": 4}, "seed is 4, and .* was measured with 0"),
    ],
)
def test_what_does_not_go_together_is_one_line(tiny, tmp_path, more, message):
    refused(tiny, tmp_path, message, tiny.stats("llama"), **more)


def test_a_folder_without_statistics_is_refused(tiny, tmp_path):
    refused(tiny, tmp_path, r"has no statistics\.json; accepted is a folder that measure wrote",
            tiny.source("llama"))  # fmt: skip


def test_blocks_made_of_other_modules_are_refused(tiny, tmp_path):
    """As by another version of transformers; the file agrees with itself."""
    stats = Path(shutil.copytree(tiny.stats("llama"), tmp_path / "stats"))
    statistics = read_statistics(stats)
    (kind,) = statistics.wirings
    text = json.dumps(statistics.to_json()).replace(kind, "0" * len(kind))
    value = json.loads(text)
    value.pop("sha256")
    from fewbits.checkpoint import hash_json

    (stats / STATISTICS).write_text(json.dumps(value | {"sha256": hash_json(value)}))
    refused(tiny, tmp_path, "block 0 is made of other modules than when it was measured", stats)


def test_a_run_is_not_continued_with_other_statistics(tiny, tmp_path):
    measure(tiny.source("llama"), tmp_path / "stats", calibration=IDS.flip(0))
    quantize(tiny.source("llama"), tmp_path / "out", method="gptq", scheme=G32,
             statistics=tiny.stats("llama"))  # fmt: skip
    with pytest.raises(InputError, match=r"holds another run: .*request\.statistics was"):
        quantize(tiny.source("llama"), tmp_path / "out", method="gptq", scheme=G32,
                 statistics=tmp_path / "stats")  # fmt: skip


def test_too_little_memory_or_disk_is_refused_before_the_work(tiny, tmp_path, monkeypatch):
    def fail(*_):
        pytest.fail("it works")

    with pytest.raises(InputError, match=r"--max-memory is 0\.10 GB.*accepted is [\d.]+GB or more$"):
        measure(tiny.source("llama"), tmp_path / "stats", calibration=IDS, max_memory=10**8)
    monkeypatch.setattr("fewbits.journal.free_bytes", lambda _: 10**6)
    with pytest.raises(ResourceError, match="GB of disk on the way"):
        measure(tiny.source("llama"), tmp_path / "stats", calibration=IDS, progress=fail)
    assert list(tmp_path.iterdir()) == []


def test_the_stated_size_is_not_below_the_real_one(tiny, tmp_path):
    for model_type in ("llama", "gpt2", "mixtral", "gpt_oss"):
        said: list[str] = []
        measure(tiny.source(model_type), tmp_path / model_type, calibration=IDS,
                progress=lambda what, *_, said=said: said.append(what))  # fmt: skip
        (stated,) = {float(re.search(r"up to (\S+) GB", what)[1]) for what in said if "up to" in what}
        held = read_statistics(tmp_path / model_type)
        values = sum(w.size_bytes for w in held.tensors.values())
        assert values <= 1.01e9 * stated
        assert 1e9 * stated <= 2.5 * values


@pytest.mark.parametrize("bad", ["weight", "output", "last output", "logits"])
def test_a_block_that_is_not_finite_is_named(tiny, tmp_path, bad):
    folder = Path(shutil.copytree(tiny.source("llama"), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    if bad == "weight":
        tensors["model.layers.0.self_attn.k_proj.weight"].view(-1)[5] = float("nan")
    elif bad == "logits":
        tensors["model.norm.weight"] *= 1e38
        tensors["lm_head.weight"] *= 1e38
    else:
        number = 0 if bad == "output" else 1
        for name in ("gate_proj", "up_proj"):
            tensors[f"model.layers.{number}.mlp.{name}.weight"] *= 1e30
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = {
        "weight": r"k_proj\.weight contains NaN",
        "output": "block 0 of .* gives NaN or infinity",
        "last output": "block 1 of .* gives NaN or infinity",
        "logits": "gives logits of NaN or infinity",
    }[bad]
    with pytest.raises(InputError, match=message):
        measure(folder, tmp_path / "stats", calibration=IDS)
    assert list(tmp_path.iterdir()) == [folder]


# -- what a backward pass finds ----------------------------------------------------------------------


@pytest.mark.parametrize("call", [1, 9, 40])
def test_a_backward_step_that_fails_half_way_is_done_again(tiny, tmp_path, monkeypatch, call):
    """Of the head, of the last block and of the first, after some of what they write was written."""
    module, calls = sys.modules[Measurement.__module__], []

    def fail(*args, real=module.find_damage):
        calls.append(args)
        if len(calls) == call:
            raise RuntimeError("half way")
        return real(*args)

    monkeypatch.setattr(module, "find_damage", fail)
    with pytest.raises(RuntimeError, match="half way"):
        measure(tiny.source("mixtral"), tmp_path / "stats", calibration=IDS)
    calls.extend([()] * call)
    steps = {1: 2, 9: 3, 40: 4}[call]
    again = measure(tiny.source("mixtral"), tmp_path / "stats", calibration=IDS)
    assert again.run["resumed_steps"] == steps
    assert contents(tmp_path / "stats") == contents(tiny.stats("mixtral"))


def taken_bytes(folder: Path) -> int:
    """Of disk: files, and those that were deleted and are still mapped."""
    held = {p.stat().st_ino: p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(folder) in line:
            span, inode = (line.split()[i] for i in (0, 4))
            start, stop = (int(end, 16) for end in span.split("-"))
            held.setdefault(int(inode), stop - start)
    return sum(held.values())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux: what is mapped")
@pytest.mark.parametrize("model_type", ["llama", "mixtral", "qwen3"])
def test_the_disk_that_is_asked_for_is_enough(tiny, tmp_path, monkeypatch, model_type):
    asked, taken = [], []

    def look(self, *args, real, **more):
        found = real(self, *args, **more)
        taken.append(taken_bytes(self.folder))
        return found

    for name in ("new_states", "commit_step", "write_json"):
        monkeypatch.setattr(Journal, name, partialmethod(look, real=getattr(Journal, name)))

    def begin(self, *args, real=Journal.begin):
        asked.append(args[-1])
        return real(self, *args)

    monkeypatch.setattr(Journal, "begin", begin)
    measure(tiny.source(model_type), tmp_path / "stats", calibration=IDS)
    # Rooms for the first states, and of each step but the last there and back; steps; two files.
    assert len(taken) == 1 + (1 + 2) + (2 + 3) + 2
    assert max(taken) <= asked[0] <= 2 * max(taken)


@torch.no_grad()
def test_states_before_each_block_are_kept_for_later_steps(tiny, tmp_path):
    """And a damage that those steps give is in the finished folder, the states are not."""
    source = tiny.source("llama")
    plan = make_plan(source, Recipe(GPTQ(), QuantScheme(8)), "fewbits")
    from fewbits import Calibration
    from fewbits.measure import _ask
    from fewbits.memory import watch_memory

    data = Calibration(IDS, "by hand", 0)
    with watch_memory() as memory, Journal(tmp_path / "stats") as journal:
        asked = _ask(plan, data, source, torch.device("cpu"))
        run = Measurement(plan, data, asked, journal, kept_tokens=4 * 32 - 1)
        run.take()
        found = [run.states(number) for number in range(3)]
        looked = [[(one, run.hessian(i, one)) for one in run.inputs(i)] for i in range(2)]
        journal.add("0.self_attn.q_proj.rows", torch.ones(128))
        journal.commit_step({"damage": {"model.layers.0.self_attn.q_proj.weight": {"w4-g32": 0.25}}})
        run.finish(0.0, memory, 2**30)
    model = load(source, dtype=torch.float32)
    states = model.get_input_embeddings()(IDS[:3])
    for block, kept in zip([*blocks_of(model), None], found, strict=True):
        assert kept.dtype == torch.bfloat16
        assert kept.shape == (3, 32, 64)
        # Rounded to bfloat16 once, or to the other side of it: half a step, or a whole one.
        assert ((kept.float() - states).abs() <= 2**-7 * states.abs() + 1e-5).all()
        if block is not None:
            position = torch.arange(32)[None]
            embedding = model.model.rotary_emb(states, position)
            mask = torch.full((32, 32), float("-inf")).triu(1)[None, None]
            states = block(kept.float(), position_embeddings=embedding, attention_mask=mask)
            states = states[0] if isinstance(states, tuple) else states
    statistics = read_statistics(tmp_path / "stats")
    assert statistics.damage["model.layers.0.self_attn.q_proj.weight"] == {"w4-g32": 0.25}
    assert not [name for name in statistics.tensors if name.endswith(".states")]
    for i, block in enumerate(statistics.blocks):
        assert tuple(one for one, _ in looked[i]) == block.inputs
        for one, hessian in looked[i]:
            assert torch.equal(hessian, statistics.stats(i, one.linears, one.columns, BOTH).hessian)
    assert statistics.read("0.self_attn.q_proj.rows").sum() == 128
    assert not partial_folder(tmp_path / "stats").exists()
    assert isinstance(statistics, Statistics)
