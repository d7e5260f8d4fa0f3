"""Whether to quantize a model, and how: rules that are data, each with a reason and a source.

`advice.toml` holds the rules; this file only matches them with facts. Where the very model was measured
(`fewbits compare`), its own numbers decide instead.
"""

import operator
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from fewbits.errors import InputError
from fewbits.forecast import FLOAT, Forecast, Row
from fewbits.untrusted import MAX_JSON, check_types, parse_json, read_bytes

TASKS = ("math", "code", "chat", "finetune", "research")
# Of the perplexity ratio to float, above 1: what a measured row may lose. Not tuned.
TOLERANCE = 0.01


@dataclass(frozen=True, slots=True)
class Rule:
    """As in advice.toml.

    Args:
        when: fact -> what it must be.
        verdict: what to do; None for a remark.
        stands: measured numbers do not overrule it.
    """

    name: str
    when: Mapping[str, Any]
    reason: str
    source: str
    verdict: str | None = None
    stands: bool = False


@dataclass(frozen=True, slots=True)
class Remark:
    """A rule that matched, its reason with the facts put in."""

    rule: str
    verdict: str | None
    reason: str
    source: str


@dataclass(frozen=True, slots=True)
class Advice:
    """What to do, and all that speaks for it.

    Args:
        verdict: of the first remark that has one.
        measured: whether the verdict rests on measurements of this very model.
    """

    verdict: str
    measured: bool
    remarks: tuple[Remark, ...]

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


_TESTS: dict[str, Callable[[Any, Any], bool]] = {
    "below": operator.lt,
    "at_least": operator.ge,
    "any_of": lambda fact, values: fact in values,
}


@cache
def rules() -> tuple[Rule, ...]:
    """In order: the first that matches and has a verdict decides."""
    text = files("fewbits").joinpath("advice.toml").read_text(encoding="utf-8")
    return tuple(Rule(**entry) for entry in tomllib.loads(text)["rule"])


