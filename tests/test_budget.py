"""Work is divided so that it stays below a budget: refused in time, true, and no other result."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from fewbits import AWQ, GPTQ, RTN, InputError, QuantScheme, WeightedRTN
from fewbits.blockwise import Limits, quantize_blocks
from fewbits.budget import LIBRARIES_BYTES, Budget, plan_memory
from fewbits.memory import STATUS
from fewbits.methods import Learned, LLMInt8
from fewbits.plan import Plan, make_plan
from fewbits.recipe import LLM_INT8_SCHEME, Recipe
from fewbits.stream import TOKENS
from models import VOCABULARY, tiny_checkpoint

G32 = QuantScheme(4, "group", 32)
RECIPES = {
    "rtn": Recipe(RTN(), G32),
    "gptq": Recipe(GPTQ(), G32),
    "awq": Recipe(WeightedRTN(), G32, transforms=(AWQ(),)),
    "awq+gptq": Recipe(GPTQ(), G32, transforms=(AWQ(),)),
    "llm-int8": Recipe(LLMInt8(), LLM_INT8_SCHEME),
    "gptq+learned": Recipe(GPTQ(), G32, learned=Learned()),
}
SHAPE = (8, 32)
# Wide enough that matrices count beside libraries.
WIDE = {
    "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 3, "vocab_size": 2000,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 512,
}  # fmt: skip
CASES = [(model_type, name) for model_type in ("llama", "mixtral") for name in RECIPES]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Checkpoints of some size, each made once."""
    folder = tmp_path_factory.mktemp("wide")

    def get(model_type: str) -> Path:
        path = folder / model_type
        more = {} if model_type == "llama" else {"num_local_experts": 8, "num_hidden_layers": 2}
        if not path.exists():
            tiny_checkpoint(path, model_type, **WIDE | more)
        return path

    return get


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return {m: tiny_checkpoint(folder / m, m) for m in ("llama", "gpt2", "mixtral", "gpt_oss")}


def divided(plan: Plan, name: str, most: int | None, shape: tuple[int, int] = SHAPE) -> Budget:
    return plan_memory(plan, RECIPES[name], None if name == "rtn" else shape, 10**8, most)


def least_of(plan: Plan, name: str, shape: tuple[int, int] = SHAPE) -> int:
    """What is said to be accepted."""
    with pytest.raises(InputError, match=r"--max-memory is 0\.00 GB, and this run takes") as refused:
        divided(plan, name, 1, shape)
    assert "\n" not in str(refused.value)
    said = re.fullmatch(r".*; accepted is ([\d.]+)GB or more", str(refused.value))
    assert said is not None
    return int(1e9 * float(said[1]))


# -- what is planned -----------------------------------------------------------------------------


@pytest.mark.parametrize(("model_type", "name"), CASES)
def test_the_least_that_is_named_is_accepted_and_less_is_not(wide, model_type, name):
    plan = make_plan(wide(model_type), RECIPES[name])
    least = least_of(plan, name)
    assert divided(plan, name, least).peak_bytes <= least
    with pytest.raises(InputError, match="accepted is"):
        divided(plan, name, least - 10**8)  # it is said in steps of 0.1 GB


@pytest.mark.parametrize(("model_type", "name"), CASES)
def test_smaller_budgets_never_do_more_at_a_time_or_take_more_than_they_may(wide, model_type, name):
    plan, shape = make_plan(wide(model_type), RECIPES[name]), (64, 512)
    least, free = least_of(plan, name, shape), divided(plan, name, None, shape)
    assert free.limits == Limits()
    top, step = max(free.peak_bytes, least) + 10**8, 5 * 10**6
    found = [divided(plan, name, most, shape) for most in range(least, top, step)]
    for most, budget in zip(range(least, top, step), found, strict=True):
        assert budget.peak_bytes <= most
        assert budget.limits.tokens in (TOKENS, shape[1])
    assert found[-1].limits.tokens == TOKENS
    if name != "rtn":  # of Hessians there is nothing to divide where there is room for more tokens
        for less, more in pairwise(found):
            assert less.limits.tokens <= more.limits.tokens
            if less.limits.tokens == more.limits.tokens:
                assert less.limits.statistics_bytes <= more.limits.statistics_bytes


@pytest.mark.parametrize("shape", [(64, 512), (8, TOKENS), (8, 2 * TOKENS)], ids=str)
@pytest.mark.parametrize(("model_type", "name"), [case for case in CASES if case[1] != "rtn"])
def test_the_least_budget_to_the_byte_has_room_for_what_it_is_the_least_for(
    wide, model_type, name, shape
):
    plan = make_plan(wide(model_type), RECIPES[name])
    refused, least = 0, least_of(plan, name, shape)
    while least - refused > 1:  # it is said in steps of 0.1 GB
        middle = (refused + least) // 2
        try:
            divided(plan, name, middle, shape)
            least = middle
        except InputError:
            refused = middle
    budget, roomy = divided(plan, name, least, shape), divided(plan, name, 10**11, shape)
    assert budget.peak_bytes <= least
    assert roomy.limits.tokens == TOKENS
    # A sample is never cut: of longer ones no fewer tokens can be run than one has.
    assert budget.limits.tokens in (min(shape[1], TOKENS), TOKENS)
    if "hessian" in RECIPES[name].method.needs:
        widest = max(plan.matrices[n].rows_columns[1] for n in plan.placements)
        assert budget.limits.statistics_bytes >= 4 * widest**2


