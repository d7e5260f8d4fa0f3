"""quantize(): the one loop, from a float checkpoint to a verified quantized one; and quantize_()."""

import re
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.checkpoint import (
    CONFIG,
    LEDGER,
    MAX_SHARD_BYTES,
    CheckpointWriter,
    Written,
    carried_files,
    hash_file,
    hash_json,
    hash_tensor,
    resolve,
)
from fewbits.errors import InputError
from fewbits.ledger import Codes, Entry, Ledger, plain, read_ledger
from fewbits.linear import QuantizedLinear, replace_experts
from fewbits.methods import RTN, Method
from fewbits.plan import Plan, make_plan
from fewbits.recipe import DEFAULT_SCHEME, Recipe
from fewbits.scheme import QuantScheme
from fewbits.structure import (
    EXPERT_PARAMETERS,
    Kind,
    Matrix,
    find_head,
    is_conv1d,
    is_experts,
    is_linear,
)
from fewbits.tensor import Note, QuantizedTensor, quantize_tensor
from fewbits.verify import Progress, Verification, verify


@dataclass(frozen=True, slots=True)
class Quantized:
    """A finished run: where, what the ledger says, what verification compared.

    `reused` tells that `out` held the finished result of the same run already.
    """

    out: Path
    ledger: Ledger
    verification: Verification
    weight_bytes: int
    source_weight_bytes: int
    parameters: int
    reused: bool = False

    @property
    def bits_per_weight(self) -> float:
        """Over whole files: everything in the weight files, per source parameter."""
        return 8 * self.weight_bytes / self.parameters

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "out": str(self.out),
            "request": self.ledger.request,
            "totals": self.ledger.totals,
            "weight_bytes": self.weight_bytes,
            "source_weight_bytes": self.source_weight_bytes,
            "bits_per_weight": self.bits_per_weight,
            "notes": [asdict(note) for note in self.ledger.notes],
            "verified": asdict(self.verification),
            "reused": self.reused,
        }


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    method: Method | None = None,
    scheme: QuantScheme | None = None,
    overrides: tuple[tuple[str, QuantScheme | None], ...] = (),
    head: bool = False,
    format: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> Quantized:
    """Quantize a checkpoint, write it, and prove that what was written is what was chosen.

    Args:
        model: folder of a float checkpoint, or a hub id.
        out: folder to be made. If it holds the finished result of the same run it is verified and
            left as it is.
        method: rounds each matrix; round to nearest by default.
        scheme: 4 bits in groups of 128 by default.
        overrides: (pattern, scheme or None for float); see `Recipe`.
        head: quantize the output head too.
        format: "compressed-tensors" or "fewbits"; by default the first, and the second for a model
            that the first cannot hold.
        max_shard_bytes: how much is buffered before a weight file is written.
        progress: called with (what, done, total).

    Raises:
        InputError: nothing was written.
        ResourceError: the disk failed; nothing was left behind.
        VerificationError: what was read back differs from what was chosen.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     result = quantize("reference/model", f"{folder}/int4", scheme=QuantScheme(4, "group", 128))
    >>> result.ledger.totals["quantized"], result.verification.problems
    (42, [])
    """
    recipe = Recipe(method or RTN(), scheme or DEFAULT_SCHEME, overrides, head)
    out = Path(out)
    plan = make_plan(resolve(model), recipe, format)
    request = recipe.describe() | {"format": plan.format.name}
    source = _describe_source(model, plan)
    if out.exists():
        return _reuse(out, plan, request, source, progress)
    ledger = Ledger(version("fewbits"), request, source, notes=list(plan.notes))
    with CheckpointWriter(out, max_shard_bytes) as writer:
        _write_weights(plan, recipe, writer, ledger, progress)
        quantization = plan.format.config(plan.placements, plan.floats)
        writer.write_json(CONFIG, plan.config | {"quantization_config": quantization})
        writer.carry_over(plan.checkpoint.folder)
        ledger.notes += plan.checkpoint.notes
        ledger.files = _describe_files(writer.folder)
        writer.write_json(LEDGER, ledger.to_json())
        verification = verify(writer.folder, progress=progress)
        writer.commit()
    return _result(out, plan, ledger, verification)


