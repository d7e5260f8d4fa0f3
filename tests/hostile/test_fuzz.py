"""Every reader against inputs that nobody wrote: whatever comes, an answer, or one error on purpose.

Two kinds of inputs: bytes of a valid file that are flipped, cut, repeated and spliced, and valid JSON in
which any value is replaced by any other. `make fuzz` takes 1000 of each reader, a test run 40; what once
failed, and a valid file of each kind, stands in corpus/ and is tried every time.
"""

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from walls import INDEX, MODEL, copied, walls

import fewbits
from fewbits import FewbitsError, InputError, VerificationError
from fewbits.advice import read_measured
from fewbits.calibration import read_calibration
from fewbits.checkpoint import hash_json, open_checkpoint, read_header
from fewbits.comparison import read_comparison
from fewbits.convert import open_quantized
from fewbits.evaluate import load_tokenizer
from fewbits.ledger import read_ledger
from fewbits.load import open_model
from fewbits.plan import make_plan
from fewbits.recipe import Recipe
from fewbits.scheme import QuantScheme
from fewbits.structure import skeleton
from fewbits.tasks import _read_local
from fewbits.text import iter_documents, read_text
from fewbits.verify import verify

CORPUS = Path(__file__).parent / "corpus"
EXAMPLES = int(os.environ.get("FEWBITS_FUZZ", "40"))
RECIPE = Recipe("rtn", QuantScheme(4, "group", 32))
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,  # of 10 s, by `walls`
    derandomize=EXAMPLES < 100,
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)

# -- inputs ---------------------------------------------------------------------------------------------

