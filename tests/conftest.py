"""What every test gets: `oracles`, `checks` and `models` on the path, and the same random numbers."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("checks")  # its asserts show their values, as a test's own do


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models are too small for two: they would wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def float32_products() -> Iterator[None]:
    """Also where the processor is faster in bfloat16: its rounding would hide what is compared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewbits.stream.fast_dtype", lambda *_: None)
        yield
