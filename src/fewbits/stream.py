"""A model run one decoder block at a time, so that only one block is in memory.

The model is built without the weights of its blocks, and its own forward tells what each block is given
beside the hidden states: masks, position embeddings, which may differ from block to block. Then
blocks are loaded one by one, by transformers' own conversion, and run on all samples.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbits.attention import use_grouped_attention
from fewbits.checkpoint import Checkpoint
from fewbits.errors import InputError
from fewbits.linear import split_experts
from fewbits.load import build
from fewbits.structure import find_blocks, find_head, is_linear, locate, skeleton, text_config

TOKENS = 2048  # run through a block at a time, at least one sample; not tuned
CPU = torch.device("cpu")
Allocate = Callable[[int], Tensor]  # so many bytes, as a tensor of uint8
_HEAD_ROWS = 2**24  # weights of the output head in float32 at a time: 64 MB; not tuned


class _Reached(Exception):  # noqa: N818
    """The first block was called: nothing behind it need be run."""


@dataclass(frozen=True, slots=True)
class _Call:
    """What the model handed a block beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Stub(nn.Module):
    """Stands where a block was: records its call, and passes hidden states on.

    `given` are hidden states to pass on instead; `as_tuple` is how the block returns them, None
    if that is not known yet.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.call: _Call | None = None
        self.hidden: Tensor | None = None
        self.given: Tensor | None = None
        self.as_tuple: bool | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)  # models ask blocks for their kind

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The hidden states, as they came."""
        if args:
            self.hidden, args = args[0], args[1:]
        else:
            kwargs = dict(kwargs)
            self.hidden = kwargs.pop("hidden_states")
        self.call = _Call(args, kwargs)
        if self.as_tuple is None:
            raise _Reached
        hidden = self.hidden if self.given is None else self.given
        return (hidden,) if self.as_tuple else hidden


class _Head(nn.Module):
    """An output head in the dtype of the checkpoint, multiplied in float32, at some positions only."""

    def __init__(self, weight: Tensor, bias: Tensor | None, every: int) -> None:
        super().__init__()
        self.weight, self.bias, self.every = nn.Parameter(weight, requires_grad=False), bias, every

    def forward(self, x: Tensor) -> Tensor:
        """(..., tokens, in) -> (..., tokens / every, out)."""
        logits: Tensor = _Product.apply(x[..., :: self.every, :], self.weight)  # type: ignore[no-untyped-call]
        return logits if self.bias is None else logits + self.bias


class _Product(torch.autograd.Function):
    """`x @ W.T` in the dtype of x, a few rows of W at a time: no copy of W is kept for gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        ctx.save_for_backward(weight)
        return torch.cat([F.linear(x, some.to(x.dtype)) for some in _few_rows(weight)], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Of x alone."""
        (weight,) = ctx.saved_tensors
        result, start = grad.new_zeros(*grad.shape[:-1], weight.shape[1]), 0
        for some in _few_rows(weight):
            result += grad[..., start : start + len(some)] @ some.to(grad.dtype)
            start += len(some)
        return result, None


