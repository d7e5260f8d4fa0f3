from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from transformers.pytorch_utils import Conv1D

from checks import FLOATS, product_and_bound, random_weight, schemes
from fewbits.errors import InputError
from fewbits.kernels import KERNELS
from fewbits.linear import (
    EXPERTS,
    ExpertLinears,
    FloatLinear,
    QuantizedLinear,
    experts_forward,
    float_weight,
    replace_experts,
)
from fewbits.native import operators
from fewbits.scheme import QuantScheme
from fewbits.tensor import quantize_tensor
from oracles import half_step

# -- one linear ------------------------------------------------------------------------------------


def conv1d(columns, rows, dtype):
    module = Conv1D(rows, columns).to(dtype)
    nn.init.normal_(module.weight)
    nn.init.normal_(module.bias)
    return module


def assert_multiplies(linear, quantized, x):
    """Within the kernel's bound of `F.linear` by the dequantized weight, and one rounding of a sum."""
    weight = quantize_tensor(float_weight(linear), quantized.scheme)
    exact, bound = product_and_bound(KERNELS[quantized.kernel_name], weight, x)
    if linear.bias is not None:
        exact = exact + linear.bias.double()
        bound = bound + half_step(exact.abs() + bound, x.dtype)
    result = quantized(x)
    assert result.dtype == x.dtype
    # A last eps of float64: there, the exact product is rounded as often as the one that is checked.
    assert ((result.double() - exact).abs() <= bound * (2 if x.dtype == torch.float64 else 1)).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scheme", schemes("tensor", "channel", 8, 32), ids=lambda scheme: scheme.label)
def test_from_float_multiplies_by_the_dequantized_weight(scheme, dtype):
    x = torch.randn(5, 96).to(dtype)
    for linear in (
        nn.Linear(96, 33, dtype=dtype), nn.Linear(96, 33, bias=False, dtype=dtype), conv1d(96, 33, dtype)
    ):  # fmt: skip
        quantized = QuantizedLinear.from_float(linear, scheme)
        assert (quantized.in_features, quantized.out_features) == (96, 33)
        assert_multiplies(linear, quantized, x)


@pytest.mark.parametrize("scheme", schemes("channel", 8, 32), ids=lambda scheme: scheme.label)
def test_small_integers_are_multiplied_exactly(scheme):
    weight = random_weight(scheme, (33, 96), scales=torch.tensor([0.5, 1.0]))
    bias = torch.randint(-8, 9, (33,)).float()
    x = torch.randint(-8, 9, (2, 3, 96)).float()  # all sums below 2**24 halves
    expected = F.linear(x, weight.dequantize(), bias)
    assert torch.equal(QuantizedLinear(weight, bias)(x), expected)
    assert torch.equal(QuantizedLinear(weight)(x), F.linear(x, weight.dequantize()))


def test_the_weight_of_conv1d_is_turned():
    module = conv1d(6, 5, torch.float32)
    assert torch.equal(float_weight(module), module.weight.t())
    linear = nn.Linear(6, 5)
    assert torch.equal(float_weight(linear), linear.weight)


def test_the_float_module_is_not_modified_and_nothing_needs_a_gradient():
    linear = nn.Linear(64, 32)
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    quantized = QuantizedLinear.from_float(linear, QuantScheme(4, "group", 32))
    quantized(torch.randn(2, 64))
    assert torch.equal(linear.weight, weight)
    assert torch.equal(linear.bias, bias)
    assert not any(parameter.requires_grad for parameter in quantized.parameters())


@pytest.mark.parametrize("label", ["w2-g32", "w3-g32", "w3-g8", "w4-g32", "w4-g8-asym", "w8-channel"])
def test_no_float_copy_of_the_weight_is_kept(label):
    scheme = QuantScheme.parse(label)
    quantized = QuantizedLinear.from_float(nn.Linear(128, 64, bias=False), scheme)
    held = sum(tensor.nbytes for tensor in quantized.state_dict().values())
    kernel_bits = 4 if quantized.kernel_name == "int4pack" else scheme.bits
    scales = 64 * scheme.groups(128) * 8  # a float32 scale, and a zero of at most as many bytes
    assert held <= 128 * 64 * kernel_bits // 8 + scales


def test_the_dtype_of_the_inputs_can_be_another_than_that_of_the_scale():
    weight = random_weight(QuantScheme(4, "group", 32), (33, 96), torch.bfloat16)
    quantized = QuantizedLinear(weight, dtype=torch.float32)
    x = torch.randn(5, 96)
    exact, bound = product_and_bound(KERNELS[quantized.kernel_name], weight, x)
    assert ((quantized(x).double() - exact).abs() <= bound).all()


