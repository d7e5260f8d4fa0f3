"""The programs that run on a GPU, in Triton; `kernel.py` says how a weight lies in memory.

All of them take `words`, `scale`, `zero` and `offset` of a weight of `out` rows and `columns`, and read
ROWS of its rows. TOGETHER fields have one scale; POINT is the zero point where `zero` has none. Inputs
past the last column count as zero, so the scale that is read for them is any.
"""

import triton
import triton.language as tl


@triton.jit
def field_of(words, field: tl.constexpr, BITS: tl.constexpr, FIELDS: tl.constexpr, point, two_23):
    """The codes of one field less `point`, in float32, exactly.

    Bits that are put under the exponent of 2^23 are a number beyond it: logic and a multiply-add instead
    of shifts and a conversion, for which a processor has fewer units. `two_23` are the bits of 2^23.
    """
    half: tl.constexpr = FIELDS // 2
    place: tl.constexpr = field % half * BITS
    own = words >> (half * BITS) if field >= half else words
    bits = (own & ((2**BITS - 1) << place)) | two_23
    number = bits.to(tl.float32, bitcast=True)
    return number * (1.0 / 2**place) - (2.0 ** (23 - place) + point)


@triton.jit
def one_row(
    x, words, scale, zero, offset, bias, y, out, columns, two_23,
    GROUP: tl.constexpr, BITS: tl.constexpr, FIELDS: tl.constexpr, TOGETHER: tl.constexpr,
    ZERO: tl.constexpr, POINT: tl.constexpr, OFFSET: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """`x @ W.T + bias` for x of one row: CHUNKS chunks of columns at a time, on plain arithmetic.

    As an argument, `two_23` is in a register, so that one instruction ANDs and ORs. (Codes that tensor
    cores are given would then go through shared memory.)
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, 32)
    chunks = tl.cdiv(columns, 32 * FIELDS)
    inside = row < out
    last = (columns - 1) // GROUP
    start = row.to(tl.int64) * (chunks * 32)
    total = tl.zeros((ROWS, CHUNKS, 32), tl.float32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        word = chunk[:, None] * 32 + lane[None, :]
        mask = inside[:, None, None] & (chunk < chunks)[None, :, None]
        fields = tl.load(words + start[:, None, None] + word[None, :, :], mask, other=0)
        for part in tl.static_range(0, FIELDS, TOGETHER):
            column = chunk * (32 * FIELDS) + part * 32  # the first of them
            place = tl.minimum(column // GROUP, last)[None, :] * out + row[:, None]
            s = tl.load(scale + place, inside[:, None], other=0).to(tl.float32)
            if ZERO:
                z = tl.load(zero + place, inside[:, None], other=0).to(tl.float32)[:, :, None]
            else:
                z = POINT
            product = tl.zeros((ROWS, CHUNKS, 32), tl.float32)
            inputs = tl.zeros((CHUNKS, 32), tl.float32)
            for i in tl.static_range(TOGETHER):
                here = column[:, None] + i * 32 + lane[None, :]
                value = tl.load(x + here, here < columns, other=0).to(tl.float32)
                product += field_of(fields, part + i, BITS, FIELDS, z, two_23) * value[None, :, :]
                if OFFSET:
                    inputs += value
            total += product * s[:, :, None]
            if OFFSET:
                o = tl.load(offset + place, inside[:, None], other=0)
                total -= o[:, :, None] * inputs[None, :, :]
    result = tl.sum(tl.sum(total, 2), 1)
    if BIAS:
        result += tl.load(bias + row, inside, other=0).to(tl.float32)
    tl.store(y + row, result.to(y.dtype.element_ty), inside)


@triton.jit
def some_rows(
    x, words, scale, zero, offset, bias, y, out, columns, rows, length,
    GROUP: tl.constexpr, BITS: tl.constexpr, FIELDS: tl.constexpr, TOGETHER: tl.constexpr,
    ZERO: tl.constexpr, POINT: tl.constexpr, OFFSET: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """The product with INPUTS rows of x, of a part of the columns, `length` chunks, on tensor cores.

    With several parts, y has them one behind the other, in float32, and BIAS is off.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    given = tl.program_id(1) * INPUTS + tl.arange(0, INPUTS)
    part = tl.program_id(2)
    lane = tl.arange(0, 32)
    chunks = tl.cdiv(columns, 32 * FIELDS)
    inside, there = row < out, given < rows
    last = (columns - 1) // GROUP
    start = row.to(tl.int64) * (chunks * 32)
    place = given.to(tl.int64) * columns
    total = tl.zeros((ROWS, INPUTS), tl.float32)
    for chunk in range(part * length, tl.minimum((part + 1) * length, chunks)):
        word = start[:, None] + (chunk * 32 + lane)[None, :]
        code = tl.load(words + word, inside[:, None], other=0)
        for field in tl.static_range(0, FIELDS, TOGETHER):
            column = chunk * 32 * FIELDS + field * 32
            group = tl.minimum(column // GROUP, last) * out + row
            s = tl.load(scale + group, inside, other=0).to(tl.float32)
            z = tl.load(zero + group, inside, other=0).to(tl.float32)[:, None] if ZERO else POINT
            product = tl.zeros((ROWS, INPUTS), tl.float32)
            inputs = tl.zeros((INPUTS,), tl.float32)
            for i in tl.static_range(TOGETHER):
                here = column + i * 32 + lane
                mask_x = there[None, :] & (here < columns)[:, None]
                value = tl.load(x + place[None, :] + here[:, None], mask_x, other=0)  # (32, INPUTS)
                c = field_of(code, field + i, BITS, FIELDS, z, 0x4B000000)
                product = tl.dot(c.to(value.dtype), value, product, input_precision="ieee")
                if OFFSET:
                    inputs += tl.sum(value.to(tl.float32), 0)
            total += product * s[:, None]
            if OFFSET:
                total -= tl.load(offset + group, inside, other=0)[:, None] * inputs[None, :]
    if BIAS:
        total += tl.load(bias + row, inside, other=0).to(tl.float32)[:, None]
    target = y + part.to(tl.int64) * rows * out + given.to(tl.int64)[None, :] * out + row[:, None]
    tl.store(target, total.to(y.dtype.element_ty), inside[:, None] & there[None, :])


@triton.jit
def unpack(
    words, scale, zero, offset, weight, out, columns,
    GROUP: tl.constexpr, BITS: tl.constexpr, FIELDS: tl.constexpr, TOGETHER: tl.constexpr,
    ZERO: tl.constexpr, POINT: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The weight itself, one chunk of columns."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    chunk = tl.program_id(1)
    lane = tl.arange(0, 32)
    inside = row < out
    last = (columns - 1) // GROUP
    start = row.to(tl.int64) * (tl.cdiv(columns, 32 * FIELDS) * 32)
    code = tl.load(words + start[:, None] + (chunk * 32 + lane)[None, :], inside[:, None], other=0)
    for field in tl.static_range(0, FIELDS, TOGETHER):
        column = chunk * 32 * FIELDS + field * 32
        group = tl.minimum(column // GROUP, last) * out + row
        s = tl.load(scale + group, inside, other=0).to(tl.float32)
        z = tl.load(zero + group, inside, other=0).to(tl.float32)[:, None] if ZERO else POINT
        for i in tl.static_range(TOGETHER):
            value = field_of(code, field + i, BITS, FIELDS, z, 0x4B000000) * s[:, None]
            if OFFSET:
                value -= tl.load(offset + group, inside, other=0)[:, None]
            here = column + i * 32 + lane
            target = weight + row.to(tl.int64)[:, None] * columns + here[None, :]
            ok = inside[:, None] & (here < columns)[None, :]
            tl.store(target, value.to(weight.dtype.element_ty), ok)
