"""Comparisons and runs to make pages of: small, but with everything in them that a page can show."""

from dataclasses import replace
from pathlib import Path

import torch

import fewbits
from fewbits.comparison import Comparison, Row
from fewbits.estimate import Estimate, exp_estimate, ratio_estimate
from fewbits.evaluate import Evaluation, PerWindow, PositionKL
from fewbits.outliers import InputReport, Inspection, MatrixError
from fewbits.pipeline import Quantized
from fewbits.speed import Speed
from fewbits.tasks import TaskScores
from fewbits.tensor import Note
from models import tiny_checkpoint

WINDOWS = 12
TASKS = ("mmlu", "arc_challenge", "hellaswag")
KINDS = ("mlp.down_proj", "mlp.up_proj", "self_attn.q_proj")


def evaluation(kl: float, seed: int) -> Evaluation:
    """Of a model with about this KL; what `seed` draws is small beside what the windows share."""
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    tokens = torch.randint(40, 64, (WINDOWS,), generator=shared).double()
    hard = 1 + 0.5 * torch.rand(WINDOWS, generator=shared).double()
    noise = 1 + 0.03 * torch.randn(WINDOWS, generator=own).double()
    kls, reference = kl * tokens * hard * noise, 2.5 * tokens * hard
    loss = reference + 0.4 * kls
    counts = (min(0.4, kl) * tokens * hard * noise).round()
    agreed, flipped = tokens - counts, (counts / 2).round()

    def mean(sums: torch.Tensor) -> Estimate:
        return ratio_estimate(sums, tokens)

    return Evaluation(
        exp_estimate(mean(loss)), mean(kls), Estimate(8 * kl, 0.5 * kl), mean(agreed), mean(flipped),
        exp_estimate(mean(loss - reference)), int(tokens.sum()), WINDOWS, 64, "heldout.txt", "5e" * 32,
        tuple(
            PositionKL(start, stop, Estimate(kl * (1 + 1 / (start + 8)), 0.05 * kl))
            for start, stop in ((0, 16), (16, 32), (32, 63))
        ),
        PerWindow(
            tuple(map(int, tokens)), tuple(map(float, loss)), tuple(map(float, reference)),
            tuple(map(float, kls)), tuple(map(int, agreed)), tuple(map(int, flipped)),
        ),
    )  # fmt: skip


def scores(task: str, wrong: int, count: int = 40) -> TaskScores:
    """Every third question is too hard; a model gets up to `wrong` others wrong, and hard ones right."""
    right = [i % 3 != 0 for i in range(count)]
    for i in range(wrong):
        right[3 * i], right[3 * i + 1] = i % 2 == 0, False
    note = Note("fact", task, f"{count} questions of a small subset")
    answers = tuple(0 if each else 1 for each in right)
    return TaskScores(
        task, "acc", tuple(right), answers, (task,) * count, 0, "ab" * 32, "data", notes=(note,)
    )


def ledger(method: str, scheme: str, blocks: int, names: tuple[str, ...]) -> dict:
    """As `compare` keeps it; one matrix of the last block has no error."""
    matrices = [
        [
            {
                "name": f"model.layers.{b}.{name}.weight", "method": method, "scheme": scheme,
                "tokens": 4096, "outliers": 0, "steps": [],
                "error_to_rtn": None if (b, name) == (blocks - 1, names[-1]) else 0.4,
                "error": None if (b, name) == (blocks - 1, names[-1]) else 0.001 * (b + 1) * (i % 7 + 1),
            }
            for i, name in enumerate(names)
        ]
        for b in range(blocks)
    ]  # fmt: skip
    request = {"method": method, "scheme": scheme, "transforms": ["awq"] * ("awq" in method)}
    return {
        "sha256": f"{len(method):02x}" * 32,
        "request": request,
        "totals": {
            "source_tensors": 56, "quantized": 42, "copied": 11, "folded": 3, "dropped": 0,
            "source_bytes": 11_540_992, "written_bytes": 4_537_504, "quantized_source_bytes": 9_437_184,
            "quantized_written_bytes": 2_433_696,
        },
        "calibration": {},
        "blocks": [
            {"block": b, "error": 0.01, "kl": 0.01, "matrices": matrices[b]} for b in range(blocks)
        ],
    }  # fmt: skip


