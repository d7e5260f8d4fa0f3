"""The lesson runs: its code prints what it says it prints, and draws its pictures.

Its claims are asserted by the lesson's own code. Run as a script with --write, this file puts the output
and the pictures of a run into the lesson.
"""

import argparse
import contextlib
import io
import math
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LESSON = ROOT / "docs/lesson.md"
PICTURES = ROOT / "docs/lesson"
MOST_BYTES = 40_000  # of a picture

_BLOCK = re.compile(r"```python\n(?P<code>.*?)```\n(?:\n```text\n(?P<output>.*?)```\n)?", re.DOTALL)
_PICTURE = re.compile(r"!\[(?P<alt>[^\]]*)\]\(lesson/(?P<name>[^)]+)\)")
_TEXT = re.compile(r"\d+ modules of .* Python 3\.\S+ \w+ split, sha256 [0-9a-f]{16}")
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
_PAIR = re.compile(rf"({_NUMBER.pattern}) ± ({_NUMBER.pattern})")

# A machine that calibrates in float32 instead of bfloat16, or sums in another order, rounds some weights
# the other way. In float32 and with two threads (2026-11-25) figures moved by 5 % and 2.3 errors.
RELATIVE = 0.1
# The text is the standard library's own. Of another Python it is another sample: estimates from two
# samples differ by more than 4 errors of their difference once in 16,000.
ERRORS = 4


def run(folder):
    """What each block prints; pictures and models are left in the folder."""
    import matplotlib

    for name in ("reference", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    text, names, outputs = LESSON.read_text(encoding="utf-8"), {"__name__": "lesson"}, []
    path, home = list(sys.path), Path.cwd()
    os.chdir(folder)
    try:
        with matplotlib.rc_context():
            for match in _BLOCK.finditer(text):
                above = text[: match.start("code")].count("\n")  # errors then name lines of the lesson
                code = compile("\n" * above + match["code"], str(LESSON), "exec")
                begun = time.monotonic()
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(code, names)
                outputs.append(out.getvalue())
                print(f"line {above}: {time.monotonic() - begun:.1f} s", file=sys.stderr)
    finally:
        os.chdir(home)
        sys.path[:] = path
    return outputs


def differences(shown, printed):
    """What is not alike in two outputs: their words, or numbers further apart than they may be."""
    masked = [_NUMBER.sub("#", _TEXT.sub("the text", each)).split() for each in (shown, printed)]
    if masked[0] != masked[1]:
        return [f"shown:\n{shown}\nprinted:\n{printed}"]
    found = []
    pairs = zip(_PAIR.findall(shown), _PAIR.findall(printed), strict=True)
    for (a, error_a), (b, error_b) in pairs:
        if abs(float(a) - float(b)) > ERRORS * math.hypot(float(error_a), float(error_b)):
            found.append(f"{a} ± {error_a} is shown, {b} ± {error_b} was printed")
    return found


def far_numbers(shown, printed):
    """Numbers that are shown without an error and differ by more than the tolerance."""
    values = [_NUMBER.findall(_PAIR.sub("", _TEXT.sub("", each))) for each in (shown, printed)]
    return [
        f"{a} is shown, {b} was printed"
        for a, b in zip(*values, strict=True)
        if abs(float(a) - float(b)) > RELATIVE * abs(float(a))
    ]


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    pytest.importorskip("peft", reason="PEFT is not installed")
    folder = tmp_path_factory.mktemp("lesson")
    return folder, run(folder)


@pytest.mark.slow
def test_the_lesson_prints_what_it_shows(lesson):
    text = LESSON.read_text(encoding="utf-8")
    shown = [match["output"] or "" for match in _BLOCK.finditer(text)]
    same_text = _TEXT.findall("".join(shown)) == _TEXT.findall("".join(lesson[1]))
    found = []
    for each, printed in zip(shown, lesson[1], strict=True):
        wrong = differences(each, printed)
        found += wrong or (far_numbers(each, printed) if same_text else [])
    assert not found, "\n".join(found)


@pytest.mark.slow
def test_the_lesson_draws_its_pictures(lesson):
    drawn = {path.name for path in (lesson[0] / "lesson").iterdir()}
    assert drawn == {match["name"] for match in _PICTURE.finditer(LESSON.read_text(encoding="utf-8"))}


def test_pictures_are_small_and_described():
    shown = list(_PICTURE.finditer(LESSON.read_text(encoding="utf-8")))
    assert {match["name"] for match in shown} == {path.name for path in PICTURES.iterdir()}
    assert all(len(match["alt"].split()) > 5 for match in shown)
    sizes = {path.name: path.stat().st_size for path in PICTURES.iterdir()}
    assert max(sizes.values()) < MOST_BYTES, sizes


@pytest.mark.parametrize(
    "printed",
    ["KL 0.010 ± 0.001, 7 bytes", "KL 0.017 ± 0.001, 9 bytes", "KL 0.010 ± 0.001, 9 bits"],
    ids=["a number", "an estimate", "a word"],
)
def test_other_output_is_seen(printed):
    shown = "KL 0.010 ± 0.001, 9 bytes"
    assert not differences(shown, shown)
    assert not far_numbers(shown, shown)
    assert differences(shown, printed) or far_numbers(shown, printed)


def write():
    """Run the lesson, and put what it prints and draws into it."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = iter(run(Path(folder)))

        def with_output(match):
            output = next(outputs)
            shown = f"\n```text\n{output.rstrip()}\n```\n" if output.strip() else ""
            return f"```python\n{match['code']}```\n{shown}"

        text = _BLOCK.sub(with_output, LESSON.read_text(encoding="utf-8"))
        LESSON.write_text(text, encoding="utf-8")
        shutil.rmtree(PICTURES, ignore_errors=True)
        shutil.copytree(Path(folder) / "lesson", PICTURES)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", required=True)
    parser.parse_args()
    write()
