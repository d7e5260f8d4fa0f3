from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from fewbits.errors import InputError
from fewbits.structure import (
    Matrix,
    cache_argument,
    cache_of,
    find_blocks,
    find_head,
    find_matrices,
    given_cache,
    is_conv1d,
    is_experts,
    is_linear,
    locate,
    skeleton,
)

SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 20,
}  # fmt: skip
LLAMA = SMALL | {"model_type": "llama"}
MIXTRAL = SMALL | {"model_type": "mixtral", "num_local_experts": 3}
QWEN3_MOE = SMALL | {"model_type": "qwen3_moe", "num_experts": 14, "moe_intermediate_size": 8}
GPT_OSS = SMALL | {"model_type": "gpt_oss", "num_local_experts": 3}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_head": 2, "n_layer": 2, "n_inner": 24, "vocab_size": 20}


def shapes_of(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


# -- is_linear -------------------------------------------------------------------------------------


class Spelled(nn.Linear):
    """The same function in other words."""

    def forward(self, x):
        y = x @ self.weight.t()
        return y if self.bias is None else y + self.bias


class Inherited(nn.Linear):
    """No function of its own."""


class Gained(nn.Linear):
    def forward(self, x):
        return 1.01 * F.linear(x, self.weight, self.bias)


class Unbiased(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight)


class Rectified(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias).relu()


class RectifiedInput(nn.Linear):
    def forward(self, x):
        return F.linear(x.relu(), self.weight, self.bias)


class Clipped(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias).clamp(-8, 8)


class Paired(nn.Linear):
    def forward(self, x, other):
        return F.linear(x + other, self.weight, self.bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.Linear, Inherited, Spelled])
def test_what_multiplies_by_its_weight_is_linear(kind, bias):
    assert is_linear(kind(6, 5, bias=bias))
    assert is_linear(kind(6, 5, bias=bias, device="meta"))
    assert is_linear(kind(6, 5, bias=bias, dtype=torch.bfloat16))


@pytest.mark.parametrize("kind", [Gained, Unbiased, Rectified, RectifiedInput, Clipped, Paired])
def test_a_subclass_that_does_more_is_not_linear(kind):
    assert not is_linear(kind(6, 5))


def test_the_projection_that_attention_never_calls_is_not_linear():
    projection = nn.MultiheadAttention(8, 2).out_proj
    assert type(projection).__name__ == "NonDynamicallyQuantizableLinear"
    assert not is_linear(projection)


def test_other_modules_are_not_linear():
    for module in (nn.Bilinear(3, 3, 3), nn.Embedding(3, 3), nn.LayerNorm(3), Conv1D(3, 3)):
        assert not is_linear(module)


def test_asking_leaves_the_module_as_it_was():
    module = Spelled(6, 5)
    before = {name: (p, p.clone()) for name, p in module.named_parameters()}
    is_linear(module)
    assert (module.in_features, module.out_features) == (6, 5)
    for name, parameter in module.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_only_conv1d_is_conv1d():
    assert is_conv1d(Conv1D(5, 6))
    assert not is_conv1d(nn.Linear(6, 5))


def test_experts_behind_the_interface_of_transformers_are_experts():
    experts = skeleton(MIXTRAL).model.layers[0].mlp.experts
    assert is_experts(experts)
    assert not is_experts(nn.Linear(6, 5))


# -- blocks and head ---------------------------------------------------------------------------


def test_blocks_are_the_list_with_the_most_parameters():
    model = nn.Module()
    model.adapters = nn.ModuleList(nn.Linear(2, 2) for _ in range(50))
    model.decoder = nn.Module()
    model.decoder.stack = nn.ModuleList(nn.Linear(20, 20) for _ in range(2))
    assert find_blocks(model) == "decoder.stack"


def test_blocks_are_not_the_lists_inside_of_them():
    model = nn.Module()
    block = nn.Module()
    block.experts = nn.ModuleList(nn.Linear(9, 9) for _ in range(4))
    model.layers = nn.ModuleList([block])
    assert find_blocks(model) == "layers"


def test_a_model_without_a_list_of_modules_is_refused():
    with pytest.raises(InputError, match="no decoder blocks"):
        find_blocks(nn.Sequential(nn.Linear(3, 3)))


@pytest.mark.parametrize(("config", "blocks"), [(LLAMA, "model.layers"), (GPT2, "transformer.h")])
def test_blocks_and_head_of_real_architectures_are_found(config, blocks):
    model = skeleton(config)
    assert find_blocks(model) == blocks
    assert find_head(model) == "lm_head"


