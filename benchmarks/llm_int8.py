"""LLM.int8() by us and by bitsandbytes: what it costs in quality, whether both agree, how fast it is.

Quality: perplexity on held-out text and KL to the float model, whose checkpoint is in bfloat16 and whose
arithmetic here is in float32. All others run in bfloat16, as they would be used, in calls of many
tokens, so that inputs are rounded and products are of integers. Speed: linears of a model of 1B
parameters, on the same weights and inputs, one process each, in turns; weights rotate over more memory
than any cache holds. The figures that must hold are asserted at the end.

Run, with nothing else running:
  bash benchmarks/rivals/setup.sh build/rivals bitsandbytes
  python benchmarks/llm_int8.py --environments build/rivals --markdown docs/llm-int8.md
"""

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

import fewbits
from fewbits import QuantizedLinear, QuantScheme
from fewbits.errors import InputError
from fewbits.estimate import Estimate, ratio_estimate
from fewbits.methods import LLMInt8
from quality import BATCH, LENGTH, SAMPLES, WINDOWS
from rivals.run_bitsandbytes import make_exact, make_inputs, make_linears, median_s
from samples import MODELS, calibration_ids, heldout_ids, prepare, write_ids
from tools import (
    BITSANDBYTES,
    ENVIRONMENTS,
    RESULT,
    ToolError,
    environment,
    provenance,
    run_script,
    script,
)

DTYPE = torch.bfloat16
ROUNDED, NAIVE, PLAIN = "8-bit weights", "W8A8 per tensor", "W8A8 per token"
DYNAMIC, STATIC, THEIRS = "LLM.int8()", "LLM.int8(), static", "bitsandbytes"
UNQUANTIZED = "not quantized, in bfloat16"
SCHEMES = {
    ROUNDED: "w8-channel",
    NAIVE: "w8-tensor-a8-tensor",
    PLAIN: "w8-channel-a8-token",
    DYNAMIC: "w8-channel-a8-token-t6",
    STATIC: "w8-channel-a8-token-t6-static",
}
JUDGED = ("reference", "twin", "babyllama105")
LIMITED = ("twin", "babyllama105")
NEAR, BROKEN = 0.2, 5.0  # percent of perplexity above float
SAME = 0.1  # of the error: inputs half-way between two codes may go to either

SHAPES = ((2048, 2048), (8192, 2048), (2048, 8192))  # (out, in)
TOKENS = (1, 16, 512)
ASSERTED_TOKENS = (1, 512)  # against bitsandbytes
ROUNDS = 3


# -- what must hold --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """A figure and its limit; one that could not be measured fails."""

    what: str
    value: float | None
    limit: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        """Not of what was not measured."""
        if self.value is None:
            return False
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        measured = "not measured" if self.value is None else f"{self.value:.3f}"
        side = "at least" if self.at_least else "at most"
        return f"{'holds' if self.holds else 'FAILS'}: {self.what}: {measured} ({side} {self.limit:g})"


# -- quality -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """Means over the tokens of each held-out window, in float64.

    Args:
        loss: nats per predicted token.
        kl: KL(float || model), in nats.
        error: the Euclidean distance of the logits to the float model's.
    """

    loss: Tensor
    kl: Tensor
    error: Tensor

    def above(self, reference: "Scores") -> Estimate:
        """Percent of perplexity above another's, paired by window; its error by the delta method."""
        difference = mean(self.loss - reference.loss)
        ratio = math.exp(difference.value)
        return Estimate(100 * (ratio - 1), 100 * ratio * (difference.error or 0.0))

    @property
    def perplexity(self) -> Estimate:
        """With its error by the delta method."""
        loss = mean(self.loss)
        return Estimate(math.exp(loss.value), math.exp(loss.value) * (loss.error or 0.0))


def mean(windows: Tensor) -> Estimate:
    """Of windows of equal length."""
    return ratio_estimate(windows, torch.ones_like(windows))


@torch.no_grad()
def logits_of(model: nn.Module, windows: Tensor) -> Tensor:
    """(windows, length, vocabulary), in the model's dtype."""
    return torch.cat([model(ids, use_cache=False).logits for ids in windows.split(BATCH)])


def distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean over the tokens of each window of the Euclidean distance of two models' logits."""
    pairs = zip(ours.split(BATCH), theirs.split(BATCH), strict=True)
    return torch.cat([(a.float() - b.float()).norm(dim=-1).double().mean(-1) for a, b in pairs])


