import json

import pytest

from fewbits.errors import InputError
from fewbits.methods import GPTQ, Q4K, RTN, WeightedRTN
from fewbits.recipe import Recipe, parse_method, parse_override
from fewbits.scheme import QuantScheme
from fewbits.structure import Matrix
from fewbits.transforms import AWQ

LOW, HIGH = QuantScheme(4, "group", 32), QuantScheme(8)


def linear(module, **changes):
    return Matrix(f"{module}.weight", module, "weight", "linear", (8, 8), **changes)


MATRICES = [
    *(linear(f"model.layers.{i}.{n}") for i in (0, 1, 11) for n in ("attn.q_proj", "mlp.down_proj")),
    linear("lm_head", head=True),
]
# An expert of a checkpoint: the source has a name of its own, the model one module for all.
EXPERT = Matrix(
    "model.layers.0.moe.experts.3.w1.weight",
    "model.layers.0.mlp.experts",
    "gate_up_proj",
    "expert",
    (8, 8),
)


def caught(scheme, schemes):
    return {name.removesuffix(".weight") for name, given in schemes.items() if given == scheme}


def test_two_levels_of_scales_go_with_their_method_alone():
    two = QuantScheme.parse("w4-g32-asym-k")
    assert Recipe(Q4K(), two, overrides=(("*", QuantScheme(8)),)).name == "q4_k"
    for method in (RTN(), GPTQ()):
        with pytest.raises(InputError, match="accepted with it is q4_k"):
            Recipe(method, overrides=(("*", two),))
    with pytest.raises(InputError, match="q4_k with scheme w8-channel; accepted is w4-g32-asym-k"):
        Recipe(Q4K(), QuantScheme(8))
    with pytest.raises(InputError, match="without transforms"):
        Recipe(Q4K(), two, transforms=(AWQ(),))


def test_every_matrix_but_the_head_gets_the_scheme():
    schemes = Recipe(scheme=LOW).assign(MATRICES)
    assert list(schemes) == [matrix.source for matrix in MATRICES]
    assert caught(None, schemes) == {"lm_head"}
    assert len(caught(LOW, schemes)) == 6


def test_the_head_is_quantized_on_request():
    assert Recipe(scheme=LOW, head=True).assign(MATRICES)["lm_head.weight"] == LOW


def test_an_override_can_name_the_head():
    schemes = Recipe(scheme=LOW, overrides=(("lm_head", HIGH),)).assign(MATRICES)
    assert caught(HIGH, schemes) == {"lm_head"}


def test_a_glob_matches_whole_module_names():
    schemes = Recipe(scheme=LOW, overrides=(("*.down_proj", HIGH),)).assign(MATRICES)
    assert caught(HIGH, schemes) == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1, 11)}
    with pytest.raises(InputError, match="matches no quantizable module"):
        Recipe(overrides=(("down_proj", HIGH),)).assign(MATRICES)


def test_block_1_is_not_block_11():
    for pattern in ("model.layers.1.*", r"re:model\.layers\.1\..*"):
        schemes = Recipe(scheme=LOW, overrides=((pattern, HIGH),)).assign(MATRICES)
        assert caught(HIGH, schemes) == {"model.layers.1.attn.q_proj", "model.layers.1.mlp.down_proj"}


def test_a_regular_expression_must_match_the_whole_name():
    schemes = Recipe(scheme=LOW, overrides=((r"re:.*layers\.\d\..*down_proj", HIGH),)).assign(MATRICES)
    assert caught(HIGH, schemes) == {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}
    with pytest.raises(InputError, match="matches no quantizable module"):
        Recipe(overrides=((r"re:model\.layers\.0", HIGH),)).assign(MATRICES)


def test_names_are_matched_with_their_case():
    with pytest.raises(InputError, match="matches no quantizable module"):
        Recipe(overrides=(("*.Down_proj", HIGH),)).assign(MATRICES)


