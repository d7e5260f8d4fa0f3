"""What a model is made of, asked of the model itself: no architecture is named here.

transformers builds the model without weights (on the meta device) from its config, and its own renaming
rules tell which tensor of a checkpoint ends in which parameter. A quantizable weight is a matrix
that multiplies activations: a linear, a `Conv1D` (stored transposed), or an expert of the fused 3-D
parameters in which transformers keeps mixtures of experts; or the embedding, where tokens are looked up.
"""

import copy
import inspect
import json
import linecache
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from fewbits.checkpoint import check_config
from fewbits.errors import InputError
from fewbits.tensor import Note
from fewbits.untrusted import shown

Kind = Literal["linear", "conv1d", "expert", "embedding"]

# The parameters of a fused-experts module that transformers' experts interface knows.
EXPERT_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")
# Conversions that leave each source matrix whole: stacked over experts, joined by rows.
_JOINING = {"MergeModulelist", "Concatenate"}
# Weights of a block that are neither linears nor experts: routers and the like are far below. Not tuned.
_UNSEEN_LIMIT = 0.05
# Of one model; 61 blocks of 256 experts, each a module with three linears, have 65,000. Not tuned.
_MAX_MODULES = 2**17
# Names of tensors: their last number. And patterns that may not take all digits alike.
_LAST_NUMBER = re.compile(r"(.*\.)([0-9]+)(\.\D*)")
_OTHER_DIGITS = str.maketrans("0123456789", "1234567890")
_DIGIT = re.compile(r"\d|\(\?P=")
# Ways to compute attention and experts that a config may name: the others may be fetched from the hub.
_IMPLEMENTATION = ("attn_implementation", "experts_implementation", "_implementation_internal")
_BUILT_IN = (None, "eager", "sdpa")


@dataclass(frozen=True, slots=True)
class Matrix:
    """A source tensor that multiplies activations: one matrix, or all experts' in one 3-D tensor.

    Or the embedding: (tokens, hidden), of which a row is looked up; an output head that is tied to it
    multiplies by the same tensor, and has none of its own.

    Args:
        source: its name in the checkpoint.
        module: path of the module that multiplies by it.
        parameter: of that module.
        kind: of the module.
        shape: on disk.
        transposed: stored (in, out).
        expert: which expert it belongs to; None for no or for all experts.
        part: its place among the tensors that are joined, by rows, into the parameter.
        block: number of the decoder block, None outside.
        head: it is the output head.
        own_forward: its class has a forward of its own that computes the same.
    """

    source: str
    module: str
    parameter: str
    kind: Kind
    shape: tuple[int, ...]
    transposed: bool = False
    expert: int | None = None
    part: int = 0
    block: int | None = None
    head: bool = False
    own_forward: bool = False

    @property
    def stacked(self) -> bool:
        """All experts in one 3-D tensor."""
        return len(self.shape) == 3

    @property
    def rows_columns(self) -> tuple[int, int]:
        """(out, in) of one matrix."""
        first, second = self.shape[-2:]
        return (second, first) if self.transposed else (first, second)

    def slices(self, tensor: Tensor) -> Iterator[Tensor]:
        """The matrices (out, in) in a tensor of this shape."""
        for matrix in tensor if self.stacked else [tensor]:
            yield matrix.t() if self.transposed else matrix