def test_a_model_without_a_head_has_none():
    assert find_head(skeleton(LLAMA).model) is None
    assert find_head(nn.Linear(3, 3)) is None


# -- skeleton ----------------------------------------------------------------------------------


def test_a_skeleton_takes_no_memory_and_heeds_the_config():
    model = skeleton(LLAMA | {"quantization_config": {"quant_method": "fewbits"}})
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.lm_head.weight.shape == (20, 16)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (SMALL, "names no model_type"),
        (SMALL | {"model_type": "no-such-model"}, "cannot build"),
        (LLAMA | {"hidden_size": "wide"}, "cannot build"),
    ],
)
def test_a_config_that_builds_no_model_is_refused(config, reason):
    with pytest.raises(InputError, match=reason):
        skeleton(config)


# -- matrices ----------------------------------------------------------------------------------


def test_every_linear_of_every_block_is_found_with_its_place():
    model = skeleton(LLAMA)
    matrices, notes = find_matrices(model, shapes_of(model))
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    names = {f"model.layers.{i}.self_attn.{n}.weight" for i in (0, 1) for n in attention}
    names |= {f"model.layers.{i}.mlp.{n}.weight" for i in (0, 1) for n in mlp}
    assert set(matrices) == names | {"lm_head.weight", "model.embed_tokens.weight"}
    assert notes == []
    assert matrices["lm_head.weight"] == Matrix(
        "lm_head.weight", "lm_head", "weight", "linear", (20, 16), head=True
    )
    name = "model.layers.1.mlp.down_proj"
    assert matrices[f"{name}.weight"] == Matrix(
        f"{name}.weight", name, "weight", "linear", (16, 24), block=1
    )


def test_conv1d_is_found_as_stored_transposed():
    model = skeleton(GPT2)
    matrices, _ = find_matrices(model, shapes_of(model))
    matrix = matrices["transformer.h.0.mlp.c_fc.weight"]
    assert (matrix.kind, matrix.transposed, matrix.shape) == ("conv1d", True, (16, 24))
    assert matrix.rows_columns == (24, 16)


def test_experts_of_a_checkpoint_are_found_with_their_number_and_part():
    model = skeleton(MIXTRAL)
    shapes = {n: s for n, s in shapes_of(model).items() if ".experts." not in n}
    for block in range(2):
        for expert in range(3):
            name = f"model.layers.{block}.block_sparse_moe.experts.{expert}"
            shapes |= {f"{name}.{n}.weight": (24, 16) for n in ("w1", "w3")}
            shapes[f"{name}.w2.weight"] = (16, 24)
    matrices, _ = find_matrices(model, shapes)
    experts = {name: m for name, m in matrices.items() if m.kind == "expert"}
    assert len(experts) == 2 * 3 * 3
    module = "model.layers.1.mlp.experts"
    for part, (name, parameter) in enumerate(
        [("w1", "gate_up_proj"), ("w3", "gate_up_proj"), ("w2", "down_proj")]
    ):
        matrix = experts[f"model.layers.1.block_sparse_moe.experts.2.{name}.weight"]
        assert (matrix.module, matrix.parameter) == (module, parameter)
        assert (matrix.expert, matrix.block, matrix.part) == (2, 1, part % 2)
        assert not matrix.stacked


@pytest.mark.parametrize(("config", "transposed"), [(MIXTRAL, False), (GPT_OSS, True)])
def test_experts_fused_on_disk_are_found_as_stacks(config, transposed):
    model = skeleton(config)
    matrices, _ = find_matrices(model, shapes_of(model))
    matrix = matrices["model.layers.0.mlp.experts.gate_up_proj"]
    assert (matrix.kind, matrix.stacked, matrix.transposed) == ("expert", True, transposed)
    assert matrix.rows_columns == (48, 16)


