"""gptqmodel quantizes.  python golden_gptqmodel.py MODEL OUT SAMPLES.npy KIND GROUP_SIZE"""

import os
import sys

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.quantization.config import FORMAT, AWQConfig, GPTQConfig
from transformers import AutoTokenizer

model, out, samples, kind, size = sys.argv[1:]
group_size = int(size)
CONFIGS = {
    "gptq": lambda: GPTQConfig(bits=4, group_size=group_size, sym=True, desc_act=False, device="cpu"),
    "gptq-asymmetric": lambda: GPTQConfig(bits=4, group_size=group_size, sym=False, device="cpu"),
    "gptq-desc-act": lambda: GPTQConfig(
        bits=4, group_size=group_size, sym=True, desc_act=True, device="cpu"
    ),
    "gptq-v2": lambda: GPTQConfig(
        bits=4, group_size=group_size, sym=False, format=FORMAT.GPTQ_V2, device="cpu"
    ),
    "gptq-3bit": lambda: GPTQConfig(bits=3, group_size=group_size, sym=True, device="cpu"),
    "gptq-8bit": lambda: GPTQConfig(
        bits=8, group_size=-1, sym=True, act_group_aware=False, device="cpu"
    ),
    "awq": lambda: AWQConfig(bits=4, group_size=group_size, format=FORMAT.GEMM, device="cpu"),
}
tokenizer = AutoTokenizer.from_pretrained(model)
dtype = torch.bfloat16 if kind == "awq" else torch.float32  # AWQ's search runs in no other
network = GPTQModel.load(model, CONFIGS[kind](), dtype=dtype)
rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in np.load(samples).tolist()]
backend = BACKEND.AWQ_TORCH if kind == "awq" else BACKEND.AUTO
network.quantize(rows, batch_size=4, tokenizer=tokenizer, backend=backend)
network.save(out)
tokenizer.save_pretrained(out)
