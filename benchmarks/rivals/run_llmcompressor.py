"""llm-compressor on the CPU: GPTQ, AWQ, and AWQ's folds followed by GPTQ, with its own defaults.

Started by ../tools.py; see job.py.
"""

from typing import Any

import torch
from datasets import Dataset
from job import Clock, Job, check_logits, compressed_tensors_storage, read_job, report
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

if not torch.accelerator.is_available():  # its AWQ pins memory whether there is a GPU or not
    torch.Tensor.pin_memory = lambda self, *_, **__: self


def recipe(job: Job) -> list[Any]:
    weights = {
        "num_bits": job.bits,
        "type": "int",
        "symmetric": job.symmetric,
        "strategy": "group" if job.group else "channel",
        "group_size": job.group,
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    folds = [AWQModifier()] if "awq" in job.method else []
    rounding = GPTQModifier if "gptq" in job.method else QuantizationModifier
    return [*folds, rounding(config_groups=groups, ignore=["lm_head"])]


def quantize(job: Job, clock: Clock) -> Tensor:
    """Writes `packed`; returns the logits of the rounded model in memory."""
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    with clock.phase("load"):
        model = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
    samples, length = job.ids.shape
    with clock.phase("quantize"):
        oneshot(
            model=model,
            recipe=recipe(job),
            dataset=Dataset.from_list(job.rows),
            max_seq_length=length,
            num_calibration_samples=samples,
        )
    logits = check_logits(job, model)  # before saving, which packs the model in memory too
    with clock.phase("save"):
        model.save_pretrained(job.packed, save_compressed=True)
        tokenizer.save_pretrained(job.packed)
    return logits


def dequantized(job: Job) -> dict[str, Tensor]:
    """What transformers makes of `packed`, in float32."""
    # Without dequantize, asymmetric weights do not load: zero points of another shape are expected.
    config = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        job.packed, dtype=torch.float32, quantization_config=config
    ).eval()
    check_logits(job, model)  # codes become floats at the first call
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def main() -> None:
    job, clock = read_job(("gptq", "awq", "awq+gptq")), Clock()
    logits = quantize(job, clock)
    state = dequantized(job)
    storage = compressed_tensors_storage(job, state)
    report(job, clock, storage, logits, state, ("llmcompressor", "compressed-tensors"))


if __name__ == "__main__":
    main()
