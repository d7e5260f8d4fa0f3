"""compare() end to end on tiny models: what it measures, what a second run finds, what it refuses."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

import fewbits
from fewbits.checkpoint import hash_file
from fewbits.compare import Candidate, block_errors, compare
from fewbits.comparison import FLOAT, read_comparison
from fewbits.errors import InputError
from fewbits.evaluate import evaluate, load_tokenizer
from fewbits.load import load
from fewbits.scheme import QuantScheme
from fewbits.text import Text
from models import VOCABULARY, tiny_checkpoint, tiny_model

module = sys.modules["fewbits.compare"]  # where names are the function's, the package has the function

TEXT = Text(
    "letters", ["abcdefghijklmnopqrstuvwxyz" * 6, "def_f(x):return_x+1", "zyxwvutsrqponmlkji" * 4]
)
OTHER = Text("figures", ["0123456789" * 20, "3.14159265358979"])
W4_G32 = QuantScheme(4, "group", 32)
METHODS = ["int8", "rtn=w4-g32", "awq+gptq=w4-g32"]
NAMES = [FLOAT, "int8", "rtn-w4-g32", "awq+gptq-w4-g32"]
OPTIONS = {"text": TEXT, "calibration": TEXT, "samples": 6, "sample_length": 32, "speed": False}


class StopHereError(Exception):
    """Ctrl-C, or the power."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Llama with a tokenizer of single bytes."""
    return checkpoint(tmp_path_factory.mktemp("models") / "llama")


