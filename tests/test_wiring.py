"""The wiring of every tiny architecture, and of blocks made to mislead."""

import copy
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.pytorch_utils import Conv1D

from fewbits import wiring
from fewbits.errors import InputError
from fewbits.linear import EXPERTS, ExpertLinears, split_experts
from fewbits.structure import find_blocks, is_conv1d, is_experts, is_linear
from fewbits.wiring import (
    InputGroup,
    Rows,
    ScalePair,
    find_wiring,
    scale_readers,
    scale_source,
    signature,
)
from models import ALL, VOCABULARY, tiny_model

MIXTURES = ("mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "qwen2_moe", "olmoe",
            "granitemoe", "qwen3_next", "glm4_moe", "jamba")  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


def tokens(seed=1):
    return torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model):
    return model(tokens(seed=2), use_cache=False).logits


def runs(model):
    """For each block, what runs it on the inputs that it gets in the model."""
    calls, blocks = {}, list(model.get_submodule(find_blocks(model)))
    handles = [
        block.register_forward_pre_hook(
            lambda block, args, kwargs: calls.update({block: (args, dict(kwargs))}), with_kwargs=True
        )
        for block in blocks
    ]
    with torch.no_grad():
        model(tokens(), use_cache=False)
    for handle in handles:
        handle.remove()

    def run(block):
        args, kwargs = calls[block]
        output = block(*args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    return [(block, lambda block=block: run(block)) for block in blocks]


def wired(model):
    split_experts(model)
    return [find_wiring(block, run) for block, run in runs(model)]


@cache
def tiny(model_type):
    """The model and the wiring of each of its blocks; not to be changed."""
    model = tiny_model(model_type).float()
    return model, wired(model)


def spelled(wirings):
    """Pairs as `source [part] form > readers`, experts without their number."""
    lines = {}
    for pair in [pair for found in wirings for pair in found.pairs]:
        whole = (pair.rows.start, pair.rows.step) == (0, 1)
        part = "" if whole else f" [{pair.rows.start}::{pair.rows.step}]"
        form = " (1+w)" if pair.form == "one_plus_weight" else ""
        readers = " ".join(dict.fromkeys(map(_short, pair.readers)))
        lines[f"{_short(pair.source)}{part}{form} > {readers}"] = None
    return list(lines)


def _short(path):
    *owner, last = path.split(".")
    return f"{owner[-1]}.*" if last.isdigit() else last


# -- experts as linears ------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MIXTURES)
def test_a_model_with_split_experts_computes_the_same(model_type):
    model = tiny_model(model_type).float()
    model.config._experts_implementation = "eager"
    eager = logits(model)
    split_experts(nn.Module())  # registers nothing, changes nothing
    assert torch.equal(logits(model), eager)
    split_experts(model)
    mixtures = [module for module in model.modules() if is_experts(module)]
    assert mixtures
    assert all(module.config._experts_implementation == EXPERTS for module in mixtures)
    assert not any(p.ndim == 3 for module in mixtures for p in module.parameters())
    # Only the order in which a token's experts are summed differs, and where sums are rounded.
    assert (logits(model) - eager).abs().max() <= 1e-5 * eager.abs().max()


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_the_linears_of_experts_are_views_of_the_fused_parameter(model_type):
    model = tiny_model(model_type)
    experts = next(module for module in model.modules() if is_experts(module))
    fused = dict(experts.named_parameters())
    split_experts(model)
    split_experts(model)  # a second time does nothing
    for name in ("gate_up_proj", "down_proj"):
        linears = getattr(experts, name)
        assert isinstance(linears, ExpertLinears)
        for number, linear in enumerate(linears):
            matrix = fused[name][number]
            assert torch.equal(linear.weight, matrix.t() if experts.is_transposed else matrix)
            assert (linear.out_features, linear.in_features) == linear.weight.shape
            assert linear.weight.untyped_storage().data_ptr() == matrix.untyped_storage().data_ptr()
            assert is_linear(linear)
            assert not linear.weight.requires_grad


# -- every architecture ------------------------------------------------------------------------------

BARE = {"jamba": {"mamba.dt_proj"}}  # it multiplies by this weight without calling the module


@pytest.mark.parametrize("model_type", ALL)
def test_every_linear_is_in_one_group_or_reported(model_type):
    model, wirings = tiny(model_type)
    unseen = set()
    for block, found in zip(model.get_submodule(find_blocks(model)), wirings, strict=True):
        linears = [n for n, m in block.named_modules() if is_linear(m) or is_conv1d(m)]
        grouped = [name for group in found.groups for name in group.linears]
        assert sorted([*grouped, *found.unseen]) == sorted(linears)
        unseen.update(found.unseen)
        for group in found.groups:
            assert set(group.linears) <= set(group.readers)
        readers = [pair.readers for pair in found.pairs]
        assert len(set(readers)) == len(readers)
        assert set(readers) <= {group.readers for group in found.groups}
    assert unseen == BARE.get(model_type, set())


@pytest.mark.parametrize("model_type", ALL)
def test_scaling_any_pair_leaves_the_model_as_it_was(model_type):
    model, wirings = tiny(model_type)
    model = copy.deepcopy(model)
    expected = logits(model)  # of other tokens than those of the probe, through all blocks
    for block, found in zip(model.get_submodule(find_blocks(model)), wirings, strict=True):
        for pair in found.pairs:  # each on top of those before
            s = torch.rand(pair.rows.count) + 0.5
            s[torch.rand(len(s)) < 0.5] /= 100  # half of the values get 100 times larger
            scale_readers(block, pair, s)
            effect = (logits(model) - expected).abs().max()
            scale_source(block, pair, s)
            assert (logits(model) - expected).abs().max() <= 1e-4 * effect, pair


QKV, GATE_UP = "q_proj k_proj v_proj", "gate_proj up_proj"
LLAMA = [
    f"input_layernorm > {QKV}",
    f"post_attention_layernorm > {GATE_UP}",
    "up_proj > down_proj",
]
GEMMA2 = [
    f"input_layernorm (1+w) > {QKV}",
    f"pre_feedforward_layernorm (1+w) > {GATE_UP}",
    "up_proj > down_proj",
]
EXPECTED = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "stablelm": LLAMA,
    "granite": LLAMA,
    "smollm3": LLAMA,
    "gemma": [
        f"input_layernorm (1+w) > {QKV}",
        f"post_attention_layernorm (1+w) > {GATE_UP}",
        "up_proj > down_proj",
    ],
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA2,
    "phi3": [
        "input_layernorm > qkv_proj",
        "post_attention_layernorm > gate_up_proj",
        "gate_up_proj [96::1] > down_proj",
    ],
    "phi": [f"input_layernorm > {QKV} fc1"],
    "opt": [
        f"self_attn_layer_norm > {QKV}",
        "v_proj > out_proj",
        "final_layer_norm > fc1",
        "fc1 > fc2",
    ],
    "gpt2": ["ln_1 > c_attn", "c_attn [128::1] > c_proj", "ln_2 > c_fc"],
    "mpt": ["norm_1 > Wqkv", "Wqkv [128::1] > out_proj", "norm_2 > up_proj"],
    "gpt_neox": ["input_layernorm > query_key_value", "post_attention_layernorm > dense_h_to_4h"],
    "bloom": ["input_layernorm > query_key_value", "post_attention_layernorm > dense_h_to_4h"],
    "falcon": ["input_layernorm > query_key_value dense_h_to_4h"],
    # Nothing before q, k and v has a weight; o_proj does not read q_norm, wide as it is.
    "olmo": ["v_proj > o_proj", "up_proj > down_proj"],
    "olmo2": ["v_proj > o_proj", "up_proj > down_proj"],
    "mixtral": [
        f"input_layernorm > {QKV}",
        "post_attention_layernorm > gate gate_up_proj.*",
        "gate_up_proj.* [96::1] > down_proj.*",
    ],
    "qwen3_moe": [
        f"input_layernorm > {QKV}",
        "post_attention_layernorm > gate gate_up_proj.*",
        "gate_up_proj.* [32::1] > down_proj.*",
    ],
    # Its experts multiply by 1 + up, and both sides are clamped.
    "gpt_oss": [f"input_layernorm > {QKV}", "post_attention_layernorm > router gate_up_proj.*"],
    "deepseek_v3": [
        "input_layernorm > q_a_proj kv_a_proj_with_mqa",
        "q_a_layernorm > q_b_proj",
        "kv_a_layernorm > kv_b_proj",
        f"post_attention_layernorm > {GATE_UP}",
        "up_proj > down_proj",
        f"post_attention_layernorm > gate gate_up_proj.* {GATE_UP}",
        "gate_up_proj.* [32::1] > down_proj.*",
    ],
}


