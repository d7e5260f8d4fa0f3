"""fewbits, run like a rival. Started by ../tools.py; see job.py."""

from typing import Any

import compressed_tensors.compressors  # noqa: F401  # verification reads with it: there before, as theirs are
import torch
from job import Clock, Job, Storage, check_logits, compressed_tensors_storage, read_job, report
from transformers import AutoModelForCausalLM

import fewbits
from fewbits import Quantized, QuantizedLinear, QuantScheme
from fewbits.linear import QuantizedEmbedding


def quantize(job: Job, clock: Clock) -> Quantized:
    """Reads, quantizes, writes and verifies; what is timed of other tools is quantizing alone.

    Before it, as of the others, the model is loaded once, which imports what transformers needs for it.
    """
    with clock.phase("load"):
        AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
    granularity = "group" if job.group else "channel"
    if job.bits_per_weight is None:
        asked = {"scheme": QuantScheme(job.bits, granularity, job.group, job.symmetric)}
    else:
        asked = {"bits_per_weight": job.bits_per_weight}
    calibrated = job.method != "rtn" or job.bits_per_weight is not None
    given = {"calibration": job.ids if calibrated else None}
    if job.statistics is not None:  # the same weights come of both
        with clock.phase("measure"):
            measured = fewbits.measure(job.model, job.statistics, calibration=job.ids)
        given = {"statistics": measured.folder}
    with clock.phase("quantize"):
        return fewbits.quantize(
            job.model, job.packed, method=job.method, format=job.format, embeddings=job.embeddings,
            **given, **asked,
        )  # fmt: skip


def main() -> None:
    job, clock = read_job(("rtn", "gptq", "awq", "awq+gptq", "best")), Clock()
    made = quantize(job, clock)
    model = fewbits.load(job.packed, dtype=torch.float32)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            state[f"{name}.weight"] = module.weight.detach()
    storage, more = compressed_tensors_storage(job, state), {}
    if job.bits_per_weight is not None:
        storage = Storage(8 * made.weight_bytes, made.parameters)  # of the whole file, as it was asked
        more = predicted(made)
    report(job, clock, storage, check_logits(job, model), state, ("fewbits",), more)


def predicted(made: Quantized) -> dict[str, Any]:
    """What the allocation promised: KL in nats per token, and bytes of the weight files."""
    budget = made.ledger.request["budget"]
    return {"predicted_kl": budget["predicted"], "predicted_bytes": budget["weight_bytes"]}


if __name__ == "__main__":
    main()
