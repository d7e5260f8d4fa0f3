"""Gradients taken back block by block, and what errors of each matrix are predicted to cost."""

import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from fewbits import GPTQ, QuantScheme, affine, load, measure, read_calibration, stream
from fewbits.blockwise import find_block_wiring
from fewbits.checkpoint import open_checkpoint
from fewbits.measure import Measurement
from fewbits.methods.grid import search_qparams
from fewbits.sensitivity import (
    LookupCosts,
    Sensitivity,
    draw_back,
    error_weights,
    find_damage,
    find_lookup_costs,
    pull_back,
)
from fewbits.statistics import Input, find_inputs
from fewbits.stream import Stream
from fewbits.structure import find_blocks, find_head, is_experts
from fewbits.text import Text
from models import VOCABULARY, tiny_checkpoint

IDS = torch.randint(3, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(4))
REFERENCE = Path(__file__).parent.parent / "reference/model"
SEED = 3  # of the draw


pytestmark = pytest.mark.usefixtures("one_thread", "float32_products")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("sensitivity"), {}

    def get(model_type: str, **changes: Any) -> Path:
        key = f"{model_type}{changes}"
        if key not in made:
            made[key] = tiny_checkpoint(folder / str(len(made)), model_type, **changes)
        return made[key]

    return get


# -- gradients ---------------------------------------------------------------------------------------


@dataclass
class Truth:
    """What transformers' own model gives under autograd, all of it in one graph.

    Args:
        states: what each block is given, and what the last one gives.
        gradients: there, of -log p of the tokens that were drawn.
        calls: by linear, `block.path`, or by the head's path, of each batch: inputs and gradients at
            the outputs, (tokens, in) and (tokens, out), float64.
        drawn: how many.
    """

    states: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    calls: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=lambda: defaultdict(list))
    drawn: int = 0


def mixture(module: nn.Module, name: str, watch):
    """A mixture's own sum, expert by expert, so that each product can be looked at."""

    def product(kind: str, expert: int, x: Tensor) -> Tensor:
        weight = getattr(module, kind)[expert]
        output = watch(f"{name}.{kind}.{expert}", x, weight if module.is_transposed else weight.T)
        return output + getattr(module, f"{kind}_bias")[expert] if module.has_bias else output

    def forward(hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden)
        for i in range(len(module.gate_up_proj)):
            token, place = torch.where(chosen == i)
            if len(token):
                inner = module._apply_gate(product("gate_up_proj", i, hidden[token]))
                output = product("down_proj", i, inner) * weights[token, place, None]
                result = result.index_add(0, token, output)
        return result

    return forward


def truth(folder: Path, batch: int, every: int = 1, ids: Tensor = IDS) -> Truth:
    model = load(folder, dtype=torch.float32)
    model.requires_grad_(False)
    model.config._experts_implementation = "eager"
    own = model(ids, use_cache=False).logits
    blocks, head = list(model.get_submodule(find_blocks(model))), find_head(model)
    found, states, watched = Truth(), [], []

    def enter(_module, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        if not states:
            x = x.detach().requires_grad_()
        states.append(x)
        return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x})

    def leave(_module, _args, output):
        states.append(output[0] if isinstance(output, tuple) else output)

    def linear(name: str):
        return lambda _module, args, output: watched.append((name, args[0].detach().clone(), output))

    def product(name: str, x: Tensor, weight: Tensor) -> Tensor:
        output = x @ weight
        watched.append((name, x.detach().clone(), output))
        return output

    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(enter, with_kwargs=True)
        for name, module in block.named_modules():
            if is_experts(module):
                module.forward = mixture(module, f"{number}.{name}", product)
            elif isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
                module.register_forward_hook(linear(f"{number}.{name}"))
    blocks[-1].register_forward_hook(leave)
    if head is not None:
        model.get_submodule(head).register_forward_hook(linear(head))
    generator, parts = torch.Generator().manual_seed(SEED), []
    for some, expected in zip(torch.split(ids, batch), torch.split(own, batch), strict=True):
        states.clear(), watched.clear()
        logits = model(some, use_cache=False).logits
        assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-5)
        log_p = logits[:, ::every].flatten(0, 1).log_softmax(-1)
        tokens = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        loss = -log_p.gather(1, tokens).sum()
        outputs = [output for _, _, output in watched]
        gradients = torch.autograd.grad(loss, [*states, *outputs], allow_unused=True)
        parts.append((states.copy(), gradients[: len(states)]))
        for (name, x, _), g in zip(watched, gradients[len(states) :], strict=True):
            if g is not None:
                step = every if name == head else 1
                x, g = (t[..., ::step, :].flatten(0, -2).double() for t in (x, g))
                found.calls[name].append((x, g))
        found.drawn += len(tokens)
    found.states = [torch.cat(s).detach() for s in zip(*(part[0] for part in parts), strict=True)]
    found.gradients = [torch.cat(g) for g in zip(*(part[1] for part in parts), strict=True)]
    return found


