"""One suite per protocol; a test calls it for every method, transform, format and kernel there is."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from fewbits.errors import InputError
from fewbits.formats import Format, Placement
from fewbits.formats.packed import on_disk
from fewbits.kernels import (
    Int4Pack,
    Int8Pack,
    Kernel,
    Native,
    NativeInt8,
    Reference,
    Triton,
)
from fewbits.methods import GPTQ, Method
from fewbits.native import library
from fewbits.scheme import BITS, QuantScheme
from fewbits.structure import find_blocks, is_conv1d, is_linear
from fewbits.tensor import Levels, Note, Outliers, QuantizedTensor
from fewbits.transforms import Transform
from fewbits.trellis import CHAIN, table
from fewbits.wiring import Wiring, find_wiring
from oracles import half_step

TWO_LEVEL = QuantScheme.parse("w4-g32-asym-k")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def schemes(*granularities: str | int) -> list[QuantScheme]:
    """All bits, symmetric and not, for each granularity; a number is a group size."""
    return [
        QuantScheme(bits, "group" if isinstance(g, int) else g, g if isinstance(g, int) else None, s)
        for bits, g, s in product(BITS, granularities, (True, False))
    ]


def fits(scheme: QuantScheme, columns: int) -> bool:
    if scheme.two_level:
        return columns % 256 == 0
    return scheme.group_size is None or columns % scheme.group_size == 0


def random_weight(
    scheme: QuantScheme,
    shape: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    scales: Tensor | None = None,
) -> QuantizedTensor:
    """Codes and zero points anywhere on the grid; scales from 0.5 to 1.5, or drawn from `scales`."""
    grid = (1, 1) if scheme.granularity == "tensor" else (shape[0], scheme.groups(shape[1]))
    codes = torch.randint(0, 2**scheme.bits, shape, dtype=torch.uint8)
    if scheme.two_level:
        return _random_two_level(codes, small=scales is not None)
    scale = torch.rand(grid) + 0.5 if scales is None else scales[torch.randint(len(scales), grid)]
    if scheme.symmetric:
        zero_point = torch.full(grid, scheme.middle, dtype=torch.uint8)
    else:
        zero_point = torch.randint(0, 2**scheme.bits, grid, dtype=torch.uint8)
    return QuantizedTensor(codes, scale.to(dtype), zero_point, scheme)


def _random_two_level(codes: Tensor, small: bool) -> QuantizedTensor:
    """Any counts; or with `small` a half as both steps, and scales of a half and 1."""
    rows, columns = codes.shape
    steps = torch.rand(rows, columns // 256, 2) / 64
    counts = torch.randint(0, 64, (rows, columns // 32, 2), dtype=torch.uint8)
    if small:
        steps, counts[..., 0] = torch.full_like(steps, 0.5), counts[..., 0] % 2 + 1
    levels = Levels(steps.half(), counts)
    points = torch.zeros(rows, columns // 32, dtype=torch.uint8)
    return QuantizedTensor(codes, levels.scale, points, TWO_LEVEL, levels=levels)


def assert_same(result: QuantizedTensor, expected: QuantizedTensor) -> None:
    """Bit for bit, dtypes included."""
    assert result.scheme == expected.scheme
    for field in ("codes", "scale", "zero_point"):
        ours, theirs = getattr(result, field), getattr(expected, field)
        assert ours.dtype == theirs.dtype, field
        assert torch.equal(ours, theirs), field
    assert (result.levels is None) == (expected.levels is None)
    if result.levels is not None and expected.levels is not None:
        for name in ("steps", "counts"):
            ours, theirs = getattr(result.levels, name), getattr(expected.levels, name)
            assert ours.dtype == theirs.dtype, name
            assert torch.equal(ours, theirs), name


def assert_within_half_a_step(weight: Tensor, quantized: QuantizedTensor) -> None:
    """`|w - scale * (code - zero_point)| <= scale / 2` for every weight."""
    scheme, scale = quantized.scheme, _spread(quantized.scale, quantized)
    error = (weight.double() - weights(quantized)).abs()
    # Four roundings in the working precision, each at most half an eps of 2**bits steps: the range,
    # its division into steps, the scale, and weight / scale.
    working = torch.float64 if weight.dtype == torch.float64 else torch.float32
    slack = 2 * torch.finfo(working).eps * 2**scheme.bits
    worst = (error / scale).max().item()
    assert worst <= 0.5 + slack, f"{worst} steps off, {weight.dtype}, {scheme.label}"


# -- methods -----------------------------------------------------------------------------------


def check_method(method: Method) -> None:
    """A method that rounds each weight to the nearest point of a grid that covers it."""
    assert isinstance(method.needs, frozenset)
    for dtype, scheme in product(FLOATS, schemes("tensor", "channel", 8)):
        weight = (torch.randn(32, 24) + torch.randn(32, 1)).to(dtype)
        weight[1] = 0
        weight[2] += 3  # zero is outside its range
        before = weight.clone()
        quantized, notes = method(weight, scheme, {})
        assert torch.equal(weight, before), "the weight was modified"
        assert isinstance(notes, list)
        assert quantized.scheme == scheme
        assert quantized.codes.dtype == torch.uint8
        assert int(quantized.codes.max()) < 2**scheme.bits
        assert quantized.scale.dtype == dtype
        assert_within_half_a_step(weight, quantized)
        assert torch.equal(quantized.dequantize()[1], torch.zeros(24, dtype=dtype))
        again, _ = method(weight, scheme, {})
        assert_same(again, quantized)


# -- transforms --------------------------------------------------------------------------------

FRESH = 3  # of the seeds below: neither searched nor judged with


@torch.no_grad()
def block_runs(
    model: nn.Module, vocabulary: int, samples: int = 2, length: int = 12
) -> list[tuple[nn.Module, Callable[[int], Tensor]]]:
    """Each block, and what runs it as it stands on what it was given for the tokens of a seed."""
    blocks = list(model.get_submodule(find_blocks(model)))
    calls: dict[tuple[nn.Module, int], tuple[tuple, dict]] = {}
    for seed in range(1, FRESH + 1):
        handles = [
            block.register_forward_pre_hook(
                lambda block, args, kwargs, seed=seed: calls.update({(block, seed): (args, kwargs)}),
                with_kwargs=True,
            )
            for block in blocks
        ]
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, vocabulary, (samples, length), generator=generator)
        model(ids, use_cache=False)
        for handle in handles:
            handle.remove()

    @torch.no_grad()
    def run(block: nn.Module, seed: int) -> Tensor:
        args, kwargs = calls[block, seed]
        output = block(*args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    return [(block, lambda seed, block=block: run(block, seed)) for block in blocks]


def linears_of(block: nn.Module) -> list[str]:
    return [path for path, module in block.named_modules() if is_linear(module) or is_conv1d(module)]


def check_transform(
    transform: Transform,
    block: nn.Module,
    run: Callable[[int], Tensor],
    schemes: dict[str, QuantScheme],
    dtype: torch.dtype,
) -> list[Note]:
    """The float block computes what it computed; only what a note tells was touched.

    Args:
        block: in float32; what stays in float is representable in `dtype`.
        run: as `block_runs` gives it: searched with on 1, judged on 2.
        dtype: in which norms are written.
    """
    wiring = find_wiring(block, lambda: run(1))
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    wanted = run(FRESH)
    inputs, folded_inputs = dict[str, Tensor](), dict[str, Tensor]()
    with _inputs_of(block, inputs):
        run(FRESH)
    notes, folds = transform(block, wiring, schemes, lambda: run(1), lambda: run(2), dtype)
    assert not any(module._forward_pre_hooks for module in block.modules())
    # A fold is exact but for float32's rounding, whatever `dtype` is: what rounding a norm's weight
    # takes away is given to the readers.
    error = (run(FRESH) - wanted).abs().max()
    assert error <= 1e-5 * wanted.abs().max(), f"{error} of {wanted.abs().max()}"

    folded, considered = _check_notes(notes, wiring, schemes)
    readers = {reader for pair in folded for reader in pair.readers}
    sources = {pair.source for pair in folded}
    assert folds.keys() <= readers
    for reader in readers - folds.keys() - sources:  # an expert that nothing was seen of
        assert torch.equal(block.state_dict()[f"{reader}.weight"], before[f"{reader}.weight"]), reader
    with _inputs_of(block, folded_inputs):
        run(FRESH)
    for reader, s in folds.items():
        columns = before[f"{reader}.weight"]
        scaled = columns * (s[:, None] if is_conv1d(block.get_submodule(reader)) else s)
        if reader not in sources:
            assert torch.equal(block.state_dict()[f"{reader}.weight"], scaled), reader
        if reader in inputs:  # an expert without a token has none
            whole, divided = inputs[reader], folded_inputs[reader] * s
            assert (divided - whole).abs().max() <= 1e-5 * whole.abs().max(), reader
    touched = {path for pair in folded for path in (pair.source, *pair.readers)}
    after = block.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        path = name.rpartition(".")[0]
        own_bias = any(source.startswith(f"{path}.") for source in touched) and name.endswith("_bias")
        if path not in touched and not own_bias:
            assert torch.equal(tensor, before[name]), f"{name} was changed"
    for pair in folded:
        if pair.form != "linear":
            weight = after[f"{pair.source}.weight"]
            assert torch.equal(weight, weight.to(dtype).float()), f"{pair.source} is not in {dtype}"
        changed = [not torch.equal(after[f"{r}.weight"], before[f"{r}.weight"]) for r in pair.readers]
        assert all(changed) or not any(changed)  # a mixture's pairs share a note, not their scales
    assert considered
    return notes


@contextmanager
def _inputs_of(block: nn.Module, found: dict[str, Tensor]) -> Iterator[None]:
    """What each module reads while the block is run; of several calls the last."""

    def keep(path: str) -> Callable[..., None]:
        def record(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
                found[path] = args[0].clone()

        return record

    modules = [(path, m) for path, m in block.named_modules() if "weight" in m._parameters]
    handles = [module.register_forward_pre_hook(keep(path)) for path, module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_notes(
    notes: list[Note], wiring: Wiring, schemes: dict[str, QuantScheme]
) -> tuple[list, list]:
    """Pairs that were folded, and all that were considered; one note for each, of experts for all."""
    places: dict[str, list] = {}
    for pair in wiring.pairs:
        if set(pair.readers) & schemes.keys():
            source, reader = (re.sub(r"\.\d+$", ".*", p) for p in (pair.source, pair.readers[0]))
            places.setdefault(f"{source} -> {reader}", []).append(pair)
    assert [note.where for note in notes] == list(places)
    assert {note.kind for note in notes} <= {"fact"}
    folded = []
    for note in notes:
        assert note.what.startswith(("folded: exponent", "not folded: ")), note
        folded += places[note.where] if note.what.startswith("folded") else []
    return folded, [pair for alike in places.values() for pair in alike]


# -- formats -----------------------------------------------------------------------------------

# Rows matter: zero points are packed along them. The last ones fit the words of every format.
_SHAPES = ((1, 1), (3, 5), (7, 24), (33, 48), (32, 31), (32, 64), (64, 96))


def check_format(layout: Format) -> None:
    """Everything that is written is read back bit for bit, and the config names all schemes."""
    assert _check_round_trip(layout)
    _check_writing_refuses(layout)
    _check_single_placements(layout)
    if layout.name in ("compressed-tensors", "fewbits"):
        for placements in _mixtures():
            _check_config(layout, placements)
        _check_reading_refuses(layout)
    config = layout.config(_one_scheme(layout), ["lm_head"])
    assert layout.scheme_of(config, "lm_head.weight", "lm_head") is None, "a float got a scheme"
    _check_quantized_names(layout)


def _check_round_trip(layout: Format) -> int:
    """How many were held."""
    name, count = "model.layers.11.mlp.down_proj.weight", 0
    for scheme, shape, dtype in product(schemes("tensor", "channel", 1, 8, 32), _SHAPES, FLOATS[:3]):
        placement = Placement("model.layers.11.mlp.down_proj", scheme, shape=shape)
        if not fits(scheme, shape[1]) or layout.refuses(placement, scheme) is not None:
            continue
        weight = random_weight(scheme, shape, layout.scales(dtype).dtype)
        tensors = layout.write(name, weight)
        names = layout.tensors(name)
        assert set(names.needed) <= set(tensors) <= {*names.needed, *names.possible}
        assert all(key.startswith(name.removesuffix("weight")) for key in tensors)
        stored = safetensors.torch.save(tensors)
        header = 8 + int.from_bytes(stored[:8], "little")
        size = layout.written_bytes(*shape, scheme, weight.scale.dtype.itemsize)
        assert len(stored) - header == size
        given = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
        headers = layout.headers(name, shape, scheme, weight.scale.dtype)
        assert list(headers.items()) == list(given.items())  # the order decides where a file is cut
        held = layout.held(weight)
        assert torch.equal(held.dequantize(torch.float64), weight.dequantize(torch.float64))
        result = layout.read(name, safetensors.torch.load(stored), on_disk(held.scheme))
        assert_same(result, held.per_row())
        found = layout.decode(name, tensors, held.scheme, shape)
        for part in ("codes", "scale", "zero_point"):
            ours, theirs = getattr(held.per_row(), part), getattr(found, part)
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs), part
        count += 1
    return count


def _check_writing_refuses(layout: Format) -> None:
    """Columns in another order or in 16 bits, scales that are not held, names without a place."""
    narrow = layout.scales(torch.float32).stored == torch.float16
    for scheme in schemes("channel", 32):
        if layout.refuses(Placement("model.a", scheme, shape=(64, 64)), scheme) is not None:
            continue
        weight = random_weight(scheme, (64, 64), torch.float16)
        with pytest.raises(InputError, match="neighbouring"):
            layout.write("X.weight", replace(weight, order=torch.arange(64).flip(0)))
        kept = replace(weight, outliers=Outliers(torch.tensor([1]), torch.ones(64, 1)))
        if layout.name != "fewbits":  # which has them
            with pytest.raises(InputError, match="16 bits"):
                layout.write("X.weight", kept)
        if not narrow:  # floats of every width
            continue
        for scale in (1e-9, 1e9, 0.1, float("nan")):
            given = torch.full(weight.scale.shape, scale, dtype=torch.float32)
            with pytest.raises(InputError, match="float16"):
                layout.write("X.weight", replace(weight, scale=given))
        if layout.name != "gguf":  # which has a name for every weight
            with pytest.raises(InputError, match=r"\.weight"):
                layout.write("X.experts", weight)


def _one_scheme(layout: Format) -> dict[str, Placement]:
    """A weight of a scheme that the format holds."""
    found = next(
        place
        for scheme in schemes("channel", 32)
        if layout.refuses(place := Placement("model.a", scheme, shape=(64, 64)), scheme) is None
    )
    return {"model.a.weight": found}


def _check_reading_refuses(layout: Format) -> None:
    scheme = QuantScheme(4, "group", 8, symmetric=False)
    tensors = layout.write("X.weight", random_weight(scheme, (3, 24)))
    for missing in tensors:
        rest = {name: tensor for name, tensor in tensors.items() if name != missing}
        with pytest.raises(InputError, match="no tensor"):
            layout.read("X.weight", rest, scheme)
    with pytest.raises(InputError):
        layout.read("X.weight", tensors, QuantScheme(8, "group", 8, symmetric=False))
    with pytest.raises(InputError):
        layout.read("X.weight", tensors, QuantScheme(4, "group", 4, symmetric=False))


def _check_quantized_names(layout: Format) -> None:
    """A weight is known to be quantized by any of its tensors, and a float never is."""
    names = ("model.layers.1.q_proj.weight", "model.layers.11.q_proj.weight")
    [placement] = _one_scheme(layout).values()
    placements = {name: replace(placement, module=name.removesuffix(".weight")) for name in names}
    config, floats = layout.config(placements, ["lm_head"]), ["lm_head.weight", "attn.logit_scale"]
    weight = random_weight(placement.scheme, (64, 64), layout.scales(torch.float32).dtype)
    written = [key for name in names for key in layout.write(name, weight)]
    assert layout.quantized_names(config, [*written, *floats]) == set(names)
    for name in names:
        config = layout.config({name: placements[name]}, ["lm_head"])
        for key in layout.write(name, weight):
            assert layout.quantized_names(config, [key, *floats]) == {name}


def _check_single_placements(layout: Format) -> None:
    """A placement is refused with a reason, or everything works for it."""
    for scheme, flags in product(schemes("tensor", "channel", 32), product((False, True), repeat=3)):
        expert, stacked, transposed = flags
        module = "model.layers.0.mlp.experts"
        placement = Placement(module, scheme, expert, stacked, transposed, shape=(64, 64))
        reason = layout.refuses(placement, scheme)
        if reason is None:
            _check_config(layout, {"model.layers.0.mlp.experts.0.up_proj.weight": placement})
        else:
            assert reason.strip()


def _check_config(layout: Format, placements: dict[str, Placement]) -> None:
    config = json.loads(json.dumps(layout.config(placements, ["lm_head"])))
    assert config["quant_method"] == layout.quant_method
    assert layout.reads(config)
    assert all(remark.strip() for remark in layout.remarks(placements))
    for name, placement in placements.items():
        held = on_disk(layout.held(random_weight(placement.scheme, (64, 64), torch.float16)).scheme)
        assert layout.scheme_of(config, name, placement.module) == held, name


def _mixtures() -> list[dict[str, Placement]]:
    """Twelve blocks, so that number 1 begins 10 and 11, inside of names and at their end."""
    low, high = QuantScheme(4, "group", 32), QuantScheme(8, "tensor")
    odd = QuantScheme(3, "channel", symmetric=False)
    ends = ("self_attn.q_proj", "self_attn.q_proj_norm", "mlp.down_proj", "mlp.1", "mlp.11")
    modules = [f"model.layers.{i}.{end}" for i in range(12) for end in ends]
    one = dict.fromkeys(modules, low)
    kinds = dict(zip(ends, (low, high, odd, low, high), strict=True))
    by_kind = {m: kinds[m.split(".", 3)[3]] for m in modules}
    by_block = {m: odd if ".layers.1." in m or ".layers.11." in m else low for m in modules}
    by_both = by_kind | {m: odd for m in modules if m.startswith("model.layers.10.")}
    return [
        {f"{m}.weight": Placement(m, scheme) for m, scheme in mixture.items()}
        for mixture in (one, by_kind, by_block, by_both)
    ]


# -- kernels -----------------------------------------------------------------------------------

KERNEL_SHAPES = ((7, 172), (33, 96), (1, 32), (130, 1024))  # ragged in rows, in columns, in both
KERNEL_SCHEMES = (*schemes("tensor", "channel", 4, 32, 96, 256, 512), TWO_LEVEL)
TRELLIS_SHAPES = ((32, 172), (96, 96), (64, 1024))
TRELLIS_SCHEMES = tuple(
    QuantScheme.parse(f"w{bits}-{shared}-trellis")
    for bits, shared in product((2, 3, 4), ("channel", "g4", "g32", "g96", "g256"))
)
BATCHES = ((1,), (2,), (5,), (33,), (2, 3))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_kernel(
    kernel_class: type[Kernel],
    device: str = "cpu",
    tried: Sequence[QuantScheme] = KERNEL_SCHEMES,
    shapes: Sequence[tuple[int, int]] = KERNEL_SHAPES,
) -> None:
    """`x @ W.T` within the rounding of operands, sums and result; exact on small integers."""
    held = 0
    for scheme, shape in product(tried, shapes):
        if not fits(scheme, shape[1]):
            continue
        for dtype, scale_dtype in ((t, s) for t in DTYPES for s in {t, torch.float32}):
            weight = random_weight(scheme, shape, scale_dtype)
            reason = kernel_class.refuses(weight, dtype, torch.device(device))
            if reason is None:
                held += 1
                _check_product(kernel_class, weight, dtype, device)
            else:
                assert reason.strip()
        held += _check_exact_product(kernel_class, scheme, shape, device)
    assert held, f"{kernel_class.__name__} refused every weight"


def _check_product(
    kernel_class: type[Kernel], weight: QuantizedTensor, dtype: torch.dtype, device: str
) -> None:
    kernel = kernel_class(weight, dtype, torch.device(device))
    out, columns = weight.shape
    sizes = [torch.Size(batch).numel() for batch in BATCHES]
    inputs = torch.randn(sum(sizes), columns).to(dtype)
    exact, bound = product_and_bound(kernel_class, weight, inputs)
    for batch, x, y, limit in zip(
        BATCHES, inputs.split(sizes), exact.split(sizes), bound.split(sizes), strict=True
    ):
        result = kernel(x.reshape(*batch, columns).to(device))
        assert result.shape == (*batch, out)
        assert result.dtype == dtype
        error = (result.cpu().double().reshape(-1, out) - y).abs()
        worst = (error / limit).max().item()
        assert worst <= 1, f"{worst} x bound: {weight.scheme.label} {(out, columns)} {dtype} {batch}"


def _check_exact_product(
    kernel_class: type[Kernel], scheme: QuantScheme, shape: tuple[int, int], device: str
) -> bool:
    """Powers of two as scales and small integers as inputs: no float32 sum rounds, in any order."""
    weight = random_weight(scheme, shape, scales=torch.tensor([0.5, 1.0]))
    if kernel_class is NativeInt8:  # its steps are no powers of two
        return False
    if kernel_class.refuses(weight, torch.float32, torch.device(device)) is not None:
        return False
    kernel = kernel_class(weight, torch.float32, torch.device(device))
    # Multiples of 1/2 below 1024 columns * 8 * 255: 22 bits, of float32's 24. Two levels: below 47.
    x = torch.randint(-8, 9, (3, 2, shape[1])).float().transpose(0, 1)  # not contiguous
    before = x.clone()
    result = kernel(x.to(device)).cpu()
    assert torch.equal(result.double(), x.double() @ weights(weight).t())
    assert torch.equal(x, before), "the input was modified"
    return True


def weights(weight: QuantizedTensor) -> Tensor:
    """`oracles.dequantized`, for the larger shapes of the kernels."""
    levels = _levels(weight) - _spread(weight.zero_point, weight)
    return _spread(weight.scale, weight) * levels - _offset(weight)


def _levels(weight: QuantizedTensor) -> Tensor:
    """Codes, or what a trellis has for them, from the definition."""
    codes, bits = weight.codes.long(), weight.scheme.bits
    if not weight.scheme.trellis:
        return codes.double()
    chains = codes.view(-1, CHAIN, codes.shape[1])
    window = sum(chains.roll(back, 1) << back * bits for back in range(4)) & 255
    return table(bits)[window].view(codes.shape).double()


def _offset(weight: QuantizedTensor) -> Tensor:
    """What is subtracted from each weight, from the definition."""
    levels = weight.levels
    if levels is None:
        return torch.zeros(())
    return _spread(levels.steps[..., 1], weight) * _spread(levels.counts[..., 1], weight)


def _spread(values: Tensor, weight: QuantizedTensor) -> Tensor:
    rows, columns = weight.shape
    values = values.double().expand(rows, -1)
    return values.repeat_interleave(columns // values.shape[1], 1)


def product_and_bound(
    kernel_class: type[Kernel], weight: QuantizedTensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    """`x @ W.T` in float64, and how far a kernel may be from it: both (rows, out), float64.

    The standard bound (Higham, Accuracy and Stability, 2002, 3.5): a sum of n products in any order
    is off by at most n u / (1 - n u) * sum |x| |w|, here with eps = 2u for u and two more for the
    roundings of an operand. To it come the operands and results that are rounded to the dtype of x.
    """
    dtype, columns = x.dtype, weight.shape[1]
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    scale, point = _spread(weight.scale, weight), _spread(weight.zero_point, weight)
    codes, middle, w = _levels(weight), weight.scheme.middle, weights(weight)
    exact, size = x.double() @ w.t(), x.double().abs()
    # `terms` are the magnitudes that are summed, `operands` how far rounding moves each weight.
    zero = scale * (middle - point) - _offset(weight)
    terms = (scale * (codes - middle)).abs() + zero.abs()
    of_inputs = torch.zeros(())  # how far a product is off because inputs were rounded
    if kernel_class is Reference:
        terms, operands = w.abs(), half_step(w, dtype)
    elif issubclass(kernel_class, Native):
        operands = half_step(zero, torch.float32) * (weight.offset is not None)
        rounded = _half_step_of_inputs(kernel_class, x, weight.scheme.group_size)
        of_inputs, size = rounded @ w.abs().t(), size + rounded
    elif issubclass(kernel_class, Triton):  # codes are multiplied as integers, and scaled in float32
        operands = half_step(zero, torch.float32) * (weight.offset is not None)
    elif kernel_class is Int8Pack:  # q * scale
        operands = half_step(scale, dtype) * (codes - middle).abs()
    else:  # (c - 8) * scale + zero, with both rounded
        operands = half_step(scale, dtype) * (codes - middle).abs()
        operands += half_step(zero, dtype) * (zero != 0)
        assert kernel_class is Int4Pack, "give the new kernel's roundings here"
    bound = size @ operands.t() + (columns + 2) * eps * (size @ terms.t()) + of_inputs
    return exact, bound + half_step(exact.abs() + bound, dtype)


def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on as where fewbits was installed without a compiler."""
    monkeypatch.setenv("FEWBITS_NATIVE", "0")


