"""Files made by hand to do harm: each is answered in one line that names it, and does none.

A maker breaks a copy of a whole checkpoint and returns words that the error must hold.
"""

import functools
import json
import os
import pickle
import shutil
import socket
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner
from walls import INDEX, MODEL, TEMPLATE, change_json, copied, listing, read_parts, walls, write_parts

import fewbits
from fewbits import FewbitsError, InputError, VerificationError
from fewbits.checkpoint import hash_json, open_checkpoint, read_json
from fewbits.cli import app
from fewbits.evaluate import load_tokenizer
from fewbits.structure import skeleton
from fewbits.tasks import _read_local
from fewbits.text import read_text, tokenize
from fewbits.untrusted import MAX_VALUES

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"
CONFIG = "config.json"


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(result, *words, code=2):
    """One line on stderr with all the words, nothing on stdout."""
    assert result.exit_code == code, (result.output, result.exception)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.rstrip("\n").splitlines()) == 1, result.stderr
    assert result.stderr.rstrip("\n").isprintable()
    for word in words:
        assert word in result.stderr


def said(action, folder):
    """What the error says that an action must raise."""
    with pytest.raises(InputError) as caught:
        action(folder)
    return str(caught.value)


MAKERS = []


def maker(function):
    """One of the hostile checkpoints."""
    MAKERS.append(function)
    return function


def entry(**changes):
    """A maker that changes what the header says of one tensor."""

    def make(folder):
        header, values = read_parts(folder / MODEL)
        header[UP] |= changes
        write_parts(folder / MODEL, header, values)
        return MODEL, UP

    make.__name__ = "entry " + json.dumps(changes)[:60]
    return maker(make)


def raw_header(name, text, values=b"", length=None, words=()):
    def make(folder):
        write_parts(folder / MODEL, text, values, length)
        return MODEL, *words

    make.__name__ = f"header {name}"
    return maker(make)


def config(name, words, **changes):
    def make(folder):
        change_json(folder / CONFIG, **changes)
        return (CONFIG, *words)

    make.__name__ = f"config {name}"
    return maker(make)


def index(name, weight_map, words):
    """A maker that puts an index in the place of the whole file."""

    def make(folder):
        (folder / MODEL).rename(folder / "one.safetensors")
        shutil.copy(folder / "one.safetensors", folder.parent / "forbidden.safetensors")
        text = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
        (folder / INDEX).write_text(text.replace("OUTSIDE", str(folder.parent)))
        return words

    make.__name__ = f"index {name}"
    return maker(make)


def weights(name, change, words=(UP,), **settings):
    """A maker that rewrites the tensors, and the config to go with them."""

    def make(folder):
        tensors = load_file(folder / MODEL)
        save_file(change(tensors), folder / MODEL, metadata={"format": "pt"})
        change_json(folder / CONFIG, **settings)
        return words

    make.__name__ = f"weights {name}"
    return maker(make)


# -- headers that lie ----------------------------------------------------------------------------

entry(dtype="F37")
entry(dtype=["BF16"])
entry(dtype="F64")
entry(shape=[-96, -64])
entry(shape=[True, 6144])
entry(shape=[96.0, 64])
entry(shape=[10**400, 64])
entry(shape="96x64")
entry(shape=[1] * 65 + [96, 64])
entry(shape=[0, 2**63], data_offsets=[0, 0])
entry(shape=[0, 2**32, 2**32], data_offsets=[0, 0])
entry(data_offsets=[0, 10**30])
entry(data_offsets=[-12288, 0])
entry(data_offsets=[0.0, 12288.0])
entry(data_offsets=[0])
entry(data_offsets=[12288, 0])
raw_header("nested", b"[" * 10**6)
raw_header("nested objects", b'{"a":' * 10**6)
raw_header("no JSON", b"\x00" * 64)
raw_header(
    "NaN", b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', bytes(4), words=("a has",)
)
raw_header("1e400", b'{"a":{"dtype":"F32","shape":[1e400],"data_offsets":[0,4]}}', bytes(4))
raw_header("digits", b'{"a":{"dtype":"F32","shape":[' + b"9" * 10**5 + b'],"data_offsets":[0,4]}}')
raw_header("2**64 - 1 long", b"{}", length=2**64 - 1)
raw_header("0 long", b"", length=0)
raw_header("a list", b"[]")
raw_header("metadata of numbers", b'{"__metadata__":{"format":3}}', words=("__metadata__",))
raw_header("metadata that is a list", b'{"__metadata__":[]}', words=("__metadata__",))
for bad in ("a\nb", "a\0b", "\x1b[2J", "\ud800", "", "n" * 5000):
    named = json.dumps({bad: {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}}).encode()
    raw_header(f"name {bad!r:.20}", named, b"1", words=("is no name of a tensor",))


