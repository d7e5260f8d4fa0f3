"""What our GGUF files are worth in llama.cpp: the loss there and here, and KL beside its own blocks.

The reference model, on held-out text. llama.cpp runs every file (cache in float32); its own quantizer
makes Q4_0 and Q4_K of our float file: of the same matrices as ours, and once with the embeddings, its
default. It is given no importance matrix.

Run:  make interop     (makes the environment)
      python benchmarks/gguf_quality.py --python build/interop/llama-cpp/bin/python
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LENGTH, WINDOWS, SAMPLES = 256, 64, 128
OURS = {
    "rtn Q4_0": {"method": "rtn", "scheme": "w4-g32"},
    "gptq Q4_0": {"method": "gptq", "scheme": "w4-g32"},
    "rtn Q4_1": {"method": "rtn", "scheme": "w4-g32-asym"},
    "gptq Q4_1": {"method": "gptq", "scheme": "w4-g32-asym"},
    "rtn Q8_0": {"method": "rtn", "scheme": "w8-g32"},
    "Q4_K": {"method": "q4_k", "scheme": "w4-g32-asym-k"},
    "weighted Q4_K": {"method": "q4_k", "scheme": "w4-g32-asym-k", "calibrated": True},
}
THEIRS = {
    "llama.cpp Q4_0": ("Q4_0", "as ours"),
    "llama.cpp Q4_0, embeddings too": ("Q4_0", "default"),
    "llama.cpp Q4_K": ("Q4_K_S", "as ours"),
}


# -- in llama.cpp's environment: numpy and llama_cpp alone ---------------------------------------------


def run_llama(file: str, ids: str, out: str) -> None:
    """Logits of every window, to a file."""
    import llama_cpp
    import numpy as np

    usual = llama_cpp.llama_model_default_params

    def plain_layout() -> llama_cpp.llama_model_params:
        """Weights as they lie in the file: laid out for AMX, small models crash it (0.3.36)."""
        params = usual()
        params.use_extra_bufts = False
        return params

    tokens = np.load(ids)
    llama_cpp.llama_cpp.llama_model_default_params = plain_layout
    model = llama_cpp.Llama(
        file,
        n_ctx=LENGTH,
        n_batch=LENGTH,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    logits = []
    for row in tokens.tolist():
        model.reset()
        model.eval(row)
        logits.append(np.array(model.scores[: len(row)], dtype=np.float32))
    np.save(out, np.stack(logits))


def quantize_llama(source: str, out: str, kind: str, how: str) -> None:
    """What llama.cpp's own quantizer makes of a float file."""
    import ctypes

    from gguf import GGMLQuantizationType
    from llama_cpp import llama_cpp as native

    params = native.llama_model_quantize_default_params()
    params.ftype = getattr(native, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if how == "as ours":  # embeddings and head as they are in our files
        params.token_embedding_type = params.output_tensor_type = int(GGMLQuantizationType.BF16)
        params.pure = True
    if native.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params)):
        sys.exit("llama_model_quantize failed")


# -- here ----------------------------------------------------------------------------------------------


def judge(logits: Any, exact: Any, ids: Any) -> dict[str, Any]:
    """Mean loss and KL to the float model over the windows, each with its standard error."""
    import torch
    import torch.nn.functional as F

    from fewbits.estimate import ratio_estimate

    ours, theirs = (F.log_softmax(x.double(), -1) for x in (logits, exact))
    loss = -ours[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    kl = (theirs.exp() * (theirs - ours)).sum(-1)[:, :-1]
    counts = torch.full((len(ids),), LENGTH - 1.0, dtype=torch.float64)
    found = {}
    for name, values in (("loss", loss), ("kl", kl)):
        estimate = ratio_estimate(values.sum(-1), counts)
        found[name], found[f"{name}_error"] = estimate.value, estimate.error
    found["per_window"] = torch.stack([loss.mean(-1), kl.mean(-1)]).tolist()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default="build/interop/llama-cpp/bin/python")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        what, *more = args.inside
        {"run": run_llama, "quantize": quantize_llama}[what](*more)
        return
    with tempfile.TemporaryDirectory() as folder:
        results = compare(Path(folder), args.python)
    for name, found in results.items():
        print(
            f"{name:32} loss {found['loss']:.5f} +- {found['loss_error']:.5f}   "
            f"KL {found['kl']:.6f} +- {found['kl_error']:.6f}"
        )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    check(results)


