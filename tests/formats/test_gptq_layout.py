import json
import re
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pack_golden import CASES, GOLDEN, draw
from safetensors.torch import load_file

import oracles
from checks import assert_same, random_weight, schemes
from fewbits.errors import InputError
from fewbits.formats import Placement
from fewbits.formats.gptq import GptqLayout, order_of
from fewbits.formats.packed import on_disk
from fewbits.scheme import InputScheme, QuantScheme
from fewbits.tensor import QuantizedTensor

FIRST, SECOND = GptqLayout(1), GptqLayout(2)
LOW, HIGH = QuantScheme(4, "group", 32), QuantScheme(8)
ENDS = ("qweight", "qzeros", "scales", "g_idx")


# -- bytes ---------------------------------------------------------------------------------------


@st.composite
def held_weights(draw):
    """Of any scheme and shape whose words are whole, and a version that holds it."""
    bits = draw(st.sampled_from([2, 3, 4, 8]))
    unit = {2: 16, 3: 32, 4: 8, 8: 4}[bits]
    rows, columns = (unit * draw(st.integers(1, 4)) for _ in range(2))
    sizes = [None, *(n for n in range(1, columns + 1) if columns % n == 0)]
    size = draw(st.sampled_from(sizes))
    symmetric = draw(st.booleans())
    granularity = draw(st.sampled_from(["channel", "tensor"])) if size is None else "group"
    scheme = QuantScheme(bits, granularity, size, symmetric)
    torch.manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16]))
    version = 2 if not symmetric else draw(st.sampled_from([1, 2]))
    return GptqLayout(version), random_weight(scheme, (rows, columns), dtype)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(held_weights())
