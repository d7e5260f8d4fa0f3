"""Preflight: everything that can go wrong and be known from config and headers, known in seconds."""

import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from fewbits.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from fewbits.clients import Facts, check_clients
from fewbits.errors import InputError
from fewbits.formats import FORMATS, Format, GgufLayout, Placement
from fewbits.gguf_file import unsupported
from fewbits.recipe import Recipe
from fewbits.scheme import LEVELS, QuantScheme
from fewbits.structure import (
    Matrix,
    block_number,
    find_blocks,
    find_embedding,
    find_head,
    find_matrices,
    find_tied_head,
    is_linear,
    locate,
    skeleton,
    text_config,
)
from fewbits.tensor import Note
from fewbits.trellis import CHAIN

_QUANTIZABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(slots=True)
class Plan:
    """What a run will do.

    Args:
        checkpoint: the source.
        config: of the checkpoint to be written, without `quantization_config`.
        matrices: quantizable source tensors by name; a head made from tied embeddings by its own.
        placements: those of them that get quantized.
        origins: names in `matrices` that are no source tensors -> the tensor they are made from.
        format: to write.
        floats: module names of matrices that stay in float.
        notes: what was left out, and why.
        parameter_names: source tensors that are parameters of the model, not buffers or leftovers.
        blocks: number of the decoder block that a source tensor belongs to, if to one.
        hidden_size: features of the hidden states.
    """

    checkpoint: Checkpoint
    config: dict[str, Any]
    matrices: dict[str, Matrix]
    placements: dict[str, Placement]
    origins: dict[str, str]
    format: Format
    floats: list[str]
    notes: list[Note]
    parameter_names: set[str]
    blocks: dict[str, int]
    hidden_size: int

    def info(self, name: str) -> TensorInfo:
        """The header of the source tensor behind a name."""
        return self.checkpoint.tensors[self.origins.get(name, name)]

    def place(self, name: str) -> str:
        """Where the source tensor behind a name lies, as errors begin: its file, and the name."""
        return f"{self.checkpoint.folder / self.info(name).file}: {name}"

    @property
    def source_bytes(self) -> int:
        """Of all source tensors."""
        return sum(info.size_bytes for info in self.checkpoint.tensors.values())

    @property
    def written_bytes(self) -> int:
        """Of all tensors to be written."""
        total = sum(
            info.size_bytes
            for name, info in self.checkpoint.tensors.items()
            if name not in self.placements
        )
        alike = Counter((id(p), self.info(name).dtype) for name, p in self.placements.items())
        firsts = {id(place): name for name, place in self.placements.items()}
        for (place, dtype), count in alike.items():
            matrix, scheme = self.matrices[firsts[place]], self.placements[firsts[place]].scheme
            size = self.format.written_bytes(*matrix.rows_columns, scheme, dtype.itemsize)
            total += count * math.prod(matrix.shape[:-2]) * size
        return total

    def names(self) -> dict[int | None, list[str]]:
        """What is written, in its order: outside of the blocks under None, then block by block."""
        found: dict[int | None, list[str]] = {None: []}
        found |= {number: [] for number in sorted(set(self.blocks.values()))}
        for name in sorted(self.checkpoint.tensors.keys() | self.origins.keys(), key=_natural):
            found[self.blocks.get(name)].append(name)
        return found

    def quantization(self) -> dict[str, Any]:
        """What config.json says of the codes; of modules placed alike one is named.

        Raises:
            InputError: the format cannot say it.
        """
        distinct = {id(place): name for name, place in self.placements.items()}
        return self.format.config({n: self.placements[n] for n in distinct.values()}, self.floats)

    @property
    def parameters(self) -> int:
        """Elements of all floating-point source tensors."""
        return sum(i.count for i in self.checkpoint.tensors.values() if i.dtype.is_floating_point)


