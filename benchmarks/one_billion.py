"""Speed and memory columns of the trade-off table for a random model in the shape of 1B models.

The reference model is so small that its speed is overhead; this one is bound by what it computes and
reads, and its quality means nothing. Asserted are ratios measured in this run: what a process takes to
hold and run a quantized model is at most 1.1 times its tensors, and none decodes slower than bfloat16.

Run, with nothing else on the machine:  python benchmarks/one_billion.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import torch

from memory import VOCABULARY, make_checkpoint

BLOCKS = 16
RESIDENT = 1.1  # times the bytes of a model's tensors; the rest is work space. Not tuned.


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    model = folder / "llama-1b-random"
    if not model.is_dir():
        make_checkpoint(model, BLOCKS)
    from rich.console import Console

    import fewbits
    from fewbits.compare import Candidate
    from fewbits.report.table import comparison_facts, comparison_tables

    ids = torch.randint(VOCABULARY, (4, 512), generator=torch.Generator().manual_seed(0))
    candidates = Candidate.all(["int8", "llm-int8", "rtn"], [4])
    found = fewbits.compare(
        model, folder / "compare", candidates=candidates, text=None, calibration=ids, inspect=False
    )
    console = Console(width=200, soft_wrap=True)
    for table in comparison_tables(found):
        console.print(table)
    for line in comparison_facts(found):
        console.print(line, highlight=False)
    source = found.rows[0]
    failed = []
    for row in found.rows[1:]:
        share = row.resident_bytes / source.resident_bytes
        print(
            f"{row.name}: resident {share:.2f} of the source's, decodes {row.decode_ratio} times as fast"
        )
        if row.resident_bytes > RESIDENT * row.speed.tensor_bytes:
            failed.append(f"{row.name}: resident {row.resident_bytes}, tensors {row.speed.tensor_bytes}")
        if row.decode_ratio.value < 1:
            failed.append(f"{row.name}: decodes {row.decode_ratio} times as fast, limit 1")
    sys.exit("\n".join(failed) or None)


if __name__ == "__main__":
    main()
