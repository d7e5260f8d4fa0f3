"""The text of the reference model: the Python standard library's own source.

Every Python installation holds it, so demo, calibration and evaluation need no download. Files are
split by a hash of the module's name, so a module is on the same side under every Python version.

Run:  python reference/corpus.py heldout OUT.jsonl      (or: train)
"""

import argparse
import hashlib
import json
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Tests (some distributions omit them), character tables, generated and machine-specific files.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}
HELD_OUT_SHARE = 16  # one module in sixteen; not tuned


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
        if is_heldout(module) == (split == "heldout"):
            yield module, path.read_text(encoding="utf-8", errors="replace")


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