def judge(logits: Tensor, reference: Tensor, windows: Tensor) -> Scores:
    """A model by its logits and the float model's."""
    loss, kl = [], []
    parts = zip(logits.split(BATCH), reference.split(BATCH), windows.split(BATCH), strict=True)
    for own, exact, ids in parts:
        log_p, log_q = (F.log_softmax(x[:, :-1].float(), -1) for x in (own, exact))
        loss.append(-log_p.gather(-1, ids[:, 1:, None])[..., 0].double().mean(-1))
        kl.append((log_q.exp() * (log_q - log_p)).sum(-1).double().mean(-1))
    return Scores(torch.cat(loss), torch.cat(kl), distance(logits, reference))


def load_float(folder: Path, dtype: torch.dtype) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@dataclass
class Judged:
    """All results of one model.

    Args:
        float_: its own scores, in float32 arithmetic.
        scores: by name.
        kernels: by name, how many matrices each kernel multiplies by.
        apart: our dynamic LLM.int8() and bitsandbytes', the distance of their logits by window.
        refused: by name, why there is no result.
    """

    float_: Scores
    scores: dict[str, Scores]
    kernels: dict[str, dict[str, int]]
    apart: Tensor | None
    refused: dict[str, str]


@dataclass(frozen=True)
class Bench:
    """Folders and settings of a run."""

    work: Path
    environments: Path
    threads: int
    windows: int

    def judge_model(self, name: str) -> Judged:
        """Float, every scheme of ours, bitsandbytes."""
        sample = MODELS[name]
        folder = prepare(sample, self.work)
        windows = heldout_ids(folder, sample, self.windows, LENGTH)
        calibration = calibration_ids(folder, sample, SAMPLES, LENGTH, seed=0)
        exact = logits_of(load_float(folder, torch.float32), windows)
        found = Judged(judge(exact, exact, windows), {}, {}, None, {})
        kept: dict[str, Tensor] = {}
        for what in (UNQUANTIZED, *SCHEMES, THEIRS):
            try:
                logits, kernels = self.logits(folder, what, windows, calibration)
            except (InputError, ToolError) as error:
                found.refused[what] = str(error)
                continue
            found.scores[what], found.kernels[what] = judge(logits, exact, windows), kernels
            if what in (DYNAMIC, THEIRS):
                kept[what] = logits
            shown = found.scores[what].above(found.float_)
            print(f"{name}, {what}: {shown} % above float", file=sys.stderr, flush=True)
        if len(kept) == 2:
            found.apart = distance(kept[DYNAMIC], kept[THEIRS])
        return found

    def logits(
        self, folder: Path, what: str, windows: Tensor, calibration: Tensor
    ) -> tuple[Tensor, dict[str, int]]:
        """Of one variant, and by what its matrices were multiplied."""
        if what == UNQUANTIZED:
            return logits_of(load_float(folder, DTYPE), windows), {}
        if what == THEIRS:
            return self.their_logits(folder, windows)
        out = self.work / "quantized"
        shutil.rmtree(out, ignore_errors=True)
        fewbits.quantize(
            folder, out,
            method="rtn" if what == ROUNDED else "llm-int8",
            scheme=QuantScheme.parse(SCHEMES[what]),
            calibration=calibration if what == STATIC else None,
        )  # fmt: skip
        model = fewbits.load(out, dtype=DTYPE)
        names = [m.kernel_name for m in model.modules() if isinstance(m, QuantizedLinear)]
        return logits_of(model, windows), dict(Counter(names))

    def their_logits(self, folder: Path, windows: Tensor) -> tuple[Tensor, dict[str, int]]:
        """Of bitsandbytes' process, on the same windows in the same calls."""
        ids, out = (self.work / f"{name}.safetensors" for name in ("ids", "logits"))
        write_ids(windows, ids)
        paths = [str(path.resolve()) for path in (folder, ids, out)]
        options = ["--dtype", str(DTYPE).removeprefix("torch."), "--batch", str(BATCH)]
        said = run_script(
            BITSANDBYTES, ["logits", *paths, *options], self.environments, self.threads, self.work
        )
        logits = load_file(out)["logits"]
        out.unlink()
        return logits, {f"bitsandbytes {said['versions']['bitsandbytes']}": said["matrices"]}


