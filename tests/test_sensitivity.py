"""Gradients taken back block by block, and what errors of each matrix are predicted to cost."""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbits import load, stream
from fewbits.blockwise import find_block_wiring
from fewbits.checkpoint import open_checkpoint
from fewbits.sensitivity import Sensitivity, draw_back, pull_back
from fewbits.statistics import find_inputs
from fewbits.stream import Stream
from fewbits.structure import find_blocks, find_head, is_experts
from models import VOCABULARY, tiny_checkpoint

IDS = torch.randint(3, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(4))
SEED = 3  # of the draw


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These models are too small for two: they would wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def float32_products():
    """Also where the processor is faster in bfloat16: its rounding would hide what is compared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "fast_dtype", lambda _dtype: None)
        yield


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