def test_it_says_which_kernel_runs_and_why_not_a_faster_one():
    quantized = QuantizedLinear.from_float(
        nn.Linear(96, 33, dtype=torch.bfloat16), QuantScheme(4, "group", 8)
    )
    assert quantized.kernel_name == "reference"
    assert "multiple of 32" in quantized.refusals["int4pack"]
    assert repr(quantized).startswith("QuantizedLinear(\n  96, 33, w4-g8, reference")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on CUDA, and there is none")
def test_a_linear_on_cuda_is_quantized_there():
    x = torch.randn(5, 128).bfloat16()
    for scheme in schemes("tensor", "channel", 32):
        linear = nn.Linear(128, 33, bias=False, dtype=torch.bfloat16)
        weight = quantize_tensor(linear.weight.detach(), scheme)
        quantized = QuantizedLinear.from_float(linear.cuda(), scheme)
        assert all(tensor.is_cuda for tensor in quantized.state_dict().values())
        exact, bound = product_and_bound(KERNELS[quantized.kernel_name], weight, x)
        assert ((quantized(x.cuda()).cpu().double() - exact).abs() <= bound).all()


def test_a_scheme_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match="does not divide 100"):
        QuantizedLinear.from_float(nn.Linear(100, 8), QuantScheme(4, "group", 32))


@torch.no_grad()
def test_a_float_linear_takes_few_rows_itself_and_leaves_the_rest_to_pytorch(monkeypatch):
    if not operators.available():
        pytest.skip("there is no native library")
    own, taken = operators.float_linear, []
    monkeypatch.setattr(operators, "float_linear", lambda x, *w: taken.append(len(x)) or own(x, *w))
    plain = nn.Linear(96, 40, dtype=torch.bfloat16)
    linear = FloatLinear.around(plain)
    assert linear.weight is plain.weight
    for rows in (1, 2, 3):
        x = torch.randn(rows, 96).bfloat16()
        error = (linear(x).double() - plain.double()(x.double())).abs()
        plain.bfloat16()
        assert (error <= 2**-7 * plain(x).abs() + 2**-12).all()
    assert taken == [1, 2]
    with torch.enable_grad():
        linear(torch.randn(1, 96, requires_grad=True).bfloat16()).sum().backward()
    assert linear.weight.grad is not None
    linear.float()
    assert linear(torch.randn(1, 96)).dtype == torch.float32
    assert taken == [1, 2]


# -- experts -----------------------------------------------------------------------------------
#
# With small integers everywhere, and gates that keep them so, no sum rounds and the order of summation
# does not matter: what runs each expert as linears must equal the model's own forward exactly.

HIDDEN, INNER, EXPERT_COUNT, TOKENS, CHOICES = 32, 64, 5, 7, 2


def mixtral():
    return MixtralExperts(
        MixtralConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERT_COUNT,
                      hidden_act="relu")
    )  # fmt: skip


def qwen3_moe():
    return Qwen3MoeExperts(
        Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=INNER, num_experts=EXPERT_COUNT,
                       hidden_act="relu")
    )  # fmt: skip


def gpt_oss():
    """Stored (in, out), gate and up interleaved, with biases; without alpha its sigmoid is one half."""
    config = GptOssConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERT_COUNT)
    config.swiglu_alpha = 0.0
    return GptOssExperts(config)


def nemotron_h():
    """No gate: one projection up, squared relu."""
    return NemotronHExperts(
        SimpleNamespace(hidden_size=HIDDEN, moe_intermediate_size=INNER, n_routed_experts=EXPERT_COUNT,
                        moe_latent_size=None, mlp_hidden_act="relu2")
    )  # fmt: skip


def muse_spark():
    """A norm after each expert; here one that keeps integers."""
    experts = MuseSparkExperts(
        SimpleNamespace(moe_hidden_size=HIDDEN, moe_intermediate_size=INNER,
                        num_local_experts=EXPERT_COUNT, hidden_act="relu", post_norm_eps=1e-6)
    )  # fmt: skip
    experts.post_expert_norm = nn.ReLU()
    return experts


KINDS = pytest.mark.parametrize(
    "make", [mixtral, qwen3_moe, gpt_oss, nemotron_h, muse_spark], ids=lambda make: make.__name__
)


