import copy
import importlib
import pickle
import threading
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
from fewbits.scheme import QuantScheme
from fewbits.tensor import quantize_tensor
from oracles import half_step

native = importlib.import_module("fewbits.native.library")  # a function has its name too

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


# -- linears that read one tensor ------------------------------------------------------------------


class Readers(nn.Module):
    """Three linears of one input, the last of which can be left out."""

    def __init__(self, labels=("w4-g32", "w8-channel-asym", "w3-g32")):
        super().__init__()
        self.all = nn.ModuleList(
            QuantizedLinear.from_float(
                nn.Linear(96, rows, bias=rows != 33, dtype=torch.bfloat16), QuantScheme.parse(label)
            )
            for rows, label in zip((300, 33, 64), labels, strict=True)
        )

    def forward(self, x, last=True):
        return [linear(x) for linear in list(self.all)[: 3 if last else 2]]


@pytest.fixture
def calls(monkeypatch):
    """How many weights each call of the library multiplied by."""
    found = native.library()
    if found is None:
        pytest.skip(f"the native library {native.why_absent()}")
    counts = []
    for name, count in (("linear", lambda _: 1), ("linears", len)):
        own = getattr(type(found), name)

        def counted(self, weights, *others, own=own, count=count):
            counts.append(count(weights))
            return own(self, weights, *others)

        monkeypatch.setattr(type(found), name, counted)
    return counts


@pytest.fixture
def readers(calls):
    """A module that has learned who reads what, and what it gives without having learned."""
    module = Readers()
    with torch.no_grad():
        module(torch.ones(1, 96).bfloat16())
    calls.clear()
    return module


def exact(module, x, **options):
    """Each alone: where gradients are asked for, none is made ahead."""
    with torch.enable_grad():
        return module(x, **options)


def assert_equal(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@torch.no_grad()
def test_linears_that_read_one_tensor_are_multiplied_in_one_call(readers, calls):
    for rows in (1, 3, 8):
        x = torch.randn(1, rows, 96).bfloat16()
        found = readers(x)
        assert calls == [3]
        assert_equal(found, exact(readers, x))
        calls.clear()
    found = readers(torch.randn(9, 96).bfloat16())
    assert calls == [1, 1, 1]


@torch.no_grad()
def test_an_input_that_was_written_to_is_read_again(readers):
    x = torch.randn(1, 96).bfloat16()
    before = x.clone()
    first = readers.all[0](x)
    x += 1
    second = readers.all[1](x)
    assert_equal([first, second], [exact(readers, before)[0], exact(readers, x.clone())[1]])
    readers.all[0](x)
    x.data = torch.randn(1, 96).bfloat16()
    assert_equal([readers.all[1](x)], [exact(readers, x.clone())[1]])


@torch.no_grad()
def test_a_hook_that_changes_an_input_or_a_bias_is_heeded(readers):
    x = torch.randn(1, 96).bfloat16()
    expected = exact(readers, x)
    handle = readers.all[1].register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    assert_equal(readers(x), [expected[0], exact(readers, x)[1], expected[2]])
    handle.remove()
    raised = copy.deepcopy(readers)
    raised.all[2].bias += 1

    @readers.all[2].register_forward_pre_hook
    def raise_bias(module, _):
        module.bias += 1

    assert_equal(readers(x), exact(raised, x))


@torch.no_grad()
def test_those_that_do_not_follow_are_forgotten(readers, calls):
    x = torch.randn(1, 96).bfloat16()
    for _ in range(3):
        assert_equal(readers(x.clone(), last=False), exact(readers, x)[:2])
        assert_equal(readers(x.clone()), exact(readers, x))
    calls.clear()
    for _ in range(3):
        readers(x.clone(), last=False)
    assert sum(calls) <= 3 * 3 + 1


@torch.no_grad()
def test_what_was_made_ahead_of_a_change_is_made_again(readers):
    other, x = copy.deepcopy(readers), torch.randn(1, 96).bfloat16()
    torch.manual_seed(1)
    new = Readers()
    other(x)  # learns
    changes = (
        lambda: other.all[1].load_state_dict(new.all[1].state_dict()),
        lambda: setattr(other.all[1], "kernel", copy.deepcopy(new.all[1].kernel)),
        lambda: setattr(other.all[1], "bias", nn.Parameter(torch.ones(33).bfloat16())),
        lambda: setattr(other.all[1], "bias", None),
    )
    for change in changes:
        other(x.clone())  # learns, where it was forgotten
        again = x.clone()
        other.all[0](again)
        change()
        assert_equal([other.all[1](again)], exact(other, x)[1:2])


@torch.no_grad()
def test_one_that_reads_twice_is_learned_once(readers, calls):
    other, x = copy.deepcopy(readers), torch.randn(1, 96).bfloat16()
    for _ in range(5):
        again = x.clone()
        for i in (0, 1, 1, 1):
            other.all[i](again)
    calls.clear()
    other.all[0](x.clone())
    assert calls == [2]


@torch.no_grad()
def test_one_that_has_long_read_alone_looks_for_no_others(readers, calls):
    fresh = copy.deepcopy(readers)
    for _ in range(20):
        x = torch.randn(1, 96).bfloat16()
        assert_equal([fresh.all[0](x)], exact(readers, x)[:1])
    for expected in ([1, 1, 1], [1, 2]):  # the other two find each other
        calls.clear()
        found = fresh(x.clone())
        assert calls == expected
        assert_equal(found, exact(readers, x))


@torch.no_grad()
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_learns_anew(readers, calls, how):
    other, x = how(readers), torch.randn(1, 96).bfloat16()
    for expected in ([1, 1, 1], [3]):
        calls.clear()
        found = other(x.clone())
        assert calls == expected
        assert_equal(found, exact(readers, x))


@torch.no_grad()
def test_those_that_were_moved_are_learned_anew(readers, calls):
    readers.all[1].float()
    x = torch.randn(1, 96).bfloat16()
    assert_equal(readers(x), exact(readers, x))
    assert calls[:2] == [2, 1]


def test_threads_do_not_take_what_others_made_ahead(readers):
    inputs = [torch.randn(1, 96).bfloat16() for _ in range(6)]
    expected, wrong = [exact(readers, x) for x in inputs], []

    @torch.no_grad()
    def call(start):
        for i in range(150):
            which = (start + i) % len(inputs)
            found = readers(inputs[which])
            if not all(torch.equal(a, b) for a, b in zip(found, expected[which], strict=True)):
                wrong.append(which)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.inference_mode()
def test_inputs_that_do_not_tell_of_changes_are_read_by_each(readers, calls):
    readers(torch.randn(1, 96).bfloat16())
    assert calls == [1, 1, 1]


@torch.no_grad()
def test_a_float_linear_takes_few_rows_itself_and_leaves_the_rest_to_pytorch(monkeypatch, calls):
    found, taken = native.library(), []
    own = type(found).float_linear
    monkeypatch.setattr(type(found), "float_linear", lambda *a: taken.append(len(a[2])) or own(*a))
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
