"""Several ranks do one run: the same bytes for any number of them, whatever becomes of one."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from fewbits import QuantScheme, Recipe
from fewbits.checkpoint import LEDGER, open_headers
from fewbits.cost import Rates, count_work, estimate_cost
from fewbits.forecast import Choice, group_tensors, observe
from fewbits.plan import make_plan, survey
from fewbits.ranks import ALONE, join, share_out
from fewbits.recipe import parse_method
from fewbits.scale import Group, estimate_share, received_bytes, traffic_bytes
from fewbits.statistics import PARTS, divide_samples
from fewbits.structure import text_config
from fewbits.tensor import quantize_tensor

RANKS = Path(__file__).parent / "ranks.py"
JOBS = [("rtn", "llama"), ("gptq", "llama"), ("awq+gptq", "llama"), ("gptq", "mixtral")]
MORE = [
    ("awq", "llama"), ("llm-int8", "llama"), ("rtn", "mixtral"), ("awq", "mixtral"),
    ("awq+gptq", "mixtral"), ("awq+gptq+learned", "llama"),
]  # fmt: skip
# Forks have torch of their parent, and so what fewbits asks of it for ranks.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "RANK": "0", "WORLD_SIZE": "1"}
KILLED = {"method": "gptq", "model": "llama", "count": 3}


def run(work: Path, rounds: list) -> list:
    """The outcomes of each group of each round."""
    command = [sys.executable, str(RANKS), str(work), json.dumps(rounds)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | _ENVIRONMENT, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads((work / "outcomes.json").read_text())


def group(count: int, jobs: list[tuple[str, str]]) -> list[dict]:
    return [
        {"count": count, "method": method, "model": model, "out": f"{method}-{model}-{count}"}
        for method, model in jobs
    ]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but that of times."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "run.json")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Folder and outcomes of all that the fast tests look at."""
    work = tmp_path_factory.mktemp("ranks")
    killed = KILLED | {"out": "killed", "kill": [1, 45]}
    stopped = KILLED | {"out": "stopped", "stop": [0, 45], "limit": 3.0}
    failed = KILLED | {"out": "failed", "raise": 2}
    judged = {"model": "llama", "evaluate": "mixtral", "length": 24}
    rounds = [
        [group(1, JOBS), group(2, JOBS), group(3, [*JOBS, ("gptq", "wide")])],
        [[killed], [stopped], [failed]],
        [
            [KILLED | {"out": "killed", "count": 2}],
            [KILLED | {"out": "stopped", "count": 1}],
            [judged | {"count": 1, "out": "judged-1"}],
            [judged | {"count": 3, "out": "judged-3"}],
        ],
    ]
    return work, run(work, rounds)


@pytest.mark.parametrize(("method", "model"), JOBS)
def test_any_number_of_ranks_writes_the_same_bytes(ended, method, model):
    work, outcomes = ended
    assert [o["code"] for group in outcomes[0] for o in group] == [0] * 6, outcomes[0]
    alone = contents(work / f"{method}-{model}-1")
    assert LEDGER in alone
    assert sum(name.endswith(".safetensors") for name in alone) > 1
    for count in (2, 3):
        assert contents(work / f"{method}-{model}-{count}") == alone, count


def test_only_rank_0_talks(ended):
    for group in ended[1][0]:
        for outcome in group[1:]:
            assert "shards" not in outcome["said"]
            assert "error" not in outcome["said"]


def errors(outcome: dict) -> list[str]:
    return [line for line in outcome["said"].splitlines() if line.startswith("error:")]


def test_a_killed_rank_is_named_by_every_other_in_one_line(ended):
    zero, one, two = ended[1][1][0]
    assert one["code"] == -9
    for other in (zero, two):
        assert other["code"] == 1
        (line,) = errors(other)
        assert line.startswith("error: rank 1 on ")
        assert "is lost: its process" in line
        assert other["seconds"] - one["seconds"] < 5


def test_a_rank_that_stands_still_is_named_within_the_limit(ended):
    _, *others = ended[1][1][1]
    for other in others:
        assert other["code"] == 1
        (line,) = other["said"].splitlines()  # not a word of torch's
        assert line.startswith("error: rank 0 on ")


def test_what_fails_at_one_rank_is_said_by_rank_0(ended):
    zero, one, two = ended[1][1][2]
    assert [zero["code"], one["code"], two["code"]] == [1, 1, 1]
    assert errors(zero) == ["error: rank 2 has stopped: the disk of this rank failed"]
    assert errors(one) == []


@pytest.mark.parametrize("name", ["killed", "stopped"])
def test_a_run_goes_on_with_another_number_of_ranks(ended, name):
    work, outcomes = ended
    assert [o["code"] for group in outcomes[2] for o in group] == [0] * 7
    assert contents(work / name) == contents(work / "gptq-llama-1")
    assert json.loads((work / name / "run.json").read_text())["resumed_steps"] > 0
    assert not (work / f".{name}.partial").exists()