def _result(
    out: Path, plan: Plan, ledger: Ledger, verification: Verification, reused: bool = False
) -> Quantized:
    weights = sum(f["size_bytes"] for n, f in ledger.files.items() if n.endswith(".safetensors"))
    source = sum(plan.checkpoint.file_bytes.values())
    return Quantized(out, ledger, verification, weights, source, plan.parameters, reused)


def _describe_source(model: str | Path, plan: Plan) -> dict[str, Any]:
    """Which checkpoint it was: never a path of this machine."""
    checkpoint = plan.checkpoint
    sizes = {
        name: {"size_bytes": size, "header_bytes": checkpoint.header_bytes[name]}
        for name, size in checkpoint.file_bytes.items()
    }
    name = Path(model).resolve().name if Path(model).is_dir() else str(model)
    carried = {name: hash_file(checkpoint.folder / name) for name in carried_files(checkpoint.folder)}
    return {
        "name": name,
        "config_sha256": hash_json(checkpoint.config),
        "files": sizes,
        "carried": carried,
    }


def _describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {
            "size_bytes": path.stat().st_size,
            "sha256": hash_file(path),
        }
        for path in files
    }


def _reuse(
    out: Path, plan: Plan, request: dict[str, Any], source: dict[str, Any], progress: Progress | None
) -> Quantized:
    """Verify the finished result of the same run; refuse anything else."""
    accepted = "accepted is a folder that does not exist yet, or the result of the same run"
    if not (out / LEDGER).is_file():
        raise InputError(f"{out} exists and was not written by fewbits; {accepted}")
    ledger = read_ledger(out)
    differences = [
        f"{key} was {ledger.request.get(key)!r} and is {value!r} now"
        for key, value in plain(request).items()
        if ledger.request.get(key) != value
    ]
    if {k: v for k, v in ledger.source.items() if k != "name"} != {
        k: v for k, v in plain(source).items() if k != "name"
    }:
        differences.append("the source is another")
    if ledger.version != version("fewbits"):
        differences.append(f"fewbits was {ledger.version} and is {version('fewbits')} now")
    if differences:
        raise InputError(f"{out} holds another run: {', '.join(differences)}; {accepted}")
    verification = verify(out, plan.checkpoint.folder, progress)
    return _result(out, plan, ledger, verification, reused=True)


def _write_weights(
    plan: Plan, recipe: Recipe, writer: CheckpointWriter, ledger: Ledger, progress: Progress | None
) -> None:
    names = sorted(plan.checkpoint.tensors.keys() | plan.origins.keys(), key=_natural)
    for i, name in enumerate(names):
        tensor = plan.checkpoint.read(plan.origins.get(name, name))
        if name in plan.placements:
            written, codes = _quantize_one(name, tensor, plan, recipe, writer, ledger.notes)
        else:
            written, codes = [writer.add(name, tensor)], None
            if tensor.is_floating_point() and not _finite(tensor):
                if name in plan.parameter_names:
                    raise InputError(f"{name} contains NaN or infinity; accepted are finite weights")
                ledger.notes.append(Note("fact", name, "holds NaN or infinity; copied as it is"))
        ledger.tensors[name] = Entry.of(
            plan.info(name), hash_tensor(tensor), written, codes, origin=plan.origins.get(name)
        )
        if progress is not None:
            progress("quantize", i + 1, len(names))
    writer.finish_weights()
    plan.checkpoint.close()


