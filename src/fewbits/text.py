"""Documents from files and the hub, and the windows of tokens that a model is run on."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits import chat
from fewbits.errors import InputError, first_line
from fewbits.untrusted import check_types, parse_json

SEPARATOR = "<|endoftext|>"  # between the documents of a text file, where it has several
ACCEPTED = "accepted are a text file, a .jsonl file, and hub:owner/name/config:split:column"

_MAX_ROW = 2**25  # characters of one document in a .jsonl file; the Bible has 4 * 10**6. Not tuned.

Document = str | list[dict[str, Any]]  # a text, or the messages of a chat


@dataclass(frozen=True, slots=True)
class Text:
    """Documents, where they come from, and a hash of them all.

    >>> text = Text("two stories", ["Once.", "Upon a time."])
    >>> len(text.sha256)
    64
    """

    name: str
    documents: list[Document] = field(repr=False)

    @property
    def sha256(self) -> str:
        """Of the documents."""
        return hashlib.sha256(json.dumps(self.documents).encode()).hexdigest()


def read_text(source: str | Path, limit: int | None = None) -> Text:
    """Documents of a text file, of a jsonl file with "text" or "messages" rows, or of a hub dataset.

    A text file is one document, or several between lines of `<|endoftext|>`.

    Args:
        source: a path, or `hub:owner/name/config:split:column`.
        limit: at most so many documents.

    Raises:
        InputError: cannot be read, or holds nothing.
    """
    documents = list(iter_documents(source, limit))[:limit]
    if not documents:
        raise InputError(f"{source} holds no text")
    return Text(str(source) if is_hub(source) else Path(source).name, documents)


def is_hub(source: str | Path) -> bool:
    """Whether a source of text is a dataset of the hub."""
    return str(source).startswith("hub:")


def iter_documents(source: str | Path, limit: int | None = None) -> Iterator[Document]:
    """The documents of `read_text` one by one; from the hub come only as many as are taken."""
    found = _hub(str(source), limit) if is_hub(source) else _file(source)
    yield from (document for document in found if document)


def _file(source: str | Path) -> Iterator[Document]:
    path, raw = Path(source), b""
    try:
        raw = path.read_bytes()
        content = raw.decode().replace("\r\n", "\n").replace("\r", "\n")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no path"
        if isinstance(error, UnicodeDecodeError):
            broken = raw.count(b"\n", 0, error.start) + 1
            reason = f"line {broken} is not UTF-8"
        raise InputError(f"text {source} cannot be read ({reason}); {ACCEPTED}") from None
    if path.suffix != ".jsonl":
        yield from (part.strip("\n") for part in content.split(SEPARATOR))
        return
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            yield _row(line, f"{source}, line {number}")


def _row(line: str, where: str) -> Document:
    try:
        if len(line) > _MAX_ROW:
            raise ValueError(f"it has {len(line)} characters, at most {_MAX_ROW} are accepted")
        row = parse_json(line)
        document: Document = row["text"] if "text" in row else row["messages"]
        check_types(document, str if "text" in row else list[dict[str, Any]], "it")
        json.dumps(document, ensure_ascii=False).encode()  # halves of characters are no text
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error}; " if isinstance(error, ValueError) else ""
        raise InputError(
            f'{where}: {reason}accepted are rows like {{"text": "..."}} and {{"messages": [...]}}'
        ) from None
    return document


def _hub(source: str, limit: int | None) -> Iterator[Document]:
    try:
        import datasets
    except ImportError:
        raise InputError(f"{source} needs the datasets package: pip install datasets") from None
    try:
        place, split, column = source.removeprefix("hub:").split(":")
        owner, name, *config = place.split("/")
    except ValueError:
        raise InputError(f"{source} is not understood; {ACCEPTED}") from None
    try:
        rows = datasets.load_dataset(f"{owner}/{name}", *config, split=split, streaming=True)
        for row in rows if limit is None else rows.take(limit):
            yield row[column]
    except Exception as error:  # the client raises many kinds; each means that we have no text
        reason = first_line(error)
        raise InputError(f"{source} cannot be had: {reason}") from error


def windows(text: Text, tokenizer: Any, length: int) -> list[Tensor]:
    """Every document cut into non-overlapping windows of at most `length` tokens.

    Each window begins with the tokenizer's BOS, if it has one, as every text does that the model was
    trained on; BOS is not counted as predicted. No window spans two documents.

    Returns:
        Token ids, (n,) each, 2 <= n <= length.
    """
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    pieces = []
    step = length - len(start)
    for document in text.documents:
        ids = tokenize(document, tokenizer)
        for i in range(0, len(ids), step):
            piece = start + ids[i : i + step]
            if len(piece) >= 2:
                pieces.append(torch.tensor(piece))
    return pieces


def tokenize(document: Document, tokenizer: Any) -> list[int]:
    """Token ids of a document, without special tokens but those of the chat template.

    Raises:
        InputError: messages, and no chat template or one that refuses them; or a broken tokenizer.
    """
    if not isinstance(document, str):
        if not getattr(tokenizer, "chat_template", None):
            raise InputError("the text holds chat messages, but the model has no chat template")
        try:
            document = _render(document, tokenizer)
        except Exception as error:  # templates are programs that raise what they like
            reason = first_line(error)
            raise InputError(f"the model's chat template refuses some messages: {reason}") from None
    try:
        ids: list[int] = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library in Rust is no Exception
        raise InputError(f"the model's tokenizer fails on some text: {first_line(error)}") from None
    return ids


def _render(messages: list[dict[str, Any]], tokenizer: Any) -> str:
    """What `apply_chat_template` gives, in bounded time and memory where a template is run."""
    from transformers import PreTrainedTokenizerBase

    own = getattr(type(tokenizer), "apply_chat_template", None)
    if own is not PreTrainedTokenizerBase.apply_chat_template or not messages:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    given = [{key: item for key, item in message.items() if item is not None} for message in messages]
    return chat.render(tokenizer.get_chat_template(), given, tokenizer.special_tokens_map)
