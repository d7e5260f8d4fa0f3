import json
import re
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pack_golden import CASES, GOLDEN, draw
from safetensors.torch import load_file

from checks import assert_same, random_weight
from fewbits.errors import InputError
from fewbits.formats import Placement
from fewbits.formats.awq import AwqLayout
from fewbits.formats.packed import on_disk
from fewbits.scheme import InputScheme, QuantScheme
from fewbits.tensor import QuantizedTensor

LAYOUT = AwqLayout()
LOW = QuantScheme(4, "group", 32)
ODD = QuantScheme(4, "group", 32, symmetric=False)
ENDS = ("qweight", "qzeros", "scales")
COLUMNS = [0, 2, 4, 6, 1, 3, 5, 7]  # of eight outputs, from the lowest bits of a word


# -- bytes ---------------------------------------------------------------------------------------


@st.composite
def held_weights(draw):
    rows, columns = 8 * draw(st.integers(1, 5)), draw(st.integers(1, 40))
    size = draw(st.sampled_from([None, *(n for n in range(1, columns + 1) if columns % n == 0)]))
    granularity = draw(st.sampled_from(["channel", "tensor"])) if size is None else "group"
    scheme = QuantScheme(4, granularity, size, draw(st.booleans()))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16]))
    return random_weight(scheme, (rows, columns), dtype)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(held_weights())
def test_what_is_written_is_read_and_decoded_bit_for_bit(weight):
    tensors, held = LAYOUT.write("X.weight", weight), LAYOUT.held(weight)
    assert not held.scheme.symmetric
    expected = held.per_row()
    assert_same(LAYOUT.read("X.weight", tensors, on_disk(held.scheme)), expected)
    found = LAYOUT.decode("X.weight", tensors, held.scheme, weight.shape)
    for part in ("codes", "scale", "zero_point"):
        assert torch.equal(getattr(found, part), getattr(expected, part)), part
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert size == LAYOUT.written_bytes(*weight.shape, weight.scheme, 2)


def words_of(row):
    """Of one input, (out,) codes: eight in a word, in the order of the format."""
    words = [
        sum(row[start + column] << (4 * place) for place, column in enumerate(COLUMNS))
        for start in range(0, len(row), 8)
    ]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(held_weights())
def test_every_word_is_that_of_plain_integers(weight):
    tensors, whole = LAYOUT.write("X.weight", weight), weight.per_row()
    assert tensors["X.qweight"].tolist() == [words_of(row) for row in weight.codes.t().tolist()]
    assert tensors["X.qzeros"].tolist() == [words_of(row) for row in whole.zero_point.t().tolist()]
    assert torch.equal(tensors["X.scales"], whole.scale.t().to(torch.float16))
    dtypes = [tensors[f"X.{end}"].dtype for end in ENDS]
    assert dtypes == [torch.int32, torch.int32, torch.float16]
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@pytest.mark.parametrize("case", [c for c in CASES if c.startswith("awq")])
def test_gptqmodel_packs_the_same_bytes(case):
    golden = load_file(GOLDEN)
    codes, points, scale = draw(case)
    weight = QuantizedTensor(codes, scale, points, QuantScheme.parse(case.split(".")[1]))
    tensors = LAYOUT.write("X.weight", weight)
    theirs = {f"X.{end}": golden[f"{case}.{end}"] for end in ENDS}
    for name, tensor in theirs.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert torch.equal(tensors[name], tensor), name
    assert_same(LAYOUT.read("X.weight", theirs, weight.scheme), weight)  # also where it is symmetric


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "changes", "reason"),
    [
        (QuantScheme(3), {}, "it holds 4 bits, not 3"),
        (QuantScheme(8), {}, "it holds 4 bits, not 8"),
        (QuantScheme(8, inputs=InputScheme()), {}, "inputs in 8 bits"),
        (ODD, {"stacked": True}, "fused"),
        (ODD, {"shape": (12, 32)}, "out is 12; accepted are multiples of 8"),
    ],
)
def test_what_it_cannot_hold_is_refused_with_the_reason(scheme, changes, reason):
    assert reason in LAYOUT.refuses(Placement("model.layers.0.X", scheme, **changes), scheme)