def rows_and_hessian(told: Truth, names: list[str]) -> tuple[dict[str, Tensor], Tensor | None]:
    """By the definition: of each linear the rows, of all together the mean of x.T @ x."""
    rows, total, weight = {}, 0, 0.0
    for name in names:
        calls = told.calls.get(name, [])
        means = [float(g.square().sum(1).mean()) for _, g in calls]
        usual = next((mean for mean in means if mean), 1.0)  # of the first batch that has any
        for x, g in calls:
            rows[name] = rows.get(name, 0) + g.square().sum(0) / (2 * told.drawn)
            for one, of_one in zip(x, g.square().sum(1) / usual, strict=True):
                total = total + of_one * torch.outer(one, one)
                weight += float(of_one)
    return rows, None if not weight else total / weight


# Two blocks and a head, there and back, are at most 16 products one after the other, each of at most 192
# terms, which add a relative error of 192 u in float32 (Higham 2002, 3.5), with u half of eps.
BOUND = 16 * 192 * torch.finfo(torch.float32).eps / 2


def assert_close(found: Tensor, expected: Tensor, name: str, bound: float = BOUND) -> None:
    assert found.shape == expected.shape, name
    assert (found - expected).abs().max() <= bound * expected.abs().max(), name


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("llama", {}),
    "fused": ("phi3", {}),
    "tied": ("qwen3", {}),
    "scaled": (
        "granite",
        {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    ),
    "capped": ("gemma2", {"final_logit_softcapping": 1.0, "attn_logit_softcapping": 0.5}),
    "logits scaled": ("cohere", {}),
    "conv1d": ("gpt2", {}),
    "projected": ("opt", {}),
    "parallel": ("falcon", {}),
    "mixture": ("mixtral", {}),
    "transposed mixture with biases": ("gpt_oss", {}),
    "shared expert": ("deepseek_v3", {}),
    "linear attention": ("qwen3_next", {}),
    "unseen experts": ("mixtral", {"num_local_experts": 64}),
}


def check_pulled_back(folder: Path, every: int) -> list[str]:
    """All that is found of a model is that of the whole one; gives the linears that saw no token."""
    told, unseen = truth(folder, 2, every), []
    flow = Stream(open_checkpoint(folder), IDS, every, tokens=2 * IDS.shape[1])
    assert flow.batch == 2
    gradients = torch.empty_like(told.states[-1])
    generator = torch.Generator().manual_seed(SEED)
    drawn, head = draw_back(flow, lambda rows: told.states[-1][rows], generator, gradients)
    assert drawn == told.drawn == 5 * len(range(0, 12, every))
    assert_close(gradients, told.gradients[-1], "what the last block gives")
    path = find_head(flow.network)
    assert head is not None
    assert path is not None
    check_sensitivity(head, told, [path])
    for number in reversed(range(flow.count)):
        block, states = flow.load(number), told.states[number]
        wiring = find_block_wiring(flow, number, block, with_pairs=False)
        inputs = find_inputs(block, wiring, [path for g in wiring.groups for path in g.linears])
        given, into = told.gradients[number + 1], torch.empty_like(states)
        found = pull_back(
            flow, number, block, inputs, lambda rows, s=states: s[rows], given, drawn, into
        )
        assert_close(into, told.gradients[number], f"what block {number} is given")
        assert list(found) == inputs
        for linears, one in found.items():
            if not check_sensitivity(one, told, [f"{number}.{path}" for path in linears]):
                unseen += linears
    return unseen


