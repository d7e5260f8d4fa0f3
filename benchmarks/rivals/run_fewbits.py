"""fewbits, run like a rival. Started by ../tools.py; see job.py."""

import torch
from job import Clock, Job, check_logits, compressed_tensors_storage, read_job, report
from transformers import AutoModelForCausalLM

import fewbits
from fewbits import QuantizedLinear, QuantScheme


def quantize(job: Job, clock: Clock) -> None:
    """Reads, quantizes, writes and verifies; what is timed of other tools is quantizing alone.

    Before it, as of the others, the model is loaded once, which imports what transformers needs for it.
    """
    with clock.phase("load"):
        AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
    granularity = "group" if job.group else "channel"
    scheme = QuantScheme(job.bits, granularity, job.group, job.symmetric)
    calibration = None if job.method == "rtn" else job.ids
    with clock.phase("quantize"):
        fewbits.quantize(
            job.model, job.packed, method=job.method, scheme=scheme, calibration=calibration
        )


def main() -> None:
    job, clock = read_job(("rtn", "gptq", "awq", "awq+gptq")), Clock()
    quantize(job, clock)
    model = fewbits.load(job.packed, dtype=torch.float32)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            state[f"{name}.weight"] = module.weight.detach()
    storage = compressed_tensors_storage(job, state)
    report(job, clock, storage, check_logits(job, model), state, ("fewbits",))


if __name__ == "__main__":
    main()
