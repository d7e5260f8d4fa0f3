"""quantize(): the one loop, from a float checkpoint to a verified quantized one; and quantize_()."""

import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.blockwise import Block, estimate_memory, quantize_blocks
from fewbits.calibration import (
    DEFAULT_SAMPLES,
    SELF,
    Calibration,
    check_calibration,
)
from fewbits.checkpoint import (
    CONFIG,
    LEDGER,
    MAX_SHARD_BYTES,
    RUN,
    CheckpointWriter,
    carried_files,
    hash_file,
    hash_json,
    hash_tensor,
    read_json,
    resolve,
)
from fewbits.errors import InputError
from fewbits.evaluate import load_tokenizer, read_calibration_of
from fewbits.ledger import Codes, Entry, Ledger, plain, read_ledger
from fewbits.linear import QuantizedLinear, replace_experts
from fewbits.load import load
from fewbits.memory import memory_bytes, watch_memory
from fewbits.methods import RTN, LLMInt8, Method
from fewbits.plan import Plan, make_plan
from fewbits.recipe import DEFAULT_SCHEME, LLM_INT8_SCHEME, Recipe, parse_method
from fewbits.scheme import InputScheme, QuantScheme
from fewbits.stream import fast_dtype
from fewbits.structure import (
    EXPERT_PARAMETERS,
    Kind,
    Matrix,
    find_head,
    is_conv1d,
    is_experts,
    is_linear,
    skeleton,
    text_config,
)
from fewbits.tensor import Note, QuantizedTensor, quantize_tensor
from fewbits.text import Text
from fewbits.transforms import Transform
from fewbits.verify import Progress, Verification, verify

_ACCEPTED = "accepted is a folder that does not exist yet, or the result of the same run"


