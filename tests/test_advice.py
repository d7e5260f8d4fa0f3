"""Advice: every rule can be reached, has a source, and gives way to measurements of the model itself."""

import json
from dataclasses import replace

import pytest

from fewbits import InputError
from fewbits.advice import TASKS, TOLERANCE, advise, facts, matches, read_measured, rules
from fewbits.forecast import FLOAT, Forecast, Row, choices, fit

GB = 10**9


def forecast_of(parameters: float, memory: float | None = None, **changes) -> Forecast:
    """Of a model in bfloat16, without a cache and overhead, so that sizes alone decide."""
    count = int(parameters)
    rows = [Row(FLOAT, None, None, 2 * count, 16.0, {"experts": 0})]
    for choice in choices():
        size = count * choice.scheme.bits // 8
        rows.append(Row(choice.name, choice.method, choice.scheme.label, size, choice.scheme.bits, {}))
    limit = None if memory is None else int(memory)
    found = Forecast("m", "c0ffee", count, None, "cpu", 4096, 1, 0, 0, limit, rows)
    found = replace(found, **changes)
    fit(found)
    return found


EIGHT, FOUR = 8 * GB, 4 * GB  # bytes of 8 billion parameters in 8 and 4 bits

# name of the rule that decides -> a forecast and a task.
DECIDED = {
    "quantized already": (forecast_of(8e9, 99 * GB, quantized="gptq"), "math"),
    "to be fine-tuned": (forecast_of(8e9, EIGHT), "finetune"),
    "research": (forecast_of(8e9, EIGHT), "research"),
    "too large even at the fewest bits": (forecast_of(8e9, 1 * GB), "chat"),
    "small model that fits": (forecast_of(0.9e9, 2 * GB), "chat"),
    "large batches on a GPU": (forecast_of(8e9, EIGHT, device="cuda", batch=32), "math"),
    "mathematics, with room for 8 bits": (forecast_of(8e9, EIGHT), "math"),
    "mathematics, with no room for 8 bits": (forecast_of(8e9, EIGHT - 1), "math"),
    "room for 8 bits": (forecast_of(8e9, EIGHT), "chat"),
    "room for 4 bits": (forecast_of(8e9, FOUR), "chat"),
    "room for 3 bits only": (forecast_of(8e9, FOUR - 1), "chat"),
    "no memory asked about": (forecast_of(8e9), "chat"),
}


@pytest.mark.parametrize("rule", DECIDED)
def test_the_first_rule_that_matches_decides(rule):
    found, task = DECIDED[rule]
    advice = advise(found, task)
    deciding = next(remark for remark in advice.remarks if remark.verdict is not None)
    assert deciding.rule == rule
    assert advice.verdict == deciding.verdict
    assert not advice.measured


def test_every_rule_with_a_verdict_is_reached_here():
    assert {rule.name for rule in rules() if rule.verdict is not None} == set(DECIDED)


REMARKS = {
    "code": (forecast_of(8e9), "code"),
    "long context": (forecast_of(8e9, context=65_536), None),
    "decoding on a CPU": (forecast_of(8e9), None),
    "one sequence on a GPU": (forecast_of(8e9, device="cuda"), None),
    "mixture of experts": (
        forecast_of(8e9, rows=[Row(FLOAT, None, None, 16 * GB, 16.0, {"experts": 9})]),
        None,
    ),
}


@pytest.mark.parametrize("rule", REMARKS)
def test_remarks_are_made_where_they_belong(rule):
    found, task = REMARKS[rule]
    assert rule in [remark.rule for remark in advise(found, task).remarks]
    other = advise(forecast_of(8e9, quantized="gptq"), "chat")
    assert rule not in [remark.rule for remark in other.remarks]


def test_every_remark_is_reached_here():
    assert {rule.name for rule in rules() if rule.verdict is None} == set(REMARKS)


def test_rules_have_sources_and_ask_for_facts_that_there_are():
    known = facts(forecast_of(8e9, 8 * GB), None)
    assert len({rule.name for rule in rules()}) == len(rules())
    for rule in rules():
        assert rule.source.strip(), rule.name
        assert set(rule.when) <= known.keys(), rule.name
        assert rule.reason.format_map(known | {"quantization": "gptq"}), rule.name


@pytest.mark.parametrize("parameters", [1e8, 1e9, 7e10])
@pytest.mark.parametrize("memory", [None, 1e6, 1e9, 1e10, 1e12])
@pytest.mark.parametrize("task", [None, *TASKS])
@pytest.mark.parametrize(("device", "batch"), [("cpu", 1), ("cuda", 64)])
def test_there_is_a_verdict_for_everything(parameters, memory, task, device, batch):
    assert advise(forecast_of(parameters, memory, device=device, batch=batch), task).verdict


