"""Trellis codes: a weight's value is told by its own code and by those of the rows before it.

Codes by themselves have 2**bits values. Here the last 8 bits of a chain of codes choose among 256, so
that neighbours share each other's bits, and the best chain of all is found (trellis-coded quantization,
Marcellin and Fischer 1990; as a window that moves over bits, QTIP, Tseng et al. 2024, arXiv 2406.11235).
On normal weights the squared error is 0.0060 of their variance at 4 bits, where 16 values at equal
distance leave 0.0115 and the best 16 leave 0.0095; 0.0217 instead of 0.0374 at 3 bits, 0.0815 instead of
0.1186 at 2. Nothing of so many bits can be below 0.0039, 0.0156 and 0.0625.

A chain is one column of 32 rows, and closed: before its first row comes its last. With c_r the code of
row r, what is looked up for it is

    4 bits   c_{r-1} c_r            3 bits   c_{r-2} c_{r-1} c_r            2 bits   c_{r-3} ... c_r

of which the lowest 8 bits count, c_r lowest. Chains run down columns because methods round columns one
after the other: each has its chains chosen whole, given what all other columns have lost.
"""

from functools import cache

import torch
from torch import Tensor

from fewbits.errors import InputError
from fewbits.native import library

CHAIN = 32  # rows
WINDOW = 8  # bits
_SLICE = 2**22  # values looked up at a time, by numbers of 4 bytes; not tuned
# Found by Lloyd's iteration on normal numbers (benchmarks/trellis.py), as int8.
_TABLES = {
    2: (
        "0d34c3082007efd308c0ed3e0641e66e01eac62de2fd1eadfdc422e00fc5e638062be9b7f10b2b9bc3e7fa0b4608c316"
        "4fdf23f7c8de430fe9282203fc2fe00fc60831f06227d3fbef23cae720d4064821a20c5c0ae9044de3fda9389b1be919"
        "e3f0182cbce3033ad51d20f3145c33d91515e4b4f7f9ee7d350dd5e9c2224b0ce913f9cefed1511d2ef807cde200bb21"
        "55d8fb073ec22aea231cdc02d1ec3dfa244b04e23bbcdce08105c01af3b10735fc18f7d42f16d5f81cf1a6d486faaacf"
        "1c4c7827d7f10ea416e83df9421312d8dc073309b81f5e19bfeafc2c420017de2a0dc9f61534e3fa09c0df4eebd30002"
        "dee7a916ff1bef29f64a0221dd273900"
    ),
    3: (
        "1e2efc4c0aecd486fed3c6f2e56c3b0f0b3ae4222a14f7021e3d08f60bf4c7280c12b8362447f3cd04e50227d950f416"
        "e0171aba08f72a32e402f415c52a7fd6dff9d221b3bd0f053640b9f810cddc972ac60cfdea311bdc5d19e73019d30afc"
        "c9d6e72d00fd45621854e604f6daa3bc27eef7ddc5030d1bf60d2fe600ad501cff1c0caa3cdf2af0ed19240637b8e0d3"
        "effdd213dac4aef2102401d53ee3f9ed3505610fedce1ee3d405123bbcf1ec26fcde04ce20e7f012f3c843092fe71ee0"
        "f4e52b02190dfa4014a5f055223008fc180be74af4d50004ffe113c823f8360aeef718c4d5dde62a2df6d81550091fea"
        "05dc27ec9eb63c1d41f31efc1208e0c7"
    ),
    4: (
        "512001e03fcac030140cd1451927d939d3e29acf2909ef1bff20c91231bff6da382e084cc46eff0e04e1f2f9d7e92216"
        "0ac215f8041b22b3102b34e3f1d9fd05011aedb0173606c90c424f2111fd296491141c25ddf20e0afa00ed04f8a63ce8"
        "edd4e5155d28b5dc1faa3c29f2f7c5fbdd27fb1cd0493bea07f3112fbb0d03c8fbe959ea34f5c9427e282218dfd1ef0b"
        "ea411003f1faf7e41bebc0d70a36e1fff30f2d17f9011504f434ece5231d0ad0e407220ffad6e700dc3a1a54ecf50f2d"
        "1e01c6ef0eb6d9f32bf7e4fffd07cfde12b7ab27d8eb30d046fd08f4e6e11781bbc9dc0ae712a115ce04fb0ad4ef1c24"
        "0bf7f4e522e04afce919d6ef041331bd"
    ),
}
UNIT = {2: 44.743, 3: 38.271, 4: 37.447}  # entries that one standard deviation is worth


@cache
def table(bits: int) -> Tensor:
    """What windows stand for, (256,) int8."""
    return torch.frombuffer(bytearray.fromhex(_TABLES[bits]), dtype=torch.int8)


