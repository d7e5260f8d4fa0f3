"""HQQ on the CPU: grids fitted to the weights alone, by default. Started by ../tools.py; see job.py."""

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from hqq.models.hf.base import AutoHQQHFModel
from job import Clock, Job, Storage, check_logits, read_job, report
from torch import nn
from transformers import AutoModelForCausalLM

DTYPE = torch.float16  # of scales and zero points, and of the arithmetic


def quantize(job: Job, clock: Clock) -> nn.Module:
    """Writes `packed`; the model in memory."""
    with clock.phase("load"):
        model = AutoModelForCausalLM.from_pretrained(job.model, dtype=DTYPE)
    config = BaseQuantizeConfig(nbits=job.bits, group_size=job.group)
    with clock.phase("quantize"):
        AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=DTYPE, device="cpu")
    with clock.phase("save"):
        AutoHQQHFModel.save_quantized(model, str(job.packed))
    return model.eval()


def main() -> None:
    job, clock, storage = read_job(("hqq",)), Clock(), Storage()
    if job.symmetric:
        raise SystemExit("HQQ has no symmetric grids; accepted with it is --asymmetric")
    model = quantize(job, clock)
    logits = check_logits(job, model)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, HQQLinear):
            weight, meta = module.dequantize(), module.meta
            storage.bits += weight.numel() * job.bits
            storage.bits += sum(8 * meta[what].nbytes for what in ("scale", "zero"))
            storage.weights += weight.numel()
            state[f"{name}.weight"] = weight.detach()
    report(job, clock, storage, logits, state, ("hqq",))


if __name__ == "__main__":
    main()
