"""Which rows of which linear of a block a source matrix is."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from fewbits.structure import Matrix


@dataclass(frozen=True, slots=True)
class Piece:
    """A source matrix, or one of a stack, as rows of a linear of the block."""

    source: str
    linear: str
    start: int
    stop: int
    expert: int | None = None

    @property
    def name(self) -> str:
        """The source tensor; of a stack with the number of the expert."""
        return self.source if self.expert is None else f"{self.source}[{self.expert}]"


def find_pieces(matrices: Iterable[Matrix], prefix: str) -> dict[str, list[Piece]]:
    """The source matrices of one block by the linear that they are rows of, its experts split.

    Args:
        matrices: of the block.
        prefix: of the paths of its modules.
    """
    pieces: dict[str, list[Piece]] = defaultdict(list)
    rows: dict[str, int] = defaultdict(int)
    for matrix in sorted(matrices, key=lambda m: (m.expert or 0, m.part)):
        module = matrix.module.removeprefix(prefix)
        linears: list[tuple[str, int | None]]
        if matrix.kind != "expert":
            linears = [(module, None)]
        elif matrix.expert is not None:
            linears = [(f"{module}.{matrix.parameter}.{matrix.expert}", None)]
        else:
            linears = [(f"{module}.{matrix.parameter}.{i}", i) for i in range(matrix.shape[0])]
        height = matrix.rows_columns[0]
        for linear, expert in linears:
            start = rows[linear]
            rows[linear] = start + height
            pieces[linear].append(Piece(matrix.source, linear, start, start + height, expert))
    return pieces