def test_what_is_written_is_read_and_decoded_bit_for_bit(case):
    layout, weight = case
    tensors, expected = layout.write("X.weight", weight), layout.held(weight).per_row()
    assert_same(layout.read("X.weight", tensors, on_disk(weight.scheme)), expected)
    found = layout.decode("X.weight", tensors, weight.scheme, weight.shape)
    for part in ("codes", "scale", "zero_point"):
        assert torch.equal(getattr(found, part), getattr(expected, part)), part
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert size == layout.written_bytes(*weight.shape, weight.scheme, 2)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(held_weights())
def test_every_word_is_that_of_plain_integers(case):
    layout, weight = case
    tensors, columns = layout.write("X.weight", weight), weight.shape[1]
    bits, whole = weight.scheme.bits, weight.per_row()
    words = [oracles.pack_bits(row, bits) for row in weight.codes.tolist()]
    assert tensors["X.qweight"].t().tolist() == words  # along in
    stored = [[(z - (layout.version == 1)) % 2**bits for z in row] for row in whole.zero_point.tolist()]
    columns_of_points = [oracles.pack_bits(list(group), bits) for group in zip(*stored, strict=True)]
    assert tensors["X.qzeros"].tolist() == columns_of_points  # along out
    assert torch.equal(tensors["X.scales"], whole.scale.t().to(torch.float16))
    size = weight.scheme.group_size or columns
    assert tensors["X.g_idx"].tolist() == [i // size for i in range(columns)]
    dtypes = [tensors[f"X.{end}"].dtype for end in ENDS]
    assert dtypes == [torch.int32, torch.int32, torch.float16, torch.int32]
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@pytest.mark.parametrize("case", [c for c in CASES if c.startswith("gptq")])
def test_gptqmodel_packs_the_same_bytes(case):
    golden = load_file(GOLDEN)
    layout = FIRST if case.startswith("gptq.") else SECOND
    scheme = QuantScheme.parse(case.split(".")[1])
    codes, points, scale = draw(case)
    weight = QuantizedTensor(codes, scale, points, scheme)
    tensors = layout.write("X.weight", weight)
    for end in ENDS:
        ours, theirs = tensors[f"X.{end}"], golden[f"{case}.{end}"]
        assert ours.dtype == theirs.dtype, end
        assert torch.equal(ours, theirs), end
    theirs = {f"X.{end}": golden[f"{case}.{end}"] for end in ENDS}
    assert_same(layout.read("X.weight", theirs, scheme), weight)


def test_all_the_golden_tensors_are_compared():
    ends = {key.removeprefix(f"{case}.") for key in load_file(GOLDEN) for case in CASES if case in key}
    assert {key.rsplit(".", 1)[0] for key in load_file(GOLDEN)} == set(CASES)
    assert ends >= set(ENDS)


# -- zero points ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_an_asymmetric_file_of_version_1_has_zero_points_one_above_what_is_stored(bits):
    scheme = QuantScheme(bits, "group", 32, symmetric=False)
    weight = random_weight(scheme, (32, 64), torch.float16)
    tensors = SECOND.write("X.weight", weight)
    full = weight.zero_point == scheme.max_code  # what version 1 would wrap around
    if bool(full.any()):
        with pytest.raises(InputError, match=rf"X\.weight.*zero point of {2**bits}"):
            FIRST.read("X.weight", tensors, scheme)
        with pytest.raises(InputError, match=rf"X\.weight.*zero point of {2**bits}"):
            FIRST.decode("X.weight", tensors, scheme, (32, 64))
    points = weight.zero_point.clamp(max=scheme.max_code - 1)
    lower = QuantizedTensor(weight.codes, weight.scale, points, scheme)
    tensors = SECOND.write("X.weight", lower)
    assert torch.equal(FIRST.read("X.weight", tensors, scheme).zero_point, points + 1)
    assert torch.equal(FIRST.decode("X.weight", tensors, scheme, (32, 64)).zero_point, points + 1)


def test_a_symmetric_file_with_other_zero_points_is_refused():
    scheme = QuantScheme(4, "group", 32)
    tensors = FIRST.write("X.weight", random_weight(scheme, (32, 64), torch.float16))
    with pytest.raises(InputError, match=r"X\.weight.*says symmetric"):
        SECOND.read("X.weight", tensors, scheme)  # version 1's 7 is no 8
    with pytest.raises(InputError, match=r"X\.weight.*says symmetric"):
        SECOND.decode("X.weight", tensors, scheme, (32, 64))


# -- order of columns ----------------------------------------------------------------------------


def test_columns_that_groups_do_not_stand_in_order_are_read_as_they_are_meant():
    scheme = QuantScheme(4, "group", 8, symmetric=False)
    weight = random_weight(scheme, (8, 32), torch.float16)
    index = torch.arange(32)[torch.randperm(32)] // 8
    tensors = SECOND.write("X.weight", weight) | {"X.g_idx": index.to(torch.int32)}
    found = SECOND.read("X.weight", tensors, scheme).dequantize(torch.float64)
    for row, column in product(range(8), range(32)):  # the format's own definition
        group = int(index[column])
        code, point = int(weight.codes[row, column]), int(weight.zero_point[row, group])
        assert found[row, column].item() == weight.scale[row, group].item() * (code - point)


def test_the_order_of_columns_is_none_where_groups_are_neighbours():
    assert order_of(torch.arange(12, dtype=torch.int32) // 4, 4) is None
    assert order_of(torch.zeros(12, dtype=torch.int32), 12) is None
    weight = random_weight(LOW, (8, 64), torch.float16)
    tensors = FIRST.write("X.weight", weight)
    del tensors["X.g_idx"]  # old writers have none
    assert_same(FIRST.read("X.weight", tensors, LOW), weight)
    assert torch.equal(FIRST.decode("X.weight", tensors, LOW, (8, 64)).codes, weight.codes)


@pytest.mark.parametrize(
    "index",
    [
        [0, 0, 0, 1], [0, 1, 1, 2], [-1, 0, 0, -1], [1, 1, 2, 2], [0, 0, 0, 0],
        [2**31 - 1, 0, 0, 1], [0, 1, 1],
    ],
)  # fmt: skip
def test_groups_of_other_sizes_are_refused(index):
    scheme = QuantScheme(8, "group", 2)
    tensors = SECOND.write("X.weight", random_weight(scheme, (4, 4), torch.float16))
    tensors["X.g_idx"] = torch.tensor(index, dtype=torch.int32)
    with pytest.raises(InputError, match=r"X\.weight.*g_idx"):
        SECOND.read("X.weight", tensors, scheme)
    with pytest.raises(InputError, match=r"X\.weight.*g_idx"):
        SECOND.decode("X.weight", tensors, scheme, (4, 4))


def test_another_order_is_no_decoding_of_what_fewbits_wrote():
    scheme = QuantScheme(8, "group", 2)
    tensors = SECOND.write("X.weight", random_weight(scheme, (4, 4), torch.float16))
    tensors["X.g_idx"] = torch.tensor([0, 1, 0, 1], dtype=torch.int32)
    with pytest.raises(InputError, match="order"):
        SECOND.decode("X.weight", tensors, scheme, (4, 4))


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "scheme", "changes", "reason"),
    [
        (FIRST, QuantScheme(4, symmetric=False), {}, "gptq-v2"),
        (SECOND, QuantScheme(8, inputs=InputScheme()), {}, "inputs in 8 bits"),
        (SECOND, LOW, {"stacked": True}, "fused"),
    ],
)
def test_what_it_cannot_hold_is_refused_with_the_reason(layout, scheme, changes, reason):
    assert reason in layout.refuses(Placement("model.layers.0.X", scheme, **changes), scheme)


