"""quantize_(): round the linears of a model that is in memory."""

from torch import Tensor, nn

from fewbits.errors import InputError
from fewbits.linear import QuantizedLinear, replace_experts
from fewbits.methods import RTN
from fewbits.recipe import Recipe
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
from fewbits.tensor import quantize_tensor


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
    >>> [type(m).__name__ for m in quantize_(model, QuantScheme(8, "channel"), overrides=(("2", None),))]
    ['QuantizedLinear', 'ReLU', 'Linear']
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
