"""A checkpoint -> a transformers model that multiplies straight from codes.

The model is built by transformers itself: its `from_pretrained` loads everything that is in float,
through its own renaming and conversion rules, into a model whose quantized weights were taken out
before. Then each of those modules is replaced by one that holds the codes; a float copy never exists.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.attention import use_grouped_attention
from fewbits.checkpoint import Checkpoint, has_weights, open_checkpoint, resolve
from fewbits.decoding import check_compiled, run_steps_together
from fewbits.errors import FewbitsError, InputError, VerificationError, first_line
from fewbits.formats import FORMATS, READ_ONLY, GgufLayout, Reader, format_of
from fewbits.gguf_file import GgufCheckpoint, open_gguf
from fewbits.linear import FloatLinear, QuantizedEmbedding, QuantizedLinear, replace_experts
from fewbits.memory import hand_back_memory
from fewbits.structure import (
    Matrix,
    find_matrices,
    find_tied_head,
    is_conv1d,
    is_experts,
    locate,
    quiet_transformers,
    row_factor,
    skeleton,
)
from fewbits.tensor import QuantizedTensor
from fewbits.untrusted import check_file, shown

_CODES_PER_BYTE = 4  # of two bits, the fewest
_SMALL = 2**20  # parameters that no file needs to account for; not tuned
_LOADER = "fewbits-loader"  # the name under which transformers finds our quantizer


def load(
    model: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    int8_inputs: bool = False,
    compiled: bool = False,
) -> Any:
    """A transformers model, quantized or not, ready for `generate()`.

    Args:
        model: folder of a checkpoint, a GGUF file or a folder with one, or a hub id.
        dtype: of activations and of what is not quantized; the checkpoint's by default, but bfloat16
            where a quantized one in float16 runs on a CPU: its kernels are fast in that alone.
        device: where it runs.
        int8_inputs: round the inputs of matrices of up to 4 bits to 8 bits on a CPU: faster for several
            tokens at once. What it costs is in docs/kernels.md.
        compiled: run steps of `generate()` on a CPU as one graph, made by PyTorch's compiler in the
            first: see `run_steps_together`.

    Returns:
        The `PreTrainedModel`, in evaluation mode.

    Raises:
        InputError: no checkpoint, a quantization that is not read, or steps that cannot be compiled.

    >>> model = load("reference/model")
    >>> model.generate(torch.tensor([[0, 1]]), max_new_tokens=3, min_new_tokens=3).shape
    torch.Size([1, 5])
    """
    folder = resolve(model)
    checkpoint = open_model(folder)
    with _one_line(folder):
        return _load(checkpoint, dtype, device, int8_inputs, compiled)


def find_device(name: str | torch.device) -> torch.device:
    """Where models are run, and matrices rounded.

    Raises:
        InputError: it is neither a CPU nor a GPU that PyTorch sees.
    """
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    known = {"cpu": "cpu", **{gpu: gpu for gpu in gpus}} | ({"cuda": "cuda:0"} if gpus else {})
    if str(name) not in known:
        accepted = ", ".join(known) if gpus else "cpu: PyTorch sees no GPU"
        raise InputError(f"device {name}; accepted is {accepted}")
    return torch.device(known[str(name)])


def open_model(path: Path) -> Checkpoint:
    """Headers of a folder, of a GGUF file, or of the one that lies in a folder without other weights.

    Raises:
        InputError: as `open_checkpoint` and `open_gguf`, or several GGUF files.
    """
    file = find_gguf(path)
    return open_checkpoint(path) if file is None else open_gguf(file)


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that a path means: itself, or the one in a folder without other weights.

    Raises:
        InputError: there are several.
    """
    if path.is_dir() and has_weights(path):
        return None
    files = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    if len(files) > 1:
        raise InputError(f"{path} holds {', '.join(f.name for f in files)}; accepted is one of them")
    return files[0] if files else None


