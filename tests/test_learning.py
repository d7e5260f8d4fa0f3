"""Learned rounding in a run: gradients of a block, what is written, and what is left alone."""

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbits import GPTQ, InputError, QuantScheme, load, measure, quantize
from fewbits.blockwise import Position, quantize_blocks
from fewbits.checkpoint import open_checkpoint
from fewbits.learning import BlockLearning, Samples
from fewbits.ledger import read_ledger
from fewbits.linear import float_weight
from fewbits.methods import Learned, Rounding
from fewbits.pieces import find_pieces
from fewbits.plan import make_plan
from fewbits.recipe import Recipe, parse_method
from fewbits.statistics import read_statistics
from fewbits.stream import Stream
from fewbits.wiring import Wiring
from models import VOCABULARY, tiny_checkpoint

G32 = QuantScheme(3, "group", 32)
IDS = torch.randint(3, VOCABULARY, (12, 16), generator=torch.Generator().manual_seed(4))
OPTIONS = Learned(steps=40, rate=0.01)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learning")
    made = {}

    def get(model_type: str, **changes: Any) -> Path:
        key = f"{model_type}{changes}"
        if key not in made:
            made[key] = tiny_checkpoint(folder / str(len(made)), model_type, **changes)
        return made[key]

    return get


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "run.json"}


# -- gradients -----------------------------------------------------------------------------------


def a_block(folder: Path, model_type: str):
    """The first block, all its matrices as pieces, samples, and a matrix that weighs errors."""
    recipe = Recipe(GPTQ(), G32, learned=OPTIONS)
    plan = make_plan(folder, recipe)
    stream = Stream(open_checkpoint(folder), IDS)
    block = stream.load(0)
    matrices = [m for m in plan.matrices.values() if m.block == 0]
    pieces = find_pieces(matrices, f"{stream.path}.0.")
    named = {piece.name: piece for parts in pieces.values() for piece in parts}
    root = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    wanted = stream.run_all(0, block, stream.states)
    for linear in pieces:
        weight = float_weight(block.get_submodule(linear))
        weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))
    samples = Samples(stream.states, wanted)
    return BlockLearning(stream, 0, block, named, root @ root.t() / 64, samples, samples)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3", "mixtral"])
def test_gradients_are_the_slope_of_the_weighed_error(tiny, monkeypatch, model_type):
    monkeypatch.setattr("fewbits.stream.fast_dtype", lambda *_: None)
    learning = a_block(tiny(model_type), model_type)
    found = learning._gradients(torch.arange(len(IDS)))
    tokens = IDS.numel()
    assert found.keys() == learning.pieces.keys()
    for name, piece in learning.pieces.items():
        if model_type == "mixtral" and "experts" not in name:
            continue  # before the router, which sends tokens elsewhere: no slope to be measured
        own = float_weight(learning.block.get_submodule(piece.linear))[piece.start : piece.stop]
        before, way = own.clone(), found[name] / found[name].norm()
        costs = []
        size = 0.01 * float(own.norm())
        for side in (1, -1):
            own.copy_(before + side * size * way)
            costs.append(learning._error() * tokens / 2)
        own.copy_(before)
        slope = (costs[0] - costs[1]) / (2 * size)
        assert slope == pytest.approx(float(found[name].norm()), rel=0.02), name


def test_what_an_error_costs_is_the_mean_square_of_its_products_with_gradients(tiny, tmp_path):
    """F of the statistics, by the gradients that the journal hands from block to block."""
    module = sys.modules["fewbits.measure"]
    kept: dict[int, Tensor] = {}
    fisher = module.find_fisher

    def keep(gradients: Tensor, positions: int) -> Tensor:
        found = fisher(gradients, positions)
        rows = gradients.flatten(0, 1).double()
        errors = torch.randn(5, rows.shape[1], generator=torch.Generator().manual_seed(1)).double()
        wanted = (errors @ rows.t()).square().sum(1) / (2 * positions)
        assert torch.allclose(((errors @ found.double()) * errors).sum(1), wanted, rtol=1e-4)
        kept[len(kept)] = found
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "find_fisher", keep)
        measure(tiny("llama"), tmp_path / "stats", calibration=IDS)
    statistics = read_statistics(tmp_path / "stats")
    assert len(kept) == 2
    for place, found in kept.items():  # backwards
        assert torch.equal(statistics.fisher(1 - place, 64), found)
    assert float(kept[0].diagonal().min()) > 0