@pytest.mark.parametrize("model_type", EXPECTED)
def test_the_pairs_of_known_architectures_are_found(model_type):
    assert spelled(tiny(model_type)[1]) == EXPECTED[model_type]


def test_the_groups_of_a_mixture_hold_all_experts_also_those_without_a_token():
    model = tiny_model("qwen3_moe", num_experts=32, num_experts_per_tok=1).float()
    found = wired(model)[0]
    first = InputGroup(
        tuple(f"mlp.experts.gate_up_proj.{i}" for i in range(32)),
        ("mlp.gate", *(f"mlp.experts.gate_up_proj.{i}" for i in range(32))),
    )
    second = [InputGroup((name,), (name,)) for name in (f"mlp.experts.down_proj.{i}" for i in range(32))]
    assert list(found.groups[2:]) == [first, *second]
    assert found.unseen == ()
    # 24 tokens reach at most 24 of them.
    assert [pair.readers for pair in found.pairs[1:]] == [first.readers, *(g.readers for g in second)]
    assert found.pairs[-1] == ScalePair(
        "mlp.experts.gate_up_proj.31", "linear", Rows(32, 1, 32), ("mlp.experts.down_proj.31",)
    )


@pytest.mark.parametrize(
    ("model_type", "pair"), [("llama", "v_proj > o_proj"), ("phi3", "qkv_proj [128::1] > o_proj")]
)
def test_values_are_a_source_where_each_head_has_its_own(model_type, pair):
    model = tiny_model(model_type, num_key_value_heads=4).float()
    assert pair in spelled(wired(model))
    assert pair not in spelled(tiny(model_type)[1])