def _few_rows(weight: Tensor) -> tuple[Tensor, ...]:
    return torch.split(weight, max(1, _HEAD_ROWS // weight.shape[1]))


class States:
    """Hidden states of some of the samples, (samples, length, hidden) bfloat16, in several rooms.

    Args:
        samples: how many there are in all.
        rooms: which of them, and theirs.
    """

    def __init__(self, samples: int, rooms: Sequence[tuple[range, Tensor]]) -> None:
        self.rooms = [(rows, room) for rows, room in rooms if len(rows)]
        self.shape = torch.Size((samples, *self.rooms[0][1].shape[1:]))

    def __getitem__(self, key: slice | tuple[slice, slice]) -> Tensor:
        """Those of a range of samples, perhaps not at all places; a view where they are in one room."""
        rows, places = key if isinstance(key, tuple) else (key, slice(None))
        start, stop, _ = rows.indices(self.shape[0])
        parts = []
        while start < stop:
            held, room = next((own, room) for own, room in self.rooms if start in own)
            end = min(stop, held.stop)
            parts.append(room[start - held.start : end - held.start, places])
            start = end
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __setitem__(self, rows: slice, value: Tensor) -> None:
        """Of samples that are in one room."""
        held, room = next((own, room) for own, room in self.rooms if rows.start in own)
        room[rows.start - held.start : rows.stop - held.start] = value


class Stream:
    """The hidden states of all samples, taken through the model block by block.

    Args:
        checkpoint: of a float model.
        ids: (samples, length), the tokens.
        every: logits are computed at every so manieth position.
        tokens: that are run through a block at a time, at least one sample.
        allocate: gives room for states, in memory or in a file.
        states: to go on with, instead of the embeddings of the tokens.
        samples: those whose embeddings are taken; all by default.
        device: where blocks are run; states stay where `allocate` puts them.

    `states` is (samples, length, hidden) bfloat16: what the next block gets; `States` of some samples
    only where `samples` are given. `count` blocks there are.

    Raises:
        InputError: blocks that cannot be run on their own.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        ids: Tensor,
        every: int = 1,
        tokens: int = TOKENS,
        allocate: Allocate | None = None,
        states: Any = None,
        device: torch.device = CPU,
        samples: Sequence[range] | None = None,
    ) -> None:
        self.checkpoint, self.ids, self.every, self.device = checkpoint, ids, every, device
        self.network = skeleton(checkpoint.config)
        self.path = find_blocks(self.network)
        self.count = len(self.network.get_submodule(self.path))  # type: ignore[arg-type]
        self.located = locate(self.network, list(checkpoint.tensors))
        self.fast_dtype = fast_dtype(checkpoint.dtype, device)
        self.running: torch.dtype | None = None  # the same, while a block is in it
        self.shell, self.stubs = self._shell(every)
        self.loaded: dict[int, nn.Module] = {}  # ahead of time
        self.calls: dict[tuple[int, int], list[_Call]] = {}  # by samples and tokens of each
        self.batch = max(1, min(len(ids), tokens // ids.shape[1]))
        self.allocate = _in_memory if allocate is None else allocate
        self._first_calls()
        self.states: Any = self._embed(samples) if states is None else states

    # -- the model around its blocks ---------------------------------------------------------------

    def _shell(self, every: int) -> tuple[Any, list[_Stub]]:
        prefix = f"{self.path}."
        head, embedding = find_head(self.network), self._embedding()
        mapped = {f"{path}.weight" for path in (head, embedding) if path is not None}
        absent = {n for n in self.network.state_dict() if n.startswith(prefix)} | mapped
        shell = self._build(absent)
        blocks = shell.get_submodule(self.path)
        stubs = [_Stub(block) for block in blocks]
        for i, stub in enumerate(stubs):
            blocks[i] = stub
        self._map_large(shell, embedding, head, every)
        for tensor in (*shell.parameters(), *shell.buffers()):
            if not tensor.is_meta:  # as what stands for blocks may be
                tensor.data = tensor.data.to(self.device)
        return shell, stubs

    def _embedding(self) -> str | None:
        module = self.network.get_input_embeddings()  # type: ignore[operator]
        names = [n for n, m in self.network.named_modules() if m is module]
        return names[0] if names and isinstance(module, nn.Embedding) else None

    def _map_large(self, shell: Any, embedding: str | None, head: str | None, every: int) -> None:
        """Embeddings and head stay on the disk, in their own dtype; what leaves them is float32."""
        weight = None
        if embedding is not None:
            weight = self._tensor(f"{embedding}.weight")
            assert weight is not None
            module = shell.get_submodule(embedding)
            module.weight = nn.Parameter(weight, requires_grad=False)
            module.register_forward_hook(lambda _module, _args, output: output.float())
        if head is not None:
            module = shell.get_submodule(head)
            own = self._tensor(f"{head}.weight")
            own = weight if own is None else own
            assert own is not None
            module.weight = nn.Parameter(own, requires_grad=False)
            if is_linear(module):
                shell.set_submodule(head, _Head(own, module.bias, every))

    def _tensor(self, parameter: str) -> Tensor | None:
        """The source tensor behind a parameter; None for the tied one of two."""
        names = [name for name, target in self.located.items() if target.parameter == parameter]
        return self.checkpoint.read(names[0]) if names else None

    def _build(self, absent: set[str]) -> Any:
        names = [name for name, target in self.located.items() if target.parameter not in absent]
        tensors = {name: self.checkpoint.read(name) for name in names}
        model = build(self.network, tensors, absent, torch.float32, self.checkpoint.folder)
        use_grouped_attention(model)
        return model.eval()

    def _reach(self, ids: Tensor) -> Tensor:
        """The first block's hidden states; its call is recorded too."""
        self.stubs[0].as_tuple = None
        try:
            self.shell(ids.to(self.device), use_cache=False)
        except _Reached:
            hidden = self.stubs[0].hidden
            assert hidden is not None
            return hidden
        raise InputError(f"{self.checkpoint.folder}: the model does not call the blocks of {self.path}")

    @torch.no_grad()
    def _first_calls(self) -> None:
        """Learn how blocks return, and that what they are given does not depend on the tokens."""
        one = self.ids[:1]
        hidden = self._reach(one)
        call = self.stubs[0].call
        assert call is not None
        block = self.load(0)
        self.loaded = {0: block}
        output = block(hidden, *call.args, **call.kwargs)
        self.as_tuple = isinstance(output, tuple)
        others = (one + 1) % text_config(self.network).vocab_size
        first, second = self._record(one), self._record(others)
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            if not _same(a.args, b.args) or not _same(a.kwargs, b.kwargs):
                raise InputError(
                    f"{self.checkpoint.folder}: block {i} is given inputs that depend on the tokens "
                    "beside its hidden states; such models cannot be calibrated"
                )

    @torch.no_grad()
    def _record(self, ids: Tensor) -> list[_Call]:
        for stub in self.stubs:
            stub.as_tuple, stub.given, stub.call = self.as_tuple, None, None
        self.shell(ids.to(self.device), use_cache=False)
        calls = [stub.call for stub in self.stubs]
        if any(call is None for call in calls):
            raise InputError(
                f"{self.checkpoint.folder}: block {calls.index(None)} of {self.path} is never called"
            )
        return [call for call in calls if call is not None]

    @torch.no_grad()
    def _embed(self, samples: Sequence[range] | None) -> Any:
        """Of all samples, or of some of them, one behind the other in one room."""
        wanted = [range(len(self.ids))] if samples is None else samples
        states: Tensor | None = None
        done, rooms = 0, []
        for some in wanted:
            for rows in self.batches(some):
                hidden = self._reach(self.ids[rows])
                if states is None:
                    shape = (sum(map(len, wanted)), self.ids.shape[1], hidden.shape[-1])
                    room = self.allocate(2 * torch.Size(shape).numel())
                    states = room.view(torch.bfloat16).view(shape)
                first = done + rows.start - some.start
                states[first : first + len(hidden)] = hidden.to(states.dtype)
            assert states is not None
            rooms.append((some, states[done : done + len(some)]))
            done += len(some)
        return states if samples is None else States(len(self.ids), rooms)

    def begin_with(self, embedding: Tensor, samples: Sequence[range]) -> None:
        """Let `states` be those that another embedding (vocabulary, width) gives for some samples."""
        module = self.shell.get_input_embeddings()
        own = module.weight
        module.weight = nn.Parameter(embedding.to(self.device), requires_grad=False)
        self.states = self._embed(samples)
        module.weight = own

    # -- blocks ------------------------------------------------------------------------------------

    def load(self, number: int) -> nn.Module:
        """A block with its weights, in float32, its experts split into linears."""
        if number in self.loaded:
            return self.loaded.pop(number)
        prefix = f"{self.path}.{number}."
        absent = {name for name in self.network.state_dict() if not name.startswith(prefix)}
        block: nn.Module = self._build(absent).get_submodule(prefix[:-1])
        mapped = self._in_float32()
        for name, parameter in block.named_parameters():
            if prefix + name in mapped:  # the file itself: never written to
                parameter.data = parameter.data.clone()
            parameter.requires_grad_(False)
        split_experts(block)
        return block.to(self.device)

    def _in_float32(self) -> set[str]:
        """The parameters that the checkpoint has in float32."""
        tensors = self.checkpoint.tensors
        return {t.parameter for n, t in self.located.items() if tensors[n].dtype == torch.float32}

    def batches(self, samples: range) -> Iterator[slice]:
        """Slices of samples that are run at a time."""
        for start in range(samples.start, samples.stop, self.batch):
            yield slice(start, min(start + self.batch, samples.stop))

    @torch.no_grad()
    def run(self, number: int, block: nn.Module, states: Tensor) -> Tensor:
        """What the block makes of the states (samples, length, hidden): float32.

        The same in the model's own dtype while the block is `in_fast_dtype`.
        """
        return self._run(number, block, states)

    def _run(self, number: int, block: nn.Module, states: Tensor) -> Tensor:
        samples, length, _ = states.shape
        if (samples, length) not in self.calls:
            self.calls[samples, length] = self._record(self.ids[:1, :length].expand(samples, -1))
        call, dtype = self.calls[samples, length][number], self.running or torch.float32
        args, kwargs = _cast(call.args, dtype), _cast(call.kwargs, dtype)
        # Modules may keep some weights in float32: autocast lets their products meet those in `dtype`.
        with torch.autocast(self.device.type, self.running, enabled=self.running is not None):
            output = block(states.to(self.device, dtype), *args, **kwargs)
        hidden: Tensor = output[0] if self.as_tuple else output
        return hidden.float()

    def pull_back(self, number: int, block: nn.Module, states: Tensor, gradient: Tensor) -> Tensor:
        """The gradient at a block's input, given that at its output; both (samples, length, hidden)."""
        with torch.enable_grad():
            given = states.to(self.device).float().requires_grad_()
            output = self._run(number, block, given)
            (result,) = torch.autograd.grad(output, given, gradient.to(self.device))
        return result

    def pull_back_to_weights(
        self,
        number: int,
        block: nn.Module,
        linears: list[str],
        states: Tensor,
        gradient: Callable[[Tensor], Tensor],
    ) -> dict[str, Tensor]:
        """Gradients of a block's weights, as (out, in), given that at its output.

        Args:
            number: of the block.
            block: as it stands.
            linears: paths of those whose weights are meant.
            states: (samples, length, hidden) that the block is given.
            gradient: from the output.

        Returns:
            by path; those that no token reached are missing.
        """
        modules = [block.get_submodule(path) for path in linears]
        weights = [module.weight for module in modules]
        try:
            with torch.enable_grad():
                for weight in weights:
                    weight.requires_grad_()
                output = self._run(number, block, states)
                given = gradient(output.detach())
                found = torch.autograd.grad(output, weights, given, allow_unused=True)  # type: ignore[arg-type]
        finally:
            for weight in weights:
                weight.requires_grad_(False)
        return {
            path: value if isinstance(module, nn.Linear) else value.t()
            for path, module, value in zip(linears, modules, found, strict=True)
            if value is not None
        }

    def pull_back_to_embedding(self, ids: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """What the embedding gives for some tokens, and the gradient there: (samples, length, width).

        Args:
            ids: (samples, length).
            gradient: (samples, length, hidden) at the first block's input, which models scale, project
                or normalize, and add positions to.
        """
        found: list[Tensor] = []

        def cut(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
            found.append(output.detach().float().requires_grad_())
            return found[-1]

        handle = self.shell.get_input_embeddings().register_forward_hook(cut)
        try:
            with torch.enable_grad():
                hidden = self._reach(ids)
                (result,) = torch.autograd.grad(hidden, found[0], gradient.to(self.device))
        finally:
            handle.remove()
        return found[0].detach(), result

    @contextmanager
    def in_fast_dtype(self, number: int, block: nn.Module) -> Iterator[None]:
        """Until left, `run` computes in the dtype of the model itself, where `fast_dtype` is one.

        Parameters that the checkpoint has in float32 stay so.
        """
        if self.fast_dtype is None or self.running is not None:
            yield
            return
        exact = self._in_float32()
        named = {f"{self.path}.{number}.{name}": p for name, p in block.named_parameters()}
        held = {p: p.data for n, p in named.items() if p.dtype == torch.float32 and n not in exact}
        # In one piece: the C library hands large pieces back when they are freed, and keeps small ones.
        count = sum(p.numel() for p in held)
        copies = torch.empty(count, dtype=self.fast_dtype, device=self.device)
        parts = torch.split(copies, [p.numel() for p in held])
        try:
            for (parameter, data), part in zip(held.items(), parts, strict=True):
                parameter.data = part.view(data.shape).copy_(data)
            self.running = self.fast_dtype
            yield
        finally:
            self.running = None
            for parameter, data in held.items():
                parameter.data = data

    def run_all(self, number: int, block: nn.Module, states: Tensor) -> Tensor:
        """`run` on any number of samples."""
        parts = [self.run(number, block, states[rows]) for rows in self.batches(range(len(states)))]
        return torch.cat(parts)

    def advance(self, number: int, block: nn.Module, samples: range, into: Tensor | States) -> None:
        """Write what the block makes of the states of these samples `into` a tensor like them."""
        with self.in_fast_dtype(number, block):
            for rows in self.batches(samples):
                into[rows] = self.run(number, block, self.states[rows])

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """What the model's own norm and head make of hidden states (samples, length, hidden)."""
        return self._logits(states)

    def _logits(self, states: Tensor) -> Tensor:
        for stub in self.stubs:
            stub.as_tuple, stub.given = self.as_tuple, None
        self.stubs[-1].given = states.to(self.device)
        logits: Tensor = self.shell(self.ids[: len(states)].to(self.device), use_cache=False).logits
        return logits.float()

    def draw_back(self, states: Tensor, generator: torch.Generator) -> tuple[Tensor, int]:
        """The gradient, at the last block's output, of -log p of tokens drawn from p itself.

        Args:
            states: (samples, length, hidden), of that output.
            generator: draws a token at each position that has logits.

        Returns:
            the gradient (samples, length, hidden) of the sum over positions, and how many those are. Its
            outer product with itself is, on average over draws, the Fisher information.
        """
        with torch.enable_grad():
            given = states.to(self.device).float().requires_grad_()
            log_p = F.log_softmax(self._logits(given).flatten(0, -2), -1)
            if bool(log_p.detach().isnan().any()):
                raise InputError(
                    f"{self.checkpoint.folder} gives logits of NaN or infinity; accepted are models "
                    "that compute"
                )
            drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator)
            (result,) = torch.autograd.grad(-log_p.gather(1, drawn.to(self.device)).sum(), given)
        return result, len(drawn)


def fast_dtype(dtype: torch.dtype, device: torch.device = CPU) -> torch.dtype | None:
    """bfloat16, for models in it where the device multiplies it faster than float32."""
    if device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native and dtype == torch.bfloat16 else None


def _in_memory(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Tensors in float32, and those in tuples and dicts, in another dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.dtype == torch.float32 else value
    if isinstance(value, dict):
        return {key: _cast(v, dtype) for key, v in value.items()}
    return tuple(_cast(v, dtype) for v in value) if type(value) is tuple else value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return isinstance(a, type(b))
