"""`from_pretrained(..., quantization_config=fewbits.Config("int8"))`: quantize while transformers loads.

    Config("int8")     -> each matrix becomes codes as soon as transformers has read it
    save_pretrained()  -> a checkpoint in our own format, by the names that the source had
    from_pretrained()  -> reads that again, and what `fewbits quantize --format fewbits` wrote

Through the interface that transformers has for quantizers. transformers is not imported for it: our
quantizer is registered as soon as somebody else imports the module with the registry, in either order.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fewbits import packing
from fewbits.checkpoint import Checkpoint, open_checkpoint
from fewbits.errors import InputError
from fewbits.formats import FORMATS, Placement
from fewbits.formats.packed import on_disk
from fewbits.kernels import (
    KERNELS,
    Int4Pack,
    Int8Inputs,
    Int8Pack,
    Kernel,
    Native,
    Reference,
    Triton,
)
from fewbits.linear import ExpertLinears, QuantizedEmbedding, QuantizedLinear
from fewbits.load import (
    by_parameter,
    check_shape,
    keep_apart,
    kernel_notes,
    put,
    quantized_matrices,
    read_parameter,
    share_codes,
    tied_to_codes,
)
from fewbits.recipe import Recipe
from fewbits.scheme import InputScheme, QuantScheme
from fewbits.structure import Matrix, find_matrices, locate
from fewbits.tensor import Outliers, QuantizedTensor, quantize_tensor

METHOD = "fewbits"  # `quant_method`
_REGISTRY = "transformers.quantizers.auto"
_KINDS = ("int8", "llm-int8", "int4")
_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class _Parameter:
    """A parameter of the model whose codes are, or will be, in it.

    Args:
        parts: the source tensors that are joined into it, in order.
        shape: of it.
        scheme: of all of them, if they are still to be rounded.
    """

    parts: list[Matrix]
    shape: tuple[int, ...]
    scheme: QuantScheme | None = None


@dataclass(slots=True)
class _State:
    """What one load knows: of the model's parameters by their full names, and of the checkpoint.

    `tied` is the head that multiplies by the codes of the embedding.
    """

    checkpoint: Checkpoint
    parameters: dict[str, _Parameter] = field(default_factory=dict)
    tied: str | None = None
    problems: list[str] = field(default_factory=list)


def Config(  # noqa: N802 - a class to its users: transformers, where its base class is, is imported late
    kind: str,
    *,
    threshold: float | None = None,
    group_size: int | None = None,
    skip: Sequence[str] = (),
) -> Any:
    """What `from_pretrained` takes as `quantization_config`, to quantize while it loads.

    Memory: the codes so far, in 16 bit what is not quantized and the parameter just being read (all
    experts of a layer are one), and for a moment one matrix of it in 32 bit.

    A head stays in float. Adapters can be trained on the model, its codes cannot. All of it must be on
    devices that compute, nothing offloaded. When what was saved is opened with a device map that
    transformers works out ("auto"), codes count as nothing: on several devices, give a dict instead.

    Args:
        kind: "int8": weights in 8 bits, a scale per row. "llm-int8": inputs too, but for columns with
            outliers. "int4": 4 bits in groups.
        threshold: of llm-int8, 6 by default: columns with larger inputs stay in 16 bit; 0: none does.
        group_size: of int4, 128 by default.
        skip: patterns of modules that stay in float, as in `Recipe`.

    Raises:
        InputError: another kind, or an option that does not go with it.

    >>> Config("int4", group_size=64).scheme.label
    'w4-g64'
    """
    scheme = _scheme(kind, threshold, group_size)
    if isinstance(skip, str):
        raise InputError(f"skip is {skip!r}; accepted is a sequence of patterns, like ({skip!r},)")
    register()
    importlib.import_module(_REGISTRY)  # before `_classes`, which the import itself may call
    return _classes()[0](scheme, tuple(skip))


def _scheme(kind: str, threshold: float | None, group_size: int | None) -> QuantScheme:
    if kind not in _KINDS:
        raise InputError(f"kind is {kind!r}; accepted are {', '.join(map(repr, _KINDS))}")
    if threshold is not None and kind != "llm-int8":
        raise InputError(f"threshold is {threshold} with kind {kind!r}; it goes with 'llm-int8' only")
    if group_size is not None and kind != "int4":
        raise InputError(f"group_size is {group_size} with kind {kind!r}; it goes with 'int4' only")
    if kind == "int4":
        return QuantScheme(4, "group", 128 if group_size is None else group_size)
    if kind == "llm-int8":
        return QuantScheme(8, inputs=InputScheme(threshold=6.0 if threshold is None else threshold))
    return QuantScheme(8)


# -- known to transformers -------------------------------------------------------------------------


class _Finder(importlib.abc.MetaPathFinder):
    """Runs `then` after one module was imported by somebody; finds nothing itself."""

    def __init__(self, name: str, then: Callable[[], object]) -> None:
        self.name, self.then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec that others find, its loader extended."""
        if fullname != self.name:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                if self in sys.meta_path:  # until now: who asks for a spec need not import it
                    sys.meta_path.remove(self)
                    self.then()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Make our format known to transformers, now or when it is imported."""
    if _REGISTRY in sys.modules:
        _classes()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(_REGISTRY, _classes))


@cache
def _classes() -> tuple[Any, Any]:
    """The two configs: of a request, and of a checkpoint; registered, with the quantizer."""
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class FewbitsConfig(QuantizationConfigMixin):
        """A float checkpoint is to be quantized."""

        def __init__(self, scheme: QuantScheme, skip: tuple[str, ...]) -> None:
            self.quant_method = METHOD  # type: ignore[assignment]
            self.scheme, self.skip = scheme, skip

        def to_dict(self) -> dict[str, Any]:
            """For messages: a request is not stored."""
            return {"quant_method": METHOD, "scheme": self.scheme.label, "skip": list(self.skip)}

    # Not the same class: transformers then refuses a request for a checkpoint that is quantized already.
    class FewbitsCheckpoint(QuantizationConfigMixin):
        """The checkpoint holds codes: `quantization_config` of our own format."""

        def __init__(self, **settings: Any) -> None:
            self.__dict__.update(settings)

    class FewbitsQuantizer(HfQuantizer):
        """The hooks of transformers, in the order in which it calls them."""

        state: _State
        dtype: torch.dtype

        def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
            """Remember it: of activations, and of what stays in float."""
            self.dtype = dtype
            return dtype

        def update_device_map(self, device_map: dict[str, Any] | None) -> dict[str, Any] | None:
            """Nothing can be offloaded."""
            if isinstance(device_map, dict):
                _check_devices(device_map)
            return device_map

        def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
            with torch.device("cpu"):  # transformers builds its models with "meta" as the default
                self.state = _State(_open(kwargs.get("checkpoint_files")))
                if self.pre_quantized:
                    _plan_stored(self.state, model)
                else:
                    config: Any = self.quantization_config
                    _plan_request(self.state, model, config.scheme, config.skip)

        @property
        def quantized_element_size(self) -> float | None:
            """For device maps: bytes of a code."""
            scheme = getattr(self.quantization_config, "scheme", None)
            return None if scheme is None else scheme.bits / 8

        def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
            """Whether its tensor is to become codes."""
            return not self.pre_quantized and param_name in self.state.parameters

        def get_quantize_ops(self) -> Any:
            """What is done to a tensor once it is read."""
            return _operation(self.state)

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
            if self.state.problems:
                raise InputError("; ".join(self.state.problems))
            _check_devices(getattr(model, "hf_device_map", {}))
            if self.pre_quantized:
                _read_stored(self.state, model, self.dtype)
            self.state.checkpoint.close()
            _finish_biases(model)
            for note in kernel_notes(model):
                _LOG.warning("%s", note)
            config = FewbitsCheckpoint(**_stored_config(self.state, model))
            self.quantization_config = model.config.quantization_config = config

        def get_state_dict_and_metadata(
            self, model: Any
        ) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
            """What `save_pretrained` writes; with adapters, transformers writes those only."""
            if getattr(model, "_hf_peft_config_loaded", False):
                return None, {}
            before = getattr(model, "_weight_conversions", None)
            conversions = before.original if isinstance(before, _Done) else before
            model._weight_conversions = conversions
            tensors = _stored_tensors(self.state, model)
            model._weight_conversions = _Done(conversions)
            return tensors, {}

        def is_serializable(self) -> bool:
            """In our own format."""
            return True

        @property
        def is_trainable(self) -> bool:
            """Adapters are, on top: gradients go through our linears to their inputs, not to codes."""
            return True

    register_quantization_config(METHOD)(FewbitsCheckpoint)
    register_quantizer(METHOD)(FewbitsQuantizer)
    return FewbitsConfig, FewbitsCheckpoint


# -- loading ----------------------------------------------------------------------------------


def _open(files: list[str] | None) -> Checkpoint:
    """The checkpoint that transformers is going to load."""
    if not files:
        raise InputError("quantization while loading needs a checkpoint; a state_dict is not accepted")
    checkpoint = open_checkpoint(Path(files[0]).parent)
    if {Path(file).name for file in files} != checkpoint.file_bytes.keys():
        raise InputError(
            f"{checkpoint.folder}: transformers loads {Path(files[0]).name}, which is not the "
            f"checkpoint's own; accepted is {next(iter(checkpoint.file_bytes))}, without a variant"
        )
    return checkpoint


def _check_devices(device_map: dict[str, Any]) -> None:
    kinds = {str(device).split(":")[0] for device in device_map.values()}
    if "disk" in kinds or ("cpu" in kinds and len(kinds) > 1):
        raise InputError(
            "the device map offloads modules, which quantized ones cannot be; accepted are maps of "
            "devices that compute, or 'cpu' alone"
        )


def _plan_request(state: _State, model: nn.Module, scheme: QuantScheme, skip: tuple[str, ...]) -> None:
    """Which parameters will be quantized, known before the first is read.

    Raises:
        InputError: a pattern matches nothing, nothing is left to quantize, or the scheme does not fit;
            nothing was loaded.
    """
    shapes = {name: info.shape for name, info in state.checkpoint.tensors.items()}
    if not locate(model, list(shapes)):
        raise InputError(
            f"{state.checkpoint.folder}: none of its {len(shapes)} tensors, like {min(shapes)}, is one "
            "of the model; accepted are the names that transformers has for it, without key_mapping"
        )
    matrices, notes = find_matrices(model, shapes)
    for note in notes:
        _LOG.warning("%s", note)
    recipe = Recipe(scheme=scheme, overrides=tuple((pattern, None) for pattern in skip))
    schemes = recipe.assign(matrices.values())
    for module, parameter, parts in by_parameter(matrices.values()):
        chosen = {schemes[part.source] for part in parts}
        if len(chosen) > 1:
            raise InputError(f"the model joins all of {module}.{parameter}; skip the whole or nothing")
        if chosen == {None}:
            continue
        columns = parts[0].rows_columns[1]
        if scheme.group_size is not None and columns % scheme.group_size:
            raise InputError(
                f"{parts[0].source}: group_size {scheme.group_size} does not divide its {columns} "
                "columns; accepted is a divisor, or its name in skip"
            )
        name = f"{module}.{parameter}"
        state.parameters[name] = _Parameter(parts, tuple(model.get_parameter(name).shape), scheme)
    if not state.parameters:
        blocks = sum(not m.head and m.kind != "embedding" for m in matrices.values())
        raise InputError(
            f"skip is {skip!r}, which leaves none of {blocks} matrices to quantize; accepted are "
            "patterns that leave one, or no quantization_config"
        )


def _operation(state: _State) -> Any:
    from transformers.core_model_loading import ConversionOps

    class Quantize(ConversionOps):  # type: ignore[misc, unused-ignore]
        """Puts a module with codes in the place of the one whose weight was read."""

        def convert(
            self,
            input_dict: dict[str, Any],
            source_patterns: list[str],
            target_patterns: list[str],
            **kwargs: Any,
        ) -> dict[str, Any]:
            """The tensors that are not quantized: transformers sets them."""
            model, missing_keys = kwargs["model"], kwargs["missing_keys"]
            left = {}
            for name, value in input_dict.items():
                tensor = value[0] if isinstance(value, list) else value
                if name not in state.parameters:
                    left[name] = tensor
                    continue
                try:
                    _round(model, name, state.parameters[name], tensor)
                except InputError as error:  # transformers would bury it in a report: it is raised later
                    state.problems.append(f"{name}: {error}")
                    left[name] = tensor
                missing_keys.discard(name)
            return left

    return Quantize()


def _round(model: Any, name: str, parameter: _Parameter, tensor: Tensor) -> None:
    matrix = parameter.parts[0]
    assert parameter.scheme is not None
    if tuple(tensor.shape) != parameter.shape:
        raise InputError(f"it is {tuple(tensor.shape)}, but the model has {parameter.shape}")
    tensor = tensor.detach()
    pieces = [
        quantize_tensor(piece.t() if matrix.transposed else piece, parameter.scheme)
        for piece in (tensor if tensor.ndim == 3 else [tensor])
    ]
    _place(model, name, matrix.kind, pieces, tensor.dtype, tensor.device)


def _place(
    model: Any,
    name: str,
    kind: str,
    pieces: list[QuantizedTensor],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Replace a parameter by codes; a bias may still be without values.

    transformers initializes what has no mark, which for codes would be slow, or fail. What accelerate
    hooked to a module, to bring its inputs to its device, goes on with the new one.
    """
    module, _, parameter = name.rpartition(".")
    before = model.get_submodule(module)
    loaded = getattr(getattr(before, "bias", None), "_is_hf_initialized", False)
    put(model, module, parameter, kind, pieces, dtype, device)
    after = model.get_submodule(module)
    if isinstance(after, QuantizedLinear | QuantizedEmbedding):
        if hasattr(before, "_hf_hook"):
            hooks = importlib.import_module("accelerate.hooks")  # it has no types
            hooks.add_hook_to_module(after, before._hf_hook)
        if isinstance(after, QuantizedLinear) and after.bias is not None:
            after.bias._is_hf_initialized = loaded  # type: ignore[attr-defined, unused-ignore]
        after._is_hf_initialized = True  # type: ignore[assignment]
    else:
        getattr(after, parameter)._is_hf_initialized = True