def test_a_clipped_path_is_refused_although_nothing_is_clipped_now(monkeypatch):
    model = tiny_model("olmo", clip_qkv=20.0).float()
    assert spelled(wired(model)) == ["up_proj > down_proj"]
    monkeypatch.setattr(wiring, "_LARGE", 1)  # without the second try, it is taken
    assert spelled(wired(model)) == EXPECTED["olmo"]


def test_a_norm_that_is_the_residual_too_is_refused():
    model = tiny_model("bloom", apply_residual_connection_post_layernorm=True).float()
    assert spelled(wired(model)) == []


def test_interleaved_experts_with_a_bias_are_scaled(monkeypatch):
    def gate(_, x):
        return F.silu(x[..., ::2]) * x[..., 1::2]

    monkeypatch.setattr(GptOssExperts, "_apply_gate", gate)
    model = tiny_model("gpt_oss").float()
    split_experts(model)
    expected = logits(model)
    found = wired(model)
    assert torch.equal(logits(model), expected)
    assert spelled(found)[2:] == ["gate_up_proj.* [1::2] > down_proj.*"]
    block = model.model.layers[0]
    pairs = [pair for pair in found[0].pairs if "down_proj" in pair.readers[0]]
    bias = block.mlp.experts.gate_up_proj_bias
    before = bias.clone()
    for pair in pairs:
        s = torch.rand(pair.rows.count) + 0.5
        scale_readers(block, pair, s)
        scale_source(block, pair, s)
    assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(bias[:, ::2], before[:, ::2])
    assert (bias[:, 1::2] != before[:, 1::2]).all()


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_a_residual_stream_of_huge_values_hides_nothing(model_type):
    model, expected = tiny(model_type)
    model = copy.deepcopy(model)
    # A last bit of these is up to 0.007 of the largest effect, and sometimes one flips.
    model.model.embed_tokens.weight.data[:, :48] *= 1e5
    assert [find_wiring(block, run) for block, run in runs(model)] == expected


def test_blocks_with_the_same_signature_have_the_same_wiring():
    signatures = set()
    for model_type in ("llama", "mistral", "qwen3", "jamba", "deepseek_v3", "qwen3_next"):
        model, wirings = tiny(model_type)
        known = {}
        for block, found in zip(model.get_submodule(find_blocks(model)), wirings, strict=True):
            assert known.setdefault(signature(block), found) == found
        signatures |= known.keys()
    assert len(signatures) == 1 + 1 + 1 + 3 + 2 + 2
    block = nn.Linear(3, 3)
    assert signature(block) != signature(nn.Linear(3, 3, bias=False))
    assert signature(block) != signature(nn.Linear(3, 3).bfloat16())


# -- made-up blocks ----------------------------------------------------------------------------------


class Norm(nn.Module):
    """Both forms, with a bias."""

    def __init__(self, width, offset):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))
        self.offset = offset

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:]) * (self.offset + self.weight) + self.bias


class Block(nn.Module):
    """A norm, two readers of which one is stored transposed, and a branch that can mislead."""

    def __init__(self, offset=0, mislead=lambda at: at.y):
        super().__init__()
        self.norm, self.first, self.second = Norm(6, offset), nn.Linear(6, 8), Conv1D(8, 6)
        self.last, self.idle = Conv1D(6, 8), nn.Linear(6, 6)
        self.mislead = mislead
        nn.init.normal_(self.second.weight)
        nn.init.normal_(self.last.weight)
        self.x = torch.randn(3, 5, 6)

    def forward(self, x):
        y = self.mislead(SimpleNamespace(block=self, x=x, y=self.norm(x)))
        gate = torch.sigmoid(self.first(y))
        return x + self.last(gate * self.second(y.reshape(-1, 6)).view(gate.shape))

    def wiring(self):
        return find_wiring(self, lambda: self(self.x))


