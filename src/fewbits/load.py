"""A checkpoint -> a transformers model that multiplies straight from codes.

The model is built by transformers itself: its `from_pretrained` loads everything that is in float,
through its own renaming and conversion rules, into a model whose quantized weights were taken out
before. Then each of those modules is replaced by one that holds the codes; a float copy never exists.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.checkpoint import Checkpoint, open_checkpoint, resolve
from fewbits.errors import InputError, VerificationError
from fewbits.formats import FORMATS, Format
from fewbits.linear import QuantizedLinear, replace_experts
from fewbits.structure import Matrix, find_matrices, quiet_transformers, skeleton
from fewbits.tensor import Note, QuantizedTensor

_LOADER = "fewbits-loader"  # the name under which transformers finds our quantizer
_SUFFIXES = ("", "_packed", "_scale", "_zero_point", "_shape")  # of a quantized weight's tensors


def load(
    model: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Any:
    """A transformers model, quantized or not, ready for `generate()`.

    Args:
        model: folder of a checkpoint, or a hub id.
        dtype: of activations and of what is not quantized; the checkpoint's by default.
        device: where it runs.

    Returns:
        The `PreTrainedModel`, in evaluation mode.

    Raises:
        InputError: no checkpoint, or a quantization that is not read.

    >>> load("no-such-folder/at-all/here")
    Traceback (most recent call last):
    fewbits.errors.InputError: no-such-folder/at-all/here: no such folder; accepted are a folder and a \
hub id like owner/name
    """
    folder = resolve(model)
    checkpoint = open_checkpoint(folder)
    network = skeleton(checkpoint.config)
    weights = _quantized_matrices(checkpoint, network)
    own = {name + suffix for name in weights for suffix in _SUFFIXES}
    floats = {name: checkpoint.read(name) for name in checkpoint.tensors if name not in own}
    dtype = dtype or _config_dtype(network) or checkpoint.dtype
    loaded = _build(network, floats, weights, dtype, folder).to(device)
    if weights:
        layout, quantization = _format_of(checkpoint)
        reader = _Reader(checkpoint, layout, quantization)
        for module, parameter, parts in _by_parameter(weights.values()):
            _put(loaded, module, parameter, parts, reader, dtype, torch.device(device))
    checkpoint.close()
    return loaded.eval()


def kernel_notes(model: nn.Module) -> list[Note]:
    """Which kernel runs each quantized linear, where it is not the fastest one for its bits."""
    return [
        Note("fallback", name, f"runs {module.kernel_name}: " + "; ".join(
            f"{kernel} {reason}" for kernel, reason in module.refusals.items()
        ))
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear) and module.kernel_name == "reference"
    ]  # fmt: skip


@torch.no_grad()
def check_forward(folder: Path) -> None:
    """Load a checkpoint and run it on a few tokens.

    Raises:
        VerificationError: it cannot be loaded, or its logits are not finite.
    """
    try:
        model = load(folder)
    except InputError as error:
        raise VerificationError(f"{folder} does not load: {error}") from None
    vocabulary = model.config.get_text_config().vocab_size
    logits = model(torch.arange(min(8, vocabulary))[None], use_cache=False).logits
    if not bool(torch.isfinite(logits).all()):
        raise VerificationError(f"{folder} gives logits that are not finite")


# -- what is quantized -----------------------------------------------------------------------------


def _format_of(checkpoint: Checkpoint) -> tuple[Format, dict[str, Any]]:
    quantization = checkpoint.config["quantization_config"]
    layout = FORMATS.get(quantization.get("quant_method"))
    if layout is None:
        raise InputError(
            f"{checkpoint.folder} has quant_method {quantization.get('quant_method')!r}, which is "
            f"not read; accepted are {', '.join(FORMATS)}"
        )
    return layout, quantization


def _quantized_matrices(checkpoint: Checkpoint, network: nn.Module) -> dict[str, Matrix]:
    """The matrices whose codes the checkpoint holds, by the names their floats had."""
    if "quantization_config" not in checkpoint.config:
        return {}
    layout, _ = _format_of(checkpoint)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    for name in checkpoint.tensors:
        weight = name.removesuffix("_shape")
        if weight != name and layout.packed_name(weight) in checkpoint.tensors:
            stack = shapes[layout.packed_name(weight)][:-2]
            sizes = checkpoint.read(name).reshape(-1, 2)[0].tolist()
            shapes[weight] = (*stack, *sizes)
    quantized = {n for n in shapes if f"{n}_shape" in shapes and layout.packed_name(n) in shapes}
    matrices, _ = find_matrices(network, shapes)
    lost = sorted(quantized - matrices.keys())
    if lost:
        raise InputError(f"{checkpoint.folder}: {lost[0]} is quantized, but no matrix of the model")
    return {name: matrices[name] for name in sorted(quantized)}


def _by_parameter(
    matrices: Iterable[Matrix],
) -> Iterator[tuple[str, str, list[Matrix]]]:
    parameters: dict[tuple[str, str], list[Matrix]] = defaultdict(list)
    for matrix in matrices:
        parameters[matrix.module, matrix.parameter].append(matrix)
    for (module, parameter), parts in parameters.items():
        yield module, parameter, sorted(parts, key=lambda m: (m.expert or 0, m.part))


class _Reader:
    """Quantized weights of a checkpoint, one at a time."""

    def __init__(self, checkpoint: Checkpoint, layout: Format, quantization: dict[str, Any]) -> None:
        self.checkpoint, self.layout, self.quantization = checkpoint, layout, quantization

    def __call__(self, matrix: Matrix) -> list[QuantizedTensor]:
        """One weight, or one per expert of a stack."""
        name = matrix.source
        scheme = self.layout.scheme_of(self.quantization, name, matrix.module)
        tensors = {
            name + suffix: self.checkpoint.read(name + suffix)
            for suffix in _SUFFIXES
            if name + suffix in self.checkpoint.tensors
        }
        if not matrix.stacked:
            return [self.layout.read(name, tensors, scheme)]
        pieces = [{k: t[i] for k, t in tensors.items()} for i in range(matrix.shape[0])]
        return [self.layout.read(name, piece, scheme) for piece in pieces]


def _put(
    model: nn.Module,
    module: str,
    parameter: str,
    parts: list[Matrix],
    reader: _Reader,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Replace one float parameter by modules that hold its codes."""
    owner = model.get_submodule(module)
    if parts[0].kind != "expert":
        bias = owner.bias.data if isinstance(owner.bias, Tensor) else None
        model.set_submodule(module, QuantizedLinear(reader(parts[0])[0], bias, dtype, device))
        return
    if parts[0].stacked:
        experts = reader(parts[0])
    else:
        joined: dict[int, list[QuantizedTensor]] = defaultdict(list)
        for part in parts:
            joined[part.expert or 0] += reader(part)
        experts = [QuantizedTensor.concatenate(joined[i]) for i in sorted(joined)]
    linears = [QuantizedLinear(weight, None, dtype, device) for weight in experts]
    replace_experts(owner, parameter, linears)


