"""Steps that are compiled or run together compute what they did before, and only steps are."""

import copy
import gc
import pickle
import shutil
import weakref
from types import SimpleNamespace

import pytest
import torch

from fewbits import InputError, QuantScheme, load, quantize
from fewbits.attention import attend
from fewbits.decoding import _are_together, _find_fixed, fixed_cache, texts_together
from fewbits.linear import FloatLinear
from fewbits.native import operators
from fewbits.native.library import Library, library
from fewbits.speed import measure_speed
from fewbits.structure import cache_argument, cache_of
from models import VOCABULARY, tiny_checkpoint

IDS = torch.arange(1, 17)[None] * 7 % VOCABULARY
SETTINGS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            source = tiny_checkpoint(folder / "model", kind)
            made[kind] = folder / "out"
            quantize(source, made[kind], scheme=QuantScheme(4, "group", 32, symmetric=False))
        return made[kind]

    return get


@pytest.fixture
def graphs(monkeypatch):
    """PyTorch's graphs without its compiler, which would round otherwise: the tokens of each call."""
    torch.compiler.reset()  # or graphs of other tests count
    own, calls = torch.compile, []

    def compile_(forward, options=None):
        assert options in (None, {"cpp.threads": 1})
        graph = own(forward, backend="aot_eager", fullgraph=True)

        def call(model, *args, **given):
            calls.append((args[0] if args else given["input_ids"]).shape[1])
            return graph(model, *args, **given)

        return call

    monkeypatch.setattr(torch, "compile", compile_)
    return calls


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3"])
def test_generation_writes_the_same_and_every_step_is_a_graph(quantized, graphs, kind):
    plain, compiled = load(quantized(kind)), load(quantized(kind), compiled=True)
    assert any(isinstance(module, FloatLinear) for module in compiled.modules())
    for length in (16, 11):
        ids, more = IDS[:, :length], {"return_dict_in_generate": True, "output_logits": True}
        found = compiled.generate(ids, **SETTINGS, **more)
        expected = plain.generate(ids, **SETTINGS, **more, cache_implementation="static")
        assert torch.equal(found.sequences, expected.sequences)
        for a, b in zip(found.logits, expected.logits, strict=True):
            assert torch.equal(a, b)
    assert graphs == [1] * 10  # of six tokens the first is the prompt's


def test_prompts_gradients_and_growing_caches_are_left_alone(quantized, graphs):
    model = load(quantized("llama"), compiled=True)
    with torch.no_grad():
        name = cache_argument(model)
        cache = cache_of(model(input_ids=IDS, **{name: fixed_cache(model, 20)}))
        grown = cache_of(model(input_ids=IDS, use_cache=True))
        model(input_ids=IDS[:, :1], **{name: grown})
        model(input_ids=IDS[:, :2], **{name: cache})
        assert graphs == []
        model(IDS[:, :1], **{name: cache})
    assert graphs == [1]
    model(input_ids=IDS[:, :1], **{name: cache})
    assert graphs == [1]
    assert fixed_cache(load(quantized("llama")), 20) is None


def test_a_copy_runs_its_own_weights(quantized, graphs):
    model = load(quantized("llama"), compiled=True)
    other = copy.deepcopy(model)
    assert other.forward._model() is other
    with torch.no_grad():
        other.lm_head.weight.zero_()
        for each in (model, other):
            name = cache_argument(each)
            cache = cache_of(each(input_ids=IDS, **{name: fixed_cache(each, 20)}))
            logits = each(input_ids=IDS[:, :1], **{name: cache}).logits
            assert bool((logits == 0).all()) == (each is other)
    assert graphs == [1, 1]


def test_prompts_attend_in_the_library_as_without(quantized):
    if not operators.has_bf16():
        pytest.skip("the native library has no products of bfloat16 here")
    plain, compiled = load(quantized("llama")), load(quantized("llama"), compiled=True)
    with torch.no_grad():
        logits = compiled(input_ids=IDS, **{cache_argument(compiled): fixed_cache(compiled, 30)}).logits
        assert torch.equal(logits, plain(input_ids=IDS, use_cache=True).logits)


def test_models_that_cannot_be_one_graph_are_refused(quantized):
    # Experts apart, and as one tensor.
    for kind, name in (("mixtral", "Mixtral"), ("gpt_oss", "GptOss")):
        with pytest.raises(InputError, match=f"compiled steps of {name}ForCausalLM: which experts run"):
            load(quantized(kind), compiled=True)
    model = load(quantized("llama"))
    type(model)._can_compile_fullgraph, before = False, type(model)._can_compile_fullgraph
    try:
        with pytest.raises(InputError, match="LlamaForCausalLM, which says that it cannot be one graph"):
            load(quantized("llama"), compiled=True)
    finally:
        type(model)._can_compile_fullgraph = before