def matches(when: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    """Whether every fact is as asked; one that is not known is not.

    >>> matches({"batch": {"at_least": 8}, "device": "cuda"}, {"batch": 32, "device": "cuda"})
    True
    >>> matches({"task": {"any_of": ["math", "code"]}}, {"task": None})
    False
    """
    return all(_holds(wanted, facts[name]) for name, wanted in when.items())


def _holds(wanted: Any, fact: Any) -> bool:
    if fact is None:
        return False
    if not isinstance(wanted, Mapping):
        return bool(fact == wanted)
    return all(_TESTS[test](fact, limit) for test, limit in wanted.items())


def facts(forecast: Forecast, task: str | None) -> dict[str, Any]:
    """What rules may ask about; None is what is not known.

    "N_fit" tells whether any row of so many bits fits; where no memory was asked about all do.
    """
    asked = forecast.memory_bytes is not None
    usable = [row for row in forecast.rows if row.refused is None]

    def fits(label: str | None) -> bool:
        rows = [r for r in usable if (r.scheme is None if label is None else _bits(r) == label)]
        return any(row.fits or not asked for row in rows)

    return {
        "parameters": forecast.parameters,
        "parameters_text": _count_text(forecast.parameters),
        "quantized": forecast.quantized is not None,
        "quantization": forecast.quantized,
        "task": task,
        "device": forecast.device,
        "batch": forecast.batch,
        "context": forecast.context,
        "memory_asked": asked,
        "any_fits": any(row.fits for row in usable) if asked else True,
        "float_fits": fits(None),
        "eight_fits": fits("8"),
        "four_fits": fits("4"),
        "three_fits": fits("3"),
        "experts": bool(forecast.rows[0].components.get("experts")),
    }


def _bits(row: Row) -> str:
    return "" if row.scheme is None else row.scheme.removeprefix("w").partition("-")[0]


def _count_text(count: int) -> str:
    """In words.

    >>> _count_text(1_240_000_000), _count_text(5_800_000)
    ('1.24 billion', '5.8 million')
    """
    return f"{count / 1e9:.3g} billion" if count >= 1e9 else f"{count / 1e6:.3g} million"


def advise(
    forecast: Forecast, task: str | None = None, measured: dict[str, Any] | None = None
) -> Advice:
    """The rules that match, in their order; measured numbers before all that they overrule.

    Args:
        forecast: of the model.
        task: one of `TASKS`, or None.
        measured: what `read_measured` found for this model.

    Raises:
        InputError: an unknown task.
    """
    if task is not None and task not in TASKS:
        raise InputError(f"--task is {task!r}; accepted are {', '.join(TASKS)}")
    known = facts(forecast, task)
    matching = [rule for rule in rules() if matches(rule.when, known)]
    remarks = {
        rule.name: Remark(rule.name, rule.verdict, rule.reason.format_map(known), rule.source)
        for rule in matching
    }
    standing = [remarks[rule.name] for rule in matching if rule.stands]
    others = [remarks[rule.name] for rule in matching if not rule.stands]
    found = None if measured is None else _from_measured(measured, forecast)
    ordered = [*standing, *([] if found is None else [found]), *others]
    first = next((remark for remark in ordered if remark.verdict is not None), None)
    if first is None:
        return Advice("no rule speaks of this case: compare methods on it", False, tuple(ordered))
    return Advice(str(first.verdict), first is found, tuple(ordered))


# -- measured numbers --------------------------------------------------------------------------------


def read_measured(path: Path, config_sha256: str) -> tuple[dict[str, Any] | None, str | None]:
    """What `fewbits compare` measured; None, and why, where it was another model.

    Raises:
        InputError: no such file, or not such a file.
    """
    try:
        value = parse_json(read_bytes(path, MAX_JSON).decode())
        other = value["model"]["config_sha256"]
        measured = [row for row in value["rows"] if row["evaluation"] is not None]
        for row in measured:
            ratio = row["evaluation"]["perplexity_ratio"]
            check_types(ratio["value"], float, "a ratio")
            check_types(ratio["error"], float | None, "the error of a ratio")
            check_types(row["weight_bytes"], int, "weight_bytes")
            check_types([row["name"], row["scheme"]], list[str], "name and scheme")
    except InputError as error:
        raise InputError(f"--measured {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"--measured {path} is no result of fewbits compare: {type(error).__name__} {error}"
        ) from None
    if other != config_sha256:
        return None, f"{path} measured another model (its config differs): not used"
    if not measured:
        return None, f"{path} holds no evaluation: not used"
    return value, None


def _from_measured(measured: dict[str, Any], forecast: Forecast) -> Remark:
    """The smallest measured row that loses little and fits; not to quantize where there is none."""
    limit = 1 + TOLERANCE
    ratios = {
        row["name"]: (row["evaluation"]["perplexity_ratio"], row["weight_bytes"])
        for row in measured["rows"]
        if row.get("evaluation") and row["evaluation"].get("perplexity_ratio") and row["name"] != FLOAT
    }
    running = (forecast.kv_cache_bytes or 0) + forecast.overhead_bytes
    room = float("inf") if forecast.memory_bytes is None else forecast.memory_bytes - running
    good = {n: size for n, (ratio, size) in ratios.items() if ratio["value"] <= limit and size <= room}
    told = "; ".join(f"{name} {_ratio_text(ratio)}" for name, (ratio, _) in ratios.items())
    source = "your measurement, by fewbits compare"
    if good:
        best = min(good, key=lambda name: good[name])
        reason = (
            f"measured on a model with this config: {best} is the smallest that fits and loses at most "
            f"{TOLERANCE:.0%} of perplexity (ratios to float: {told})"
        )
        return Remark("measured", best, reason, source)
    rows = [row for row in measured["rows"] if row["name"] in ratios]
    if not any(row["scheme"].startswith("w8") for row in rows):
        reason = (
            f"measured on a model with this config: none of these rows loses at most {TOLERANCE:.0%} of "
            f"perplexity and fits, but no 8 bits were measured (ratios to float: {told or 'none'})"
        )
        return Remark("measured", None, reason, source)
    fits = "" if forecast.memory_bytes is None else " and fits"
    float_fits = forecast.rows[0].weight_bytes <= room
    verdict = "do not quantize" if float_fits else "take a smaller model, or more memory"
    reason = (
        f"measured on a model with this config: no row loses at most {TOLERANCE:.0%} of "
        f"perplexity{fits} (ratios to float: {told or 'none'})"
    )
    return Remark("measured", verdict, reason, source)


def _ratio_text(ratio: dict[str, Any]) -> str:
    error = ratio.get("error")
    return f"{ratio['value']:.4f}" + ("" if error is None else f" ± {error:.4f}")
