"""Trellis codes, from the definition to a model that runs on them."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import fewbits
from fewbits import trellis
from fewbits.affine import choose_qparams
from fewbits.checkpoint import open_checkpoint
from fewbits.cli import app
from fewbits.convert import convert, open_quantized
from fewbits.errors import InputError
from fewbits.kernels import Reference
from fewbits.linear import QuantizedEmbedding, QuantizedLinear
from fewbits.load import read_matrix
from fewbits.methods import GPTQ, Rounding, WeightedRTN
from fewbits.methods.learned import Learned
from fewbits.native import library
from fewbits.native.library import ISAS
from fewbits.scheme import QuantScheme
from fewbits.tensor import QuantizedTensor, quantize_tensor
from models import tiny_checkpoint

BITS = (2, 3, 4)
W4 = QuantScheme.parse("w4-g32-trellis")
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 128}
IDS = torch.arange(3, 3 + 96).reshape(4, 24)


def value_of(codes: list[int], row: int, bits: int) -> int:
    """By the definition: the last 8 bits of the chain of codes that ends with a row's own."""
    first = row - row % 32
    window = "".join(f"{codes[first + (row - first - i) % 32]:0{bits}b}" for i in range(8)[::-1])
    return int(trellis.table(bits)[int(window[-8:], 2)])


def best_cost(x: np.ndarray, scale: np.ndarray, bits: int) -> float:
    """Of all closed chains: the shortest way through the trellis from each state back to it."""
    states, entries = 1 << (8 - bits), trellis.table(bits).numpy().astype(float)
    windows = np.arange(256)
    ways = np.where(np.eye(states), 0.0, np.inf)  # from each state to each
    for value, step in zip(x, scale, strict=True):
        reached = ways[:, windows >> bits] + (value - step * entries) ** 2
        ways = np.stack([reached[:, windows % states == s].min(1) for s in range(states)], 1)
    return float(ways.diagonal().min())


@pytest.mark.parametrize("bits", BITS)
def test_values_are_those_of_the_definition(bits):
    codes = torch.randint(0, 2**bits, (64, 3), dtype=torch.uint8)
    found = trellis.values(codes, bits)
    for column in range(3):
        chain = codes[:, column].tolist()
        assert found[:, column].tolist() == [value_of(chain, row, bits) for row in range(64)]
    rows = torch.tensor([33, 0, 63, 33])
    some = trellis.look_up([codes[r] for r in trellis.before(rows, bits)], bits)
    assert torch.equal(some, found[rows])


@pytest.mark.parametrize("bits", BITS)
def test_chains_are_hardly_worse_than_the_best_of_all(bits, monkeypatch):
    monkeypatch.setattr(trellis, "library", lambda: None)
    x = torch.randn(20, 32)
    scale = (0.5 + torch.rand(20, 32)) / trellis.UNIT[bits]
    codes = trellis.find_chains(x, scale, bits)
    error = x.double() - scale * trellis.values(codes.t().contiguous(), bits).t().double()
    found = error.square().sum(1).numpy()
    best = np.array([best_cost(a, s, bits) for a, s in zip(x.numpy(), scale.numpy(), strict=True)])
    assert (found >= best * (1 - 1e-6)).all()
    assert found.mean() <= {2: 1.06, 3: 1.05, 4: 1.02}[bits] * best.mean()
    assert (found <= best * (1 + 1e-6)).mean() >= 0.5  # where it closes is mostly found


@pytest.mark.skipif(library() is None, reason="there is no native library")
@pytest.mark.parametrize("bits", BITS)
def test_the_native_library_finds_the_same_chains_on_every_processor(bits, monkeypatch):
    x, scale = torch.randn(37, 32), torch.rand(37, 32) / trellis.UNIT[bits]
    x[3], scale[5], scale[6, 4] = 0, 0, 0
    results = []
    for isa in ISAS:
        if library().use(isa):
            results.append(trellis.find_chains(x, scale, bits))
    library().use(None)
    monkeypatch.setattr(trellis, "library", lambda: None)
    wanted = trellis.find_chains(x, scale, bits)
    assert len(results) > 1
    cost = lambda c: (x - scale * trellis.values(c.t().contiguous(), bits).t()).square().sum(1)  # noqa: E731
    for found in results:  # of chains that cost the same any may be taken
        same = (found == wanted).all(1) | (cost(found) == cost(wanted))
        assert bool(same.all())
        assert torch.equal(found, results[0])


def lloyd_max(bits: int) -> float:
    """The least squared error of 2**bits values for normal numbers, by Lloyd's iteration."""
    x = np.sort(np.random.default_rng(0).standard_normal(100_000))
    values = np.quantile(x, (np.arange(2**bits) + 0.5) / 2**bits)
    for _ in range(200):
        nearest = np.abs(x[:, None] - values).argmin(1)
        values = np.array([x[nearest == i].mean() for i in range(2**bits)])
    return float(((x - values[nearest]) ** 2).mean())


