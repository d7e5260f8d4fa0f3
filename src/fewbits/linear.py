"""Modules with quantized weights: a linear, a mixture's experts run as linears, and an embedding."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.errors import InputError
from fewbits.kernels import KERNELS, Kernel, Reference, choose_kernel
from fewbits.native import operators
from fewbits.scheme import QuantScheme
from fewbits.structure import EXPERT_PARAMETERS, is_experts
from fewbits.tensor import QuantizedTensor, quantize_tensor


class QuantizedLinear(nn.Linear):
    """`x @ W.T + bias` straight from codes; no float copy of the weight is kept.

    Gradients go to x, as if the product were exact, and not to the codes. It is an `nn.Linear` without
    the parameter `weight`, so that adapters (PEFT) find it and are trained on top; merging them raises.

    Args:
        weight: (out, in).
        bias: (out,), or None.
        dtype: of the inputs that the kernel is prepared for; the scale's by default.
        device: where the kernel runs; the CPU by default.
        int8_inputs: whether a kernel may round inputs to 8 bits where the scheme does not ask for it.

    `kernel_name` is the kernel that runs, `refusals` says why those before it could not.

    >>> linear = nn.Linear(64, 16, dtype=torch.bfloat16)
    >>> quantized = QuantizedLinear.from_float(linear, QuantScheme(4, "group", 32))
    >>> quantized(torch.ones(1, 64).bfloat16()).shape
    torch.Size([1, 16])
    """

    def __init__(
        self,
        weight: QuantizedTensor,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        int8_inputs: bool = False,
    ) -> None:
        nn.Module.__init__(self)  # not that of `nn.Linear`, which makes a float weight
        self.out_features, self.in_features = weight.shape
        self.scheme = weight.scheme
        dtype, device = dtype or weight.scale.dtype, torch.device(device)
        self.dtype = dtype
        self.kernel_name, self.refusals = choose_kernel(weight, dtype, device, int8_inputs=int8_inputs)
        self.kernel = KERNELS[self.kernel_name](weight, dtype, device)
        self.order: Tensor | None
        self.register_buffer("order", None if weight.order is None else weight.order.to(device))
        if bias is not None and not bias.is_meta:  # of those on "meta" the values are yet to come
            bias = bias.to(device)
        own = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", own)

    @classmethod
    def from_float(cls, linear: nn.Module, scheme: QuantScheme) -> Self:
        """Round the weight of an `nn.Linear`, or of transformers' `Conv1D`, to the nearest codes.

        Raises:
            InputError: the scheme does not fit the weight, or asks for calibration.
        """
        if scheme.dynamic != scheme:
            raise InputError(
                f"scheme {scheme.label} without calibration; accepted is {scheme.dynamic.label}"
            )
        weight = float_weight(linear)
        bias = linear.bias.detach() if isinstance(linear.bias, Tensor) else None
        return cls(quantize_tensor(weight, scheme), bias, weight.dtype, weight.device)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # read only
        """The dequantized weight (out, in), made anew at each access: for modules that use it bare."""
        weight = self.kernel.weight(self.dtype)
        if self.order is not None:
            weight = torch.empty_like(weight).index_copy_(1, self.order, weight)
        return weight.as_subclass(_Dequantized)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        kernel, bias, order = self._modules["kernel"], self._parameters["bias"], self._buffers["order"]
        assert isinstance(kernel, Kernel)
        if order is not None:
            x = x.index_select(-1, order)
        fused = bias if kernel.adds_bias else None
        arguments = (x,) if fused is None else (x, fused)
        if torch.is_grad_enabled() and any(argument.requires_grad for argument in arguments):
            y: Tensor = _Multiply.apply(kernel, *arguments)  # type: ignore[no-untyped-call]
        else:
            # What a call of a module does besides costs as much as the rest, in a step.
            y = kernel.forward(*arguments)
        return y if bias is None or fused is not None else y + bias

    def extra_repr(self) -> str:
        """Shape, scheme and kernel, for `print(model)`."""
        return f"{self.in_features}, {self.out_features}, {self.scheme.label}, {self.kernel_name}"


class FloatLinear(nn.Linear):
    """An `nn.Linear` in bfloat16 that multiplies one or two rows on a CPU as fast as its weight is read.

    PyTorch's own took 1.7 times as long for the head of a 1B model (torch 2.13, 2026-11-26).
    Everything else is PyTorch's. Sums are in float32 and rounded once, as there.
    """

    ROWS = 2  # at most: PyTorch is as fast with 4

    @classmethod
    def around(cls, linear: nn.Linear) -> Self:
        """The same parameters, not copied."""
        new = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        new.register_parameter("weight", linear._parameters["weight"])
        new.register_parameter("bias", linear._parameters["bias"])
        return new.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self._takes(input) and operators.available():
            bias = operators.NOTHING if self.bias is None else self.bias
            y: Tensor = operators.float_linear(input, self.weight, bias)
            return y
        return super().forward(input)

    def _takes(self, x: Tensor) -> bool:
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        assert weight is not None
        return (
            0 < x.numel() <= self.ROWS * self.in_features
            and not torch.is_grad_enabled()
            and type(x) is Tensor
            and x.shape[-1] == weight.shape[1]
            and all(
                each.dtype == torch.bfloat16 and each.device.type == "cpu" and each.is_contiguous()
                for each in ((x, weight) if bias is None else (x, weight, bias))
            )
        )


class QuantizedEmbedding(nn.Embedding):
    """Rows of codes, dequantized as they are looked up; no float copy of the weight is kept.

    It is an `nn.Embedding` without the parameter `weight`. Nothing has a gradient in it.

    Args:
        weight: (tokens, hidden).
        dtype: of the rows that it gives; the scale's by default.
        device: where it is; the CPU by default.
        factor: that rows are multiplied by, as the class does whose place it takes: see `row_factor`.

    >>> table = torch.tensor([[1.0, -2.0], [0.5, 0.25]])
    >>> embedding = QuantizedEmbedding(quantize_tensor(table, QuantScheme(8)))
    >>> ids = torch.tensor([[1, 0]])
    >>> torch.equal(embedding(ids), embedding.weight[ids])
    True
    """

    def __init__(
        self,
        weight: QuantizedTensor,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        factor: float | Tensor = 1.0,
    ) -> None:
        nn.Module.__init__(self)  # not that of `nn.Embedding`, which makes a float weight
        if weight.order is not None:
            raise InputError("an embedding whose groups are not of neighbouring columns is not read")
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx, self.max_norm, self.norm_type = None, None, 2.0
        self.scale_grad_by_freq, self.sparse = False, False
        self.scheme, self.kernel_name = weight.scheme, "reference"
        self.dtype = dtype or weight.scale.dtype
        self.kernel: Kernel = Reference(weight, self.dtype, torch.device(device))
        self.order = None
        self.factor: float | Tensor
        if isinstance(factor, Tensor):
            self.register_buffer("factor", factor.to(device), persistent=False)
        else:
            self.factor = factor

    def share(self, head: QuantizedLinear) -> bool:
        """Look up the codes of a head that is tied to it, and keep no others, if its kernel gives rows.

        Returns:
            Whether it can: some layouts hold columns together, and the head may be on another device.
        """
        own, other = (next(kernel.buffers()).device for kernel in (self.kernel, head.kernel))
        can = own == other and type(head.kernel).rows is not Kernel.rows
        if can:
            self.kernel, self.kernel_name = head.kernel, head.kernel_name
        return can

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # read only
        """The dequantized weight (tokens, hidden), without the factor, made anew at each access."""
        return self.kernel.weight(self.dtype).as_subclass(_Dequantized)

    def forward(self, input: Tensor) -> Tensor:
        """(...) numbers of tokens -> (..., hidden).

        Raises:
            IndexError: there is no such token; on a CPU, as `nn.Embedding`.
        """
        shape = (*input.shape, self.embedding_dim)
        if not input.numel():
            return torch.empty(shape, dtype=self.dtype, device=input.device)
        if input.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = (int(end) for end in torch.aminmax(input))
            if low < 0 or high >= self.num_embeddings:
                raise IndexError(
                    f"token {low if low < 0 else high}; accepted are 0 to {self.num_embeddings - 1}"
                )
        rows = self.kernel.rows(input.reshape(-1).long(), self.dtype).view(shape)
        plain = not isinstance(self.factor, Tensor) and self.factor == 1
        return rows if plain else rows * self.factor

    def extra_repr(self) -> str:
        """Shape and scheme, for `print(model)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.scheme.label}"


class _Dequantized(Tensor):
    """A weight made from codes. What is written to its `data` would be lost, so that is refused."""

    # What is computed from it is a plain Tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise InputError(
            "a quantized weight cannot be written to: merge adapters into the float model, and resize "
            "its embeddings there"
        )


class _Multiply(torch.autograd.Function):
    """A kernel's product with the gradient of `x @ W.T + bias`: kernels have none of their own."""

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, *arguments: Tensor) -> Tensor:
        """The kernel's own; nothing is saved but the kernel."""
        ctx.kernel = kernel
        y: Tensor = kernel(*arguments)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """`grad @ W`, and for a bias the sum of `grad`; rounding the inputs counts as the identity."""
        of_x = grad @ ctx.kernel.weight(grad.dtype) if ctx.needs_input_grad[1] else None
        if len(ctx.needs_input_grad) == 2:
            return None, of_x
        return None, of_x, grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None


def float_weight(linear: nn.Module) -> Tensor:
    """The weight as (out, in); `Conv1D` stores it transposed."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight.detach() if isinstance(linear, nn.Linear) else weight.detach().t()


def set_float_weight(linear: nn.Module, weight: Tensor) -> None:
    """Give an `nn.Linear` or a `Conv1D` another weight (out, in), which is not copied."""
    parameter = linear.weight
    assert isinstance(parameter, Tensor)
    parameter.data = weight if isinstance(linear, nn.Linear) else weight.t()


# -- experts -----------------------------------------------------------------------------------

EXPERTS = "fewbits"  # the name under which transformers finds `experts_forward`


class ExpertLinears(nn.ModuleList):
    """One linear per expert, in place of a fused 3-D parameter."""


def experts_forward(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run each expert that was chosen, as linears, on the tokens routed to it.

    Args:
        experts: a fused-experts module of transformers, its 3-D parameters perhaps replaced by
            `ExpertLinears`.
        hidden_states: (tokens, hidden).
        top_k_index, top_k_weights: (tokens, k); an index past the last expert means none.

    Returns:
        (tokens, hidden), summed in float32 in order of the experts.
    """
    result = torch.zeros_like(hidden_states, dtype=torch.float32)
    chosen: list[int] = top_k_index.unique().tolist()  # type: ignore[no-untyped-call]
    count = int(experts.num_experts)  # type: ignore[arg-type]
    for expert in chosen:
        if expert >= count:  # expert parallelism marks absent experts so
            continue
        token, choice = torch.where(top_k_index == expert)
        x = _project(experts, "gate_up_proj" if experts.has_gate else "up_proj", expert)(
            hidden_states[token]
        )
        x = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)  # type: ignore[operator]
        x = _project(experts, "down_proj", expert)(x)
        if experts.has_post_expert_norm:
            x = experts.post_expert_norm(x)  # type: ignore[operator]
        weights = top_k_weights[token, choice, None]
        result.index_add_(0, token, (x * weights).float())
    return result.to(hidden_states.dtype)


def _project(experts: nn.Module, name: str, expert: int) -> Callable[[Tensor], Tensor]:
    weight = getattr(experts, name)
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    if isinstance(weight, ExpertLinears):
        linear = weight[expert]
        return lambda x: linear(x) if bias is None else linear(x) + bias
    matrix = weight[expert].t() if experts.is_transposed else weight[expert]
    return lambda x: F.linear(x, matrix, bias)


def replace_experts(experts: nn.Module, name: str, linears: Sequence[nn.Module]) -> None:
    """Put one linear per expert in place of the fused parameter `name`, and route through them."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, experts_forward)
    delattr(experts, name)
    setattr(experts, name, ExpertLinears(linears))
    experts.config._experts_implementation = EXPERTS  # type: ignore[union-attr]


def split_experts(block: nn.Module) -> None:
    """Run every mixture in `block` as one `nn.Linear` per expert, in place; it computes the same.

    An expert's path is then `...experts.gate_up_proj.3`. The weights, (out, in), are views of the fused
    parameter: nothing is copied, and its memory is free when the last of them is replaced. A bias stays
    in the experts module, which adds it.
    """
    for experts in [module for module in block.modules() if is_experts(module)]:
        for name in EXPERT_PARAMETERS:
            fused = experts._parameters.get(name)
            if fused is not None and fused.ndim == 3:
                pieces = fused.detach().mT if experts.is_transposed else fused.detach()
                replace_experts(experts, name, [_linear(weight) for weight in pieces])


def _linear(weight: Tensor) -> nn.Linear:
    """An `nn.Linear` around a weight (out, in) that is not copied."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