def quality_rows(models: dict[str, Judged]) -> list[dict[str, Any]]:
    rows = []
    for name, judged in models.items():
        float_ = {"model": name, "what": "float", "perplexity": judged.float_.perplexity}
        rows.append(float_ | {"above": None, "KL": None, "error": None, "kernels": {}})
        for what, scores in judged.scores.items():
            rows.append(
                {
                    "model": name,
                    "what": what,
                    "perplexity": scores.perplexity,
                    "above": scores.above(judged.float_),
                    "KL": mean(scores.kl),
                    "error": mean(scores.error),
                    "kernels": judged.kernels[what],
                }
            )
    return rows


def agreement_rows(models: dict[str, Judged]) -> list[dict[str, Any]]:
    """How far apart the logits of our LLM.int8() and of bitsandbytes' are, and each from float."""
    rows = []
    for name, judged in models.items():
        if judged.apart is not None:
            ours, theirs = (judged.scores[what].error for what in (DYNAMIC, THEIRS))
            row = {
                "model": name,
                "apart": mean(judged.apart),
                "ours": mean(ours),
                "theirs": mean(theirs),
            }
            rows.append(row | {"to the sum": float(judged.apart.mean() / (ours + theirs).mean())})
    return rows


def quality_checks(asked: Sequence[str], models: dict[str, Judged]) -> list[Check]:
    """Of every model that was asked for: one that is not there was not measured, which fails."""
    found = []
    for name in asked:
        judged = models.get(name)
        scores = {} if judged is None else judged.scores
        above = {what: s.above(judged.float_).value for what, s in scores.items()}
        if name in LIMITED:
            for what in (DYNAMIC, STATIC):
                off = abs(above[what]) if what in above else None
                found.append(Check(f"{name}, {what}: % of perplexity from float", off, NEAR))
        if name == "twin":
            what = f"{name}, {NAIVE} is broken: % of perplexity above float"
            found.append(Check(what, above.get(NAIVE), BROKEN, at_least=True))
        found.append(agreement_check(name, judged))
        found.append(Check(f"{name}: matrices whose inputs were not rounded", unrounded(judged), 0))
    return found


def agreement_check(name: str, judged: Judged | None) -> Check:
    """How far from bitsandbytes' logits ours are, against how far both are from the float model's.

    Both must err no more differently than by chance: independent errors are as far apart as the root of
    the sum of their squares. (Their plain sum is no limit: by the triangle inequality it always holds.)
    Equal they are not, as scales are not: ours have the checkpoint's 16 bits, theirs are in float32.
    `check_product` compares with equal scales.
    """
    chance = None
    if judged is not None and judged.apart is not None:
        ours, theirs = (float(judged.scores[what].error.mean()) for what in (DYNAMIC, THEIRS))
        chance = float(judged.apart.mean()) / math.hypot(ours, theirs)
    return Check(f"{name}: distance to bitsandbytes over that of independent errors", chance, 1.0)


@torch.no_grad()
def check_product(bench: Bench) -> Check:
    """One matrix with scales in float32 on both sides: here only the algorithms can differ."""
    linear, x = make_exact()
    ours = QuantizedLinear.from_float(linear, QuantScheme.parse(SCHEMES[DYNAMIC]))(x)
    out = bench.work / "product.safetensors"
    asked = ["product", str(out.resolve())]
    run_script(BITSANDBYTES, asked, bench.environments, bench.threads, bench.work)
    apart, error = (ours - load_file(out)["product"]).norm(), (ours - linear(x)).norm()
    what = "one matrix in float32: distance to bitsandbytes over our error"
    return Check(what, float(apart / error), SAME)


def unrounded(judged: Judged | None) -> int | None:
    """The reference kernel multiplies inputs as they are: what it ran was not what the scheme says.

    None if a scheme has no result.
    """
    schemes = [what for what in SCHEMES if what != ROUNDED]
    if judged is None or any(what not in judged.kernels for what in schemes):
        return None
    return sum(judged.kernels[what].get("reference", 0) for what in schemes)