@pytest.mark.parametrize("bits", BITS)
def test_normal_weights_lose_less_than_by_the_best_values_alone(bits):
    weight = torch.randn(512, 256)
    scheme = QuantScheme(bits, "channel", trellis=True)
    error = (weight - quantize_tensor(weight, scheme).dequantize()).square().mean()
    assert 4.0**-bits < error < {2: 0.75, 3: 0.68, 4: 0.66}[bits] * lloyd_max(bits)


def test_scales_are_the_root_mean_square_and_zeros_stay_zeros():
    weight = torch.randn(32, 64) * 0.02
    weight[3, 32:] = 0
    scale, points = choose_qparams(weight, W4)
    rms = weight.view(32, 2, 32).square().mean(-1).sqrt() / trellis.UNIT[4]
    assert torch.allclose(scale, rms, rtol=1e-6)
    assert not points.any()
    assert not quantize_tensor(weight, W4).dequantize()[3, 32:].any()
    tiny = quantize_tensor(weight * 1e-6, W4, torch.float16)
    assert bool((tiny.scale[weight.view(32, 2, 32).abs().sum(-1) > 0] > 0).all())


def problem(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    mixing = torch.randn(columns, columns) * torch.arange(1, columns + 1)[:, None] ** -0.7
    x = torch.randn(4 * columns, columns) @ mixing
    return torch.randn(rows, columns), x.T @ x / len(x)


def loss(weight: Tensor, quantized: QuantizedTensor, hessian: Tensor) -> float:
    error = weight - quantized.dequantize()
    return float(torch.trace(error @ hessian @ error.T))


def test_gptq_chooses_each_column_given_what_those_before_it_lost():
    """By the definition: the columns that are left answer errors so far with least squares."""
    weight, hessian = problem(64, 96)
    quantized, _ = GPTQ(act_order=False, sweeps=0)(weight, W4, {"hessian": hessian})
    damped = (hessian + 0.01 * hessian.diagonal().diag()).double()
    values = quantized.dequantize(torch.float64)
    left = weight.double().clone()
    for k in range(96):
        step = quantized.scale[:, k // 32]
        codes = trellis.encode(left[:, k, None].float(), step[:, None], 4)[:, 0]
        assert float((codes == quantized.codes[:, k]).float().mean()) > 0.99
        rest = slice(k + 1, 96)
        lost = left[:, k] - values[:, k]
        if k < 95:
            left[:, rest] += lost[:, None] * torch.linalg.solve(damped[rest, rest], damped[rest, k])


def test_gptq_and_its_sweeps_lower_the_error_and_it_is_below_that_of_plain_codes():
    weight, hessian = problem(64, 96)
    stats = {"hessian": hessian}
    damped = hessian + 0.01 * hessian.diagonal().diag()
    found = [loss(weight, GPTQ(sweeps=n)(weight, W4, stats)[0], damped) for n in (0, 1, 2)]
    assert found == sorted(found, reverse=True)
    plain, _ = GPTQ(tries=0)(weight, QuantScheme(4, "group", 32), stats)  # one grid, as a trellis has
    assert found[2] < 0.8 * loss(weight, plain, damped)
    weighted = loss(weight, WeightedRTN()(weight, W4, stats)[0], damped)
    assert found[0] < weighted < loss(weight, quantize_tensor(weight, W4), damped)


def test_gradients_of_scales_are_those_of_autograd_and_codes_stay():
    weight, x = torch.randn(64, 96), torch.randn(50, 96)
    first = quantize_tensor(weight, W4)
    rounding = Rounding.of(weight.clone(), first)
    scale = first.scale.clone().requires_grad_()
    own = (trellis.values(first.codes, 4).view(64, 3, 32) * scale[..., None]).view(64, 96)
    ((own - weight) @ x.t()).square().sum().backward()
    gradient = 2 * (first.dequantize() - weight) @ x.t() @ x
    rounding.step(gradient, 0.01)
    assert torch.equal(rounding.factors, 1 - 0.01 * scale.grad.sign())
    rounding.keep()
    assert torch.equal(rounding.best.codes, first.codes)
    assert torch.equal(rounding.weights(), rounding.best.dequantize())


@pytest.mark.parametrize("bits", BITS)
def test_the_reference_kernel_multiplies_and_looks_up_rows(bits):
    weight = quantize_tensor(torch.randn(128, 64), QuantScheme(bits, "group", 32, trellis=True))
    kernel, x = Reference(weight, torch.float32, torch.device("cpu")), torch.randn(5, 64)
    assert torch.allclose(kernel(x), x @ weight.dequantize().t(), rtol=1e-5, atol=1e-5)
    rows = torch.tensor([0, 31, 32, 100, 0])
    assert torch.equal(QuantizedEmbedding(weight)(rows), weight.dequantize()[rows])


def test_rows_and_parts_are_whole_chains():
    weight = quantize_tensor(torch.randn(96, 32), W4)
    assert torch.equal(weight.rows(slice(32, 96)).dequantize(), weight.dequantize()[32:])
    joined = QuantizedTensor.concatenate([weight.rows(slice(0, 32)), weight.rows(slice(32, 96))])
    assert torch.equal(joined.dequantize(), weight.dequantize())
    for rows in (slice(0, 33), slice(16, 48), torch.arange(31, -1, -1)):
        with pytest.raises(InputError, match=r"whole chains"):
            weight.rows(rows)
    with pytest.raises(InputError, match="33 rows are no whole chains; accepted are multiples of 32"):
        quantize_tensor(torch.randn(33, 32), W4)


@pytest.mark.parametrize("label", ["w8-g32", "w4-g32-asym", "w4-tensor"])
def test_what_does_not_go_with_a_trellis_is_refused(label):
    with pytest.raises(InputError, match=f"a trellis does not go with {label}; accepted are"):
        QuantScheme.parse(f"{label}-trellis")
    assert QuantScheme.parse(W4.label) == W4


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("source"), "llama", **SHAPE)


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """By GPTQ, head and embedding too, without a word of format."""
    out = tmp_path_factory.mktemp("made") / "out"
    fewbits.quantize(
        source, out, method="gptq", scheme=W4, calibration=IDS, head=True, embeddings=True,
        overrides=(("*embed*", QuantScheme(4, "group", 32, trellis=True)),), learned=Learned(steps=4),
    )  # fmt: skip
    return out


def weights_of(folder):
    view = open_quantized(folder)
    return {name: read_matrix(view.stored, matrix)[0] for name, matrix in view.quantized.items()}


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


def test_a_checkpoint_is_verified_loads_and_computes_what_its_weights_would(source, made):
    fewbits.verify(made)
    weights = weights_of(made)
    assert {weight.scheme for weight in weights.values()} == {W4}
    plain, model = (fewbits.load(folder, dtype=torch.float32) for folder in (source, made))
    for name, weight in weights.items():
        plain.get_parameter(name).data = weight.dequantize(torch.float32)
    wanted = logits(plain)
    assert torch.allclose(logits(model), wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
    linears = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert len(linears) == 15
    notes = json.loads((made / "fewbits.json").read_text())["notes"]
    assert any("codes of a trellis have a layout in our own format only" in str(n) for n in notes)


def test_it_is_saved_again_as_it_is(made, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    again = fewbits.load(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))


def test_other_formats_refuse_it_and_convert_rounds_anew_where_asked(made, tmp_path):
    with pytest.raises(InputError, match="codes of a trellis have a layout in our own format only"):
        convert(made, tmp_path / "no", format="compressed-tensors")
    convert(made, tmp_path / "own", format="fewbits")
    for name, weight in weights_of(tmp_path / "own").items():
        assert torch.equal(weight.codes, weights_of(made)[name].codes)


def test_the_command_line_takes_it(source, tmp_path):
    arguments = ["quantize", str(source), str(tmp_path / "a"), "--trellis"]
    run = CliRunner().invoke(app, [*arguments, "--group-size", "32"])
    assert run.exit_code == 0, run.output
    assert {w.scheme for w in weights_of(tmp_path / "a").values()} == {W4}
    arguments[2] = str(tmp_path / "b")
    wrong = CliRunner().invoke(app, [*arguments, "--bits", "8"])
    assert wrong.exit_code == 2
    assert "a trellis does not go with w8-channel" in wrong.output
    assert not (tmp_path / "b").exists()


def test_rows_that_are_no_whole_chains_are_refused_before_anything_is_written(tmp_path):
    source = tiny_checkpoint(tmp_path / "odd", "llama", **SHAPE | {"intermediate_size": 80})
    with pytest.raises(InputError, match=r"mlp.gate_proj.weight \(80 rows, chains of 32\)"):
        fewbits.quantize(source, tmp_path / "out", scheme=QuantScheme(4, "group", 16, trellis=True))
    assert not (tmp_path / "out").exists()


def test_a_size_is_met_with_chains_in_our_own_format(source, tmp_path):
    result = fewbits.quantize(
        source, tmp_path / "out", method="gptq", calibration=IDS, bits_per_weight=6.0, format="fewbits"
    )
    assert result.bits_per_weight <= 6.0
    assert any(weight.scheme.trellis for weight in weights_of(tmp_path / "out").values())
    assert open_checkpoint(tmp_path / "out").config["quantization_config"]["quant_method"] == "fewbits"