@pytest.mark.parametrize(
    ("bits", "shape", "side", "step"),
    [
        (4, (32, 100), "in is 100", 8), (4, (6, 32), "out is 6", 8), (3, (32, 48), "in is 48", 32),
        (2, (24, 32), "out is 24", 16), (8, (32, 6), "in is 6", 4), (3, (48, 32), "out is 48", 32),
    ],
)  # fmt: skip
def test_a_side_that_fills_no_words_is_refused_with_what_would(bits, shape, side, step):
    scheme = QuantScheme(bits)
    reason = f"{side}; accepted in {bits} bits are multiples of {step}"
    assert SECOND.refuses(Placement("model.layers.0.X", scheme, shape=shape), scheme) == reason
    with pytest.raises(InputError, match=f"^X.weight: gptq-v2: {reason}$"):
        SECOND.write("X.weight", random_weight(scheme, shape, torch.float16))


def test_every_scale_that_methods_choose_is_held():
    every = torch.arange(0x8000, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float16):
        chosen = FIRST.scales(dtype)
        scale = every.to(dtype)
        scale = scale[(scale >= chosen.least) & (scale <= 65504)].to(chosen.dtype)
        codes = torch.zeros(len(scale) // 4 * 4, 4, dtype=torch.uint8)
        scale = scale[: len(codes), None]
        points = torch.full(scale.shape, 128, dtype=torch.uint8)
        held = FIRST.held(QuantizedTensor(codes, scale, points, QuantScheme(8)))
        assert torch.equal(held.scale.double(), scale.double())
    assert FIRST.scales(torch.float32).dtype == torch.float16


@pytest.mark.parametrize(
    ("end", "change"),
    [
        ("qweight", lambda t: t.long()), ("qweight", lambda t: t[:, :8]), ("qweight", lambda t: t[0]),
        ("qweight", lambda t: t[:4]), ("qweight", lambda t: t[:0]), ("qweight", lambda t: t.float()),
        ("qzeros", lambda t: t.long()), ("qzeros", lambda t: t[:, :1]), ("qzeros", lambda t: t[:1]),
        ("qzeros", lambda t: t[0, 0]), ("scales", lambda t: t[:1]), ("scales", lambda t: t.t()),
        ("scales", lambda t: t.int()), ("g_idx", lambda t: t[:, None]), ("g_idx", lambda t: t[:1]),
        *((end, None) for end in ENDS[:3]),
    ],
)  # fmt: skip
def test_tensors_of_strangers_are_refused_in_one_line_that_names_the_weight(end, change):
    scheme = QuantScheme(4, "group", 32, symmetric=False)
    tensors = SECOND.write("X.weight", random_weight(scheme, (32, 64), torch.float16))
    if change is None:
        del tensors[f"X.{end}"]
    else:
        tensors[f"X.{end}"] = change(tensors[f"X.{end}"])
    with pytest.raises(InputError, match=r"^X\."):
        SECOND.read("X.weight", tensors, scheme)
    with pytest.raises(InputError, match=r"^X\."):
        SECOND.decode("X.weight", tensors, scheme, (32, 64))


def test_groups_that_do_not_divide_the_columns_are_refused_by_name():
    tensors = SECOND.write("X.weight", random_weight(QuantScheme(4), (32, 64), torch.float16))
    with pytest.raises(InputError, match=r"X\.weight: group_size 48 does not divide 64"):
        SECOND.read("X.weight", tensors, QuantScheme(4, "group", 48))


def test_the_shape_is_that_of_the_words():
    class Stored:
        def __init__(self, tensors):
            self.tensors = tensors

    for bits in (2, 3, 4, 8):
        scheme = QuantScheme(bits, "group", 32)
        name = "model.layers.0.X.weight"
        tensors = FIRST.write(name, random_weight(scheme, (96, 64), torch.float16))
        config = FIRST.config({name: Placement("model.layers.0.X", scheme)}, [])
        assert FIRST.shape(config, name, Stored(tensors)) == (96, 64)
        with pytest.raises(InputError, match="no scheme"):
            FIRST.shape(config | {"dynamic": {"-:model": {}}}, name, Stored(tensors))


# -- configuration -------------------------------------------------------------------------------


def config_of(placements, floats=(), layout=SECOND):
    return json.loads(json.dumps(layout.config(placements, list(floats))))


def placed(given):
    return {f"{module}.weight": Placement(module, scheme) for module, scheme in given.items()}


def told_by_gptqmodel(config, module):
    """Its rule: the first pattern that matches the start of the name; -: is float, else it overrides."""
    for pattern, values in config.get("dynamic", {}).items():
        if re.match(pattern[2:], module):
            return None if pattern.startswith("-:") else {**config, **values}
    return config


@pytest.mark.parametrize("layout", [FIRST, SECOND], ids=lambda layout: layout.name)
def test_a_plain_model_has_a_plain_configuration(layout):
    modules = [f"model.layers.{i}.mlp.up_proj" for i in range(3)]
    config = config_of(placed(dict.fromkeys(modules, LOW)), ["lm_head"], layout)
    [quantizer] = config.pop("meta")["quantizer"]
    assert quantizer.startswith("fewbits:")
    assert config == {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False,
        "checkpoint_format": "gptq" if layout is FIRST else "gptq_v2", "lm_head": False,
        "pack_dtype": "int32",
    }  # fmt: skip
    assert layout.reads(config)
    assert not (FIRST if layout is SECOND else SECOND).reads(config)


def test_every_module_has_its_scheme_by_the_clients_rule_and_by_ours():
    odd = QuantScheme(3, "channel", symmetric=False)
    ends = ("self_attn.q_proj", "self_attn.q_proj_norm", "mlp.down_proj", "mlp.1", "mlp.11")
    modules = [f"model.layers.{i}.{end}" for i, end in product(range(12), ends)]
    kinds = dict(zip(ends, (LOW, HIGH, odd, LOW, None), strict=True))
    by_kind = {m: kinds[m.split(".", 3)[3]] for m in modules}
    by_block = {m: odd if ".layers.1." in m else None if ".layers.11." in m else LOW for m in modules}
    one_float = dict.fromkeys(modules, LOW) | {"model.layers.1.mlp.1": None}
    prefixes = {m: HIGH if m.endswith(("mlp.1", "q_proj")) else LOW for m in modules}
    assert config_of(placed(prefixes))["bits"] == LOW.bits  # the commonest
    for given_ in (by_kind, by_block, one_float, prefixes):
        floats = [m for m, scheme in given_.items() if scheme is None] + ["lm_head", "model.gate"]
        quantized = {m: scheme for m, scheme in given_.items() if scheme is not None}
        config = config_of(placed(quantized), floats)
        for module, scheme in quantized.items():
            assert SECOND.scheme_of(config, f"{module}.weight", module) == scheme, module
            told = told_by_gptqmodel(config, module)
            size = -1 if scheme.group_size is None else scheme.group_size
            expected = (scheme.bits, size, scheme.symmetric)
            assert (told["bits"], told["group_size"], told["sym"]) == expected, module
        for module in floats:
            assert SECOND.scheme_of(config, f"{module}.weight", module) is None, module
            assert module == "lm_head" or told_by_gptqmodel(config, module) is None, module


def test_names_of_the_source_are_matched_as_those_of_the_model_are():
    placements = {
        f"h.{i}.{end}.weight": Placement(f"transformer.h.{i}.{end}", scheme)
        for i, (end, scheme) in product(range(3), (("fc", LOW), ("up", LOW), ("down", HIGH)))
    }
    config = config_of(placements, ["h.0.gate", "transformer.h.0.gate"])
    for name, placement in placements.items():
        source = name.removesuffix(".weight")
        assert SECOND.scheme_of(config, name, placement.module) == placement.scheme
        assert SECOND.scheme_of(config, name, source) == placement.scheme
        for module in (source, placement.module):
            assert told_by_gptqmodel(config, module)["bits"] == placement.scheme.bits
    assert told_by_gptqmodel(config, "transformer.h.0.gate") is None


def test_experts_have_their_schemes_though_the_model_has_one_module_for_all():
    place = "model.layers.0.mlp.experts"
    placements = {
        f"{place}.{i}.up_proj.weight": Placement(place, HIGH if i == 1 else LOW, expert=True)
        for i in range(4)
    }
    config = config_of(placements)
    for name, placement in placements.items():
        assert SECOND.scheme_of(config, name, place) == placement.scheme
        assert told_by_gptqmodel(config, name.removesuffix(".weight"))["bits"] == placement.scheme.bits
    routed = config_of(placements, ["model.layers.0.mlp.gate"])
    assert "modules_in_block_to_quantize" not in routed  # optimum knows no experts


def told_by_optimum(config, module):
    """Its rule: all linears of the blocks, or those whose names end so."""
    listed = config.get("modules_in_block_to_quantize")
    return listed is None or any(module.endswith(end) for ends in listed for end in ends)


def test_floats_inside_of_blocks_are_said_in_optimums_way_where_that_is_possible():
    modules = [f"model.layers.{i}.{end}" for i, end in product(range(2), ("attn.q", "mlp.up"))]
    floats = [f"model.layers.{i}.mlp.gate" for i in range(2)]
    config = config_of(placed(dict.fromkeys(modules, LOW)), [*floats, "lm_head"])
    assert all(told_by_optimum(config, module) for module in modules)
    assert not any(told_by_optimum(config, module) for module in floats)
    elsewhere = config_of(placed(dict.fromkeys(modules, LOW)), ["vision.blocks.0.fc", "lm_head"])
    assert "modules_in_block_to_quantize" not in elsewhere
    one = dict.fromkeys(modules, LOW)
    del one["model.layers.0.attn.q"]
    uneven = config_of(placed(one), ["model.layers.0.attn.q"])
    assert "modules_in_block_to_quantize" not in uneven
    assert SECOND.remarks(placed(dict.fromkeys(modules, LOW))) == []
    [remark] = SECOND.remarks(placed(one))
    assert "block" in remark


def test_what_plain_transformers_does_not_load_is_remarked():
    given_ = {"model.layers.0.a": LOW, "model.layers.0.b": HIGH}
    [several] = SECOND.remarks(placed(given_))
    [head] = SECOND.remarks(placed({"model.layers.0.a": LOW, "lm_head": LOW}))
    [experts] = SECOND.remarks({"x": Placement("model.layers.0.experts", LOW, expert=True)})
    [stored] = SECOND.remarks({"x": Placement("h.0.fc", LOW, transposed=True)})
    assert "(in, out)" in stored
    assert "several schemes" in several
    assert "head" in head
    assert "experts" in experts


def test_a_quantized_head_is_said_and_a_second_matrix_outside_of_blocks_refused():
    given_ = {"model.layers.0.a": LOW, "lm_head": HIGH}
    config = config_of(placed(given_), ["score"])
    assert config["lm_head"] is True
    for module, scheme in given_.items():
        assert SECOND.scheme_of(config, f"{module}.weight", module) == scheme
    assert SECOND.scheme_of(config, "score.weight", "score") is None
    with pytest.raises(InputError, match="lm_head and score"):
        config_of(placed(given_ | {"score": LOW}))


# -- configurations of other tools -----------------------------------------------------------------

AUTOGPTQ = {
    "bits": 4, "group_size": 128, "damp_percent": 0.1, "desc_act": True, "static_groups": False,
    "sym": True, "true_sequential": True, "model_name_or_path": None, "model_file_base_name": "model",
    "quant_method": "gptq",
}  # fmt: skip
GPTQMODEL = {
    "bits": 4, "group_size": 32, "desc_act": False, "lm_head": False, "method": "gptq", "sym": False,
    "quant_method": "gptq", "format": "gptq_v2", "checkpoint_format": "gptq_v2", "pack_dtype": "int32",
    "dynamic": {
        r"-:.*\.gate$": {}, r".*\.0\..*down": {"bits": 8, "group_size": -1}, r"+:.*down": {"sym": True},
    },
    "meta": {"quantizer": ["gptqmodel:7.6.0"], "damp_percent": 0.05},
}  # fmt: skip


def test_configurations_of_other_tools_are_read():
    where = "model.layers.0.mlp.up_proj"
    assert FIRST.reads(AUTOGPTQ)
    assert not SECOND.reads(AUTOGPTQ)
    assert FIRST.scheme_of(AUTOGPTQ, f"{where}.weight", where) == QuantScheme(4, "group", 128)
    assert FIRST.scheme_of(AUTOGPTQ, "lm_head.weight", "lm_head") is None
    assert SECOND.reads(GPTQMODEL)
    expected = {
        where: QuantScheme(4, "group", 32, symmetric=False),
        "model.layers.0.mlp.down": QuantScheme(8, "channel", symmetric=False),
        "model.layers.1.mlp.down": QuantScheme(4, "group", 32),
        "model.layers.1.mlp.gate": None,
    }
    for module, scheme in expected.items():
        assert SECOND.scheme_of(GPTQMODEL, f"{module}.weight", module) == scheme


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint_format": "marlin"}, {"checkpoint_format": 4}, {"format": "gptq_p"},
        {"checkpoint_format": ["gptq"]}, {"is_marlin_format": True}, {"pack_dtype": "int16"},
        {"pack_dtype": ["int32"]}, {"rotation": "hadamard"}, {"activation": {"mode": "w4afp8"}},
        {"dynamic": ["-:x"]}, {"dynamic": {"-:x": 3}}, {"dynamic": {"+:m": {"pack_dtype": "int8"}}},
    ],
)  # fmt: skip
def test_a_configuration_that_would_be_read_wrongly_is_refused(change):
    config = AUTOGPTQ | change
    assert FIRST.reads(config)
    for ask in (
        lambda: FIRST.scheme_of(config, "model.layers.0.a.weight", "model.layers.0.a"),
        lambda: FIRST.quantized_names(config, ["model.layers.0.a.qweight"]),
    ):
        with pytest.raises(InputError) as refusal:
            ask()
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 5}, {"bits": "4"}, {"bits": True}, {"bits": None}, {"bits": 4.0}, {"bits": [4]},
        {"group_size": 0}, {"group_size": -2}, {"group_size": "128"}, {"group_size": None},
        {"group_size": 1.5}, {"sym": "yes"}, {"sym": 1}, {"dynamic": {"+:(": {}}},
        {"dynamic": {"+:model": {"bits": "4"}}}, {"dynamic": {"-:\ud800[": {}}},
    ],
)  # fmt: skip
def test_a_value_of_a_stranger_that_is_none_is_refused_in_one_line(change):
    with pytest.raises(InputError) as refusal:
        FIRST.scheme_of(AUTOGPTQ | change, "model.layers.0.a.weight", "model.layers.0.a")
    assert "\n" not in str(refusal.value)


def test_a_head_of_a_kind_that_is_no_flag_is_refused():
    with pytest.raises(InputError, match="lm_head"):
        FIRST.scheme_of(AUTOGPTQ | {"lm_head": "no"}, "lm_head.weight", "lm_head")


def test_scales_beside_a_float_weight_are_something_else():
    tensors = ["a.qweight", "b.scales", "c.scales", "c.weight", "d.bias", "e.weight"]
    assert SECOND.quantized_names(GPTQMODEL, tensors) == {"a.weight", "b.weight"}


@pytest.mark.parametrize("scheme", schemes("tensor", "channel", 32), ids=lambda scheme: scheme.label)
def test_the_second_version_takes_every_scheme_of_a_plain_linear(scheme):
    placement = Placement("model.layers.0.X", scheme, shape=(64, 64))
    assert SECOND.refuses(placement, scheme) is None
    assert (FIRST.refuses(placement, scheme) is None) == scheme.symmetric
