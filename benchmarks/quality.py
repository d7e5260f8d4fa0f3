"""What quantization costs in quality, by us and by others: KL to the float model on held-out text.

Every tool gets the same checkpoint and the same calibration ids, and its result is turned into
plain float32 weights, so one function judges them all on the same held-out ids. Results are kept in
the work folder under a hash of what they depend on: a run that was stopped continues. The figures
that must hold are asserted at the end, as far as their results were asked for.

Run:  bash benchmarks/rivals/setup.sh build/rivals
      python benchmarks/quality.py --environments build/rivals --json build/quality.json
"""

import argparse
import hashlib
import itertools
import json
import math
import shlex
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from fewbits.estimate import Estimate, ratio_estimate
from samples import (
    MODELS,
    calibration_ids,
    hash_ids,
    heldout_ids,
    prepare,
    write_ids,
)
from tools import ENVIRONMENTS, TOOLS, USUAL, Task, ToolError, provenance, run, version

SAMPLES, LENGTH = 128, 256  # calibration
WINDOWS, BATCH = 128, 8  # held out, of the same length
CALIBRATED = ("gptq", "awq", "awq+gptq")


@dataclass(frozen=True)
class Case:
    """One quantized model."""

    model: str
    bits: float  # of a code; on average for a method that mixes
    symmetric: bool
    seed: int  # of the calibration ids
    tool: str
    method: str
    bits_per_weight: float | None = None  # of the whole file, instead of a grid: `budget.py`
    format: str | None = None  # of the files, for tools that write several
    embeddings: bool = False  # quantized too

    @property
    def grid(self) -> str:
        """Label of bits, groups and symmetry, or of the size."""
        if self.bits_per_weight is not None:
            return f"{self.bits_per_weight:.4f}bpw"
        group = MODELS[self.model].group
        return f"w{self.bits:g}-{f'g{group}' if group else 'channel'}{'' if self.symmetric else '-asym'}"

    @property
    def cell(self) -> "Case":
        """Equal for cases that are compared: same model, same grid, same calibration."""
        return Case(self.model, self.bits, self.symmetric, self.seed, "", "")

    @property
    def label(self) -> str:
        """For progress and file names."""
        more = ("" if self.format is None else f"-{self.format}") + "-embeddings" * self.embeddings
        return f"{self.model}-{self.grid}-{self.tool}-{self.method}{more}-seed{self.seed}"


@dataclass(frozen=True)
class Result:
    """What one case gave: KL per held-out window, in nats per token, and what the tool said."""

    kl: Tensor
    facts: dict[str, Any]

    @property
    def mean(self) -> float:
        """KL per token; windows have equal lengths."""
        return float(self.kl.mean())


# -- measuring -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """Folders and settings of a run."""

    work: Path
    environments: Path
    threads: int

    def measure(self, case: Case) -> Result:
        """From the work folder if it is there."""
        found = self.known(case)
        if found is None:
            key = self.key(case)
            found = self.quantize_and_judge(case)
            path = self.path(case, key)
            path.parent.mkdir(parents=True, exist_ok=True)
            stored = {"key": key, "kl": found.kl.tolist(), "facts": found.facts}
            path.write_text(json.dumps(stored) + "\n")
        return found

    def known(self, case: Case) -> Result | None:
        """From the work folder; None if it is not there."""
        path = self.path(case, self.key(case))
        if not path.exists():
            return None
        stored = json.loads(path.read_text())
        return Result(torch.tensor(stored["kl"], dtype=torch.float64), stored["facts"])

    def ids(self, case: Case) -> tuple[Tensor, Tensor]:
        """To calibrate with, and to judge by."""
        sample = MODELS[case.model]
        folder = prepare(sample, self.work)
        calibration = calibration_ids(folder, sample, SAMPLES, LENGTH, case.seed)
        return calibration, heldout_ids(folder, sample, WINDOWS, LENGTH)

    def key(self, case: Case) -> dict[str, str]:
        """All that a result depends on."""
        size = {} if case.bits_per_weight is None else {"bits per weight": repr(case.bits_per_weight)}
        heldout = {"heldout": hash_ids(self.ids(case)[1])}
        return size | {"case": case.label} | self.measured_key(case) | heldout

    def measured_key(self, case: Case) -> dict[str, str]:
        """All that statistics depend on."""
        weights = (prepare(MODELS[case.model], self.work) / "model.safetensors").read_bytes()
        return {
            "weights": hashlib.sha256(weights).hexdigest()[:16],
            "tool": version(TOOLS[case.tool], self.environments),
            "calibration": hash_ids(self.ids(case)[0]),
        }

    def statistics(self, case: Case) -> Path | None:
        """Where the model is measured once for all sizes; None where no size is asked for."""
        if case.bits_per_weight is None:
            return None
        name = f"{case.model}-seed{case.seed}-{digest(self.measured_key(case))}"
        return self.work / "statistics" / name

    def path(self, case: Case, key: dict[str, str]) -> Path:
        """Where the result is kept."""
        return self.work / "results" / f"{case.label}-{digest(key)}.json"

    def quantize_and_judge(self, case: Case) -> Result:
        """In a process of its own; what was quantized is removed."""
        calibration, heldout = self.ids(case)
        ids_file = self.work / "ids" / f"{hash_ids(calibration)}.safetensors"
        write_ids(calibration, ids_file)
        model, out = prepare(MODELS[case.model], self.work), self.work / "quantized" / case.label
        group = MODELS[case.model].group
        task = Task(
            model, out, case.method, case.bits, group, case.symmetric, ids_file, case.bits_per_weight,
            case.format, case.embeddings, self.statistics(case),
        )  # fmt: skip
        try:
            facts = run(TOOLS[case.tool], task, self.environments, self.threads)
            kl = kl_by_window(load_float32(model), load_float32(out / "dense"), heldout)
        finally:
            shutil.rmtree(out, ignore_errors=True)
        return Result(kl, facts)


