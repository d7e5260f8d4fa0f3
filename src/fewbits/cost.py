"""Seconds and bytes that quantizing takes on this machine: what the run does, times rates of a probe.

Every term is one thing that `quantize` does, counted: bytes hashed, packed and written, forward passes
of the blocks, Hessians, the columns of GPTQ, the trials of AWQ. The rates come from calling the very
operations for some milliseconds each. Nothing is fitted to the time of whole runs.
"""

import hashlib
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits import trellis
from fewbits.budget import (
    collecting_bytes,
    correcting_bytes,
    drift_bytes,
    factor_bytes,
    fast_bytes,
    learning_bytes,
    matrix_bytes,
    parts_bytes,
    rounding_bytes,
    running_bytes,
)
from fewbits.calibration import DEFAULT_LENGTH
from fewbits.errors import InputError
from fewbits.evaluate import context_of
from fewbits.forecast import Choice, Cost, Tensors, tensor_bytes
from fewbits.formats import Format
from fewbits.learning import LEARNED_TOKENS, STEP_TOKENS
from fewbits.memory import available_bytes, hand_back_memory
from fewbits.methods import GPTQ, Learned
from fewbits.methods.grid import candidates, search_qparams
from fewbits.native import library
from fewbits.packing import pack, unpack
from fewbits.plan import Plan
from fewbits.recipe import LEARNED
from fewbits.scheme import QuantScheme
from fewbits.stream import TOKENS, fast_dtype
from fewbits.structure import Matrix
from fewbits.tensor import quantize_tensor
from fewbits.text import is_hub, tokenize

clock = time.perf_counter  # the benchmark takes time.process_time on a busy machine

_BUDGET_S = 0.01  # for one rate, after one call that does not count; not tuned
_WRITES = 3  # of 16 MiB
_ROWS = 512  # of probed inputs; a run's are longer, which changes little. Not tuned.
_WIDTH = 512  # of probed matrices, at most; wider ones run at the same rate. Not tuned.
_HELD_OUT, _JUDGED, _LENS = 32, 4096, 256  # as in blockwise
_SWEEPS, _TRIES, _POINTS = GPTQ().sweeps, GPTQ().tries, 11  # as GPTQ and AWQ have them by default
_COMPARED_ROWS = 128  # as in blockwise
_PULLED_TIMES = 3  # a pass there and back, of a pass there
_JUDGED_TIMES = 11  # that learned rounding asks held-out samples
_COPIES = 3  # of the columns of a matrix that GPTQ holds
_DISTANCE = 32 * 32  # tokens that the model writes, and is run on, to judge calibration text

