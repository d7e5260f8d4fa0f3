"""How large and how fast: bytes on disk and in memory, tokens per second, and which kernel runs."""

import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.checkpoint import LEDGER
from fewbits.decoding import fixed_cache
from fewbits.errors import InputError, ResourceError
from fewbits.estimate import Estimate, mean_estimate
from fewbits.ledger import read_ledger
from fewbits.linear import QuantizedLinear
from fewbits.load import open_model
from fewbits.memory import STATUS
from fewbits.structure import cache_argument, cache_of, skeleton


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
    checkpoint = open_model(folder)
    weight_bytes = sum(checkpoint.file_bytes.values())
    if (folder / LEDGER).is_file():
        ledger = read_ledger(folder)
        return Size(weight_bytes, ledger.parameters, f"{ledger.request['method']} {ledger.scheme}")
    parameters = sum(p.numel() for p in skeleton(checkpoint.config).parameters())
    quantization = checkpoint.config.get("quantization_config")
    float_name = str(checkpoint.dtype).removeprefix("torch.")
    method = float_name if not quantization else str(quantization.get("quant_method"))
    return Size(weight_bytes, parameters, method)


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


def measure_speed(model: Any, prompt: int = 256, new_tokens: int = 32, repeats: int = 3) -> Speed:
    """Time one prefill and single decoding steps; nothing else may run on the machine.

    Raises:
        InputError: the model's context is too short for the prompt and the new tokens.
    """
    ids, new_tokens = _prompt(model, prompt, new_tokens)
    _time_round(model, ids, new_tokens)  # warms up
    return _speed(model, ids, [_time_round(model, ids, new_tokens) for _ in range(repeats)])


@dataclass(frozen=True, slots=True)
class SpeedRatio:
    """Two models timed in turn: how many times as many tokens per second the first makes.

    Args:
        model, reference: of each alone.
        prefill, decode: means over the rounds of the reference's time over the model's.
    """

    model: Speed
    reference: Speed
    prefill: Estimate
    decode: Estimate

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def compare_speed(
    model: Any, reference: Any, prompt: int = 256, new_tokens: int = 32, rounds: int = 5
) -> SpeedRatio:
    """Time two models round by round in turn, so that what slows the machine down slows both.

    Rounds are few: the 95 % interval is as many errors as Student's t says, 2.78 for 5 rounds.

    Raises:
        InputError: see `measure_speed`.
    """
    ids, new_tokens = _prompt(reference, prompt, new_tokens)
    pair = (model, reference)
    for network in pair:
        _time_round(network, ids, new_tokens)
    times = [[_time_round(network, ids, new_tokens) for network in pair] for _ in range(rounds)]
    ours, theirs = ([each[i] for each in times] for i in (0, 1))
    ratios = (
        mean_estimate(torch.tensor([getattr(b, what) / getattr(a, what) for a, b in times]))
        for what in ("prefill_s", "step_s")
    )
    return SpeedRatio(_speed(model, ids, ours), _speed(reference, ids, theirs), *ratios)


@dataclass(frozen=True, slots=True)
class _Round:
    """One prefill, and the median of single decoding steps after it."""

    prefill_s: float
    step_s: float
    steps: int


def _prompt(model: Any, prompt: int, new_tokens: int) -> tuple[Tensor, int]:
    """Random token ids, (1, prompt), and how many may follow them."""
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or prompt + new_tokens
    new_tokens = min(new_tokens, context // 2)
    prompt = min(prompt, context - new_tokens)
    if prompt < 1 or new_tokens < 1:
        raise InputError(f"a context of {context} tokens is too short to measure speed")
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (1, prompt), generator=generator), new_tokens


@torch.no_grad()
def _time_round(model: Any, ids: Tensor, new_tokens: int) -> _Round:
    ids = ids.to(model.device)
    began = time.perf_counter()
    fixed = fixed_cache(model, ids.shape[1] + new_tokens)
    name = cache_argument(model)
    output = model(ids, use_cache=True, **({} if fixed is None else {name: fixed}))
    token = output.logits[:, -1:].argmax(-1)
    _wait(model)
    prefill_s = time.perf_counter() - began
    steps = []
    for _ in range(new_tokens):
        began = time.perf_counter()
        output = model(token, use_cache=True, **{name: cache_of(output)})
        token = output.logits[:, -1:].argmax(-1)
        _wait(model)
        steps.append(time.perf_counter() - began)
    return _Round(prefill_s, statistics.median(steps), len(steps))


def _speed(model: Any, ids: Tensor, rounds: list[_Round]) -> Speed:
    return Speed(
        ids.shape[1] / statistics.median(each.prefill_s for each in rounds),
        1 / statistics.median(each.step_s for each in rounds),
        ids.shape[1],
        rounds[0].steps,
        tensor_bytes(model),
        count_kernels(model),
        torch.get_num_threads(),
    )


def measure_resident(folder: Path, dtype: torch.dtype | None = None) -> int | None:
    """Bytes that loading a checkpoint and running it once adds to a fresh process; None if unknown.

    Mapped files count as far as they were read. Only Linux tells.

    Raises:
        ResourceError: that process failed.
    """
    if not STATUS.exists():
        return None
    name = "" if dtype is None else str(dtype).removeprefix("torch.")
    command = [sys.executable, "-P", "-c", _RESIDENT, str(folder), name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ResourceError(f"the process that loads {folder} to see its memory failed: {last}")
    return int(done.stdout.splitlines()[-1])


_RESIDENT = """
import sys, torch
from fewbits.load import load, open_model
from fewbits.memory import status_bytes
from fewbits.structure import skeleton
from pathlib import Path
skeleton(open_model(Path(sys.argv[1])).config)  # the model's code does not count
dtype = getattr(torch, sys.argv[2]) if sys.argv[2] else None
torch.ones(64, 64, dtype=torch.bfloat16) @ torch.ones(64, 64, dtype=torch.bfloat16)
before = status_bytes("VmRSS")
model = load(sys.argv[1], dtype=dtype)
with torch.no_grad():
    model(torch.zeros(1, 1, dtype=torch.int64))
print(status_bytes("VmRSS") - before)
"""


def count_kernels(model: nn.Module) -> dict[str, int]:
    """How many linears each kernel runs."""
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    names = [m.kernel_name for m in linears if isinstance(m, QuantizedLinear)]
    floats = len(linears) - len(names)
    return dict(Counter(names)) | ({"float": floats} if floats else {})


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
