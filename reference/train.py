"""Trains the reference model: a small Llama on the Python standard library (see corpus.py).

About an hour on two idle CPU cores (`make reference-model` also keeps malloc from returning pages to the
system, a fifth of the time). Writes tokenizer, bf16 weights, `training.json` with the figures
that the model card quotes, and `trained_lines.crc32`, which belongs beside corpus.py.

Run:  python reference/train.py OUT [--steps 3600]
"""

import argparse
import array
import collections
import json
import math
import os
import platform
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads starve whatever runs beside

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from corpus import documents, line_checksums

BOS = "<|endoftext|>"  # starts every document; also ends generation
VOCABULARY, CONTEXT, BATCH_TOKENS = 4096, 512, 4096


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that no text is ever unknown; BOS is put in front of every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[BOS], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, model_max_length=CONTEXT
    )


def tokens_of(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    return torch.tensor([i for ids in tokenizer(texts)["input_ids"] for i in ids])


def new_model(bos: int) -> LlamaForCausalLM:
    """5.8 M parameters; widths 256 and 768 so that groups of 128 and blocks of 256 fit."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=6,
            num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=CONTEXT,
            tie_word_embeddings=True, bos_token_id=bos, eos_token_id=bos, rms_norm_eps=1e-5,
        )
    )  # fmt: skip
    model.set_attn_implementation("eager")  # at this size faster to train than sdpa on a CPU
    return model


def windows(stream: Tensor, count: int, length: int, bos: int) -> Tensor:
    """Random pieces of the stream, (count, length), each begun with BOS as at evaluation."""
    starts = torch.randint(len(stream) - length, (count,))
    pieces = torch.stack([stream[s : s + length] for s in starts])
    pieces[:, 0] = bos
    return pieces


def loss_of(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, stream: Tensor, bos: int) -> float:
    """Nats per token over the first 128 non-overlapping windows of 256 tokens."""
    pieces = stream[: len(stream) // 256 * 256].view(-1, 256)[:128].clone()
    pieces[:, 0] = bos
    return sum(loss_of(model, batch).item() for batch in pieces.split(16)) / 8


def unigram_loss(train: Tensor, heldout: Tensor) -> float:
    """Nats per token of the best model that ignores context: the bar to be far below."""
    counts = torch.bincount(train, minlength=VOCABULARY).double() + 1
    return float(-(counts / counts.sum()).log()[heldout].mean())


def learning_rate(step: int, steps: int, peak: float) -> float:
    warm = min(1.0, (step + 1) / 200)
    return peak * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def train(model: LlamaForCausalLM, stream: Tensor, heldout: Tensor, bos: int, steps: int) -> dict:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    recent: collections.deque[float] = collections.deque(maxlen=100)
    began = time.time()
    for step in range(steps):
        # The last fifth sees the full context; shorter windows are cheaper and teach most of it.
        length = 256 if step < 0.8 * steps else CONTEXT
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 2.5e-3)
        loss = loss_of(model, windows(stream, BATCH_TOKENS // length, length, bos))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append(loss.item())
        if step % 250 == 249 or step == steps - 1:
            print(
                f"step {step + 1}/{steps} train {sum(recent) / len(recent):.3f} "
                f"held-out {heldout_loss(model, heldout, bos):.3f} {time.time() - began:.0f} s",
                flush=True,
            )
    return {
        "steps": steps,
        "train_loss": round(sum(recent) / len(recent), 3),
        "heldout_loss": round(heldout_loss(model.bfloat16(), heldout, bos), 3),
        "elapsed_s": round(time.time() - began),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=3600)
    args = parser.parse_args()
    torch.manual_seed(0)
    texts = {split: [text for _, text in documents(split)] for split in ("train", "heldout")}
    tokenizer = train_tokenizer(texts["train"])
    stream, heldout = (tokens_of(tokenizer, texts[split]) for split in ("train", "heldout"))
    model = new_model(tokenizer.bos_token_id)
    facts = {
        "python": platform.python_version(),
        "parameters": model.num_parameters(),
        "train_tokens": len(stream),
        "heldout_tokens": len(heldout),
        "unigram_heldout_loss": round(unigram_loss(stream, heldout), 3),
    }
    print(facts, flush=True)
    tokenizer.save_pretrained(args.out)
    known = sorted({checksum for text in texts["train"] for checksum in line_checksums(text)})
    (args.out / "trained_lines.crc32").write_bytes(array.array("I", known).tobytes())
    facts |= train(model, stream, heldout, tokenizer.bos_token_id, args.steps)
    model.save_pretrained(args.out)
    (args.out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(facts)


if __name__ == "__main__":
    main()
