"""What no reader may do, whatever it reads; and a whole checkpoint for hostile ones to be made from."""

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from models import tiny_checkpoint

SECONDS = 10  # of a processor that any answer may take; six times as many of the clock
MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
# What runs other code or reaches other machines, by the names of Python's audit events.
_FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_broken: list[str] = []
_allowed: list[Path] = []  # where it may write; nothing is watched while there is nothing


def _watch(event: str, arguments: tuple) -> None:
    if not _allowed:
        return
    ours = event == "subprocess.Popen" and "render_jinja_template" in str(arguments[1])
    if event in _FORBIDDEN or (event == "subprocess.Popen" and not ours):
        _broken.append(f"{event} {arguments!r:.200}")
    elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        inside = any(Path(path).is_relative_to(folder) for folder in _allowed)
        writes = isinstance(arguments[2], int) and arguments[2] & _WRITING
        cache = path.endswith(".pyc") or "__pycache__" in path or path.startswith("/dev/")
        if writes and not inside and not cache:
            _broken.append(f"writes {path}")
        if "forbidden" in Path(path).name:
            _broken.append(f"opens {path}")


sys.addaudithook(_watch)  # for good: a process cannot take one back


@contextmanager
def walls(folder: Path) -> Iterator[None]:
    """Fail if anything but the folder and temporary files is written, or code or the network is used.

    No file whose name holds "forbidden" may be opened, no module named "evil" be imported, and it may
    take 10 s of a processor (other work on the machine does not count, but waiting without end does).
    """
    _broken.clear()
    _allowed[:] = [folder.resolve(), Path(tempfile.gettempdir()).resolve()]
    began = time.process_time(), time.monotonic()
    try:
        yield
    finally:
        _allowed.clear()
    took = max(time.process_time() - began[0], (time.monotonic() - began[1]) / 6)
    evil = [name for name in sys.modules if "evil" in name.rpartition(".")[2]]
    if _broken or evil or took > SECONDS:
        raise AssertionError(f"{_broken[:3]} {evil} {took:.1f} s")


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything in a folder, with size and time."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
    }


def make_whole(folder: Path) -> Path:
    """A tiny Llama with a tokenizer of single bytes and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tiny_checkpoint(folder, "llama")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:95]
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(["<s>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return folder


def change_json(path: Path, **fields: object) -> None:
    """Other values for some fields of a JSON object."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def read_parts(path: Path) -> tuple[dict, bytes]:
    """Header and values of a safetensors file."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def write_parts(path: Path, header: object, values: bytes, length: int | None = None) -> None:
    """A safetensors file; `header` may be bytes, and `length` what it says of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + values)


def copied(whole: Path, folder: Path) -> Path:
    """A copy that may be broken."""
    shutil.copytree(whole, folder)
    return folder


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that the hostile ones are made from."""
    return make_whole(tmp_path_factory.mktemp("whole") / "model")
