"""Rows and their differences: what a comparison says of any two of them, and what its JSON keeps."""

import json
from dataclasses import replace
from itertools import combinations, permutations

import pytest
import torch

from fewbits.comparison import FLOAT, Comparison, Row, read_comparison
from fewbits.errors import InputError
from fewbits.estimate import Estimate
from fewbits.evaluate import Evaluation, PerWindow, PositionKL
from fewbits.speed import Speed
from fewbits.tasks import TaskScores, compare_scores
from fewbits.tensor import Note

TOKENS = (7, 31, 31, 31)


def evaluation(kl, loss=(14.0, 62.0, 61.0, 66.0)):
    one = Estimate(1.0, 0.1)
    sums = PerWindow(TOKENS, loss, (14.0, 60.0, 60.0, 66.0), kl, (7, 30, 29, 31), (0, 1, 1, 0))
    bins = (PositionKL(0, 16, one), PositionKL(16, 31, Estimate(0.5, None)))
    return Evaluation(
        one, one, one, one, one, one, sum(TOKENS), len(TOKENS), 32, "text", "5e", bins, sums
    )


def scores(*correct):
    answers = tuple(0 if right else 1 for right in correct)
    note = Note("clamp", "arc", "cut")
    return TaskScores(
        "arc", "acc", correct, answers, ("arc",) * len(correct), 0, "ab", "hub", notes=(note,)
    )


SPEED = Speed(1000.0, 50.0, 256, 32, 12345, {"int4": 14, "float": 1}, 2)
ROWS = (
    Row(
        FLOAT, "", "bfloat16", 2000, 16.0, evaluation=evaluation((0.0,) * 4),
        tasks=(scores(True, True, False, True),),
    ),
    Row(
        "gptq", "gptq", "w4-g32", 600, 4.8, resident_bytes=1, quantize_s=1.5, quantize_peak_bytes=2,
        evaluation=evaluation((0.1, 0.5, 0.7, 0.6)), tasks=(scores(True, False, True, True),),
        speed=SPEED, prefill_ratio=Estimate(0.9, 0.1), decode_ratio=Estimate(1.5, None),
        block_errors=(0.1, 0.2), ledger={"sha256": "00", "blocks": [{"kl": 0.1}]}, notes=("fact: a",),
        reused=("evaluation",),
    ),
    Row(
        "awq", "awq", "w4-g32", 600, 4.8, evaluation=evaluation((0.1, 0.6, 0.6, 0.61)),
        tasks=(scores(True, False, True, True),),
    ),
    Row("rtn", "rtn", "w4-g32", 600, 4.8, evaluation=evaluation((0.4, 1.5, 1.71, 1.6))),
)  # fmt: skip
COMPARISON = Comparison(
    {"name": "m", "parameters": 1000}, ROWS, {"name": "text", "sha256": "5e"}, {"source": "self"}, None,
    ({"name": "a", "rms": 0.1},), {"cores": 2}, {"torch": "2"}, "2026-11-25", ("fact: b",),
)  # fmt: skip


@pytest.mark.parametrize("row", [*ROWS, Row("bare", "rtn", "w8-channel", 1, 8.0)], ids=lambda r: r.name)
def test_a_row_is_what_its_json_says(row):
    assert Row.from_json(json.loads(json.dumps(row.to_json()))) == row


def test_a_comparison_is_what_its_json_says(tmp_path):
    text = json.dumps(COMPARISON.to_json())
    assert Comparison.from_json(json.loads(text)) == COMPARISON
    (tmp_path / "compare.json").write_text(text)
    assert read_comparison(tmp_path / "compare.json") == COMPARISON


def test_the_json_holds_the_differences_with_their_errors():
    value = json.loads(json.dumps(COMPARISON.to_json()))
    found = [(d["first"], d["second"], d["measure"], d["noise"]) for d in value["differences"]]
    assert found == [(d.first, d.second, d.measure, d.noise) for d in COMPARISON.differences()]
    assert all(d["estimate"]["error"] is not None for d in value["differences"])