def skeleton(config: dict[str, Any]) -> nn.Module:
    """The model that transformers builds from a config, without weights.

    Raises:
        InputError: transformers does not know the architecture, or refuses the config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {key: value for key, value in config.items() if key != "quantization_config"}
    if "model_type" not in settings:
        raise InputError("config.json names no model_type; accepted is one that transformers knows")
    if "auto_map" in settings and not _is_known(settings["model_type"]):
        raise InputError(
            f"config.json: model_type {shown(settings['model_type'])} needs code of the checkpoint "
            "(auto_map), which is never run; accepted is one that transformers knows"
        )
    check_config(Path("config.json"), settings)
    try:
        # Through a file, because transformers has an encoding of its own for what JSON cannot hold.
        with tempfile.TemporaryDirectory() as folder, quiet_transformers(), torch.device("meta"):
            (Path(folder) / "config.json").write_text(json.dumps(_without_code(settings)))
            model_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            with _few_modules(), warnings.catch_warnings(action="ignore"):  # of widths of 0
                model: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                    model_config, trust_remote_code=False
                )
    except InputError:
        raise
    except Exception as error:  # configs fail in as many ways as there are architectures
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(
            f"transformers cannot build a causal language model from config.json: {reason}"
        ) from None
    linecache.clearcache()  # of transformers' sources, which it reads for its own documentation
    return model


def _is_known(model_type: Any) -> bool:
    from transformers import CONFIG_MAPPING

    return isinstance(model_type, str) and model_type in CONFIG_MAPPING


def _without_code(value: Any) -> Any:
    """A config without what makes transformers fetch code: `auto_map`, kernels from the hub."""
    if isinstance(value, list):
        return [_without_code(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _without_code(item)
        for key, item in value.items()
        if key != "auto_map" and (not key.endswith(_IMPLEMENTATION) or item in _BUILT_IN)
    }


@contextmanager
def _few_modules() -> Iterator[None]:
    """Stop a config that asks for modules without end."""
    count = 0

    def check(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > _MAX_MODULES:
            raise InputError(f"config.json asks for more than {_MAX_MODULES} modules")

    handle = register_module_module_registration_hook(check)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the library's warnings and bars while we do something they do not apply to."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def text_config(model: nn.Module) -> Any:
    """The config of the language model in it."""
    config: Any = model.config
    return config.get_text_config()


def find_blocks(model: nn.Module) -> str:
    """Path of the decoder blocks: the `ModuleList` that holds the most parameters.

    Raises:
        InputError: the model has no list of modules.
    """
    sizes: dict[str, int] = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    if not sizes:
        raise InputError("the model has no decoder blocks (no list of modules)")
    return max(sizes, key=lambda name: sizes[name])


def find_head(model: nn.Module) -> str | None:
    """Path of the output head, if it has one."""
    ask: Any = getattr(model, "get_output_embeddings", None)
    head = None if ask is None else ask()
    return next((name for name, m in model.named_modules() if m is head), None)


def find_embedding(model: nn.Module) -> str | None:
    """Path of the module in which tokens are looked up; None: there is no such `nn.Embedding`."""
    try:
        module = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    names = (name for name, other in model.named_modules() if other is module)
    return next(names, None) if isinstance(module, nn.Embedding) else None


def find_tied_head(model: nn.Module) -> str | None:
    """Path of the output head, if its weight is that of the embedding."""
    embedding, head = find_embedding(model), find_head(model)
    if embedding is None or head is None or embedding == head:
        return None
    # While it loads, transformers has not tied them yet.
    told = getattr(model, "all_tied_weights_keys", None) or {}
    own, other = (model.get_submodule(path)._parameters.get("weight") for path in (head, embedding))
    same = own is not None and own is other
    return head if same or told.get(f"{head}.weight") == f"{embedding}.weight" else None


def row_factor(module: nn.Module, dtype: torch.dtype) -> float | Tensor | None:
    """What an embedding multiplies the rows by that it looks up; None: it does something else.

    A class with a forward of its own is tried on a small table. It must give `row * factor` exactly,
    with the factor a number, or a tensor of no dimensions in `dtype`. Where the module is without values
    (on the meta device), others are put in their place: the factor is then none of its own.
    """
    has_table = "weight" in module._parameters or "weight" in vars(module)  # codes are none
    if not isinstance(module, nn.Embedding) or not has_table:
        return None
    if type(module).forward is nn.Embedding.forward:
        return 1.0 if module.max_norm is None else None
    own = torch.Generator().manual_seed(0)
    ids = torch.tensor([[3, 1, 1], [0, 2, 3]])
    table = 100 * torch.randn(4, 32, generator=own, dtype=torch.float64)
    try:
        exact = _looked_up(module, torch.ones_like(table), ids)
        ones = _looked_up(module, torch.ones_like(table, dtype=dtype), ids)
        found = _looked_up(module, table.to(dtype), ids)
    except Exception:  # whatever it does, it is no plain look-up
        return None
    for factor in (exact.flatten()[0].item(), ones.flatten()[0].clone()):
        if torch.equal(found, F.embedding(ids, table.to(dtype)) * factor):
            return factor
    return None


def _looked_up(module: nn.Embedding, table: Tensor, ids: Tensor) -> Tensor:
    """What the class of an embedding makes of another table, on the CPU."""
    small = copy.copy(module)
    small.num_embeddings, small.embedding_dim = table.shape
    small.padding_idx = None
    vars(small).pop("weight", None)
    small._parameters = {"weight": nn.Parameter(table, requires_grad=False)}
    small._buffers = {
        name: value
        if value is None or value.device.type != "meta"
        else torch.full_like(value, 1.7, device="cpu")
        for name, value in module._buffers.items()
    }
    small._buffers = {k: v if v is None else v.cpu() for k, v in small._buffers.items()}
    result: Tensor = type(module).forward(small, ids)
    return result


def is_linear(module: nn.Module) -> bool:
    """Whether calling the module is `x @ weight.T + bias`; subclasses are tried on a small weight."""
    if not isinstance(module, nn.Linear) or "weight" not in module._parameters:  # codes are no weight
        return False
    if type(module).forward is nn.Linear.forward:
        # torch's own attention multiplies by the weight of this one without calling it
        return type(module).__name__ != "NonDynamicallyQuantizableLinear"
    small = copy.copy(module)
    small.in_features, small.out_features = 3, 4
    # Large and of both signs, so that a hidden activation or clamp shows.
    own = torch.Generator().manual_seed(0)
    bias = None if module.bias is None else nn.Parameter(100 * torch.randn(4, generator=own))
    weight = nn.Parameter(100 * torch.randn(4, 3, generator=own))
    small._parameters = {"weight": weight, "bias": bias}
    x = 100 * torch.randn(8, 3, generator=own)
    try:
        return bool(torch.allclose(small(x), F.linear(x, small.weight, bias)))
    except Exception:  # whatever it does, it is not a linear
        return False


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' `Conv1D`, a linear stored (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def is_experts(module: nn.Module) -> bool:
    """Whether it is a fused-experts module behind transformers' experts interface."""
    return hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")