# Streaming passes over float32 values, counted in the code; the probe's pass reads one and writes one.
_FORWARD_PASSES = 4  # over inputs and outputs of each matrix: norms, rotations, activations, casts
_LOAD_PASSES = 3  # over a block's weights: read, cast, copy in the fast dtype
_FACTOR_PASSES = 8  # over a Hessian: reorder, damp, flip, divide, check
_SWEEP_PASSES = 2  # over a Hessian in each sweep: gather and divide
# Seconds of Python that are no arithmetic. Of one quiet core, 2026-11-25; not tuned.
_TENSOR_S = 1.5e-3  # of one source tensor: opened, hashed, entered, verified
_BUILD_S, _BUILD_NAME_S = (
    0.05,
    4e-5,
)  # of a model that transformers builds, and for each of its parameters
_SKELETON_S = 0.06  # of a model without weights
_VERIFY_IMPORT_S = 0.5  # of compressed-tensors
_TOKEN_S = 6e-7  # of a calibration token: hashed, looked for repetitions
_TOKENIZER_S = 0.4  # of loading one
_BLOCK_CALLS = 12  # runs of a block on few tokens that wiring takes
_UNPACKED_BYTES = (
    8  # of a code on its way to its kernel, with what is freed and not yet given back; measured
)
_STARTED_BYTES = 25 * 10**6  # of libraries that are loaded on the way
_CALIBRATED_BYTES = 40 * 10**6  # the same where the model is run: its threads' buffers, the tokenizer


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds for one unit of each operation on this machine.

    Args:
        multiply, multiply_fast: one multiplication and addition of a linear, float32 and the fast dtype.
        multiply_few: the same at 32 rows, in the dtype of the model.
        attend, attend_fast: one token, times tokens it attends to, times features.
        hessian: one multiplication and addition of x.T @ x in panels.
        cholesky: n**3 / 3 of it.
        stream: one float32 read and one written.
        search, search_blocks: one weight, all candidates; costs by column and by block.
        round: one weight to the nearest, range included.
        chains: one weight of a trellis, its chain found once.
        pack, unpack: one code.
        column, column_row: of GPTQ, all sweeps: one column, and each row of it.
        hash, write: one byte; the second includes its way to the disk.
        tokenize: one byte of text; 0 where there is none.
        survey: everything before the work, seconds; measured as it happened.
        baseline_bytes: anonymous memory of this process then.
    """

    multiply: float
    multiply_fast: float
    multiply_few: float
    attend: float
    attend_fast: float
    hessian: float
    cholesky: float
    stream: float
    search: float
    search_blocks: float
    round: float
    chains: float
    pack: float
    unpack: float
    column: float
    column_row: float
    hash: float
    write: float
    tokenize: float
    survey: float
    baseline_bytes: int

    def to_json(self) -> dict[str, float]:
        """For `--json`."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Work:
    """The numbers of a run that do not depend on the method.

    Args:
        groups: tensors by kind.
        matrices: of one block's kind each: rows of what reads one input together, and columns, with how
            many there are in the model.
        active: share of the experts' weights that a token meets.
        parameters: how many tensors the model has.
        ordered: of `inputs`, those that are no expert's.
        largest_block, largest_matrix, largest_stack: elements of the largest, a stack being experts in
            one tensor.
    """

    blocks: int
    samples: int
    length: int
    hidden: int
    vocabulary: int
    context_text_bytes: int
    tensors: int
    source_bytes: int
    linears: Counter[tuple[int, int]]
    inputs: Counter[tuple[int, int]]
    experts: int
    chosen: int
    expert_linears: Counter[tuple[int, int]]
    attention_width: int
    block_values: int
    largest_block: int
    largest_matrix: int
    largest_stack: int
    hessian_bytes: int
    parts_bytes: int
    fast_bytes: int
    widest: int
    scalable: int
    dense: bool
    has_text: bool
    shared: Counter[tuple[int, int]] = field(default_factory=Counter)
    ordered: Counter[tuple[int, int]] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Hessians:
    """Bytes of the Hessians that a process holds.

    Args:
        summed: while they are collected.
        kept: while matrices are rounded.
    """

    summed: int
    kept: int


# -- the probe ---------------------------------------------------------------------------------------