def test_what_a_process_has_loaded_already_counts(tiny):
    plan = make_plan(tiny["llama"], RECIPES["gptq"])
    few, many = (
        plan_memory(plan, RECIPES["gptq"], SHAPE, used, None).peak_bytes
        for used in (LIBRARIES_BYTES // 2, LIBRARIES_BYTES + 10**9)
    )
    assert few < plan_memory(plan, RECIPES["gptq"], SHAPE, LIBRARIES_BYTES + 1000, None).peak_bytes
    assert many - few == pytest.approx(1.05e9, abs=2)


# -- the same result -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gptq", "awq+gptq"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_statistics_in_several_runs_of_a_block_are_the_same_bits(tiny, model_type, name):
    ids = torch.randint(3, VOCABULARY, SHAPE, generator=torch.Generator().manual_seed(1))
    plan, recipe = make_plan(tiny[model_type], RECIPES[name]), RECIPES[name]

    def run(limit: int | None) -> list:
        return list(quantize_blocks(plan, recipe, ids, limits=Limits(statistics_bytes=limit)))

    whole = run(None)
    assert len(whole) == 2
    for limit in (1, 4 * 64**2 + 4 * 96**2):
        for one, other in zip(whole, run(limit), strict=True):
            assert one.report == other.report
            assert one.notes == other.notes
            assert one.weights.keys() == other.weights.keys()
            for source, parts in one.weights.items():
                for a, b in zip(parts, other.weights[source], strict=True):
                    assert torch.equal(a.codes, b.codes)
                    assert torch.equal(a.scale, b.scale)
            assert one.changed.keys() == other.changed.keys()
            assert all(torch.equal(t, other.changed[n]) for n, t in one.changed.items())


def test_statistics_are_really_collected_in_several_runs(tiny, monkeypatch):
    from fewbits import blockwise

    held: list[int] = []
    finish = blockwise._Run._collect

    def collect(self, *args):
        stats = finish(self, *args)
        held.append(len({id(s) for s in stats.values()}))
        return stats

    monkeypatch.setattr(blockwise._Run, "_collect", collect)
    ids = torch.randint(3, VOCABULARY, SHAPE)
    plan = make_plan(tiny["llama"], RECIPES["gptq"])
    for limit, expected in ((None, [4, 4]), (1, [1] * 8)):  # q k v, o, gate up, down: of two blocks
        held.clear()
        list(quantize_blocks(plan, RECIPES["gptq"], ids, limits=Limits(statistics_bytes=limit)))
        assert held == expected


# -- what is measured ----------------------------------------------------------------------------

_RUN = """
import json, sys
import torch
import fewbits
from fewbits import budget, steps
from fewbits.methods import Learned

folder, out, method, most = sys.argv[1:]
planned = []
plan_memory = steps.plan_memory
for module in (steps, sys.modules["fewbits.measure"]):
    module.plan_memory = lambda *args: planned.append(plan_memory(*args)) or planned[-1]
steps.Steps.check_forward = lambda _: []  # loads the result whole, where there is room
calibrated = {} if method == "rtn" else {
    "calibration": torch.randint(3, 2000, (16, 128), generator=torch.Generator().manual_seed(1))
}
method, _, trellis = method.partition(" ")
scheme = None if method == "llm-int8" else fewbits.QuantScheme(4, "group", 32, trellis=bool(trellis))
most = int(most) or None
try:
    if method == "measure":
        result = fewbits.measure(folder, out, **calibrated, max_memory=most)
    else:
        few = {"learned": Learned(steps=2)} if method.endswith("learned") else {}
        name = method.removesuffix("+learned")
        result = fewbits.quantize(folder, out, method=name, scheme=scheme, **calibrated, **few,
                                  format="fewbits" if trellis else None, max_memory=most)
except fewbits.InputError as error:
    print(json.dumps({"refused": str(error)}))
else:
    blocks = [] if method == "measure" else result.ledger.blocks
    print(json.dumps({"expected": planned[0].peak_bytes, **result.run["memory_bytes"],
                      "kl": [b["kl"] for b in blocks]}))
"""


def measured(folder: Path, out: Path, name: str, most: int) -> dict:
    """What a process of its own took, and expected to take."""
    command = [sys.executable, "-c", _RUN, str(folder), str(out), name, str(most)]
    done = subprocess.run(command, capture_output=True, text=True, check=False,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="anonymous memory is told by Linux")
@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        *(("llama", name) for name in RECIPES),
        ("llama", "gptq+learned trellis"),
        ("mixtral", "gptq"),
        ("mixtral", "measure"),
    ],
)
def test_a_run_takes_no_more_than_expected_and_stays_below_the_least_budget(
    wide, tmp_path, model_type, name
):
    free = measured(wide(model_type), tmp_path / "free", name, 0)
    assert free["anonymous"]
    assert free["peak"] <= free["expected"]
    told = measured(wide(model_type), tmp_path / "refused", name, 1)["refused"]
    least = int(1e9 * float(re.search(r"accepted is ([\d.]+)GB", told)[1]))
    tight = measured(wide(model_type), tmp_path / "tight", name, least)
    assert tight["peak"] <= tight["expected"] <= least
    for one, other in zip(free["kl"], tight["kl"], strict=True):
        assert math.isclose(one, other, rel_tol=0.2)  # fewer tokens at a time: other last bits


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "rtn"])
def test_a_run_that_leaves_every_block_in_float_is_planned(tiny, name):
    recipe = replace(RECIPES[name], head=True, overrides=(("*layers*", None),))
    plan = make_plan(tiny["llama"], recipe)
    assert all(plan.matrices[n].block is None for n in plan.placements)
    assert plan_memory(plan, recipe, SHAPE, 10**8, None).limits == Limits()