def digest(key: dict[str, str]) -> str:
    """Short, for the name of what is kept."""
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]


def load_float32(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def kl_by_window(reference: nn.Module, model: nn.Module, windows: Tensor) -> Tensor:
    """Mean KL(reference || model) per predicted token of each window, in nats, float64."""
    result = []
    for ids in windows.split(BATCH):
        log_q, log_p = (
            F.log_softmax(m(ids, use_cache=False).logits[:, :-1], -1) for m in (reference, model)
        )
        result.append((log_q.exp() * (log_q - log_p)).sum(-1).double().mean(-1))
    return torch.cat(result)


# -- the table -----------------------------------------------------------------------------------


Results = dict[Case, Result]


def mean_estimate(kl: Tensor) -> Estimate:
    return ratio_estimate(kl, torch.ones_like(kl))


def table(results: Results) -> list[dict[str, Any]]:
    """A row per model, grid, tool and method; seeds are averaged window by window."""
    groups: dict[tuple[str, str, str, str], list[Case]] = defaultdict(list)
    for case in results:
        groups[case.model, case.grid, case.tool, case.method].append(case)
    rows = []
    for (model, grid, tool, method), cases in groups.items():
        kl = torch.stack([results[case].kl for case in cases]).mean(0)
        rtn = groups.get((model, grid, "fewbits", "rtn"))
        ratio = None if rtn is None else ratio_estimate(kl, results[rtn[0]].kl)
        facts = [results[case].facts for case in cases]
        rows.append(
            {
                "model": model,
                "grid": grid,
                "tool": tool,
                "method": method,
                "bits/weight": facts[0]["effective_bits"],
                "KL": mean_estimate(kl),
                "KL by seed": {case.seed: results[case].mean for case in cases},
                "to RTN": ratio,
                "dense against own forward": max(f["own_forward_kl"] for f in facts),
            }
        )
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    print("| model | grid | tool | method | bits/weight | KL (nats/token) | by seed | to RTN |")
    print("|---|---|---|---|---:|---:|---|---:|")
    for row in rows:
        seeds = " ".join(f"{kl:.5f}" for kl in row["KL by seed"].values())
        print(
            f"| {row['model']} | {row['grid']} | {row['tool']} | {row['method']} "
            f"| {row['bits/weight']:.3f} | {row['KL']} | {seeds} | {row['to RTN'] or ''} |"
        )


# -- what must hold ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """A figure and its limit; `value` is None where nothing was measured."""

    what: str
    value: float | None
    limit: float
    where: str = ""

    @property
    def holds(self) -> bool:
        """Also of what was not measured."""
        return self.value is None or self.value <= self.limit

    def __str__(self) -> str:
        if self.value is None:
            return f"not measured: {self.what}"
        verdict = "holds" if self.holds else "FAILS"
        return f"{verdict}: {self.what}: {self.value:.3f} (limit {self.limit:g}){self.where}"


Cells = dict[Case, dict[tuple[str, str], float]]
Ratios = dict[Case, float]


def by_cell(results: Results) -> Cells:
    """KL by tool and method in every cell; RTN, which needs no calibration, is in all of them."""
    cells: Cells = defaultdict(dict)
    for case, result in results.items():
        cells[case.cell][case.tool, case.method] = result.mean
    for case, result in results.items():
        if case.method == "rtn":
            for cell, kls in cells.items():
                if (cell.model, cell.grid) == (case.model, case.grid):
                    kls[case.tool, case.method] = result.mean
    return cells


def to_best_rival(cells: Cells, method: str, rivals: Iterable[str]) -> Ratios:
    """Our KL over the least that another tool reached by one of the methods `rivals`."""
    ratios = {}
    for cell, kls in cells.items():
        others = [kl for (tool, m), kl in kls.items() if tool != "fewbits" and m in rivals]
        if others and ("fewbits", method) in kls:
            ratios[cell] = kls["fewbits", method] / min(others)
    return ratios


def worst(what: str, ratios: Ratios, limit: float) -> Check:
    if not ratios:
        return Check(what, None, limit)
    cell = max(ratios, key=ratios.__getitem__)
    return Check(what, ratios[cell], limit, f" at {cell.model}, {cell.grid}, seed {cell.seed}")


def average(what: str, ratios: Ratios, limit: float) -> Check:
    """Of the geometric mean."""
    if not ratios:
        return Check(what, None, limit)
    value = math.exp(sum(math.log(ratio) for ratio in ratios.values()) / len(ratios))
    return Check(what, value, limit, f" over {len(ratios)}")


def below_rtn(cells: Cells, method: str) -> Ratios:
    rtn, ours = ("fewbits", "rtn"), ("fewbits", method)
    return {cell: kls[ours] / kls[rtn] for cell, kls in cells.items() if rtn in kls and ours in kls}


def to_untwinned(cells: Cells, method: str) -> Ratios:
    """KL of the twin over that of the model it is the twin of."""
    ours, ratios = ("fewbits", method), {}
    for cell, kls in cells.items():
        original = Case("reference", cell.bits, cell.symmetric, cell.seed, "", "")
        if cell.model == "twin" and ours in kls and ours in cells.get(original, {}):
            ratios[cell] = kls[ours] / cells[original][ours]
    return ratios


def checks(results: Results) -> list[Check]:
    """The figures that must hold."""
    cells = by_cell(results)
    found = []
    for method in CALIBRATED:
        same = to_best_rival(cells, method, [method])
        found += [
            worst(f"{method} over RTN, every model", below_rtn(cells, method), 1.0),
            average(f"{method} over the best rival's, on average", same, 1.0),
            worst(f"{method} over the best rival's, every one", same, 1.1),
        ]
    composed = to_best_rival(cells, "awq+gptq", ("gptq", "awq"))
    twins = {cell: ratio for cell, ratio in composed.items() if cell.model == "twin"}
    found.append(average("awq+gptq over the best rival's GPTQ or AWQ, on average", composed, 0.9))
    for method in ("awq", "awq+gptq"):
        found.append(worst(f"{method}, twin over untwinned", to_untwinned(cells, method), 1.1))
    found.append(average("awq+gptq over the best rival's GPTQ or AWQ, on the twin", twins, 0.5))
    return found


# -- the command line ----------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = [name for name, sample in MODELS.items() if sample.source.is_dir()]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=here)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=USUAL)
    parser.add_argument("--methods", nargs="+", help="all by default")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3])
    parser.add_argument("--asymmetric", action="store_true", help="grids with zero points instead")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--environments", type=Path, default=Path(ENVIRONMENTS))
    parser.add_argument("--work", type=Path, default=Path("build/quality"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the result here")
    return parser.parse_args()


def wanted(args: argparse.Namespace) -> list[Case]:
    """Cases in the order of the table."""
    found = []
    for model, bits, tool in itertools.product(args.models, args.bits, args.tools):
        for method in TOOLS[tool].methods:
            if args.methods is None or method in args.methods:
                seeds = args.seeds[:1] if method == "rtn" else args.seeds
                found += [Case(model, bits, not args.asymmetric, s, tool, method) for s in seeds]
    return found


def command(args: argparse.Namespace) -> str:
    """What was run, without the folders of this machine."""
    options = [f"--{name} {shlex.join(map(str, getattr(args, name)))}"
               for name in ("models", "tools", "bits", "seeds")]  # fmt: skip
    grid = ["--asymmetric"] if args.asymmetric else []
    return " ".join(["python benchmarks/quality.py", *options, *grid])


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    disable_progress_bar()
    bench = Bench(args.work, args.environments, args.threads)
    results: Results = {}
    refused: dict[str, str] = {}
    cases = wanted(args)
    for number, case in enumerate(cases, 1):
        try:
            results[case] = bench.measure(case)
            print(f"{number}/{len(cases)} {case.label}: KL {results[case].mean:.5f}", file=sys.stderr)
        except ToolError as error:
            refused[case.label] = str(error)
            print(f"{number}/{len(cases)} {case.label}: {error}", file=sys.stderr)
    rows, verdicts = table(results), checks(results)
    print_table(rows)
    print(*(f"{label}: {reason}" for label, reason in refused.items()), *verdicts, sep="\n")
    if args.json:
        facts = provenance(command(args)) | {
            "calibration": f"{SAMPLES} x {LENGTH} tokens",
            "heldout": f"{WINDOWS} x {LENGTH} tokens",
        }
        rows = [json.loads(json.dumps(row, default=asdict)) for row in rows]
        facts |= {"rows": rows, "refused": refused, "checks": [str(v) for v in verdicts]}
        args.json.write_text(json.dumps(facts, indent=1) + "\n")
    failed = [verdict for verdict in verdicts if not verdict.holds]
    if failed:
        sys.exit(f"{len(failed)} of {len(verdicts)} figures fail")


if __name__ == "__main__":
    main()
