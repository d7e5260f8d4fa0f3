"""Rounding for formats that hold no scale below a limit, or small ones with few digits."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import fewbits
from checks import assert_same, assert_within_half_a_step, schemes
from fewbits.formats.layout import float16_scales
from fewbits.methods import RTN, round_held
from fewbits.scheme import QuantScheme
from models import tiny_checkpoint

SCALES = float16_scales(torch.bfloat16)
LEAST = SCALES.least


def weight_of(*sizes):
    """A row of two groups of 32 for each size of the first group; the second is always large."""
    torch.manual_seed(1)
    rows = torch.randn(len(sizes), 64)
    rows[:, :32] *= torch.tensor(sizes)[:, None]
    return rows.bfloat16()


@pytest.mark.parametrize("scheme", schemes("tensor", "channel", 32), ids=lambda scheme: scheme.label)
def test_nothing_changes_where_no_scale_is_small(scheme):
    weight = weight_of(1.0, 3.0)
    held, notes = round_held(RTN(), weight, scheme, {}, torch.bfloat16, LEAST)
    assert_same(held, RTN()(weight, scheme, {}, torch.bfloat16)[0])
    assert notes == []


@pytest.mark.parametrize("scheme", schemes(32), ids=lambda scheme: scheme.label)
def test_small_scales_are_raised_and_cost_half_a_step_at_most(scheme):
    weight = weight_of(1e-7, 1.0, 1e-30)
    plain, _ = RTN()(weight, scheme, {}, torch.bfloat16)
    held, notes = round_held(RTN(), weight, scheme, {}, torch.bfloat16, LEAST)
    small = plain.scale < LEAST
    assert small.tolist() == [[True, False], [False, False], [True, False]]
    assert torch.equal(held.scale[~small], plain.scale[~small])
    assert bool((held.scale[small] == LEAST).all())
    assert torch.equal(held.codes.view(3, 2, 32)[~small], plain.codes.view(3, 2, 32)[~small])
    assert_within_half_a_step(weight, held)
    [note] = notes
    assert (note.kind, note.what.split(" raised")[0]) == ("clamp", "2 of 6 scales")


def test_every_scale_that_is_held_is_a_float16():
    every = torch.arange(1, 2**15 - 2**7, dtype=torch.int16).view(torch.bfloat16)  # finite, positive
    exact = every.double()
    held = every[(exact >= LEAST) & (exact <= 65504)]
    assert torch.equal(held.half().double(), held.double())
    below = every[exact < LEAST].max()  # the least cannot be less
    assert below.half().double() != below.double()


@pytest.mark.parametrize("scheme", schemes(32), ids=lambda scheme: scheme.label)
def test_scales_with_few_digits_are_kept_and_said_with_what_that_costs_at_most(scheme):
    scales = float16_scales(torch.float32)
    weight = weight_of(1.0, 1e-4, 1e-7, 1e-12).float()
    exact, _ = RTN()(weight, scheme, {}, torch.float32)
    held, notes = round_held(RTN(), weight, scheme, {}, scales.dtype, scales.least)
    assert_same(held, RTN()(weight, scheme, {}, torch.float16)[0])
    assert_within_half_a_step(weight, held)
    few = held.scale < 2**-14
    wider = 1 - exact.scale.double() / held.scale.double()
    assert bool((wider[~few].abs() <= 2**-10).all())  # one unit of eleven digits
    [note] = notes
    count, percent = int(note.what.split(" of ")[0]), float(note.what.rpartition(" ")[2].rstrip("%"))
    assert (note.kind, count) == ("fact", int(few.sum()))
    assert float(wider[few].max()) <= percent / 100 + 1e-4
    assert percent == pytest.approx(100 * 2**-24 / float(held.scale.min()), rel=1e-2)


def test_a_float32_model_with_rows_next_to_zero_is_written_and_says_so(tmp_path):
    source = tiny_checkpoint(tmp_path / "source", "llama")
    tensors = {name: t.float() for name, t in load_file(source / "model.safetensors").items()}
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3] *= 1e-6
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    scheme = QuantScheme(4, "group", 32)
    result = fewbits.quantize(source, tmp_path / "out", scheme=scheme, format="gptq")
    [note] = [note for note in result.ledger.notes if "fewer digits" in note.what]
    assert (note.where, note.what[:18]) == (name, "2 of 192 scales ar")
    plain = fewbits.quantize(source, tmp_path / "ct", scheme=scheme)  # its scales are float32
    assert not [note for note in plain.ledger.notes if "fewer digits" in note.what]


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_a_model_with_rows_next_to_zero_is_written_and_says_so(tmp_path, format):
    source = tiny_checkpoint(tmp_path / "source", "llama")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3] *= 1e-6
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    scheme = QuantScheme(4, "group", 32)
    result = fewbits.quantize(source, tmp_path / "out", scheme=scheme, format=format)
    [note] = [note for note in result.ledger.notes if note.kind == "clamp"]
    assert (note.where, note.what[:20]) == (name, "2 of 192 scales rais")
    plain = fewbits.quantize(source, tmp_path / "ct", scheme=scheme)
    assert not [note for note in plain.ledger.notes if note.kind == "clamp"]
