"""A size is said, and schemes are chosen by what rounding was measured to cost: kept, the same again."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbits import InputError, QuantScheme, measure, pipeline, quantize
from fewbits.fit import Size, fit
from fewbits.ledger import read_ledger
from fewbits.plan import make_plan
from fewbits.recipe import Recipe
from fewbits.report.allocation import read_schemes
from fewbits.sizes import weight_file_bytes
from fewbits.statistics import read_statistics
from models import VOCABULARY, tiny_checkpoint
from test_cli import refused, run

G32 = QuantScheme(4, "group", 32)
IDS = torch.randint(3, VOCABULARY, (12, 32), generator=torch.Generator().manual_seed(2))
FORMATS = [
    ("llama", "compressed-tensors"),
    ("llama", "gptq"),
    ("llama", "gptq-v2"),
    ("llama", "awq"),
    ("llama", "gguf"),
    ("qwen3", "gguf"),
    ("qwen3", "fewbits"),
    ("gpt2", None),
    ("opt", None),
    ("mixtral", "compressed-tensors"),
    ("mixtral", "fewbits"),
    ("gpt_oss", None),
]


pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Tiny:
    """Tiny checkpoints and their statistics, each made once."""

    folder: Path
    made: dict[Any, Path] = field(default_factory=dict)

    def source(self, model_type: str, **changes: Any) -> Path:
        key = model_type, str(changes)
        if key not in self.made:
            torch.manual_seed(0)
            path = self.folder / f"{model_type}-{len(self.made)}"
            self.made[key] = tiny_checkpoint(path, model_type, **changes)
        return self.made[key]

    def stats(self, model_type: str, **changes: Any) -> Path:
        key = "stats", model_type, str(changes)
        if key not in self.made:
            path = self.folder / f"stats-{len(self.made)}"
            measure(self.source(model_type, **changes), path, calibration=IDS)
            self.made[key] = path
        return self.made[key]

    def float_bytes(self, model_type: str) -> int:
        return sum(path.stat().st_size for path in self.source(model_type).glob("*.safetensors"))

    def quantize(self, out: Path, model_type: str = "llama", **more: Any) -> pipeline.Quantized:
        more = {"method": "rtn"} | more
        if "calibration" not in more:
            more = {"statistics": self.stats(model_type)} | more
        return quantize(self.source(model_type), out, **more)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny(tmp_path_factory.mktemp("tiny"))


def weight_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".gguf"))


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files but that which says how long it took."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "run.json"}


def chosen(result: pipeline.Quantized) -> dict[str, QuantScheme | None]:
    return read_schemes(result.ledger.request["allocation"])


def written(result: pipeline.Quantized) -> dict[str, str]:
    """Labels of the codes that the ledger found in the files."""
    entries = read_ledger(result.out).tensors.items()
    return {n: e.quantized.scheme for n, e in entries if e.quantized is not None}


# -- what comes out ------------------------------------------------------------------------------


@pytest.mark.parametrize(("model_type", "format"), FORMATS)
def test_the_files_are_as_large_as_was_said_and_no_larger_than_was_asked(
    tiny, tmp_path, model_type, format
):
    most = int((0.75 if format == "awq" else 0.45) * tiny.float_bytes(model_type))
    asked = {"memory": most, "format": format, "embeddings": format == "fewbits"}
    result = tiny.quantize(tmp_path / "out", model_type, **asked)
    budget = result.ledger.request["budget"]
    sizes = [path.stat().st_size for path in weight_files(result.out)]
    assert sum(sizes) == result.weight_bytes == budget["weight_bytes"] <= most
    schemes = chosen(result)
    labels = {n: s.label for n, s in schemes.items() if s is not None}
    zeros = "-asym" * (format == "awq")  # which it always stores
    assert written(result) == {name: label + zeros for name, label in labels.items()}
    assert len(set(schemes.values())) > 1  # or nothing was chosen
    damage = read_statistics(tiny.stats(model_type)).damage
    costs = [damage[n][s.label] for n, s in schemes.items() if s is not None]
    assert budget["predicted"] == pytest.approx(math.fsum(costs), rel=1e-12)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("bits", [4.9, 7.3])
def test_bits_per_weight_are_those_of_whole_files(tiny, tmp_path, bits):
    result = tiny.quantize(tmp_path / "out", bits_per_weight=bits)
    assert bits - 0.5 < result.bits_per_weight <= bits


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_what_clients_join_shares_a_scheme(tiny, tmp_path, model_type):
    result = tiny.quantize(tmp_path / "out", model_type, bits_per_weight=6, format="compressed-tensors")
    joined = defaultdict(set)
    for name, scheme in chosen(result).items():
        found = re.match(
            r"(.*\.(?:self_attn|mlp|experts))\..*?(q|k|v|gate|up|w1|w3)(_proj)?\.weight", name
        )
        if found is not None:
            joined[found[1], found[2] in "qkv"].add(scheme)
    assert len(joined) == 4
    assert all(len(schemes) == 1 for schemes in joined.values())
    assert len(set().union(*joined.values())) > 1


def test_overrides_stay(tiny, tmp_path):
    q4, rest = "model.layers.0.self_attn.o_proj", "*.layers.1.mlp.*"
    overrides = ((q4, QuantScheme(2, "group", 64)), (rest, None))
    result = tiny.quantize(tmp_path / "out", bits_per_weight=9, overrides=overrides)
    assert written(result)[f"{q4}.weight"] == "w2-g64"
    assert not any(name.startswith("model.layers.1.mlp.") for name in written(result))
    told = read_statistics(tiny.stats("llama")).damage
    costs = sum(told[name][label] for name, label in written(result).items())
    costs += told[f"{q4}.weight"]["w2-g64"]  # 2 bits count twice
    assert result.ledger.request["budget"]["predicted"] == pytest.approx(costs)
    assert result.weight_bytes == result.ledger.request["budget"]["weight_bytes"]


def test_what_is_not_measured_stays_in_float_or_as_an_override_says(tiny, tmp_path):
    names = [f"model.decoder.project_{where}" for where in ("in", "out")]
    result = tiny.quantize(tmp_path / "out", "opt", bits_per_weight=7)
    assert not {f"{name}.weight" for name in names} & written(result).keys()
    said = {note.where for note in result.ledger.notes if "not measured" in note.what}
    assert said == {f"{name}.weight" for name in names}
    overrides = tuple((name, G32) for name in names)
    more = tiny.quantize(tmp_path / "more", "opt", bits_per_weight=7, overrides=overrides)
    assert {written(more)[f"{name}.weight"] for name in names} == {"w4-g32"}
    assert not any("not measured" in note.what for note in more.ledger.notes)


@pytest.mark.parametrize("method", ["gptq", "awq", "awq+gptq", "best"])
def test_every_method_rounds_in_the_chosen_schemes(tiny, tmp_path, method):
    result = tiny.quantize(tmp_path / "out", bits_per_weight=6, method=method)
    labels = {n: s.label for n, s in chosen(result).items() if s is not None}
    assert written(result) == labels
    assert chosen(result) == chosen(tiny.quantize(tmp_path / "rtn", bits_per_weight=6))
    assert [block["block"] for block in result.ledger.blocks] == [0, 1]


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_best_without_a_size_is_no_larger_than_one_scheme_for_all_and_costs_less(
    tiny, tmp_path, model_type
):
    best = tiny.quantize(tmp_path / "best", model_type, method="best", scheme=G32)
    uniform = tiny.quantize(tmp_path / "uniform", model_type, method="awq+gptq", scheme=G32)
    assert best.weight_bytes <= uniform.weight_bytes
    damage = read_statistics(tiny.stats(model_type)).damage
    costs = sum(damage[name][label] for name, label in written(uniform).items())
    assert best.ledger.request["budget"]["predicted"] <= costs
    assert len(set(written(best).values())) > 1


@pytest.mark.parametrize("changes", [{}, {"intermediate_size": 100}], ids=str)
def test_two_bits_are_chosen_only_where_three_do_not_fit(tiny, changes):
    """However little they seem to cost; also where one has no groups, and no other is measured so."""
    source, whole = tiny.source("llama", **changes), "channel" if changes else "g32"
    down, o = ("*.down_proj", f"w3-{whole}"), ("*.o_proj", "w3-g128")
    least = Recipe(
        scheme=QuantScheme(3, "group", 64),  # with the widest groups that fit
        overrides=tuple((pattern, QuantScheme.parse(label)) for pattern, label in (down, o)),
        head=True,
    )
    size = weight_file_bytes(make_plan(source, least, "compressed-tensors"))
    damage = {
        name: {label: 0.0 if label.startswith("w2") else nats for label, nats in found.items()}
        for name, found in read_statistics(tiny.stats("llama", **changes)).damage.items()
    }

    def bits(memory: int) -> set[int]:
        found = fit(
            source, Recipe(), Size(memory=memory), damage, format=None, clients=(),
            tensor_parallel=1, max_shard_bytes=2**30,
        )  # fmt: skip
        return {s.bits for s in found.recipe.allocation.values() if s is not None}

    assert bits(size) == {3}
    assert 2 not in bits(size * 5 // 4)
    assert 2 in bits(size - 1)


def test_trellises_of_two_bits_are_chosen_where_they_pay_at_twice_what_was_predicted(tiny):
    """Two matrices, and room for one step of one: that of the second costs twice as much, or more."""
    source, measured = tiny.source("llama"), read_statistics(tiny.stats("llama")).damage
    names = [f"model.layers.0.mlp.{kind}_proj.weight" for kind in ("gate", "up")]
    rest = "re:(?!model.layers.0.mlp.(gate|up)_proj).*"

    def chosen_bits(share: float) -> dict[str, int]:
        """By what 2 bits cost of what 4 bits save."""
        damage = {name: dict.fromkeys(nats, 1000000000.0) for name, nats in measured.items()}
        for name, two in zip(names, (share, 3.0), strict=True):
            damage[name] |= {"w2-g64-trellis": two, "w3-g64-trellis": 1.0, "w4-g64-trellis": 0.0}
        recipe = Recipe(overrides=((rest, None),))
        even = replace(recipe, scheme=QuantScheme(3, "group", 64, trellis=True))
        size = weight_file_bytes(make_plan(source, even, "fewbits"))
        found = fit(
            source, recipe, Size(memory=size), damage, format="fewbits", clients=(), tensor_parallel=1,
            max_shard_bytes=2**30,
        )  # fmt: skip
        schemes = found.recipe.allocation
        return {name: schemes[name].bits for name in names}

    assert chosen_bits(0.9) == dict(zip(names, (2, 4), strict=True))  # 2 * 0.9 < 1 + 1
    assert chosen_bits(1.1) == dict.fromkeys(names, 3)


def test_asymmetric_stays_asymmetric(tiny, tmp_path):
    scheme = QuantScheme(4, "group", 128, symmetric=False)  # groups that do not fit
    result = tiny.quantize(tmp_path / "out", bits_per_weight=7, scheme=scheme)
    assert {s.symmetric for s in chosen(result).values() if s is not None} == {False}


def test_calibration_and_statistics_of_the_same_text_give_the_same_bytes(tiny, tmp_path):
    asked = {"method": "best", "bits_per_weight": 6}
    one = tiny.quantize(tmp_path / "one", **asked)
    other = tiny.quantize(tmp_path / "other", **asked, calibration=IDS)
    files = [[path.read_bytes() for path in weight_files(r.out)] for r in (one, other)]
    assert files[0] == files[1]
    assert one.ledger.request == other.ledger.request


# -- the same again ------------------------------------------------------------------------------

ASKED = {"method": "best", "bits_per_weight": 6.5, "calibration": IDS}


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A result that nothing interrupted."""
    return tiny.quantize(tmp_path_factory.mktemp("whole") / "out", **ASKED).out


