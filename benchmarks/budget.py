"""The best model of a given size: ours against other tools' at equal size, and what was predicted of it.

Size is that of whole weight files, with embeddings and headers, in bits per source parameter. Every
result of another tool that no other is both smaller and better than has to be met: we are given its
size, and KL to the float model on held-out text is compared. The same against our own uniform
allocation, and over many budgets, where the predicted KL must order models as the measured one does.
Results are kept as those of `quality.py`, whose code measures them.

Run:  bash benchmarks/rivals/setup.sh build/rivals
      python benchmarks/budget.py --environments build/rivals --json build/budget.json
"""

import argparse
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from transformers.utils.logging import disable_progress_bar

from quality import LENGTH, SAMPLES, WINDOWS, Bench, Case, Check, Ratios, Result, average, worst
from samples import MODELS
from tools import ENVIRONMENTS, TOOLS, ToolError, provenance


@dataclass(frozen=True)
class Level:
    """What is compared together.

    Args:
        bits: of the codes of tools with one grid for all.
        limit: of our KL over the best rival's.
    """

    bits: int
    limit: float


LEVELS = {4.25: Level(4, 0.8), 3.25: Level(3, 0.7)}  # average bits of tools that mix
TWIN_LIMIT = 0.3
RANK_LIMIT = 0.95
LEAST, MOST = 2.5, 8.5  # bits per weight of whole files, of the many budgets
UNCALIBRATED = ("hqq",)
ASYMMETRIC = ("hqq", "k_m")  # grids that they cannot do without


# -- what is run ---------------------------------------------------------------------------------


def rival_cases(model: str, level: float, seed: int, tools: list[str]) -> list[Case]:
    """Everything that other tools do at one level."""
    found = []
    for tool in tools:
        for method in TOOLS[tool].methods:
            bits = level if method == "autoscheme" else LEVELS[level].bits
            own = 0 if method in UNCALIBRATED else seed
            found.append(Case(model, bits, method not in ASYMMETRIC, own, tool, method))
    return found


def ours(model: str, seed: int, size: float, method: str, args: argparse.Namespace) -> Case:
    """We, at a size."""
    return Case(model, 0, True, seed, "fewbits", method, size, args.format, args.embeddings)


def uniform(model: str, seed: int, level: float, args: argparse.Namespace) -> Case:
    """We, with one scheme for all; `best` chooses several, and rounds like `awq+gptq`."""
    method = "awq+gptq" if args.method == "best" else args.method
    return Case(model, LEVELS[level].bits, True, seed, "fewbits", method)


def size_of(result: Result) -> float:
    """Bits per weight over whole files."""
    return 8 * result.facts["weight_bytes"] / result.facts["parameters"]


def front(results: dict[Case, Result]) -> list[Case]:
    """Those that no other is smaller and better than, the smallest first."""
    found: list[Case] = []
    for case in sorted(results, key=lambda case: (size_of(results[case]), results[case].mean)):
        if not found or results[case].mean < results[found[-1]].mean:
            found.append(case)
    return found


class Runs:
    """Measures what it is asked, tells of each, and remembers what was refused.

    Args:
        start_rivals: run other tools for results that the work folder does not hold.
    """

    def __init__(self, bench: Bench, start_rivals: bool) -> None:
        self.bench, self.start_rivals = bench, start_rivals
        self.results: dict[Case, Result] = {}
        self.refused: dict[Case, str] = {}

    def __call__(self, case: Case) -> Result | None:
        """None if the tool refused."""
        if case not in self.results and case not in self.refused:
            try:
                result = self.find(case)
                self.results[case] = result
                said = f"KL {result.mean:.5f} at {size_of(result):.4f} bits per weight"
            except ToolError as error:
                self.refused[case] = said = str(error)
            print(f"{case.label}: {said}", file=sys.stderr)
        return self.results.get(case)

    def find(self, case: Case) -> Result:
        """Kept, or measured now."""
        if case.tool == "fewbits" or self.start_rivals:
            return self.bench.measure(case)
        result = self.bench.known(case)
        if result is None:
            raise ToolError("left out: not in the work folder, and no other tool is started")
        return result