def values(codes: Tensor, bits: int) -> Tensor:
    """Entries of the table, (rows, columns) int8.

    Args:
        codes: (rows, columns) uint8, of whole chains.

    Raises:
        InputError: rows are no whole chains.
    """
    chains = codes.view(_chains(len(codes)), CHAIN, -1)
    found = torch.empty(chains.shape, dtype=torch.int8, device=codes.device)
    some = max(1, _SLICE // (CHAIN * max(1, codes.shape[1])))
    for into, part in zip(torch.split(found, some), torch.split(chains, some), strict=True):
        into.copy_(look_up([part.roll(back, 1) for back in range(-(-WINDOW // bits))], bits))
    return found.view(codes.shape)


def look_up(codes: list[Tensor], bits: int) -> Tensor:
    """Entries for codes of rows, of the rows before those, and so on, as many as a window has."""
    window = codes[-1].clone()
    for later in codes[-2::-1]:  # what leaves 8 bits at the top is gone
        window = (window << bits) | later
    return table(bits).to(window.device)[window.int()]


def before(rows: Tensor, bits: int) -> list[Tensor]:
    """Numbers of rows (n,), and of the rows whose codes are looked up with theirs, the nearest first."""
    start = rows - rows % CHAIN
    return [start + (rows - start - back) % CHAIN for back in range(-(-WINDOW // bits))]


def encode(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The codes of least squared error, (rows, columns) uint8.

    The best closed chain is found in two passes of Viterbi's algorithm: one, begun in the middle of the
    chain, tells what is best where the chain closes, the other holds on to that. On normal numbers that
    leaves 4 % more than the best of all closed chains at 2 bits, 2 % at 3, 0.6 % at 4.

    Args:
        weight: (rows, columns), of whole chains.
        scale: alike, what entries of the table are multiplied by.

    Raises:
        InputError: rows are no whole chains.
    """
    count, columns = _chains(len(weight)), weight.shape[1]
    x, steps = (
        t.float().reshape(count, CHAIN, columns).transpose(1, 2).reshape(-1, CHAIN)
        for t in (weight, scale)
    )
    codes = find_chains(x, steps, bits)
    return codes.view(count, columns, CHAIN).transpose(1, 2).reshape(weight.shape)


def find_chains(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """As `encode`, for chains one below the other, (chains, 32), in float32.

    By the native library where there is one, and chains are on the CPU.
    """
    native = library() if x.device.type == "cpu" else None
    if native is not None:
        return native.find_chains(x.contiguous(), scale.contiguous(), bits, table(bits))
    entries = table(bits).to(x.device).float()
    middle = CHAIN // 2
    states = 1 << (WINDOW - bits)
    cost = torch.zeros(len(x), states, device=x.device)
    parts = [x[:, middle:], x[:, :middle]], [scale[:, middle:], scale[:, :middle]]
    back, cost = _forward(torch.cat(parts[0], 1), torch.cat(parts[1], 1), entries, bits, cost)
    state = cost.argmin(1)
    for step in range(CHAIN - 1, middle - 1, -1):
        state = _before(state, back[step], bits)
    cost = torch.full_like(cost, torch.inf).scatter_(1, state[:, None], 0)
    back, _ = _forward(x, scale, entries, bits, cost)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    for step in range(CHAIN - 1, -1, -1):
        codes[:, step] = (state & (1 << bits) - 1).to(torch.uint8)
        state = _before(state, back[step], bits)
    return codes


def _forward(
    x: Tensor, scale: Tensor, entries: Tensor, bits: int, cost: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Viterbi's algorithm: by step and state the code that is forgotten, and the cost of each state.

    A state is what a window keeps of the codes so far; costs are (chains, states).
    """
    back = []
    for step in range(x.shape[1]):
        error = x[:, step, None] - scale[:, step, None] * entries
        every = cost.repeat_interleave(1 << bits, 1) + error * error
        cost, forgotten = every.view(len(x), 1 << bits, -1).min(1)
        back.append(forgotten)
    return back, cost


def _before(state: Tensor, forgotten: Tensor, bits: int) -> Tensor:
    """The state that came before."""
    top = forgotten.gather(1, state[:, None])[:, 0]
    return (top << (WINDOW - bits) | state) >> bits


def check_chains(rows: Tensor) -> None:
    """Whether rows, by their numbers (n,), are whole chains.

    Raises:
        InputError: they are not.
    """
    chains = rows.view(_chains(len(rows)), CHAIN)
    if not torch.equal(chains, chains[:, :1] // CHAIN * CHAIN + torch.arange(CHAIN)):
        raise InputError(f"rows of a trellis are taken in whole chains of {CHAIN}")


def _chains(rows: int) -> int:
    if rows % CHAIN:
        raise InputError(f"{rows} rows are no whole chains; accepted are multiples of {CHAIN}")
    return rows // CHAIN