_numbers = st.one_of(
    st.integers(-2, 70),
    st.sampled_from([2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**9, 10**18, 10**30, 10**400, -(2**63)]),
    st.floats(),
)
_texts = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["../x", "/etc/passwd", "a\0b", "a\nb", "\x1b[31m", "\ud800", "..", "BF16", "F64", "I8", "float",
         "compressed-tensors", "fewbits", "w4-g32", "w8-channel", "llama", "gpt2", "evil--x.Y", MODEL]
    ),
)  # fmt: skip
_leaves = st.one_of(st.none(), st.booleans(), _numbers, _texts)
_values = st.recursive(
    _leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Where something stands in a JSON value."""
    items = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


@st.composite
def changed_json(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value in which up to three places are replaced, removed, renamed or moved."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(places(value)))
        if not place:
            if draw(st.integers(0, 9)) == 0:
                return draw(_values)
            continue
        owner = value
        for key in place[:-1]:
            owner = owner[key]
        how = draw(
            st.sampled_from(["replace", "replace", "replace", "remove", "rename", "take another"])
        )
        if how == "remove":
            del owner[place[-1]]
        elif how == "rename" and isinstance(owner, dict):
            owner[draw(_texts)] = owner.pop(place[-1])
        elif how == "take another":
            other: Any = value
            for key in draw(st.sampled_from(places(value))):
                other = other[key]
            owner[place[-1]] = copy.deepcopy(other)
        else:
            owner[place[-1]] = draw(_values)
    return value


@st.composite
def changed_bytes(draw: st.DrawFn, raw: bytes) -> bytes:
    """Bytes of which some are flipped, cut out, put in, repeated or moved."""
    data = bytearray(raw)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        size = draw(st.integers(0, 40))
        how = draw(st.sampled_from(["flip", "cut", "end", "put", "repeat", "splice", "digit"]))
        if how == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del data[at : at + size]
        elif how == "end":
            del data[at:]
        elif how == "put":
            data[at:at] = draw(st.binary(max_size=12))
        elif how == "repeat":
            data[at:at] = data[at : at + size] * draw(st.integers(1, 50))
        elif how == "splice":
            start = draw(st.integers(0, len(data)))
            data[at : at + size] = data[start : start + size]
        elif how == "digit":
            digits = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
            if digits:
                data[draw(st.sampled_from(digits))] = ord(draw(st.sampled_from("0123456789-.eE")))
    return bytes(data)


def either(raw: bytes) -> st.SearchStrategy[bytes]:
    """Bytes changed as bytes, or as JSON where they are."""
    try:
        value = json.loads(raw)
    except ValueError:
        return changed_bytes(raw)
    return st.one_of(
        changed_bytes(raw), changed_json(value).map(lambda changed: json.dumps(changed).encode())
    )


def lines(raw: bytes) -> st.SearchStrategy[bytes]:
    """A .jsonl file of which the second line is changed as JSON, or all of it as bytes."""
    first, second, *rest = raw.split(b"\n")
    row = changed_json(json.loads(second)).map(lambda changed: json.dumps(changed).encode())
    return st.one_of(changed_bytes(raw), row.map(lambda line: b"\n".join([first, line, *rest])))


def header(raw: bytes) -> st.SearchStrategy[bytes]:
    """A safetensors file whose header is changed as JSON, or any of it as bytes."""
    end = 8 + int.from_bytes(raw[:8], "little")

    def whole(changed: Any) -> bytes:
        text = json.dumps(changed).encode()
        return len(text).to_bytes(8, "little") + text + raw[end:]

    return st.one_of(
        changed_bytes(raw[: end + 8]).map(lambda head: head + raw[end + 8 :]),
        changed_json(json.loads(raw[8:end])).map(whole),
    )


def head_of_gguf(raw: bytes) -> st.SearchStrategy[bytes]:
    """A GGUF file of which the keys, the list of tensors or a little of each is changed."""
    middle = raw.index(b"tokenizer.ggml.tokens") + 100  # what follows is names, most of the header
    names = raw.rindex(b"token_embd.weight")
    return st.one_of(
        changed_bytes(raw[:middle]).map(lambda head: head + raw[middle:]),
        changed_bytes(raw[names - 2000 : names + 200]).map(
            lambda part: raw[: names - 2000] + part + raw[names + 200 :]
        ),
        changed_bytes(raw),
    )


def ledgers(raw: bytes) -> st.SearchStrategy[bytes]:
    """A ledger whose own hash is right, or not."""

    def forge(value: Any) -> bytes:
        if isinstance(value, dict):
            value.pop("sha256", None)
            value = value | {"sha256": hash_json(value)}
        return json.dumps(value).encode()

    return st.one_of(changed_bytes(raw), changed_json(json.loads(raw)).map(forge))


# -- readers --------------------------------------------------------------------------------------------


def read_tensors(folder: Path) -> None:
    """Headers, and every tensor that they promise."""
    checkpoint = open_model(folder)
    for name, info in checkpoint.tensors.items():
        tensor = checkpoint.read(name)
        assert (tensor.dtype, tuple(tensor.shape)) == (info.dtype, info.shape)


def plan_or_skeleton(folder: Path) -> None:
    """What a config makes: the plan from it, and the model."""
    make_plan(folder, RECIPE)
    skeleton(json.loads((folder / "config.json").read_text()))


def tokens(folder: Path) -> None:
    """A tokenizer that is read is one that can be used."""
    tokenizer = load_tokenizer(folder)
    text = folder / "text.txt"
    text.write_text("a few words of text, and more of them" * 9)
    read_calibration(text, tokenizer, samples=1, length=8)


def calibrate(folder: Path) -> None:
    """Calibration from a .jsonl file."""
    read_calibration(folder / "text.jsonl", load_tokenizer(folder), samples=1, length=8)


class Reader:
    """One reader: the file that is changed, how, and what reads it.

    Args:
        base: name of the folder that is copied: "whole", or "result" of a run.
        file: that is changed.
        change: strategy of what stands in it, from what stands in a valid one.
        read: takes the folder.
    """

    def __init__(self, base: str, file: str, change: Callable, read: Callable[[Path], Any]) -> None:
        self.base, self.file, self.change, self.read = base, file, change, read


READERS = {
    "header": Reader("whole", MODEL, header, lambda f: read_header(f / MODEL)),
    "weights": Reader("whole", MODEL, header, read_tensors),
    "torch": Reader("pickled", "pytorch_model.bin", changed_bytes, read_tensors),
    "index": Reader("sharded", INDEX, either, read_tensors),
    "config": Reader("whole", "config.json", either, plan_or_skeleton),
    "load": Reader("result", "config.json", either, fewbits.load),
    "gptq": Reader("gptq", "config.json", either, fewbits.load),
    "awq": Reader("awq", "config.json", either, fewbits.load),
    "w8a8": Reader("w8a8", "config.json", either, fewbits.load),
    "gguf": Reader("gguf", "model.gguf", head_of_gguf, read_tensors),
    "gguf_config": Reader("gguf", "config.json", either, fewbits.load),
    "convert": Reader("gptq", "config.json", either, lambda f: open_quantized(f).schemes),
    "generation": Reader("whole", "generation_config.json", either, fewbits.load),
    "tokenizer": Reader("whole", "tokenizer.json", either, tokens),
    "tokenizer_config": Reader("whole", "tokenizer_config.json", either, tokens),
    "text": Reader("whole", "text.jsonl", lines, lambda f: read_text(f / "text.jsonl")),
    "documents": Reader(
        "whole", "text.txt", changed_bytes, lambda f: list(iter_documents(f / "text.txt"))
    ),
    "calibration": Reader("whole", "text.jsonl", lines, calibrate),
    "ledger": Reader("result", "fewbits.json", ledgers, read_ledger),
    "verify": Reader("result", "fewbits.json", ledgers, verify),
    "result": Reader("result", MODEL, header, verify),
    "comparison": Reader(
        "compared", "compare.json", either, lambda f: read_comparison(f / "compare.json")
    ),
    "measured": Reader(
        "compared", "compare.json", either, lambda f: read_measured(f / "compare.json", "5e")
    ),
    "hellaswag": Reader("tasks", "hellaswag_val.jsonl", lines, lambda f: _read_local("hellaswag", f)),
    "hellaswag_txt": Reader(
        "task_txt", "hellaswag.txt", changed_bytes, lambda f: _read_local("hellaswag", f)
    ),
    "arc": Reader("tasks", "ARC-Challenge-Test.jsonl", lines, lambda f: _read_local("arc_challenge", f)),
    "mmlu": Reader(
        "tasks", "mmlu/test/anatomy_test.csv", changed_bytes, lambda f: _read_local("mmlu", f)
    ),
}

ROWS = (
    '{"text": "one and two"}\n{"messages": [{"role": "user", "content": "three"}]}\n{"text": "four"}\n'
    * 2
)
SWAG = '{"activity_label": "a", "ctx": "b", "endings": ["c", "d", "e", "f"], "label": 0}\n' * 3
OPTIONS = [{"text": text, "label": label} for text, label in ("aA", "bB", "cC")]
ARC = (json.dumps({"question": {"stem": "q", "choices": OPTIONS}, "answerKey": "B"}) + "\n") * 3


@pytest.fixture(scope="module")
def bases(whole, tmp_path_factory):
    """The valid folders, by name."""
    root = tmp_path_factory.mktemp("bases")
    made = {
        name: root / name
        for name in (
            "whole", "result", "pickled", "sharded", "compared", "tasks", "task_txt",
            "gptq", "awq", "gguf", "w8a8",
        )
    }  # fmt: skip
    copied(whole, made["whole"])
    (made["whole"] / "text.jsonl").write_text(ROWS)
    (made["whole"] / "text.txt").write_text("one\n<|endoftext|>\ntwo\n")
    fewbits.quantize(made["whole"], made["result"], scheme=QuantScheme(4, "group", 32))
    for name in ("gptq", "awq", "gguf"):
        scheme = QuantScheme(4, "group", 32, symmetric=name == "gptq")
        fewbits.quantize(made["whole"], made[name], scheme=scheme, format=name)
    fewbits.quantize(made["whole"], made["w8a8"], scheme=QuantScheme.parse("w8-channel-a8-token"))
    checkpoint = open_checkpoint(whole)
    for name in ("pickled", "sharded"):
        copied(whole, made[name])
        (made[name] / MODEL).unlink()
    small = {n: checkpoint.read(n)[:4].clone() for n in sorted(checkpoint.tensors)[:4]}
    torch.save(small, made["pickled"] / "pytorch_model.bin")
    shutil.copy(whole / MODEL, made["sharded"] / "one.safetensors")
    places = dict.fromkeys(checkpoint.tensors, "one.safetensors")
    (made["sharded"] / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    made["compared"].mkdir()
    shutil.copy(CORPUS / "comparison/valid.json", made["compared"] / "compare.json")
    (made["tasks"] / "mmlu/test").mkdir(parents=True)
    (made["tasks"] / "mmlu/test/anatomy_test.csv").write_text('q,a,b,c,d,A\n"q, ""2""",a,b,c,d,3\n')
    (made["tasks"] / "hellaswag_val.jsonl").write_text(SWAG)
    (made["tasks"] / "ARC-Challenge-Test.jsonl").write_text(ARC)
    made["task_txt"].mkdir()
    (made["task_txt"] / "hellaswag.txt").write_text("a: b\n0\nc\nd\ne\nf\n" * 2)
    return made


@pytest.fixture(scope="module")
def place(bases, tmp_path_factory):
    """Copies of the valid folders, whose one file is changed again and again."""
    root = tmp_path_factory.mktemp("fuzz")
    return {name: copied(folder, root / name) for name, folder in bases.items()}


def answer(reader: Reader, folder: Path, content: bytes) -> Any:
    """What the reader says of it; the folder is as it was afterwards."""
    path = folder / reader.file
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        with walls(folder):
            return reader.read(folder)
    except (InputError, VerificationError) as error:
        said = str(error)
        assert said.isprintable()
        return error
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("name", READERS)
def test_any_input_gives_an_answer_or_one_error_on_purpose(name, bases, place):
    reader = READERS[name]
    valid = (bases[reader.base] / reader.file).read_bytes()
    counted = 0

    @seed(int(os.environ.get("FEWBITS_SEED", "0")))
    @fuzzed
    @given(reader.change(valid))
    def check(content: bytes) -> None:
        nonlocal counted
        counted += 1
        answer(reader, place[reader.base], content)

    check()
    assert counted >= EXAMPLES


@pytest.mark.parametrize(
    "path", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}"
)
def test_what_was_kept_is_answered(path, place):
    reader = READERS[path.parent.name]
    found = answer(reader, place[reader.base], path.read_bytes())
    assert isinstance(found, FewbitsError) == (not path.name.startswith("valid"))


def test_the_valid_files_are_read(bases, place):
    for reader in READERS.values():
        content = (bases[reader.base] / reader.file).read_bytes()
        assert not isinstance(answer(reader, place[reader.base], content), FewbitsError), reader.file
