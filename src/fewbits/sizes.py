"""How large the weight files of a run will be, to the byte, from headers alone."""

from collections.abc import Iterable
from itertools import chain

from fewbits.checkpoint import MAX_SHARD_BYTES, TensorInfo, encode_header
from fewbits.formats import GgufLayout
from fewbits.gguf_file import gguf_bytes
from fewbits.journal import cut, ordered
from fewbits.plan import Plan
from fewbits.scheme import QuantScheme

_EMPTY = len(encode_header([])[8:].rstrip())  # of a header without tensors


def weight_file_bytes(plan: Plan, max_shard_bytes: int = MAX_SHARD_BYTES) -> int:
    """Of all weight files that `fewbits.quantize` will write, headers included.

    Exact, but for columns that calibration keeps in 16 bit: how many is known only when it has run.

    Args:
        plan: what is written.
        max_shard_bytes: of one file, but for GGUF, which is one.

    Raises:
        InputError: GGUF has no place for a tensor, or the tokenizer cannot be read.
    """
    if isinstance(plan.format, GgufLayout):
        return _gguf_bytes(plan)
    found = chain.from_iterable(
        written_tensors(plan, name, _scheme(plan, name))
        for names in plan.names().values()
        for name in names
    )
    return sum(_file_bytes(shard) for shard in cut(found, max_shard_bytes))


def written_tensors(plan: Plan, name: str, scheme: QuantScheme | None) -> list[TensorInfo]:
    """What is written of one source tensor, in its order, were it in a scheme, or None for float.

    A head that is made from tied embeddings is written in a scheme only: in float it is theirs.
    """
    info = plan.info(name)
    if scheme is None:
        return [] if name in plan.origins else [TensorInfo(name, info.dtype, info.shape, "")]
    matrix, layout = plan.matrices[name], plan.format
    stack = matrix.shape[:-2]
    headers = layout.headers(name, matrix.rows_columns, scheme, layout.scales(info.dtype).dtype)
    return [TensorInfo(key, dtype, (*stack, *shape), "") for key, (dtype, shape) in headers.items()]


def bytes_together(plan: Plan, names: Iterable[str], scheme: QuantScheme | None, file_bytes: int) -> int:
    """What source tensors take of the files, all of them in one scheme, or None for float.

    To within some digits of offsets, and what pads a file: sums of these differ by as much from what
    `weight_file_bytes` gives.

    Args:
        plan: that they are in.
        names: of them.
        scheme: of all.
        file_bytes: of the largest file, roughly.
    """
    digits = len(str(file_bytes))
    known: dict[tuple[object, ...], tuple[int, int]] = {}  # experts of a block are alike
    total = 0
    for name in names:
        matrix, dtype = plan.matrices[name], plan.info(name).dtype
        alike = (matrix.module, matrix.shape, matrix.transposed, dtype, name in plan.origins)
        if alike not in known:
            tensors = written_tensors(plan, name, scheme)
            size = sum(info.size_bytes for info in tensors)
            if isinstance(plan.format, GgufLayout):  # whose names and shapes are always the same
                known[alike] = size, 0
            else:
                entries = sum(_entry_bytes(info, digits) for info in tensors)
                known[alike] = size + entries - len(tensors) * len(name), len(tensors)
        fixed, letters = known[alike]
        total += fixed + letters * len(name)
    return total


def _scheme(plan: Plan, name: str) -> QuantScheme | None:
    place = plan.placements.get(name)
    return None if place is None else place.scheme


def _file_bytes(shard: list[TensorInfo]) -> int:
    return len(encode_header(ordered(shard))) + sum(info.size_bytes for info in shard)


def _entry_bytes(info: TensorInfo, digits: int) -> int:
    """Of a tensor in a header of safetensors, its offsets with so many digits each."""
    alone = len(encode_header([info])[8:].rstrip())
    return alone - _EMPTY - len(f"0{info.size_bytes}") + 2 * digits


def _gguf_bytes(plan: Plan) -> int:
    """Of the file: what is written, arranged with the tokenizer as it will be."""
    source = plan.checkpoint
    made = (name for name in plan.origins if name not in source.tensors)
    tensors = chain.from_iterable(
        written_tensors(plan, name, _scheme(plan, name)) for name in chain(source.tensors, made)
    )
    labels = {"quantization_config": plan.format.config(plan.placements, plan.floats)}
    return gguf_bytes(source.folder, plan.config | labels, list(tensors))