def fast_kernel(otherwise: str) -> str:
    """The kernel that bfloat16 runs on this machine: the native one, or torch's where there is none."""
    found = library()
    return otherwise if found is None or found.isa == "portable" else "native"


def _half_step_of_inputs(kernel_class: type[Kernel], x: Tensor, group: int | None) -> Tensor:
    """(rows, in): how far the native kernels' rounding moves each input, float64.

    In 8 bits by half of absmax / 127 of 128 neighbours, or of a group of 32; else by half a step of
    2^-15 of a power of two that 128 neighbours are below, or a whole one at its end; in
    float32 by such a part of that step.
    """
    together = 32 if kernel_class is NativeInt8 and group == 32 else 128
    groups = torch.nn.functional.pad(x.double(), (0, -x.shape[1] % together)).unflatten(
        1, (-1, together)
    )
    largest = groups.abs().amax(-1, keepdim=True)
    half = largest / 254 * (1 + 2**-20)
    if kernel_class is not NativeInt8:
        half = (
            2.0 ** torch.frexp(largest)[1].double()
            * 2**-15
            * (2**-15 if x.dtype == torch.float32 else 1)
        )
    return half.expand_as(groups).flatten(1)[:, : x.shape[1]]


# -- a method that is watched ----------------------------------------


@dataclass(frozen=True, slots=True)
class Recording(GPTQ):
    """GPTQ that keeps what it is given."""

    def __call__(self, weight, scheme, stats, scale_dtype=None):
        RECORDED.append((weight.clone(), stats["hessian"].clone()))
        return super(Recording, self).__call__(weight, scheme, stats, scale_dtype)


RECORDED: list[tuple[Tensor, Tensor]] = []