def row(number: int, name: str, method: str, scheme: str, kl: float, blocks: int, names) -> Row:
    calibrated = method not in ("", "rtn")
    size = {"bfloat16": 16.0, "w8-channel": 9.5, "w3-g128": 5.49}.get(scheme, 6.31)
    notes = ("fallback: lm_head: never called", "fact: calibration: 4096 tokens") if calibrated else ()
    return Row(
        name, method, scheme, int(size * 721_312), size, 160_000_000 + number, 12.3, 4_000_000,
        evaluation(kl, number), tuple(scores(task, number) for task in TASKS),
        Speed(4000.0 - number, 200.0 + number, 256, 32, 5_000_000, {"int4pack": 42}, 2),
        Estimate(1.0 - 0.05 * number, 0.02), Estimate(1.0 + 0.2 * number, 0.03),
        tuple(kl * (b + 1) / 10 for b in range(blocks)),
        ledger(method, scheme, blocks, names) if calibrated else None, notes,
    )  # fmt: skip


def comparison(blocks: int = 3, names: tuple[str, ...] = KINDS, model: str = "tiny") -> Comparison:
    """Five models; gptq and awq+gptq cannot be told apart by KL, the others can."""
    asked = [
        ("float", "", "bfloat16", 0.0), ("int8", "rtn", "w8-channel", 0.0004),
        ("rtn-w4-g128", "rtn", "w4-g128", 0.04), ("gptq-w4-g128", "gptq", "w4-g128", 0.018),
        ("awq+gptq-w4-g128", "awq+gptq", "w4-g128", 0.018), ("rtn-w3-g128", "rtn", "w3-g128", 0.2),
    ]  # fmt: skip
    inputs = tuple(
        InputReport(
            b, name, None, 256, 4096, (1, 7)[: b % 3], 3.5 + 4 * b, 0.8, 12 * b,
            (MatrixError(f"model.layers.{b}.{name}.weight", 1.0, 0.01, 0.005),),
        )
        for b in range(blocks)
        for name in ("self_attn.q/k/v_proj", "mlp.up_proj")
    )  # fmt: skip
    data = {"source": "train.txt", "samples": 16, "length": 256, "tokens": 4096, "seed": 0}
    data["sha256"] = "cd" * 32
    return Comparison(
        {
            "name": model, "parameters": 5_770_496, "dtype": "bfloat16", "weight_bytes": 11_540_992,
            "config_sha256": "53" * 32,
        },
        tuple(row(i, *each, blocks, names) for i, each in enumerate(asked)),
        {"name": "heldout.txt", "sha256": "5e" * 32},
        data,
        Inspection(6.0, data, inputs, ("lm_head.weight",), ()).to_json(),
        tuple(
            {
                "name": f"model.layers.{b}.{name}.weight", "block": b, "module": name, "rms": 0.06,
                "largest": 5.0 + b, "beyond": 1e-5 * b,
            }
            for b in range(blocks)
            for name in names
        ),
        {"processor": "a processor", "cores": 2, "threads": 2, "system": "Linux", "memory_bytes": 2**34},
        {"python": "3.11.7", "fewbits": "0.1.0", "torch": "2.13.0"},
        "2026-11-25",
        ("fact: heldout.txt: is not what was calibrated on",),
    )  # fmt: skip


def without(comparison: Comparison, *parts: str) -> Comparison:
    """With less measured: no "text", "tasks", "speed", "outliers" or "ledger"."""
    blank = {
        "text": {"evaluation": None, "block_errors": ()},
        "tasks": {"tasks": ()},
        "speed": {"speed": None, "prefill_ratio": None, "decode_ratio": None, "resident_bytes": None},
        "ledger": {"ledger": None, "notes": ()},
        "outliers": {},
    }
    rows = comparison.rows
    for part in parts:
        rows = tuple(replace(row, **blank[part]) for row in rows)
    less = {"text": {"text": None}, "outliers": {"outliers": None, "weight_outliers": ()}}
    for part in parts:
        comparison = replace(comparison, **less.get(part, {}))
    return replace(comparison, rows=rows)


def run(
    folder: Path, method: str = "gptq", model_type: str = "qwen3_moe", name: str = "model"
) -> Quantized:
    """A tiny model, quantized for real."""
    source = tiny_checkpoint(folder / name, model_type)
    ids = None
    if method != "rtn":
        ids = torch.randint(0, 96, (8, 32), generator=torch.Generator().manual_seed(0))
    scheme = fewbits.QuantScheme(4, "group", 32)
    return fewbits.quantize(source, folder / f"{method}", method=method, scheme=scheme, calibration=ids)