def _quantize_one(
    name: str,
    tensor: Tensor,
    plan: Plan,
    recipe: Recipe,
    writer: CheckpointWriter,
    notes: list[Note],
) -> tuple[list[Written], Codes]:
    """Round one source tensor, a matrix or a stack of them, and queue what its format makes of it."""
    matrix, scheme = plan.matrices[name], plan.placements[name].scheme
    weights: list[QuantizedTensor] = []
    for piece in matrix.slices(tensor):
        try:
            weight, more = recipe.method(piece, scheme, {})
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        weights.append(weight)
        notes += more
    stored = [plan.format.write(name, weight) for weight in weights]
    tensors = {
        key: torch.stack([s[key] for s in stored]) if matrix.stacked else stored[0][key]
        for key in stored[0]
    }
    written = [writer.add(key, value) for key, value in tensors.items()]
    return written, Codes.of(weights, matrix.stacked)


def _finite(tensor: Tensor) -> bool:
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor.float() if tensor.dtype.itemsize == 1 else tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key: `layers.2` before `layers.10`."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def quantize_(
    model: nn.Module,
    scheme: QuantScheme,
    *,
    overrides: tuple[tuple[str, QuantScheme | None], ...] = (),
    head: bool = False,
) -> nn.Module:
    """Round every linear of a model to the nearest codes, in place; its output head stays in float.

    Takes any `nn.Module` with linears; in models of transformers also `Conv1D` and fused experts.

    Args:
        overrides: (pattern, scheme or None for float); see `Recipe`.
        head: quantize the output head too, apart from embeddings it may be tied to.

    Returns:
        The same model.

    Raises:
        InputError: the scheme does not fit a module, or a pattern matches none; the model is
            unchanged.

    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)).bfloat16()
    >>> quantize_(model, QuantScheme(8, "channel"), overrides=(("2", None),))
    Sequential(
      (0): QuantizedLinear(
        64, 32, w8-channel, int8pack
        (kernel): Int8Pack()
      )
      (1): ReLU()
      (2): Linear(in_features=32, out_features=4, bias=True)
    )
    """
    matrices = {matrix.source: matrix for matrix in _in_memory(model)}
    schemes = Recipe(RTN(), scheme, overrides, head).assign(matrices.values())
    made = {
        name: _replacement(model, matrices[name], chosen)
        for name, chosen in schemes.items()
        if chosen is not None
    }  # all of them before the first is put in place: an error leaves the model as it was
    for name, replacement in made.items():
        matrix = matrices[name]
        if isinstance(replacement, list):
            replace_experts(model.get_submodule(matrix.module), matrix.parameter, replacement)
        else:
            shared = model.get_submodule(matrix.module)
            places = [path for path, m in model.named_modules(remove_duplicate=False) if m is shared]
            for path in places:
                model.set_submodule(path, replacement)
    return model


def _in_memory(model: nn.Module) -> list[Matrix]:
    head = find_head(model)
    matrices = []
    for path, module in model.named_modules():
        if is_experts(module):
            for name in EXPERT_PARAMETERS:
                weight = getattr(module, name, None)
                if isinstance(weight, Tensor) and weight.ndim == 3:
                    shape, transposed = tuple(weight.shape), bool(module.is_transposed)
                    matrices.append(
                        Matrix(f"{path}.{name}", path, name, "expert", shape, transposed=transposed)
                    )
        elif is_linear(module) or is_conv1d(module):
            if not path:
                raise InputError("the model is itself a linear; use QuantizedLinear.from_float")
            kind: Kind = "conv1d" if is_conv1d(module) else "linear"
            matrices.append(
                Matrix(
                    f"{path}.weight",
                    path,
                    "weight",
                    kind,
                    tuple(module.weight.shape),
                    transposed=kind == "conv1d",
                    head=path == head,
                )
            )
    return matrices


def _replacement(
    model: nn.Module, matrix: Matrix, scheme: QuantScheme
) -> QuantizedLinear | list[QuantizedLinear]:
    module = model.get_submodule(matrix.module)
    try:
        if matrix.kind != "expert":
            return QuantizedLinear.from_float(module, scheme)
        weight = getattr(module, matrix.parameter).detach()
        return [
            QuantizedLinear(quantize_tensor(piece, scheme), None, weight.dtype, weight.device)
            for piece in matrix.slices(weight)
        ]
    except InputError as error:
        raise InputError(f"{matrix.source}: {error}") from None