def test_the_last_override_that_matches_decides():
    overrides = (("*", HIGH), ("*.down_proj", None), ("model.layers.11.mlp.down_proj", LOW))
    schemes = Recipe(scheme=QuantScheme(2), overrides=overrides).assign(MATRICES)
    assert caught(LOW, schemes) == {"model.layers.11.mlp.down_proj"}
    assert caught(None, schemes) == {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}
    assert len(caught(HIGH, schemes)) == 4  # the head among them: "*" speaks of it too


@pytest.mark.parametrize(
    "pattern", ["*.experts", "*.experts.3.w1", "*.experts.3.w1.weight", r"re:.*\.experts\.\d+\.w1"]
)
def test_an_expert_is_found_by_its_module_and_by_its_source_name(pattern):
    schemes = Recipe(scheme=LOW, overrides=((pattern, HIGH),)).assign([EXPERT])
    assert schemes == {EXPERT.source: HIGH}


def test_a_pattern_that_matches_nothing_is_refused_with_examples():
    with pytest.raises(InputError, match=r"'\*\.up_proj' matches no .* model\.layers\.0\.attn\.q_proj"):
        Recipe(overrides=(("*.up_proj", HIGH),)).assign(MATRICES)


def test_a_broken_regular_expression_is_refused():
    with pytest.raises(InputError, match="is no regular expression"):
        Recipe(overrides=(("re:(", HIGH),)).assign(MATRICES)


def test_descriptions_are_json_and_tell_recipes_apart():
    recipes = [
        Recipe(), Recipe(scheme=LOW), Recipe(head=True), Recipe(overrides=(("*", HIGH),)),
        Recipe(overrides=(("*", None),)), Recipe(overrides=(("*", HIGH), ("*", None))),
        Recipe(overrides=(("*", None), ("*", HIGH))), Recipe(GPTQ()), Recipe(GPTQ(damp=0.1)),
        Recipe(WeightedRTN()), Recipe(GPTQ(), transforms=(AWQ(),)), Recipe(GPTQ(), transforms=(AWQ(5),)),
    ]  # fmt: skip
    described = [json.dumps(recipe.describe()) for recipe in recipes]
    assert len(set(described)) == len(recipes)
    assert Recipe(overrides=(("*", None),)).describe() == {
        "method": "rtn", "options": {}, "transforms": [], "scheme": "w4-g128",
        "overrides": [["*", "float"]], "head": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "transforms", "method"),
    [
        ("rtn", (), RTN()),
        ("gptq", (), GPTQ()),
        ("awq", (AWQ(),), WeightedRTN()),
        ("awq+gptq", (AWQ(),), GPTQ(corrected=True)),
        ("awq+rtn", (AWQ(),), RTN()),
    ],
)
def test_a_name_stands_for_transforms_and_a_method_and_back(name, transforms, method):
    assert parse_method(name) == (transforms, method, None)
    recipe = Recipe(method, transforms=transforms)
    assert recipe.name == recipe.describe()["method"] == name
    assert recipe.needs_calibration == (name != "rtn")


@pytest.mark.parametrize(
    "name", ["", "gptqq", "gptq+awq", "gptq+gptq", "awq+awq", "awq+", "+gptq", "int8"]
)
def test_another_name_is_refused_with_those_there_are(name):
    with pytest.raises(InputError, match="accepted are rtn, weighted-rtn, gptq, llm-int8, q4_k, awq"):
        parse_method(name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("*.down_proj=w8-channel", ("*.down_proj", HIGH)),
        ("lm_head=float", ("lm_head", None)),
        ("re:a(?=b).*=w4-g32", ("re:a(?=b).*", LOW)),
        ("*=w2-tensor-asym", ("*", QuantScheme(2, "tensor", symmetric=False))),
    ],
)
def test_an_override_is_read_from_its_last_equals_sign(text, expected):
    assert parse_override(text) == expected


@pytest.mark.parametrize(
    "text", ["", "w4-g32", "=w4-g32", "*.down_proj=", "*.down_proj=int4", "*=Float"]
)
def test_what_is_no_override_is_refused(text):
    with pytest.raises(InputError):
        parse_override(text)