# -- speed -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """bitsandbytes in a process of its own, which times what it is asked for."""

    process: subprocess.Popen[str]

    def ask(self, rows: int, columns: int, tokens: int) -> float:
        """Seconds of one product.

        Raises:
            ToolError: the process ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"rows": rows, "columns": columns, "tokens": tokens}) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(RESULT):
                said = json.loads(line.removeprefix(RESULT))
                assert said["threads"] == torch.get_num_threads(), "the two are not comparable"
                return said["seconds"]
        raise ToolError("bitsandbytes stopped")


@contextmanager
def serve(environments: Path, threads: int) -> Iterator[Server]:
    process = subprocess.Popen(
        [*script(BITSANDBYTES, environments), "serve"],
        env=environment(threads), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield Server(process)
    finally:
        process.terminate()
        process.wait()


def our_linears(linears: list[nn.Linear], x: Tensor) -> dict[str, list[nn.Module]]:
    """Dynamic and static; the static columns are those that hold outliers."""
    absmax = x.abs().amax(0)
    dynamic, static = (QuantScheme.parse(SCHEMES[what]) for what in (DYNAMIC, STATIC))
    method = LLMInt8(static=True)
    kept = [method(m.weight.detach(), static, {"absmax": absmax})[0] for m in linears]
    return {
        DYNAMIC: [QuantizedLinear.from_float(linear, dynamic) for linear in linears],
        STATIC: [QuantizedLinear(weight, dtype=DTYPE) for weight in kept],
    }


def measure_shape(server: Server, rows: int, columns: int, rounds: int) -> list[dict[str, Any]]:
    """At every number of tokens, seconds of all in turns, so that a slow moment hits all."""
    linears = make_linears(rows, columns)
    modules = {"bfloat16": linears, **our_linears(linears, make_inputs(1, columns))}
    found = []
    for tokens in TOKENS:
        x = make_inputs(tokens, columns)
        times: dict[str, list[float]] = {name: [] for name in (*modules, THEIRS)}
        for _ in range(rounds):
            times[THEIRS].append(server.ask(rows, columns, tokens))
            for name, own in modules.items():
                times[name].append(median_s(lambda module, x=x: module(x), own))
        row = {"out": rows, "in": columns, "tokens": tokens}
        row["kernels"] = {name: modules[name][0].kernel_name for name in (DYNAMIC, STATIC)}
        found.append(row | {"seconds": times} | {"speedups": speedups(times)})
        ratios = row_of_ratios(found[-1])
        print(f"{rows} x {columns}, {tokens} tokens:", ratios, file=sys.stderr, flush=True)
    return found


def speedups(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """The other's time over ours, the median of rounds, by kind of ours and by what is compared."""
    return {
        name: {
            other: statistics.median(a / b for a, b in zip(times[other], times[name], strict=True))
            for other in (THEIRS, "bfloat16")
        }
        for name in (DYNAMIC, STATIC)
    }


def row_of_ratios(row: dict[str, Any]) -> dict[str, str]:
    return {
        f"{name} to {other}": f"{value:.2f}" + (" (slower)" if value < 1 else "")
        for name, others in row["speedups"].items()
        for other, value in others.items()
    }


def speed_checks(rows: list[dict[str, Any]]) -> list[Check]:
    """Against bitsandbytes; against bfloat16 it is only said where we are slower."""
    return [
        Check(
            f"{row['out']} x {row['in']}, {row['tokens']} tokens, {name}: speed over bitsandbytes'",
            others[THEIRS], 1.0, at_least=True,
        )
        for row in rows
        if row["tokens"] in ASSERTED_TOKENS
        for name, others in row["speedups"].items()
    ]  # fmt: skip


# -- what is written -----------------------------------------------------------------------------------


def quality_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| model | | perplexity | % above float | KL (nats/token) | distance of logits | matrices |"
    yield "|---|---|---:|---:|---:|---:|---|"
    for row in rows:
        kernels = ", ".join(f"{count} {name}" for name, count in row["kernels"].items())
        figures = [row["perplexity"], *(row[key] or "" for key in ("above", "KL", "error")), kernels]
        yield f"| {row['model']} | {row['what']} | {' | '.join(map(str, figures))} |"


def agreement_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| model | ours to bitsandbytes | ours to float | bitsandbytes to float | over the sum |"
    yield "|---|---:|---:|---:|---:|"
    for row in rows:
        figures = f"{row['apart']} | {row['ours']} | {row['theirs']} | {row['to the sum']:.2f}"
        yield f"| {row['model']} | {figures} |"