# -- equal size ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A result, and ours at its size, where that is asked for: of what has to be met.

    `ours` is None where it was not asked for, or was refused.
    """

    model: str
    level: float
    seed: int
    case: Case
    result: Result
    asked: bool
    ours: Result | None

    @property
    def ratio(self) -> float:
        """Of KL; infinite where we have none."""
        return float("inf") if self.ours is None else self.ours.mean / self.result.mean

    @property
    def cell(self) -> Case:
        """Equal for pairs of which the worst counts."""
        return Case(self.model, self.level, True, self.seed, "", "")

    def row(self) -> dict[str, Any]:
        """For the file."""
        return {
            "model": self.model,
            "level": self.level,
            "seed": self.seed,
            "tool": self.case.tool,
            "method": self.case.method,
            "bits per weight": size_of(self.result),
            "KL": self.result.mean,
            "our bits per weight": self.ours and size_of(self.ours),
            "our KL": self.ours and self.ours.mean,
            "ratio": self.ratio if self.asked else None,
        }


def compared(runs: Runs, args: argparse.Namespace) -> tuple[list[Pair], list[Pair]]:
    """Ours against other tools, and against our own uniform allocation."""
    others, own = [], []
    for model in args.models:
        for level in args.levels:
            for seed in args.seeds:
                cases = rival_cases(model, level, seed, args.rivals)
                found = {case: result for case in cases if (result := runs(case)) is not None}
                alike = uniform(model, seed, level, args)
                best = [] if args.only_rivals else front(found)
                places = [(others, case, result, case in best) for case, result in found.items()]
                if not args.only_rivals and (result := runs(alike)) is not None:
                    places.append((own, alike, result, True))
                for pairs, case, result, asked in places:
                    mine = runs(ours(model, seed, size_of(result), args.method, args)) if asked else None
                    pairs.append(Pair(model, level, seed, case, result, asked, mine))
    return others, own


def by_cell(pairs: list[Pair]) -> Ratios:
    """The worst ratio of each model, level and seed: who has to be met is the best."""
    ratios: Ratios = {}
    for pair in pairs:
        if pair.asked:
            ratios[pair.cell] = max(ratios.get(pair.cell, 0.0), pair.ratio)
    return ratios


def print_pairs(pairs: list[Pair]) -> None:
    print("| model | level | seed | tool | method | bits/weight | KL | ours | ratio |")
    print("|---|---:|---:|---|---|---:|---:|---:|---:|")
    for pair in pairs:
        mine = "" if pair.ours is None else f"{pair.ours.mean:.5f}"
        ratio = f"{pair.ratio:.3f}" if pair.asked else ""
        print(
            f"| {pair.model} | {pair.level} | {pair.seed} | {pair.case.tool} | {pair.case.method} "
            f"| {size_of(pair.result):.4f} | {pair.result.mean:.5f} | {mine} | {ratio} |"
        )


# -- many budgets --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One budget: what was predicted, and what came of it; None where we refused."""

    model: str
    size: float
    result: Result | None

    def row(self) -> dict[str, Any]:
        """For the file."""
        facts = {} if self.result is None else self.result.facts
        return {
            "model": self.model,
            "budget": self.size,
            "bits per weight": self.result and size_of(self.result),
            "predicted KL": facts.get("predicted_kl"),
            "KL": self.result and self.result.mean,
        }


def points(runs: Runs, args: argparse.Namespace) -> list[Point]:
    sizes = np.geomspace(LEAST, MOST, args.budgets).round(3).tolist() if args.budgets else []
    return [
        Point(model, size, runs(ours(model, args.seeds[0], size, args.budgets_method, args)))
        for model in args.models
        for size in sizes
    ]


def rank_correlation(found: list[Point], model: str) -> float:
    """Spearman's, of predicted and measured KL; 0 where a budget was refused."""
    own = [point.result for point in found if point.model == model]
    if None in own:
        return 0.0
    predicted, measured = [r.facts["predicted_kl"] for r in own], [r.mean for r in own]
    return float(spearmanr(predicted, measured).statistic)


def print_points(found: list[Point]) -> None:
    print("| model | budget, bits/weight | bits/weight | predicted KL | KL |")
    print("|---|---:|---:|---:|---:|")
    for point in found:
        row = point.row()
        cells = ("" if row[k] is None else f"{row[k]:.5f}"
                 for k in ("bits per weight", "predicted KL", "KL"))  # fmt: skip
        print(f"| {point.model} | {point.size} | {' | '.join(cells)} |")


# -- what must hold ------------------------------------------------------------------------------


def beyond(runs: Runs) -> list[int]:
    """Bytes of the files of each model of ours beyond its budget, and beside what was predicted."""
    found = []
    for case, result in runs.results.items():
        if case.bits_per_weight is not None:
            facts = result.facts
            budget = int(case.bits_per_weight * facts["parameters"] / 8 + 1e-6)  # what was rounded
            found.append(facts["weight_bytes"] - budget)
            found.append(abs(facts["weight_bytes"] - facts["predicted_bytes"]))
    return found