@pytest.mark.parametrize("odd", [None, r"experts\.1\.", r"experts\.(?P<n>\d+)\.(?P=n)\."])
@pytest.mark.parametrize("config", [MIXTRAL, LLAMA, GPT2, QWEN3_MOE], ids=lambda c: c["model_type"])
def test_names_are_located_together_as_each_by_itself(monkeypatch, config, odd):
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightRenaming, revert_weight_conversion

    model = skeleton(config)
    names = list(revert_weight_conversion(model, model.state_dict()))
    more = [name.replace("layers.1.", "layers.2.") for name in names if "layers.1." in name]
    names += [
        *more,
        *(name.replace("experts.1.", "experts.1.1.") for name in names),
        "model.unknown.3.x",
    ]
    names = list(dict.fromkeys(names))[::-1]
    if odd is not None:  # a pattern for which one number is not as another
        of = conversion_mapping.get_model_conversion_mapping
        also = WeightRenaming(odd, "experts.0.")
        monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda m: [*of(m), also])
    found = locate(model, names)
    for name in names:
        alone = locate(model, [name])
        assert (name in found) == bool(alone)
        if alone:
            one, other = found[name], alone[name]
            assert (one.parameter, one.pattern, one.renamed) == (
                other.parameter, other.pattern, other.renamed
            )  # fmt: skip
    assert list(found) == [name for name in names if name in found]


def test_tensors_that_the_model_does_not_know_are_left_out():
    model = skeleton(LLAMA)
    shapes = shapes_of(model) | {"model.mtp.0.weight": (16, 16), "rotary.inv_freq": (4,)}
    assert set(locate(model, list(shapes))) == set(shapes_of(model))
    matrices, _ = find_matrices(model, shapes)
    assert "model.mtp.0.weight" not in matrices


def test_a_linear_in_other_words_is_found_and_marked():
    model = skeleton(LLAMA)
    model.lm_head = Spelled(16, 20, bias=False, device="meta")
    matrices, notes = find_matrices(model, shapes_of(model))
    assert [name for name, matrix in matrices.items() if matrix.own_forward] == ["lm_head.weight"]
    assert notes == []


def test_a_linear_that_does_more_is_left_in_float_with_a_note():
    model = skeleton(LLAMA)
    model.lm_head = Gained(16, 20, bias=False, device="meta")
    matrices, notes = find_matrices(model, shapes_of(model))
    assert "lm_head.weight" not in matrices
    assert [(note.kind, note.where) for note in notes] == [("skip", "lm_head.weight")]
    assert "Gained does more" in notes[0].what


def test_a_model_that_keeps_experts_outside_of_the_interface_is_refused():
    model = skeleton(SMALL | {"model_type": "jetmoe", "num_local_experts": 4, "kv_channels": 8})
    with pytest.raises(InputError, match=r"outside linears and known experts: model\.layers\.\*\.mlp\."):
        find_matrices(model, shapes_of(model))


@pytest.mark.parametrize("large", [True, False])
def test_big_weights_of_an_unknown_kind_are_refused_and_small_ones_are_not(large):
    model = skeleton(LLAMA)
    seen = sum(p.numel() for p in model.model.layers[0].parameters())
    # A twentieth of the whole is still taken: x / (seen + x) = 1 / 20 at x = seen / 19.
    columns = seen // 19 + (1 if large else 0)
    for block in model.model.layers:
        block.mixer = nn.Module()
        block.mixer.kernel = nn.Parameter(torch.empty(1, 1, columns, device="meta"))
    if large:
        with pytest.raises(InputError, match=r"model\.layers\.\*\.mixer\.kernel \(5%\)"):
            find_matrices(model, shapes_of(model))
    else:
        assert len(find_matrices(model, shapes_of(model))[0]) == 16


def test_slices_are_the_matrices_as_out_by_in():
    stored = torch.arange(24.0).view(2, 3, 4)
    plain = Matrix("x", "x", "weight", "expert", (2, 3, 4))
    across = Matrix("x", "x", "weight", "expert", (2, 3, 4), transposed=True)
    assert [tuple(piece.shape) for piece in across.slices(stored)] == [across.rows_columns] * 2
    assert torch.equal(torch.stack(list(plain.slices(stored))), stored)
    assert torch.equal(torch.stack(list(across.slices(stored))), stored.mT)
    single = Matrix("x", "x", "weight", "conv1d", (3, 4), transposed=True)
    assert torch.equal(next(single.slices(stored[0])), stored[0].t())


@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params"])
def test_a_cache_is_known_by_each_name_that_transformers_has_had(name):
    cache, others = [], dict.fromkeys(("cache", "past_key_values", "cache_params"))
    assert given_cache(others | {name: cache, "use_cache": True}) is cache
    assert given_cache({name: cache}) is cache
    assert given_cache(others) is given_cache({}) is None
    assert cache_of(SimpleNamespace(logits=1, **(others | {name: cache}))) is cache
    assert cache_of(SimpleNamespace(logits=1)) is None
    scope = {}
    exec(f"def forward(ids, {name}=None, use_cache=True): pass", scope)
    assert cache_argument(SimpleNamespace(forward=scope["forward"])) == name