def checkpoint(folder, **changes):
    tiny_checkpoint(folder, "llama", **changes)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCABULARY - 1]
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(["<s>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    return folder


def study(model, work, methods=METHODS, **options):
    return compare(model, work, candidates=Candidate.all(list(methods)), **OPTIONS | options)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work") / "first"


@pytest.fixture(scope="module")
def found(model, work):
    return study(model, work)


@pytest.fixture
def evaluated(monkeypatch):
    """Every call to `evaluate` from now on."""
    calls = []

    def counting(network, *arguments, **options):
        calls.append(network)
        return evaluate(network, *arguments, **options)

    monkeypatch.setattr(module, "evaluate", counting)
    return calls


def figures(comparison):
    """All but what says where it came from."""
    return [replace(row, reused=()) for row in comparison.rows]


def folders(work):
    return {path.parent.name: path.parent for path in work.glob("*/config.json")}


# -- what it measures --------------------------------------------------------------------------------


def test_rows_come_in_order_and_nothing_was_reused(found):
    assert [row.name for row in found.rows] == NAMES
    assert all(row.reused == () for row in found.rows)
    assert [row.method for row in found.rows] == ["", "rtn", "rtn", "awq+gptq"]


def test_the_float_row_differs_from_itself_in_nothing(found):
    row = found.rows[0]
    evaluation = row.evaluation
    assert (evaluation.kl.value, evaluation.kl_99.value, evaluation.flips.value) == (0, 0, 0)
    assert (evaluation.top1_agreement.value, evaluation.perplexity_ratio.value) == (1, 1)
    assert row.block_errors == (0, 0)
    assert row.quantize_s is None


def test_sizes_are_those_of_the_files(model, work, found):
    places = {name.rpartition("-")[0]: path for name, path in folders(work).items()}
    places[FLOAT] = model
    parameters = sum(t.numel() for t in load_file(model / "model.safetensors").values())
    for row in found.rows:
        size = sum(path.stat().st_size for path in places[row.name].glob("*.safetensors"))
        assert row.weight_bytes == size
        assert row.bits_per_weight == 8 * size / parameters


def test_quality_is_what_evaluate_says(model, work, found):
    for row in found.rows[1:]:
        folder = next(path for name, path in folders(work).items() if name.startswith(f"{row.name}-"))
        assert row.evaluation == evaluate(folder, model, text=TEXT)


def test_fewer_bits_are_worse_and_the_table_says_by_how_much(found):
    int8, int4, best = found.rows[1:]
    assert 0 < int8.evaluation.kl.value < best.evaluation.kl.value
    assert 0 < int8.evaluation.kl.value < int4.evaluation.kl.value
    assert all(0 < a < b for a, b in zip(int8.block_errors, int4.block_errors, strict=True))
    named = {(d.first, d.second) for d in found.differences()}
    assert len(named) == 3
    assert all(d.estimate.error is not None for d in found.differences())


def test_the_file_says_what_was_returned(work, found):
    assert read_comparison(work / "compare.json") == found


def test_text_that_was_calibrated_on_is_said_to_be_so(found):
    assert any("letters is the text to judge on and that to calibrate on" in n for n in found.notes)


# -- what a second run finds -------------------------------------------------------------------------


def test_a_second_run_reuses_folders_and_measurements(model, work, found, evaluated):
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    again = study(model, work)
    assert evaluated == []
    assert all(row.reused == ("evaluation",) for row in again.rows)
    assert figures(again) == figures(found)
    after = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    assert {path for path in after if before.get(path) != after[path]} <= {work / "compare.json"}


def test_a_further_candidate_is_the_only_one_measured(model, work, found, evaluated):
    more = study(model, work, ["int8", "rtn=w3-g32", "awq+gptq=w4-g32"])
    assert [row.name for row in more.rows] == [FLOAT, "int8", "awq+gptq-w4-g32", "rtn-w3-g32"]
    assert len(evaluated) == 1
    assert [row.name for row in more.rows if not row.reused] == ["rtn-w3-g32"]
    assert figures(more)[:3] == [figures(found)[i] for i in (0, 1, 3)]
    # Those left out are not forgotten.
    again = study(model, work)
    assert len(evaluated) == 1
    assert figures(again) == figures(found)


@pytest.mark.parametrize("change", [{"text": OTHER}, {"length": 16}, {"limit": 2}], ids=str)
def test_other_windows_are_measured_again_on_the_same_models(model, work, found, evaluated, change):
    models = folders(work)
    other = study(model, work, **change)
    assert len(evaluated) == len(other.rows)
    assert all(row.reused == () for row in other.rows)
    assert folders(work) == models
    assert all(a.evaluation != b.evaluation for a, b in zip(other.rows, found.rows, strict=True))
    assert other.differences()


def test_other_samples_make_other_models_of_calibrated_methods_only(model, work, found):
    models = set(folders(work))
    other = study(model, work, seed=1)
    assert {name.rpartition("-")[0] for name in set(folders(work)) - models} == {"awq+gptq-w4-g32"}
    assert [bool(row.reused) for row in other.rows] == [True, True, True, False]


def test_other_weights_of_the_same_shapes_are_another_model(model, work, found, tmp_path):
    """A model trained further has the same config; nothing of the earlier one may be taken for its."""
    further = checkpoint(tmp_path / "llama")
    weights = load_file(further / "model.safetensors")
    save_file({k: v * 1.5 for k, v in weights.items()}, further / "model.safetensors", {"format": "pt"})
    there = study(further, work)
    alone = study(further, tmp_path / "alone")
    assert [r.evaluation for r in there.rows] == [r.evaluation for r in alone.rows]
    assert all(row.reused == () for row in there.rows)
    assert there.rows[0].evaluation.perplexity != found.rows[0].evaluation.perplexity


@pytest.mark.parametrize("when", range(0, 30, 7))
def test_an_interrupted_run_loses_nothing_that_was_finished(model, found, evaluated, tmp_path, when):
    steps = []

    def stop(what, done, total):
        steps.append(what)
        if len(steps) > when:
            raise StopHereError

    with pytest.raises(StopHereError):
        study(model, tmp_path / "work", progress=stop)
    finished = len(list((tmp_path / "work/measured").glob("*.json")))
    begun = len(evaluated)
    assert begun - finished in (0, 1)
    made = {
        name: (p / "fewbits.json").stat().st_mtime_ns for name, p in folders(tmp_path / "work").items()
    }
    again = study(model, tmp_path / "work")
    assert len(evaluated) - begun == len(found.rows) - finished
    assert [bool(row.reused) for row in again.rows] == [i < finished for i in range(4)]
    assert [r.evaluation for r in again.rows] == [r.evaluation for r in found.rows]
    for name, time in made.items():
        assert (tmp_path / "work" / name / "fewbits.json").stat().st_mtime_ns == time


def test_an_interrupted_second_run_keeps_the_rows_that_it_had_not_reached(model, evaluated, tmp_path):
    study(model, tmp_path / "work")
    begun = len(evaluated)

    def stop(what, done, total):
        if what.startswith("rtn-w3"):
            raise StopHereError

    with pytest.raises(StopHereError):
        study(model, tmp_path / "work", ["rtn=w3-g32"], progress=stop)
    again = study(model, tmp_path / "work")
    assert len(evaluated) == begun
    assert all(row.reused for row in again.rows)


def test_a_results_file_that_is_broken_is_written_anew(model, work, found):
    (work / "compare.json").write_text("{")
    assert figures(study(model, work)) == figures(found)
    assert figures(read_comparison(work / "compare.json")) == figures(found)


def test_a_measurement_that_is_broken_is_refused_by_its_name(model, tmp_path):
    study(model, tmp_path / "work", ["int8"])
    broken = next((tmp_path / "work/measured").glob("evaluation-*.json"))
    broken.write_text(broken.read_text()[:100])
    with pytest.raises(InputError, match=broken.name):
        study(model, tmp_path / "work", ["int8"])


# -- the model's own text ----------------------------------------------------------------------------


def test_own_text_to_judge_on_is_not_the_own_text_to_calibrate_on(model, tmp_path):
    found = study(
        model, tmp_path / "work", ["gptq=w4-g32"], text="self", calibration="self", samples=8, limit=8,
        length=32,
    )  # fmt: skip
    assert (found.text["name"], found.calibration["source"]) == ("self", "self")
    assert found.text["sha256"] != found.calibration["sha256"]
    assert found.rows[0].evaluation.windows == 8
    assert found.rows[1].evaluation.kl.value > 0
    judged = module._Judged.of(model, "self", 32, 8, 0, None).text.ids
    calibrated = module.read_calibration_of(model, "self", 8, 32, 0, None).ids
    assert judged.shape == calibrated.shape
    rows = {tuple(row) for row in judged.tolist()}
    assert not rows & {tuple(row) for row in calibrated.tolist()}


def test_the_largest_seed_has_another_one_for_text_to_judge_on(model, tmp_path):
    own = {"text": "self", "calibration": "self", "samples": 2, "sample_length": 8, "limit": 2}
    found = study(model, tmp_path / "work", ["gptq=w4-g32"], **own, length=8, seed=2**63 - 1)
    assert found.text["sha256"] != found.calibration["sha256"]


def test_the_budget_is_that_of_every_run_of_quantize(model, tmp_path):
    most = 10**10
    study(model, tmp_path / "work", ["int8", "gptq=w4-g32"], text=None, max_memory=most)
    runs = [json.loads(path.read_text()) for path in (tmp_path / "work").glob("*/run.json")]
    assert [run["max_memory"] for run in runs] == [most, most]
    # what is there already takes no memory to make
    again = study(model, tmp_path / "work", ["int8", "gptq=w4-g32"], text=None, max_memory=10**6)
    assert [row.name for row in again.rows] == [FLOAT, "int8", "gptq-w4-g32"]
    with pytest.raises(InputError, match="--max-memory"):
        study(model, tmp_path / "work", ["int8", "rtn=w4-g32"], text=None, max_memory=10**6)


def test_q4_k_is_a_name_and_its_scheme_is_its_own(tmp_path):
    (candidate,) = Candidate.all(["q4_k"], [3], "none")
    assert (candidate.name, candidate.scheme.label) == ("q4_k", "w4-g32-asym-k")
    folder = checkpoint(tmp_path / "llama", hidden_size=256, intermediate_size=256, head_dim=64)
    found = study(folder, tmp_path / "work", ["q4_k"])
    assert [row.name for row in found.rows] == [FLOAT, "q4_k"]
    assert 0 < found.rows[1].evaluation.kl.value < float("inf")


def test_no_text_measures_no_quality(model, tmp_path):
    found = study(model, tmp_path / "work", ["int8"], text=None)
    assert found.text is None
    assert all(row.evaluation is None and row.block_errors == () for row in found.rows)
    assert found.differences() == []


# -- sizes, and statistics ---------------------------------------------------------------------------

SIZES = ["best=8bpw", "gptq=6bpw", "gptq=w4-g32"]


@pytest.fixture(scope="module")
def measured(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured") / "stats"
    fewbits.measure(model, folder, calibration=TEXT, samples=6, length=32)
    return folder


@pytest.fixture(scope="module")
def front(model, measured, tmp_path_factory):
    work = tmp_path_factory.mktemp("front") / "work"
    return study(model, work, SIZES, calibration=None, statistics=measured, format="fewbits")


def test_rows_of_a_size_are_no_larger_and_their_schemes_were_chosen(front):
    best, small, plain = front.rows[1:]
    assert [row.name for row in front.rows[1:]] == ["best-8bpw", "gptq-6bpw", "gptq-w4-g32"]
    assert 6 < best.bits_per_weight <= 8
    assert 4 < small.bits_per_weight <= 6
    assert best.ledger["request"]["budget"]["bits_per_weight"] == 8
    assert (best.method, small.method) == ("awq+gptq+learned", "gptq")
    assert plain.ledger["request"].get("budget") is None
    assert 0 < best.evaluation.kl.value < small.evaluation.kl.value


def test_rows_from_statistics_are_what_quantize_makes_of_them(model, measured, front, tmp_path):
    for row in front.rows[2:]:
        size = {"bits_per_weight": 6.0} if row.name.endswith("bpw") else {"scheme": W4_G32}
        again = fewbits.quantize(
            model, tmp_path / row.name, method="gptq", statistics=measured, format="fewbits", **size
        )
        assert hash_file(again.out / "fewbits.json") == row.ledger["sha256"]
        assert front.calibration == row.ledger["calibration"]


def test_without_statistics_a_size_is_measured_once_in_the_work_folder(model, tmp_path, monkeypatch):
    calls = []

    def counting(*arguments, **options):
        calls.append(arguments)
        return fewbits.measure(*arguments, **options)

    monkeypatch.setattr(module, "measure", counting)
    first = study(model, tmp_path / "work", ["gptq=8bpw", "gptq=6bpw", "gptq=w4-g32"])
    again = study(model, tmp_path / "work", ["gptq=8bpw", "gptq=6bpw", "gptq=w4-g32"])
    assert len(calls) == 1
    assert len(list((tmp_path / "work").glob("statistics-*"))) == 1
    assert figures(again) == figures(first)
    assert "statistics" not in first.rows[3].ledger["request"]


def test_statistics_of_another_model_are_refused_before_the_work(measured, tmp_path):
    other = checkpoint(tmp_path / "other", intermediate_size=160)
    with pytest.raises(InputError, match="measured"):
        study(other, tmp_path / "work", SIZES, calibration=None, statistics=measured)
    assert not (tmp_path / "work").exists()


# -- what is refused before any work -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        (["gqtp"], "gqtp"),
        (["int8", "int8"], "twice"),
        (["rtn", "rtn=w4-g128"], "twice"),
        (["rtn=w5-g32"], "5"),
        (["gptq=3,7bpw"], "size '3,7bpw'; accepted are bits per weight, like 3.7bpw"),
        (["gptq=-1bpw"], "-1"),
        (["gptq=nanbpw"], "nan"),
        (["best=4bpw", "best=4.0bpw"], "best-4bpw is there twice"),
        (["best+gptq=4bpw"], "best.gptq"),
        (["nothing=w4-g32"], "nothing"),
        ([], "nothing to compare"),
    ],
)
def test_candidates_that_are_none_are_refused(methods, words):
    with pytest.raises(InputError, match=words):
        Candidate.all(methods)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"methods": ["rtn=w4-g64", "int8"]}, "w4-g64|64"),
        ({"text": "no/such/text.txt"}, "no/such/text.txt"),
        ({"text": Text("empty", [""])}, "empty"),
        ({"limit": 0}, "limit"),
        ({"limit": -1}, "limit"),
        ({"length": 0}, "length"),
        ({"length": 1}, "length"),
        ({"length": 2}, "length"),
        ({"calibration": "no/such/text.txt"}, "no/such/text.txt"),
        ({"calibration": Text("short", ["abc"])}, "short"),
        ({"samples": 0}, "samples"),
        ({"sample_length": 65}, "65"),
        ({"length": 65}, "65 tokens; accepted are at most the model's context, 64"),
        ({"text": "self", "length": 65}, "65 tokens"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63, "text": None, "methods": ["int8"]}, "seed is 9"),
        ({"max_memory": 10**6}, "--max-memory is 0.00 GB"),
        ({"tasks": ("arc_challenge",), "task_data": "MISSING"}, "MISSING"),
        ({"tasks": ("arc_challenge",), "task_data": "EMPTY"}, "ARC-Challenge"),
        ({"tasks": ("arc_challenge",), "task_data": "TASKS", "task_limit": 0}, "limit"),
        ({"tasks": ("arc_challenge",), "task_data": "TASKS", "shots": 5}, "worked examples"),
        ({"tasks": ("arc_challenge",), "task_data": "TASKS", "shots": -1}, "shots"),
        ({"tasks": ("no_such_task",), "task_data": "TASKS"}, "no_such_task"),
        ({"methods": ["gptq=0.5bpw"]}, "smallest|least|at least"),
        ({"methods": ["llm-int8=5bpw"]}, "llm-int8"),
        ({"statistics": "no/such/folder", "calibration": None}, "no/such/folder"),
        ({"statistics": "no/such/folder"}, "both given"),
        ({"format": "onnx"}, "onnx"),
    ],
    ids=str,
)
def test_what_can_be_known_is_refused_before_anything_is_written(model, tmp_path, options, words):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "TASKS").mkdir()
    choices = [{"text": word, "label": label} for word, label in (("a", "A"), ("b", "B"), ("c", "C"))]
    question = {"question": {"stem": "which", "choices": choices}, "answerKey": "A"}
    (tmp_path / "TASKS/ARC-Challenge-Test.jsonl").write_text(json.dumps(question))
    if "task_data" in options:
        options = options | {"task_data": tmp_path / options["task_data"]}
    with pytest.raises(InputError, match=words):
        study(model, tmp_path / "work", **options)
    assert not (tmp_path / "work").exists()


