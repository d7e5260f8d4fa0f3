"""Weights that make up for what was rounded before: by least squares, on inputs of plain blocks."""

import math

import pytest
import torch
from torch import Tensor

from checks import RECORDED, Recording
from fewbits import GPTQ, QuantScheme, load, measure, quantize
from fewbits.drift import make_up
from fewbits.ledger import read_ledger
from fewbits.linear import float_weight
from fewbits.statistics import InputStats
from models import VOCABULARY, tiny_checkpoint

G32 = QuantScheme(3, "group", 32)
IDS = torch.randint(3, VOCABULARY, (24, 32), generator=torch.Generator().manual_seed(2))

pytestmark = pytest.mark.usefixtures("one_thread", "float32_products")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Makes tiny checkpoints, each once."""
    folder = tmp_path_factory.mktemp("tiny")

    def make(model_type: str):
        path = folder / model_type
        if not path.exists():
            torch.manual_seed(0)
            tiny_checkpoint(path, model_type)
        return path

    return make


def least_squares(weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The V with the least mean |W x - V y|^2 + sum over columns k of share H_kk |V_k - W_k|^2."""
    weight, x, y = weight.double(), x.double(), y.double()
    share = ((0.1 + 6 * y.shape[1] / len(y)) * y.square().mean(0)).sqrt()
    left = torch.cat([y / math.sqrt(len(y)), torch.diag(share)])
    right = torch.cat(
        [(x - y) @ weight.T / math.sqrt(len(y)), weight.new_zeros(len(share), len(weight))]
    )
    return weight + torch.linalg.lstsq(left, right).solution.T


@pytest.mark.parametrize(("tokens", "columns", "rows"), [(200, 24, 10), (40, 24, 1), (12, 24, 5)])
def test_what_makes_up_for_drift_is_the_solution_of_least_squares(tokens, columns, rows):
    torch.manual_seed(tokens)
    weight = torch.randn(rows, columns)
    y = torch.randn(tokens, columns) @ torch.randn(columns, columns)
    x = y + 0.3 * y.roll(1, -1) + 0.5 * torch.randn(tokens, columns)
    found = make_up(weight, y.T @ y / tokens, (x - y).T @ y / tokens, tokens)
    wanted = least_squares(weight, x, y)
    assert (found - wanted).norm() <= 1e-4 * wanted.norm()
    assert (wanted - weight).norm() > 0.02 * weight.norm()  # 200 times what is allowed above


def test_a_hessian_that_is_not_finite_makes_up_for_nothing():
    hessian = torch.eye(4)
    hessian[1, 1] = math.nan
    assert make_up(torch.ones(2, 4), hessian, torch.eye(4), 9) is None
    assert make_up(torch.ones(2, 4), torch.eye(4), torch.full((4, 4), math.inf), 9) is None


def test_a_column_that_is_always_zero_keeps_its_weights():
    y = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    y[:, 2] = 0
    x = y.clone()
    x[:, 0] *= 1.5
    weight = torch.ones(2, 4)
    found = make_up(weight, y.T @ y / 50, (x - y).T @ y / 50, 10**6)
    assert torch.equal(found[:, 2], weight[:, 2])
    assert (found[:, 0] > 1.3).all()


def test_inputs_of_other_tokens_are_not_compared():
    stats = InputStats.of(4, frozenset({"hessian"}))
    stats.drift = torch.zeros(4, 4)
    stats.add_drifted(torch.ones(3, 4), torch.ones(2, 4))
    assert stats.tokens == 2
    assert not stats.drift.any()
    stats.add_drifted(torch.ones(3, 4), torch.full((3, 4), 0.5))
    assert torch.equal(stats.drift, torch.full((4, 4), 0.75))


LLAMA = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
GPT2 = (("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",))
MIXTRAL = LLAMA[:2]  # experts come last, and are as they were


@torch.no_grad()
def read_by(model, linear, ids) -> Tensor:
    """Inputs (tokens, in) of a module."""
    found = []
    handle = linear.register_forward_pre_hook(lambda _m, args: found.append(args[0].flatten(0, -2)))
    model(ids, use_cache=False)
    handle.remove()
    return torch.cat(found)


@pytest.mark.parametrize(
    ("model_type", "groups"), [("llama", LLAMA), ("gpt2", GPT2), ("mixtral", MIXTRAL)]
)
def test_each_linear_is_rounded_after_it_made_up_for_those_before_it(tiny, tmp_path, model_type, groups):
    RECORDED.clear()
    out, source = tmp_path / "out", tiny(model_type)
    method = Recording(corrected=True)
    ledger = quantize(source, out, method=method, scheme=G32, calibration=IDS).ledger
    order = [report["name"] for report in ledger.blocks[0]["matrices"]]
    before, after = (load(source, dtype=torch.float32) for _ in range(2))
    written = load(out, dtype=torch.float32)
    path = {"gpt2": "transformer.h.0"}.get(model_type, "model.layers.0")
    ids = IDS[:-1]  # the last is held out
    for model in (before, after):  # states are bfloat16
        block = model.get_submodule(path)
        block.register_forward_pre_hook(lambda _m, args: (args[0].bfloat16().float(), *args[1:]))
    for number, group in enumerate(groups):
        weight, hessian = RECORDED[number]
        x, y = (read_by(m, m.get_submodule(f"{path}.{group[0]}"), ids) for m in (before, after))
        mean = y.double().T @ y.double() / len(y)
        assert (hessian - mean).abs().max() <= 1e-4 * mean.abs().max()
        group = sorted(group, key=lambda name: order.index(f"{path}.{name}.weight"))
        own = torch.cat([float_weight(before.get_submodule(f"{path}.{name}")) for name in group])
        wanted = own if number == 0 else least_squares(own, x, y)
        if number == 0:
            assert torch.equal(weight, own)
        else:
            assert (weight - wanted).norm() <= 0.02 * (wanted - own).norm()
            assert (wanted - own).norm() > 0.003 * own.norm()
        for name in group:
            codes = written.get_submodule(f"{path}.{name}").weight
            float_weight(after.get_submodule(f"{path}.{name}")).copy_(codes)


def test_blocks_come_out_nearer_to_those_in_float(tiny, tmp_path):
    logs = []
    for model_type in ("llama", "gpt2", "gemma2", "phi3", "mixtral", "qwen2", "stablelm", "bloom"):
        errors = []
        for corrected in (False, True):
            out = tmp_path / f"{model_type}-{corrected}"
            quantize(
                tiny(model_type), out, method=GPTQ(corrected=corrected), scheme=G32, calibration=IDS
            )
            blocks = read_ledger(out).blocks
            errors.append(math.prod(block["error"] for block in blocks))
            made_up = [m["corrected"] for block in blocks for m in block["matrices"]]
            assert any(share is not None for share in made_up) == corrected
        logs.append(math.log(errors[1] / errors[0]))
    assert math.exp(sum(logs) / len(logs)) < 0.9


def test_statistics_are_of_the_float_model_and_correct_nothing(tiny, tmp_path):
    measure(tiny("llama"), tmp_path / "stats", calibration=IDS)
    result = quantize(
        tiny("llama"), tmp_path / "out", method="awq+gptq", scheme=G32, statistics=tmp_path / "stats"
    )
    assert result.ledger.request["options"]["corrected"] is False
    assert all(m["corrected"] is None for block in result.ledger.blocks for m in block["matrices"])