def test_every_two_quantized_rows_are_compared_and_only_they():
    named = {(d.first, d.second) for d in COMPARISON.differences()}
    assert named == set(combinations(("gptq", "awq", "rtn"), 2))
    tasks = [(d.first, d.second) for d in COMPARISON.differences() if d.measure == "arc"]
    assert tasks == [("gptq", "awq")]  # the third has answered no questions


def test_a_row_within_noise_of_another_has_that_other_within_its_own():
    names = [row.name for row in ROWS[1:]]
    for measure in ("kl", "loss", "arc"):
        for a, b in permutations(names, 2):
            there = b in COMPARISON.within_noise_of(a, measure)
            assert there == (a in COMPARISON.within_noise_of(b, measure))
    assert COMPARISON.within_noise_of("gptq") == ["awq"]
    assert COMPARISON.within_noise_of("rtn") == []
    assert set(COMPARISON.within_noise_of("rtn", "loss")) == {"gptq", "awq"}  # the same losses
    assert COMPARISON.within_noise_of("gptq", "arc") == ["awq"]  # the same answers


def test_rows_in_another_order_differ_by_the_negative():
    turned = replace(COMPARISON, rows=(ROWS[0], *ROWS[:0:-1]))
    forth = {(d.first, d.second, d.measure): d.estimate for d in COMPARISON.differences()}
    back = {(d.second, d.first, d.measure): d.estimate for d in turned.differences()}
    assert forth.keys() == back.keys()
    for key, estimate in forth.items():
        assert (estimate.value, estimate.error) == (-back[key].value, back[key].error)


def test_paired_task_differences_cover_the_truth():
    """400 questions, 1,000 trials; both models know most questions alike. Band: `test_estimate.py`."""
    generator = torch.Generator().manual_seed(0)
    hits, flips, trials, n = 0, 0, 1000, 400
    for _ in range(trials):
        easy, again, lost = torch.rand(3, n, generator=generator)
        ours = easy < 0.7
        theirs = torch.where(again < 0.1, ~ours, ours) & (lost > 0.05)  # 10 % turn, 5 % are lost
        found = compare_scores(scores(*ours.tolist()), scores(*theirs.tolist()))
        share = 0.95 * (0.7 * 0.9 + 0.3 * 0.1)
        hits += abs(found.difference.value - (0.7 - share)) <= 1.96 * found.difference.error
        turned = 0.7 * (1 - 0.95 * 0.9) + 0.3 * 0.1 * 0.95
        flips += abs(found.flips.value - turned) <= 1.96 * found.flips.error
        alone = (found.accuracy.error**2 + share * (1 - share) / n) ** 0.5
        assert found.difference.error < alone
    assert abs(hits / trials - 0.95) <= 0.03
    assert abs(flips / trials - 0.95) <= 0.03


def changed(**fields):
    value = COMPARISON.to_json()
    for name, field in fields.items():
        value[name] = field
    return value


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        "null",
        "3",
        '{"rows": []}',
        json.dumps({"architectures": ["LlamaForCausalLM"]}),
        json.dumps({k: v for k, v in COMPARISON.to_json().items() if k != "machine"}),
        json.dumps(changed(rows=[{"name": "float"}])),
        json.dumps(changed(rows="none")),
        json.dumps(changed(rows=[3])),
        json.dumps(changed(notes=None)),
        json.dumps(changed(rows=[ROWS[1].to_json() | {"further": 1}])),
        json.dumps(changed(rows=[ROWS[1].to_json() | {"evaluation": {"kl": 1}}])),
        json.dumps(changed(rows=[ROWS[1].to_json() | {"speed": {"fast": True}}])),
        json.dumps(changed(rows=[ROWS[1].to_json() | {"tasks": [3]}])),
        b"\xff\xfe\x00",
    ],
    ids=range(18),
)
def test_a_file_that_is_none_of_ours_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "compare.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        read_comparison(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"compare\.json"):
        read_comparison(tmp_path / "compare.json")