def checks(others: list[Pair], own: list[Pair], found: list[Point], runs: Runs) -> list[Check]:
    """The figures that must hold."""
    verdicts = []
    for level, fixed in LEVELS.items():
        ratios = {cell: ratio for cell, ratio in by_cell(others).items() if cell.bits == level}
        twins = {cell: ratio for cell, ratio in ratios.items() if cell.model == "twin"}
        verdicts += [
            average(f"KL over the best rival's of its size, {level} bits", ratios, fixed.limit),
            average(f"the same on the twin, {level} bits", twins, TWIN_LIMIT),
        ]
    verdicts.append(worst("KL over that of our uniform allocation of its size", by_cell(own), 1.0))
    for model in dict.fromkeys(point.model for point in found):
        what = f"1 - rank correlation of predicted and measured KL, {model}"
        verdicts.append(Check(what, 1 - rank_correlation(found, model), 1 - RANK_LIMIT))
    bytes_beyond = beyond(runs)
    what = "bytes beyond the budget, or beside what was predicted"
    verdicts.append(Check(what, max(bytes_beyond) if bytes_beyond else None, 0.0))
    return verdicts


# -- the command line ----------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    models = [name for name in ("reference", "twin", "babyllama105") if MODELS[name].source.is_dir()]
    rivals = [name for name in TOOLS if name != "fewbits"]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=models)
    parser.add_argument("--levels", nargs="*", type=float, choices=LEVELS, default=list(LEVELS))
    parser.add_argument("--rivals", nargs="+", choices=rivals, default=rivals)
    parser.add_argument("--only-rivals", action="store_true", help="measure nothing of ours")
    parser.add_argument("--known-rivals", action="store_true", help="start no other tool")
    parser.add_argument("--method", default="best", help="ours, against others")
    parser.add_argument("--budgets-method", default="gptq", help="ours, over many budgets")
    parser.add_argument("--format", default="fewbits", help="ours, at a size")
    parser.add_argument(
        "--embeddings", action=argparse.BooleanOptionalAction, default=True, help="ours, at a size"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--budgets", type=int, default=24, help="how many; 0 leaves this part out")
    parser.add_argument("--environments", type=Path, default=Path(ENVIRONMENTS))
    parser.add_argument("--work", type=Path, default=Path("build/quality"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the result here")
    return parser.parse_args()


def command(args: argparse.Namespace) -> str:
    """What was run, without the folders of this machine."""
    options = [f"--{name} {shlex.join(map(str, getattr(args, name)))}"
               for name in ("models", "levels", "rivals", "seeds")]  # fmt: skip
    alone = ["--only-rivals"] * args.only_rivals + ["--known-rivals"] * args.known_rivals
    return " ".join(
        ["python benchmarks/budget.py", *options, *alone,
         f"--method {args.method} --format {args.format}",
         f"--{'' if args.embeddings else 'no-'}embeddings",
         f"--budgets {args.budgets} --budgets-method {args.budgets_method}"]
    )  # fmt: skip


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    disable_progress_bar()
    runs = Runs(Bench(args.work, args.environments, args.threads), not args.known_rivals)
    others, own = compared(runs, args)
    found = [] if args.only_rivals else points(runs, args)
    verdicts = [] if args.only_rivals else checks(others, own, found, runs)
    print_pairs(others)
    print_pairs(own)
    print_points(found)
    refused = {case.label: reason for case, reason in runs.refused.items()}
    print(*(f"{label}: {reason}" for label, reason in refused.items()), *verdicts, sep="\n")
    if args.json:
        facts = provenance(command(args)) | {
            "calibration": f"{SAMPLES} x {LENGTH} tokens",
            "heldout": f"{WINDOWS} x {LENGTH} tokens",
            "other tools": [pair.row() for pair in others],
            "uniform": [pair.row() for pair in own],
            "budgets": [point.row() for point in found],
            "refused": refused,
            "checks": [str(verdict) for verdict in verdicts],
        }
        args.json.write_text(json.dumps(facts, indent=1) + "\n")
    failed = [verdict for verdict in verdicts if not verdict.holds]
    if failed:
        sys.exit(f"{len(failed)} of {len(verdicts)} figures fail")


if __name__ == "__main__":
    main()
