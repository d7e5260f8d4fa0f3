import json
from itertools import product

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.utils.match import match_targets
from torch import nn

import oracles
from checks import check_format, random_weight, schemes
from fewbits.errors import InputError
from fewbits.formats import FORMATS, CompressedTensors, Own, Placement
from fewbits.scheme import QuantScheme

LOW, HIGH = QuantScheme(4, "group", 32), QuantScheme(8)


@pytest.mark.parametrize("layout", FORMATS.values(), ids=FORMATS)
def test_every_format_passes_the_suite(layout):
    check_format(layout)


@pytest.mark.parametrize("layout", FORMATS.values(), ids=FORMATS)
def test_every_format_is_found_by_its_name(layout):
    assert FORMATS[layout.name] is layout


def test_the_tensors_on_disk_are_as_documented():
    weight = random_weight(QuantScheme(3, "group", 8, symmetric=False), (5, 16), torch.bfloat16)
    for layout, suffix in ((CompressedTensors(), "_packed"), (Own(), "")):
        tensors = layout.write("X.weight", weight)
        codes, points = tensors["X.weight" + suffix], tensors["X.weight_zero_point"]
        assert set(tensors) == {f"X.weight{end}" for end in (suffix, "_scale", "_zero_point", "_shape")}
        assert codes.tolist() == [oracles.pack_bits(row, 3) for row in weight.codes.tolist()]
        columns = [oracles.pack_bits(column, 3) for column in weight.zero_point.t().tolist()]
        assert points.t().tolist() == columns  # packed along the rows of the weight
        assert tensors["X.weight_shape"].tolist() == [5, 16]
        assert torch.equal(tensors["X.weight_scale"], weight.scale)
        assert (codes.dtype, points.dtype) == (torch.int32, torch.int32)
        assert tensors["X.weight_shape"].dtype == torch.int64


def test_a_symmetric_zero_point_is_not_stored():
    for layout in (CompressedTensors(), Own()):
        tensors = layout.write("X.weight", random_weight(QuantScheme(4), (5, 16)))
        assert "X.weight_zero_point" not in tensors


# -- compressed-tensors --------------------------------------------------------------------------


def config_of(placements, floats=()):
    return json.loads(json.dumps(CompressedTensors().config(placements, list(floats))))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", schemes("tensor", "channel", 8), ids=lambda scheme: scheme.label)
def test_compressed_tensors_itself_reads_the_same_weights(scheme, dtype):
    weight = random_weight(scheme, (5, 24), dtype)
    tensors = CompressedTensors().write("X.weight", weight)
    state = {name.removeprefix("X."): tensor for name, tensor in tensors.items()}
    config = config_of({"X.weight": Placement("X", scheme)})
    theirs = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    result = PackedQuantizationCompressor.decompress(state, theirs)["weight"]
    # It rounds the difference and the product to the scale's dtype; the difference is a whole number
    # below 2**8 and so exact, the product is rounded once, as ours is after float32.
    exact = oracles.dequantized(weight.codes, weight.scale, weight.zero_point, scheme)
    assert torch.equal(result, exact.to(dtype))
    assert torch.equal(result, weight.dequantize(dtype))


def test_compressed_tensors_itself_gives_every_module_its_scheme():
    odd = QuantScheme(3, "channel", symmetric=False)
    modules = [f"model.layers.{i}.{n}" for i, n in product(range(12), ("attn.q_proj", "mlp.down_proj"))]
    given = {m: HIGH if m.endswith("down_proj") else LOW for m in modules}
    given |= {m: odd for m in modules if ".1." in m}
    floats = [given.popitem()[0], "lm_head"]
    placements = {f"{m}.weight": Placement(m, scheme) for m, scheme in given.items()}
    config = QuantizationConfig.model_validate(config_of(placements, floats))
    groups = {t: group for group in config.config_groups.values() for t in group.targets}
    for module, scheme in given.items():
        first = match_targets(module, nn.Linear(1, 1), list(groups))[0]
        weights = groups[first].weights
        found = (weights.num_bits, weights.strategy, weights.group_size, weights.symmetric)
        assert found == (scheme.bits, scheme.granularity, scheme.group_size, scheme.symmetric), module
    linear = nn.Linear(1, 1)
    assert all(match_targets(module, linear, config.ignore) for module in floats)
    assert not any(match_targets(module, linear, config.ignore) for module in given)
    assert {group.format for group in config.config_groups.values()} == {"pack-quantized"}


def test_one_scheme_is_given_to_every_linear_but_the_ignored():
    config = config_of({"a.weight": Placement("a", LOW), "b.weight": Placement("b", LOW)}, ["lm_head"])
    assert [group["targets"] for group in config["config_groups"].values()] == [["Linear"]]
    assert config["ignore"] == ["lm_head"]


def test_tensor_and_channel_are_one_group_on_disk():
    mixed = {"a.weight": Placement("a", HIGH), "b.weight": Placement("b", QuantScheme(8, "tensor"))}
    assert len(config_of(mixed)["config_groups"]) == 1


