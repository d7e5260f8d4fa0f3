"""The programs that run on a GPU, in Triton; `words.py` says how a weight lies in memory.

All but `add_parts` take `words`, `scale` and `zero` of a weight of `out` rows and `columns`, two of them
`offset` too, and read ROWS of its rows. TOGETHER fields of one half have one scale; POINT is the zero
point where `zero` has none (else 0). Inputs past the last column count as zero, so the scale that is
read for them is any; rows past the last are the last again.
"""

import triton
import triton.language as tl


@triton.jit
def field_of(words, field: tl.constexpr, BITS: tl.constexpr, point, LOGIC: tl.constexpr = None):
    """The codes of a field in the lower half of each word, less `point`: float32.

    Bits that are put under the exponent of 2^23 are a number beyond it: logic and a multiply-add instead
    of shifts and a conversion, for which a processor has fewer units. All exactly. LOGIC: PTX that takes
    one instruction for both.
    """
    place: tl.constexpr = field * BITS
    mask: tl.constexpr = (2**BITS - 1) << place
    if LOGIC is None:
        beyond = (words & mask) | 0x4B000000
    else:
        beyond = tl.inline_asm_elementwise(
            LOGIC, "=r,r,r,r", [words, mask, 0x4B000000], tl.int32, is_pure=True, pack=1
        )
    return beyond.to(tl.float32, bitcast=True) * (1.0 / 2**place) - (2.0 ** (23 - place) + point)


@triton.jit
def fields_of(words, field: tl.constexpr, BITS: tl.constexpr, point):
    """The same of both halves of each word."""
    return field_of(words, field, BITS, point), field_of(words >> 16, field, BITS, point)


@triton.jit
def operands_of(
    words, field: tl.constexpr, BITS: tl.constexpr, POINT: tl.constexpr, ASM: tl.constexpr, like
):
    """The same in the dtype of `like`; with ASM two codes at a time."""
    if ASM is None:
        low, high = fields_of(words, field, BITS, POINT)
        low, high = low.to(like.dtype), high.to(like.dtype)
    elif like.dtype == tl.bfloat16:
        low, high = tl.inline_asm_elementwise(
            ASM, "=h,=h,r", [words >> (field * BITS)], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=1
        )
    else:
        low, high = tl.inline_asm_elementwise(
            ASM, "=h,=h,r", [words >> (field * BITS)], (tl.float16, tl.float16), is_pure=True, pack=1
        )
    return low, high