@pytest.mark.parametrize(("offset", "form"), [(0, "weight"), (1, "one_plus_weight")])
def test_both_forms_of_a_norm_and_both_kinds_of_linears_are_found_and_scaled(offset, form):
    block = Block(offset)
    found = block.wiring()
    readers = ("first", "second")
    pairs = (
        ScalePair("norm", form, Rows(0, 1, 6), readers),
        ScalePair("second", "linear", Rows(0, 1, 8), ("last",)),
    )
    assert found.groups == (InputGroup(readers, readers), InputGroup(("last",), ("last",)))
    assert found.pairs == pairs
    assert found.unseen == ("idle",)
    block.double()
    block.x = block.x.double()
    before, expected = copy.deepcopy(block), block(block.x)
    scales = [torch.rand(pair.rows.count).double() + 0.5 for pair in pairs]
    for pair, s in zip(pairs, scales, strict=True):
        scale_source(block, pair, s)
        scale_readers(block, pair, s)
    torch.testing.assert_close(block(block.x), expected)
    torch.testing.assert_close(offset + block.norm.weight, (offset + before.norm.weight) / scales[0])
    torch.testing.assert_close(block.first.weight, before.first.weight * scales[0])
    torch.testing.assert_close(block.second.bias, before.second.bias / scales[1])
    torch.testing.assert_close(block.last.weight, before.last.weight * scales[1][:, None])


MISLEADING = {
    "the norm's output is changed in between": lambda at: at.y.tanh(),
    "the readers read another tensor of that width": lambda at: at.x,
    "a small part is not scaled": lambda at: at.y + 0.02 * at.x,
    "the norm feeds the residual too": lambda at: (at.x.add_(at.y), at.y)[1],
    "a reader multiplies another tensor too": lambda at: (at.x.add_(at.block.first(at.x).sum()), at.y)[
        1
    ],
    "a module that is no linear reads it too": lambda at: (at.x.add_(at.y.sum()), at.y)[1],
}


@pytest.mark.parametrize("mislead", MISLEADING.values(), ids=MISLEADING)
def test_a_norm_that_does_not_alone_make_what_is_read_is_refused(mislead):
    block = Block(mislead=mislead)
    x = block.x
    found = find_wiring(block, lambda: block(x.clone()))
    assert [pair.source for pair in found.pairs] == ["second"]


def test_linears_that_do_not_read_all_the_same_tensors_are_not_grouped():
    block = Block(mislead=lambda at: (at.block.idle(at.y), at.block.idle(at.x), at.y)[-1])
    assert [group.linears for group in block.wiring().groups] == [
        ("idle",), ("first", "second"), ("last",)
    ]  # fmt: skip
    block = Block(mislead=lambda at: (at.block.first(at.x), at.y)[1])
    assert [group.linears for group in block.wiring().groups] == [("first",), ("second",), ("last",)]


def test_a_tensor_that_was_changed_in_place_is_another_one():
    block = Block(mislead=lambda at: (at.block.idle(at.y), at.y.mul_(2))[1])
    assert [group.linears for group in block.wiring().groups] == [
        ("idle",), ("first", "second"), ("last",)
    ]  # fmt: skip


def test_a_norm_is_preferred_to_a_linear():
    # Each scales what `last` reads; the linear is called later.
    block = Block()
    block.norm = Norm(8, 0)
    block.forward = lambda x: x + block.last(block.norm(F.pad(x, (1, 1), value=1)) * block.second(x))
    (pair,) = find_wiring(block, lambda: block.forward(block.x)).pairs
    assert (pair.source, pair.form, pair.readers) == ("norm", "weight", ("last",))


def test_the_block_is_bit_for_bit_what_it_was():
    block = Block()
    state = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    addresses = [parameter.data_ptr() for parameter in block.parameters()]
    block.wiring()
    total = _runs_until(block, None)
    assert total > 5
    for failing in range(total):
        with pytest.raises(ZeroDivisionError):
            _runs_until(block, failing)
        assert all(torch.equal(state[name], tensor) for name, tensor in block.state_dict().items())
        assert [parameter.data_ptr() for parameter in block.parameters()] == addresses
        assert not any(module._forward_pre_hooks for module in block.modules())


def _runs_until(block, failing):
    count = 0

    def run():
        nonlocal count
        if count == failing:
            raise ZeroDivisionError
        count += 1
        return block(block.x)

    find_wiring(block, run)
    return count


def test_a_block_that_is_not_in_float32_is_refused():
    block = Block().bfloat16()
    with pytest.raises(InputError, match=r"float32.*bfloat16"):
        find_wiring(block, lambda: block(block.x.bfloat16()))


def test_rows_are_those_of_a_slice():
    x = torch.arange(12)
    assert Rows(1, 2, 3).of(x).tolist() == [1, 3, 5]
    assert Rows(8, 1, 4).of(x).tolist() == [8, 9, 10, 11]
    assert replace(Rows(0, 2, 6), start=1).of(x).tolist() == [1, 3, 5, 7, 9, 11]
