"""AWQ leaves what float blocks compute alone, undoes outliers, and folds only what helps."""

import copy
import re
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from checks import block_runs, check_transform, linears_of
from fewbits.affine import quantize
from fewbits.errors import InputError
from fewbits.linear import float_weight, split_experts
from fewbits.methods.grid import search_qparams
from fewbits.scheme import QuantScheme
from fewbits.tensor import QuantizedTensor
from fewbits.transforms import AWQ, TRANSFORMS
from fewbits.wiring import find_wiring, scale_readers, scale_source
from models import ALL, VOCABULARY, tiny_model

BF16 = torch.bfloat16
QUICK = AWQ(points=3)


pytestmark = pytest.mark.usefixtures("one_thread")


def scheme_for(columns: int, bits: int = 4) -> QuantScheme:
    fits = columns % 32 == 0
    return QuantScheme(bits, "group", 32) if fits else QuantScheme(bits, "channel")


def schemes_of(block: nn.Module, bits: int = 4) -> dict[str, QuantScheme]:
    shapes = {path: float_weight(block.get_submodule(path)).shape for path in linears_of(block)}
    return {path: scheme_for(shape[1], bits) for path, shape in shapes.items()}


def tiny_blocks(model_type, **changes):
    torch.manual_seed(0)  # some architectures draw more than their matrices
    model = tiny_model(model_type, **changes).float()
    split_experts(model)
    return block_runs(model, VOCABULARY)


def make_outliers(block, run, seed=0):
    """Powers of two on some channels of each norm that is a source, and off their readers' columns.

    It computes the same, to the last bit.
    """
    wanted = run(1)
    generator = torch.Generator().manual_seed(seed)
    pairs = [pair for pair in find_wiring(block, lambda: run(1)).pairs if pair.form == "weight"]
    for pair in pairs:
        factors = torch.ones(pair.rows.count)
        channels = torch.randperm(pair.rows.count, generator=generator)[:3]
        factors[channels] = torch.exp2(torch.randint(5, 7, (3,), generator=generator).float())
        scale_source(block, pair, 1 / factors)
        scale_readers(block, pair, 1 / factors)
    assert torch.equal(run(1), wanted)
    return pairs


# -- every architecture ------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ALL)
def test_the_float_block_computes_what_it_computed_before(model_type):
    for block, run in tiny_blocks(model_type):
        check_transform(QUICK, block, run, schemes_of(block), BF16)


