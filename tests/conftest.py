"""What every test gets: `oracles`, `checks` and `models` on the path, and the same random numbers."""

import os
import sys
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