def test_the_matcher():
    fact = {"n": 5, "name": "x", "unknown": None}
    assert matches({"n": 5, "name": {"any_of": ["x", "y"]}}, fact)
    assert matches({"n": {"below": 6, "at_least": 5}}, fact)
    assert not matches({"n": {"below": 5}}, fact)
    assert not matches({"n": {"at_least": 6}}, fact)
    assert not matches({"unknown": {"below": 6}}, fact)
    assert not matches({"name": "y"}, fact)
    with pytest.raises(KeyError):
        matches({"n": {"above": 5}}, fact)


def test_an_unknown_task_is_refused_with_those_there_are():
    with pytest.raises(InputError, match=r"'maths'; accepted are math, code, chat"):
        advise(forecast_of(8e9), "maths")


# -- measured numbers ----------------------------------------------------------------------------


def compared(**ratios: tuple[float, int]) -> dict:
    """As `fewbits compare` writes it: name -> perplexity ratio and bytes."""
    rows = [{"name": FLOAT, "weight_bytes": 16 * GB, "evaluation": None}]
    for name, (value, size) in ratios.items():
        ratio = {"value": value, "error": 0.0004}
        scheme = "w8-channel" if name == "int8" else "w4-g128"
        evaluation = {"perplexity_ratio": ratio}
        rows.append({"name": name, "scheme": scheme, "weight_bytes": size, "evaluation": evaluation})
    return {"model": {"name": "m", "config_sha256": "c0ffee"}, "rows": rows}


def test_the_smallest_measured_row_within_the_tolerance_overrules_the_rules():
    measured = compared(int8=(1.0001, 8 * GB), gptq=(1 + TOLERANCE, 4 * GB), rtn=(1.02, 3 * GB))
    advice = advise(forecast_of(8e9, 9 * GB), "chat", measured)
    assert (advice.verdict, advice.measured) == ("gptq", True)
    assert "1.0200 ± 0.0004" in advice.remarks[0].reason
    assert advise(forecast_of(8e9, 9 * GB), "chat").verdict == "8 bits (int8)"


def test_a_measured_row_must_fit():
    measured = compared(int8=(1.0001, 8 * GB), gptq=(1.001, 4 * GB))
    found = forecast_of(8e9, 5 * GB, kv_cache_bytes=GB)
    assert advise(found, None, measured).verdict == "gptq"
    found = forecast_of(8e9, 5 * GB, kv_cache_bytes=GB + 1)
    assert advise(found, None, measured).verdict == "take a smaller model, or more memory"


def test_where_all_that_was_measured_loses_too_much_the_advice_is_not_to_quantize():
    measured = compared(int8=(1.02, 8 * GB), gptq=(1.05, 4 * GB))
    assert advise(forecast_of(8e9), None, measured).verdict == "do not quantize"
    assert advise(forecast_of(8e9, 20 * GB), None, measured).verdict == "do not quantize"
    assert advise(forecast_of(8e9, 9 * GB), None, measured).verdict.startswith("take a smaller")


def test_without_8_bits_measured_nobody_is_told_not_to_quantize():
    advice = advise(forecast_of(8e9, 9 * GB), None, compared(gptq=(1.05, 4 * GB)))
    assert advice.verdict == advise(forecast_of(8e9, 9 * GB)).verdict
    assert not advice.measured
    assert any("no 8 bits were measured" in remark.reason for remark in advice.remarks)


def test_what_the_model_is_for_stands_whatever_was_measured():
    measured = compared(gptq=(1.0, 4 * GB))
    advice = advise(forecast_of(8e9), "finetune", measured)
    assert advice.verdict == "do not quantize before fine-tuning"
    assert not advice.measured
    assert "measured" in [remark.rule for remark in advice.remarks]


def test_measurements_of_another_model_are_not_used(tmp_path):
    path = tmp_path / "compare.json"
    path.write_text(json.dumps(compared(gptq=(1.0, 4 * GB))))
    assert read_measured(path, "c0ffee") == (compared(gptq=(1.0, 4 * GB)), None)
    value, why = read_measured(path, "another")
    assert value is None
    assert "another model" in why
    path.write_text(json.dumps(compared()))
    value, why = read_measured(path, "c0ffee")
    assert value is None
    assert "no evaluation" in why


@pytest.mark.parametrize("text", ["{", "[]", '{"model": {}}', '{"model": {"config_sha256": "x"}}'])
def test_a_file_that_is_no_comparison_is_refused(tmp_path, text):
    path = tmp_path / "compare.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"no result of fewbits compare"):
        read_measured(path, "x")
    with pytest.raises(InputError, match="cannot be read"):
        read_measured(tmp_path / "missing.json", "x")


@pytest.mark.parametrize("broken", [["x"], {"perplexity_ratio": {"value": None, "error": 0}}, {}])
def test_broken_measurements_are_refused_in_one_line(tmp_path, broken):
    value = compared(gptq=(1.0, 4 * GB))
    value["rows"][1]["evaluation"] = broken
    path = tmp_path / "compare.json"
    path.write_text(json.dumps(value))
    with pytest.raises(InputError, match="no result of fewbits compare"):
        read_measured(path, "c0ffee")
