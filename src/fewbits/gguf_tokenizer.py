"""The vocabulary of a GGUF file, from tokenizer.json: tokens, merges, special tokens, chat template."""

import json
import logging
import re
from pathlib import Path
from typing import Any

from fewbits.checkpoint import CONFIG, read_json
from fewbits.errors import InputError, first_line
from fewbits.gguf_models import table
from fewbits.tensor import Note
from fewbits.untrusted import shown


def add_tokenizer(writer: Any, folder: Path, size: int) -> list[Note]:
    """Tokens, merges and special tokens; without them clients take and give numbers of tokens."""
    path = folder / "tokenizer.json"
    reason: str | None = "there is no tokenizer.json"
    if path.is_file():
        tokenizer = read_json(path)
        try:
            reason = _add_vocabulary(writer, tokenizer, size)
            if reason is None:
                _add_special(writer, folder)
                _check_text(writer.kv_data[0])
        except InputError:
            raise
        except Exception as error:  # of a stranger's JSON, whatever is in it
            raise InputError(f"{path} is not understood: {first_line(error)}") from None
    if reason is None and _is_metaspace(tokenizer) and _prefix_space(tokenizer):
        what = "llama.cpp puts a space before every text, this tokenizer not before one that has its own"
        return [Note("fact", path.name, what)]
    if reason is None:
        return []
    writer.add_tokenizer_model("no_vocab")
    what = f"without a vocabulary: {reason}; its clients take and give numbers of tokens"
    return [Note("skip", path.name, what)]


def _add_vocabulary(writer: Any, tokenizer: dict[str, Any], size: int) -> str | None:
    """Tokens and merges; or why llama.cpp would not split text as this tokenizer does."""
    model, added = tokenizer["model"], tokenizer.get("added_tokens", [])
    if model.get("type") != "BPE":
        return f"tokenizers of type {shown(model.get('type'))} are not written"
    splits, normalizer = _splits(tokenizer.get("pre_tokenizer")), tokenizer.get("normalizer")
    by_bytes = bool(model.get("byte_fallback"))
    if not by_bytes:
        if normalizer is not None and normalizer.get("type") != "NFC":
            return f"its normalizer, {shown(normalizer)}, is none that llama.cpp has"
        known = table()["tokenizers"].items()
        ignores = bool(model.get("ignore_merges"))
        pre = next(
            (n for n, t in known if t["splits"] == splits and t["ignore_merges"] == ignores), None
        )
        if pre is None:
            return f"its way to split text, {shown(splits)}, is not among those of llama.cpp known here"
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
    else:
        space = _prefix_space(tokenizer)
        if space is None:
            return "its way to write spaces is not known here"
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(space)
    tokens = {number: text for text, number in model["vocab"].items()}
    types = {number: _token_type(text, by_bytes) for number, text in tokens.items()}
    if model.get("unk_token") in model["vocab"]:
        types[model["vocab"][model["unk_token"]]] = 2
    for token in added:
        tokens[token["id"]] = token["content"]
        if types.get(token["id"]) != 2:
            types[token["id"]] = 3 if token.get("special") else 4
    if min(tokens) < 0 or max(tokens) >= size:
        raise InputError(
            f"tokenizer.json has token {max(tokens)}, but config.json a vocabulary of {size}"
        )
    writer.add_token_list([tokens.get(i, f"[PAD{i}]") for i in range(size)])
    if by_bytes:
        writer.add_token_scores(_scores(model, tokens, size))
    writer.add_token_types([types.get(i, 5) for i in range(size)])
    return None


def _token_type(text: str, by_bytes: bool) -> int:
    """1 for text, 6 for a byte."""
    return 6 if by_bytes and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", text) else 1


def _scores(model: dict[str, Any], tokens: dict[int, str], size: int) -> list[float]:
    """Higher for tokens that are merged earlier: llama.cpp merges by them."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    last = len(ranks)
    return [-float(ranks.get(tokens.get(i, ""), last)) for i in range(size)]


def _splits(pre: dict[str, Any] | None) -> list[str]:
    """What a pre-tokenizer does, step by step, in the words of gguf_models.toml."""
    if pre is None:
        return []
    kind = pre["type"]
    if kind == "Sequence":
        return [step for part in pre["pretokenizers"] for step in _splits(part)]
    if kind == "ByteLevel" and not pre.get("add_prefix_space"):
        return ["ByteLevel, by its own pattern" if pre.get("use_regex", True) else "ByteLevel"]
    if kind == "Digits" and pre.get("individual_digits"):
        return ["Digits, one by one"]
    if kind == "Split" and pre.get("behavior") == "Isolated" and not pre.get("invert"):
        return [str(pre["pattern"].get("Regex"))]
    return [json.dumps(pre, sort_keys=True)]


def _prefix_space(tokenizer: dict[str, Any]) -> bool | None:
    """Whether a space is put before a text; None where spaces become something else than "▁"."""
    normalizer, pre = tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")
    if pre is not None and _is_metaspace(tokenizer) and normalizer is None:
        plain = pre.get("replacement") == "▁" and not pre.get("split", True)
        return pre.get("prepend_scheme") != "never" if plain else None
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    # Spaces are none any more where it would split.
    idle = {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    if (
        pre not in (None, idle)
        or replace not in steps
        or any(s not in (replace, prepend) for s in steps)
    ):
        return None
    return prepend in steps


def _is_metaspace(tokenizer: dict[str, Any]) -> bool:
    return (tokenizer.get("pre_tokenizer") or {}).get("type") == "Metaspace"


def _check_text(keys: dict[str, Any]) -> None:
    """Whether all of it is UTF-8: JSON may hold halves of characters.

    Raises:
        ValueError: it is not.
    """
    for key in keys.values():
        texts = key.value if isinstance(key.value, list) else [key.value]
        for text in texts:
            if isinstance(text, str):
                text.encode()


def _add_special(writer: Any, folder: Path) -> None:
    """Merges, special tokens and the chat template, by the gguf library."""
    import gguf

    for name in ("tokenizer.json", "tokenizer_config.json", CONFIG, "generation_config.json"):
        if (folder / name).is_file():
            read_json(folder / name)  # strictly, before the library does
    by_merges = "tokenizer.ggml.scores" not in writer.kv_data[0]
    logger = logging.getLogger(gguf.vocab.__name__)  # of pairs of texts, which nobody asks for
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        special = gguf.SpecialVocab(folder, load_merges=by_merges)
        special.add_special_token.setdefault("bos", False)  # llama.cpp's own default depends
        special.add_to_gguf(writer, quiet=True)
    finally:
        logger.setLevel(level)
