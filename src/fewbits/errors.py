"""Every failure that fewbits reports on purpose, and the exit code of each.

    FewbitsError
    ├── InputError           the arguments or the model are wrong              2
    ├── ResourceError        the machine failed: a full disk, no memory        1
    └── VerificationError    a checkpoint is not what its ledger says          3

The message is one line: what is wrong, which value, and what would be accepted.
"""


class FewbitsError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 1

    def __str__(self) -> str:
        """One line, whatever names from files are in it: control characters are escaped."""
        return one_line(super().__str__())


class InputError(FewbitsError, ValueError):
    """The arguments, the model or a file of the user are wrong."""

    exit_code = 2


class ResourceError(FewbitsError, OSError):
    """The machine failed: the disk is full, memory is short."""

    exit_code = 1


class VerificationError(FewbitsError):
    """A written checkpoint differs from its ledger."""

    exit_code = 3


def one_line(text: str) -> str:
    r"""The text with all that is no printable character escaped.

    >>> print(one_line("a\n\x1b[2Jb"), one_line("ä \ud800"))
    a\n\x1b[2Jb ä \ud800
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line; its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
