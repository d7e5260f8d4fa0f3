"""A client without fewbits: plain transformers reads a checkpoint; its logits go to a file.

Run:  python client.py CHECKPOINT LOGITS.pt [dequantize]
"""

import sys

import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

folder, out, *options = sys.argv[1:]
more = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if options else {}
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()
ids = torch.randint(model.config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    torch.save(model(ids).logits, out)