@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch's compiler needs a C++ compiler")
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_pytorchs_compiler_takes_them(quantized, kind):
    torch.compiler.reset()
    model = load(quantized(kind), dtype=torch.float32, compiled=True)
    plain = load(quantized(kind), dtype=torch.float32)
    assert torch.equal(model.generate(IDS, **SETTINGS), plain.generate(IDS, **SETTINGS))
    speed = measure_speed(model, 16, 4, 1)
    assert speed.decode > 0
    assert speed.prompt == 16


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mixtral"])
def test_steps_run_together_are_the_same_bits(quantized, monkeypatch, kind):
    model, calls = load(quantized(kind)), []
    if operators.available():
        own = Library.together
        monkeypatch.setattr(Library, "together", lambda *given: calls.append(1) or own(*given))
    settings = {**SETTINGS, "return_dict_in_generate": True, "output_logits": True}
    together = model.generate(IDS, **settings)
    assert len(calls) == (5 if operators.available() else 0)
    model.fewbits_together = False
    alone = model.generate(IDS, **settings)
    for a, b in zip(together.logits, alone.logits, strict=True):
        assert torch.equal(a, b)
    assert len(calls) == (5 if operators.available() else 0)


def test_steps_of_many_texts_and_gradients_are_not_run_together(quantized, monkeypatch):
    model = load(quantized("llama"))
    together = []
    monkeypatch.setattr(Library, "together", lambda _, step: together.append(1) or step())
    with torch.no_grad():
        model(input_ids=IDS[:, :1].expand(3, 1))  # PyTorch multiplies by the head then
    model(input_ids=IDS[:, :1])
    assert not together
    with torch.no_grad():
        model(input_ids=IDS[:, :1])
        assert len(together) == operators.available()
        model.set_attn_implementation("sdpa")
        model(input_ids=IDS[:, :1])
    assert len(together) == operators.available()


def test_a_model_goes_when_nobody_names_it(quantized):
    gc.collect()
    gc.disable()
    try:
        model = load(quantized("llama"))
        model.generate(IDS, **SETTINGS)
        gone = weakref.ref(model)
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_a_model_is_pickled_and_compiled_by_others(quantized):
    source = load(quantized("llama").parent / "model", compiled=True)
    model = load(quantized("llama"))
    with torch.no_grad():
        expected = source(input_ids=IDS[:, :1]).logits
        other = pickle.loads(pickle.dumps(source))
        assert torch.equal(other(input_ids=IDS[:, :1]).logits, expected)
        expected = model(input_ids=IDS[:, :1]).logits
        theirs = torch._dynamo.optimize("eager", nopython=True)(model)
        assert torch.equal(theirs(input_ids=IDS[:, :1]).logits, expected)


@pytest.mark.skipif(not operators.available(), reason="there is no native library here")
def test_what_pytorch_computes_in_a_step_keeps_its_threads(quantized):
    model = load(quantized("llama"))
    assert texts_together(model) == FloatLinear.ROWS
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(64, 172, dtype=torch.bfloat16)
    assert not texts_together(model)
    assert "forward" not in load(quantized("gemma2")).__dict__  # it attends in a way of its own
    model = load(quantized("llama"))
    some = torch.ones(1, 4, 1, 16)
    with torch.no_grad():
        attend(model.model.layers[1].self_attn, some, some, some, None, position_bias=some[..., :1])
    assert not texts_together(model)


@pytest.mark.skipif(not operators.available(), reason="there is no native library here")
def test_what_fails_together_fails_as_alone():
    found = library()
    assert found.together(lambda: found.together(lambda: 3)) == 3
    with pytest.raises(KeyboardInterrupt, match="now"):
        found.together(lambda: found.together(_interrupt))
    assert found.together(torch.get_num_threads) == torch.get_num_threads()


def _interrupt():
    raise KeyboardInterrupt("now")


@pytest.mark.skipif(not operators.available(), reason="there is no native library here")
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_of_fixed_size_and_windows_are_known_by_both_names(quantized, name):
    from transformers import DynamicCache, StaticCache

    model = load(quantized("llama"))
    assert _find_fixed()(**{name: StaticCache(config=model.config, max_cache_len=8)})
    assert not _find_fixed()(**{name: DynamicCache()})
    windows = SimpleNamespace(is_sliding=[False, True])
    assert _are_together(model, IDS[:, :1], **{name: DynamicCache()})
    assert not _are_together(model, IDS[:, :1], **{name: windows})
