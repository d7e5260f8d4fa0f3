"""AutoRound on the CPU: learned rounding, ten times GPTQ's time; with AutoScheme, bits by matrix.

Started by ../tools.py; see job.py.
"""

from typing import Any

import torch
from auto_round import AutoRound, AutoScheme
from auto_round.calib_dataset import register_dataset
from auto_round.schemes import QuantizationScheme
from datasets import Dataset
from job import Clock, Job, Storage, check_logits, read_job, report
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

ITERATIONS, BATCH = 200, 8  # its defaults
OPTIONS = (2, 3, 4, 8)  # bits that AutoScheme chooses between


def scheme(job: Job) -> dict[str, Any]:
    grid = {"group_size": job.group or -1, "sym": job.symmetric}
    if job.method == "autoround":
        samples = [row[None] for row in job.ids]
        return {"scheme": "W4A16", "bits": job.bits, "dataset": samples, **grid}
    options = [QuantizationScheme(bits=bits, act_bits=16, data_type="int", **grid) for bits in OPTIONS]
    # It takes samples by the name of a dataset, where rounding alone takes them as they are.
    register_dataset("calibration")(lambda *_, **__: Dataset.from_list(job.rows))
    samples, length = job.ids.shape
    chosen = AutoScheme(avg_bits=job.bits, options=options, nsamples=samples, seqlen=length)
    return {"scheme": chosen, "dataset": "calibration"}


def quantize(job: Job, clock: Clock, storage: Storage) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Writes `packed`; weights of the rounded model in memory, and the bits of each matrix."""
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    with clock.phase("load"):
        model = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
    rounding = AutoRound(
        model,
        tokenizer=tokenizer,
        **scheme(job),
        iters=ITERATIONS,
        batch_size=BATCH,
        nsamples=len(job.ids),
        seqlen=job.ids.shape[1],
        device_map="cpu",
        enable_torch_compile=False,
    )
    with clock.phase("quantize"):
        model, _ = rounding.quantize()
    bits = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "scale", None), Tensor):
            bits[name] = module.bits
            storage.add(job, module.weight.numel(), module.scale.half(), module.bits)  # as in its files
    state = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    with clock.phase("save"):
        rounding.save_quantized(str(job.packed), format="auto_round")
    return state, {"bits": bits}


def main() -> None:
    torch.manual_seed(0)
    job, clock, storage = read_job(("autoround", "autoscheme")), Clock(), Storage()
    state, more = quantize(job, clock, storage)
    own = AutoModelForCausalLM.from_pretrained(job.packed, dtype=torch.float32, device_map="cpu").eval()
    report(job, clock, storage, check_logits(job, own), state, ("auto-round",), more)


if __name__ == "__main__":
    main()