def test_a_work_folder_that_is_a_file_is_refused_and_left_alone(model, tmp_path):
    (tmp_path / "work").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        study(model, tmp_path / "work")
    assert (tmp_path / "work").read_text() == "mine"


def test_a_model_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError):
        study(tmp_path / "nothing", tmp_path / "work")
    assert not (tmp_path / "work").exists()


# -- speed -------------------------------------------------------------------------------------------


def test_speeds_are_of_each_model_against_the_float_one_in_bfloat16(model, tmp_path, monkeypatch):
    seen = []

    def resident(folder, dtype):
        seen.append((folder.name, dtype))
        return len(seen)

    monkeypatch.setattr(module, "measure_resident", resident)  # a process each; see test_speed.py
    found = study(model, tmp_path / "work", ["int8", "rtn=w4-g32"], speed=True)
    assert found.rows[0].prefill_ratio.value == found.rows[0].decode_ratio.value == 1
    assert [row.resident_bytes for row in found.rows] == [1, 2, 3]
    assert [name for name, _ in seen] == ["llama", *sorted(folders(tmp_path / "work"))]
    assert {dtype for _, dtype in seen} == {torch.bfloat16}
    for row in found.rows:
        assert min(row.speed.prefill, row.speed.decode) > 0
        assert min(row.prefill_ratio.value, row.decode_ratio.value) > 0
    assert found.rows[1].speed.kernels != found.rows[0].speed.kernels
    assert read_comparison(tmp_path / "work/compare.json") == found