@maker
def names_twice(folder):
    header, values = read_parts(folder / MODEL)
    text = json.dumps(header)
    write_parts(folder / MODEL, (text[:-1] + f', "{UP}": {json.dumps(header[UP])}}}').encode(), values)
    return MODEL, UP, "twice"


@maker
def overlaps(folder):
    header, values = read_parts(folder / MODEL)
    begin, end = header[NORM]["data_offsets"]
    header[NORM]["data_offsets"] = [begin - 2, end - 2]
    write_parts(folder / MODEL, header, values)
    return MODEL, NORM


@maker
def header_of_many_objects(folder):
    write_parts(folder / MODEL, b'{"a":[' + b"{}," * 11_000_000 + b"1]}", b"")
    return (MODEL,)


@maker
def header_of_40_megabytes(folder):
    write_parts(folder / MODEL, b"[" + b" " * 40_000_000 + b"]", b"")
    return MODEL, "40000002 bytes"


def short_file(size):
    def make(folder):
        (folder / MODEL).write_bytes(b"\x01\0\0\0\0\0\0\0"[:size])
        return (MODEL,)

    make.__name__ = f"file of {size} bytes"
    return maker(make)


for size in (0, 1, 7, 8):
    short_file(size)


# -- what is no file, and links --------------------------------------------------------------------


def instead(name, make_it, *words):
    """A maker that puts something else in the place of a file."""

    def make(folder):
        (folder / name).unlink()
        make_it(folder / name)
        return (name, *words)

    make.__name__ = f"{name} is {make_it.__name__}"
    return maker(make)


def a_folder(path):
    path.mkdir()


def a_pipe(path):
    os.mkfifo(path)


def a_socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def a_link_to_nothing(path):
    path.symlink_to("nowhere")


def a_link_to_itself(path):
    path.symlink_to(path.name)


def a_link_outside(path):
    target = path.parent.parent / f"forbidden-{path.name}"
    target.write_text("{}")
    path.symlink_to(target)


def a_link_to_memory(path):
    path.symlink_to("/dev/zero")


for name in (MODEL, CONFIG):
    for other in (a_folder, a_pipe, a_socket, a_link_to_nothing, a_link_to_itself, a_link_outside,
                  a_link_to_memory):  # fmt: skip
        instead(name, other)


# -- an index that points elsewhere ----------------------------------------------------------------

index("up", {UP: "../forbidden.safetensors"}, (INDEX, "../forbidden"))
index("absolute", {UP: "OUTSIDE/forbidden.safetensors"}, (INDEX, "forbidden"))
index("backslash", {UP: "..\\forbidden.safetensors"}, (INDEX, "forbidden"))
index("number", {UP: 3}, (INDEX,))
index("list", {UP: ["one.safetensors"]}, (INDEX,))
index("null", {UP: None}, (INDEX,))
index("empty", {UP: ""}, (INDEX,))
index("dots", {UP: ".."}, (INDEX,))
index("newline", {UP: "a\nb.safetensors"}, (INDEX,))
index("NUL", {UP: "a\0b.safetensors"}, (INDEX,))
index("another kind", {UP: "config.json"}, (INDEX, "config.json"))
index("pickles", {UP: "one.bin"}, (INDEX, "one.bin"))
index("missing", {UP: "two.safetensors"}, ("two.safetensors",))
index("no map", {}, (INDEX,))
index("no object", "[]", (INDEX,))
index("twice", '{"weight_map": {"a": "one.safetensors", "a": "one.safetensors"}}', (INDEX, "twice"))
index("tensors that are not there", {"a\n": "one.safetensors"}, ("one.safetensors",))


