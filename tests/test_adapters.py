"""LoRA adapters of PEFT, trained on top of quantized linears."""

import pytest
import torch

import fewbits
from fewbits.errors import InputError
from fewbits.linear import QuantizedLinear
from fewbits.scheme import QuantScheme
from models import VOCABULARY, tiny_checkpoint

peft = pytest.importorskip("peft", reason="PEFT is not installed")

SCHEMES = {
    "w8-channel": "rtn",
    "w4-g32": "rtn",
    "w3-g8-asym": "rtn",
    "w8-channel-a8-token-t6": "llm-int8",
    "w8-channel-a8-token-t1-static": "llm-int8",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module", params=SCHEMES)
def folder(request, source, tmp_path_factory):
    out, scheme = tmp_path_factory.mktemp("out") / "quantized", QuantScheme.parse(request.param)
    ids = torch.randint(3, VOCABULARY, (4, 16)) if request.param.endswith("static") else None
    fewbits.quantize(source, out, method=SCHEMES[request.param], scheme=scheme, calibration=ids)
    return out


def adapted(folder, dtype=None, **changes):
    model = fewbits.load(folder, dtype=dtype)
    config = peft.LoraConfig(r=4, target_modules="all-linear", **changes)
    return peft.get_peft_model(model, config)


def train(model, ids, steps=8):
    """Losses before each step."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(learned, lr=1e-2), []
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_an_adapter_is_trained_saved_and_loaded(folder, tmp_path):
    ids = torch.randint(3, VOCABULARY, (2, 16))
    model = adapted(folder)
    quantized = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert len(quantized) == 14
    wrapped = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert {id(m) for m in quantized} <= {id(m.get_base_layer()) for m in wrapped}
    codes = [{name: t.clone() for name, t in m.state_dict().items()} for m in quantized]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, fewbits.load(folder)(ids).logits)  # it begins as nothing
    losses = train(model, ids)
    assert losses[-1] < 0.7 * losses[0], losses
    for module, before in zip(quantized, codes, strict=True):
        assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())

    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(fewbits.load(folder), tmp_path)
    with torch.no_grad():
        logits = model.eval()(ids).logits
        assert torch.equal(again.eval()(ids).logits, logits)
        with model.disable_adapter():
            plain = model(ids).logits
        assert not torch.equal(plain, logits)
        assert torch.equal(plain, fewbits.load(folder)(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_every_adapter_gets_the_gradient_that_float_linears_give(folder, dtype):
    """The quantized model against one with the same weights in `nn.Linear`."""
    torch.manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, 16))
    model = adapted(folder, dtype, init_lora_weights=False)
    kernels = {m.kernel_name for m in model.modules() if isinstance(m, QuantizedLinear)}
    # Only the reference kernel computes as a linear does. The others round (inputs to 8 bits, sums to
    # bfloat16): at most 0.095 in four seeds of all schemes, and twice that here; a wrong scale is more.
    bound = 1e-5 if kernels == {"reference"} else 0.2
    floats = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            plain = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight.data = module.weight.clone()
            floats[name] = plain.requires_grad_(False)
    model(ids, labels=ids).loss.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    for name, plain in floats.items():
        model.set_submodule(name, plain)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            apart = (ours[name] - parameter.grad).norm() / parameter.grad.norm()
            assert apart < bound, (name, apart)


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_merging_into_codes_raises_and_changes_nothing(folder, changes):
    ids = torch.randint(3, VOCABULARY, (2, 16))
    model = adapted(folder, **changes).eval()
    train(model, ids, steps=2)
    with torch.no_grad():
        before = model(ids).logits
    for merge in (
        model.merge_adapter,
        lambda: model.merge_adapter(safe_merge=True),
        model.merge_and_unload,
        lambda: model.merge_and_unload(safe_merge=True),
    ):
        with pytest.raises(InputError, match="cannot be written to"):
            merge()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_unloading_gives_the_quantized_model_back(folder):
    ids = torch.randint(3, VOCABULARY, (2, 16))
    model = adapted(folder)
    train(model, ids, steps=2)
    with torch.no_grad():
        assert torch.equal(model.unload()(ids).logits, fewbits.load(folder)(ids).logits)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adapters_that_begin_by_changing_the_weight_are_refused(folder, start):
    with pytest.raises(InputError, match="a quantized weight cannot be written to"):
        adapted(folder, init_lora_weights=start)