def count_wide(folder: Path, method: str) -> tuple:
    """Choice, tensors, work and format of a run on the wide model."""
    scheme = QuantScheme(4, "group", 32)
    transforms, rounder, _ = parse_method(method)
    seen = survey(open_headers(folder))
    plan = make_plan(seen, Recipe(rounder, scheme, transforms=transforms))
    groups, _ = group_tensors(plan, seen, scheme)
    readers, config = observe(seen.model, 64).readers, text_config(seen.model)
    work = count_work(plan, groups, readers, config, 11, 24, None)
    return Choice(method, scheme), groups, work, plan.format


def test_traffic_is_what_is_estimated_from_headers(ended):
    """Within 1.2 times, as the issue asks: what is said of matrices, as JSON, is not in the estimate."""
    folder = ended[0]
    choice, _, work, _ = count_wide(folder / "wide", "gptq")
    received = [int((folder / f"received-gptq-wide-3-{rank}").read_text()) for rank in range(3)]
    for rank in range(3):
        expected = sum(received_bytes(choice, work, 3, rank).values())
        assert expected <= received[rank] <= 1.2 * expected, rank
    most = sum(traffic_bytes(choice, work, 3).values())
    assert most <= max(received) <= 1.2 * most


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq+gptq", "weighted-rtn"])
def test_ranks_share_what_can_be_divided_and_no_more(ended, method):
    choice, groups, work, layout = count_wide(ended[0] / "wide", method)
    rates = Rates(**{f.name: 0 if f.name == "baseline_bytes" else 1e-9 for f in fields(Rates)})
    alone, *others = (
        estimate_share(choice, groups, work, rates, layout, Group(count)) for count in (1, 2, PARTS, 99)
    )
    assert alone == estimate_cost(choice, groups, work, rates, layout)
    for count, cost in zip((2, PARTS, 99), others, strict=True):
        assert cost.peak_bytes <= alone.peak_bytes
        for name, seconds in alone.parts_s.items():
            assert seconds / count <= cost.parts_s[name] <= seconds, name
        if "collecting" in alone.parts_s:
            divided = alone.parts_s["collecting"] / cost.parts_s["collecting"]
            assert divided == pytest.approx(min(count, PARTS))


def test_ranks_that_share_windows_measure_the_same(ended):
    """To the last bit; at every rank."""
    alone = json.loads((ended[0] / "judged-1-0").read_text())
    assert alone["windows"] == 400  # three batches
    assert alone["kl"]["value"] > 0
    for rank in range(3):
        assert json.loads((ended[0] / f"judged-3-{rank}").read_text()) == alone


@pytest.mark.slow
def test_many_ranks_and_all_methods_write_the_same_bytes(tmp_path):
    counts = (1, PARTS + 1)
    rounds = [[group(count, MORE)] for count in counts]
    for count, (jobs,) in zip(counts, rounds, strict=True):
        own = {"count": count, "model": "llama", "stats": "stats"}
        jobs.append(own | {"method": "awq+gptq", "out": f"stats-{count}"})
        jobs.append(own | {"method": "gptq", "bits_per_weight": 9.0, "out": f"fitted-{count}"})
    outcomes = run(tmp_path, rounds)
    ended = [o for groups in outcomes for group in groups for o in group]
    assert {o["code"] for o in ended} == {0}, [o["said"] for o in ended if o["code"]]
    for job in rounds[0][0]:
        alone = contents(tmp_path / job["out"])
        for count in counts[1:]:
            other = job["out"].removesuffix("1") + str(count)
            assert contents(tmp_path / other) == alone, other


# -- alone -------------------------------------------------------------------------------------------


def test_alone_nothing_is_sent(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join() is ALONE
    tensor = torch.arange(3)
    assert ALONE.exchange("a", [tensor])[0][1][0] is tensor
    assert ALONE.tell({"a": 1}) == {"a": 1}
    assert ALONE.gather(5) == [5]
    assert ALONE.received_bytes == 0


@pytest.mark.parametrize("count", [1, 2, 5, 7, 8, 9, 31, 124])
def test_parts_are_all_samples_in_order_and_nearly_equal(count):
    parts = divide_samples(range(3, 3 + count))
    assert [i for part in parts for i in part] == list(range(3, 3 + count))
    assert len(parts) == min(PARTS, count)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_work_is_shared_out_by_cost():
    """No rank has more than the fair share and one thing (Graham 1969)."""
    draw = torch.Generator().manual_seed(0)
    for count in (1, 2, 3, 8):
        costs = torch.rand(40, generator=draw).tolist()
        loads = [0.0] * count
        for cost, rank in zip(costs, share_out(costs, count), strict=True):
            loads[rank] += cost
        assert max(loads) <= sum(costs) / count + max(costs)


@pytest.mark.parametrize("label", ["w4-g32", "w3-g32-asym", "w8-channel", "w8-tensor"])
def test_a_quantized_tensor_is_made_of_its_parts(label):
    weight = quantize_tensor(torch.randn(8, 64), QuantScheme.parse(label))
    said, tensors = weight.parts()
    again = type(weight).of_parts(json.loads(json.dumps(said)), list(tensors))
    assert again.scheme == weight.scheme
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.scale, weight.scale)
    assert torch.equal(again.zero_point, weight.zero_point)