def probe(plan: Plan, length: int, text: Path | None, survey_s: float, baseline_bytes: int) -> Rates:
    """Measure this machine, in about half a second.

    Args:
        plan: of the model: widths and dtype of what is probed.
        length: tokens of a sample.
        text: calibration text, to see how fast it becomes tokens.
        survey_s, baseline_bytes: of what came before.
    """
    torch.manual_seed(0)
    columns = [m.rows_columns[1] for n, m in plan.matrices.items() if n in plan.placements]
    width = min(_WIDTH, max(32, sorted(columns)[len(columns) // 2] // 32 * 32))
    x, w = torch.randn(_ROWS, width), torch.randn(width, width)
    own = plan.checkpoint.dtype
    fast = fast_dtype(own) or torch.float32
    xf, wf, few, wo = x.to(fast), w.to(fast), x[:32].to(own), w.to(own)
    products = _ROWS * width * width
    hessian = torch.zeros(width, width)
    gram = torch.full((width, width), 0.1).fill_diagonal_(1.1)
    length = min(length, 512)
    state = torch.randn(1, 4, length, 32)
    pairs = length * length * 4 * 32
    scheme = QuantScheme(4, "group", 32)
    part, importance = w[: max(64, 2**17 // width)], torch.rand(width) + 0.1
    codes = torch.randint(16, (256, width), dtype=torch.uint8)
    packed = pack(codes, 4)
    chained = part[: len(part) // trellis.CHAIN * trellis.CHAIN]
    steps = torch.full_like(chained, 1 / trellis.UNIT[4])
    column, column_row = _columns()
    raw = x.numpy().data.cast("B")[: 2**20]
    return Rates(
        multiply=_time(lambda: F.linear(x, w)) / products,
        multiply_fast=_time(lambda: F.linear(xf, wf)) / products,
        multiply_few=_time(lambda: F.linear(few, wo)) / (32 * width * width),
        attend=_time(lambda: _attend(state)) / pairs,
        attend_fast=_time(lambda: _attend(state.to(fast))) / pairs,
        hessian=_time(lambda: _gram(hessian, x)) / (_ROWS * width * (width + _panel(width)) / 2),
        cholesky=_time(lambda: torch.linalg.cholesky_ex(gram)) / (width**3 / 3),
        stream=_stream(),
        search=_time(lambda: search_qparams(part, scheme, importance)) / part.numel(),
        search_blocks=_time(lambda: search_qparams(part, scheme, gram)) / part.numel(),
        round=_time(lambda: quantize_tensor(part, scheme)) / part.numel(),
        chains=_time(lambda: trellis.encode(chained, steps, 4)) / chained.numel(),
        pack=_time(lambda: pack(codes, 4)) / codes.numel(),
        unpack=_time(lambda: unpack(packed, 4, width)) / codes.numel(),
        column=column,
        column_row=column_row,
        hash=_time(lambda: hashlib.sha256(raw).digest()) / len(raw),
        write=_write(),
        tokenize=0.0 if text is None else _tokenize(plan, text),
        survey=survey_s,
        baseline_bytes=baseline_bytes,
    )


def _time(call: Callable[[], Any]) -> float:
    """The quickest of some calls, after one that warms up."""
    call()
    best, began = float("inf"), clock()
    while True:
        start = clock()
        call()
        now = clock()
        best = min(best, now - start)
        if now - began >= _BUDGET_S:
            hand_back_memory()  # of one call before the next takes its own
            return best


def _stream() -> float:
    """Seconds for a float32 that is read and one that is written."""
    flat, other = torch.randn(2**19), torch.empty(2**19)
    return _time(lambda: torch.mul(flat, 1.5, out=other)) / len(flat)


def _panel(width: int) -> int:
    return min(256, width)  # as in blockwise


def _gram(hessian: Tensor, x: Tensor) -> None:
    for start in range(0, x.shape[1], 256):
        panel = slice(start, start + 256)
        hessian[start:, panel].addmm_(x[:, start:].t(), x[:, panel])


def _attend(state: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(state, state, state, is_causal=True)


def _columns() -> tuple[float, float]:
    """Of GPTQ itself: seconds for a column, and for a row of one, from a small and a larger matrix."""
    gram, times = torch.eye(64) + 0.1, []
    scheme = QuantScheme(4, "group", 64)
    heights = (64, 2048)
    for rows in heights:
        weight = torch.randn(rows, 64)
        searching = _time(lambda w=weight: search_qparams(w, scheme, torch.ones(64)))  # type: ignore[misc]
        whole = _time(lambda w=weight: GPTQ()(w, scheme, {"hessian": gram}))  # type: ignore[misc]
        times.append(max(0.0, whole - searching) / 64)
    row = max(0.0, (times[1] - times[0]) / (heights[1] - heights[0]))
    return max(0.0, times[0] - heights[0] * row), row


def _write() -> float:
    """Seconds for a byte that is written and forced to the disk that temporary files lie on."""
    block = bytes(2**24)
    with tempfile.TemporaryFile() as file:

        def write() -> float:
            file.seek(0)
            start = clock()
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return clock() - start

        # the quickest: one that waits for what others write says nothing of the disk
        return min(write() for _ in range(_WRITES)) / len(block)


def _tokenize(plan: Plan, text: Path) -> float:
    from fewbits.evaluate import load_tokenizer

    tokenizer = load_tokenizer(plan.checkpoint.folder)
    with text.open(encoding="utf-8", errors="replace") as file:
        some = file.read(2**15)
    return _time(lambda: tokenize(some, tokenizer)) / max(1, len(some.encode()))


# -- counting ----------------------------------------------------------------------------------------


def count_work(
    plan: Plan,
    groups: Counter[Tensors],
    readers: dict[str, int],
    config: Any,
    samples: int,
    length: int | None,
    text: str | None,
) -> Work:
    """What the run works on.

    Args:
        plan: of the run.
        groups: tensors by kind.
        readers: module of each linear -> which input it reads, as the model was seen to do.
        config: of the language model.
        samples, length, text: of calibration.

    Raises:
        InputError: samples or tokens that are no numbers from 2, or more tokens than the context.
    """
    context = context_of(config)
    length = min(DEFAULT_LENGTH, context or DEFAULT_LENGTH) if length is None else length
    if samples < 2 or length < 2:
        raise InputError(f"--samples {samples} --seq-len {length}; accepted are numbers from 2")
    if context is not None and length > context:  # as calibration will say
        raise InputError(f"--seq-len is {length}; accepted are at most the model's context, {context}")
    inside = _inside(plan)
    linears, expert_linears = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
    together = Counter[Any]()  # rows that read one input; how many such there are, and its columns
    for matrix, count, experts in inside:
        rows, columns = matrix.rows_columns
        if matrix.kind != "expert":
            linears[rows, columns] += count
            together[matrix.block, readers.get(matrix.module, matrix.module), 1, columns] += rows
        else:
            expert_linears[rows, columns] += count
            together[matrix.block, matrix.module, experts, columns] += rows * (count // experts)
    inputs, ordered = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
    squares, over = Counter[int | None](), Counter[int | None]()
    for (block, _, number, columns), rows in together.items():
        inputs[rows, columns] += number
        ordered[rows, columns] += number if number == 1 else 0
        squares[block] += number * 4 * columns * columns
        over[block] += number * parts_bytes([columns])
    values: Counter[int] = Counter()
    for name, block in plan.blocks.items():
        values[block] += plan.info(name).count
    places = _scalable(inside, readers)
    chosen = getattr(config, "num_experts_per_tok", None)
    count = max((experts for _, _, experts in inside), default=1)
    return Work(
        blocks=max(1, len(values)),
        samples=samples,
        length=length,
        hidden=plan.hidden_size,
        vocabulary=config.vocab_size,
        context_text_bytes=_text_bytes(text),
        tensors=len(plan.checkpoint.tensors),
        source_bytes=plan.source_bytes,
        linears=linears,
        inputs=inputs,
        experts=count if expert_linears else 0,
        chosen=chosen if isinstance(chosen, int) else count,
        expert_linears=expert_linears,
        attention_width=_attention_width(plan, groups),
        block_values=sum(values.values()),
        largest_block=max(values.values(), default=0),
        largest_matrix=_largest(plan, stacks=False),
        largest_stack=_largest(plan, stacks=True),
        hessian_bytes=max(squares.values(), default=0),
        parts_bytes=max(over.values(), default=0),
        fast_bytes=fast_bytes(plan),
        widest=max((matrix.rows_columns[1] for matrix, _, _ in inside), default=0),
        scalable=len(places),
        dense=not expert_linears,
        has_text=text is not None and text != "self",
        shared=Counter[tuple[int, int]](places.values()),
        ordered=ordered,
    )


def _largest(plan: Plan, stacks: bool) -> int:
    """Elements of a matrix; or of all experts in one tensor, 0 where there are none."""
    shapes = {plan.matrices[name].shape for name in plan.placements}
    sizes = (shape if stacks else shape[-2:] for shape in shapes if len(shape) > 2 or not stacks)
    return max(map(math.prod, sizes), default=0)


def _inside(plan: Plan) -> list[tuple[Matrix, int, int]]:
    """The first matrix of each place in the blocks, how many stand there, and of how many experts."""
    counts = Counter(map(id, plan.placements.values()))
    experts: dict[str, int] = {}
    firsts: dict[int, Matrix] = {}
    for name, place in plan.placements.items():
        matrix = plan.matrices[name]
        firsts.setdefault(id(place), matrix)
        if matrix.expert is not None and matrix.expert >= experts.get(matrix.module, 0):
            experts[matrix.module] = matrix.expert + 1
    found = []
    for number, matrix in firsts.items():
        stacked = matrix.shape[0] if matrix.stacked else 1
        several = stacked if matrix.stacked else experts.get(matrix.module, 1)
        if matrix.block is not None:
            found.append((matrix, counts[number] * stacked, several))
    return found


def _scalable(
    inside: list[tuple[Matrix, int, int]], readers: dict[str, int]
) -> dict[Any, tuple[int, int]]:
    """Places of AWQ: inputs that a norm or a linear makes; what reads them, (weights, block).

    The input of the last matrix of attention comes from its values only where these are not shared by
    several heads: where another matrix of the same parent is lower than it is wide, it is left out.
    """
    firsts: dict[Any, Matrix] = {}
    members, weights = Counter[Any](), Counter[Any]()
    heights: dict[str, list[tuple[str, int]]] = {}
    for matrix, count, _ in inside:
        rows, columns = matrix.rows_columns
        expert = matrix.kind == "expert"
        shared = "experts" if expert else readers.get(matrix.module, matrix.module)
        key = (matrix.block, shared, columns)
        firsts.setdefault(key, matrix)
        members[key] += count
        weights[key] += rows * columns * count
        if not expert:
            parent = matrix.module.rpartition(".")[0]
            heights.setdefault(parent, []).append((matrix.module, rows))
    found = {}
    for key, first in firsts.items():
        beside = heights.get(first.module.rpartition(".")[0], [])
        lower = any(n < key[-1] for module, n in beside if module != first.module)
        if members[key] > 1 or first.kind == "expert" or not lower:
            found[key] = (weights[key], first.block or 0)
    return found


def _attention_width(plan: Plan, groups: Counter[Tensors]) -> int:
    rows = [k.shape[0] for k in groups if k.component == "attention" and k.rounded]
    return max(rows, default=plan.hidden_size)


def _text_bytes(text: str | None) -> int:
    if text is None or text == "self" or is_hub(text):
        return 0
    path = Path(text)
    return path.stat().st_size if path.is_file() else 0


# -- time --------------------------------------------------------------------------------------------


def estimate_cost(
    choice: Choice,
    groups: Counter[Tensors],
    work: Work,
    rates: Rates,
    layout: Format,
    held: Hessians | None = None,
) -> Cost:
    """Seconds and peak memory of one method, written in one format.

    Args:
        choice, groups, work, rates, layout: of the run.
        held: of several ranks, what one holds; None: one process holds all.
    """
    scheme = choice.scheme
    calibrated = choice.method not in ("rtn",) and (
        choice.method != "llm-int8" or (scheme.inputs is not None and scheme.inputs.static)
    )
    parts = {"preflight": rates.survey, **_files(groups, scheme, work, rates, layout)}
    if calibrated:
        parts |= _before(work, rates) | _blocks(choice, work, rates) | _states(work, rates)
    else:
        once = rates.chains if scheme.trellis else rates.round
        parts["rounding"] = once * _weights(groups)
        parts["forward pass"] = _build(work) + (rates.pack + rates.unpack) * _weights(groups)
    parts = {name: seconds for name, seconds in parts.items() if seconds > 0}
    codes = sum(n * tensor_bytes(k, scheme, layout) for k, n in groups.items() if k.rounded)
    held = held or Hessians(work.hessian_bytes + work.parts_bytes, work.hessian_bytes)
    peak = rates.baseline_bytes + _memory(choice, work, calibrated, codes, held)
    return Cost(sum(parts.values()), peak, parts)


def _weights(groups: Counter[Tensors]) -> int:
    """Elements that are rounded."""
    return sum(n * k.count * k.shape[0] * k.shape[1] for k, n in groups.items() if k.rounded)


def _files(
    groups: Counter[Tensors], scheme: QuantScheme, work: Work, rates: Rates, layout: Format
) -> dict[str, float]:
    """Hashing, packing, writing and verifying.

    Of source bytes each is hashed once; of those written each as it is written, in its file, and twice
    in verification; codes as chosen and as read back.
    """
    written = sum(n * tensor_bytes(k, scheme, layout) for k, n in groups.items())
    codes = _weights(groups)
    hashed = work.source_bytes + 4 * written + 2 * codes
    return {
        "hashing": rates.hash * hashed,
        "packing": (rates.pack + rates.unpack) * codes,
        "writing": rates.write * 2 * written,  # to the journal and from there
        "bookkeeping": _TENSOR_S * work.tensors + _SKELETON_S + _VERIFY_IMPORT_S,
    }


def _states(work: Work, rates: Rates) -> dict[str, float]:
    """Hidden states behind each block but the last are kept, and hashed."""
    size = 2 * work.samples * work.length * work.hidden * (work.blocks - 1)
    return {"states": (rates.write + rates.hash) * size}


def _before(work: Work, rates: Rates) -> dict[str, float]:
    """Reading the text, and seeing whether it is enough."""
    tokens = work.samples * work.length
    own = 0.0
    if work.dense and work.has_text:  # the whole model writes tokens and is run on them
        few = _DISTANCE * (_products(work) + work.hidden * work.vocabulary)
        own = rates.multiply_few * few + rates.multiply_fast * 2 * few + _build(work)
    return {
        "calibration text": rates.tokenize * work.context_text_bytes
        + (_TOKENIZER_S if work.has_text else 0.0),
        "calibration check": own + _TOKEN_S * tokens,
    }


def _build(work: Work) -> float:
    return _BUILD_S + _BUILD_NAME_S * work.tensors


def _products(work: Work) -> float:
    """Multiplications of one token in all blocks."""
    dense = sum(n * rows * columns for (rows, columns), n in work.linears.items())
    routed = sum(n * rows * columns for (rows, columns), n in work.expert_linears.items())
    return dense + routed * work.chosen / max(1, work.experts)


def _forward(tokens: int, work: Work, rates: Rates, fast: bool) -> float:
    """Of all blocks, seconds."""
    multiply = rates.multiply_fast if fast else rates.multiply
    attend = rates.attend_fast if fast else rates.attend
    values = float(sum(n * (rows + columns) for (rows, columns), n in work.linears.items()))
    values += sum(n * sum(shape) for shape, n in work.expert_linears.items()) * (
        work.chosen / max(1, work.experts)
    )
    attention = work.blocks * work.length * work.attention_width
    stream = _FORWARD_PASSES * values * rates.stream
    return tokens * (multiply * _products(work) + attend * attention + stream)


def _blocks(choice: Choice, work: Work, rates: Rates) -> dict[str, float]:
    length, method = work.length, choice.method.removesuffix(f"+{LEARNED}")
    held = max(1, min(work.samples // _HELD_OUT, _JUDGED // length))
    fitted = (work.samples - held) * length
    weights = sum(n * rows * columns for (rows, columns), n in work.inputs.items())
    logits = (_LENS * rates.multiply + held * rates.stream) * work.vocabulary * work.hidden
    parts = {
        "loading blocks": (2 * work.blocks + 1) * (_build(work) + 4 * _SKELETON_S)
        + 2 * _LOAD_PASSES * rates.stream * work.block_values,
        "rounding to nearest": rates.round * weights,  # what the method is compared with
        "judging": 4 * _forward(held * length, work, rates, fast=False)
        + 2 * work.blocks * logits
        + _forward(64 * _BLOCK_CALLS, work, rates, fast=False) / work.blocks,
        "collecting": _forward(fitted, work, rates, fast=True),
        "going on": _forward(fitted, work, rates, fast=True) * (work.blocks - 1) / work.blocks,
    }
    if method == "llm-int8":
        inputs = sum(n * columns for (_, columns), n in work.inputs.items())
        parts["collecting"] += 2 * rates.stream * fitted * inputs
        parts["rounding"] = rates.round * weights
        return parts
    parts["hessians"] = sum(
        n * _tokens(columns, fitted, work) * rates.hessian * columns * (columns + 256) / 2
        for (_, columns), n in work.inputs.items()
    )
    if method != choice.method:
        learned = min(fitted, LEARNED_TOKENS)
        steps = Learned().steps * max(length, min(STEP_TOKENS, learned))
        parts["learning"] = _PULLED_TIMES * _forward(steps, work, rates, fast=True)
        parts["learning"] += _forward(learned, work, rates, fast=True)
        parts["learning"] += _JUDGED_TIMES * _forward(held * length, work, rates, fast=False)
    if method.startswith("awq"):
        parts["search for scales"] = _awq(work, rates, held)
    parts["rounding"] = _rounding(choice.scheme, method.endswith("gptq"), rates) * weights
    parts["rounding"] += _gptq(work, rates) if method.endswith("gptq") else 0.0
    if _corrected(method):
        parts["correcting"] = _correcting(fitted, work, rates)
    parts["errors"] = rates.round * weights + sum(
        n * 3 * _COMPARED_ROWS * columns**2 * rates.multiply for (_, columns), n in work.inputs.items()
    )
    return parts


def _rounding(scheme: QuantScheme, gptq: bool, rates: Rates) -> float:
    """Of one weight: the search for its grid, and codes, but for what GPTQ's columns take."""
    if scheme.trellis:
        return rates.chains * (len(candidates(scheme)) + 1 + (_SWEEPS if gptq else 0))
    return rates.search if gptq else rates.search_blocks + rates.round


def _tokens(columns: int, fitted: int, work: Work) -> float:
    """That reach an input: of an expert's, those sent to it."""
    widths = {c for _, c in work.expert_linears}
    return fitted * work.chosen / work.experts if work.experts and columns in widths else fitted


def _awq(work: Work, rates: Rates, held: int) -> float:
    """Trials of every place: its weights rounded on the best grid, and the block run on some samples."""
    searched = min(max(1, _JUDGED // work.length), work.samples - held) * work.length
    one = _forward(searched, work, rates, fast=False)  # of all blocks, once
    judged = _forward(held * work.length, work, rates, fast=False)
    places = work.scalable / work.blocks
    weights = sum(n * size for (size, _), n in work.shared.items())
    rounding = rates.search + rates.round + 3 * rates.stream
    return one * (_POINTS * places + 1) + judged * (3 * places + 1) + (_POINTS + 2) * rounding * weights


def _corrected(method: str) -> bool:
    """As `recipe.parse_method` has it."""
    return method.startswith("awq") and method.endswith("gptq")


def _correcting(fitted: int, work: Work, rates: Rates) -> float:
    """Two runs of each block as far as each of its inputs but the first, and what makes up for drift."""
    count = max(1.0, sum(work.ordered.values()) / work.blocks)
    ways = count - 1 / count  # the way to input i being (i + 1/2) / count of the whole
    total = ways * _forward(fitted, work, rates, fast=True)
    for (rows, n), inputs in work.ordered.items():
        drift = fitted * n * n * rates.multiply_fast
        solved = 3 * rows * n * n * rates.multiply + rates.cholesky * n**3 / 3
        total += inputs * (1 - 1 / count) * (drift + solved)
    return total


def _gptq(work: Work, rates: Rates) -> float:
    """Factor of each Hessian, the columns one by one, and the products that correct them."""
    total = 0.0
    for (rows, n), count in work.inputs.items():
        factor = rates.cholesky * n**3 / 3 + rates.stream * _FACTOR_PASSES * n * n
        columns = n * (rates.column + rates.column_row * rows)
        products = rates.multiply * rows * n * n * (0.5 * (1 + _TRIES) + _SWEEPS)
        total += count * (factor + columns + products + rates.stream * _SWEEPS * _SWEEP_PASSES * n * n)
    return total


# -- memory ------------------------------------------------------------------------------------------


def _memory(choice: Choice, work: Work, calibrated: bool, codes: int, held: Hessians) -> int:
    """Beside what the process had before: the larger of what collecting and rounding hold at a time.

    By what `budget` says of a stage, with numbers that are expected: Hessians of what the model was seen
    to read, and no held-out states, which are small. A test holds that a budget is never below.
    """
    if not calibrated:
        # Experts in one tensor are written together. Later the result is loaded, to be run: its codes
        # stay, beside one matrix that is unpacked for its kernel.
        loaded = codes if 3 * codes <= available_bytes() else 0  # larger ones are not run
        made = matrix_bytes(work.largest_matrix, work.largest_stack)
        unpacked = _UNPACKED_BYTES * work.largest_matrix
        if library() is None:  # torch's kernels take wide integers: no less than to round
            unpacked = matrix_bytes(work.largest_matrix, 0)
        return _STARTED_BYTES + max(made, unpacked + loaded)
    running = running_bytes(max(TOKENS, work.length), work.widest)
    held = Hessians(0, 0) if choice.method == "llm-int8" else held
    collecting = collecting_bytes(work.largest_block, work.fast_bytes, running) + held.summed
    tallest = max((rows for (rows, n) in work.inputs if n == work.widest), default=0)
    method = choice.method.removesuffix(f"+{LEARNED}")
    gptq = method.endswith("gptq")
    beside = factor_bytes(work.widest, tallest, _COPIES) if gptq else 0
    if _corrected(method):
        collecting += drift_bytes(work.widest) + work.fast_bytes * work.largest_block
        beside = max(beside, correcting_bytes(work.widest, tallest))
    rounding = rounding_bytes(work.largest_block, beside) + held.kept
    text = 6 * work.context_text_bytes  # documents and their tokens
    learning = 0
    if method != choice.method:
        values = sum(n * (rows + columns) for (rows, columns), n in work.linears.items()) / work.blocks
        pulled = int(2 * 4 * values * max(STEP_TOKENS, work.length))
        learning = learning_bytes(work.largest_block, work.largest_matrix, pulled)
    return _STARTED_BYTES + _CALIBRATED_BYTES + max(collecting, rounding, learning, text)