# -- from checkpoint names to the model -----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Target:
    parameter: str  # full path in the model
    converter: Any  # transformers' WeightConverter, or None
    pattern: str | None  # of the converter's source patterns, the one that matched
    renamed: str  # the source name after plain renaming


def locate(model: nn.Module, names: list[str]) -> dict[str, _Target]:
    """Where transformers puts each tensor of a checkpoint; names it does not know are left out."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {p: converter for converter in converters for p in converter.source_patterns}
    prefix, known = model.base_model_prefix, model.state_dict()

    def find(name: str) -> _Target | None:
        renamed, _ = rename_source_key(name, renamings, [])
        parameter, pattern = rename_source_key(renamed, [], converters, prefix, known)  # type: ignore[arg-type]
        if parameter not in known:
            parameter, pattern = rename_source_key(name, [], [], prefix, known)  # type: ignore[arg-type]
        if parameter not in known:
            return None
        converter = by_pattern[pattern] if pattern is not None else None
        # Interned: thousands of experts of one block end in one parameter.
        return _Target(sys.intern(str(parameter)), converter, pattern, renamed)

    if any(_DIGIT.search(p) for entry in mapping for p in entry.source_patterns):
        found = {name: find(name) for name in names}  # some numbers may not be like others
    else:
        found = _find_alike(names, find)
    return {name: target for name, target in found.items() if target is not None}


def _find_alike(names: list[str], find: Callable[[str], _Target | None]) -> dict[str, _Target | None]:
    """Targets of names of which thousands differ in their last number alone, as those of experts do.

    Patterns that name no digit take one digit for another. So where a name ends in the same parameter
    whatever the digits of that number, all do whose number is as long.
    """
    alike: dict[tuple[str, int, str], list[str]] = {}
    for name in names:
        parts = _LAST_NUMBER.fullmatch(name)
        key = (name, 0, "") if parts is None else (parts[1], len(parts[2]), parts[3])
        alike.setdefault(key, []).append(name)
    found: dict[str, _Target | None] = {}
    for (before, digits, after), members in alike.items():
        first = find(members[0])
        found[members[0]] = first
        others = members[1:]
        if first is not None and others and first.renamed == members[0]:
            number = members[0][len(before) : len(before) + digits]
            unlike = before + number.translate(_OTHER_DIGITS) + after
            at = first.parameter, first.converter, first.pattern
            if find(unlike) == _Target(*at, unlike):
                found |= {name: _Target(*at, name) for name in others}
                continue
        found |= {name: find(name) for name in others}
    return {name: found[name] for name in names}


def find_matrices(
    model: nn.Module, shapes: dict[str, tuple[int, ...]], targets: dict[str, _Target] | None = None
) -> tuple[dict[str, Matrix], list[Note]]:
    """Every source tensor that multiplies activations, the embedding, and why others that might be none.

    Args:
        model: a `skeleton`.
        shapes: of the checkpoint's tensors, by name.
        targets: what `locate` finds for them, where that is known already.

    Raises:
        InputError: the blocks hold much of their weight in parameters that are neither linears nor
            experts of a kind that can be run as linears; names them.
    """
    modules = dict(model.named_modules())
    blocks, head, embedding = find_blocks(model), find_head(model), find_embedding(model)
    matrices: dict[str, Matrix] = {}
    notes: list[Note] = []
    targets = locate(model, list(shapes)) if targets is None else targets
    judged: dict[Any, tuple[Callable[..., Matrix], re.Pattern[str] | None] | str | None] = {}
    for name, target in targets.items():
        alike = (target.parameter, target.pattern, shapes[name])  # as the experts of a block are
        if alike not in judged:
            judged[alike] = _judge(modules, target, shapes[name], blocks, head, embedding)
        found = judged[alike]
        if isinstance(found, str):
            notes.append(Note("skip", name, found))
        elif found is not None:
            make, numbered = found
            index = None if numbered is None else numbered.search(target.renamed)
            if index is None and numbered is not None:
                what = f"its expert's number is not found by {target.pattern!r}: left in float"
                notes.append(Note("skip", name, what))
            else:
                matrices[name] = make(name, expert=None if index is None else int(index[1]))
    _check_coverage(model.get_submodule(blocks), blocks, matrices)
    return matrices, notes


def block_number(parameter: str, blocks: str) -> int | None:
    """Of the decoder block that a parameter belongs to, if to one; `blocks` is their path."""
    if not parameter.startswith(f"{blocks}."):
        return None
    number, dot, _ = parameter[len(blocks) + 1 :].partition(".")
    return int(number) if dot and number.isdecimal() else None


def _judge(
    modules: dict[str, nn.Module],
    target: _Target,
    shape: tuple[int, ...],
    blocks: str,
    head: str | None,
    embedding: str | None,
) -> tuple[Callable[..., Matrix], re.Pattern[str] | None] | str | None:
    """What makes the matrix of a name, and what finds its expert's number in the name, if it has one.

    A text says why a candidate is left in float; None is no matrix at all.
    """
    path, _, parameter = map(sys.intern, target.parameter.rpartition("."))
    owner = modules[path]

    def make(kind: Kind, **more: Any) -> Callable[..., Matrix]:
        block = block_number(target.parameter, blocks)
        fixed = {"kind": kind, "shape": shape, "block": block, "head": path == head, **more}
        return partial(Matrix, module=path, parameter=parameter, **fixed)

    fused = is_experts(owner) and parameter in EXPERT_PARAMETERS
    if target.converter is not None and target.pattern is not None:
        if not (fused or isinstance(owner, nn.Linear) or is_conv1d(owner)) or len(shape) < 2:
            return None
        operations = {type(operation).__name__ for operation in target.converter.operations}
        if not fused or not operations <= _JOINING or owner.is_transposed or len(shape) != 2:
            return f"transformers rebuilds it by {sorted(operations)}: left in float"
        numbered = re.compile(target.pattern.replace(".", r"\.").replace("*", r"(\d+)"))
        return make("expert", part=target.converter.source_patterns.index(target.pattern)), numbered
    if fused:
        if len(shape) != 3:
            return f"experts of shape {shape} are not understood: left in float"
        return make("expert", transposed=bool(owner.is_transposed)), None
    if parameter != "weight" or len(shape) != 2:
        return None
    if is_conv1d(owner):
        return make("conv1d", transposed=True), None
    if is_linear(owner):
        own = type(owner).forward is not nn.Linear.forward
        return make("linear", own_forward=own), None
    if isinstance(owner, nn.Linear):
        return f"{type(owner).__name__} does more than multiply by its weight: left in float"
    if path == embedding and path != head:
        if any(row_factor(owner, dtype) is None for dtype in (torch.bfloat16, torch.float32)):
            return f"{type(owner).__name__} does more than look up and scale its rows: left in float"
        return make("embedding"), None
    return None


def _check_coverage(blocks: nn.Module, path: str, matrices: dict[str, Matrix]) -> None:
    """Refuse a model whose blocks are mostly something else: a half-quantized mixture helps nobody."""
    seen = {f"{m.module}.{m.parameter}" for m in matrices.values()}
    total, unseen = 0, dict[str, int]()
    for name, parameter in blocks.named_parameters():
        total += parameter.numel()
        if parameter.ndim >= 2 and f"{path}.{name}" not in seen:
            general = re.sub(r"\.\d+\.", ".*.", f"{path}.{name}")
            unseen[general] = unseen.get(general, 0) + parameter.numel()
    large = {name: n for name, n in unseen.items() if n > _UNSEEN_LIMIT * total}
    if large:
        named = ", ".join(f"{name} ({n / total:.0%})" for name, n in large.items())
        raise InputError(
            f"the blocks keep weights outside linears and known experts: {named}; "
            "such a model is not supported yet, and is not quantized by half"
        )


# -- what a model keeps of a text --------------------------------------------------------------------

_CACHES = ("cache", "past_key_values", "cache_params")  # of transformers 5.24 on; before


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among the named arguments of a call; None where there is none."""
    return next((arguments[name] for name in _CACHES if arguments.get(name) is not None), None)


def cache_of(output: Any) -> Any:
    """The cache in what a model gives; None where there is none."""
    found = (getattr(output, name, None) for name in _CACHES)
    return next((cache for cache in found if cache is not None), None)


def cache_argument(model: Any) -> str:
    """The name under which a model takes its cache."""
    taken = inspect.signature(model.forward).parameters
    return next((name for name in _CACHES if name in taken), "past_key_values")