# -- errors behind each block ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference():
    return tiny_model("llama", num_hidden_layers=3).float()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, VOCABULARY, (5, 24), generator=torch.Generator().manual_seed(0))


def rounded(model_type="llama", **changes):
    network = tiny_model(model_type, **changes).float()
    fewbits.quantize_(network, QuantScheme(4, "group", 32))
    return network


@torch.no_grad()
def states(network, ids):
    """Behind each block, by transformers; the last without the norm that it puts on it."""
    norm, network.model.norm = network.model.norm, nn.Identity()
    hidden = network(ids, output_hidden_states=True, use_cache=False).hidden_states
    network.model.norm = norm
    return [state.double() for state in hidden[1:]]


def test_block_errors_are_those_of_the_hidden_states(reference, ids):
    network = rounded(num_hidden_layers=3)
    pairs = zip(states(network, ids), states(reference, ids), strict=True)
    expected = [float((a - b).square().sum() / b.square().sum()) for a, b in pairs]
    found = block_errors(network, reference, ids)
    assert len(found) == 3
    # Other batches, sums in float32: a state is a sum of 3 x 2 products of up to 96 terms, 2^-24 each.
    assert found == pytest.approx(expected, rel=1e-4)
    assert 0 < found[0] < found[-1]


def test_a_model_has_no_block_errors_against_itself_or_its_twin(reference, ids):
    assert block_errors(reference, reference, ids) == [0, 0, 0]
    assert block_errors(tiny_model("llama", num_hidden_layers=3).float(), reference, ids) == [0, 0, 0]


