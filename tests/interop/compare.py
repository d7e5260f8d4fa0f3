"""KL between a client's logits and ours, for one checkpoint.

Run:  python compare.py CHECKPOINT LOGITS.pt LIMIT
"""

import sys

import torch
import torch.nn.functional as F

import fewbits

folder, logits, limit = sys.argv[1:]
model = fewbits.load(folder, dtype=torch.float32)
ids = torch.randint(model.config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    ours = F.log_softmax(model(ids).logits.double(), -1)
theirs = F.log_softmax(torch.load(logits).double(), -1)
kl = float((ours.exp() * (ours - theirs)).sum(-1).mean())
print(f"  KL {kl:.2e} (limit {limit})")
sys.exit(not abs(kl) <= float(limit))
