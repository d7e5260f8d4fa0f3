"""The native library, for tests of what it does in every instruction set."""

import importlib

import pytest

native = importlib.import_module("fewbits.native.library")


@pytest.fixture
def found(monkeypatch):
    monkeypatch.delenv("FEWBITS_NATIVE", raising=False)
    library = native.library()
    if library is None:
        pytest.skip(f"the native library {native.why_absent()}")
    yield library
    library.use(None)