def test_scales_folded_into_a_norm_do_not_show(reference, ids):
    folded = tiny_model("llama", num_hidden_layers=3).float()
    for block in folded.model.layers:
        scale = 2 ** torch.linspace(-3, 3, 64)
        block.input_layernorm.weight.data *= scale
        for linear in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
            linear.weight.data /= scale
    found = block_errors(folded, reference, ids)
    # Rounding in float32 alone: relative errors of 96 terms x 2^-24 in each of some ten layers, squared.
    assert all(0 < error < (10 * 96 * 2**-24) ** 2 for error in found)


def test_awq_in_8_bits_shows_rounding_and_not_its_folds(model, tmp_path):
    found = study(model, tmp_path / "work", ["rtn=w8-g32", "awq=w8-g32"], inspect=False)
    plain, folded = found.rows[1:]
    folds = [note for note in folded.notes if "fold" in note.lower()]
    # 8 bits err by at most half of 1/127 of the largest weight; a fold of 1.1 that showed is 0.01.
    assert all(error < 1e-3 for error in (*plain.block_errors, *folded.block_errors)), folds


def test_blocks_that_are_no_llamas_are_found(ids):
    other = tiny_model("gpt2").float()
    assert block_errors(other, other, ids) == [0, 0]
    assert all(error > 0 for error in block_errors(rounded("gpt2"), other, ids))