# -- the rest of the model, by transformers -------------------------------------------------------


def _config_dtype(network: nn.Module) -> torch.dtype | None:
    dtype = getattr(network.config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)


def _build(
    network: nn.Module,
    floats: dict[str, Tensor],
    weights: dict[str, Matrix],
    dtype: torch.dtype,
    folder: Path,
) -> Any:
    """Let transformers load all but the quantized weights."""
    from transformers import GenerationConfig

    _register()
    with quiet_transformers():
        model, info = type(network).from_pretrained(  # type: ignore[attr-defined]
            None,
            config=network.config,
            state_dict=floats,
            dtype=dtype,
            quantization_config=_config(weights) if weights else None,
            output_loading_info=True,
        )
    missing = sorted(set(info["missing_keys"]) - {f"{m.module}.{m.parameter}" for m in weights.values()})
    if missing:
        raise InputError(f"{folder}: the model needs tensor {missing[0]}, which is not there")
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config.name_or_path = str(folder)
    return model


def _config(weights: dict[str, Matrix]) -> Any:
    from transformers.utils.quantization_config import QuantizationConfigMixin

    config = QuantizationConfigMixin(quant_method=_LOADER)  # type: ignore[arg-type]
    config.taken = {(m.module, m.parameter) for m in weights.values()}  # type: ignore[attr-defined]
    return config


def _register() -> None:
    """Make our quantizer known to transformers: the door through which the weights are taken out."""
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        register_quantization_config,
        register_quantizer,
    )
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if _LOADER in AUTO_QUANTIZATION_CONFIG_MAPPING:
        return

    class Loader(HfQuantizer):
        """Takes the quantized weights out of the empty model, so that nothing is loaded for them."""

        def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
            for module, parameter in self.quantization_config.taken:  # type: ignore[attr-defined]
                # Empty, not absent: the initialization of some models touches every weight.
                empty = nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)
                model.get_submodule(module).register_parameter(parameter, empty)

        def is_serializable(self) -> bool:
            """`save_pretrained` is refused: the kernels' layouts are no checkpoint."""
            return False

        @property
        def is_trainable(self) -> bool:
            """Codes have no gradient."""
            return False

    register_quantization_config(_LOADER)(QuantizationConfigMixin)
    register_quantizer(_LOADER)(Loader)