@dataclass(slots=True)
class Survey:
    """What config and headers say of a model, whatever is to be done with it.

    Args:
        checkpoint: its headers.
        model: without weights.
        targets: where transformers puts each tensor that is no matrix.
        matrices: quantizable source tensors by name.
        notes: what looks like one and is none.
        parameter_names: source tensors that are parameters of the model, not buffers or leftovers.
        blocks: number of the decoder block that a source tensor belongs to, if to one.
    """

    checkpoint: Checkpoint
    model: torch.nn.Module
    targets: dict[str, Any]
    matrices: dict[str, Matrix]
    notes: list[Note]
    parameter_names: set[str]
    blocks: dict[str, int]


def survey(checkpoint: Checkpoint) -> Survey:
    """Find the model's matrices and blocks, once for any number of plans.

    Raises:
        InputError: the model is quantized already, transformers does not know it, or tensors are
            missing or have another shape.
    """
    quantization, where = checkpoint.config.get("quantization_config"), checkpoint.folder
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise InputError(f"{where} is quantized already ({method}); accepted are float checkpoints")
    model = skeleton(checkpoint.config)
    targets = locate(model, list(checkpoint.tensors))
    parameter_names = _check_parameters(where, model, checkpoint, targets)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    matrices, notes = find_matrices(model, shapes, targets)
    path = find_blocks(model)
    numbers = {p: block_number(p, path) for p in {target.parameter for target in targets.values()}}
    found = ((name, numbers[target.parameter]) for name, target in targets.items())
    blocks = {name: number for name, number in found if number is not None}
    targets = {name: target for name, target in targets.items() if name not in matrices}
    return Survey(checkpoint, model, targets, matrices, notes, parameter_names, blocks)


def make_plan(
    source: Path | Survey,
    recipe: Recipe,
    format_name: str | None = None,
    clients: tuple[str, ...] = (),
    tensor_parallel: int = 1,
) -> Plan:
    """Decide what becomes of every tensor, from config and headers alone.

    Args:
        source: a folder, or what is known of it already.
        recipe: method and schemes.
        format_name, clients, tensor_parallel: see `fewbits.quantize`.

    Raises:
        InputError: the folder is no checkpoint, the model is quantized already, a scheme fits some
            modules not (all are named), the format cannot hold a weight, or a client that was named
            would not load it (the reason is given).
    """
    seen = source if isinstance(source, Survey) else survey(open_checkpoint(source))
    checkpoint, model, folder = seen.checkpoint, seen.model, seen.checkpoint.folder
    notes, config = list(seen.notes), dict(checkpoint.config)
    made, origins = _untie_head(seen) if recipe.head else ({}, {})
    matrices = seen.matrices | made if made else seen.matrices  # thousands: not copied for nothing
    schemes = recipe.assign(matrices.values())
    looked_up, tied = _check_embedding(seen, recipe, schemes)
    if tied is not None:  # it stays so: the codes are its own too
        matrices, origins = seen.matrices, {}
        schemes = {name: scheme for name, scheme in schemes.items() if name in matrices}
        label = getattr(schemes[str(looked_up)], "label", "")
        notes.append(Note("fact", tied, f"is tied to {looked_up}: multiplies by its codes, {label}"))
    told = recipe.allocation  # of an embedding alone: with its head
    if any(
        schemes[name] is None or (origin in told and name not in told)
        for name, origin in origins.items()
    ):  # it stays tied, without a tensor of its own
        matrices, origins = seen.matrices, {}
    if any(m.head and schemes[name] is not None for name, m in matrices.items()):
        config["tie_word_embeddings"] = False
    _check_experts(folder, model, matrices, schemes)
    placements = _place(matrices, schemes)
    if not placements:
        raise InputError(f"{folder}: nothing to quantize; the recipe leaves every weight in float")
    _check_fit(checkpoint, matrices, placements, origins)
    layout, why = _choose_format(
        format_name, config, placements, _some_experts_float(matrices, placements)
    )
    floats = sorted(_float_modules(seen, matrices, placements) - {tied})
    notes += why + [Note("fact", layout.name, remark) for remark in layout.remarks(placements)]
    facts = Facts(placements, floats, layout.name, text_config(model), find_head(model))
    notes += check_clients(facts, clients, tensor_parallel)
    plan = Plan(
        checkpoint, config, matrices, placements, origins, layout, floats, notes,
        seen.parameter_names, seen.blocks, text_config(model).hidden_size,
    )  # fmt: skip
    plan.quantization()
    return plan


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key: `layers.2` before `layers.10`."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def rescheme(
    plan: Plan, chosen: QuantScheme, scheme: QuantScheme, format_name: str | None = None
) -> Plan:
    """The same plan, were all that is in one scheme in another; whether groups fit was seen to before.

    Its placements are those of one name for each place, unless a format is named or has to know all.

    Args:
        plan: of a recipe whose scheme is `chosen`.
        chosen: the very object.
        scheme: instead.
        format_name: as for `make_plan`.

    Raises:
        InputError: the format that was named cannot hold it.
    """
    some = _some_experts_float(plan.matrices, plan.placements)
    distinct = {id(place): name for name, place in plan.placements.items()}
    others: dict[int, Placement] = {}
    for name in distinct.values():
        place = plan.placements[name]
        others[id(place)] = replace(place, scheme=scheme) if place.scheme is chosen else place
    every = format_name is not None or any(place.scheme.two_level for place in others.values())
    names = plan.placements if every else distinct.values()
    placements = {name: others[id(plan.placements[name])] for name in names}
    layout, notes = _choose_format(format_name, plan.config, placements, some)
    result = replace(plan, placements=placements, format=layout, notes=notes)
    if format_name is not None:
        result.quantization()
    return result


