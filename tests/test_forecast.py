"""Forecasts of size, cache and cost against what is written, what a model keeps, and what is counted."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from fewbits import RTN, InputError, QuantScheme, Recipe, quantize
from fewbits import cost as machine
from fewbits.budget import LIBRARIES_BYTES, plan_memory
from fewbits.checkpoint import open_checkpoint, open_headers
from fewbits.cost import count_work, estimate_cost
from fewbits.forecast import Choice, choices, fit, fitting_group, forecast, group_tensors, observe
from fewbits.formats import FORMATS
from fewbits.methods import LLMInt8
from fewbits.outlook import look_ahead
from fewbits.plan import make_plan, survey
from fewbits.recipe import parse_method
from fewbits.scheme import InputScheme
from fewbits.structure import cache_of, skeleton, text_config
from fewbits.tensor import Note
from models import TINY, tiny_checkpoint, tiny_model

G32, PACKED = QuantScheme(4, "group", 32), FORMATS["compressed-tensors"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a model type, made once."""
    made: dict[str, Path] = {}

    def get(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = tiny_checkpoint(tmp_path_factory.mktemp(model_type), model_type)
        return made[model_type]

    return get


def forecast_of(folder: Path, scheme: QuantScheme, head: bool = False, **more):
    seen = survey(open_headers(folder))
    plan = make_plan(seen, Recipe(RTN(), scheme, head=head))
    return forecast(plan, seen, scheme, [Choice("rtn", scheme)], name="tiny", **more)


# -- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [False, True], ids=["", "head"])
@pytest.mark.parametrize("label", ["w4-g32", "w3-g32-asym", "w8-channel"])
@pytest.mark.parametrize(
    "model_type", ["llama", "qwen3", "gpt2", "mixtral", "gpt_oss", "deepseek_v3", "phi3"]
)
def test_files_are_predicted_within_a_percent_and_their_tensors_exactly(
    tmp_path, checkpoint, model_type, label, head
):
    folder, scheme = checkpoint(model_type), QuantScheme.parse(label)
    row = forecast_of(folder, scheme, head).rows[1]
    result = quantize(folder, tmp_path / "out", scheme=scheme, head=head)
    assert row.weight_bytes == pytest.approx(result.weight_bytes, rel=0.01)
    assert row.bits_per_weight == pytest.approx(result.bits_per_weight, rel=0.01)
    assert sum(row.components.values()) == result.ledger.totals["written_bytes"]


@pytest.mark.parametrize(
    ("layout", "label", "model_type"),
    [
        *(
            ("gguf", label, m)
            for label in ("w4-g32", "w4-g32-asym", "w8-g32")
            for m in ("llama", "gpt2")
        ),
        *(("gguf", "w4-g32", m) for m in ("llama", "mixtral")),
        *((layout, "w4-g32", m) for layout in ("gptq", "awq", "fewbits") for m in ("llama", "qwen3")),
    ],
)
def test_rows_are_those_of_the_format_that_is_asked_for(tmp_path, checkpoint, layout, label, model_type):
    folder, scheme = checkpoint(model_type), QuantScheme.parse(label)
    options = {"format": layout, "head": layout != "awq"}  # whose clients look for no codes there
    found = look_ahead(folder, method="rtn", scheme=scheme, measure=False, **options)
    row = found.forecast.rows[1]
    result = quantize(folder, tmp_path / "out", scheme=scheme, **options)
    written = result.ledger.totals["written_bytes"]
    assert sum(row.components.values()) == found.plan.written_bytes == written
    if layout == "gguf":
        assert row.weight_bytes == result.weight_bytes == (tmp_path / "out/model.gguf").stat().st_size
    else:
        assert row.weight_bytes == pytest.approx(result.weight_bytes, rel=0.01)


def test_the_vocabulary_of_a_gguf_file_is_counted(tmp_path):
    result = quantize("reference/model", tmp_path / "out", scheme=G32, format="gguf")
    found = look_ahead("reference/model", scheme=G32, format="gguf", measure=False)
    assert found.forecast.row("rtn w4-g32").weight_bytes == result.weight_bytes


def test_what_a_format_does_not_hold_is_a_refused_row(checkpoint):
    found = look_ahead(checkpoint("llama"), scheme=G32, format="gguf").forecast
    refused = {row.name for row in found.rows if row.refused is not None}
    assert refused == {row.name for row in found.rows if "w3" in row.name or "llm-int8" in row.name}
    assert all("--format gguf" in row.refused for row in found.rows if row.refused is not None)
    assert all((row.cost is None) == (row.name in {*refused, "float"}) for row in found.rows)
    assert not any("columns" in note.what for note in found.notes)  # none are kept in 16 bit


@pytest.mark.parametrize("model_type", sorted(TINY))
def test_components_of_the_float_model_add_up_to_its_tensors(checkpoint, model_type):
    found = forecast_of(checkpoint(model_type), G32)
    stored = open_checkpoint(checkpoint(model_type)).tensors.values()
    assert sum(found.rows[0].components.values()) == sum(info.size_bytes for info in stored)
    assert all(size > 0 for name, size in found.rows[0].components.items() if name == "attention")


def test_components_are_those_that_a_llama_has(checkpoint):
    # Width 64, 4 heads and 2 of keys and values, each 32 wide; 96 inside of the MLP; 2 blocks; bfloat16.
    parts = forecast_of(checkpoint("llama"), G32).rows[0].components
    assert parts["attention"] == 2 * 2 * 64 * 32 * (4 + 2 + 2 + 4)
    assert parts["mlp"] == 2 * 2 * 3 * 64 * 96
    assert parts["embeddings"] == parts["head"] == 2 * 64 * 96
    assert parts["experts"] == 0
    assert parts["other"] == 2 * 64 * (2 * 2 + 1)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_experts_are_told_from_the_rest(checkpoint, model_type):
    parts = forecast_of(checkpoint(model_type), G32).rows[0].components
    inner = TINY[model_type].get("moe_intermediate_size", 96)
    assert parts["experts"] == pytest.approx(2 * 2 * 4 * 3 * 64 * inner, rel=0.02)  # and biases
    assert parts["mlp"] == 0


def test_a_scheme_that_does_not_fit_is_a_refused_row(tmp_path):
    tiny_checkpoint(tmp_path, hidden_size=80)
    seen = survey(open_headers(tmp_path))
    scheme = QuantScheme(8)
    plan = make_plan(seen, Recipe(RTN(), scheme))
    found = forecast(plan, seen, scheme, choices(32), name="tiny", memory_bytes=10**12)
    assert "groups of 32 do not divide the 80 columns of 10 weights" in found.rows[3].refused
    assert found.rows[3].fits is None
    assert found.rows[1].refused is None
    assert fitting_group(seen) is None


# -- the cache -----------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", sorted(TINY.keys() - {"bloom"}))
def test_the_cache_is_what_the_model_itself_keeps(model_type):
    model, length = tiny_model(model_type), 24
    kept = cache_of(model(torch.ones(1, length, dtype=torch.int64), use_cache=True))
    elements = sum(layer.keys.numel() + layer.values.numel() for layer in kept.layers)
    config = json.loads(model.config.to_json_string(use_diff=False))
    assert observe(skeleton(config), length).cache_elements == elements


def test_the_cache_is_in_proportion_to_the_batch(checkpoint):
    one, many = (forecast_of(checkpoint("llama"), G32, batch=n, context=32) for n in (1, 5))
    # Keys and values of 2 blocks, 2 heads, 32 features, 32 tokens, in bfloat16.
    assert one.kv_cache_bytes == 2 * 2 * 2 * 32 * 32 * 2
    assert many.kv_cache_bytes == 5 * one.kv_cache_bytes


def test_a_cache_that_is_not_known_is_said_to_be(checkpoint, monkeypatch):
    seen = survey(open_headers(checkpoint("llama")))
    monkeypatch.setattr(type(seen.model), "forward", lambda *_, **__: SimpleNamespace(logits=None))
    plan = make_plan(seen, Recipe(RTN(), G32))
    found = forecast(plan, seen, G32, [], name="tiny")
    assert found.kv_cache_bytes is None
    assert [note.where for note in found.notes] == ["KV cache"]


@pytest.mark.parametrize(
    ("wrong", "named"), [({"batch": 0}, "--batch is 0"), ({"context": 65}, "the model's own, 64")]
)
def test_batches_and_contexts_that_are_none_are_refused(checkpoint, wrong, named):
    with pytest.raises(InputError, match=named):
        forecast_of(checkpoint("llama"), G32, **wrong)


# -- what fits -----------------------------------------------------------------------------------


def test_the_best_row_is_the_first_that_fits(checkpoint):
    seen = survey(open_headers(checkpoint("llama")))
    plan = make_plan(seen, Recipe(RTN(), G32))
    found = forecast(plan, seen, G32, choices(32), name="tiny")
    assert found.best is None
    assert {row.fits for row in found.rows} == {None}
    needed = [row.needed_bytes for row in found.rows]
    assert needed == sorted(needed, reverse=True)
    for row in found.rows:
        rest = found.kv_cache_bytes + found.overhead_bytes
        assert row.needed_bytes == row.weight_bytes + rest
    for limit, best in (
        (needed[0], "float"),
        (needed[0] - 1, "int8 w8-channel"),
        (needed[-1] - 1, None),
    ):
        found.memory_bytes = limit
        fit(found)
        assert found.best == best


# -- headers alone -------------------------------------------------------------------------------


def cut(folder: Path, sparse: bool = False) -> None:
    """Leave the headers of all weight files; `sparse`: a hole behind them."""
    for path in folder.glob("*.safetensors"):
        size = path.stat().st_size
        with path.open("r+b") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
            file.truncate(header)
            if sparse:
                file.truncate(size)


@pytest.mark.parametrize("sparse", [False, True], ids=["cut", "sparse"])
def test_headers_alone_say_the_same_as_whole_files(tmp_path, sparse):
    tiny_checkpoint(tmp_path, max_shard_size="2MB", vocab_size=20_000)
    whole = look_ahead(tmp_path, scheme=G32, measure=False)
    cut(tmp_path, sparse)
    bare = look_ahead(tmp_path, scheme=G32, measure=False)
    assert bare.forecast == whole.forecast
    assert whole.notes == ()
    (note,) = bare.notes
    assert "headers only" in str(note)
    assert " and " in note.where  # more shards than one


def test_headers_alone_are_no_checkpoint_for_anything_else(tmp_path):
    tiny_checkpoint(tmp_path / "model")
    cut(tmp_path / "model")
    with pytest.raises(InputError, match="truncated"):
        quantize(tmp_path / "model", tmp_path / "out", scheme=G32)
    found = open_checkpoint(tmp_path / "model", headers_only=True)
    with pytest.raises(InputError, match="cannot be read"):
        found.read(next(iter(found.tensors)))


def test_a_header_that_overlaps_is_refused_even_alone(tmp_path):
    tiny_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    entry = header["model.norm.weight"]
    entry["data_offsets"] = [n + 2 for n in entry["data_offsets"]]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(InputError, match="do not fill"):
        open_checkpoint(tmp_path, headers_only=True)


class Hub:
    """Stands for the client of the hub: headers and config of a folder, and no weights."""

    folder: Path
    asked: tuple[str, ...] = ()

    def get_safetensors_metadata(self, repository):
        from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo

        names = {torch.bfloat16: "BF16", torch.float32: "F32"}
        tensors = {
            name: TensorInfo(names[t.dtype], list(t.shape), (0, t.nbytes))
            for name, t in load_file(Hub.folder / "model.safetensors").items()
        }
        file = SafetensorsFileMetadata({}, tensors)
        places = dict.fromkeys(tensors, "model.safetensors")
        return SafetensorsRepoMetadata(None, False, places, {"model.safetensors": file})

    @staticmethod
    def download(_repository, file):
        Hub.asked += (file,)
        return str(Hub.folder / file)


def test_of_a_hub_id_only_config_and_headers_are_fetched(tmp_path, monkeypatch):
    import huggingface_hub

    tiny_checkpoint(tmp_path)
    Hub.folder, Hub.asked = tmp_path, ()
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", Hub.download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("weights"))
    remote = look_ahead("somebody/tiny", scheme=G32, measure=False).forecast
    local = look_ahead(tmp_path, scheme=G32, measure=False).forecast
    assert Hub.asked == ("config.json",)
    assert remote.name == "somebody/tiny"
    assert remote.config_sha256 == local.config_sha256
    assert [row.components for row in remote.rows] == [row.components for row in local.rows]
    assert [row.weight_bytes for row in remote.rows[1:]] == [row.weight_bytes for row in local.rows[1:]]


def test_a_hub_that_does_not_answer_is_one_clear_line(monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise OSError("no network\nhere")

    for name in ("HfApi", "hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, fail)
    with pytest.raises(InputError, match=r"somebody/tiny: .*no network") as refused:
        open_headers("somebody/tiny")
    assert "\n" not in str(refused.value)


# -- models that are quantized already -----------------------------------------------------------


def test_a_quantized_model_is_told_as_it_is(tmp_path, checkpoint):
    result = quantize(checkpoint("llama"), tmp_path / "out", scheme=G32)
    found = look_ahead(tmp_path / "out", memory_bytes=10**9)
    assert found.plan is None
    (row,) = found.forecast.rows
    assert row.weight_bytes == result.weight_bytes
    assert row.bits_per_weight == pytest.approx(result.bits_per_weight)
    assert found.forecast.quantized == "compressed-tensors"
    assert found.forecast.kv_cache_bytes == forecast_of(checkpoint("llama"), G32).kv_cache_bytes
    assert found.advice.verdict == "do not quantize again"
    assert row.fits


# -- groups that do not fit by default -----------------------------------------------------------


def test_smaller_groups_are_taken_by_default_where_128_do_not_fit_and_that_is_said(checkpoint):
    found = look_ahead(checkpoint("llama"), measure=False)
    assert found.scheme == "w4-g32"
    assert [note for note in found.notes if note.kind == "fallback"] == [
        Note(
            "fallback",
            "scheme",
            "groups of 128 do not divide the columns of all weights: w4-g32 instead",
        )
    ]
    with pytest.raises(InputError, match="groups of 128"):
        look_ahead(checkpoint("llama"), scheme=QuantScheme(4, "group", 128), measure=False)


# -- cost ----------------------------------------------------------------------------------------

UNIT = dict.fromkeys(machine.Rates.__slots__, 0.0) | {"baseline_bytes": 0}


def work_of(folder: Path, samples: int = 8, length: int = 16):
    seen = survey(open_headers(folder))
    plan = make_plan(seen, Recipe(RTN(), G32))
    groups, _ = group_tensors(plan, seen, G32)
    readers = observe(seen.model, 16).readers
    config = text_config(seen.model)
    return groups, count_work(plan, groups, readers, config, samples, length, None), seen.model


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3", "gpt_neox"])
def test_products_of_a_token_are_those_that_torch_counts(checkpoint, model_type):
    _, work, _ = work_of(checkpoint(model_type))
    model = tiny_model(model_type)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(1, 16, dtype=torch.int64))
    counts = counter.get_flop_counts()["Global"]
    whole = sum(n for op, n in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    head = 2 * 16 * work.hidden * work.vocabulary
    assert 2 * 16 * machine._products(work) == whole - head


def test_linears_that_read_one_tensor_share_an_input(checkpoint):
    _, work, _ = work_of(checkpoint("llama"))
    # q, k, v together; o; gate and up together; down: in each of 2 blocks.
    assert work.inputs == {(128 + 64 + 64, 64): 2, (64, 128): 2, (2 * 96, 64): 2, (64, 96): 2}
    assert work.scalable == 2 * 3  # o reads values that several heads share


def test_parts_add_up_and_only_the_rates_that_a_method_needs_count(checkpoint):
    groups, work, _ = work_of(checkpoint("llama"))
    for choice in choices(32):
        for name in ("hessian", "cholesky", "column", "search", "hash", "multiply_fast"):
            rates = machine.Rates(**UNIT | {name: 1.0})
            found = estimate_cost(choice, groups, work, rates, PACKED)
            none = estimate_cost(choice, groups, work, machine.Rates(**UNIT), PACKED)
            assert found.elapsed_s == pytest.approx(sum(found.parts_s.values()))
            needed = {
                "hessian": choice.method in ("gptq", "awq", "awq+gptq"),
                "cholesky": choice.method.endswith("gptq"),
                "column": choice.method.endswith("gptq"),
                "search": choice.method.startswith("awq") or choice.method.endswith("gptq"),
                "hash": True,
                "multiply_fast": choice.method != "rtn",
            }
            assert (found.elapsed_s > none.elapsed_s) == needed[name], (choice.name, name)


def test_chains_of_a_trellis_are_counted_as_often_as_they_are_found(checkpoint):
    groups, work, _ = work_of(checkpoint("llama"))
    scheme = QuantScheme.parse("w4-g32-trellis")
    rates = machine.Rates(**UNIT | {"chains": 1.0})
    weights = sum(n * rows * columns for (rows, columns), n in work.inputs.items())
    for method, times in {
        "rtn": 1,
        "awq": 7,
        "gptq": 9,
        "awq+gptq": 9,
    }.items():  # of 6 grids, then codes
        found = estimate_cost(Choice(method, scheme), groups, work, rates, FORMATS["fewbits"])
        assert found.parts_s["rounding"] == pytest.approx(times * weights)


def test_hessians_are_counted_by_tokens_and_width(checkpoint):
    groups, work, _ = work_of(checkpoint("llama"), samples=64, length=16)
    rates = machine.Rates(**UNIT | {"hessian": 1.0})
    found = estimate_cost(Choice("gptq", G32), groups, work, rates, PACKED)
    fitted = (64 - 2) * 16  # one in 32 is held out
    expected = sum(2 * fitted * n * (n + 256) / 2 for n in (64, 128, 64, 96))
    assert found.parts_s["hessians"] == pytest.approx(expected)


SHAPES = {  # wide, narrow, higher than wide, of many experts and of few; two blocks, headers alone
    "llama": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
              "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192},
    "gpt2": {},
    "gemma2": {"hidden_size": 256, "intermediate_size": 4096, "num_attention_heads": 2, "head_dim": 64,
               "num_key_value_heads": 1, "vocab_size": 300},
    "mixtral": {"hidden_size": 512, "intermediate_size": 1408, "num_local_experts": 8,
                "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 2000},
    "qwen3_moe": {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 64},
    "gpt_oss": {},
}  # fmt: skip


@pytest.mark.parametrize("model_type", SHAPES)
def test_a_budget_is_never_below_what_is_expected(tmp_path, monkeypatch, model_type):
    blocks = "n_layer" if model_type == "gpt2" else "num_hidden_layers"
    benchmark().make_headers(tmp_path, model_type, SHAPES[model_type] | {blocks: 2})
    # The result is not loaded, for which budget.py does not provide: steps.py looks whether it fits.
    monkeypatch.setattr(machine, "available_bytes", lambda: 0)
    rates = machine.Rates(**UNIT)
    on_the_way = machine._STARTED_BYTES + machine._CALIBRATED_BYTES
    rates = replace(rates, baseline_bytes=LIBRARIES_BYTES - on_the_way)
    seen = survey(open_headers(tmp_path))
    config = text_config(seen.model)
    readers = observe(seen.model, 64).readers
    for method in ("rtn", "gptq", "awq", "awq+gptq", "weighted-rtn", "llm-int8"):
        transforms, rounder, _ = parse_method(method)
        scheme = QuantScheme(8, inputs=InputScheme(static=True)) if method == "llm-int8" else G32
        rounder = LLMInt8(static=True) if method == "llm-int8" else rounder
        recipe = Recipe(rounder, scheme, transforms=transforms)
        plan = make_plan(seen, recipe)
        groups, _ = group_tensors(plan, seen, scheme)
        for shape in ((2, 16), (16, 64), (128, 512), (512, 1024), (16, 4096)):
            if shape[1] > getattr(config, "max_position_embeddings", shape[1]):
                continue
            work = count_work(plan, groups, readers, config, *shape, None)
            expected = estimate_cost(Choice(method, scheme), groups, work, rates, plan.format)
            given = None if method == "rtn" else shape
            bound = plan_memory(plan, recipe, given, LIBRARIES_BYTES, None).peak_bytes
            assert expected.peak_bytes <= bound, (method, shape)
            assert bound - LIBRARIES_BYTES < 3 * (expected.peak_bytes - rates.baseline_bytes)


def test_the_probe_gives_rates_that_are_times(checkpoint):
    found = look_ahead(checkpoint("llama"), samples=8, length=16)
    rates = found.forecast.rates
    none = ("tokenize", "column", "column_row")  # of the last two one may be too short to be seen
    assert all(value > 0 for name, value in rates.items() if name not in none)
    assert rates["column"] + rates["column_row"] > 0
    assert all(row.cost.elapsed_s > 0 for row in found.forecast.rows[1:])
    assert found.forecast.rows[0].cost is None
    assert look_ahead(checkpoint("llama"), measure=False).forecast.rates == {}


# -- large models --------------------------------------------------------------------------------


def benchmark():
    path = Path(__file__).parent.parent / "benchmarks" / "forecast.py"
    sys.path.insert(0, str(path.parent))  # it imports another beside it
    try:
        spec = importlib.util.spec_from_file_location("forecast_benchmark", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
@pytest.mark.parametrize(
    "name",
    ["llama-70b", *(pytest.param(n, marks=pytest.mark.slow) for n in ("qwen3-235b", "deepseek-671b"))],
)
def test_headers_of_a_large_model_take_less_than_500_megabytes(tmp_path, name):
    made = benchmark()
    made.make_headers(tmp_path, *made.LARGE[name])
    command = [sys.executable, "-m", "fewbits", "plan", str(tmp_path), "--memory", "80GB", "--json"]
    found = made.launch(command, tmp_path / "out")
    assert found["status"] == 0
    assert found["peak_bytes"] < made.ANSWER_BYTES
    value = json.loads((tmp_path / "out").read_text())
    source = 1e9 * {"llama-70b": 141, "qwen3-235b": 470, "deepseek-671b": 1342}[name]
    assert value["source_bytes"] == pytest.approx(source, rel=0.01)
    assert value["forecast"]["kv_cache_bytes"] is not None
    assert any("headers only" in note for note in value["notes"])


def test_advice_goes_by_all_methods_whatever_rows_are_shown(checkpoint):
    folder = checkpoint("llama")
    asked = {"memory_bytes": 10**9, "measure": False}
    whole = look_ahead(folder, **asked)
    for narrower in ({"method": "gptq"}, {"bits": 3}):
        assert look_ahead(folder, **asked, **narrower).advice.verdict == whole.advice.verdict