@pytest.mark.parametrize(
    ("changes", "scheme", "reason"),
    [
        ({"stacked": True, "expert": True}, LOW, "fused"),
        ({"transposed": True}, LOW, "(in, out)"),
        ({"expert": True}, QuantScheme(4, symmetric=False), "asymmetric experts"),
    ],
)
def test_compressed_tensors_refuses_what_it_cannot_hold(changes, scheme, reason):
    placement = Placement("X", scheme, **changes)
    assert reason in CompressedTensors().refuses(placement, scheme)
    assert Own().refuses(placement, scheme) is None


@pytest.mark.parametrize("scheme", schemes("tensor", "channel", 32), ids=lambda scheme: scheme.label)
def test_compressed_tensors_takes_every_scheme_of_a_plain_linear(scheme):
    assert CompressedTensors().refuses(Placement("X", scheme), scheme) is None


def test_compressed_tensors_refuses_experts_of_two_schemes():
    experts = {
        f"experts.{i}.weight": Placement("experts", scheme, expert=True)
        for i, scheme in enumerate((LOW, HIGH))
    }
    with pytest.raises(InputError, match="all experts in one scheme"):
        CompressedTensors().config(experts, [])


def test_what_transformers_needs_an_option_for_is_remarked():
    remarks = CompressedTensors().remarks
    assert remarks({"a.weight": Placement("a", LOW)}) == []
    [asymmetric] = remarks({"a.weight": Placement("a", QuantScheme(4, symmetric=False))})
    [own] = remarks({"a.weight": Placement("a", LOW, own_forward=True)})
    assert "asymmetric" in asymmetric
    assert "class of their own" in own
    assert Own().remarks({"a.weight": Placement("a", QuantScheme(4, symmetric=False))}) == []


def test_an_exact_name_beats_a_pattern_and_a_pattern_beats_the_class():
    config = config_of({"a.weight": Placement("a", LOW)})
    group = config["config_groups"]["group_0"]
    config["config_groups"] = {
        str(i): group | {"targets": [target], "weights": group["weights"] | {"num_bits": bits}}
        for i, (target, bits) in enumerate((("Linear", 2), ("re:.*q_proj", 3), ("x.q_proj", 8)))
    }
    layout = CompressedTensors()
    modules = ("x.q_proj", "y.q_proj", "z.up_proj")
    assert [layout.scheme_of(config, f"{m}.weight", m).bits for m in modules] == [8, 3, 2]


@pytest.mark.parametrize(
    ("place", "change"),
    [
        ("group", {"format": "float-quantized"}), ("group", {"format": "marlin-24"}),
        ("group", {"input_activations": {"num_bits": 8}}), ("group", {"weights": None}),
        ("group", {"output_activations": {"num_bits": 8}}), ("weights", {"type": "float"}),
        ("weights", {"dynamic": True}), ("weights", {"num_bits": 5}),
        ("weights", {"strategy": "block"}), ("weights", {"strategy": "tensor_group"}),
    ],
)  # fmt: skip
def test_a_layout_that_is_not_ours_is_refused(place, change):
    config = config_of({"a.weight": Placement("a", LOW)})
    group = config["config_groups"]["group_0"]
    (group if place == "group" else group["weights"]).update(change)
    with pytest.raises(InputError):
        CompressedTensors().scheme_of(config, "a.weight", "a")


def test_ignored_modules_are_float_whatever_a_group_says():
    config = config_of({"a.weight": Placement("a", LOW)}, ["b", "re:.*down_proj"])
    layout = CompressedTensors()
    found = [
        layout.scheme_of(config, f"{module}.weight", module) for module in ("a", "b", "x.down_proj")
    ]
    assert found == [LOW, None, None]


def test_a_broken_pattern_in_the_config_is_refused():
    config = config_of({"a.weight": Placement("a", LOW)}, ["re:("])
    with pytest.raises(InputError, match="no pattern"):
        CompressedTensors().scheme_of(config, "a.weight", "a")


def test_a_group_without_a_format_takes_that_of_the_config():
    config = config_of({"a.weight": Placement("a", LOW)})
    del config["config_groups"]["group_0"]["format"]
    assert CompressedTensors().scheme_of(config, "a.weight", "a") == LOW
    config["format"] = "float-quantized"
    with pytest.raises(InputError, match="float-quantized"):
        CompressedTensors().scheme_of(config, "a.weight", "a")


# -- our own -----------------------------------------------------------------------------------


def test_our_own_format_names_the_schemes_of_all_weights():
    config = Own().config({"a.weight": Placement("a", LOW), "b": Placement("b", HIGH)}, [])
    assert config["weights"] == {"a.weight": "w4-g32", "b": "w8-channel"}


def test_another_version_of_our_own_format_is_refused():
    config = Own().config({"a.weight": Placement("a", LOW)}, [])
    for version in (0, 2, None):
        with pytest.raises(InputError, match=f"version {version} is not read"):
            Own().scheme_of(config | {"version": version}, "a.weight", "a")


def test_codes_of_our_own_format_have_another_shape_than_the_float_weight():
    for bits in (2, 3, 4, 8):  # so that a client that takes them for weights stops
        tensors = Own().write("a.weight", random_weight(QuantScheme(bits), (32, 64)))
        assert tensors["a.weight"].shape != (32, 64)
