"""Learned rounding of one block: samples are run through it, and gradients taken back to its weights.

The block is given what the quantized blocks before it give, and its output is to be what the float model
has there: so it makes up for what they lost. An error e of a token's output costs e.F.e nats, where F
is the Fisher information of the predictions, the mean of g.T @ g over the gradients of drawn tokens
(see `sensitivity`); where that was not measured, |e|^2. How codes are learned is said in
`methods.learned`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fewbits.linear import float_weight
from fewbits.methods import Learned, Rounding
from fewbits.pieces import Piece
from fewbits.stream import States, Stream

LEARNED_TOKENS = 32768  # that are learned from, at most, at least one sample; not tuned
STEP_TOKENS = 512  # of a step, at least one sample: 1,024 gained 1 % (LOG.md)


@dataclass(frozen=True, slots=True)
class Samples:
    """What a block is given, and what it is to make of that, both (samples, length, hidden).

    There may be more of the first.
    """

    given: Tensor | States
    wanted: Tensor


@dataclass(frozen=True, slots=True)
class Learnt:
    """What was found, by name of a piece, and the error on held-out samples before and after.

    `step` is that of the best, 0 where nothing was better than the first codes.
    """

    codes: dict[str, Rounding]
    before: float
    after: float
    step: int


@dataclass(frozen=True, slots=True)
class BlockLearning:
    """A block whose rounding is learned.

    Args:
        stream: of the samples.
        number: of the block.
        block: float32.
        pieces: by name, of the roundings.
        fisher: (hidden, hidden), or None.
        fitted: to learn from.
        held_out: to judge by.
    """

    stream: Stream
    number: int
    block: nn.Module
    pieces: dict[str, Piece]
    fisher: Tensor | None
    fitted: Samples
    held_out: Samples

    def learn(self, options: Learned, roundings: dict[str, Rounding]) -> Learnt:
        """Leave in the block what was found to be best."""
        put = partial(_put, self.block, self.pieces)
        samples, length, _ = self.fitted.wanted.shape
        rows = _draw(samples, length, self.number)
        found = options(roundings, put, lambda _: self._gradients(next(rows)), self._error)
        for name, rounding in roundings.items():
            put(name, rounding.best.dequantize(torch.float32))
        return Learnt(roundings, *found)

    def _costly(self, errors: Tensor) -> Tensor:
        """F e, of errors (samples, length, hidden)."""
        return errors if self.fisher is None else errors @ self.fisher.to(errors.device)

    def _error(self) -> float:
        """Nats a token, or the mean square."""
        got = self.stream.run_all(self.number, self.block, self.held_out.given[:])
        errors = got - self.held_out.wanted.to(got.device)
        cost = (self._costly(errors) * errors).sum(-1).mean()
        return float(cost) / (errors.shape[-1] if self.fisher is None else 1)

    def _gradients(self, rows: Tensor) -> dict[str, Tensor]:
        linears = list(dict.fromkeys(piece.linear for piece in self.pieces.values()))
        given = torch.cat([self.fitted.given[i : i + 1] for i in rows.tolist()])
        wanted = self.fitted.wanted[rows].to(self.stream.device).float()
        with self.stream.in_fast_dtype(self.number, self.block):
            found = self.stream.pull_back_to_weights(
                self.number,
                self.block,
                linears,
                given,
                lambda output: self._costly(output - wanted),
            )
        return {
            name: found[piece.linear][piece.start : piece.stop]
            for name, piece in self.pieces.items()
            if piece.linear in found
        }


def learned_samples(fitted: int, length: int) -> int:
    """How many of the samples that are not held out, from the first, are learned from."""
    return min(fitted, max(1, LEARNED_TOKENS // length))


def _put(block: nn.Module, pieces: dict[str, Piece], name: str, weight: Tensor) -> None:
    piece = pieces[name]
    own = float_weight(block.get_submodule(piece.linear))
    own[piece.start : piece.stop].copy_(weight)


def _draw(samples: int, length: int, seed: int) -> Iterator[Tensor]:
    """Which samples a step takes: all of them in turn, each time in another order."""
    generator = torch.Generator().manual_seed(seed)
    count = min(samples, max(1, STEP_TOKENS // length))
    while True:
        order = torch.randperm(samples, generator=generator)
        yield from torch.split(order[: samples // count * count], count)