def compare(folder: Path, python: str) -> dict[str, dict[str, Any]]:
    import numpy as np
    import torch

    import fewbits
    from fewbits.scheme import QuantScheme
    from samples import MODELS, calibration_ids, heldout_ids, prepare

    sample = MODELS["reference"]
    source = prepare(sample, folder)  # in bfloat16
    calibration = calibration_ids(source, sample, SAMPLES, LENGTH, seed=0)
    ids = heldout_ids(source, sample, WINDOWS, LENGTH)
    np.save(folder / "ids.npy", ids.numpy())
    exact = _logits(fewbits.load(source, dtype=torch.float32), ids)

    def there(file: Path) -> Any:
        out = folder / "logits.npy"
        command = [python, __file__, "--inside", "run", str(file), str(folder / "ids.npy"), str(out)]
        subprocess.run(command, check=True)
        return torch.from_numpy(np.load(out))

    results: dict[str, dict[str, Any]] = {}
    for name, asked in OURS.items():
        calibrated = asked.get("calibrated", asked["method"] == "gptq")
        given = {"calibration": calibration} if calibrated else {}
        out = folder / name.replace(" ", "-")
        scheme = QuantScheme.parse(asked["scheme"])
        fewbits.quantize(source, out, method=asked["method"], scheme=scheme, format="gguf", **given)
        results[f"{name} in llama.cpp"] = judge(there(out / "model.gguf"), exact, ids)
        here = _logits(fewbits.load(out, dtype=torch.float32), ids)
        results[f"{name} here"] = judge(here, exact, ids)
    plain = folder / "float.gguf"
    _write_float(source, plain)
    results["float in llama.cpp"] = judge(there(plain), exact, ids)
    for name, how in THEIRS.items():
        out = folder / "theirs.gguf"
        command = [python, __file__, "--inside", "quantize", str(plain), str(out), *how]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)  # it tells of every tensor
        results[name] = judge(there(out), exact, ids)
    return results


def _logits(model: Any, ids: Any) -> Any:
    import torch

    with torch.no_grad():
        return torch.cat([model(row[None]).logits.float() for row in ids])


def _write_float(source: Path, file: Path) -> None:
    from fewbits.checkpoint import open_checkpoint
    from fewbits.gguf_file import write_gguf

    opened = open_checkpoint(source)
    write_gguf(file, source, opened.config, list(opened.tensors.values()), opened.read)


def check(results: dict[str, dict[str, Any]]) -> None:
    """The same loss there as here, within the error of either; calibrated ones better than its own."""
    for name in OURS:
        here, there = results[f"{name} here"], results[f"{name} in llama.cpp"]
        assert abs(here["loss"] - there["loss"]) < there["loss_error"], name
    for ours, theirs in (("gptq Q4_0", "Q4_0"), ("weighted Q4_K", "Q4_K")):
        _check_better(f"{ours} in llama.cpp", f"llama.cpp {theirs}", results)


def _check_better(name: str, other: str, results: dict[str, dict[str, Any]]) -> None:
    """The KL of one is smaller than that of the other, by more than its standard error twice."""
    ours, theirs = results[name], results[other]
    pairs = zip(ours["per_window"][1], theirs["per_window"][1], strict=True)
    gains = [b - a for a, b in pairs]
    mean = sum(gains) / len(gains)
    error = (sum((g - mean) ** 2 for g in gains) / (len(gains) - 1) / len(gains)) ** 0.5
    print(f"KL of {other} over that of {name}: {theirs['kl'] / ours['kl']:.3f}")
    assert mean > 2 * error, (name, mean, error)


if __name__ == "__main__":
    main()