@pytest.mark.parametrize("scheme", [QuantScheme(8), QuantScheme(4)])
def test_writing_refuses_what_it_cannot_hold(scheme):
    with pytest.raises(InputError, match=r"^X\.weight: awq: "):
        LAYOUT.write("X.weight", random_weight(scheme, (12, 32), torch.float16))


@pytest.mark.parametrize(
    ("end", "change"),
    [
        ("qweight", lambda t: t.long()), ("qweight", lambda t: t[:, :1]), ("qweight", lambda t: t[0]),
        ("qweight", lambda t: t[:4]), ("qweight", lambda t: t[:0]), ("qweight", lambda t: t.float()),
        ("qzeros", lambda t: t.long()), ("qzeros", lambda t: t[:, :1]), ("qzeros", lambda t: t[:1]),
        ("qzeros", lambda t: t[0, 0]), ("scales", lambda t: t[:1]), ("scales", lambda t: t.t()),
        ("scales", lambda t: t.int()), *((end, None) for end in ENDS),
    ],
)  # fmt: skip
def test_tensors_of_strangers_are_refused_in_one_line_that_names_the_weight(end, change):
    tensors = LAYOUT.write("X.weight", random_weight(ODD, (24, 64), torch.float16))
    if change is None:
        del tensors[f"X.{end}"]
    else:
        tensors[f"X.{end}"] = change(tensors[f"X.{end}"])
    with pytest.raises(InputError, match=r"^X\."):
        LAYOUT.read("X.weight", tensors, ODD)
    with pytest.raises(InputError, match=r"^X\."):
        LAYOUT.decode("X.weight", tensors, ODD, (24, 64))


def test_other_schemes_than_the_tensors_have_are_refused_by_name():
    tensors = LAYOUT.write("X.weight", random_weight(ODD, (24, 64), torch.float16))
    for scheme in (LOW, QuantScheme(8), QuantScheme(4, "group", 48), QuantScheme(4, "group", 16)):
        with pytest.raises(InputError, match=r"^X\."):
            LAYOUT.read("X.weight", tensors, scheme)
        with pytest.raises(InputError, match=r"^X\."):
            LAYOUT.decode("X.weight", tensors, scheme, (24, 64))


def test_the_shape_is_that_of_the_words():
    class Stored:
        def __init__(self, tensors):
            self.tensors = tensors

    tensors = LAYOUT.write("X.weight", random_weight(ODD, (24, 64), torch.float16))
    assert LAYOUT.shape({}, "X.weight", Stored(tensors)) == (24, 64)
    with pytest.raises(InputError, match=r"X\.weight"):
        LAYOUT.shape({}, "X.weight", Stored({"X.qweight": tensors["X.qweight"][0]}))


# -- configuration -------------------------------------------------------------------------------


def config_of(placements, floats=()):
    return json.loads(json.dumps(LAYOUT.config(placements, list(floats))))


def placed(modules, scheme=ODD):
    return {f"{module}.weight": Placement(module, scheme) for module in modules}