@triton.jit
def multiply(
    x, words, scale, zero, bias, y, offset, out, columns, rows, length,
    GROUP: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr, TOGETHER: tl.constexpr,
    ZERO: tl.constexpr, POINT: tl.constexpr, OFFSET: tl.constexpr, BIAS: tl.constexpr,
    EVEN: tl.constexpr, ASM: tl.constexpr, ROWS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """`x @ W.T + bias` for INPUTS rows of x, on a part of the columns, `length` chunks, on tensor cores.

    The weight is the left operand: tensor cores take that one from registers. With several parts, y has
    them one behind the other, in float32, and BIAS is off. EVEN: all chunks are full.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    given = tl.program_id(1) * INPUTS + tl.arange(0, INPUTS)
    part = tl.program_id(2)
    lane = tl.arange(0, 32)
    chunks = tl.cdiv(columns, 64 * HALF)
    inside = (row < out)[:, None] & (given < rows)[None, :]
    own, last = tl.minimum(row, out - 1), (columns - 1) // GROUP
    start = own.to(tl.int64) * (chunks * 32)
    place, there = given.to(tl.int64) * columns, (given < rows)[None, :]
    total = tl.zeros((ROWS, INPUTS), tl.float32)
    for chunk in range(part * length, tl.minimum((part + 1) * length, chunks)):
        code = tl.load(words + start[:, None] + (chunk * 32 + lane)[None, :])
        for first in tl.static_range(0, HALF, TOGETHER):
            column = chunk * 64 * HALF + first * 32  # and its twin's, HALF * 32 further on
            g0 = tl.minimum(column // GROUP, last) * out + own
            g1 = tl.minimum((column + HALF * 32) // GROUP, last) * out + own
            if ZERO:
                z0 = tl.load(zero + g0).to(tl.float32).to(x.dtype.element_ty)[:, None]
                z1 = tl.load(zero + g1).to(tl.float32).to(x.dtype.element_ty)[:, None]
            sum0 = tl.zeros((ROWS, INPUTS), tl.float32)
            sum1 = tl.zeros((ROWS, INPUTS), tl.float32)
            inputs0 = tl.zeros((INPUTS,), tl.float32)
            inputs1 = tl.zeros((INPUTS,), tl.float32)
            for i in tl.static_range(TOGETHER):
                c0 = column + i * 32 + lane
                c1 = c0 + HALF * 32
                at0, at1 = x + place[None, :] + c0[:, None], x + place[None, :] + c1[:, None]
                if EVEN:
                    x0 = tl.load(at0, there, other=0)
                    x1 = tl.load(at1, there, other=0)
                else:
                    x0 = tl.load(at0, there & (c0 < columns)[:, None], other=0)
                    x1 = tl.load(at1, there & (c1 < columns)[:, None], other=0)
                w0, w1 = operands_of(code, first + i, BITS, POINT, ASM, x0)
                if ZERO:
                    w0, w1 = w0 - z0, w1 - z1
                sum0 = tl.dot(w0, x0, sum0, input_precision="ieee")
                sum1 = tl.dot(w1, x1, sum1, input_precision="ieee")
                if OFFSET:
                    inputs0 += tl.sum(x0.to(tl.float32), 0)
                    inputs1 += tl.sum(x1.to(tl.float32), 0)
            total += sum0 * tl.load(scale + g0).to(tl.float32)[:, None]
            total += sum1 * tl.load(scale + g1).to(tl.float32)[:, None]
            if OFFSET:
                total -= tl.load(offset + g0)[:, None] * inputs0[None, :]
                total -= tl.load(offset + g1)[:, None] * inputs1[None, :]
    if BIAS:
        total += tl.load(bias + own).to(tl.float32)[:, None]
    target = y + part.to(tl.int64) * rows * out + given.to(tl.int64)[None, :] * out + row[:, None]
    tl.store(target, total.to(y.dtype.element_ty), inside)


@triton.jit
def multiply_one(
    x, words, scale, zero, bias, y, out, columns,
    GROUP: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr, TOGETHER: tl.constexpr,
    ZERO: tl.constexpr, POINT: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, LOGIC: tl.constexpr,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The same for one row of x, on all columns, CHUNKS chunks of them at a time; in float32.

    A thread keeps its own words, and the inputs that belong to them for all ROWS rows: nothing goes
    through shared memory but the sums at the end. EVEN: chunks are full, and there are so many that
    CHUNKS divides them.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, CHUNKS * 32)
    own, last = tl.minimum(row, out - 1)[None, :], (columns - 1) // GROUP
    chunks = tl.cdiv(columns, 64 * HALF)
    start = own.to(tl.int64) * (chunks * 32)
    # Rows that Triton takes for neighbours would have scales laid out by rows, and sums moved to them.
    apart = own * (out // out)
    total = tl.zeros((CHUNKS * 32, ROWS), tl.float32)
    for first in range(0, chunks, CHUNKS):
        chunk, lane = first + at // 32, at % 32
        where = words + start + (first * 32 + at)[:, None]
        code = tl.load(where) if EVEN else tl.load(where, (chunk < chunks)[:, None], other=0)
        for half in tl.static_range(2):
            part = code >> 16 if half else code
            for together in tl.static_range(0, HALF, TOGETHER):
                column = (chunk * 2 + half) * (HALF * 32) + together * 32
                group = tl.minimum(column // GROUP, last)[:, None] * out + apart
                sums = tl.zeros((CHUNKS * 32, ROWS), tl.float32)
                inputs = tl.zeros((CHUNKS * 32,), tl.float32)
                for i in tl.static_range(TOGETHER):
                    there = column + i * 32 + lane
                    if EVEN:
                        given = tl.load(x + there).to(tl.float32)
                    else:
                        given = tl.load(x + there, there < columns, other=0).to(tl.float32)
                    sums += field_of(part, together + i, BITS, POINT, LOGIC) * given[:, None]
                    inputs += given
                if ZERO:
                    sums -= tl.load(zero + group).to(tl.float32) * inputs[:, None]
                total += sums * tl.load(scale + group).to(tl.float32)
    result = tl.sum(total, 0)
    if BIAS:
        result += tl.load(bias + tl.minimum(row, out - 1)).to(tl.float32)
    tl.store(y + row, result.to(y.dtype.element_ty), row < out)


@triton.jit
def add_parts(
    parts, bias, y, values, out, PARTS: tl.constexpr, BIAS: tl.constexpr, VALUES: tl.constexpr
):
    """The sum of what `multiply` made of all parts, in their order, `values` of each; and the bias."""
    at = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    inside = at < values
    total = tl.zeros((VALUES,), tl.float32)
    for i in tl.static_range(PARTS):
        total += tl.load(parts + i * values + at, inside, other=0)
    if BIAS:
        total += tl.load(bias + at % out, inside, other=0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), inside)


@triton.jit
def unpack(
    words, scale, zero, offset, weight, out, columns,
    GROUP: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr,
    ZERO: tl.constexpr, POINT: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The weight itself, one chunk of columns."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    chunk = tl.program_id(1)
    lane = tl.arange(0, 32)
    own, last = tl.minimum(row, out - 1), (columns - 1) // GROUP
    start = own.to(tl.int64) * (tl.cdiv(columns, 64 * HALF) * 32)
    code = tl.load(words + start[:, None] + (chunk * 32 + lane)[None, :])
    for field in tl.static_range(HALF):
        low, high = fields_of(code, field, BITS, POINT)
        for twin in tl.static_range(2):
            column = (chunk * 2 + twin) * 32 * HALF + field * 32
            group = tl.minimum(column // GROUP, last) * out + own
            value = high if twin else low
            if ZERO:
                value -= tl.load(zero + group).to(tl.float32)[:, None]
            value *= tl.load(scale + group).to(tl.float32)[:, None]
            if OFFSET:
                value -= tl.load(offset + group)[:, None]
            here = column + lane
            target = weight + row.to(tl.int64)[:, None] * columns + here[None, :]
            ok = (row < out)[:, None] & (here < columns)[None, :]
            tl.store(target, value.to(weight.dtype.element_ty), ok)
