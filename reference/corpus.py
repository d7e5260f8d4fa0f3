"""The text of the reference model: the Python standard library's own source.

Every Python installation holds it, so demo, calibration and evaluation need no download. Files are
split by a hash of the module's name. Modules get other names between versions (`zipfile` of 3.11 is
`zipfile.__init__` of 3.12), so checksums of the lines that were trained on are kept beside the model,
and a module that is mostly made of them is held out no longer.

Run:  python reference/corpus.py heldout OUT.jsonl      (or: train)
"""

import argparse
import array
import functools
import hashlib
import json
import platform
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

# Tests (some distributions omit them), character tables, generated and machine-specific files.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}
HELD_OUT_SHARE = 16  # one module in sixteen; not tuned
TRAINED_LINES = Path(__file__).parent / "trained_lines.crc32"  # uint32, little-endian, sorted
LONG = 30  # characters: shorter lines, like `import os`, are everybody's
# Of a module's long lines. On 3.11, the version trained on, no module has more than 0.45; zipfile
# under its new name has 0.96 (2026-11-23).
SEEN_SHARE = 0.5


def is_heldout(module: str) -> bool:
    """Whether a module, named like `json.decoder`, is kept from training."""
    return hashlib.sha256(module.encode()).digest()[0] % HELD_OUT_SHARE == 0


def documents(split: str) -> Iterator[tuple[str, str]]:
    """Module name and source text of one split, "train" or "heldout", sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        generated = parts[0].startswith(("_sysconfigdata", "config-"))
        if LEFT_OUT & set(parts) or generated:
            continue
        module = ".".join(parts)
        if is_heldout(module) != (split == "heldout"):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if split == "train" or not was_trained_on(text):
            yield module, text


def line_checksums(text: str) -> list[int]:
    """Of its long lines."""
    lines = (line.strip() for line in text.splitlines())
    return [zlib.crc32(line.encode()) for line in lines if len(line) >= LONG]


@functools.cache
def trained_lines() -> frozenset[int]:
    """Checksums of all long lines that the committed model was trained on."""
    checksums = array.array("I")
    if TRAINED_LINES.exists():
        checksums.frombytes(TRAINED_LINES.read_bytes())
    return frozenset(checksums)


def was_trained_on(text: str) -> bool:
    """Whether most of the text is known to the committed model, under whatever name."""
    checksums = line_checksums(text)
    seen = sum(checksum in trained_lines() for checksum in checksums)
    return seen > SEEN_SHARE * len(checksums)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("split", choices=("train", "heldout"))
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    modules = dict(documents(args.split))
    rows = [json.dumps({"module": m, "text": t}) + "\n" for m, t in modules.items()]
    args.out.write_text("".join(rows), encoding="utf-8")
    # The hash that `fewbits evaluate` prints: of the texts as one JSON list.
    digest = hashlib.sha256(json.dumps(list(modules.values())).encode()).hexdigest()
    print(
        f"{args.out}: {len(rows)} modules of the standard library of Python "
        f"{platform.python_version()}, {args.split} split, sha256 {digest[:16]}"
    )


if __name__ == "__main__":
    main()