def check_sensitivity(found: Sensitivity, told: Truth, names: list[str]) -> bool:
    """It is that of the definition; gives whether any of these linears saw a token."""
    rows, hessian = rows_and_hessian(told, names)
    assert len(found.rows) == len(rows) in (0, len(names))
    for path, name in zip(found.linears, names, strict=True):
        if rows:
            assert_close(found.rows[path].double(), rows[name], name, 2 * BOUND)
    if hessian is None:
        assert not found.hessian.any()
    else:
        assert_close(found.hessian.double(), hessian, names[0], 2 * BOUND)
    return bool(rows)


@pytest.mark.parametrize("name", CASES)
def test_gradients_block_by_block_are_those_of_the_whole_model(source, name):
    model_type, changes = CASES[name]
    unseen = check_pulled_back(source(model_type, **changes), every=5)
    assert bool(unseen) == (name == "unseen experts")


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
@pytest.mark.parametrize("every", [1, 100])
def test_gradients_of_all_positions_and_of_the_first_are_too(source, model_type, every):
    check_pulled_back(source(model_type), every)


def test_a_head_in_slices_gives_the_same_gradients(source, monkeypatch):
    monkeypatch.setattr(stream, "_HEAD_ROWS", 64 * 7)
    check_pulled_back(source("llama"), 5)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("gemma2", {}),  # times the root of the width
        ("granite", {"embedding_multiplier": 3.0}),  # outside of the embedding
        ("gpt2", {}),  # positions are added
        ("bloom", {}),  # normalized
        ("opt", {}),  # projected to another width
    ],
)
def test_costs_of_an_embedding_are_those_of_its_rows(source, model_type, changes):
    """The square of each token's gradient at its own row, by autograd of transformers' own model."""
    folder = source(model_type, **changes)
    model = load(folder, dtype=torch.float32).requires_grad_(False)
    weight, looked_up = model.get_input_embeddings().weight.detach(), []

    def look_up(module, args, output):
        rows = weight[args[0]].requires_grad_()
        factor = (output / rows.detach()).median().detach()  # gemma's; each of the others gives the rows
        assert torch.allclose(rows * factor, output, rtol=1e-5)
        looked_up.append(rows)
        return rows * factor

    def enter(_module, args, kwargs):
        looked_up.append(args[0] if args else kwargs["hidden_states"])

    model.get_input_embeddings().register_forward_hook(look_up)
    first = model.get_submodule(find_blocks(model))[0]
    first.register_forward_pre_hook(enter, with_kwargs=True)
    model(IDS, use_cache=False)
    gradients = torch.randn(looked_up[1].shape, generator=torch.Generator().manual_seed(1))
    (at_rows,) = torch.autograd.grad(looked_up[1], looked_up[0], gradients)
    flow = Stream(open_checkpoint(folder), IDS, tokens=2 * IDS.shape[1])
    found = find_lookup_costs(flow, weight, gradients, positions=7)
    assert found.known.tolist() == sorted(set(IDS.flatten().tolist()))
    for token, costs in zip(found.known, found.costs, strict=True):
        expected = at_rows[token == IDS].square().sum(0) / (2 * 7)
        assert_close(costs, expected, f"token {token}")


# -- damage ------------------------------------------------------------------------------------------

EVERY = 3  # of the fractions of a scale, as damage is measured
SCHEMES = [QuantScheme.parse(label) for label in ("w4-g32", "w3-g32-asym", "w2-g64", "w8-channel")]