@maker
def index_of_300_000_files(folder):
    (folder / MODEL).unlink()
    files = {f"t{i}": f"{i}.safetensors" for i in range(300_000)}
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))
    return ("0.safetensors",)


# -- pickles ---------------------------------------------------------------------------------------


class Evil:
    """Runs a command where it is unpickled without care."""

    def __reduce__(self):
        return os.system, ("echo ran > /tmp/forbidden-ran",)


def torch_file(name, save, *words):
    def make(folder):
        (folder / MODEL).unlink()
        save(folder / "pytorch_model.bin")
        return ("pytorch_model.bin", *words)

    make.__name__ = f"torch file {name}"
    return maker(make)


def bombed(path):
    """A zip whose members are thousands of times as large as the file."""
    torch.save({UP: torch.zeros(2, 3)}, path)
    with zipfile.ZipFile(path) as source:
        members = {info.filename: source.read(info) for info in source.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name, data in members.items():
            bomb.writestr(name, bytes(10**9) if name.endswith("data/0") else data)


def claimed(path):
    """A member that says it is larger than the file."""
    torch.save({UP: torch.zeros(2, 3)}, path)
    raw = bytearray(path.read_bytes())
    place = raw.rindex(b"PK\x01\x02")
    raw[place + 24 : place + 28] = (2**31).to_bytes(4, "little")
    path.write_bytes(bytes(raw))


torch_file("os.system", lambda path: torch.save({UP: Evil()}, path))
torch_file("plain pickle", lambda path: path.write_bytes(pickle.dumps({UP: Evil()})))
torch_file("zip bomb", bombed)
torch_file("claims", claimed)
torch_file("garbage", lambda path: path.write_bytes(os.urandom(1000)))
torch_file("empty", lambda path: path.write_bytes(b""))
torch_file("views", lambda path: torch.save({UP: torch.zeros(1).expand(10**6, 10**6)}, path), UP)
torch_file("no values", lambda path: torch.save({UP: torch.empty(9**9, 9**9, device="meta")}, path), UP)
torch_file("sparse", lambda path: torch.save({UP: torch.eye(3).to_sparse()}, path), UP)
torch_file("complex", lambda path: torch.save({UP: torch.zeros(2, dtype=torch.complex64)}, path), UP)
torch_file("numbers for names", lambda path: torch.save({3: torch.zeros(2)}, path), "3")
torch_file("a list", lambda path: torch.save([torch.zeros(2)], path))


# -- configs that ask for too much ------------------------------------------------------------------

config("a billion layers", ("num_hidden_layers",), num_hidden_layers=10**9)
config("infinite layers", ("num_hidden_layers",), num_hidden_layers=float("inf"))
config("layers in words", (), num_hidden_layers="many")
config("negative layers", (), num_hidden_layers=-1)
config("wide", ("hidden_size",), hidden_size=10**18)
config("a large vocabulary", ("vocab_size",), vocab_size=10**12)
config("no width", (), hidden_size=0)
config("no heads", (), num_attention_heads=0)
config("a list for a width", (), hidden_size=[64])
config("null", (), hidden_size=None)
config("no model_type", (), model_type=None)
config("model_type is an object", (), model_type={})
config("code", ("evil_net", "never run"), model_type="evil_net", auto_map={"AutoConfig": "evil.Config"})
config("code of others", ("never run",), model_type="x", auto_map={"AutoConfig": "o/r--evil.Config"})
config("elsewhere", (), model_type="evil_net", _name_or_path="../forbidden")


@maker
def config_nested_for_10_megabytes(folder):
    (folder / CONFIG).write_text('{"model_type": ' + "[" * 10_000_000)
    return (CONFIG,)


@maker
def config_of_35_megabytes(folder):
    (folder / CONFIG).write_text("{" + " " * 35_000_000 + "}")
    return CONFIG, "35000002 bytes"


@maker
def config_twice(folder):
    (folder / CONFIG).write_text('{"model_type": "llama", "model_type": "gpt2"}')
    return CONFIG, "model_type", "twice"


@maker
def config_that_is_not_utf8(folder):
    (folder / CONFIG).write_bytes(b'{"a": "\xff"}')
    return (CONFIG,)


# -- weights at odds with the config ----------------------------------------------------------------

weights("no columns", lambda t: t | {UP: t[UP][:, :0].contiguous()})
weights("no rows", lambda t: t | {UP: t[UP][:0].contiguous()})
weights("a number", lambda t: t | {UP: t[UP].sum()})
weights("five dimensions", lambda t: t | {UP: t[UP].view(96, 2, 2, 4, 4).contiguous()})
weights("transposed", lambda t: t | {UP: t[UP].t().contiguous()})
weights("whole numbers", lambda t: t | {UP: t[UP].view(torch.int16)})
weights("missing", lambda t: {n: x for n, x in t.items() if n != UP})
weights("groups at odds", dict, ("divisors",), head_dim=32)
weights(
    "no inner width",
    lambda t: {n: x[:0] if "up_" in n or "gate_" in n else x[:, :0].contiguous() if "down_" in n else x
               for n, x in t.items()},
    ("down_proj", "(64, 0)"),
    intermediate_size=0,
)  # fmt: skip


def test_there_are_enough():
    assert len(MAKERS) >= 100


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_a_hostile_checkpoint_is_refused_in_one_line(whole, tmp_path, make):
    folder = copied(whole, tmp_path / "model")
    words = make(folder)
    before = listing(tmp_path)
    # Groups of 48 columns fit none of the widths, so that what is not refused before is refused there.
    group = "48" if "groups" in make.__name__ else "32"
    with walls(tmp_path):
        refused(run("plan", folder, "--no-probe", "--method", "rtn", "--group-size", group), *words)
    with walls(tmp_path):
        refused(run("quantize", folder, tmp_path / "out", "--group-size", group), *words)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [UP, NORM])
