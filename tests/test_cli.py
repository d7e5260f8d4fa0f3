"""The command line as a user meets it: exit codes, one clear line, JSON."""

import json
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from checks import fast_kernel
from fewbits.cli import app
from models import tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Llama with a tokenizer of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_checkpoint(folder, "llama")
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: size - 1]
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(["<s>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def int4(model):
    out = model.parent / "int4"
    assert run("quantize", model, out, "--group-size", "32").exit_code == 0
    return out


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(result, *words):
    """Exit code 2, one line that holds all the words, nothing on stdout."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr
    return True


def test_quantize_says_what_it_did_and_json_says_the_same(model, tmp_path):
    result = run("quantize", model, tmp_path / "out", "--method", "int8", "--json")
    value = json.loads(result.stdout)
    assert value["request"]["scheme"] == "w8-channel"
    assert value["verified"]["problems"] == []
    again = run("quantize", model, tmp_path / "out", "--method", "int8")
    assert again.exit_code == 0
    assert "already there" in again.stdout
    assert f"{value['totals']['quantized']} quantized" in again.stdout


@pytest.mark.parametrize(
    ("options", "scheme"),
    [
        ([], "w8-channel-a8-token-t6"),
        (["--threshold", "4.5"], "w8-channel-a8-token-t4.5"),
        (["--threshold", "0"], "w8-channel-a8-token"),
        (["--threshold", "0", "--per-tensor"], "w8-tensor-a8-tensor"),
    ],
)
def test_llm_int8_by_its_options(model, tmp_path, options, scheme):
    result = run("quantize", model, tmp_path / "out", "--method", "llm-int8", *options, "--json")
    value = json.loads(result.stdout)
    assert (value["request"]["method"], value["request"]["scheme"]) == ("llm-int8", scheme)
    plan = json.loads(run("plan", model, "--method", "llm-int8", *options, "--json").stdout)
    assert plan["written_bytes"] == value["totals"]["written_bytes"]


def test_plan_predicts_what_quantize_writes(model, int4):
    plan = json.loads(run("plan", model, "--group-size", "32", "--json").stdout)
    ledger = json.loads((int4 / "fewbits.json").read_text())
    assert plan["written_bytes"] == ledger["totals"]["written_bytes"]
    assert plan["quantized"] == ledger["totals"]["quantized"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "magic"], ["magic", "rtn", "int8"]),
        (["--bits", "5"], ["5", "2, 3, 4 and 8"]),
        (["--method", "int8", "--bits", "4"], ["int8", "4"]),
        (["--method", "llm-int8", "--bits", "4"], ["llm-int8", "4"]),
        (["--method", "llm-int8", "--group-size", "32"], ["llm-int8", "32", "none"]),
        (["--method", "llm-int8", "--asymmetric"], ["asymmetric", "8 bits by channel"]),
        (["--method", "llm-int8", "--threshold", "-1"], ["-1", "from 0"]),
        (["--method", "llm-int8", "--format", "compressed-tensors"], ["no layout", "8 bits"]),
        (["--method", "gptq", "--threshold", "6"], ["--threshold", "gptq", "llm-int8"]),
        (["--method", "llm-int8", "--threshold", "0", "--calibration", "self"], ["llm-int8", "above 0"]),
        (["--group-size", "40"], ["40", "down_proj", "q_proj", "divisors"]),
        (["--group-size", "many"], ["many", "none"]),
        (["--per-tensor", "--group-size", "32"], ["--per-tensor", "32"]),
        (["--override", "*.nothing=w8-channel", "--group-size", "32"], ["*.nothing", "matches no"]),
        (["--override", "nonsense", "--group-size", "32"], ["nonsense", "PATTERN=SCHEME"]),
        (["--override", "*=w9-channel", "--group-size", "32"], ["9"]),
        (["--format", "tarball", "--group-size", "32"], ["tarball", "compressed-tensors"]),
    ],
)
def test_bad_arguments_are_one_line_and_write_nothing(model, tmp_path, options, words):
    assert refused(run("quantize", model, tmp_path / "out", *options), *words)
    assert list(tmp_path.iterdir()) == []


def test_bad_models_are_one_line_and_write_nothing(model, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    assert refused(run("quantize", tmp_path / "empty", out), "config.json")
    (tmp_path / "empty" / "config.json").write_text((model / "config.json").read_text())
    assert refused(run("quantize", tmp_path / "empty", out), "no weights")
    (tmp_path / "empty" / "model.safetensors").write_bytes(b"\xff" * 100)
    assert refused(run("quantize", tmp_path / "empty", out), "model.safetensors", "corrupt")
    assert refused(run("quantize", tmp_path / "nowhere", out), "nowhere", "no such folder")
    assert not out.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_and_nothing_is_left(model, tmp_path, value):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text((model / "config.json").read_text())
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert refused(run("quantize", source, tmp_path / "out", "--group-size", "32"), name)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_an_existing_folder_is_refused(model, int4, tmp_path):
    assert refused(run("quantize", model, tmp_path, "--method", "int8"), "exists")
    assert refused(run("quantize", model, int4, "--bits", "8"), "another run", "w4-g32")


def test_verify_finds_a_flipped_bit_with_exit_code_3(int4, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(int4, copy)
    assert run("verify", copy).exit_code == 0
    path = copy / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    result = run("verify", copy)
    assert result.exit_code == 3
    assert "model.safetensors was changed" in result.stderr
    assert "has other values" in result.stderr


def test_verify_of_something_else_is_bad_input(model):
    assert refused(run("verify", model), "fewbits.json")


def test_evaluate_prints_a_table_and_json_with_the_text_and_python(model, int4, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox.\n" * 20)
    options = ["--reference", model, "--text", text, "--seq-len", "64"]
    result = run("evaluate", model, int4, *options, "--json")
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)
    ours, theirs = value["models"]
    assert ours["evaluation"]["kl"]["value"] == 0
    assert theirs["evaluation"]["kl"]["value"] > 0
    assert value["python"] == sys.version.split()[0]
    shown = run("evaluate", int4, *options)
    assert "w4-g32" in shown.stdout
    assert theirs["evaluation"]["text_sha256"][:16] in shown.stdout


def test_evaluate_refuses_what_it_cannot_use(model, tmp_path):
    assert refused(run("evaluate", model, "--text", tmp_path / "none"), "none")
    text = tmp_path / "text.txt"
    text.write_text("x" * 100)
    assert refused(run("evaluate", model, "--text", text, "--seq-len", "2"), "3")
    assert refused(run("evaluate", model, "--text", text, "--limit", "0"), "--limit")
    assert refused(run("evaluate", model, "--text", text, "--seq-len", "65"), "65", "context, 64")


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, 10**30])
def test_a_seed_that_is_none_is_one_line_in_every_command(model, text, tmp_path, seed):
    out, given = tmp_path / "out", ("--seed", seed)
    for command in (
        ("quantize", model, out),
        ("quantize", model, out, "--method", "gptq", "--calibration", text, *CALIBRATED),
        ("measure", model, out, "--calibration", text),
        ("compare", model, "--work", out, "--methods", "int8", "--text", text, "--no-speed"),
        ("inspect", model, "--calibration", text),
        ("generate", model, "The"),
    ):
        assert refused(run(*command, *given), f"seed is {seed}", "accepted are numbers from 0 to")
    assert list(tmp_path.iterdir()) == []


def test_what_was_measured_once_is_quantized_from_again(model, text, tmp_path):
    stats, out = tmp_path / "stats", tmp_path / "out"
    measuring = ("measure", model, stats, "--calibration", text, "--samples", "4", "--seq-len", "16")
    assert run("measure", model, stats).exit_code == 2  # --calibration is missing
    result = run(*measuring, "--json")
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)
    assert (value["blocks"], value["inputs"], value["reused"]) == (2, 8, False)
    size = sum(path.stat().st_size for path in stats.glob("*.safetensors"))
    assert value["size_bytes"] == size
    again = run(*measuring)
    assert again.exit_code == 0
    assert again.stdout.startswith(f"{stats}: already there, and verified; ")
    assert "2 blocks, 8 inputs" in again.stdout
    costs = {name: nats["w4-g32"] for name, nats in value["damage"].items()}
    worst = max(costs, key=costs.get)
    assert f"in w4-g32 {len(costs)} of them together {sum(costs.values()):.3g} nats" in again.stdout
    assert f"most for {worst}, {costs[worst]:.3g}" in again.stdout
    assert refused(run(*measuring, "--seed", "3"), "holds another measurement", "--restart")
    quantizing = ("quantize", model, out, "--group-size", "32", "--stats", stats)
    made = run(*quantizing, "--method", "awq+gptq", "--json")
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["request"]["statistics"] == value["sha256"]
    static = run(
        "quantize", model, tmp_path / "int8", "--method", "llm-int8", "--stats", stats, "--json"
    )
    assert json.loads(static.stdout)["request"]["scheme"] == "w8-channel-a8-token-t6-static"
    both = run(*quantizing, "--method", "gptq", "--calibration", text)
    assert refused(both, "calibration and statistics are both given", "accepted is one of them")
    assert refused(run(*quantizing), "method rtn takes no statistics")


def test_generate_streams_text_and_is_repeatable(int4):
    sampled = ("generate", int4, "The", "--max-new-tokens", "5", "--temperature", "1")
    first = run(*sampled)
    assert first.exit_code == 0, first.output
    assert first.stdout.startswith("The")
    assert (
        run("generate", int4, "The", "--max-new-tokens", "5", "--temperature", "1").stdout
        == first.stdout
    )
    assert refused(run("generate", int4, "The", "--max-new-tokens", "0"), "--max-new-tokens")


def test_bench_says_which_kernel_runs_and_why_not_another(model, tmp_path):
    from fewbits.native.library import summary

    out = tmp_path / "out"
    assert run("quantize", model, out, "--group-size", "16").exit_code == 0
    result = run("bench", out, "--prompt", "8", "--new-tokens", "2")
    assert result.exit_code == 0, result.output
    assert "reference" in result.stdout
    assert "needs groups of a multiple of 32 columns, not 16" in result.stdout
    assert f"native library {summary()} threads" in " ".join(result.stdout.split())


def test_bench_rounds_inputs_to_8_bits_only_where_that_is_asked_for(model, tmp_path):
    out = tmp_path / "out"
    assert run("quantize", model, out, "--group-size", "32").exit_code == 0
    command = ("bench", out, "--prompt", "8", "--new-tokens", "2", "--json")
    plain, rounded = (json.loads(run(*command, *more).stdout) for more in ((), ("--int8-inputs",)))
    wanted = fast_kernel("reference")
    assert wanted in plain["kernels"]
    assert (f"{wanted}-int8" if wanted == "native" else wanted) in rounded["kernels"]


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_an_interrupted_run_exits_130_and_keeps_what_is_finished(model, tmp_path, monkeypatch):
    command = ("quantize", model, tmp_path / "out", "--group-size", "32")
    monkeypatch.setattr("fewbits.steps.Steps._outside", interrupt)
    assert run(*command).exit_code == 130
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setattr("fewbits.steps.round_held", interrupt)  # the first block: one step is finished
    assert run(*command).exit_code == 130
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
    monkeypatch.undo()
    assert run(*command).exit_code == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["resumed_steps"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_unfinished_work_of_other_arguments_is_refused_until_it_is_thrown_away(
    model, tmp_path, monkeypatch
):
    command = ("quantize", model, tmp_path / "out", "--group-size", "32")
    monkeypatch.setattr("fewbits.steps.round_held", interrupt)
    assert run(*command).exit_code == 130
    monkeypatch.undo()
    words = ("another unfinished run", "'w4-g32'", "'w3-g32'", "--restart")
    assert refused(run(*command, "--bits", "3"), *words)
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
    assert run(*command, "--bits", "3", "--restart").exit_code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["resumed_steps"] == 0


def test_a_full_disk_is_one_line_and_exit_code_1(model, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fewbits.journal.write", full)
    result = run("quantize", model, tmp_path / "out", "--group-size", "32")
    assert result.exit_code == 1
    assert "the disk is full" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_does_not_wait_for_transformers():
    code = (
        "import sys; from fewbits.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'transformers' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


# -- calibrated ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = [f"line {i}: " + "abcdefghij klmnop"[i % 7 : i % 17 + 3] * 3 for i in range(150)]
    path.write_text("\n".join(lines))
    return path


CALIBRATED = ("--group-size", "32", "--samples", "8", "--seq-len", "32")


@pytest.fixture(scope="module")
def gptq(model, text):
    out = model.parent / "gptq"
    result = run("quantize", model, out, "--method", "gptq", "--calibration", text, *CALIBRATED)
    assert result.exit_code == 0, result.output
    return out, result


def test_a_calibrated_run_prints_how_each_block_came_out(gptq):
    out, result = gptq
    ledger = json.loads((out / "fewbits.json").read_text())
    assert len(ledger["blocks"]) == 2
    lines = [line.split() for line in result.stdout.splitlines()]
    # The heading may be cut where the terminal is narrow; figures never are.
    (heading,) = [i for i, words in enumerate(lines) if words and words[0].startswith("blo")]
    for i, block in enumerate(ledger["blocks"]):
        number, error, ratio, kl, matrices, *_, fallen = lines[heading + 1 + i]
        assert (number, error, kl) == (str(i), f"{block['error']:.3g}", f"{block['kl']:.3g}")
        assert ratio == f"{block['error'] / block['nearest']:.2f}"
        assert (matrices, fallen) == ("7", "0")
    assert ledger["calibration"]["samples"] == 8
    assert ledger["calibration"]["tokens"] == 256
    assert ledger["calibration"]["source"] == "text.txt"
    assert "calibration: " in result.stdout  # whether the data is enough


def test_json_of_a_calibrated_run_has_its_blocks(model, text, gptq):
    out, _ = gptq
    again = run("quantize", model, out, "--method", "gptq", "--calibration", text, *CALIBRATED, "--json")
    value, ledger = json.loads(again.stdout), json.loads((out / "fewbits.json").read_text())
    assert value["reused"]
    assert value["blocks"] == ledger["blocks"]
    assert value["request"]["calibration"] == ledger["calibration"]


def test_another_seed_is_another_run(model, text, gptq):
    out, _ = gptq
    options = ["--method", "gptq", "--calibration", text, *CALIBRATED, "--seed", "1"]
    assert refused(run("quantize", model, out, *options), "another run", "calibration", "seed")


@pytest.mark.parametrize("method", ["awq", "awq+gptq", "weighted-rtn"])
def test_every_calibrated_method_is_known_by_name(model, text, tmp_path, method):
    options = ["--method", method, "--calibration", text, *CALIBRATED, "--json"]
    result = run("quantize", model, tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["request"]["method"] == method
    assert run("verify", tmp_path / "out", "--source", model).exit_code == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "gptq"], ["gptq needs calibration", "text file", "self"]),
        (["--method", "gtpq", "--calibration", "TEXT"], ["'gtpq' is unknown", "gptq", "awq+gptq"]),
        (["--method", "gptq+awq", "--calibration", "TEXT"], ["'gptq+awq' is unknown"]),
        (["--calibration", "TEXT"], ["rtn takes no calibration", "gptq"]),
        (["--method", "gptq", "--calibration", "nowhere.txt"], ["nowhere.txt"]),
        (["--method", "gptq", "--calibration", "TEXT", "--samples", "9999"], ["9999", "at most"]),
        (["--method", "gptq", "--calibration", "TEXT", "--samples", "0"], ["samples"]),
        (["--method", "gptq", "--calibration", "TEXT", "--samples", "1"], ["samples is 1", "2 or more"]),
        (["--method", "gptq", "--calibration", "TEXT", "--seq-len", "65"], ["65", "context, 64"]),
        (["--method", "gptq", "--calibration", "TEXT", "--seq-len", "1"], ["1"]),
        (["--method", "gptq", "--calibration", "TEXT", "--max-memory", "lots"], ["'lots'", "6GB"]),
        (["--method", "gptq", "--calibration", "TEXT", "--max-memory", "-1GB"], ["'-1GB'", "6GB"]),
        (["--method", "gptq", "--calibration", "TEXT", "--max-memory", "0"], ["'0'", "6GB"]),
        (["--method", "gptq", "--calibration", "TEXT", "--max-memory", "1kB"], ["--max-memory", "GB"]),
        (["--max-memory", "1kB"], ["--max-memory", "GB"]),
    ],
)
def test_bad_calibration_is_one_line_and_writes_nothing(model, text, tmp_path, options, words):
    options = [text if option == "TEXT" else option for option in options]
    out = tmp_path / "out"
    assert refused(run("quantize", model, out, *CALIBRATED, *options), *words)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_calibrated_run_exits_130_and_goes_on(model, text, gptq, tmp_path, monkeypatch):
    monkeypatch.setattr("fewbits.stream.Stream.advance", interrupt)
    command = ("quantize", model, tmp_path / "out", "--method", "gptq", "--calibration", text)
    assert run(*command, *CALIBRATED).exit_code == 130
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
    monkeypatch.undo()
    assert run(*command, *CALIBRATED).exit_code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    for path in gptq[0].rglob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "out/fewbits.json").read_bytes() == (gptq[0] / "fewbits.json").read_bytes()


def test_the_reference_model_is_calibrated_on_a_text_file(text, tmp_path):
    out, options = tmp_path / "out", ["--samples", "8", "--seq-len", "64"]
    result = run("quantize", "reference/model", out, "--method", "gptq", "--calibration", text, *options)
    assert result.exit_code == 0, result.output
    assert "42 quantized" in result.stdout
    assert "KL so far" in result.stdout
    blocks = json.loads((out / "fewbits.json").read_text())["blocks"]
    assert [len(block["matrices"]) for block in blocks] == [7] * 6


# -- compare, and pages --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text("abcdefghijklmnopqrstuvwxyz" * 40)
    return file


def compared(model, words, work, *more):
    given = ["--text", words, "--calibration", words, "--samples", 4, "--seq-len", 32, "--no-speed"]
    return run("compare", model, *given, "--group-size", 32, "--work", work, *more)


def test_compare_prints_tables_writes_a_page_and_keeps_what_it_measured(
    model, words, tmp_path, monkeypatch
):
    page = tmp_path / "report.html"
    monkeypatch.setattr(sys, "argv", ["fewbits", "compare", str(model), "--html", str(page)])
    methods = ("--methods", "int8,rtn,gptq", "--bits", "4,3")
    result = compared(model, words, tmp_path / "work", *methods, "--html", page)
    assert result.exit_code == 0, result.output
    names = ["float", "int8", "rtn-w4-g32", "gptq-w4-g32", "rtn-w3-g32", "gptq-w3-g32"]
    value = json.loads((tmp_path / "work/compare.json").read_text())
    assert [row["name"] for row in value["rows"]] == names
    for name in names:
        assert name in result.stdout
        assert name in page.read_text()
    assert "fewbits compare llama --html report.html" in page.read_text()
    assert str(tmp_path) not in page.read_text()
    again = compared(model, words, tmp_path / "work", *methods, "--json")
    rows = json.loads(again.stdout)["rows"]
    assert [row["evaluation"] for row in rows] == [row["evaluation"] for row in value["rows"]]
    assert all(row["reused"] == ["evaluation"] for row in rows)


@pytest.mark.parametrize(
    ("more", "words_of_it"),
    [
        (("--methods", "gqtp"), ("gqtp", "accepted")),
        (("--methods", "int8,int8"), ("int8", "twice")),
        (("--eval-len", "65"), ("65 tokens", "context, 64")),
        (("--max-memory", "lots"), ("'lots'", "6GB")),
        (("--max-memory", "1kB"), ("--max-memory", "GB or more")),
        (("--bits", "5"), ("5", "2, 3, 4 and 8")),
        (("--bits", "four"), ("--bits", "four")),
        (("--limit", "0"), ("--limit is 0",)),
        (("--tasks", "hellaswag", "--task-data", "nowhere"), ("nowhere",)),
        (("--html", "nowhere/report.html"), ("--html", "nowhere")),
        (("--html", "report.txt"), ("--html", ".html")),
        (("--group-size", "7"), ("7", "accepted")),
    ],
)
def test_compare_refuses_what_it_cannot_do_before_any_work(model, words, tmp_path, more, words_of_it):
    refused(compared(model, words, tmp_path / "work", *more), *words_of_it)
    assert not (tmp_path / "work").exists()


def test_quantize_writes_its_page_beside_the_model_and_verify_does_not_mind(model, tmp_path):
    assert run("quantize", model, tmp_path / "out", "--method", "int8").exit_code == 0
    page = (tmp_path / "out/report.html").read_text()
    assert "w8-channel" in page
    assert run("verify", tmp_path / "out", "--source", model).exit_code == 0
    other = tmp_path / "elsewhere.html"
    done = run("quantize", model, tmp_path / "out2", "--method", "int8", "--html", other)
    assert done.exit_code == 0
    assert other.is_file()
    assert not (tmp_path / "out2/report.html").exists()


def test_a_page_that_cannot_be_drawn_is_a_line_and_no_failure(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run("quantize", model, tmp_path / "out", "--method", "int8")
    assert done.exit_code == 0
    assert "skip: no report.html" in done.stdout
    assert "fewbits[report]" in done.stdout


def test_convert_says_what_was_written_and_asks_clients_first(int4, tmp_path):
    out = tmp_path / "out"
    arguments = ("convert", int4, out, "--format", "gptq")
    assert refused(run(*arguments, "--client", "llama.cpp"), "does not read gptq", "--format gguf")
    assert refused(run(*arguments, "--tensor-parallel", "2"), "vLLM", "down_proj")  # 48 columns each
    result = run("convert", int4, out, "--format", "awq", "--client", "gptqmodel")
    assert result.exit_code == 0, result.output
    assert f"{out}: written as awq, w4-g32-asym; " in result.stdout  # as it is read back
    assert "converted" in result.stdout