@dataclass(frozen=True, slots=True)
class Quantized:
    """A finished run: where, what the ledger says, what verification compared.

    `run` says how long it took and how much memory; it is no part of what is promised to be the same
    each time. `reused` tells that `out` held the finished result of the same run already.
    """

    out: Path
    ledger: Ledger
    verification: Verification
    weight_bytes: int
    source_weight_bytes: int
    parameters: int
    run: dict[str, Any]
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
            "calibration": self.ledger.calibration,
            "blocks": self.ledger.blocks,
            "run": self.run,
            "notes": [asdict(note) for note in self.ledger.notes],
            "verified": asdict(self.verification),
            "reused": self.reused,
        }


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    method: str | Method | None = None,
    scheme: QuantScheme | None = None,
    overrides: tuple[tuple[str, QuantScheme | None], ...] = (),
    head: bool = False,
    transforms: tuple[Transform, ...] = (),
    calibration: str | Path | Text | Tensor | Calibration | None = None,
    samples: int = DEFAULT_SAMPLES,
    length: int | None = None,
    seed: int = 0,
    max_memory: int | None = None,
    format: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> Quantized:
    """Quantize a checkpoint, write it, and prove that what was written is what was chosen.

    Args:
        model: folder of a float checkpoint, or a hub id.
        out: folder to be made. If it holds the finished result of the same run it is verified and
            left as it is.
        method: rounds each matrix; round to nearest by default. A name like "gptq" or "awq+gptq"
            stands for a method and the transforms before it.
        scheme: 4 bits in groups of 128 by default; for "llm-int8" 8 bits by channel, inputs by token,
            with the outlier columns that calibration finds, or without it those of each call.
        overrides: (pattern, scheme or None for float); see `Recipe`.
        head: quantize the output head too.
        transforms: rewrite each block before it is rounded, like `AWQ()`.
        calibration: what calibrated methods and transforms run the model on; see
            `read_calibration`, also for samples, length and seed.
        max_memory: bytes; above an estimate of what is needed, calibration states go to a file
            beside `out`. Refused where even that would not do.
        format: "compressed-tensors" or "fewbits"; by default the first, and the second for a model
            that the first cannot hold.
        max_shard_bytes: of a weight file.
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
    began = time.monotonic()
    named, method = parse_method(method) if isinstance(method, str) else ((), method or RTN())
    scheme = scheme or _default_scheme(method, calibration is not None)
    if isinstance(method, LLMInt8):
        method = _static_or_not(scheme, overrides)
    recipe = Recipe(method, scheme, overrides, head, named + transforms)
    out = Path(out)
    if out.exists() and not (out / LEDGER).is_file():
        raise InputError(f"{out} exists and was not written by fewbits; {_ACCEPTED}")
    plan = make_plan(resolve(model), recipe, format)
    with watch_memory() as memory:
        if max_memory is not None and not recipe.needs_calibration:
            raise InputError(f"method {recipe.name} takes no --max-memory: it is not calibrated")
        data = _read_calibration(plan, recipe, calibration, samples, length, seed, progress)
        request = recipe.describe() | {"format": plan.format.name}
        request |= {} if data is None else {"calibration": _describe_calibration(plan, data)}
        source = _describe_source(model, plan)
        if out.exists():
            return _reuse(out, plan, request, source, progress)
        ledger = Ledger(version("fewbits"), request, source, notes=list(plan.notes))
        with CheckpointWriter(out, max_shard_bytes) as writer:
            if data is None:
                _write_weights(plan, recipe, writer, ledger, progress)
            else:
                ledger.calibration = _describe_calibration(plan, data)
                ledger.notes += _check_calibration(plan, data)
                states_file = _states_file(
                    plan, data, recipe.method.needs, max_memory, writer.folder, ledger.notes
                )
                blocks = quantize_blocks(plan, recipe, data.ids, progress, states_file)
                _write_blocks(blocks, plan, writer, ledger)
                ledger.notes += _outlier_notes(ledger)
                if states_file is not None:
                    states_file.unlink()
            quantization = plan.format.config(plan.placements, plan.floats)
            writer.write_json(CONFIG, plan.config | {"quantization_config": quantization})
            writer.carry_over(plan.checkpoint.folder)
            ledger.notes += plan.checkpoint.notes
            ledger.files = _describe_files(writer.folder)
            writer.write_json(LEDGER, ledger.to_json())
            verification = verify(writer.folder, progress=progress)
            elapsed = round(time.monotonic() - began, 3)
            writer.write_json(RUN, {"elapsed_s": elapsed, "memory_bytes": asdict(memory)})
            writer.commit()
    return _result(out, plan, ledger, verification)


def _default_scheme(method: Method, calibrated: bool) -> QuantScheme:
    if not isinstance(method, LLMInt8):
        return DEFAULT_SCHEME
    return replace(LLM_INT8_SCHEME, inputs=InputScheme(static=calibrated))


def _static_or_not(
    scheme: QuantScheme, overrides: tuple[tuple[str, QuantScheme | None], ...]
) -> LLMInt8:
    """The method collects what the schemes ask for."""
    schemes = (scheme, *(other for _, other in overrides))
    return LLMInt8(any(s is not None and s.inputs is not None and s.inputs.static for s in schemes))


def _result(
    out: Path, plan: Plan, ledger: Ledger, verification: Verification, reused: bool = False
) -> Quantized:
    weights = sum(f["size_bytes"] for n, f in ledger.files.items() if n.endswith(".safetensors"))
    source = sum(plan.checkpoint.file_bytes.values())
    run = read_json(out / RUN) if (out / RUN).is_file() else {}  # no part of what was promised
    return Quantized(out, ledger, verification, weights, source, plan.parameters, run, reused)


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
        raise InputError(f"{out} holds another run: {', '.join(differences)}; {_ACCEPTED}")
    verification = verify(out, plan.checkpoint.folder, progress)
    return _result(out, plan, ledger, verification, reused=True)


def _write_weights(
    plan: Plan, recipe: Recipe, writer: CheckpointWriter, ledger: Ledger, progress: Progress | None
) -> None:
    """Round and write one source tensor after the other."""
    names = sorted(plan.checkpoint.tensors.keys() | plan.origins.keys(), key=_natural)
    for i, name in enumerate(names):
        weights = _round(name, plan, recipe.method, ledger.notes) if name in plan.placements else None
        _write_one(name, plan, writer, ledger, weights)
        if progress is not None:
            progress("quantize", i + 1, len(names))
    writer.finish_weights()
    plan.checkpoint.close()


def _write_blocks(blocks: Iterator[Block], plan: Plan, writer: CheckpointWriter, ledger: Ledger) -> None:
    """Write what stands outside of the blocks, and each block as soon as it is done."""
    names = plan.checkpoint.tensors.keys() | plan.origins.keys()
    inside = {name: plan.blocks.get(name) for name in names}
    for name in sorted((n for n in names if inside[n] is None), key=_natural):
        weights = None
        if name in plan.placements:
            _without_calibration(name, plan)
            weights = _round(name, plan, RTN(), ledger.notes)
            what = "outside of the blocks: rounded to nearest, without calibration"
            ledger.notes.append(Note("fallback", name, what))
        _write_one(name, plan, writer, ledger, weights)
    for block in blocks:
        members = (name for name in names if inside[name] == block.report.block)
        for name in sorted(members, key=_natural):
            weights, changed = block.weights.get(name), block.changed.get(name)
            if weights is not None and weights[0].scheme != plan.placements[name].scheme:
                _without_calibration(name, plan)
            _write_one(name, plan, writer, ledger, weights, changed)
        ledger.notes += block.notes
        ledger.blocks.append(block.report.to_json())
        del block, weights, changed  # before the next one is made
    writer.finish_weights()
    plan.checkpoint.close()


def _without_calibration(name: str, plan: Plan) -> None:
    """Nobody has seen this weight's inputs: its outlier columns are found in each call."""
    placement = plan.placements[name]
    plan.placements[name] = replace(placement, scheme=placement.scheme.dynamic)