def hessian_of(columns: int, tokens: int, seed: int = 0) -> Tensor:
    """Of inputs that depend on each other, as those of a model do, of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=torch.Generator().manual_seed(9)) / columns**0.5
    mix = mix + torch.eye(columns) * torch.linspace(0.1, 2, columns)
    x = torch.randn(tokens, columns, generator=generator) @ mix
    return x.T @ x / tokens


def least_left(hessian: Tensor) -> Tensor:
    """By definition: of an error in one column, what is left when the smaller columns take up theirs.

    That is the inverse of the corner of the inverse, for the damped Hessian.
    """
    damped = hessian.double() + 0.01 * hessian.double().diagonal().diag()
    order, left = hessian.diagonal().argsort(descending=True, stable=True).tolist(), {}
    for i, column in enumerate(order):
        free = order[i:]
        left[column] = 1 / torch.linalg.inv(damped[free][:, free])[0, 0]
    return torch.tensor([left[column] for column in range(len(hessian))])


def test_weights_of_errors_are_what_later_columns_cannot_take_up():
    hessian = hessian_of(48, 400)
    assert torch.allclose(error_weights(hessian).double(), least_left(hessian).double(), rtol=1e-4)
    diagonal = torch.diag(torch.rand(8) + 0.1)
    assert torch.allclose(error_weights(diagonal), 1.01 * diagonal.diagonal())


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_hessian_without_factors_leaves_its_diagonal(bad):
    hessian = torch.eye(4) * bad
    assert torch.equal(error_weights(hessian), hessian.diagonal().nan_to_num())


@pytest.mark.parametrize("out", [1, 96, 512])
def test_damage_is_that_of_the_definition_for_all_rows(out):
    weight, rows, columns = torch.randn(out, 128).bfloat16(), torch.rand(out), torch.rand(128)
    found = find_damage(weight, rows, columns, SCHEMES, torch.bfloat16)
    assert list(found) == [scheme.label for scheme in SCHEMES]
    for scheme in SCHEMES:
        scale, zero_point = search_qparams(weight.float(), scheme, columns, torch.bfloat16, EVERY)
        codes = affine.quantize(weight.float(), scale, zero_point, scheme)
        value, total = affine.dequantize(codes, scale, zero_point, scheme).double(), 0.0
        for r in range(out):
            total += float(rows[r] * (columns.double() * (weight[r].double() - value[r]) ** 2).sum())
        assert found[scheme.label] == pytest.approx(total, rel=1e-4)


def test_damage_of_many_rows_is_estimated_from_some():
    """Within 5 standard errors of a mean over the rows that are rounded.

    Of rows alike but for their size, the share of the squares that is lost varies from row to row; the
    estimate is a ratio of sums over 512 of 4000 rows, and has the error of one (Cochran 1977, 6.13).
    """
    weight = torch.randn(4000, 64) * torch.rand(4000, 1)
    rows, columns = torch.rand(4000).square(), torch.rand(64)
    found = find_damage(weight, rows, columns, SCHEMES[:3], torch.float32)
    for scheme in SCHEMES[:3]:
        scale, zero_point = search_qparams(weight, scheme, columns, torch.float32, EVERY)
        codes = affine.quantize(weight, scale, zero_point, scheme)
        error = weight - affine.dequantize(codes, scale, zero_point, scheme)
        lost = rows * (error.square() @ columns)
        whole = rows * (weight.square() @ columns)
        ratio = lost.sum() / whole.sum()
        standard = (lost - ratio * whole).std() / 512**0.5 / whole.mean()
        assert abs(found[scheme.label] - lost.sum()) <= 5 * standard * whole.sum()
        assert found[scheme.label] != pytest.approx(float(lost.sum()), rel=1e-6)  # not all were rounded
        assert 5 * standard <= 0.2 * ratio  # so that the bound says something


def test_damage_of_an_embedding_is_that_of_the_rows_that_were_looked_up():
    weight, columns = torch.randn(40, 64).bfloat16(), torch.rand(64)
    known, costs = torch.tensor([1, 4, 39]), torch.rand(3, 64)
    found = LookupCosts(known, costs).damage(weight, columns, SCHEMES, torch.bfloat16)
    for scheme in SCHEMES:
        scale, zero_point = search_qparams(weight.float(), scheme, columns, torch.bfloat16, EVERY)
        codes = affine.quantize(weight.float(), scale, zero_point, scheme)
        value = affine.dequantize(codes, scale, zero_point, scheme).double()
        total = sum(
            float((costs[i].double() * (weight[k].double() - value[k]) ** 2).sum())
            for i, k in enumerate(known.tolist())
        )
        assert found[scheme.label] == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("tokens", [0, 8, 24, 48])
def test_few_tokens_of_an_expert_are_filled_up_by_those_of_the_forward_pass(tokens):
    """As many as columns are missing; what little was seen would leave hardly any error."""
    columns, whole = 48, hessian_of(48, 4000)
    seen = 3 * hessian_of(48, tokens, seed=1) if tokens else torch.zeros(48, 48)
    one = Input(("expert",), columns, 4000)
    run: Any = SimpleNamespace(inputs=lambda _: (one,), hessian=lambda *_: whole)
    found = Sensitivity(one.linears, seen.clone(), tokens=tokens)
    Measurement._complete(run, 0, found)
    size = float(seen.trace() / whole.trace()) if tokens else 1.0
    expected = tokens / 48 * seen + (1 - tokens / 48) * size * whole
    assert torch.allclose(found.hessian, expected, rtol=1e-4, atol=1e-6)
    if tokens == 48:
        assert torch.equal(found.hessian, seen)
    elif tokens:
        assert error_weights(seen).sum() < error_weights(found.hessian).sum()


# -- measured ----------------------------------------------------------------------------------------

CHOSEN = (
    "model.layers.0.mlp.down_proj", "model.layers.3.mlp.up_proj", "model.layers.5.mlp.gate_proj",
    "model.layers.3.self_attn.q_proj", "model.layers.3.self_attn.v_proj",
    "model.layers.5.self_attn.o_proj",
)  # fmt: skip
LABELS = ("w4-g128", "w3-g128")


def ranks(values: list[float]) -> Tensor:
    return torch.tensor(values).argsort().argsort().double()


@torch.no_grad()
def test_the_prediction_is_what_is_measured_within_a_factor_of_two(tmp_path, monkeypatch):
    """Of single matrices of a trained model, rounded by GPTQ, on the tokens it was predicted on.

    A sanity check: tokens and rows are taken to be independent, and KL to be quadratic. Of the first
    block's q, k and v that is too little by up to 2.4 times (2026-11-26), and they are left out.
    """
    module = sys.modules[measure.__module__]
    monkeypatch.setattr(module, "measured_schemes", lambda _: [*map(QuantScheme.parse, LABELS)])
    model = load(REFERENCE, dtype=torch.float32)
    text = Text("own", [path.read_text() for path in sorted(Path(module.__file__).parent.glob("*.py"))])
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    samples = read_calibration(text, tokenizer, model=model, samples=5, length=256)
    statistics = measure(REFERENCE, tmp_path / "stats", calibration=samples).statistics
    ids = samples.ids[: -statistics.held_out]
    before = model(ids, use_cache=False).logits.log_softmax(-1)
    predicted, found = [], []
    for path in CHOSEN:
        linear, (number, inside) = model.get_submodule(path), path.split(".", 3)[2:]
        weight = linear.weight.data
        stats = statistics.stats(int(number), (inside,), weight.shape[1], frozenset({"hessian"}))
        for label in LABELS:
            scheme = QuantScheme.parse(label)
            rounded, _ = GPTQ()(weight, scheme, {"hessian": stats.hessian}, torch.bfloat16)
            linear.weight.data = rounded.dequantize(torch.float32)
            after = model(ids, use_cache=False).logits.log_softmax(-1)
            found.append(float((before.exp() * (before - after)).sum()) / ids.numel())
            predicted.append(statistics.damage[f"{path}.weight"][label])
        linear.weight.data = weight
    for one, other in zip(predicted, found, strict=True):
        assert 0.5 <= one / other <= 2, (predicted, found)
    correlation = torch.corrcoef(torch.stack([ranks(predicted), ranks(found)]))[0, 1]
    assert correlation >= 0.9