# -- what is written -----------------------------------------------------------------------------


def errors_of(notes) -> list[tuple[float, float]]:
    found = []
    for note in notes:
        match = re.search(
            r"rounding (?:not )?learned.*held-out error (\S+) -> (\S+) \((\w+)\)", note.what
        )
        if match:
            found.append((float(match[1]), float(match[2])))
    return found


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(("model_type", "method"), [("llama", "weighted-rtn"), ("gpt2", "weighted-rtn")])
def test_a_run_learns_every_block_and_writes_what_it_says(tiny, tmp_path, model_type, method, stored):
    source, given = tiny(model_type), {"calibration": IDS}
    if stored:
        measure(source, tmp_path / "stats", calibration=IDS)
        given = {"statistics": tmp_path / "stats"}
    kwargs = {"method": method, "scheme": G32, "format": "fewbits"}
    for out in ("out", "again"):
        quantize(source, tmp_path / out, learned=OPTIONS, **kwargs, **given)
    plain = quantize(source, tmp_path / "plain", **kwargs, **given)
    assert contents(tmp_path / "out") == contents(tmp_path / "again")
    ledger = read_ledger(tmp_path / "out")
    assert ledger.request["method"] == f"{method}+learned"
    errors = errors_of(ledger.notes)
    assert len(errors) == 2
    assert all(after <= before for before, after in errors)
    assert any(after < before for before, after in errors)
    changed = 0
    for name, entry in ledger.tensors.items():
        before = plain.ledger.tensors[name]
        if entry.quantized is None:  # embeddings, norms, biases
            assert entry == before
        else:
            assert entry.quantized.scheme == before.quantized.scheme
            changed += entry.quantized != before.quantized
    assert changed > 0


def test_an_expert_that_no_token_reached_keeps_its_codes(tiny, tmp_path):
    source = tiny("qwen3_moe", num_experts=32, num_experts_per_tok=1, num_hidden_layers=1)
    kwargs = {"method": "gptq", "scheme": G32, "calibration": IDS[:6, :8], "format": "fewbits"}
    kwargs["overrides"] = (("*self_attn*", None),)  # so tokens go to the experts they went to
    plain = quantize(source, tmp_path / "plain", **kwargs)
    learned = quantize(source, tmp_path / "out", learned=OPTIONS, **kwargs)
    matrices = [m for block in plain.ledger.blocks for m in block["matrices"]]
    idle = [m["name"] for m in matrices if m["tokens"] == 0]
    assert idle
    for name in idle:
        assert learned.ledger.tensors[name].quantized == plain.ledger.tensors[name].quantized
    assert any(
        learned.ledger.tensors[m["name"]].quantized != plain.ledger.tensors[m["name"]].quantized
        for m in matrices
    )


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_blocks_after_an_interruption_are_those_of_the_whole_run(tmp_path, model_type):
    tiny_checkpoint(tmp_path / "model", model_type, num_hidden_layers=3)
    recipe = Recipe(GPTQ(), G32, learned=OPTIONS)
    plan = make_plan(tmp_path / "model", recipe)
    rooms: list[Tensor] = []

    def allocate(size: int) -> Tensor:
        rooms.append(torch.full((size,), 255, dtype=torch.uint8))
        return rooms[-1]

    whole, positions, wirings = [], [Position()], {}
    for block in quantize_blocks(plan, recipe, IDS, allocate=allocate):
        whole.append(block)
        wirings |= {kind: asdict(wiring) for kind, wiring in block.wirings.items()}
        read = {kind: Wiring.from_json(w) for kind, w in json.loads(json.dumps(wirings)).items()}
        positions.append(Position(len(whole), [rooms[-1].clone()], read))
    for start in positions[1:-1]:
        rest = list(quantize_blocks(plan, recipe, IDS, start=start))
        for one, other in zip(whole[start.blocks :], rest, strict=True):
            assert (one.report, one.notes) == (other.report, other.notes)
            for name, parts in one.weights.items():
                for a, b in zip(parts, other.weights[name], strict=True):
                    assert torch.equal(a.codes, b.codes)
                    assert torch.equal(a.scale, b.scale)