@contextmanager
def _one_line(folder: Path) -> Iterator[None]:
    """A checkpoint of a stranger can fail in any way, mostly in transformers: each is one line."""
    try:
        yield
    except (FewbitsError, MemoryError):
        raise
    except Exception as error:
        if "can't allocate memory" in str(error):  # torch's own kind: the machine's fault, or not
            raise
        raise InputError(
            f"{folder} cannot be loaded: {type(error).__name__} {first_line(error)}"
        ) from error


def _load(
    checkpoint: Checkpoint,
    dtype: torch.dtype | None,
    device: torch.device | str,
    int8_inputs: bool,
    compiled: bool,
) -> Any:
    folder = checkpoint.folder
    network = skeleton(checkpoint.config)
    _check_size(checkpoint, network)
    weights = quantized_matrices(checkpoint, network)
    if compiled:
        mixture = any(matrix.kind == "expert" for matrix in weights.values())
        check_compiled(network, torch.device(device), mixture)
    found = quantization_of(checkpoint)
    own = set() if found is None else {t for name in weights for t in found[0].tensors(name).every}
    stored = config_dtype(network) or checkpoint.dtype
    slow = bool(weights) and stored == torch.float16 and torch.device(device).type == "cpu"
    dtype = dtype or (torch.bfloat16 if slow else stored)
    if isinstance(checkpoint, GgufCheckpoint):
        checkpoint.give(dtype)
        names = [name for name in checkpoint.tensors if name not in own]
        lost = sorted(set(names) - locate(network, names).keys())
        if lost:  # such files hold nothing that is not used
            raise InputError(f"{folder}: tensor {lost[0]} has no place in the model")
    floats = {name: checkpoint.read(name) for name in checkpoint.tensors if name not in own}
    checkpoint.close()  # floats stay mapped; the pages of codes go once kernels have their own
    tied = tied_to_codes(checkpoint, network, weights)
    absent = {f"{m.module}.{m.parameter}" for m in weights.values()}
    absent |= set() if tied is None else {f"{tied}.weight"}
    loaded = build(network, floats, absent, dtype, folder).to(device)
    if weights and dtype != stored:
        loaded.fewbits_notes = [f"fact: the checkpoint is in {stored}, the model runs in {dtype}"]
    for module, parameter, parts in by_parameter(weights.values()):
        pieces = read_parameter(checkpoint, parts)
        whole = network.get_submodule(module).get_parameter(parameter)
        check_shape(checkpoint.folder, parts, pieces, tuple(whole.shape))
        if found is not None and isinstance(found[0], GgufLayout):
            pieces = [piece.coarsest() for piece in pieces]  # kernels are faster in larger groups
        kind, place = parts[0].kind, torch.device(device)
        put(loaded, module, parameter, kind, pieces, dtype, place, int8_inputs)
        if kind == "embedding" and tied is not None:
            put(loaded, tied, parameter, "linear", pieces, dtype, place, int8_inputs)
            share_codes(loaded, module, tied)
    checkpoint.close()
    hand_back_memory()  # of unpacking: it was as much as the codes take
    # In float it computes what transformers' does.
    grouped = use_grouped_attention(loaded, texts=bool(weights))
    if weights and loaded.device.type == "cpu":
        from fewbits.cache import use_growing_cache

        use_growing_cache(loaded)
        stream_floats(loaded)
    if compiled or (weights and grouped):
        run_steps_together(loaded, compiled)
    if int8_inputs:
        loaded.fewbits_notes = [*getattr(loaded, "fewbits_notes", []), *_kept_inputs(loaded)]
    return loaded.eval()


def _check_size(checkpoint: Checkpoint, network: nn.Module) -> None:
    """Refuse a model that is far larger than its files, before memory is taken for what is missing."""
    stored = sum(info.size_bytes for info in checkpoint.tensors.values())
    asked = sum(parameter.numel() for parameter in network.parameters())
    most = _CODES_PER_BYTE * stored + _SMALL
    if asked > most:
        raise InputError(
            f"{checkpoint.folder}: config.json asks for {asked} parameters, but the files hold {stored} "
            f"bytes; accepted are at most {most} parameters"
        )