@pytest.fixture
def unmeasured(monkeypatch):
    """Nothing may be measured."""

    def fail(*_args, **_more):
        raise AssertionError("measured again")

    monkeypatch.setattr(pipeline, "measure", fail)


@pytest.mark.usefixtures("unmeasured")
def test_the_same_again_is_verified_and_not_measured(tiny, whole, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in whole.iterdir()}
    left = whole.parent / ".out.measured"  # of a process that was stopped between the last two steps
    shutil.copytree(tiny.stats("llama"), left)
    again = tiny.quantize(whole, **ASKED)
    assert again.reused
    assert again.verification.problems == []
    assert {p: p.stat().st_mtime_ns for p in whole.iterdir()} == before
    assert not left.exists()


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt2", "qwen3"])
@pytest.mark.parametrize("embeddings", [False, True])
def test_the_same_again_from_statistics(tiny, tmp_path, model_type, embeddings):
    asked = {"memory": int(0.5 * tiny.float_bytes(model_type)), "embeddings": embeddings}
    tiny.quantize(tmp_path / "out", model_type, **asked)
    assert tiny.quantize(tmp_path / "out", model_type, **asked).reused


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(
    "other",
    [
        {"bits_per_weight": 6.4},
        {"bits_per_weight": None, "memory": 80_000},
        {"bits_per_weight": None, "scheme": G32},
        {"method": "gptq"},
        {"method": "gptq", "bits_per_weight": None, "scheme": G32},
        {"method": "rtn"},
        pytest.param({"calibration": IDS.flip(0)}, id="calibration"),
        {"format": "gptq"},
        {"format": "fewbits"},
        {"embeddings": True},
        {"overrides": (("*.down_proj", None),)},
    ],
    ids=str,
)
def test_another_run_is_refused_in_one_line(tiny, whole, other):
    before = {p: p.stat().st_mtime_ns for p in whole.iterdir()}
    with pytest.raises(InputError, match=r"holds another run.* --restart to throw it away") as error:
        tiny.quantize(whole, **(ASKED | other))
    assert "\n" not in str(error.value)
    assert {p: p.stat().st_mtime_ns for p in whole.iterdir()} == before
    assert [p.name for p in whole.parent.iterdir()] == ["out"]


