"""Outliers among the inputs: found where they were planted, and the numbers those of the definition."""

import json
import math
import sys
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits import InputError, load, outliers, stream
from fewbits.linear import float_weight, split_experts
from fewbits.outliers import inspect_outliers
from fewbits.report.heatmap import write_heatmap
from fewbits.structure import find_blocks
from models import VOCABULARY, tiny_checkpoint
from test_cli import refused, run

REFERENCE = Path(__file__).parent.parent / "reference/model"
IDS = torch.randint(3, VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(1))
MODELS = ("llama", "gpt2", "phi", "phi3", "mixtral", "deepseek_v3")
LOW = 3.0  # random models have some columns above it


@pytest.fixture(autouse=True, scope="module")
def float32_products():
    """Bfloat16 would hide what is compared; and one thread, for these models are too small for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "fast_dtype", lambda *_: None)
        patch.setattr(outliers, "_JUDGED_EXPERT", 10_000)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")

    def make(model_type):
        path = folder / model_type
        return path if path.exists() else tiny_checkpoint(path, model_type)

    return make


@pytest.fixture(scope="module")
def found(tiny):
    made = {}

    def make(model_type):
        if model_type not in made:
            made[model_type] = inspect_outliers(tiny(model_type), calibration=IDS, threshold=LOW)
        return made[model_type]

    return make


@contextmanager
def rounding_states(model, path):
    """Hidden states are bfloat16 in front of each block, as they are in a stream."""

    def enter(_module, args, kwargs):
        if args:
            return (args[0].bfloat16().float(), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"].bfloat16().float()}

    blocks = model.get_submodule(path)
    handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    yield
    for handle in handles:
        handle.remove()


@torch.no_grad()
def inputs_of_whole_model(folder):
    """(block, path in it) -> inputs (tokens, in) and weight (out, in) of what has a 2-D weight there."""
    model = load(folder, dtype=torch.float32)
    split_experts(model)
    path = find_blocks(model)
    seen, weights = defaultdict(list), {}

    def watch(key):
        return lambda _module, args: seen[key].append(args[0].reshape(-1, args[0].shape[-1]).clone())

    for number, block in enumerate(model.get_submodule(path)):
        for name, module in block.named_modules():
            if getattr(module, "weight", None) is not None and module.weight.ndim == 2:
                weights[number, name] = float_weight(module).clone()
                module.register_forward_pre_hook(watch((number, name)))
    with rounding_states(model, path):
        model(IDS, use_cache=False)
    return {key: (torch.cat(x), weights[key]) for key, x in seen.items()}


def paths_of(report):
    """The linears of a report, from its short name."""
    paths = []
    for part in report.name.split(" + "):
        parent, _, leaf = part.rpartition(".")
        *firsts, last = leaf.split("/")
        end = f"_{last.rpartition('_')[2]}" if firsts and "_" not in firsts[0] else ""
        paths += [f"{parent}.{name}".strip(".") for name in (*(f + end for f in firsts), last)]
    return paths if report.expert is None else [f"{path}.{report.expert}" for path in paths]


@pytest.mark.parametrize("model_type", MODELS)
def test_statistics_are_those_of_hooks_on_the_whole_model(tiny, found, model_type):
    inputs = inputs_of_whole_model(tiny(model_type))
    assert found(model_type).inputs
    for report in found(model_type).inputs:
        for path in paths_of(report):
            x, _ = inputs[report.block, path]
            size = x.abs()
            assert report.features == x.shape[1]
            assert report.tokens == len(x)
            assert report.columns == tuple((size.amax(0) > LOW).nonzero()[:, 0].tolist())
            assert report.outlier_tokens == int((size.amax(1) > LOW).sum())
            assert report.largest == pytest.approx(float(size.max()), rel=1e-4)
            assert report.median == pytest.approx(float(size.amax(0).median()), rel=1e-4)


def rounded(weight):
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16().double().clamp(min=1e-30)
    return (weight.double() / scale).round().clamp(-128, 127) * scale


def rounded_tokens(x):
    scale = (x.double().abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
    return (x.double() / scale).round() * scale


@pytest.mark.parametrize("model_type", MODELS)
def test_errors_are_those_of_the_definition_in_float64(tiny, found, model_type):
    inputs = inputs_of_whole_model(tiny(model_type))
    some = False
    for report in found(model_type).inputs:
        keep = torch.zeros(report.features, dtype=torch.bool)
        keep[list(report.columns)] = True
        wanted = plain = kept = 0.0
        for path in paths_of(report):
            x, weight = inputs[report.block, path]
            y = x.double() @ weight.double().t()
            in_8_bits = rounded_tokens(x) @ rounded(weight).t()
            mixed = rounded_tokens(x * ~keep) @ rounded(weight * ~keep).t()
            mixed += x[:, keep].double() @ weight[:, keep].double().t()
            wanted += float(y.square().sum()) / len(x)
            plain += float((in_8_bits - y).square().sum()) / len(x)
            kept += float((mixed - y).square().sum()) / len(x)
        assert sum(m.output for m in report.matrices) == pytest.approx(wanted, rel=1e-4)
        assert sum(m.plain for m in report.matrices) == pytest.approx(plain, rel=1e-3)
        assert sum(m.kept for m in report.matrices) == pytest.approx(kept, rel=1e-3)
        some = some or plain > 1.2 * kept
    assert some


# -- planted -----------------------------------------------------------------------------------------

PLANTED, FACTOR, THRESHOLD = 17, 50, 12.0
READERS = ("q_proj", "k_proj", "v_proj")


@pytest.fixture(scope="module")
def planted(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted") / "llama"
    tiny_checkpoint(folder, "llama")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.input_layernorm.weight"][PLANTED] *= FACTOR
    for reader in READERS:
        tensors[f"model.layers.1.self_attn.{reader}.weight"][:, PLANTED] /= FACTOR
    save_file(tensors, path, metadata={"format": "pt"})
    return inspect_outliers(folder, calibration=IDS, threshold=THRESHOLD)


def test_a_planted_column_is_found_in_the_matrices_that_read_it_and_in_no_others(planted):
    (report,) = [report for report in planted.inputs if report.columns]
    assert (report.block, report.name) == (1, "self_attn.q/k/v_proj")
    assert report.columns == (PLANTED,)
    assert report.largest > THRESHOLD > 3 * report.median
    assert [m.name for m in report.matrices] == [
        f"model.layers.1.self_attn.{reader}.weight" for reader in READERS
    ]
    assert all(matrix.ratio > 10 for matrix in report.matrices)
    others = [report for report in planted.inputs if not report.columns]
    assert len(others) == 7
    assert {m.ratio for other in others for m in other.matrices} == {1.0}
    assert {other.outlier_tokens for other in others} == {0}


def test_it_is_not_there_before(tiny):
    before = inspect_outliers(tiny("llama"), calibration=IDS, threshold=THRESHOLD)
    assert not any(report.columns for report in before.inputs)


def test_a_row_of_experts_has_sums_and_the_largest(found):
    inspection = found("mixtral")
    (row,) = [r for r in inspection.rows() if (r.block, r.name) == (1, "mlp.experts.down_proj")]
    experts = [r for r in inspection.inputs if (r.block, r.name) == (1, "mlp.experts.down_proj")]
    assert [report.expert for report in experts] == [0, 1, 2, 3]
    assert row.experts == 4
    assert row.outliers == sum(len(report.columns) for report in experts) > 0
    assert row.largest == max(report.largest for report in experts)
    tokens = sum(report.tokens for report in experts)
    assert tokens == 2 * IDS.numel()  # each is sent to two
    assert row.token_share == sum(report.outlier_tokens for report in experts) / tokens
    plain, kept = (
        sum(r.tokens * getattr(m, what) for r in experts for m in r.matrices)
        for what in ("plain", "kept")
    )
    assert row.ratio == pytest.approx(plain / kept)


@pytest.mark.parametrize("model_type", MODELS)
def test_every_matrix_of_a_block_is_looked_at_once(tiny, found, model_type):
    names = [m.name for report in found(model_type).inputs for m in report.matrices]
    assert len(names) == len(set(names))
    tensors = load_file(tiny(model_type) / "model.safetensors")
    linears = ("proj", "c_attn", "c_fc", "dense", "fc1", "fc2", "w1", "w2", "w3", "proj_with_mqa", "qkv")
    matrices = {n for n in tensors if n.removesuffix(".weight").rpartition(".")[2].endswith(linears)}
    matrices = {n for n in matrices if n.endswith("weight") and tensors[n].ndim == 2}
    assert set(names) == matrices


def test_an_expert_without_tokens_is_said_to_have_none(tiny):
    inspection = inspect_outliers(tiny("mixtral"), calibration=IDS[:1, :2], threshold=LOW)
    idle = [r for r in inspection.inputs if r.expert is not None and r.tokens == 0]
    for report in idle:
        assert report.columns == ()
        assert {matrix.ratio for matrix in report.matrices} == {None}
    assert idle
    alone = replace(inspection, inputs=tuple(idle[:1]))
    (row,) = alone.rows()
    assert row.token_share is None is row.ratio


def test_tokens_are_drawn_evenly_whatever_comes_in_one_call():
    x = torch.arange(10_000.0)[:, None]
    seen = outliers._Watcher(1, 6.0, 500)
    for part in torch.split(x, [1, 700, 99, 9000, 200]):
        seen.add(part)
    assert seen.tokens == 10_000
    assert seen.outlier_tokens == 9993
    assert len(seen.kept.unique()) == 500
    # Standard error of the mean of 500 of them: 10000 / sqrt(12 * 500) = 129.
    assert abs(float(seen.kept.mean()) - 5000) < 4 * 129


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.nan, math.inf])
def test_thresholds_that_say_nothing_are_refused(tiny, threshold):
    with pytest.raises(InputError, match="threshold is"):
        inspect_outliers(tiny("llama"), calibration=IDS, threshold=threshold)


def test_inputs_that_are_not_finite_are_refused_by_name(tiny, tmp_path):
    folder = tiny_checkpoint(tmp_path / "llama", "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.post_attention_layernorm.weight"][3] = math.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.gate_proj\.weight: its inputs hold"):
        inspect_outliers(folder, calibration=IDS)


# -- the command -------------------------------------------------------------------------------------

QUICK = ("inspect", REFERENCE, "--samples", "2", "--seq-len", "32")


def test_the_command_prints_a_line_for_each_input_and_json_says_the_same():
    result = run(*QUICK, "--json")
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)
    assert value["calibration"]["source"] == "self"
    assert value["calibration"]["tokens"] == 64
    assert len(value["inputs"]) == 6 * 4
    printed = run(*QUICK)
    assert printed.exit_code == 0, printed.output
    lines = [line.split() for line in printed.stdout.splitlines()]
    assert lines[0][:3] == ["block", "read", "by"]
    for line, report in zip(lines[1:25], value["inputs"], strict=True):
        expected = [report["block"], report["name"], report["features"], len(report["columns"])]
        assert line[:4] == list(map(str, expected))
        assert line[4:6] == [f"{report['largest']:.3g}", f"{report['median']:.3g}"]
    assert "calibration: self, 2 samples of 32 tokens" in printed.stdout


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_the_picture_shows_the_numbers_and_nothing_of_this_machine(tmp_path, kind):
    pytest.importorskip("matplotlib")
    paths = [tmp_path / f"{name}.{kind}" for name in ("one", "two")]
    for path in paths:
        result = run(*QUICK, "--threshold", "5", "--plot", path)
        assert result.exit_code == 0, result.output
    content = paths[0].read_bytes()
    assert content == paths[1].read_bytes()  # no time in it
    assert str(tmp_path).encode() not in content
    assert str(REFERENCE.parent).encode() not in content
    if kind == "png":
        assert content.startswith(b"\x89PNG")
        return
    value = json.loads(run(*QUICK, "--threshold", "5", "--json").stdout)
    for report in value["inputs"]:
        assert f">{len(report['columns'])}<" in content.decode()
    for words in ("q/k/v_proj", "down_proj", "block", "largest |x|", "error ratio", "calibration: self"):
        assert words in content.decode()


def test_pictures_of_mixtures_and_of_blocks_that_differ(found, tmp_path):
    pytest.importorskip("matplotlib")
    write_heatmap(found("deepseek_v3"), "some", tmp_path / "some.svg")
    content = (tmp_path / "some.svg").read_text()
    assert "of 4 experts" in content
    assert "shared_experts" in content


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--threshold", "0"], ["threshold is 0", "above 0"]),
        (["--threshold", "-6"], ["threshold is -6"]),
        (["--threshold", "nan"], ["threshold is nan"]),
        (["--plot", "OUT/picture.pdf"], ["picture.pdf", ".svg or .png"]),
        (["--plot", "OUT/nowhere/picture.svg"], ["nowhere", "a folder that exists"]),
        (["--samples", "0"], ["samples"]),
        (["--seq-len", "513"], ["513", "context, 512"]),
        (["--calibration", "nowhere.txt"], ["nowhere.txt"]),
    ],
)
def test_bad_arguments_are_one_line_and_write_nothing(tmp_path, options, words):
    pytest.importorskip("matplotlib")
    options = [option.replace("OUT", str(tmp_path)) for option in options]
    plot = [] if "--plot" in options else ["--plot", tmp_path / "picture.svg"]
    assert refused(run(*QUICK, *plot, *options), *words)
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_it_says_how_to_install_it(tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    result = run(*QUICK, "--plot", tmp_path / "picture.svg")
    assert refused(result, "matplotlib", "pip install 'fewbits[report]'")
    assert list(tmp_path.iterdir()) == []
    assert run(*QUICK).exit_code == 0  # only pictures need it


def test_quantized_checkpoints_are_refused(tmp_path):
    out = tmp_path / "int8"
    assert run("quantize", REFERENCE, out, "--method", "int8").exit_code == 0
    assert refused(run("inspect", out), "quantized already")