def speed_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| out x in | tokens | | ms | over bitsandbytes | over bfloat16 |"
    yield "|---|---:|---|---:|---:|---:|"
    for row in rows:
        place, ratios = f"| {row['out']} x {row['in']} | {row['tokens']}", row_of_ratios(row)
        for name, seconds in row["seconds"].items():
            own = [ratios.get(f"{name} to {other}", "") for other in (THEIRS, "bfloat16")]
            yield f"{place} | {name} | {1000 * statistics.median(seconds):.3f} | {' | '.join(own)} |"


def report(facts: dict[str, Any]) -> str:
    """Tables, verdicts, and what they were measured with."""
    with_ = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    lines = [
        f"`{facts['command']}` at {facts['commit']}; {facts['machine']}, {facts['cpu']}; "
        f"Python {facts['python']}, {with_}. Calibration: {facts['calibration']}; held out: "
        f"{facts['heldout']}, {BATCH} windows in a call.",
    ]
    for key, table in (
        ("quality", quality_table),
        ("agreement", agreement_table),
        ("speed", speed_table),
    ):
        if facts[key]:
            lines += ["", *table(facts[key])]
    lines += ["", *(f"- no result: {what}: {why}" for what, why in facts["refused"].items())]
    lines += [f"- {check}" for check in facts["checks"]]
    return "\n".join(lines) + "\n"


def write_block(path: Path, text: str) -> None:
    """Put a text between the two marks in a file, at its end if there are none; the rest stays."""
    begin, end = "<!-- benchmarks/llm_int8.py -->\n", "<!-- end -->\n"
    old = path.read_text() if path.exists() else ""
    if begin not in old:
        old += ("\n" if old else "") + begin + end
    before, rest = old.split(begin, 1)
    path.write_text(before + begin + text + end + rest.split(end, 1)[1])


# -- the command line ----------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=JUDGED, default=JUDGED, help="absent ones fail")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="held out; fewer to try it")
    parser.add_argument("--no-speed", dest="speed", action="store_false")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of the processes' turns")
    parser.add_argument("--environments", type=Path, default=Path(ENVIRONMENTS))
    parser.add_argument("--work", type=Path, default=Path("build/llm-int8"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--markdown", type=Path, help="put the tables into this file")
    return parser.parse_args()


def command(args: argparse.Namespace) -> str:
    """What was run, without the folders of this machine."""
    speed = f"--rounds {args.rounds}" if args.speed else "--no-speed"
    models = " ".join(["--models", *args.models])
    options = f"{models} --windows {args.windows} {speed} --threads {args.threads}"
    return f"python benchmarks/llm_int8.py {options}"


def measure_speed(args: argparse.Namespace) -> list[dict[str, Any]]:
    with serve(args.environments, args.threads) as server:
        return [row for shape in SHAPES for row in measure_shape(server, *shape, args.rounds)]


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    disable_progress_bar()
    rival = version_of_rival(args.environments)
    args.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.work, args.environments, args.threads, args.windows)
    here = [name for name in args.models if MODELS[name].source.is_dir()]
    models = {name: bench.judge_model(name) for name in here}
    with torch.no_grad():
        speed = measure_speed(args) if args.speed else []
    checks = [*quality_checks(args.models, models), check_product(bench), *speed_checks(speed)]
    refused = {f"{m}, {what}": why for m, j in models.items() for what, why in j.refused.items()}
    refused |= {name: "the model is not on this machine" for name in args.models if name not in here}
    facts = provenance(command(args)) | {
        "versions": {p: version(p) for p in ("torch", "transformers")} | {"bitsandbytes": rival},
        "calibration": f"{SAMPLES} x {LENGTH} tokens",
        "heldout": f"{args.windows} x {LENGTH} tokens",
        "quality": quality_rows(models),
        "agreement": agreement_rows(models),
        "speed": speed,
        "refused": refused,
        "checks": [str(check) for check in checks],
    }
    print(report(facts))
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1, default=asdict) + "\n")
    if args.markdown:
        write_block(args.markdown, report(facts))
    failed = sum(not check.holds for check in checks)
    if failed or refused:
        sys.exit(f"{failed} of {len(checks)} figures fail; {len(refused)} have no result")


def version_of_rival(environments: Path) -> str:
    """Also tells at once, not after minutes, that the environment is missing."""
    from tools import version as installed

    try:
        return installed(BITSANDBYTES, environments)
    except ToolError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