def _finish_biases(model: nn.Module) -> None:
    """A bias that was in no file is 0, as in a new linear: transformers has warned of it."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and module.bias is not None:
            if not getattr(module.bias, "_is_hf_initialized", False):
                module.bias.data.zero_()
            module.bias.requires_grad_(False)


def _plan_stored(state: _State, model: Any) -> None:
    """Take the parameters that are codes in the checkpoint out of the model: we read them ourselves."""
    matrices = quantized_matrices(state.checkpoint, model)
    renamed = {name: target.renamed for name, target in locate(model, list(matrices)).items()}
    names = matrices.keys() | set(renamed.values())
    state.tied = tied_to_codes(state.checkpoint, model, matrices)
    if state.tied is not None:
        _take_out(model, f"{state.tied}.weight")
        keep_apart(model, state.tied)
    for module, parameter, parts in by_parameter(matrices.values()):
        name = f"{module}.{parameter}"
        state.parameters[name] = _Parameter(parts, tuple(model.get_parameter(name).shape))
        _take_out(model, name)
    # Of any layer or expert: one pattern for each name would be tens of thousands.
    general = {re.sub(r"\d+", r"\\d+", re.escape(name)) for name in names | state.parameters.keys()}
    known = {rf"^{name}(_[a-z_]+)?$" for name in general}
    model._keys_to_ignore_on_load_unexpected = known | set(
        model._keys_to_ignore_on_load_unexpected or ()
    )


def _take_out(model: Any, name: str) -> None:
    """A parameter for which transformers shall not look in the files.

    Not absent either: the initialization of some models touches every weight.
    """
    module, _, parameter = name.rpartition(".")
    owner = model.get_submodule(module)
    del owner._parameters[parameter]
    empty = torch.empty(0)
    empty._is_hf_initialized = True  # type: ignore[attr-defined]
    owner.__dict__[parameter] = empty
    if isinstance(owner, nn.Embedding):
        owner.padding_idx = None  # initialization would set that row to zero


def _read_stored(state: _State, model: Any, dtype: torch.dtype) -> None:
    for name, parameter in state.parameters.items():
        pieces = read_parameter(state.checkpoint, parameter.parts)
        check_shape(state.checkpoint.folder, parameter.parts, pieces, parameter.shape)
        kind, tied = parameter.parts[0].kind, state.tied
        _place(model, name, kind, pieces, dtype, _device(model, name))
        if kind == "embedding" and tied is not None:
            head = f"{tied}.weight"
            _place(model, head, "linear", pieces, dtype, _device(model, head))
            share_codes(model, name.rpartition(".")[0], tied)


def _device(model: Any, name: str) -> torch.device:
    """Where a parameter belongs: the longest entry of the device map that it is below."""
    places: dict[str, Any] = getattr(model, "hf_device_map", {})
    above = [path for path in places if not path or name.startswith(f"{path}.")]
    return torch.device(places[max(above, key=len)]) if above else torch.device(model.device)


# -- saving -----------------------------------------------------------------------------------


class _Done(list[Any]):
    """No conversions: what `save_pretrained` is given has the names of the source already.

    Args:
        original: the model's, for the next time.
    """

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.original = original


def _linears(model: nn.Module, name: str) -> list[QuantizedLinear | QuantizedEmbedding]:
    """The modules with a parameter's codes: one, or one per expert.

    Raises:
        InputError: something else is there now.
    """
    module, _, parameter = name.rpartition(".")
    owner = model.get_submodule(module)
    own = isinstance(owner, QuantizedLinear | QuantizedEmbedding)
    experts = None if own else getattr(owner, parameter, None)
    linears = []
    for linear in experts if isinstance(experts, ExpertLinears) else [owner]:
        if not isinstance(linear, QuantizedLinear | QuantizedEmbedding):
            raise InputError(
                f"{module} is now a {type(linear).__module__}.{type(linear).__qualname__}, no quantized "
                "linear; accepted is a model without adapters: unload() them first, or save them alone, "
                "with save_pretrained of the PEFT model"
            )
        linears.append(linear)
    return linears


def _placements(state: _State, model: nn.Module) -> dict[str, Placement]:
    return {
        part.source: Placement(part.module, on_disk(_linears(model, name)[0].scheme))
        for name, parameter in state.parameters.items()
        for part in parameter.parts
    }


def _stored_config(state: _State, model: nn.Module) -> dict[str, Any]:
    return FORMATS[METHOD].config(_placements(state, model), [])


def _stored_tensors(state: _State, model: Any) -> dict[str, Tensor]:
    """All tensors of the model, by the names that they have in its checkpoint.

    Raises:
        InputError: a module is no longer what was loaded, or a kernel does not give its codes back.
    """
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    linears = {name: _linears(model, name) for name in state.parameters}
    modules = model.named_modules(remove_duplicate=False)
    inside = tuple(f"{path}." for path, m in modules if isinstance(m, Kernel))
    floats = {n: t for n, t in model.state_dict().items() if not n.startswith(inside)}
    floats = remove_tied_weights_from_state_dict(floats, model)
    tensors: dict[str, Tensor] = revert_weight_conversion(model, floats)
    for name, parameter in state.parameters.items():
        weights = [give_back(linear) for linear in linears[name]]
        for part, pieces in _split(parameter.parts, weights):
            tensors |= _write(part, pieces)
    return tensors


def _split(
    parts: list[Matrix], weights: list[QuantizedTensor]
) -> list[tuple[Matrix, list[QuantizedTensor]]]:
    """The weights of each source tensor; the inverse of joining them."""
    if parts[0].expert is None:
        return [(parts[0], weights)]
    start: dict[int, int] = defaultdict(int)
    result = []
    for part in parts:
        expert, rows = part.expert or 0, part.rows_columns[0]
        own = slice(start[expert], start[expert] + rows)
        result.append((part, [weights[expert].rows(own)]))
        start[expert] += rows
    return result


def _write(part: Matrix, pieces: list[QuantizedTensor]) -> dict[str, Tensor]:
    stored = [FORMATS[METHOD].write(part.source, piece) for piece in pieces]
    if not part.stacked:
        return stored[0]
    return {key: torch.stack([s[key] for s in stored]) for key in stored[0]}


def give_back(linear: QuantizedLinear | QuantizedEmbedding) -> QuantizedTensor:
    """The weight of a linear, or of an embedding, from the layout of its kernel, on the CPU.

    The scale may be in the dtype of the inputs, where the kernel has it so. What comes out is checked: a
    kernel made from it must hold the same, bit for bit.

    Raises:
        InputError: the kernel is one that is not understood here.
    """
    if linear.order is not None:
        raise InputError("a weight whose groups are not of neighbouring columns cannot be saved")
    if linear.scheme.two_level:
        raise InputError(
            f"a weight in {linear.scheme.label} cannot be saved: kernels do not keep its levels"
        )
    kernel = linear.kernel
    weight = _from_kernel(linear)
    device = next(kernel.buffers()).device
    again = KERNELS[linear.kernel_name](weight, linear.dtype, device)
    own, other = dict(kernel.named_buffers()), dict(again.named_buffers())
    if own.keys() != other.keys() or not all(torch.equal(own[n], other[n]) for n in own):
        raise InputError(f"kernel {linear.kernel_name} does not give its codes back exactly")
    return weight


def _from_kernel(linear: QuantizedLinear | QuantizedEmbedding) -> QuantizedTensor:
    kernel, scheme = linear.kernel, on_disk(linear.scheme)
    shape = kernel.shape
    if isinstance(kernel, Reference):
        return _from_reference(kernel, scheme, shape[1])
    if isinstance(kernel, Int8Pack | Int8Inputs):
        codes = (kernel.codes[: shape[0], : shape[1]].cpu().to(torch.int16) + 128).to(torch.uint8)
        scale = _narrowed(kernel.scale.cpu()[:, None].clone(), linear.dtype)
        outliers = _outliers(kernel) if isinstance(kernel, Int8Inputs) else None
        return QuantizedTensor(codes, scale, _middle(scale, scheme), scheme, outliers)
    if isinstance(kernel, Native | Triton):
        codes, scale, zero_point = (part.cpu() for part in kernel.numbers())
        return QuantizedTensor(codes, scale, zero_point, scheme)
    if isinstance(kernel, Int4Pack) and isinstance(linear, QuantizedLinear):
        return _from_int4(linear, kernel.scale_and_zero, scheme)
    raise InputError(f"kernel {linear.kernel_name} does not give its codes back: it cannot be saved")


def _middle(scale: Tensor, scheme: QuantScheme) -> Tensor:
    return torch.full_like(scale, scheme.middle, dtype=torch.uint8)


def _from_reference(kernel: Reference, scheme: QuantScheme, columns: int) -> QuantizedTensor:
    codes = packing.unpack(kernel.codes.cpu(), scheme.bits, columns)
    scale, zero_point = kernel.scale.cpu(), kernel.zero_point.cpu()
    return QuantizedTensor(codes, scale, zero_point, scheme, _outliers(kernel))


def _outliers(kernel: Reference | Int8Inputs) -> Outliers | None:
    if kernel.columns is None or kernel.outliers is None:
        return None
    return Outliers(kernel.columns.cpu(), kernel.outliers.cpu())


def _narrowed(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The same values in `dtype`, which they mostly come from, if it holds them."""
    narrow = scale.to(dtype)
    return narrow if torch.equal(narrow.to(scale.dtype), scale) else scale


def _from_int4(linear: QuantizedLinear, both: Tensor, scheme: QuantScheme) -> QuantizedTensor:
    """int4pack holds (columns / group, rows, 2) scale and zero = scale * (middle - zero point)."""
    rows, columns = linear.out_features, linear.in_features
    groups = scheme.groups(columns)
    both = both.cpu()[:, :rows].transpose(0, 1)  # (rows, kernel's groups, 2)
    both = both[:, :: both.shape[1] // groups]  # of several in one group, and of padding, the first
    scale, zero = both[:, :groups, 0].contiguous(), both[:, :groups, 1]
    zero_point = _middle(scale, scheme)
    if not scheme.symmetric:
        zero_point = (scheme.middle - zero.double() / scale.double()).round().to(torch.uint8)
    # The weights are rounded to 8 bits or more, which is far less than half a step of 15.
    weight = linear.weight.cpu().double().view(rows, groups, -1)
    steps = (weight / scale.double()[..., None]).round().view(rows, columns)
    points = zero_point.double().repeat_interleave(columns // groups, 1)
    return QuantizedTensor((steps + points).to(torch.uint8), scale, zero_point, scheme)