def test_a_plain_model_has_a_plain_configuration():
    config = config_of(placed(f"model.layers.{i}.mlp.up" for i in range(3)), ["lm_head"])
    assert config == {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    assert LAYOUT.reads(config)
    assert config_of(placed(["h.0.a"], QuantScheme(4, "tensor")))["group_size"] == -1


def skipped_by_transformers(listed, module):
    """Its rule: a pattern from the start to the end of a name, or an end."""
    edge = r"(?:(?<=\.)|(?=\.|$))"
    return any(re.match(f"(?:{key}){edge}", module) or module.endswith(key) for key in listed)


def test_every_client_leaves_the_same_modules_in_float():
    ends = ("attn.q", "mlp.up", "mlp.1", "mlp.gate")
    modules = [f"model.layers.{i}.{end}" for i, end in product(range(12), ends)]
    floats = [m for m in modules if m.endswith("gate") or ".layers.1." in m] + ["lm_head", "model.in"]
    quantized = [m for m in modules if m not in floats]
    config = config_of(placed(quantized), floats)
    listed = config["modules_to_not_convert"]
    for module in modules:
        stays = module in floats
        assert (LAYOUT.scheme_of(config, f"{module}.weight", module) is None) == stays, module
        assert skipped_by_transformers(listed, module) == stays, module
        assert any(name in module for name in listed) == stays, module  # vLLM, AutoAWQ
        rules = (re.match(pattern.removeprefix("-:"), module) for pattern in config["dynamic"])
        assert any(rules) == stays, module  # GPTQModel
    for module in ("lm_head", "model.in"):
        assert LAYOUT.scheme_of(config, f"{module}.weight", module) is None


def test_a_float_whose_name_lies_in_a_quantized_one_is_refused():
    with pytest.raises(InputError, match=r"mlp\.1 in float do so with h\.0\.mlp\.11 too"):
        config_of(placed(["h.0.mlp.11"]), ["h.0.mlp.1"])


def test_several_schemes_and_heads_are_refused():
    mixed = placed(["h.0.a"]) | placed(["h.0.b"], QuantScheme(4, symmetric=False))
    with pytest.raises(InputError, match="w4-channel-asym and w4-g32-asym"):
        config_of(mixed)
    assert "no codes in a head" in LAYOUT.refuses(Placement("lm_head", LOW), LOW)
    both = placed(["h.0.a"]) | placed(["h.0.b"], LOW)  # the same on disk
    assert config_of(both)["zero_point"] is True
    assert LAYOUT.remarks(both) == []


def test_what_not_all_clients_load_is_remarked():
    placements = {
        "experts": Placement("h.0.experts", LOW, expert=True),
        "stored (in, out)": Placement("h.0.fc", LOW, transposed=True),
        "outside of the blocks": Placement("model.in", LOW),
    }
    for what, placement in placements.items():
        [remark] = LAYOUT.remarks({"x": placement})
        assert what in remark


def test_configurations_of_other_tools_are_read():
    where = ("model.layers.0.mlp.up.weight", "model.layers.0.mlp.up")
    old = {"w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM", "quant_method": "awq"}
    assert LAYOUT.scheme_of(old, *where) == QuantScheme(4, "group", 128, symmetric=False)
    new = {
        "quant_method": "awq", "bits": 4, "group_size": -1, "zero_point": False, "format": "gemm",
        "sym": True, "modules_to_not_convert": None,
    }  # fmt: skip
    assert LAYOUT.scheme_of(new, *where) == QuantScheme(4)
    skipping = old | {"modules_to_not_convert": ["mlp.gate", "visual"]}
    for module in ("model.layers.0.mlp.gate", "visual.blocks.0.fc"):
        assert LAYOUT.scheme_of(skipping, f"{module}.weight", module) is None
    assert LAYOUT.scheme_of(skipping, "layers.0.mlp.gate_up.weight", "layers.0.mlp.gate_up") is not None


GOOD = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


@pytest.mark.parametrize(
    "change",
    [
        {"version": "gemv"}, {"version": "gemv_fast"}, {"version": "marlin"}, {"version": 1},
        {"version": None, "format": "llm-awq"}, {"backend": "llm-awq"}, {"version": ["gemm"]},
        {"dynamic": {"+:model": {"bits": 4}}}, {"dynamic": {"-:x": 1}}, {"dynamic": []},
    ],
)  # fmt: skip
def test_a_layout_that_is_not_read_is_refused(change):
    config = GOOD | change
    for ask in (
        lambda: LAYOUT.scheme_of(config, "h.0.a.weight", "h.0.a"),
        lambda: LAYOUT.quantized_names(config, ["h.0.a.qweight"]),
    ):
        with pytest.raises(InputError) as refusal:
            ask()
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 8}, {"bits": "4"}, {"bits": True}, {"bits": None}, {"group_size": 0},
        {"group_size": "32"}, {"group_size": None}, {"zero_point": "yes"}, {"zero_point": 1},
        {"modules_to_not_convert": "lm_head"}, {"modules_to_not_convert": [3]},
    ],
)  # fmt: skip
def test_a_value_of_a_stranger_that_is_none_is_refused_in_one_line(change):
    with pytest.raises(InputError) as refusal:
        LAYOUT.scheme_of(GOOD | change, "h.0.a.weight", "h.0.a")
    assert "\n" not in str(refusal.value)