def small_experts(make):
    """Weights and biases of -1, 0 and 1, run by the model's own forward."""
    experts = make().eval()
    experts.config._experts_implementation = "eager"
    for parameter in experts.parameters():
        parameter.data = torch.randint(-1, 2, parameter.shape).float()
        parameter.requires_grad_(False)
    return experts


def routed(tokens=TOKENS):
    """Hidden states of -1, 0, 1; each token's experts differ, and the last expert is never chosen."""
    hidden = torch.randint(-1, 2, (tokens, HIDDEN)).float()
    index = torch.stack([torch.randperm(EXPERT_COUNT - 1)[:CHOICES] for _ in range(tokens)])
    weights = torch.tensor([0.25, 0.5, 1.0])[torch.randint(3, (tokens, CHOICES))]
    return hidden, index, weights


def put_quantized(experts, name):
    """Random codes for one parameter: as linears in `experts`, dequantized in what is returned."""
    parameter = getattr(experts, name)
    # -3 to 3: gate and up are below 2 * 32 * 3, so no sum passes 64 * 192**2 * 3 < 2**23.
    pieces = [piece.t() if experts.is_transposed else piece for piece in parameter]
    codes = [
        random_weight(QuantScheme(2, "group", 32, symmetric=False), tuple(piece.shape),
                      scales=torch.tensor([1.0]))
        for piece in pieces
    ]  # fmt: skip
    replace_experts(experts, name, [QuantizedLinear(weight) for weight in codes])
    floats = torch.stack([weight.dequantize() for weight in codes])
    return floats.mT.contiguous() if experts.is_transposed else floats


@KINDS
def test_experts_run_as_linears_equal_the_models_own_forward(make):
    experts = small_experts(make)
    for tokens in (1, TOKENS):
        hidden, index, weights = routed(tokens)
        expected = experts(hidden, index, weights)
        assert expected.abs().max() > 0
        assert torch.equal(experts_forward(experts, hidden, index, weights), expected)


@KINDS
def test_quantized_experts_equal_the_models_own_forward_with_dequantized_weights(make):
    experts, floats = small_experts(make), small_experts(make)
    for name, parameter in experts.named_parameters():
        getattr(floats, name).copy_(parameter)
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    for name in (first, "down_proj"):  # after the first, one is quantized and the other is not
        setattr(floats, name, nn.Parameter(put_quantized(experts, name), requires_grad=False))
        hidden, index, weights = routed()
        expected = floats(hidden, index, weights)
        assert expected.abs().max() > 0
        assert torch.equal(experts_forward(experts, hidden, index, weights), expected)
        # Through the door of transformers, as a whole model would.
        assert experts.config._experts_implementation == EXPERTS
        assert torch.equal(experts(hidden, index, weights), expected)
    assert isinstance(experts.down_proj, ExpertLinears)
    assert not any(parameter.ndim == 3 for parameter in experts.parameters())


def test_an_index_past_the_last_expert_means_none():
    experts = small_experts(mixtral)
    hidden, index, weights = routed()
    index[2, 0] = index[4] = EXPERT_COUNT  # one choice of a token, and all of another
    result = experts_forward(experts, hidden, index, weights)
    assert torch.equal(result, experts(hidden, index, weights))
    assert torch.equal(result[4], torch.zeros(HIDDEN))


def test_experts_are_summed_in_float32():
    # Expert outputs 256, 1 and 1 make 258, which bfloat16 has; adding them in bfloat16 makes 256 (a tie
    # to even), twice.
    experts = small_experts(mixtral)
    experts.gate_up_proj.data = torch.zeros_like(experts.gate_up_proj)
    experts.gate_up_proj[:, 0, 0] = experts.gate_up_proj[:, INNER, 0] = 1  # gate and up pass the input
    experts.down_proj.data = torch.zeros_like(experts.down_proj)
    experts.down_proj[:, 0, 0] = torch.tensor([256.0, 1, 1, 0, 0])
    experts.to(torch.bfloat16)
    hidden = torch.zeros(1, HIDDEN, dtype=torch.bfloat16)
    hidden[0, 0] = 1
    index, weights = torch.tensor([[2, 0, 1]]), torch.ones(1, 3, dtype=torch.bfloat16)
    assert experts(hidden, index, weights)[0, 0] == 256
    result = experts_forward(experts, hidden, index, weights)
    assert result[0, 0] == 258
    assert result.dtype == torch.bfloat16
