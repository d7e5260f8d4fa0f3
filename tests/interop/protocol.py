"""What every client is asked, and how it answers. Needs numpy alone: some clients have no torch.

A client is a script that is run as  `python client_X.py WORK`. WORK holds

    tokens.npy    (4, 64): what the model is run on
    prompt.npy    (n,): what it goes on from
    jobs.json     [{"checkpoint": folder, "result": file without suffix, "vocabulary": n, ...}, ...]

and gets, for each job, RESULT.npz with `logits` (4, 64, vocabulary) and `text`, NEW_TOKENS that are each
the most likely after those before, or RESULT.error with the exception in a line. RESULT.how: what ran.
"""

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

NEW_TOKENS = 32


class Answer(NamedTuple):
    """Of a client, for one checkpoint."""

    logits: np.ndarray
    text: np.ndarray
    how: str


Run = Callable[[dict[str, Any], np.ndarray, np.ndarray], Answer]


def answer(run: Run) -> None:
    """Do all jobs of the folder that the command line names; none keeps the next from being done."""
    work = Path(sys.argv[1])
    tokens, prompt = np.load(work / "tokens.npy"), np.load(work / "prompt.npy")
    for job in json.loads((work / "jobs.json").read_text()):
        result = Path(job["result"])
        print(f"--- {job['checkpoint']}", file=sys.stderr, flush=True)
        try:
            logits, text, how = run(job, tokens % job["vocabulary"], prompt % job["vocabulary"])
        except Exception as error:
            traceback.print_exc()
            result.with_suffix(".error").write_text(one_line(error))
            continue
        assert logits.shape[:2] == tokens.shape, logits.shape
        assert text.shape == (NEW_TOKENS,), text.shape
        result.with_suffix(".how").write_text(how)
        np.savez(result.with_suffix(".part.npz"), logits=logits.astype(np.float32), text=text)
        result.with_suffix(".part.npz").rename(result.with_suffix(".npz"))


def one_line(error: BaseException) -> str:
    """Its type and message."""
    return " ".join(f"{type(error).__name__}: {error}".split())
