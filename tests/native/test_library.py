"""The native library is found, mirrored as fewbits.h has it, turned off, refused if it is another."""

import importlib
import re
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

import pytest
import torch

from fewbits.errors import InputError

native = importlib.import_module("fewbits.native.library")  # a function has its name too
SOURCES = Path(native.__file__).parent
HEADER = (SOURCES / "fewbits.h").read_text()


@pytest.fixture
def found(monkeypatch) -> native.Library:
    monkeypatch.delenv("FEWBITS_NATIVE", raising=False)
    library = native.library()
    if library is None:
        pytest.skip(f"the native library {native.why_absent()}")
    return library


def test_the_structures_and_the_numbers_are_those_of_the_header():
    c_names = {"int64_t": "c_long", "int32_t": "c_int", "float": "c_float", "*": "c_void_p"}
    mirrors = {
        "weight": native.Weight,
        "columns": native.Columns,
        "grids": native.Grids,
        "attention": native.Attention,
        "few": native.Few,
    }
    for name, mirror in mirrors.items():
        struct = re.search(rf"typedef struct \{{([^}}]*)\}} fewbits_{name};", HEADER)
        assert struct
        fields = re.findall(r"^  (?:const )?(\w+) (\*?)(\w+)(\[3\])?;", struct[1], re.MULTILINE)
        expected = [
            (name, c_names[star or kind] + ("_Array_3" if three else ""))
            for kind, star, name, three in fields
        ]
        assert [(name.removesuffix("_"), kind.__name__) for name, kind in mirror._fields_] == expected
    numbers = dict(re.findall(r"FEWBITS_(\w+) = (\d+)", HEADER))
    types = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    assert {name: str(native.TYPES[dtype]) for name, dtype in types.items()}.items() <= numbers.items()
    others = ("MIDDLE", "ZERO_POINT", "OFFSET", "TABLE", "TRELLIS", "INPUTS_16", "INPUTS_8", "INPUTS_32")
    assert {name: str(getattr(native, name)) for name in others}.items() <= numbers.items()
    assert {isa.upper(): str(i) for i, isa in enumerate(native.ISAS)}.items() <= numbers.items()
    assert f"#define FEWBITS_INTERFACE {native.INTERFACE}\n" in HEADER


def test_every_function_takes_as_many_arguments_as_its_prototype(found):
    prototypes = re.findall(r"FEWBITS_API \w+ (fewbits_\w+)\((.*?)\);", HEADER, re.DOTALL)
    assert len(prototypes) == 18
    for name, arguments in prototypes:
        if name != "fewbits_interface":  # called before anything else is believed
            count = 0 if arguments == "void" else len(arguments.split(","))
            assert len(getattr(found._c, name).argtypes) == count, name


def test_it_is_turned_off_and_on_and_nothing_else(monkeypatch):
    monkeypatch.setenv("FEWBITS_NATIVE", "0")
    assert native.library() is None
    assert native.why_absent() == "is turned off by FEWBITS_NATIVE=0"
    assert native.summary() == "none: it is turned off by FEWBITS_NATIVE=0"
    monkeypatch.setenv("FEWBITS_NATIVE", "no")
    with pytest.raises(InputError, match=r"FEWBITS_NATIVE is 'no'; 0 .off. and 1 .on. are accepted"):
        native.library()


def test_another_library_is_refused_before_it_is_called(monkeypatch, tmp_path):
    other = find_library("m")
    if other is None:
        pytest.skip("no other library to be had")
    with pytest.raises(ValueError, match="has interface None, not"):
        native.Library(Path(other))
    (tmp_path / native._FILE).write_bytes(b"no library")
    monkeypatch.delenv("FEWBITS_NATIVE", raising=False)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "library.py"))
    native._open.cache_clear()
    try:
        assert native.library() is None
        assert (native.why_absent() or "").startswith("cannot be used: ")
    finally:
        native._open.cache_clear()


