"""Chat templates of strangers, each rendered in a process of its own with bounded time and memory.

A template is a program in jinja. transformers runs it in jinja's sandbox, which keeps it away from files
and from Python, not from loops that do not end or from strings without end.
"""

import json
import os
import select
import subprocess
import sys
import threading
import time
from typing import Any

from fewbits.errors import first_line

SECONDS = 10  # for one conversation; templates take milliseconds. Not tuned.
MEMORY_BYTES = 2**31  # of the process, some 3 * 10**8 of them Python's and transformers'. Not tuned.
_START_S = 120  # until that process is ready; 0.7 on a fast disk
_MAX_ANSWER = 2**27  # bytes; not tuned

_CHILD = f"""
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY_BYTES}, {MEMORY_BYTES}))
from transformers.utils.chat_template_utils import render_jinja_template
print(flush=True)
for line in sys.stdin:
    template, messages, special = json.loads(line)
    try:
        rendered, _ = render_jinja_template([messages], chat_template=template, **special)
        answer = [rendered[0], None]
    except BaseException as error:
        answer = [None, str(error).strip() or type(error).__name__]
    print(json.dumps(answer), flush=True)
"""


class _Child:
    """The process: a line of JSON in, a line of JSON out."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._line(time.monotonic() + _START_S)

    def ask(self, question: list[Any]) -> list[Any]:
        """The answer to one question; see `_CHILD`."""
        assert self.process.stdin is not None
        text = json.dumps(question).encode() + b"\n"
        self.process.stdin.write(text)
        self.process.stdin.flush()
        answer: list[Any] = json.loads(self._line(time.monotonic() + SECONDS))
        return answer

    def _line(self, deadline: float) -> bytes:
        assert self.process.stdout is not None
        handle, pieces, size = self.process.stdout.fileno(), [b""], 0
        while not pieces[-1].endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([handle], [], [], left)[0]:
                raise TimeoutError(f"it runs for more than {SECONDS} s")
            pieces.append(os.read(handle, 2**20))
            size += len(pieces[-1])
            if not pieces[-1]:
                raise EOFError(f"its process ended; it may have {MEMORY_BYTES} bytes of memory")
            if size > _MAX_ANSWER:
                raise ValueError(f"it makes more than {_MAX_ANSWER} bytes of one conversation")
        return b"".join(pieces)

    def end(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.communicate()


_lock = threading.Lock()
_child: _Child | None = None


def render(template: str, messages: list[dict[str, Any]], special: dict[str, Any]) -> str:
    """A conversation as the template writes it.

    Args:
        template: in jinja.
        messages: of the conversation, as JSON has them.
        special: the names of special tokens, and the tokens.

    Raises:
        ValueError: the template refuses the messages, or takes too long or too much memory.
    """
    global _child
    with _lock:
        try:
            _child = _child or _Child()
            text, error = _child.ask([template, messages, special])
        except BaseException as failure:  # whatever it is, Ctrl-C too: the next question is not answered
            if _child is not None:
                _child.end()
            _child = None
            if isinstance(failure, Exception):
                raise ValueError(first_line(failure)) from None
            raise
    if text is None:
        raise ValueError(error)
    return str(text)
