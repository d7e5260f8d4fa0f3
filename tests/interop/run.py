"""`make interop`: what other people's clients make of our checkpoints, each in its own environment.

    python tests/interop/run.py [--format F] [--scheme S] [--model M] [--client C]   (may be repeated)

Every model is quantized by the command line in every format and scheme, and loaded by every client of
that format. Loading without an exception proves nothing, so logits and greedy text are compared with
ours.

How near is near enough is measured, not chosen: a client computes in its own way (float16, inputs in 8
bits, ...), and would differ from our float32 logits even for a float model. So there is a *twin*: the
same weights, dequantized by us into an ordinary float checkpoint, in the same client. The KL
divergence of its answer to the twin is what its arithmetic makes of the right weights; that to the
quantized checkpoint may be FACTOR times that, and must be far below what quantizing changed, or the
comparison would see nothing. llama.cpp rounds inputs only where weights are quantized; its twin is our
own model with inputs so rounded.

A cell of the table is a KL divergence, or a footnote: our own refusal, or the message of a client that
does not read it. Both must be expected (expected.py), so that what is read one day, or no longer, is
noticed. Where greedy text is not equal to the end, the cell says how many tokens are before a tie. The
tables go to stdout, and with versions and the largest numbers to build/interop/report.md; a whole run
with --docs puts that into docs/formats.md. Exit code 1 if any cell is not as expected.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import checkpoints
import environments
import make_golden
import numpy as np
from expected import GARBAGE, REFUSED, UNREAD, WITHOUT_OPTION, Rule, find
from protocol import NEW_TOKENS

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
WORK = ROOT / "build" / "interop"
WORKERS = 2
FACTOR = 4.0  # in KL: twice in the logits. Errors of the twin and of the checkpoint are equal in kind
FLOAT32 = (
    1e-9  # KL of sums in another order: logits of 1 to 10 err by some 1e-6 of them, KL by the square
)
PROMPT = "def read_file(path):"

# Schemes chosen for a size: some matrices in 8 bits, some in 4, as measurement has it.
_TEXT = ["--calibration", str(ROOT / "README.md"), "--samples", "8", "--seq-len", "64"]
_MIXED = ["--method", "gptq", *_TEXT, "--bits-per-weight"]  # and a number of the whole file
SCHEMES = {
    "mixed": [*_MIXED, "9"],
    "int8": ["--method", "int8"],
    "int4": ["--bits", "4", "--group-size", "128"],
    "int4 asymmetric": ["--bits", "4", "--group-size", "128", "--asymmetric"],
    "int3": ["--bits", "3", "--group-size", "128"],
}
GGUF_SCHEMES = {  # blocks of 32 are what that container has
    "mixed": [*_MIXED, "7.5"],
    "int8": ["--bits", "8", "--group-size", "32"],
    "int4": ["--bits", "4", "--group-size", "32"],
    "int4 asymmetric": ["--bits", "4", "--group-size", "32", "--asymmetric"],
    "q4_k": ["--method", "q4_k"],
}
FORMATS = ("compressed-tensors", "gptq", "gptq-v2", "awq", "gguf")
INT3 = ("compressed-tensors", "gptq")  # of which clients read 3 bits
MIXED = ("compressed-tensors", "gptq", "gptq-v2", "gguf")  # that hold several numbers of bits
# No client here reads GPTQ's experts; how they fail depends on what was chosen for them.
NOT_MIXED = {"gptq": ("mixtral",), "gptq-v2": ("mixtral",)}
GOLDEN = "golden"  # checkpoints of other tools, each judged by the tool that wrote it


@dataclass(frozen=True)
class Client:
    """One program that reads checkpoints.

    Args:
        environment: of environments.py.
        script: that runs it.
        formats: that it is asked to read.
        dtype: that it computes in.
    """

    environment: str
    script: str
    formats: tuple[str, ...]
    dtype: str


CLIENTS = {
    "transformers": Client(
        "transformers-ct", "client_transformers.py", ("compressed-tensors", "gguf"), "float32"
    ),
    "transformers, compressed-tensors 0.17": Client(
        "transformers-ct-0.17", "client_transformers.py", ("compressed-tensors",), "float32"
    ),
    "gptqmodel": Client("gptqmodel", "client_gptqmodel.py", ("gptq", "gptq-v2", "awq"), "float16"),
    "transformers, gptqmodel": Client(
        "gptqmodel", "client_transformers.py", ("gptq", "gptq-v2", "awq"), "float16"
    ),
    "llama.cpp": Client("llama-cpp", "client_llamacpp.py", ("gguf",), "inputs in 8 bits"),
}

LLAMA = "llama.cpp"
GELU = ("gpt2",)  # models that have it: llama.cpp looks it up in a table of float16
TOOLS = ("gptqmodel", "llama.cpp")  # that golden checkpoints are of
DOCS, MARKS = ROOT / "docs" / "formats.md", ("<!-- make interop -->", "<!-- end of it -->")


@dataclass(frozen=True)
class Case:
    """One checkpoint of ours."""

    format: str
    scheme: str
    model: str

    @property
    def golden(self) -> bool:
        """Whether another tool wrote it."""
        return self.format == GOLDEN

    @property
    def source(self) -> Path:
        """What it was made from."""
        if self.golden:
            return make_golden.source_of(self.scheme, WORK)
        return checkpoints.path(self.model, WORK / "models")

    @property
    def checkpoint(self) -> Path:
        """Itself."""
        return make_golden.path(self.scheme, WORK) if self.golden else self.folder / "out"

    @property
    def folder(self) -> Path:
        """Where all that is found of it lies."""
        return (
            WORK
            / "cases"
            / f"{self.format}-{self.scheme}-{self.model}".replace(" ", "-").replace(",", "")
        )

    def result(self, who: str) -> Path:
        """Where an answer goes."""
        return self.folder / re.sub(r"\W+", "-", who)


@dataclass
class Cell:
    """What was found for one case and client."""

    case: Case
    client: str
    status: str  # ok, refused, unread, bad
    text: str  # in the table
    detail: str = ""
    numbers: dict[str, float] = field(default_factory=dict)


def main() -> int:
    options = _arguments()
    began = time.monotonic()
    cases = [
        Case(layout, scheme, model)
        for layout in options.format if layout != GOLDEN
        for scheme in options.scheme if scheme in schemes_of(layout)
        for model in options.model if not (scheme == "mixed" and model in NOT_MIXED.get(layout, ()))
    ]  # fmt: skip
    if GOLDEN in options.format:
        cases += [Case(GOLDEN, name, "llama") for name in make_golden.GOLDEN]
    asked = {client: [case for case in cases if is_asked(client, case)] for client in options.client}
    cases = list(dict.fromkeys(case for some in asked.values() for case in some))
    for name in dict.fromkeys(CLIENTS[client].environment for client, some in asked.items() if some):
        environments.build(name, WORK / name)
    checkpoints.make(options.model, WORK / "models")
    _write_questions()
    for case in cases:
        if case.golden:
            make_golden.prepare(case.scheme, WORK)
    refusals = quantize_all(cases)
    run_clients(asked, refusals)
    cells = [judge(case, client, refusals) for client, some in asked.items() for case in some]
    print(table_of(cells))
    report = keep(cells, options.whole)
    bad = [cell for cell in cells if cell.status == "bad"]
    if options.docs and options.whole and not bad:
        into_docs(report)
    for cell in bad:
        what = ", ".join((cell.case.format, cell.case.scheme, cell.case.model))
        print(f"BAD  {cell.client}: {what}: {cell.detail[:300]}")
    print(f"{len(cells)} cells, {len(bad)} bad, {time.monotonic() - began:.0f} s")
    return int(bool(bad))


def schemes_of(layout: str) -> dict[str, list[str]]:
    """By name, what the command line is told."""
    if layout == "gguf":
        return GGUF_SCHEMES
    held = {"int3": INT3, "mixed": MIXED}
    return {name: words for name, words in SCHEMES.items() if layout in held.get(name, FORMATS)}


def is_asked(client: str, case: Case) -> bool:
    """Whether a cell is made for both."""
    if case.golden:
        tool = make_golden.GOLDEN[case.scheme].environment
        return client in TOOLS and CLIENTS[client].environment == tool
    return case.format in CLIENTS[client].formats


def keep(cells: list[Cell], whole: bool) -> str:
    """Write the report; what was asked for in part goes into the one that is there."""
    data = WORK / "table.json"
    if not whole and data.exists():
        new = {(cell.case, cell.client) for cell in cells}
        old = [Cell(**entry | {"case": Case(**entry["case"])}) for entry in json.loads(data.read_text())]
        cells = cells + [cell for cell in old if (cell.case, cell.client) not in new]
    data.write_text(json.dumps([asdict(cell) for cell in cells], indent=1))
    report = report_of(cells, time.strftime("%Y-%m-%d"))
    (WORK / "report.md").write_text(report)
    return report


def into_docs(report: str) -> None:
    """In the place of the one that is there."""
    text, (begin, end) = DOCS.read_text(), MARKS
    before, after = text[: text.index(begin)], text[text.index(end) :]
    DOCS.write_text(f"{before}{begin}\n{report}{after}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choices = {
        "format": (*FORMATS, GOLDEN),
        "scheme": SCHEMES | GGUF_SCHEMES,
        "model": checkpoints.MODELS,
        "client": CLIENTS,
    }
    for name, allowed in choices.items():
        parser.add_argument(f"--{name}", action="append", choices=list(allowed))
    parser.add_argument("--docs", action="store_true", help="write the report into docs/formats.md too")
    options = parser.parse_args()
    options.whole = not any(getattr(options, name) for name in choices)
    for name, allowed in choices.items():
        setattr(options, name, getattr(options, name) or list(allowed))
    return options


def _write_questions() -> None:
    """Random tokens, as many as fit a tiny context, and a prompt that the reference model knows."""
    from tokenizers import Tokenizer

    vocabulary = checkpoints.VOCABULARY
    np.save(WORK / "tokens.npy", np.random.default_rng(0).integers(vocabulary, size=(4, 64)))
    tokenizer = Tokenizer.from_file(str(checkpoints.REFERENCE / "tokenizer.json"))
    np.save(WORK / "prompt.npy", np.array(tokenizer.encode(PROMPT, add_special_tokens=False).ids))


# -- our side --------------------------------------------------------------------------------------


def quantize_all(cases: Sequence[Case]) -> dict[Case, str]:
    """Write every case anew; those that the command line refused, and why."""
    with ThreadPoolExecutor(WORKERS) as pool:
        messages = list(pool.map(_quantize, cases))
    return {case: message for case, message in zip(cases, messages, strict=True) if message}


def _quantize(case: Case) -> str:
    shutil.rmtree(case.folder, ignore_errors=True)
    case.folder.mkdir(parents=True)
    if case.golden:
        return make_golden.make(case.scheme, WORK)
    scheme = schemes_of(case.format)[case.scheme]
    command = [
        sys.executable, "-m", "fewbits", "quantize", str(case.source), str(case.checkpoint), *scheme,
        "--format", case.format,
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environments.QUIET, check=False
    )
    (case.folder / "quantize.log").write_text(done.stdout + done.stderr)
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    if done.returncode == 2 and len(lines) == 1:
        return lines[0].removeprefix("error: ")
    return f"exit code {done.returncode}: {(done.stderr.splitlines() or [''])[-1]}"


def run_clients(asked: dict[str, list[Case]], refusals: dict[Case, str]) -> None:
    """Ours first, which makes the twins; then everybody on checkpoints and twins."""
    cases = dict.fromkeys(case for some in asked.values() for case in some if case not in refusals)
    ours = [
        _question(case, case.checkpoint, "ours")
        | {"rounded_inputs": False, "source": str(case.source), "twin": str(case.folder / "twin")}
        for case in cases
    ]
    batches = [(sys.executable, "client_fewbits.py", part) for part in _parts(ours)]
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(lambda batch: _run(*batch), batches))
    batches = []
    for client, some in asked.items():
        able = [case for case in some if case.result("ours").with_suffix(".npz").exists()]
        python = str(WORK / CLIENTS[client].environment / "bin" / "python")
        for part in _parts([_job(case, client) for case in able]):
            batches.append((python, CLIENTS[client].script, part))
        plain = [_job(case, client, option=False) for case in able if needs_option(case, client)]
        batches += [(python, CLIENTS[client].script, part) for part in _parts(plain)]
        twins = [_twin_job(case, client) for case in able]
        script = "client_transformers.py"
        if client == LLAMA:
            script = "client_llamacpp.py"
            rounded = [_rounded_job(case) for case in able]
            rounded += [_table_job(case) for case in able if case.model in GELU]
            batches += [(sys.executable, "client_fewbits.py", part) for part in _parts(rounded)]
        batches += [(python, script, part) for part in _parts(twins)]
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(lambda batch: _run(*batch), batches))


def _parts(jobs: list[dict[str, Any]]) -> Iterable[list[dict[str, Any]]]:
    """Shares of the workers."""
    return filter(None, (jobs[i::WORKERS] for i in range(WORKERS)))


def _question(case: Case, checkpoint: Path, who: str) -> dict[str, Any]:
    vocabulary = json.loads((case.source / "config.json").read_text())["vocab_size"]
    return {"checkpoint": str(checkpoint), "result": str(case.result(who)), "vocabulary": vocabulary}


def _job(case: Case, client: str, option: bool = True) -> dict[str, Any]:
    job = _question(case, case.checkpoint, client if option else f"{client} plain")
    job["dtype"] = dtype_of(case, client)
    if CLIENTS[client].script == "client_transformers.py":
        job["gguf_file"] = "model.gguf" if case.format == "gguf" else None
        job["dequantize"] = option and needs_option(case, client)
    if client == "gptqmodel":  # its exact kernel; transformers takes the one that is chosen by itself
        awq = "awq" in (case.format, case.scheme)
        job["backend"] = "awq_torch" if awq else "gptq_torch"
    return job


def _twin_job(case: Case, client: str) -> dict[str, Any]:
    if client == LLAMA:
        job = _question(case, case.checkpoint, f"{client} twin")
        return job | {"floats": str(case.folder / "floats")}
    job = _question(case, case.folder / "twin", f"{client} twin") | {"dtype": dtype_of(case, client)}
    if needs_option(case, client):
        job["rounded"] = "."
    elif case.format == "compressed-tensors":  # experts are stacked in bfloat16, and multiplied in it
        job["bfloat16"] = r"\.experts\."
    return job


def _rounded_job(case: Case) -> dict[str, Any]:
    return _question(case, case.checkpoint, "ours rounded") | {"rounded_inputs": True}


def _table_job(case: Case) -> dict[str, Any]:
    return _question(case, case.checkpoint, "ours table") | {"table": True}


def dtype_of(case: Case, client: str) -> str:
    """In which a client multiplies."""
    if client == "transformers, gptqmodel" and case.scheme.startswith("int4"):
        return "bfloat16"  # of the kernel for 4 bits, whatever the model is in
    return CLIENTS[client].dtype


def needs_option(case: Case, client: str) -> bool:
    """Whether transformers must be told to dequantize; it then rounds weights to bfloat16."""
    recent = client == "transformers" and case.format == "compressed-tensors"
    return recent and case.scheme.endswith("asymmetric")


def _run(python: str, script: str, jobs: list[dict[str, Any]]) -> None:
    """One process for all jobs; if it dies, that job has failed, and another does the rest."""
    number = 0
    while jobs:
        folder = Path(jobs[0]["result"]).with_suffix(".batch")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name in ("tokens.npy", "prompt.npy"):
            shutil.copy(WORK / name, folder / name)
        (folder / "jobs.json").write_text(json.dumps(jobs, indent=1))
        with (folder / "log").open("w") as log:
            done = subprocess.run(
                [python, str(HERE / script), str(folder)], stdout=log, stderr=log, check=False,
                env=os.environ | environments.QUIET, timeout=600 + 120 * len(jobs),
            )  # fmt: skip
        left = [job for job in jobs if not _answered(Path(job["result"]))]
        if not left:
            return
        last = ((folder / "log").read_text().splitlines() or [""])[-1]
        Path(left[0]["result"]).with_suffix(".error").write_text(f"exit code {done.returncode}: {last}")
        jobs, number = left[1:], number + 1


def _answered(result: Path) -> bool:
    return result.with_suffix(".npz").exists() or result.with_suffix(".error").exists()


# -- the judgement -----------------------------------------------------------------------------------


def judge(case: Case, client: str, refusals: dict[Case, str]) -> Cell:
    """What one cell of the table says."""
    rule = find(REFUSED, "fewbits", case.format, case.scheme, case.model)
    if case in refusals or rule is not None:
        return _expected(case, client, "refused", rule, refusals.get(case))
    ours = case.result("ours")
    if not ours.with_suffix(".npz").exists():
        return Cell(
            case, client, "bad", "bad", f"fewbits.load: {ours.with_suffix('.error').read_text()}"
        )
    theirs = case.result(client)
    rule = find(UNREAD, client, case.format, case.scheme, case.model)
    error = theirs.with_suffix(".error")
    if error.exists() or rule is not None:
        message = error.read_text() if error.exists() else _garbage(ours, theirs)
        return _expected(case, client, "unread", rule, message)
    return _compare(case, client)


def _garbage(ours: Path, theirs: Path) -> str | None:
    """What is said of an answer that has nothing to do with the model."""
    kl = _kl(*(np.load(path.with_suffix(".npz"))["logits"] for path in (ours, theirs)))
    return None if kl < 0.1 else GARBAGE  # nan is garbage too


def _expected(case: Case, client: str, status: str, rule: Rule | None, message: str | None) -> Cell:
    if message is None:
        assert rule is not None
        return Cell(
            case, client, "bad", "bad", f"expected to be {status} with {rule.message!r}, but was not"
        )
    if rule is None or rule.message not in message:
        wanted = "nothing" if rule is None else repr(rule.message)
        return Cell(case, client, "bad", "bad", f"{status}: {message}; expected was {wanted}")
    return Cell(case, client, status, status, rule.message)


def _compare(case: Case, client: str) -> Cell:
    twin = case.result(f"{client} twin")
    arithmetic = case.result("ours rounded") if client == LLAMA else twin
    for needed in (twin, arithmetic):
        if needed.with_suffix(".error").exists():
            problem = f"{needed.name}: {needed.with_suffix('.error').read_text()}"
            return Cell(case, client, "bad", "bad", problem)
    ours, theirs, same, rounded = (
        np.load(path.with_suffix(".npz"))
        for path in (case.result("ours"), case.result(client), twin, arithmetic)
    )
    source = np.load(case.result("ours").with_suffix(".source.npy"))
    margins = np.load(case.result("ours").with_suffix(".margins.npy"))
    kl, exact = _kl(ours["logits"], theirs["logits"]), _kl(ours["logits"], same["logits"])
    change, noise = _kl(source, ours["logits"]), _kl(ours["logits"], rounded["logits"])
    stored = _stored_limit(case, change)
    limit = FACTOR * noise + stored
    # What must be far below the change: for llama.cpp the twin, which has no noise of inputs.
    telling = exact if client == LLAMA else limit
    tie = 2 * FACTOR**0.5 * _centred_difference(ours["logits"], rounded["logits"])
    equal = _equal_text(ours["text"], theirs["text"], margins, tie)
    numbers = {"kl": kl, "twin": exact, "limit": limit, "quantization": change, "text": float(equal)}
    problems = []
    plain = case.result(f"{client} plain").with_suffix(".error")
    if needs_option(case, client) and not (plain.exists() and WITHOUT_OPTION in plain.read_text()):
        problems.append("without the option it was read, or failed in another way")
    if not kl <= limit:
        problems.append(f"KL {kl:.2g} > {limit:.2g}")
    if client == LLAMA:
        allowed = FACTOR * _table_noise(case, ours["logits"]) + stored
        if not exact <= allowed:
            problems.append(f"in float32 KL {exact:.2g} > {allowed:.2g}")
    if not telling <= change / FACTOR:
        problems.append(f"limit {telling:.2g}, but quantizing changed no more than {change:.2g}")
    if equal < 0:
        problems.append(f"text differs at token {-equal - 1}, and that is no tie")
    how = case.result(client).with_suffix(".how").read_text()
    text = f"{kl:.0e}" if kl > 0 else "0"
    if 0 <= equal < NEW_TOKENS:
        text += f", text {equal}"
    if problems:
        return Cell(case, client, "bad", f"bad: {text}", f"{'; '.join(problems)} ({how})", numbers)
    return Cell(case, client, "ok", text, how, numbers)


def _stored_limit(case: Case, change: float) -> float:
    """KL that comes of a format which stores something else than scale and zero point.

    Q4_1 stores the least weight of a block, -zero_point * scale, in float16: off by at most 15 * 2**-11
    scales, where rounding to codes is off by 12**-0.5 scales in the mean. KL goes with the square.
    """
    if case.format != "gguf" or not case.scheme.endswith("asymmetric"):
        return FLOAT32
    return FLOAT32 + 12 * (15 * 2**-11) ** 2 * change


def _table_noise(case: Case, ours: np.ndarray) -> float:
    """KL of our model with GELU as llama.cpp has it."""
    if case.model not in GELU:
        return 0.0
    return _kl(ours, np.load(case.result("ours table").with_suffix(".npz"))["logits"])


def _kl(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Mean over positions of KL(ours || theirs) in nats; nan if any logit is."""
    p, q = (_log_softmax(x.astype(np.float64)) for x in (ours, theirs))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _centred_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest error of a logit, but for what is common to all of its position."""
    difference = ours.astype(np.float64) - theirs
    return float(np.abs(difference - difference.mean(-1, keepdims=True)).max())


def _equal_text(ours: np.ndarray, theirs: np.ndarray, margins: np.ndarray, tie: float) -> int:
    """How many tokens are equal before one that was a tie for us; -1 - n if it was none."""
    different = np.flatnonzero(ours != theirs)
    if not len(different):
        return len(ours)
    first = int(different[0])
    return first if margins[first] <= tie else -1 - first


# -- the report ------------------------------------------------------------------------------------


def report_of(cells: list[Cell], date: str) -> str:
    """Markdown: how many cells, of which versions, the largest numbers, and the tables."""
    bad = sum(cell.status == "bad" for cell in cells)
    found = [cell for cell in cells if cell.status == "ok"]
    shares = [cell.numbers["kl"] / cell.numbers["limit"] for cell in found]
    exact: dict[str, list[float]] = {}  # llama.cpp's files without its arithmetic
    for cell in found:
        if cell.client == LLAMA:
            asymmetric = cell.case.scheme == "int4 asymmetric"
            kind = "Q4_1" if asymmetric else "GELU" if cell.case.model in GELU else "others"
            exact.setdefault(kind, []).append(cell.numbers["twin"])
    ranges = ", ".join(f"{k} {min(v):.0e} to {max(v):.0e}" for k, v in sorted(exact.items()))
    lines = [
        f"Made by `make interop` on {date}: {len(cells)} cells, {bad or 'none'} bad. {versions()}.",
        f"The largest number is {max(shares):.2g} of its limit. " if shares else "",
        f"Files of llama.cpp, dequantized, against ours in float32: {ranges}." if exact else "",
    ]
    return f"{lines[0]}\n{''.join(lines[1:])}\n\n{table_of(cells)}\n"


def versions() -> str:
    """Of the clients, as their environments have them."""
    named = (
        "torch",
        "transformers",
        "compressed-tensors",
        "gptqmodel",
        "optimum",
        "llama-cpp-python",
        "gguf",
    )
    pins = [pin for recipe in environments.RECIPES.values() for call in recipe for pin in call]
    found = {
        name: sorted({p.split("==")[1] for p in pins if p.startswith(f"{name}==")}) for name in named
    }
    return ", ".join(f"{name} {' and '.join(numbers)}" for name, numbers in found.items())


def table_of(cells: list[Cell]) -> str:
    """Markdown: a row per format, scheme and client, a column per model; golden ones; footnotes."""
    models = [model for model in checkpoints.MODELS if any(cell.case.model == model for cell in cells)]
    rows: dict[tuple[str, str, str], dict[str, Cell]] = {}
    names = (*(SCHEMES | GGUF_SCHEMES), *make_golden.GOLDEN)
    order = [list(x).index for x in ((*FORMATS, GOLDEN), names, CLIENTS)]
    for cell in cells:
        rows.setdefault((cell.case.format, cell.case.scheme, cell.client), {})[cell.case.model] = cell
    notes: dict[str, int] = {}
    ours = [f"| format | scheme | client | {' | '.join(models)} |", "|---" * (3 + len(models)) + "|"]
    theirs = ["| written by | kind | KL to fewbits.load |", "|---|---|---|"]
    for key in sorted(
        rows, key=lambda key: [place(part) for place, part in zip(order, key, strict=True)]
    ):
        layout, scheme, client = key
        texts = [_cell_text(cell, notes) for cell in map(rows[key].get, models) if cell is not None]
        if layout == GOLDEN:
            theirs.append(f"| {client} | {scheme} | {texts[0]} |")
        else:
            ours.append(f"| {layout} | {scheme} | {client} | {' | '.join(texts)} |")
    parts = [ours, theirs, [f"{number}. {note}" for note, number in notes.items()]]
    return "\n\n".join("\n".join(part) for part in parts if len(part) != 2)


def _cell_text(cell: Cell, notes: dict[str, int]) -> str:
    if cell.status in ("refused", "unread"):
        who = "fewbits refuses" if cell.status == "refused" else "not read, the client says"
        who = "not read, the client" if cell.detail == GARBAGE else who
        return f"{cell.status}, note {notes.setdefault(f'{who}: {cell.detail}', len(notes) + 1)}"
    if needs_option(cell.case, cell.client):
        note = "with `CompressedTensorsConfig(dequantize=True)`, which rounds weights to bfloat16"
        return f"{cell.text}, note {notes.setdefault(note, len(notes) + 1)}"
    return cell.text


if __name__ == "__main__":
    sys.exit(main())