@pytest.mark.parametrize("isa", native.ISAS)
def test_each_instruction_set_gives_what_plain_torch_gives(found, isa):
    if not found.use(isa):
        pytest.skip(f"{isa} does not run here")
    try:
        assert found.isa == isa
        codes = torch.randint(0, 16, (37, 100), dtype=torch.uint8)
        zeros = torch.randint(-8, 8, (2, 2, 32), dtype=torch.int8)
        scales = torch.rand(2, 2, 32).half()
        packed = found.pack(codes, 4, 128)
        weight = native.describe((37, 100), 4, 64, packed, scales, native.ZERO_POINT, zeros)
        scale, zero = (t.movedim(1, 2).flatten(0, 1)[:37].float() for t in (scales, zeros))
        scale, zero = (t.repeat_interleave(64, 1)[:, :100] for t in (scale, zero))
        exact = scale * (codes.float() - 8 - zero)
        assert torch.equal(found.unpack(weight, torch.float32), exact)
        wide = torch.randn(20, 200)
        x = wide[:, :100]  # rows that lie apart
        y = found.linear(weight, x)
        bias = torch.randn(37)
        assert torch.equal(found.linear(weight, x, bias), y + bias)
        assert torch.equal(found.linear(weight, x.contiguous(), threads=3), y)
        # 100 products and a few steps more in float, of numbers that may be summed from code 0; and half
        # a step of x: of those that share it, the largest is at least so many.
        sizes = (scale * (codes + 8.0 + zero.abs())).double().sum(1)
        values = exact.abs().double().sum(1)
        for inputs, steps in (
            (native.INPUTS_16, 2**15 - 1),
            (native.INPUTS_8, 127),
            (native.INPUTS_32, 2**29),
        ):
            error = (found.linear(weight, x, None, inputs) - x.double() @ exact.double().T).abs()
            most = x.abs().amax(1, keepdim=True).double()
            assert bool((error <= most * (116 * 2.0**-23 * sizes + values / (2 * steps))).all()), inputs
    finally:
        found.use(None)


def test_what_does_not_fit_is_refused_before_it_is_read(found):
    codes, scales = torch.zeros(4, 40, dtype=torch.uint8), torch.ones(1, 2, 32)
    packed = found.pack(codes, 4, 64)
    weight = native.describe((4, 40), 4, 32, packed, scales)
    for wrong, words in [
        (lambda: native.describe((4, 40), 4, 32, packed[:-1], scales), "codes are 1023 of"),
        (lambda: native.describe((4, 40), 4, 32, packed, scales.double()), "scales are torch.float64"),
        (lambda: native.describe((4, 40), 4, 32, packed, scales[:, 1:]), "scales are 32 of"),
        (lambda: native.describe((4, 40), 4, 32, packed, scales, native.OFFSET), "zeros are missing"),
        (lambda: native.describe((4, 40), 4, 32, packed, scales, zeros=scales), "zeros have no use"),
        (lambda: found.pack(codes, 5, 64), "4 x 40 codes of 5 bits"),
        (lambda: found.linear(weight, torch.ones(1, 41)), "W has 40"),
        (lambda: found.linear(weight, torch.ones(1, 40), torch.ones(4).half()), "bias are 4 of"),
    ]:
        with pytest.raises(ValueError, match=words):
            wrong()


ONE_TEAM = """
import os, sys, torch
from fewbits.native.library import describe, library
torch.set_num_threads(4)
torch.ones(2000000).exp_()
codes = torch.zeros(512, 4096, dtype=torch.uint8)
found = library()
weight = describe((512, 4096), 4, 4096, found.pack(codes, 4, 4096), torch.ones(16, 1, 32))
before = len(os.listdir("/proc/self/task"))
found.linear(weight, torch.ones(1, 4096))
after = len(os.listdir("/proc/self/task"))
found._parallel = None
found.linear(weight, torch.ones(1, 4096))
print(before, after, len(os.listdir("/proc/self/task")))
"""


def test_the_threads_of_torch_are_used_and_no_others(found):
    if found.threads != "torch's":
        pytest.skip("torch has no threads that can be used")
    done = subprocess.run([sys.executable, "-c", ONE_TEAM], capture_output=True, text=True, check=True)
    before, after, own = map(int, done.stdout.split())
    assert after == before
    assert own == before + 3  # of its own there would be three more: the test can see them
