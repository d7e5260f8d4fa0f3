"""GPTQModel on the CPU: GPTQ and AWQ, with its own defaults. Started by ../tools.py; see job.py."""

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.quantization.awq.utils.packing_utils import reverse_awq_order, unpack_awq
from gptqmodel.quantization.config import FORMAT, AWQConfig, GPTQConfig
from job import Clock, Job, Storage, check_logits, read_job, report
from torch import Tensor, nn
from transformers import AutoTokenizer

BATCH = 4  # samples at a time; not tuned
# The kernels whose modules keep plain codes; automatic choice for AWQ ends at one for GPUs.
BACKENDS = {"gptq": BACKEND.GPTQ_TORCH, "awq": BACKEND.AWQ_TORCH}


def config(job: Job) -> GPTQConfig | AWQConfig:
    grid = {"bits": job.bits, "group_size": job.group or -1, "sym": job.symmetric, "device": "cpu"}
    if job.method == "awq":
        return AWQConfig(**grid, format=FORMAT.GEMM)
    # Its own ordering of columns needs groups; with whole rows the usual one costs nothing at run time.
    return GPTQConfig(**grid, desc_act=None if job.group else True)


def quantize(job: Job, clock: Clock) -> None:
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    with clock.phase("load"):
        model = GPTQModel.load(str(job.model), config(job))
    backend = {"backend": BACKEND.AWQ_TORCH} if job.method == "awq" else {}
    with clock.phase("quantize"):
        model.quantize(job.rows, batch_size=BATCH, tokenizer=tokenizer, **backend)
    with clock.phase("save"):
        model.save(str(job.packed))


@torch.no_grad()
def dequantized(job: Job, module: nn.Module) -> Tensor:
    """Weights of one linear, (out, in), in float32."""
    scale = module.scales.float()
    if job.method == "gptq":
        module.scales.data = scale  # it unpacks codes itself, and multiplies in the scales' dtype
        return module.dequantize_weight().float().T
    codes, zeros = unpack_awq(module.qweight, module.qzeros, job.bits, scale.shape[-1])
    codes, zeros = (x & (2**job.bits - 1) for x in reverse_awq_order(codes, zeros, job.bits))
    columns = len(codes) // len(scale)
    return ((codes - zeros.repeat_interleave(columns, 0)) * scale.repeat_interleave(columns, 0)).T


def main() -> None:
    job, clock, storage = read_job(("gptq", "awq")), Clock(), Storage()
    quantize(job, clock)
    own = GPTQModel.load(str(job.packed), backend=BACKENDS[job.method], device="cpu").model.eval()
    logits = check_logits(job, own)
    state = {name: parameter.detach() for name, parameter in own.named_parameters()}
    for name, module in own.named_modules():
        if hasattr(module, "qweight"):
            storage.add(job, module.in_features * module.out_features, module.scales)
            state[f"{name}.weight"] = dequantized(job, module)
    report(job, clock, storage, logits, state, ("gptqmodel",))


if __name__ == "__main__":
    main()
