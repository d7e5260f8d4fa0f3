"""How a weight lies in the memory of a GPU: as 32-bit words of codes.

A row is cut into chunks of 32 words; each half of a word has n fields, from its lowest bits on (2 of 8
bits, 4 of 4, 5 of 3, 8 of 2), and field i of the lower half of word j of a chunk is its column
32 * i + j, of the upper half its column 32 * (n + i) + j. So the 32 columns of one field are neighbours
among the inputs, and belong to one group. 3-bit codes take 3.2 bits.
"""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

WORDS = 32  # of a chunk
HALF = {2: 8, 3: 5, 4: 4, 8: 2}  # codes in half a word, by their bits


def chunk_columns(bits: int) -> int:
    """Columns of a chunk."""
    return 2 * HALF[bits] * WORDS


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes (out, in) in 32-bit words (out, chunks * 32): see the layout above."""
    half = HALF[bits]
    codes = F.pad(codes, (0, -codes.shape[1] % (2 * half * WORDS)))
    chunks = codes.view(len(codes), -1, 2, half, WORDS)
    words = torch.zeros(len(codes), chunks.shape[1], WORDS, dtype=torch.int64, device=codes.device)
    for upper, i in product(range(2), range(half)):
        words |= chunks[:, :, upper, i].long() << 16 * upper + i * bits
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).flatten(1)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Codes, int32, (out, chunks * fields * 32)."""
    chunks = words.view(len(words), -1, 1, WORDS)
    places = [16 * upper + i * bits for upper in range(2) for i in range(HALF[bits])]
    shifts = torch.tensor(places, dtype=torch.int32, device=words.device)
    codes: Tensor = chunks >> shifts[:, None] & (2**bits - 1)
    return codes.flatten(1)