def test_weights_that_are_no_numbers_are_refused_and_nothing_is_written(whole, tmp_path, name, value):
    folder = copied(whole, tmp_path / "model")
    tensors = load_file(folder / MODEL)
    tensors[name].view(-1)[5] = value
    save_file(tensors, folder / MODEL, metadata={"format": "pt"})
    with walls(tmp_path):
        refused(run("quantize", folder, tmp_path / "out", "--group-size", "32"), name, "NaN")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [None, True, 3, 2.5, "x", [], [1], {}, {"quant_method": 3},
                                   {"quant_method": "compressed-tensors"}, {"quant_method": "fewbits"},
                                   {"quant_method": "compressed-tensors", "config_groups": 3},
                                   {"quant_method": "compressed-tensors", "config_groups": {"a": {}}},
                                   {"quant_method": "fewbits", "modules": [1]}])  # fmt: skip
def test_a_hostile_quantization_config_is_answered_in_one_line(whole, tmp_path, value):
    folder = copied(whole, tmp_path / "model")
    change_json(folder / CONFIG, quantization_config=value)
    with walls(tmp_path):
        if value is not None:
            refused(run("quantize", folder, tmp_path / "out"), "quanti")
        answer = run("plan", folder, "--no-probe")
        assert answer.exit_code in (0, 2), answer.exception
        known = isinstance(value, dict) and value.get("quant_method") == "compressed-tensors"
        if value is None or known:  # says that it is quantized, but all its weights are floats
            fewbits.load(folder)
        else:
            assert str(folder) in said(fewbits.load, folder)
            refused(run("bench", folder, "--prompt", "4"), str(folder))


# -- links that are as they should be ----------------------------------------------------------------


def test_the_caches_own_links_are_followed_and_no_others(whole, tmp_path):
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots/abc"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(whole.iterdir())):
        shutil.copy(path, repository / f"blobs/{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert run("plan", snapshot, "--no-probe").exit_code == 0
    load_tokenizer(snapshot)
    (tmp_path / "link").symlink_to(snapshot)
    assert run("plan", tmp_path / "link", "--no-probe").exit_code == 0
    other = tmp_path / "models--owner--other/blobs"
    other.mkdir(parents=True)
    shutil.copy(whole / MODEL, other / "forbidden")
    (snapshot / MODEL).unlink()
    (snapshot / MODEL).symlink_to("../../../models--owner--other/blobs/forbidden")
    with walls(tmp_path):
        refused(run("plan", snapshot, "--no-probe"), MODEL, "link out of its folder")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                                  "generation_config.json", "LICENSE"])  # fmt: skip
