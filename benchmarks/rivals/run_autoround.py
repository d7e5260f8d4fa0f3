"""AutoRound on the CPU: learned rounding, ten times GPTQ's time. Started by ../tools.py; see job.py."""

import torch
from auto_round import AutoRound
from job import Clock, Job, Storage, check_logits, read_job, report
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

ITERATIONS, BATCH = 200, 8  # its defaults


def quantize(job: Job, clock: Clock, storage: Storage) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and weights of the rounded model in memory: nothing is packed, so nothing is checked."""
    with clock.phase("load"):
        model = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
    rounding = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(job.model),
        scheme="W4A16",
        bits=job.bits,
        group_size=job.group or -1,
        sym=job.symmetric,
        iters=ITERATIONS,
        batch_size=BATCH,
        nsamples=len(job.ids),
        seqlen=job.ids.shape[1],
        dataset=[row[None] for row in job.ids],
        device_map="cpu",
        enable_torch_compile=False,
    )
    with clock.phase("quantize"):
        model, _ = rounding.quantize()
    for module in model.modules():
        if isinstance(getattr(module, "scale", None), Tensor):
            storage.add(job, module.weight.numel(), module.scale.half())  # as its files hold them
    model = model.float().eval()
    return check_logits(job, model), {name: p.detach() for name, p in model.named_parameters()}


def main() -> None:
    torch.manual_seed(0)
    job, clock, storage = read_job(("autoround",)), Clock(), Storage()
    logits, state = quantize(job, clock, storage)
    report(job, clock, storage, logits, state, ("auto-round",))


if __name__ == "__main__":
    main()