def _outlier_notes(ledger: Ledger) -> list[Note]:
    """In how many columns calibration found what the schemes ask for."""
    asked = {
        name: entry.quantized
        for name, entry in ledger.tensors.items()
        if entry.quantized is not None and "-static" in entry.quantized.scheme
    }
    rounds = any(
        "-a8-" in e.quantized.scheme for e in ledger.tensors.values() if e.quantized is not None
    )
    what = "errors and KL of the blocks leave out that inputs are rounded too"
    notes = [Note("fact", "blocks", what)] if rounds else []
    if not asked:
        return notes
    some = [name for name, codes in asked.items() if codes.outliers is not None]
    kept = sum(w.size_bytes for n in some for w in ledger.tensors[n].written if "_outlier" in w.name)
    whole = sum(ledger.tensors[name].size_bytes for name in asked)
    what = (
        f"{len(some)} of {len(asked)} weights keep columns in 16 bit, {kept / whole:.1%} of their bytes "
        "before; a higher threshold keeps fewer"
    )
    if not some:
        what = "no input was above the threshold: all columns are integers (plain W8A8)"
    return [*notes, Note("fact", "outliers", what)]


def _write_one(
    name: str,
    plan: Plan,
    writer: CheckpointWriter,
    ledger: Ledger,
    weights: list[QuantizedTensor] | None,
    changed: Tensor | None = None,
) -> None:
    """Write one source tensor as codes, rewritten, or as it is, and enter it in the ledger."""
    tensor = plan.checkpoint.read(plan.origins.get(name, name))
    codes = None
    if weights is not None:
        stacked = plan.matrices[name].stacked
        stored = [plan.format.write(name, weight) for weight in weights]
        tensors = {
            key: torch.stack([s[key] for s in stored]) if stacked else stored[0][key]
            for key in stored[0]
        }
        written = [writer.add(key, value) for key, value in tensors.items()]
        codes = Codes.of(weights, stacked)
    else:
        written = [writer.add(name, tensor if changed is None else changed)]
        if tensor.is_floating_point() and not _finite(tensor):
            if name in plan.parameter_names:
                raise InputError(f"{name} contains NaN or infinity; accepted are finite weights")
            ledger.notes.append(Note("fact", name, "holds NaN or infinity; copied as it is"))
    ledger.tensors[name] = Entry.of(
        plan.info(name),
        hash_tensor(tensor),
        written,
        codes,
        folded=changed is not None,
        origin=plan.origins.get(name),
    )


def _round(name: str, plan: Plan, method: Method, notes: list[Note]) -> list[QuantizedTensor]:
    """Round one source tensor, a matrix or a stack of them, without calibration."""
    tensor = plan.checkpoint.read(plan.origins.get(name, name))
    weights: list[QuantizedTensor] = []
    for piece in plan.matrices[name].slices(tensor):
        try:
            weight, more = method(piece, plan.placements[name].scheme, {})
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        weights.append(weight)
        notes += more
    return weights