def test_a_block_that_is_not_better_keeps_its_codes_and_says_so(tiny, tmp_path, monkeypatch):
    def worse(self, gradient, rate):
        self.offsets.add_(rate * torch.sign(torch.randn(self.offsets.shape))).clamp_(-0.5, 0.5)

    monkeypatch.setattr(Rounding, "step", worse)
    kwargs = {"method": "gptq", "scheme": G32, "calibration": IDS, "format": "fewbits"}
    learned = quantize(tiny("llama"), tmp_path / "out", learned=Learned(steps=5, rate=0.3), **kwargs)
    plain = quantize(tiny("llama"), tmp_path / "plain", **kwargs)
    assert learned.ledger.tensors == plain.ledger.tensors
    said = [note.what for note in learned.ledger.notes if "not learned" in note.what]
    assert len(said) == 2
    assert all(what.startswith("rounding not learned, nothing was better:") for what in said)


def test_a_run_without_a_matrix_in_a_block_learns_nothing(tiny, tmp_path):
    kwargs = {"method": "gptq", "scheme": G32, "calibration": IDS, "format": "fewbits"}
    overrides = (("*layers.0.*", None),)
    found = quantize(tiny("llama"), tmp_path / "out", learned=OPTIONS, overrides=overrides, **kwargs)
    assert len(errors_of(found.ledger.notes)) == 1


def test_blocks_begin_with_the_embedding_that_is_written(tiny, tmp_path, monkeypatch):
    given: list[Tensor] = []
    wanted: list[Tensor] = []
    learn = BlockLearning.learn

    def keep(self, *args):
        given.append(self.held_out.given[:].float())
        wanted.append(self.fitted.wanted.float())
        return learn(self, *args)

    monkeypatch.setattr(BlockLearning, "learn", keep)
    kwargs = {"method": "gptq", "scheme": G32, "calibration": IDS, "format": "fewbits"}
    quantize(tiny("llama"), tmp_path / "float", learned=OPTIONS, **kwargs)
    result = quantize(tiny("llama"), tmp_path / "out", learned=OPTIONS, embeddings=True, **kwargs)
    embedding = load(tmp_path / "out").get_input_embeddings()
    looked_up = embedding(IDS[-1:]).bfloat16().float()
    assert torch.equal(given[2], looked_up)
    assert not torch.equal(given[2], given[0])
    assert all(torch.equal(one, other) for one, other in zip(wanted[:2], wanted[2:], strict=True))
    said = {note.what for note in result.ledger.notes if "embed_tokens" in note.where}
    assert "the blocks are calibrated on its codes" in said


# -- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rtn", "gptq", "awq", "awq+gptq", "weighted-rtn"])
def test_names_are_read_as_they_are_written(name):
    transforms, method, learned = parse_method(f"{name}+learned")
    assert learned == Learned()
    recipe = Recipe(method, G32, transforms=transforms, learned=learned)
    assert recipe.name == f"{name}+learned"
    assert recipe.needs_calibration
    assert recipe.describe()["learned"] == asdict(Learned())
    assert parse_method(name)[2] is None


@pytest.mark.parametrize("name", ["learned", "learned+gptq", "gptq+learned+learned"])
def test_learning_stands_behind_a_method(name):
    with pytest.raises(InputError, match=r"is unknown; accepted are .* \+learned behind it"):
        parse_method(name)


@pytest.mark.parametrize("name", ["q4_k+learned", "llm-int8+learned"])
def test_other_grids_are_refused(tiny, tmp_path, name):
    with pytest.raises(InputError, match=r"only codes on one grid are learned; accepted before learned"):
        quantize(tiny("llama"), tmp_path / "out", method=name, calibration=IDS)
