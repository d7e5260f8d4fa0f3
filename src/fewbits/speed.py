"""How large and how fast: bytes on disk and in memory, tokens per second, and which kernel runs."""

import resource
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewbits.checkpoint import LEDGER, open_checkpoint
from fewbits.errors import InputError
from fewbits.ledger import read_ledger
from fewbits.linear import QuantizedLinear
from fewbits.structure import skeleton


@dataclass(frozen=True, slots=True)
class Size:
    """Of a checkpoint on disk.

    Args:
        weight_bytes: all weight files, headers and everything in float included.
        parameters: of the float model.
        method: what made it, as far as it says.
    """

    weight_bytes: int
    parameters: int
    method: str

    @property
    def bits_per_weight(self) -> float:
        """Over whole files."""
        return 8 * self.weight_bytes / self.parameters


def measure_size(folder: Path) -> Size:
    """Size of a checkpoint, by its own ledger where it has one."""
    checkpoint = open_checkpoint(folder)
    weight_bytes = sum(checkpoint.file_bytes.values())
    if (folder / LEDGER).is_file():
        ledger = read_ledger(folder)
        own = [e for e in ledger.tensors.values() if e.origin is None and "float" in e.dtype]
        parameters = sum(torch.Size(entry.shape).numel() for entry in own)
        scheme = ledger.request["scheme"]
        return Size(weight_bytes, parameters, f"{ledger.request['method']} {scheme}")
    parameters = sum(p.numel() for p in skeleton(checkpoint.config).parameters())
    quantization = checkpoint.config.get("quantization_config")
    float_name = str(checkpoint.dtype).removeprefix("torch.")
    return Size(weight_bytes, parameters, quantization["quant_method"] if quantization else float_name)


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in [*model.parameters(), *model.buffers()]
    }
    return sum(storages.values())


@dataclass(frozen=True, slots=True)
class Speed:
    """Medians over repeats, one sequence at a time.

    Args:
        prefill: tokens per second of one pass over `prompt` tokens.
        decode: tokens per second of greedy decoding after that prompt.
        tensor_bytes: of the loaded model.
        kernels: how many linears each kernel runs; "float" are those not quantized.
        threads: of PyTorch.
    """

    prefill: float
    decode: float
    prompt: int
    new_tokens: int
    tensor_bytes: int
    kernels: dict[str, int]
    threads: int

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


@torch.no_grad()
def measure_speed(model: Any, prompt: int = 256, new_tokens: int = 32, repeats: int = 3) -> Speed:
    """Time one prefill and single decoding steps; nothing else may run on the machine.

    Raises:
        InputError: the model's context is too short for the prompt and the new tokens.
    """
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or prompt + new_tokens
    new_tokens = min(new_tokens, context // 2)
    prompt = min(prompt, context - new_tokens)
    if prompt < 1 or new_tokens < 1:
        raise InputError(f"a context of {context} tokens is too short to measure speed")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, prompt), generator=generator).to(model.device)
    prefills, steps = [], []
    for i in range(repeats + 1):
        began = time.perf_counter()
        output = model(ids, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
        _wait(model)
        first = time.perf_counter() - began
        times = []
        for _ in range(new_tokens):
            began = time.perf_counter()
            output = model(token, past_key_values=output.past_key_values, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
            _wait(model)
            times.append(time.perf_counter() - began)
        if i > 0:  # the first round warms up
            prefills.append(first)
            steps += times
    return Speed(
        prompt / statistics.median(prefills),
        1 / statistics.median(steps),
        prompt,
        new_tokens,
        tensor_bytes(model),
        count_kernels(model),
        torch.get_num_threads(),
    )


@dataclass(slots=True)
class Memory:
    """What this process took while it was watched.

    Args:
        before: bytes when it began: Python and its libraries.
        peak: the most that was seen.
        anonymous: whether pages of mapped files, which the system takes back when it needs them, are
            left out; only Linux tells.
    """

    before: int
    peak: int
    anonymous: bool


_SAMPLED_S = 0.02  # seconds between two looks at memory; not tuned


@contextmanager
def watch_memory() -> Iterator[Memory]:
    """Follow the memory of this process, by looking many times a second."""
    began = memory_bytes()
    memory, stop = Memory(began, began, _STATUS.exists()), threading.Event()

    def look() -> None:
        while not stop.wait(_SAMPLED_S):
            memory.peak = max(memory.peak, memory_bytes())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        stop.set()
        thread.join()
        memory.peak = max(memory.peak, memory_bytes())


_STATUS = Path("/proc/self/status")


def memory_bytes() -> int:
    """Anonymous memory of this process now; where the system does not tell, its largest size so far."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return 1024 * int(line.split()[1])
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest


def count_kernels(model: nn.Module) -> dict[str, int]:
    """How many linears each kernel runs."""
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    names = [m.kernel_name for m in linears if isinstance(m, QuantizedLinear)]
    floats = len(linears) - len(names)
    return dict(Counter(names)) | ({"float": floats} if floats else {})


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