def test_what_goes_along_is_no_link_out_of_the_folder(whole, tmp_path, name):
    folder = copied(whole, tmp_path / "model")
    (tmp_path / "forbidden").write_text("{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "forbidden")
    with walls(tmp_path):
        refused(run("quantize", folder, tmp_path / "out", "--group-size", "32"), name, "link out of")
        with pytest.raises(InputError, match="link out of its folder"):
            load_tokenizer(folder)
    assert not (tmp_path / "out").exists()


# -- tokenizers and templates -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "[" * 10**6),
        ("tokenizer.json", '{"a":' * 10**6),
        ("tokenizer.json", "{"),
        ("tokenizer.json", "null"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": [["b", "c"]]}}'),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "[" * 10**6),
        ("tokenizer_config.json", '{"tokenizer_class": 3}'),
        ("tokenizer_config.json", '{"tokenizer_class": "RagTokenizer"}'),
        ("tokenizer_config.json", '{"tokenizer_class": "E", "auto_map": {"AutoTokenizer": ["evil.T"]}}'),
        ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["owner/name--evil.T", null]}}'),
        ("tokenizer_config.json", '{"bos_token": [1]}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": "x"}'),
        ("tokenizer_config.json", '{"a": 1, "a": 2}'),
    ],
)  # fmt: skip
def test_a_hostile_tokenizer_is_refused_in_one_line(whole, tmp_path, file, content):
    folder = copied(whole, tmp_path / "model")
    (folder / file).write_text(content)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'forbidden-ran')!r}, 'w')\nclass T: pass\n")
    (tmp_path / "text.txt").write_text("abc" * 100)
    with walls(tmp_path):
        refused(run("evaluate", folder, "--text", tmp_path / "text.txt"), str(folder))


def test_code_beside_a_model_that_transformers_knows_is_never_run(whole, tmp_path):
    folder = copied(whole, tmp_path / "model")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'forbidden-ran')!r}, 'w')\n")
    names = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    change_json(folder / CONFIG, auto_map=names)
    change_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})
    with walls(tmp_path):
        assert fewbits.load(folder).config.model_type == "llama"
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "key", ["attn_implementation", "_attn_implementation", "experts_implementation"]
)
def test_a_config_cannot_choose_kernels_that_are_fetched_from_elsewhere(whole, key):
    value = json.loads((whole / CONFIG).read_text()) | {key: "owner/evil-kernel"}
    model = skeleton(value)
    assert model.config._attn_implementation in ("eager", "sdpa")
    assert "evil" not in str(model.config)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10**12) %}{% endfor %}",
        "{{ 'a' * 10**11 }}",
        "{% include '/etc/passwd' %}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.join.__globals__ }}{{ cycler.__init__.__globals__.os.system('x') }}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{% for",
        "{{ raise_exception('no\n\nno') }}",
        "{{ messages[7].content.x.y }}",
    ],
)
def test_a_hostile_chat_template_is_refused_in_one_line(whole, tmp_path, template):
    folder = copied(whole, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    text = tmp_path / "chat.jsonl"
    text.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}))
    with walls(tmp_path):
        refused(run("evaluate", folder, "--text", text), "chat template refuses")


def test_a_chat_template_that_never_ends_is_ended(whole, tmp_path, monkeypatch):
    monkeypatch.setattr("fewbits.chat.SECONDS", 1.0)
    tokenizer = load_tokenizer(whole)
    messages = [{"role": "user", "content": "hello", "name": None}]
    tokenizer.chat_template = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    with walls(tmp_path), pytest.raises(InputError, match="more than 1"):
        tokenize(messages, tokenizer)
    tokenizer.chat_template = TEMPLATE  # the next one is answered as ever
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenize(messages, tokenizer) == tokenizer(text, add_special_tokens=False)["input_ids"]


