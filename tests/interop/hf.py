"""A model of transformers is asked. Needs torch and transformers."""

from typing import Any

import numpy as np
import torch
from protocol import NEW_TOKENS


@torch.no_grad()
def logits_and_text(model: Any, tokens: np.ndarray, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits (4, 64, vocabulary) in one call, and greedy text that is decoded with a cache."""
    model = model.eval()
    logits = model(input_ids=torch.from_numpy(tokens)).logits
    ids = torch.from_numpy(prompt)[None]
    model.generation_config.eos_token_id = None  # the text goes on for as long as is asked
    text = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    return logits.float().numpy(), text[0, ids.shape[1] :].numpy()


def kinds(model: Any) -> str:
    """The classes of its modules that hold weights of matrices, the most frequent first."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        if any(t.ndim > 1 for t in own.values()) and "embed" not in name:
            found[type(module).__name__] = found.get(type(module).__name__, 0) + 1
    return ", ".join(sorted(found, key=lambda kind: -found[kind]))