def kernel_notes(model: nn.Module) -> list[str]:
    """Where the slow reference kernel runs, and why the fast ones could not: a line per reason.

    Also that the model runs in another dtype than the checkpoint's, if it does.
    """
    places: dict[str, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and module.kernel_name == "reference":
            reasons = (f"{kernel} {reason}" for kernel, reason in module.refusals.items())
            places["; ".join(reasons)].append(name)
    return [*getattr(model, "fewbits_notes", [])] + [
        f"fallback: {names[0]} and {len(names) - 1} more run reference: {reason}"
        for reason, names in places.items()
    ]


def _kept_inputs(model: nn.Module) -> list[str]:
    """Where inputs are not rounded to 8 bits, though that was asked for: a line per reason."""
    linears = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    passed = Counter(
        m.refusals["native-int8"]
        for m in linears
        if "native-int8" in m.refusals and m.kernel_name != "reference"
    )
    return [
        f"fallback: {count} of {len(linears)} matrices keep their inputs: native-int8 {reason}"
        for reason, count in passed.items()
    ]


@torch.no_grad()
def check_forward(folder: Path) -> None:
    """Load a checkpoint and run it on a few tokens.

    Raises:
        VerificationError: it cannot be loaded, or its logits are not finite.
    """
    try:
        model = load(folder)
        vocabulary = model.config.get_text_config().vocab_size
        logits = model(torch.arange(min(8, vocabulary))[None], use_cache=False).logits
    except Exception as error:  # a model can fail in any way; each means that it cannot be used
        reason = first_line(error)
        raise VerificationError(f"{folder} does not run: {reason}") from error
    if not bool(torch.isfinite(logits).all()):
        raise VerificationError(f"{folder} gives logits that are not finite")


# -- what is quantized -----------------------------------------------------------------------------


def quantization_of(checkpoint: Checkpoint) -> tuple[Reader, dict[str, Any]] | None:
    """The format of a quantized checkpoint, and what its config says; None for one in float.

    Raises:
        InputError: a quantization that is not read.
    """
    quantization = checkpoint.config.get("quantization_config")
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        raise InputError(
            f"{checkpoint.folder}: quantization_config is {shown(quantization)}; accepted is an object"
        )
    layout = format_of(quantization)
    if layout is None:
        raise InputError(
            f"{checkpoint.folder} has quant_method {shown(quantization.get('quant_method'))}, which is "
            f"not read; accepted are {', '.join((*FORMATS, *READ_ONLY))}"
        )
    return layout, quantization


def quantized_matrices(checkpoint: Checkpoint, network: nn.Module) -> dict[str, Matrix]:
    """The matrices whose codes the checkpoint holds, by the names their floats had."""
    found = quantization_of(checkpoint)
    if found is None:
        return {}
    layout, quantization = found
    quantized = layout.quantized_names(quantization, checkpoint.tensors)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    for name in sorted(quantized):
        missing = [tensor for tensor in layout.tensors(name).needed if tensor not in checkpoint.tensors]
        if missing:
            raise InputError(f"{checkpoint.folder}: {name} is quantized, but {missing[0]} is missing")
        shapes[name] = layout.shape(quantization, name, checkpoint)
    matrices, _ = find_matrices(network, shapes)
    lost = sorted(quantized - matrices.keys())
    if lost:
        raise InputError(f"{checkpoint.folder}: {lost[0]} is quantized, but no matrix of the model")
    return {name: matrices[name] for name in sorted(quantized)}


def tied_to_codes(checkpoint: Checkpoint, network: nn.Module, weights: dict[str, Matrix]) -> str | None:
    """Path of the head that multiplies by the codes of the embedding, having no tensor of its own.

    Args:
        weights: `quantized_matrices`.
    """
    if not any(matrix.kind == "embedding" for matrix in weights.values()):
        return None
    head = find_tied_head(network)
    own = {matrix.module for matrix in weights.values()}
    own |= {t.parameter.rpartition(".")[0] for t in locate(network, list(checkpoint.tensors)).values()}
    return None if head in own else head


def share_codes(model: Any, embedding: str, head: str) -> None:
    """Let an embedding look up the codes of the head that is tied to it, once both have them."""
    looked_up, multiplied = (model.get_submodule(path) for path in (embedding, head))
    looked_up.share(multiplied)
    keep_apart(model, head)


def keep_apart(model: Any, head: str) -> None:
    """Have transformers forget that a head is tied: its codes are no parameter that it could give it."""
    name = f"{head}.weight"
    model.all_tied_weights_keys.pop(name, None)
    named = model._tied_weights_keys or {}
    model._tied_weights_keys = {key: value for key, value in named.items() if key != name}


def by_parameter(matrices: Iterable[Matrix]) -> Iterator[tuple[str, str, list[Matrix]]]:
    """Module, parameter, and the source matrices that it is made of, in their order there."""
    parameters: dict[tuple[str, str], list[Matrix]] = defaultdict(list)
    for matrix in matrices:
        parameters[matrix.module, matrix.parameter].append(matrix)
    for (module, parameter), parts in parameters.items():
        yield module, parameter, sorted(parts, key=lambda m: (m.expert or 0, m.part))


def read_parameter(checkpoint: Checkpoint, parts: list[Matrix]) -> list[QuantizedTensor]:
    """The weight of a linear, or those of all experts in their order."""
    if parts[0].expert is None:
        return read_matrix(checkpoint, parts[0])
    joined: dict[int, list[QuantizedTensor]] = defaultdict(list)
    for part in parts:
        joined[part.expert or 0] += read_matrix(checkpoint, part)
    if sorted(joined) != list(range(len(joined))):
        raise InputError(f"{checkpoint.folder}: {parts[0].module} has experts {sorted(joined)} only")
    return [QuantizedTensor.concatenate(joined[i]) for i in range(len(joined))]


def read_matrix(checkpoint: Checkpoint, matrix: Matrix) -> list[QuantizedTensor]:
    """One weight, or one per expert of a stack."""
    found = quantization_of(checkpoint)
    assert found is not None
    layout, quantization = found
    name = matrix.source
    scheme = layout.scheme_of(quantization, name, matrix.module)
    if scheme is None:
        raise InputError(f"{checkpoint.folder}: {name} is quantized, but config.json gives no scheme")
    stored = [tensor for tensor in layout.tensors(name).every if tensor in checkpoint.tensors]
    tensors = {tensor: checkpoint.read(tensor) for tensor in stored}
    # What kernels keep as it is must not keep the file mapped, or the pages of codes stay too.
    tensors = {k: t.clone() if t.is_floating_point() else t for k, t in tensors.items()}
    if not matrix.stacked:
        return [layout.read(name, tensors, scheme)]
    pieces = [{k: t[i] for k, t in tensors.items()} for i in range(matrix.shape[0])]
    return [layout.read(name, piece, scheme) for piece in pieces]


def check_shape(
    folder: Path, parts: list[Matrix], pieces: list[QuantizedTensor], shape: tuple[int, ...]
) -> None:
    """What was read must be the whole parameter of the model, no more and no less."""
    rows, columns = shape[-2:][::-1] if parts[0].transposed else shape[-2:]
    expected = [(rows, columns)] * (shape[0] if len(shape) == 3 else 1)
    found = [piece.shape for piece in pieces]
    if found != expected:
        raise InputError(
            f"{folder}: {parts[0].source} and its like are {len(found)} x {found[0]}, but the model "
            f"has {len(expected)} x {expected[0]}"
        )


def put(
    model: nn.Module,
    module: str,
    parameter: str,
    kind: str,
    pieces: list[QuantizedTensor],
    dtype: torch.dtype,
    device: torch.device,
    int8_inputs: bool = False,
) -> None:
    """Replace one float parameter by modules that hold its codes."""
    owner = model.get_submodule(module)
    if kind == "expert":
        linears = [QuantizedLinear(weight, None, dtype, device, int8_inputs) for weight in pieces]
        replace_experts(owner, parameter, linears)
    elif kind == "embedding":
        factor = row_factor(owner, dtype)
        if factor is None:
            raise InputError(
                f"{module} is a {type(owner).__name__}, which in {dtype} does more than look up and "
                "scale its rows; accepted is another dtype, or to leave it in float"
            )
        model.set_submodule(module, QuantizedEmbedding(pieces[0], dtype, device, factor))
    else:
        bias = owner.bias.data if isinstance(owner.bias, Tensor) else None
        model.set_submodule(module, QuantizedLinear(pieces[0], bias, dtype, device, int8_inputs))


def stream_floats(model: nn.Module) -> None:
    """Let what stayed in float multiply few rows as fast as memory is read: the head, above all."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16:
            model.set_submodule(name, FloatLinear.around(module))


# -- the rest of the model, by transformers -------------------------------------------------------


def config_dtype(network: nn.Module) -> torch.dtype | None:
    """What config.json says that the model is stored in."""
    dtype = getattr(network.config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)


def build(
    network: nn.Module,
    floats: dict[str, Tensor],
    absent: set[str],
    dtype: torch.dtype,
    folder: Path,
) -> Any:
    """Let transformers load a model all but some of its weights.

    Args:
        network: its `skeleton`, unchanged.
        floats: tensors of the checkpoint, by their names there.
        absent: full names of the parameters that `floats` does not hold; large ones are left empty,
            the others have the values they are initialized with.
        folder: of the checkpoint, for messages and the generation config.

    Raises:
        InputError: transformers cannot load it, or another weight is missing.
    """
    from transformers import GenerationConfig

    _check_floats(network, floats, folder)
    _register()
    try:
        with quiet_transformers():
            model, info = type(network).from_pretrained(  # type: ignore[attr-defined]
                None,
                config=network.config,
                state_dict=floats,
                dtype=dtype,
                quantization_config=_config(absent) if absent else None,
                output_loading_info=True,
            )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{folder}: transformers cannot load it: {reason}") from error
    missing = sorted(set(info["missing_keys"]) - absent)
    if missing:
        raise InputError(f"{folder}: the model needs tensor {missing[0]}, which is not there")
    if (folder / "generation_config.json").is_file():
        check_file(folder / "generation_config.json", folder)
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config.name_or_path = model.name_or_path = str(folder)  # adapters are saved with the second
    return model


def _check_floats(network: nn.Module, floats: dict[str, Tensor], folder: Path) -> None:
    parameters = network.state_dict()
    for name, target in locate(network, list(floats)).items():
        expected, asked = parameters[target.parameter].shape, parameters[target.parameter].dtype
        if asked.is_floating_point and not floats[name].is_floating_point():
            raise InputError(f"{folder}: tensor {name} is {floats[name].dtype}; accepted are floats")
        if target.converter is None and floats[name].shape != expected:
            raise InputError(
                f"{folder}: tensor {name} is {tuple(floats[name].shape)}, but the model has "
                f"{tuple(expected)}"
            )


def _config(absent: set[str]) -> Any:
    from transformers.utils.quantization_config import QuantizationConfigMixin

    config = QuantizationConfigMixin(quant_method=_LOADER)  # type: ignore[arg-type]
    config.taken = {tuple(name.rsplit(".", 1)) for name in absent}  # type: ignore[attr-defined]
    return config


def _is_large(module: nn.Module) -> bool:
    """Whether its parameters may be emptied: other modules compute theirs when they are initialized."""
    return isinstance(module, nn.Linear | nn.Embedding) or is_conv1d(module) or is_experts(module)


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
                owner = model.get_submodule(module)
                if parameter in owner._parameters and _is_large(owner):
                    empty = nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)
                    owner.register_parameter(parameter, empty)
                    if isinstance(owner, nn.Embedding):
                        owner.padding_idx = None  # initialization would set that row to zero

        def is_serializable(self) -> bool:
            """`save_pretrained` is refused: the kernels' layouts are no checkpoint."""
            return False

        @property
        def is_trainable(self) -> bool:
            """Codes have no gradient."""
            return False

    register_quantization_config(_LOADER)(QuantizationConfigMixin)
    register_quantizer(_LOADER)(Loader)