# -- texts ------------------------------------------------------------------------------------------

GOOD = '{"text": "abc"}\n'


@pytest.mark.parametrize(
    "line",
    [
        b"{", b"3", b"null", b'"text"', b"[1]", b"[" * 10**5, b"\0", b'{"text": 3}', b'{"text": null}',
        b'{"messages": "x"}', b'{"messages": [3]}', b'{"messages": {"role": "user"}}', b"{}",
        b'{"text": "\\ud800"}', b'{"messages": [{"content": "\\udfff"}]}', b"\xff\xfe",
        b'{"text": "a", "text": "b"}', b"9" * 10**5, b'{"text": ' + b"9" * 5000 + b"}",
        b'{"text": "' + b"a" * 40_000_000 + b'"}',
    ],
    ids=lambda line: repr(line[:30]),
)  # fmt: skip
def test_a_broken_line_is_named_by_its_number(whole, tmp_path, line):
    text = tmp_path / "text.jsonl"
    text.write_bytes(GOOD.encode() * 2 + line + b"\n" + GOOD.encode())
    with walls(tmp_path):
        refused(run("evaluate", whole, "--text", text), "text.jsonl", "line 3")


def test_a_text_with_zeros_in_it_is_a_text(tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "a\\u0000b"}\n')
    assert read_text(tmp_path / "text.jsonl").documents == ["a\0b"]


@pytest.mark.parametrize(
    "line",
    [
        "3", "null", "[]", "{", '{"a": 1, "a": 2}', "[" * 10**5, '"x"',
        '{"activity_label": 3, "ctx": 3, "endings": 3, "label": 0}',
        '{"activity_label": "a", "ctx": "b", "endings": ["\\ud800"], "label": 0}',
    ],
    ids=lambda line: line[:30],
)  # fmt: skip
def test_a_broken_line_of_a_task_is_named_by_its_number(tmp_path, line):
    good = '{"activity_label": "a", "ctx": "b", "endings": ["c", "d", "e", "f"], "label": 0}\n'
    (tmp_path / "hellaswag_val.jsonl").write_text(good + line + "\n")
    with walls(tmp_path), pytest.raises(InputError, match=r"hellaswag_val\.jsonl:2: ") as caught:
        _read_local("hellaswag", tmp_path)
    assert str(caught.value).isprintable()


# -- results of strangers -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(whole, tmp_path_factory):
    out = tmp_path_factory.mktemp("result") / "out"
    assert run("quantize", whole, out, "--group-size", "32").exit_code == 0
    return out


def forge(folder, change):
    """A changed ledger whose own hash is right."""
    path = folder / "fewbits.json"
    value = json.loads(path.read_text())
    del value["sha256"]
    change(value)
    path.write_text(json.dumps(value | {"sha256": hash_json(value)}))


def files(name):
    return lambda value: value["files"].update({name: {"size_bytes": 1, "sha256": "0"}})


FORGERIES = {
    "up": files("../forbidden"),
    "absolute": files("/etc/passwd"),
    "inner": files("a/../../forbidden"),
    "backslash": files("..\\forbidden"),
    "newline": files("a\nb"),
    "NUL": files("a\0b"),
    "size in words": lambda v: v["files"][CONFIG].update(size_bytes="many"),
    "files is a list": lambda v: v.update(files=[]),
    "an entry is a list": lambda v: v["tensors"].update({UP: []}),
    "shape in words": lambda v: v["tensors"][UP].update(shape="96x64"),
    "negative shape": lambda v: v["tensors"][UP].update(shape=[-1, 2]),
    "outcome": lambda v: v["tensors"][UP].update(outcome="stolen"),
    "format is a list": lambda v: v["request"].update(format=[]),
    "format is unknown": lambda v: v["request"].update(format="x"),
    "scheme": lambda v: v["tensors"][UP]["quantized"].update(scheme="w99"),
    "matrices": lambda v: v["tensors"][UP]["quantized"].update(matrices=10**15),
    "shape of codes": lambda v: v["tensors"][UP]["quantized"].update(shape=[10**9, 10**9]),
    "hash": lambda v: v["tensors"][UP]["written"][0].update(sha256=3),
    "source": lambda v: v.update(source={}),
    "source files": lambda v: v["source"].update(files={MODEL: {"size_bytes": None}}),
    "notes": lambda v: v.update(notes=[3]),
    "blocks": lambda v: v.update(blocks={"a": 1}),
}