def placement_of(matrix: Matrix, scheme: QuantScheme) -> Placement:
    """Where a matrix stands, were it quantized so."""
    return Placement(
        matrix.module, scheme, matrix.kind == "expert", matrix.stacked, matrix.transposed,
        matrix.own_forward, matrix.rows_columns, matrix.kind == "embedding",
    )  # fmt: skip


def _place(matrices: dict[str, Matrix], schemes: dict[str, QuantScheme | None]) -> dict[str, Placement]:
    """Where each quantized weight stands; all experts of a block at one place, which is one object."""
    places: dict[Any, Placement] = {}
    found = {}
    for name, m in matrices.items():
        scheme = schemes[name]
        if scheme is not None:
            key = (m.module, id(scheme), m.kind, m.shape, m.transposed, m.own_forward)
            if key not in places:
                places[key] = placement_of(m, scheme)
            found[name] = places[key]
    return found


def _check_parameters(
    folder: Path, model: torch.nn.Module, checkpoint: Checkpoint, located: dict[str, Any]
) -> set[str]:
    """Every parameter must be there and have the model's shape; else nothing can load the result."""
    parameters = dict(model.named_parameters())
    for name, target in located.items():
        expected = parameters.get(target.parameter)
        shape = checkpoint.tensors[name].shape
        if expected is not None and target.converter is None and tuple(expected.shape) != shape:
            raise InputError(
                f"{folder}: tensor {name} is {shape}, but config.json asks for {tuple(expected.shape)}"
            )
    found = {target.parameter for target in located.values()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = sorted(parameters.keys() - found - tied)
    if missing:
        raise InputError(
            f"{folder}: the {type(model).__name__} of config.json needs {missing[0]} "
            f"({len(missing)} missing in all); accepted are whole causal language models"
        )
    return {name for name, target in located.items() if target.parameter in parameters}


def _check_experts(
    folder: Path,
    model: torch.nn.Module,
    matrices: dict[str, Matrix],
    schemes: dict[str, QuantScheme | None],
) -> None:
    """Matrices that a model joins into one parameter, its experts, must all be there, in one scheme."""
    joined: dict[tuple[str, str], list[Matrix]] = {}
    for matrix in matrices.values():
        if matrix.expert is not None:
            joined.setdefault((matrix.module, matrix.parameter), []).append(matrix)
    for (module, parameter), parts in joined.items():
        experts = model.get_submodule(module).get_parameter(parameter).shape[0]
        there = {(matrix.expert, matrix.part) for matrix in parts}
        kinds = {matrix.part for matrix in parts}
        needed = {(i, part) for i in range(experts) for part in kinds}
        if there != needed:
            expert = min(there ^ needed)[0]
            raise InputError(
                f"{folder}: {module} has {experts} experts, but expert {expert} is not whole"
            )
        found = {schemes[matrix.source]: matrix.source for matrix in parts}
        if len(found) > 1:
            named = ", ".join(f"{n} {'float' if s is None else s.label}" for s, n in found.items())
            raise InputError(
                f"the model joins these weights into one: {named}; accepted is one scheme for all "
                "experts of a block"
            )


def _untie_head(seen: Survey) -> tuple[dict[str, Matrix], dict[str, str]]:
    """A head that is tied to the embeddings is quantized as a tensor of its own; they stay in float.

    Returns its matrix and the tensor it is made from, both by its name; nothing where there is no such.
    """
    model, head = seen.model, find_head(seen.model)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    if head is None or not tied or any(matrix.head for matrix in seen.matrices.values()):
        return {}, {}
    path = find_embedding(model)
    whole = (name for name, matrix in seen.matrices.items() if matrix.module == path)
    left = (n for n, target in seen.targets.items() if target.parameter == f"{path}.weight")
    origin = next(chain(whole, left))
    name, shape = f"{head}.weight", seen.checkpoint.tensors[origin].shape
    return {name: Matrix(name, head, "weight", "linear", shape, head=True)}, {name: origin}


def _check_embedding(
    seen: Survey, recipe: Recipe, schemes: dict[str, QuantScheme | None]
) -> tuple[str | None, str | None]:
    """The embedding that is quantized, and the head that is tied to it and becomes codes with it.

    Raises:
        InputError: it was asked for and there is none that can be; its scheme, or that head, is not one
            for it.
    """
    name = next((name for name, m in seen.matrices.items() if m.kind == "embedding"), None)
    if name is None and recipe.embeddings:
        path = find_embedding(seen.model)
        reasons = [
            n.what
            for n in seen.notes
            if seen.targets.get(n.where)
            and path is not None
            and seen.targets[n.where].parameter == f"{path}.weight"
        ]
        why = reasons[0] if reasons else "the model names none that is looked up by token"
        raise InputError(f"--embeddings: no embedding can be quantized: {why}")
    scheme = None if name is None else schemes[name]
    if scheme is None:
        return None, None
    if scheme.inputs is not None:
        accepted = replace(scheme, inputs=None).label
        raise InputError(
            f"{name}: {scheme.label} rounds inputs, and those of an embedding are numbers of tokens; "
            f"accepted is {accepted}"
        )
    if any(matrix.head for matrix in seen.matrices.values()):  # stored beside the embedding
        return name, None
    tied = find_tied_head(seen.model)
    if tied is not None and not is_linear(seen.model.get_submodule(tied)):
        raise InputError(
            f"{name}: {tied} is tied to it, and does more than multiply by it; accepted is to leave "
            "both in float"
        )
    return name, tied


def _check_fit(
    checkpoint: Checkpoint,
    matrices: dict[str, Matrix],
    placements: dict[str, Placement],
    origins: dict[str, str],
) -> None:
    offenders = []
    for name, placement in placements.items():
        info = checkpoint.tensors[origins.get(name, name)]
        if info.dtype not in _QUANTIZABLE or info.count == 0:
            offenders.append(f"{name} (shape {info.shape}, {info.dtype})")
            continue
        scheme, columns = placement.scheme, matrices[name].rows_columns[1]
        size = LEVELS if scheme.two_level else scheme.group_size
        if size is not None and columns % size:
            what = "blocks" if scheme.two_level else "groups"
            offenders.append(f"{name} ({columns} columns, {what} of {size})")
        if scheme.trellis and (rows := matrices[name].rows_columns[0]) % CHAIN:
            offenders.append(f"{name} ({rows} rows, chains of {CHAIN})")
    if offenders:
        common = math.gcd(*(matrices[name].rows_columns[1] for name in placements))
        accepted = f"divisors of {common}, or --group-size none"
        if any(placement.scheme.two_level for placement in placements.values()):
            accepted = (
                f"multiples of {LEVELS} columns; --override gives others another scheme, as w8-g32"
            )
        raise InputError(
            f"{len(offenders)} of {len(placements)} weights do not fit their scheme: "
            + ", ".join(offenders)
            + f"; accepted for all of them are {accepted}"
        )


def _some_experts_float(matrices: dict[str, Matrix], placements: dict[str, Placement]) -> str | None:
    """An expert that stays in float while others are quantized."""
    floats = [n for n, matrix in matrices.items() if n not in placements and matrix.kind == "expert"]
    some = bool(floats) and any(matrices[name].kind == "expert" for name in placements)
    return floats[0] if some else None


def _choose_format(
    format_name: str | None,
    config: dict[str, Any],
    placements: dict[str, Placement],
    some_experts_float: str | None,
) -> tuple[Format, list[Note]]:
    """The one asked for; by default compressed-tensors, or our own where that one refuses.

    Two levels of scales are held by gguf alone.
    """
    if format_name is None and any(p.scheme.two_level for p in placements.values()):
        format_name = "gguf"
    if format_name is not None and format_name not in FORMATS:
        raise InputError(f"format {format_name!r} is unknown; accepted are {', '.join(FORMATS)}")
    chosen = FORMATS[format_name or "compressed-tensors"]
    refused: dict[str, list[str]] = {}
    reasons_of: dict[int, str | None] = {}  # of a placement, which many experts share
    for name, placement in placements.items():
        if id(placement) not in reasons_of:
            reasons_of[id(placement)] = chosen.refuses(placement, placement.scheme)
        reason = reasons_of[id(placement)]
        if reason is not None:
            refused.setdefault(reason, []).append(name)
    no_place = unsupported(config) if isinstance(chosen, GgufLayout) else None
    if no_place is not None:
        refused[no_place] = list(placements)
    if some_experts_float is not None and chosen.name != "fewbits":
        refused["its clients load all experts of a model alike"] = [some_experts_float]
    if not refused:
        return chosen, []
    reasons = "; ".join(
        f"{reason} ({names[0]} and {len(names) - 1} more)" for reason, names in refused.items()
    )
    if format_name is not None:
        raise InputError(f"--format {format_name} cannot hold this model: {reasons}")
    what = f"written for fewbits alone, not as {chosen.name}: {reasons}"
    return FORMATS["fewbits"], [Note("fallback", "format", what)]


def _float_modules(
    seen: Survey, matrices: dict[str, Matrix], placements: dict[str, Placement]
) -> set[str]:
    """Matrices that stay in float, by the names of the model and of the source.

    A head that is tied to the embeddings has no tensor of its own, and is a linear all the same. What is
    no linear here, as routers are, or not part of this model at all, may be one in another client.
    """
    head, targets = find_head(seen.model), seen.targets
    quantized = any(matrices[name].head for name in placements)
    names = set() if head is None or quantized else {head}
    for name, matrix in matrices.items():
        if name not in placements and matrix.kind != "embedding":
            names |= {matrix.module, name.removesuffix(".weight")}
    for name, info in seen.checkpoint.tensors.items():
        if name not in matrices and len(info.shape) == 2 and name.endswith(".weight"):
            module = targets[name].parameter.removesuffix(".weight") if name in targets else None
            if module is None or not isinstance(seen.model.get_submodule(module), torch.nn.Embedding):
                names |= {name.removesuffix(".weight"), module or name.removesuffix(".weight")}
    return names
