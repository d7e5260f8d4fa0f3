"""The models that are quantized: the reference model, and random ones of other architectures.

Their widths are what every format takes, and no two matrices of a block have the same shape where the
architecture lets them differ, so that a transposed or misplaced one does not fit.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "reference" / "model"
VOCABULARY = 4096  # of the reference model's tokenizer, which all of them get
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 128, "tie_word_embeddings": False,
    "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
_TINY: dict[str, dict[str, Any]] = {
    # Heads are wider than hidden / heads; of GGUF, transformers takes their width to be 128,
    # the inner width of gpt2 to be 4 times the outer, and its positions 1024.
    "qwen3": _COMMON | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128},
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 256, "n_inner": 1024, "n_head": 8}
    | {"n_positions": 1024, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0},
    "opt": {key: value for key, value in _COMMON.items() if key != "intermediate_size"}
    | {"ffn_dim": 768, "word_embed_proj_dim": 256, "tie_word_embeddings": True},
    "mixtral": _COMMON | {"head_dim": 32},
}
MODELS = ("llama", *_TINY)


def path(model: str, folder: Path) -> Path:
    """Where a model lies; the llama is the reference model itself."""
    return REFERENCE if model == "llama" else folder / model


def make(models: list[str], folder: Path) -> None:
    """Write those that are not there as they are described here."""
    for model in models:
        if model != "llama":
            write(model, model, _TINY[model], folder)


def write(name: str, model_type: str, changes: dict[str, Any], folder: Path) -> None:
    """A random model with the reference model's tokenizer, unless it is there."""
    sys.path.insert(0, str(ROOT / "tests"))
    from models import tiny_checkpoint

    marker = folder / name / "changes.txt"
    if marker.exists() and marker.read_text() == repr(changes):
        return
    shutil.rmtree(folder / name, ignore_errors=True)
    tiny_checkpoint(folder / name, model_type, **changes)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REFERENCE / file, folder / name / file)
    marker.write_text(repr(changes))