@pytest.mark.parametrize("change", FORGERIES.values(), ids=FORGERIES)
def test_a_forged_ledger_fails_verification_in_one_line(result, tmp_path, change):
    folder = copied(result, tmp_path / "out")
    (tmp_path / "forbidden").write_text("x")
    forge(folder, change)
    before = listing(tmp_path)
    with walls(tmp_path):
        answer = run("verify", folder, "--no-forward")
    if answer.exit_code != 0:  # blank places that nobody compares may say anything
        refused(answer, str(folder), code=answer.exit_code)
        assert answer.exit_code in (2, 3)
    else:
        assert change in (FORGERIES["source"],)
    assert listing(tmp_path) == before


def test_a_result_whose_files_are_links_fails_verification(result, tmp_path):
    folder = copied(result, tmp_path / "out")
    (folder / MODEL).rename(tmp_path / "forbidden.safetensors")
    (folder / MODEL).symlink_to(tmp_path / "forbidden.safetensors")
    with walls(tmp_path):
        refused(run("verify", folder), MODEL, "link out of its folder", code=3)
        with pytest.raises(InputError, match="link out of its folder"):
            fewbits.load(folder)


@pytest.mark.parametrize("suffix", ["_packed", "_scale", "_shape"])
@pytest.mark.parametrize("other", [torch.zeros(()), torch.zeros(0, 0), torch.full((3,), 10**12),
                                   torch.full((2,), -1), torch.zeros(2, 2, 2)])  # fmt: skip
def test_a_result_with_other_tensors_is_answered_in_one_line(result, tmp_path, suffix, other):
    folder = copied(result, tmp_path / "out")
    tensors = load_file(folder / MODEL)
    tensors[UP + suffix] = other
    save_file(tensors, folder / MODEL, metadata={"format": "pt"})
    with walls(tmp_path):
        with pytest.raises(VerificationError):
            fewbits.verify(folder)
        with pytest.raises(InputError) as caught:
            fewbits.load(folder)
    assert str(caught.value).isprintable()


def test_a_model_far_larger_than_its_files_is_not_built(whole, tmp_path):
    folder = copied(whole, tmp_path / "model")
    tensors = {n: t for n, t in load_file(folder / MODEL).items() if ".mlp." not in n}
    save_file(tensors, folder / MODEL, metadata={"format": "pt"})
    change_json(folder / CONFIG, intermediate_size=2**20)
    with walls(tmp_path), pytest.raises(InputError, match="asks for"):
        fewbits.load(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused(whole, tmp_path):
    folder = copied(whole, tmp_path / "model")
    (folder / MODEL).chmod(0)
    refused(run("plan", folder, "--no-probe"), MODEL, "Permission denied")


def test_errors_hold_no_control_characters():
    assert str(InputError("a\nb\x1b[2J")) == r"a\nb\x1b[2J"
    assert issubclass(VerificationError, FewbitsError)


def test_a_folder_is_not_changed_by_reading_it(whole):
    before = listing(whole)
    open_checkpoint(whole)
    functools.reduce(lambda _, read: read(whole), (load_tokenizer, fewbits.load), None)
    assert listing(whole) == before


def test_whole_numbers_in_the_place_of_floats_are_not_loaded(whole, tmp_path):
    folder = copied(whole, tmp_path / "model")
    tensors = load_file(folder / MODEL)
    save_file(tensors | {UP: tensors[UP].view(torch.int16)}, folder / MODEL, metadata={"format": "pt"})
    assert UP in said(fewbits.load, folder)


def test_json_of_too_many_values_is_refused_before_it_is_parsed(tmp_path):
    (tmp_path / "config.json").write_text('{"a":[' + "1," * MAX_VALUES + "1]}")
    with pytest.raises(InputError, match=rf"holds {MAX_VALUES + 2} values; accepted are {MAX_VALUES}"):
        read_json(tmp_path / "config.json")
