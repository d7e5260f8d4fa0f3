"""Q4_K: 4 bits in blocks of 256 columns, with two levels of scales.

A block has eight parts of 32 columns. Part j has `w = d * s[j] * q - dmin * m[j]`, with s and m from 0
to 63 and d, dmin in float16: no scale in float16 with an integer zero point says the same.

    byte   0-1   2-3    4-15            16-47               48-79   ...
           d     dmin   s and m         parts 0, 1          parts 2, 3

    byte 4 + j   7 6 5 4 3 2 1 0          byte 16 + i: column i of part 0 below, of part 1 above
      j 0-3      [hi] [ s[j]   ]          hi: bits 4 and 5 of s[4 + j]
      j 4-7      [hi] [ m[j-4] ]          hi: bits 4 and 5 of m[j]
      j 8-11     [m[j-4]][s[j-4]]         their bits 0 to 3
"""

import torch
from torch import Tensor

from fewbits.formats.layout import Integers
from fewbits.scheme import LEVELS, QuantScheme
from fewbits.tensor import Levels, QuantizedTensor

KIND, LABEL, BYTES = "Q4_K", "w4-g32-asym-k", 144
_PART = 32
_PARTS = LEVELS // _PART
_HEAD = 16  # bytes before the codes
_ONE = (0x00, 0x3C)  # in float16
_S, _M = [1] * 4 + [0] * 4 + [1] * 4, [0] * 4 + [1] * 4 + [16] * 4  # every s is 1; every m


class Q4KBlock:
    """Blocks of Q4_K, in rows.

    >>> weight = Q4KBlock().read(torch.arange(144, dtype=torch.uint8)[None])
    >>> weight.levels.counts[0, :, 0].tolist()  # s
    [4, 5, 6, 7, 12, 13, 14, 15]
    >>> Q4KBlock().write(weight)[0, :5].tolist()
    [0, 1, 2, 3, 4]
    """

    kind, label, columns, size_bytes = KIND, LABEL, LEVELS, BYTES

    def write(self, weight: QuantizedTensor) -> Tensor:
        """(out, in / 256 * 144)."""
        assert weight.levels is not None, "its scheme has them"
        steps, counts = weight.levels.steps, weight.levels.counts.reshape(-1, _PARTS, 2)
        s, m = counts.unbind(-1)
        small = torch.cat(
            [
                s[:, :4] | (s[:, 4:] >> 4) << 6,
                m[:, :4] | (m[:, 4:] >> 4) << 6,
                (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4,
            ],
            1,
        )
        q = weight.codes.reshape(-1, _PARTS, _PART)
        pairs = q[:, 0::2] | q[:, 1::2] << 4
        heads = as_bytes(steps).reshape(-1, 4)
        return torch.cat([heads, small, pairs.reshape(len(q), -1)], 1).reshape(len(steps), -1)

    def read(self, stored: Tensor) -> QuantizedTensor:
        """The inverse."""
        rows, blocks = len(stored), stored.reshape(-1, BYTES)
        steps = as_halves(blocks[:, :4]).reshape(rows, -1, 2)
        low, middle, high = blocks[:, 4:_HEAD].reshape(-1, 3, 4).unbind(1)
        s = torch.cat([low & 63, (high & 15) | (low >> 6) << 4], 1)
        m = torch.cat([middle & 63, (high >> 4) | (middle >> 6) << 4], 1)
        pairs = blocks[:, _HEAD:].reshape(-1, _PARTS // 2, 1, _PART)
        codes = torch.cat([pairs & 15, pairs >> 4], 2).reshape(rows, -1)
        levels = Levels(steps, torch.stack([s, m], -1).reshape(rows, -1, 2))
        scale = levels.scale
        points = torch.zeros(scale.shape, dtype=torch.uint8)
        return QuantizedTensor(codes, scale, points, QuantScheme.parse(LABEL), levels=levels)

    def decode(self, stored: Tensor, rows: int) -> Integers:
        """By the gguf library: one number at a time, the others made 0 or 1."""
        blocks = stored.reshape(-1, BYTES)

        def found(**parts: list[int]) -> Tensor:
            changed = blocks.clone()
            places = {
                "d": slice(0, 2),
                "dmin": slice(2, 4),
                "sm": slice(4, _HEAD),
                "q": slice(_HEAD, None),
            }
            for name, given in parts.items():
                values = torch.tensor(given, dtype=torch.uint8)
                changed[:, places[name]] = values
            return elsewhere(changed, self.kind, rows, _PART)

        one, none = list(_ONE), [0, 0]
        codes = found(d=one, dmin=none, sm=_S)
        s, m = found(d=one, dmin=none, q=[0x11]), -found(d=none, dmin=one, q=[0])
        d, dmin = found(dmin=none, sm=_S, q=[0x11]), -found(d=none, sm=_M, q=[0])
        scale = found(dmin=none, q=[0x11])[:, 0].reshape(rows, -1)
        steps = torch.stack([d[::_PARTS, 0], dmin[::_PARTS, 0]], -1).to(torch.float16)
        counts = torch.stack([s[:, 0], m[:, 0]], -1).to(torch.uint8)
        return Integers(
            codes.to(torch.uint8).reshape(rows, -1),
            scale,
            torch.zeros(scale.shape, dtype=torch.uint8),
            Levels(steps.reshape(rows, -1, 2), counts.reshape(rows, -1, 2)),
        )


def as_bytes(values: Tensor) -> Tensor:
    """(n,) float16 -> (n, 2) uint8."""
    return values.contiguous().view(torch.uint8).reshape(-1, 2)


def as_halves(stored: Tensor) -> Tensor:
    """The inverse of `as_bytes`."""
    return stored.contiguous().view(torch.float16).reshape(-1)


def elsewhere(blocks: Tensor, kind: str, rows: int, width: int) -> Tensor:
    """(n, width) float32 values by the gguf library, which takes rows of a matrix at a time."""
    import gguf

    given = blocks.reshape(rows, -1).numpy()
    found = gguf.quants.dequantize(given, gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(found).reshape(-1, width)
