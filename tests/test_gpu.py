"""Blocks run and rounded on a GPU; what is refused where there is none."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch

import fewbits
from fewbits.checkpoint import open_checkpoint
from fewbits.errors import InputError
from fewbits.kernels import Triton
from fewbits.linear import QuantizedEmbedding, QuantizedLinear
from fewbits.load import find_device, load
from fewbits.scheme import QuantScheme
from fewbits.stream import Stream
from models import VOCABULARY, tiny_checkpoint

G32 = QuantScheme(4, "group", 32)
IDS = torch.randint(3, VOCABULARY, (12, 48), generator=torch.Generator().manual_seed(0))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on a GPU, and there is none")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    for kind in ("llama", "mixtral"):
        torch.manual_seed(0)
        tiny_checkpoint(folder / kind, kind)
    return folder


def test_a_device_that_is_not_there_is_refused_by_name(sources, tmp_path):
    for name in ("gpu", "cuda:99", "mps", "meta"):
        with pytest.raises(InputError, match=f"device {name}; accepted is cpu"):
            find_device(name)
    with pytest.raises(InputError, match="device tpu"):
        fewbits.quantize(sources / "llama", tmp_path / "out", device="tpu")
    assert not list(tmp_path.iterdir())
    assert find_device(torch.device("cpu")) == find_device("cpu") == torch.device("cpu")


@needs_gpu
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("method", ["gptq", "awq+gptq", "weighted-rtn"])
def test_a_model_is_quantized_there_as_well_as_here(sources, tmp_path, monkeypatch, kind, method):
    if kind == "mixtral":  # whose routers choose otherwise where bfloat16 is rounded otherwise
        monkeypatch.setattr("fewbits.stream.fast_dtype", lambda *_: None)
    source = sources / kind
    arguments = {"method": method, "scheme": G32, "calibration": IDS}
    here = fewbits.quantize(source, tmp_path / "here", **arguments)
    there = fewbits.quantize(source, tmp_path / "there", device="cuda", **arguments)
    assert not there.verification.problems
    assert there.run["gpu_memory_bytes"] > 0
    assert there.ledger.made_with["device"] == torch.cuda.get_device_name()
    # The first block is given the same states; those of later ones are rounded to bfloat16 on the way.
    first, other = here.ledger.blocks[0], there.ledger.blocks[0]
    assert other["nearest"] == pytest.approx(first["nearest"], rel=1e-3)
    for i, (own, other) in enumerate(zip(here.ledger.blocks, there.ledger.blocks, strict=True)):
        assert other["error"] < other["nearest"]
        keys = ("name", "method", "tokens") if i == 0 or kind == "llama" else ("name", "method")
        for a, b in zip(own["matrices"], other["matrices"], strict=True):
            assert [a[key] for key in keys] == [b[key] for key in keys]
    assert there.ledger.blocks[-1]["kl"] <= 1.2 * here.ledger.blocks[-1]["kl"]
    again = fewbits.quantize(source, tmp_path / "again", device="cuda", **arguments)
    assert again.ledger.files == there.ledger.files


@torch.no_grad()
def undecided(source):
    """How many tokens devices may send to other experts of the first block, of the same states.

    Where the logits of the second and third expert are further apart than twice what either device is
    off, both choose the same two.
    """
    logits = []
    for device in ("cpu", "cpu", "cuda"):
        stream = Stream(open_checkpoint(source), IDS, device=torch.device(device))
        block = stream.load(0)
        block.mlp.gate.register_forward_hook(lambda _, __, out: logits.append(out[0].cpu().double()))
        with stream.in_fast_dtype(0, block) if logits else nullcontext():  # exact; as here; as there
            stream.run(0, block, stream.states[:-1])
    exact, *found = logits
    off = max((one - exact).abs().max() for one in found)
    best = exact.topk(3).values
    return int((best[:, 1] - best[:, 2] <= 2 * off).sum())


@needs_gpu
@pytest.mark.parametrize("method", ["gptq", "weighted-rtn"])
def test_a_mixture_is_given_the_same_tokens_there_but_for_those_on_the_edge(sources, tmp_path, method):
    source = sources / "mixtral"
    arguments = {"method": method, "scheme": G32, "calibration": IDS}
    here = fewbits.quantize(source, tmp_path / "here", **arguments)
    there = fewbits.quantize(source, tmp_path / "there", device="cuda", **arguments)
    assert not there.verification.problems
    count = (len(IDS) - 1) * IDS.shape[1]  # one sample is held out
    given = []
    for block in (*here.ledger.blocks, *there.ledger.blocks):
        tokens = {matrix["name"]: matrix["tokens"] for matrix in block["matrices"]}
        experts = {name: n for name, n in tokens.items() if ".experts." in name}
        assert all(n == count for name, n in tokens.items() if name not in experts)
        by_part = Counter()
        for name, n in experts.items():
            by_part[name.split(".")[-2]] += n
        assert by_part == dict.fromkeys(("w1", "w2", "w3"), 2 * count)  # two experts a token
        given.append(experts)
    # A token that is sent elsewhere leaves one expert and joins another.
    first, other = given[0], given[len(here.ledger.blocks)]
    moved = sum(abs(n - other[name]) for name, n in first.items() if ".w2." in name)
    assert moved <= 2 * undecided(source)
    again = fewbits.quantize(source, tmp_path / "again", device="cuda", **arguments)
    assert again.ledger.files == there.ledger.files


@needs_gpu
def test_a_model_is_measured_there(sources, tmp_path):
    found = [
        fewbits.measure(sources / "llama", tmp_path / device, calibration=IDS, device=device)
        for device in ("cpu", "cuda")
    ]
    here, there = (measured.statistics.damage for measured in found)
    assert here.keys() == there.keys()
    for name, nats in here.items():
        assert there[name] == pytest.approx(nats, rel=0.2)
    result = fewbits.quantize(
        sources / "llama", tmp_path / "out", method="gptq", scheme=G32, statistics=found[1].folder,
        device="cuda", embeddings=True, format="fewbits",
    )  # fmt: skip
    assert not result.verification.problems


@needs_gpu
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("label", ["w4-g32", "w3-g32-asym", "w8-channel"])
def test_a_loaded_model_computes_there_what_it_does_here(sources, tmp_path, kind, label):
    out = tmp_path / "out"
    scheme = QuantScheme.parse(label)
    fewbits.quantize(sources / kind, out, scheme=scheme, embeddings=True, format="fewbits")
    here, there = load(out, dtype=torch.float32), load(out, dtype=torch.float32, device="cuda")
    kernels = {type(m.kernel) for m in there.modules() if isinstance(m, QuantizedLinear)}
    assert kernels == {Triton}
    assert any(isinstance(m, QuantizedEmbedding) for m in there.modules())
    with torch.no_grad():
        expected, found = here(IDS[:2]).logits, there(IDS[:2].cuda()).logits.cpu()
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    ids = IDS[:1, :8]
    words = [m.generate(ids.to(m.device), max_new_tokens=8, do_sample=False) for m in (here, there)]
    assert torch.equal(words[0], words[1].cpu())


@needs_gpu
def test_llm_int8_runs_there(sources, tmp_path):
    out = tmp_path / "out"
    fewbits.quantize(sources / "llama", out, method="llm-int8")
    here, there = load(out, dtype=torch.float32), load(out, dtype=torch.float32, device="cuda")
    with torch.no_grad():
        expected, found = here(IDS[:2]).logits, there(IDS[:2].cuda()).logits.cpu()
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()