def test_restart_makes_it_anew(tiny, whole, tmp_path):
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    shutil.copytree(tiny.stats("llama"), tmp_path / ".out.measured")
    result = tiny.quantize(out, **(ASKED | {"bits_per_weight": 6.4}), restart=True)
    assert not result.reused
    assert result.ledger.request["budget"]["bits_per_weight"] == 6.4
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_restart_of_what_fits_nothing_leaves_what_was_there(tiny, whole, tmp_path):
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    with pytest.raises(InputError, match="the least"):
        tiny.quantize(out, **(ASKED | {"bits_per_weight": 0.5}), restart=True)
    assert contents(out) == contents(whole)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


STOPS = [("blocks, statistics", 1), ("blocks back", 1), ("blocks", 0), ("blocks", 1)]


def stopper(what: str, at: int, stop: Callable[[], None]) -> Callable[[str, int, int], None]:
    def progress(doing: str, done: int, _total: int) -> None:
        named = (
            doing.startswith(what) if what != "blocks" else re.match(r"blocks(?! back|, stat)", doing)
        )
        if named and done == at:
            stop()

    return progress


class Stop(Exception):  # noqa: N818
    """Whatever ends a process."""


@pytest.mark.parametrize(("what", "at"), STOPS)
def test_an_interrupted_run_goes_on_to_the_same_bytes(tiny, whole, tmp_path, what, at):
    def stop() -> None:
        raise Stop

    with pytest.raises(Stop):
        tiny.quantize(tmp_path / "out", **ASKED, progress=stopper(what, at, stop))
    left = {p.name for p in tmp_path.iterdir()}
    assert "out" not in left
    assert left
    result = tiny.quantize(tmp_path / "out", **ASKED)
    assert not result.reused
    assert contents(result.out) == contents(whole)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


_KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
from test_fit import ASKED, STOPS, quantize, stopper
torch.set_num_threads(1)
kill = stopper(*STOPS[int(sys.argv[4])], lambda: os.kill(os.getpid(), signal.SIGKILL))
quantize(sys.argv[2], sys.argv[3], **ASKED, progress=kill)
"""


@pytest.mark.slow
def test_a_run_that_was_killed_twice_goes_on_to_the_same_bytes(tiny, whole, tmp_path):
    for stop, left in ((1, {"..out.measured.partial"}), (3, {".out.measured", ".out.partial"})):
        command = [sys.executable, "-c", _KILLED, str(Path(__file__).parent)]
        command += [str(tiny.source("llama")), str(tmp_path / "out"), str(stop)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert {p.name for p in tmp_path.iterdir()} == left
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["fewbits.measure"].Measurement, "take", None)  # it was finished
        result = tiny.quantize(tmp_path / "out", **ASKED)
    assert result.run["resumed_steps"] > 0
    assert contents(result.out) == contents(whole)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bits-per-weight", "0.5"], ["(0.500 bits per weight)", "the least"]),
        (["--memory", "1kB"], ["the least", "bits per weight"]),
        (["--bits-per-weight", "30"], ["in float the model takes", "smaller"]),
        (["--memory", "1GB"], ["in float the model takes", "smaller"]),
        (["--bits-per-weight", "4", "--memory", "1GB"], ["--bits-per-weight and --memory", "one"]),
        (["--bits-per-weight", "nan"], ["nan", "above 0"]),
        (["--bits-per-weight", "inf"], ["inf", "above 0"]),
        (["--bits-per-weight", "1e308"], ["1e+308", "at most"]),
        (["--bits-per-weight", "-3"], ["-3", "above 0"]),
        (["--bits-per-weight", "0"], ["0.0", "above 0"]),
        (["--memory", "nan"], ["--memory", "'nan'", "6GB"]),
        (["--memory", "-4GB"], ["--memory", "'-4GB'", "6GB"]),
        (["--memory", "0"], ["--memory", "'0'", "6GB"]),
        (["--bits", "3", "--bits-per-weight", "4"], ["--bits with --bits-per-weight", "--override"]),
        (["--group-size", "32", "--memory", "1MB"], ["--group-size with --memory", "--override"]),
        (["--per-tensor", "--memory", "1MB"], ["--per-tensor with --memory"]),
        (["--method", "int8", "--memory", "80kB"], ["--method int8 with --memory"]),
        (["--method", "llm-int8", "--memory", "80kB"], ["llm-int8", "gptq"]),
        (["--method", "q4_k", "--memory", "80kB"], ["q4_k", "gptq"]),
        (["--method", "best"], ["128", "columns"]),  # groups that do not fit, of the scheme to be met
        (["--method", "gptq", "--format", "awq", "--bits-per-weight", "3"], ["the least"]),
    ],
)
def test_a_size_that_cannot_be_is_one_line_before_any_work(tiny, tmp_path, options, words):
    text = tmp_path / "text.txt"  # is not there: it would be read later
    command = ("quantize", tiny.source("llama"), tmp_path / "out", "--calibration", text)
    assert refused(run(*command, *options), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("memory", [math.nan, math.inf, 0, -1])
def test_a_memory_that_is_none_is_refused(memory):
    with pytest.raises(InputError, match="accepted are numbers from 1"):
        Size(memory=memory)


@pytest.mark.parametrize("method", ["best", "rtn"])
def test_without_data_nothing_is_chosen(tiny, tmp_path, method):
    size = {} if method == "best" else {"bits_per_weight": 6}
    with pytest.raises(InputError, match="needs calibration, or statistics"):
        quantize(tiny.source("llama"), tmp_path / "out", method=method, **size, scheme=G32)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_statistics_of_another_model_are_refused(tiny, tmp_path, method):
    source = tiny.source("llama", rms_norm_eps=1e-3, num_hidden_layers=3)
    with pytest.raises(InputError, match="measured on another model"):
        quantize(
            source, tmp_path / "out", method=method, bits_per_weight=6, statistics=tiny.stats("llama")
        )
    assert list(tmp_path.iterdir()) == []


def test_other_people_s_folders_stay(tiny, tmp_path):
    theirs = tmp_path / ".out.measured"
    theirs.mkdir()
    (theirs / "precious").write_text("data")
    tiny.quantize(tmp_path / "out", bits_per_weight=6)
    own = Path(shutil.copytree(tiny.stats("llama"), tmp_path / ".more.measured"))
    tiny.quantize(tmp_path / "more", bits_per_weight=6, statistics=own)
    assert contents(own) == contents(tiny.stats("llama"))
    assert (theirs / "precious").read_text() == "data"


# -- the command line ----------------------------------------------------------------------------


def test_the_command_line_shows_what_was_chosen(tiny, tmp_path):
    command = ("quantize", tiny.source("llama"), tmp_path / "out", "--stats", tiny.stats("llama"))
    command += ("--method", "best", "--bits-per-weight", "6")
    result = run(*command)
    assert result.exit_code == 0, result.output
    ledger = read_ledger(tmp_path / "out")
    budget, labels = ledger.request["budget"], set(ledger.request["allocation"]) - {"float"}
    assert f"written as compressed-tensors, {len(labels)} schemes;" in result.stdout
    realized = ledger.blocks[-1]["kl"]
    told = f"predicted KL {budget['predicted']:.3g} nats, realized {realized:.3g} nats"
    assert told in result.stdout
    assert "leaves out" in result.stdout
    assert re.search(r"^self_attn\.q_proj( +\d(g\d+)?)+", result.stdout, re.M)
    again = json.loads(run(*command, "--json").stdout)
    assert again["reused"]
    assert again["request"]["budget"] == budget
    page = (tmp_path / "out/report.html").read_text()
    assert "6 bits per weight" in page
    assert f"{len(labels)} schemes" in page


def test_the_size_may_be_that_of_a_scheme(tiny, tmp_path):
    command = ("quantize", tiny.source("llama"), tmp_path / "out", "--stats", tiny.stats("llama"))
    result = run(*command, "--method", "best", "--bits", "3", "--group-size", "32")
    assert result.exit_code == 0, result.output
    plan = make_plan(tiny.source("llama"), Recipe(scheme=QuantScheme(3, "group", 32)))
    assert sum(p.stat().st_size for p in weight_files(tmp_path / "out")) <= weight_file_bytes(plan)
    assert "no more than w3-g32" in (tmp_path / "out/report.html").read_text()