# -- calibration -------------------------------------------------------------------------------


def _read_calibration(
    plan: Plan,
    recipe: Recipe,
    source: str | Path | Text | Tensor | Calibration | None,
    samples: int,
    length: int | None,
    seed: int,
    progress: Progress | None,
) -> Calibration | None:
    """The samples that the recipe needs; None if it needs none."""
    name = recipe.name
    if not recipe.needs_calibration:
        if source is not None:
            raise InputError(
                f"method {name} takes no calibration; accepted with it are gptq, awq, and llm-int8 "
                "whose threshold is above 0"
            )
        return None
    if source is None:
        raise InputError(
            f"method {name} needs calibration; accepted are a text file, a .jsonl file, "
            f"hub:owner/name/config:split:column, and {SELF} for text that the model writes itself"
        )
    given = isinstance(source, Tensor | Calibration)
    if samples < 2 and not given:
        raise InputError(f"--samples is {samples}; accepted are 2 or more, some of which are held out")
    return read_calibration_of(plan.checkpoint.folder, source, samples, length, seed, progress)


def _describe_calibration(plan: Plan, data: Calibration) -> dict[str, Any]:
    """The data, and what the model is run in: both decide what comes out."""
    products = fast_dtype(plan.checkpoint.dtype) or torch.float32
    return data.to_json() | {"products": str(products).removeprefix("torch.")}


def _check_calibration(plan: Plan, data: Calibration) -> list[Note]:
    """Whether the data is enough, before the hours are spent."""
    matrices = [plan.matrices[name] for name in plan.placements]
    widths = {m.source: m.rows_columns[1] for m in matrices if m.kind != "expert"}
    experts = {m.source: m.rows_columns[1] for m in matrices if m.kind == "expert"}
    try:
        tokenizer = load_tokenizer(plan.checkpoint.folder)
    except InputError:
        tokenizer = None
    config = skeleton(plan.checkpoint.config).config
    # Loaded as a whole it must stay on the disk, mapped; experts are stacked into new memory.
    mapped = not experts and getattr(config, "dtype", None) in (None, plan.checkpoint.dtype)
    wanted = mapped and tokenizer is not None and data.source != SELF
    model = load(plan.checkpoint.folder) if wanted else None
    routing = _routing(plan) if experts else None
    unknown = Note(
        "skip", "calibration", "tokens per expert: the config does not tell how many are chosen"
    )
    return ([unknown] if experts and routing is None else []) + check_calibration(
        data,
        widths=widths or experts,
        experts=routing,
        tokenizer=tokenizer,
        model=model,
        expert_width=max(experts.values(), default=None),
    )


def _states_file(
    plan: Plan,
    data: Calibration,
    needs: frozenset[str],
    max_memory: int | None,
    folder: Path,
    notes: list[Note],
) -> Path | None:
    """Where calibration states go if memory is short; None for memory itself."""
    if max_memory is None:
        return None
    work, states = estimate_memory(plan, data.ids, needs)
    least = memory_bytes() + work
    if least + states <= max_memory:
        return None
    if least > max_memory:
        raise InputError(
            f"--max-memory is {max_memory / 1e9:.2f} GB; this model takes about {least / 1e9:.2f} GB, "
            f"with the calibration states on disk; accepted is that or more"
        )
    what = f"calibration states, {states / 1e9:.2f} GB, kept on disk to stay below --max-memory"
    notes.append(Note("fact", "memory", what))
    return folder / "states"


def _routing(plan: Plan) -> tuple[int, int] | None:
    """How many experts a block has, and how many of them a token is sent to; None if it is not told."""
    config = text_config(skeleton(plan.checkpoint.config))
    chosen = getattr(config, "num_experts_per_tok", None)
    shared = [m for m in plan.matrices.values() if m.kind == "expert"]
    counts = {m.shape[0] if m.stacked else (m.expert or 0) + 1 for m in shared}
    return (max(counts), chosen) if isinstance(chosen, int) and counts else None


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
