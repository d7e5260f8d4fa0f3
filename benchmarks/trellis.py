"""Tables of trellis codes: found by Lloyd's iteration on normal numbers, and what they leave.

From random entries: the best chains for many numbers, then each entry becomes the mean of the numbers
that chose it, until little changes; on few numbers first, then on more. The tables in
`fewbits/trellis.py` are the best of three such runs for each number of bits. Printed are the squared
errors on numbers that no table was found on, beside those of the best 2**bits values, of values at equal
distance, and of anything (the distortion-rate function of normal numbers).

Run:  python benchmarks/trellis.py [--bits 4] [--tables]
"""

import argparse
import sys

import torch
from torch import Tensor

from fewbits import trellis
from fewbits.native import library, why_absent

NUMBERS, MORE = 2**17, 2**19
ROUNDS, MORE_ROUNDS = 40, 25
LEVELS = 256


def main() -> None:
    """Find a table for each number of bits, and compare it with ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4], choices=(2, 3, 4))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tables", action="store_true", help="print what was found, as int8 in hex")
    args = parser.parse_args()
    if library() is None:
        sys.exit(f"the native library {why_absent()}")
    print("bits  anything      ours     found    values     equal")
    for bits in args.bits:
        generator = torch.Generator().manual_seed(args.seed)
        unseen = torch.randn(MORE, generator=torch.Generator().manual_seed(99))
        found = find_table(bits, generator)
        values, equal = best_values(bits, generator), equal_distances(bits, unseen)
        ours = trellis.table(bits).float() / trellis.UNIT[bits]
        errors = [error_of(table, bits, unseen) for table in (ours, found)]
        nearest = float((unseen[:, None] - values).abs().amin(1).square().mean())
        columns = (4.0**-bits, *errors, nearest, equal)
        print(f"{bits:4}  " + "  ".join(f"{error:8.5f}" for error in columns))
        if args.tables:
            scaled = (found / found.abs().max() * 127).round().to(torch.int8)
            print(bytes(scaled.view(torch.uint8).tolist()).hex())


def find_table(bits: int, generator: torch.Generator) -> Tensor:
    """By Lloyd's iteration: (256,)."""
    table = torch.randn(LEVELS, generator=generator)
    for numbers, rounds in ((NUMBERS, ROUNDS), (MORE, MORE_ROUNDS)):
        x = torch.randn(numbers, generator=generator)
        for _ in range(rounds):
            windows = choose(table, bits, x)
            sums = torch.zeros(LEVELS).index_add_(0, windows, x)
            counts = torch.bincount(windows, minlength=LEVELS)
            table = torch.where(counts > 0, sums / counts, table)
    return table


def choose(table: Tensor, bits: int, x: Tensor) -> Tensor:
    """Which entry stands for each number, (n,)."""
    native = library()
    assert native is not None
    chains = x.view(-1, trellis.CHAIN)
    codes = native.find_chains(chains, torch.ones_like(chains), bits, table).long()
    window = torch.zeros_like(codes)
    for back in range(-(-trellis.WINDOW // bits)):
        window |= codes.roll(back, 1) << back * bits
    return (window & LEVELS - 1).flatten()


def error_of(table: Tensor, bits: int, x: Tensor) -> float:
    """Mean squared error of the best chains."""
    return float((x - table[choose(table, bits, x)]).square().mean())


def best_values(bits: int, generator: torch.Generator) -> Tensor:
    """The 2**bits values that are best without a trellis."""
    x = torch.randn(MORE // 4, generator=generator)
    values = torch.quantile(x, (torch.arange(2**bits) + 0.5) / 2**bits)
    for _ in range(300):
        nearest = (x[:, None] - values).abs().argmin(1)
        sums = torch.zeros(2**bits).index_add_(0, nearest, x)
        values = sums / torch.bincount(nearest, minlength=2**bits)
    return values


def equal_distances(bits: int, x: Tensor) -> float:
    """The error of the best 2**bits values at equal distance."""
    middle = (2**bits - 1) / 2
    errors = []
    for step in torch.linspace(0.1, 1.3, 121).tolist():
        codes = (x / step + middle).round_().clamp_(0, 2**bits - 1)
        errors.append(float(((codes - middle) * step - x).square().mean()))
    return min(errors)


if __name__ == "__main__":
    main()