WITH_NORMS = ("llama", "phi3", "opt", "gpt2", "falcon", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")


@pytest.mark.parametrize("model_type", WITH_NORMS)
def test_outliers_are_folded_into_the_norms_they_came_from(model_type):
    for block, run in tiny_blocks(model_type):
        pairs = make_outliers(block, run)
        notes = {
            note.where: note.what for note in check_transform(QUICK, block, run, schemes_of(block), BF16)
        }
        assert pairs
        for pair in pairs:
            (what,) = [w for place, w in notes.items() if place.startswith(f"{pair.source} -> ")]
            assert what.startswith("folded"), (pair.source, what)


def exponents(notes):
    return {note.where: re.search(r"exponent ([\d.]+)", note.what)[1] for note in notes}


@pytest.mark.parametrize("model_type", WITH_NORMS)
def test_outliers_of_any_size_and_place_give_the_same_block(model_type):
    """Channels times powers of two, columns divided by them: the same bits but for one power of two."""
    twins = []
    for seed in (1, 2):
        blocks = tiny_blocks(model_type)
        for block, run in blocks:
            pairs = make_outliers(block, run, seed)
            search, held_out = partial(run, 1), partial(run, 2)
            wiring = find_wiring(block, search)
            notes, _ = AWQ()(block, wiring, schemes_of(block), search, held_out, BF16)
            twins.append((block, pairs, notes))
    count = len(twins) // 2
    for (one, pairs, notes), (other, _, others) in zip(twins[:count], twins[count:], strict=True):
        assert exponents(notes) == exponents(others)
        for pair in pairs:
            norms = [block.get_submodule(pair.source).weight for block in (one, other)]
            ratio = _common_ratio(norms[0], norms[1])
            assert torch.frexp(ratio)[0] == 0.5, "a power of two"
            for reader in pair.readers:
                weights = [float_weight(block.get_submodule(reader)) for block in (one, other)]
                assert torch.equal(weights[0] * ratio, weights[1]), reader


def _common_ratio(first: Tensor, second: Tensor) -> Tensor:
    ratios = (first / second).unique()
    assert len(ratios) == 1, ratios
    return ratios[0]


# -- made-up blocks ----------------------------------------------------------------------------------


class Scale(nn.Module):
    """A norm that does not normalize, so that inputs can be chosen."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width).add(0.5).to(BF16).float(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Block(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm, self.reader = Scale(width), nn.Linear(width, 16, bias=False)
        self.other = nn.Linear(width, 16, bias=False)
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.reader(y) + 0.1 * self.other(y)


READERS = {name: QuantScheme(3, "group", 32) for name in ("reader", "other")}


def inputs(loud: int) -> Tensor:
    x = torch.randn(200, 32) * 0.05
    x[:, loud] *= 100
    return x


def awq(block, search, held_out, schemes=READERS, dtype=BF16, transform=None):
    wiring = find_wiring(block, lambda: block(search[:20]))
    assert len(wiring.pairs) == 1
    notes, folds = (transform or AWQ())(
        block, wiring, schemes, lambda: block(search), lambda: block(held_out), dtype
    )
    assert bool(folds) == any(note.what.startswith("folded") for note in notes)
    return notes


def state(block):
    return {name: tensor.clone() for name, tensor in block.state_dict().items()}


def same(block, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())


def test_a_fold_that_does_not_help_on_held_out_samples_is_undone_to_the_last_bit():
    block, loud = Block(), inputs(3)
    before = state(block)
    (note,) = awq(block, loud, inputs(7))  # another channel is loud there
    assert note.what.startswith("not folded: exponent")
    assert same(block, before)
    (note,) = awq(block, loud, inputs(3))
    assert note.what.startswith("folded")
    assert not same(block, before)


def test_the_errors_it_tells_are_those_of_the_rounded_block():
    block, search, held_out = Block(), inputs(3), inputs(3)
    wanted, original = block(held_out), copy.deepcopy(block)
    (note,) = awq(block, search, held_out)
    found = re.search(r"error (\S+) -> (\S+); that of the float block (\S+)$", note.what)
    for rounded, told in ((original, found[1]), (block, found[2])):
        importance = rounded.norm(search).abs().mean(0).square()
        for name, scheme in READERS.items():
            weight = rounded.get_submodule(name).weight
            scale, zero_point = search_qparams(weight, scheme, importance, BF16)
            codes = quantize(weight, scale, zero_point, scheme)
            weight.copy_(QuantizedTensor(codes, scale, zero_point, scheme).dequantize(torch.float32))
        error = float((rounded(held_out) - wanted).square().mean())
        # The fold itself rounds the norm to bfloat16, and s with it: the codes of a few weights.
        assert error == pytest.approx(float(told), rel=0.05)
    assert float(found[2]) < 0.7 * float(found[1])


def test_a_change_of_the_float_block_beyond_what_is_allowed_is_undone(monkeypatch):
    block = Block()
    before = state(block)
    monkeypatch.setattr("fewbits.transforms.awq.scale_readers", lambda *_: None)
    (note,) = awq(block, inputs(3), inputs(3))
    assert re.match(r"not folded: the float block would change by \S+, over", note.what)
    assert same(block, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_channels_without_inputs_or_weights_stay_as_they_are(dtype):
    block, x = Block(), inputs(3)
    x[:, 5] = 0
    block.reader.weight[:, 9], block.other.weight[:, 9] = 0, 0
    block.norm.weight[11] = 0
    before, fresh = state(block), inputs(3)
    wanted = block(fresh)
    (note,) = awq(block, x, x, dtype=dtype)
    assert note.what.startswith("folded")
    for name, tensor in block.state_dict().items():
        assert torch.isfinite(tensor).all()
        dead = tensor[..., [5, 9, 11]]
        assert torch.equal(dead, before[name][..., [5, 9, 11]]), name
    assert (block(fresh) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("dead", ["inputs", "weights"])
def test_a_block_with_nothing_in_it_is_left_alone(dead):
    block, x = Block(), inputs(3)
    if dead == "inputs":
        x[:] = 0
    before, probe = state(block), inputs(3)
    wiring = find_wiring(block, lambda: block(probe))
    if dead == "weights":
        block.reader.weight[:], block.other.weight[:] = 0, 0
        before = state(block)
    (note,), _ = AWQ()(block, wiring, READERS, lambda: block(x), lambda: block(x), BF16)
    assert note.what.startswith("not folded")
    assert same(block, before)


def test_a_reader_that_stays_in_float_loses_no_bit():
    block = Block()
    block.other.weight.data = block.other.weight.to(BF16).float()
    schemes, before = {"reader": READERS["reader"]}, state(block)
    (note,) = awq(block, inputs(3), inputs(3), schemes)
    assert note.what.startswith("folded")
    other = block.other.weight
    assert not torch.equal(other, before["other.weight"])
    assert torch.equal(other, other.to(BF16).float())
    ratio = block.norm.weight / before["norm.weight"]
    assert (torch.frexp(ratio)[0] == 0.5).all()  # powers of two
    assert torch.equal(other / before["other.weight"], (1 / ratio).expand_as(other))


def test_what_only_floats_read_is_not_considered():
    block = Block()
    before = state(block)
    assert awq(block, inputs(3), inputs(3), {}) == []
    assert same(block, before)


def test_experts_without_a_token_are_scaled_with_the_norm_they_read():
    ((block, run), *_) = tiny_blocks("qwen3_moe", num_experts=64, num_experts_per_tok=1)
    make_outliers(block, run)  # 24 tokens: most experts get none, and others on fresh tokens
    before = state(block)
    notes = check_transform(QUICK, block, run, schemes_of(block), BF16)
    (what,) = [note.what for note in notes if note.where == "post_attention_layernorm -> mlp.gate"]
    assert what.startswith("folded")
    after = block.state_dict()
    for i in range(64):
        name = f"mlp.experts.gate_up_proj.{i}.weight"
        assert not torch.equal(after[name], before[name])


@pytest.mark.parametrize("points", [1, 0, -3])
def test_points_out_of_range_are_refused(points):
    with pytest.raises(InputError, match=f"points is {points}; accepted are numbers from 2"):
        AWQ(points=points)


def test_it_is_known_by_name():
    assert TRANSFORMS["awq"]() == AWQ()