def test_the_tokenizer_is_the_models_own(model):
    assert len(load_tokenizer(model)) == VOCABULARY
    assert load(model).config.vocab_size == VOCABULARY


# -- tasks ---------------------------------------------------------------------------------------------


@pytest.fixture
def questions(tmp_path):
    """Twelve questions in HellaSwag's text layout."""
    folder = tmp_path / "data"
    folder.mkdir()
    parts = (
        f"do: it {i}\n{i % 4}\n" + "".join(f"{letter * 3} {i}\n" for letter in "abcd") for i in range(12)
    )
    (folder / "hellaswag_valid.txt").write_text("".join(parts))
    return folder


def test_tasks_are_scored_once_and_compared_question_by_question(
    model, tmp_path, questions, monkeypatch
):
    options = {"tasks": ("hellaswag",), "task_data": questions, "text": None, "inspect": False}
    found = study(model, tmp_path / "work", ["rtn=w3-g32"], **options)
    source, row = found.rows
    assert [each.task for each in row.tasks] == ["hellaswag"]
    assert len(row.tasks[0].correct) == 12
    assert row.tasks[0].sha256 == source.tasks[0].sha256
    assert any("written" in note for note in row.notes)  # what the layout changes is said
    (difference,) = found.differences() or (None,)
    assert difference is None  # one quantized row: no two to tell apart

    monkeypatch.setattr(module, "evaluate_tasks", None)
    again = study(model, tmp_path / "work", ["rtn=w3-g32"], **options)
    assert again.rows[1].tasks == row.tasks
    assert again.rows[1].reused == ("tasks",)


def test_other_questions_are_scored_again(model, tmp_path, questions):
    options = {"tasks": ("hellaswag",), "task_data": questions, "text": None, "inspect": False}
    first = study(model, tmp_path / "work", ["rtn=w3-g32"], **options)
    file = questions / "hellaswag_valid.txt"
    file.write_text(file.read_text().replace("do: it 3", "do: it again"))
    second = study(model, tmp_path / "work", ["rtn=w3-g32"], **options)
    assert second.rows[1].reused == ()
    assert second.rows[1].tasks[0].sha256 != first.rows[1].tasks[0].sha256


def test_a_result_stays_until_the_next_one_is_whole(model, tmp_path):
    work = tmp_path / "work"
    study(model, work, ["int8", "rtn=w4-g32"])
    before = (work / "compare.json").read_bytes()

    def stop(what, done, total):
        if what.startswith("rtn-w3"):
            raise StopHereError

    with pytest.raises(StopHereError):
        study(model, work, ["int8", "rtn=w3-g32"], progress=stop)
    assert (work / "compare.json").read_bytes() == before


@pytest.mark.parametrize("names", [[], ["a", "a"], [FLOAT], ["../a"]])
def test_candidates_of_ones_own_need_names_that_rows_and_folders_can_have(model, tmp_path, names):
    candidates = [Candidate(name, "rtn", QuantScheme(4, "group", 32)) for name in names]
    with pytest.raises(InputError, match="candidate"):
        compare(model, tmp_path / "work", candidates=candidates, **OPTIONS)
    assert not (tmp_path / "work").exists()


def test_llm_int8_with_columns_found_in_each_call_needs_no_calibration():
    (candidate,) = Candidate.all(["llm-int8=w8-channel-a8-token-t6"])
    assert not candidate.recipe.needs_calibration
    (candidate,) = Candidate.all(["llm-int8"])
    assert candidate.recipe.needs_calibration


def test_one_window_tells_nobody_apart_and_says_nothing_of_it(model, tmp_path):
    found = study(model, tmp_path / "work", ["int8", "rtn=w4-g32"], limit=1)
    assert found.rows[0].evaluation.windows == 1
    assert found.within_noise_of("int8") == []
