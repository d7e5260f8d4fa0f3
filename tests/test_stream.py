"""A model streamed block by block computes what the whole model computes."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fewbits import InputError, QuantScheme, load, quantize, stream, verify
from fewbits.checkpoint import open_checkpoint
from fewbits.linear import split_experts
from fewbits.stream import Stream
from fewbits.structure import find_blocks
from models import ALL, VOCABULARY, tiny_checkpoint

IDS = torch.randint(3, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(1))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("stream"), {}

    def get(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = tiny_checkpoint(folder / model_type, model_type)
        return made[model_type]

    return get


def streamed(folder, ids=IDS, **options):
    """Logits by way of the states in front of the first block, in float32 from there on."""
    flow = Stream(open_checkpoint(folder), ids, **options)
    states = flow.states.float()
    for number in range(flow.count):
        states = flow.run_all(number, flow.load(number), states)
    parts = [flow.logits(states[rows]) for rows in flow.batches(range(len(ids)))]
    return torch.cat(parts)


@torch.no_grad()
def whole(folder, ids=IDS):
    """Logits of the whole model, what its first block gets rounded as it is kept."""
    model = load(folder, dtype=torch.float32)
    split_experts(model)  # else a token's experts are summed in another order
    blocks = model.get_submodule(find_blocks(model))

    def enter(_module, args, kwargs):
        if args:
            return (args[0].bfloat16().float(), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"].bfloat16().float()}

    blocks[0].register_forward_pre_hook(enter, with_kwargs=True)
    return model(ids, use_cache=False).logits


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -- every architecture ------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ALL)
def test_logits_block_by_block_are_those_of_the_whole_model(source, model_type):
    """To the last bit: the same operations in the same order, but for the samples run at a time."""
    assert torch.equal(streamed(source(model_type)), whole(source(model_type)))


# Widths at which no product depends on how many rows there are would be needed to be exact.
@pytest.mark.parametrize(
    "model_type", ["llama", "gpt2", "mixtral", "qwen3_next", "gemma3_text", "bloom"]
)
@pytest.mark.parametrize("tokens", [24, 50, 72])
def test_samples_run_in_other_batches_give_the_same(source, model_type, tokens):
    expected = streamed(source(model_type))
    flow = Stream(open_checkpoint(source(model_type)), IDS, tokens=tokens)
    assert flow.batch == tokens // 24
    found = streamed(source(model_type), tokens=tokens)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "qwen3", "opt"])
def test_the_states_are_what_the_first_block_gets(source, model_type):
    folder = source(model_type)
    model, seen = load(folder, dtype=torch.float32), []

    def record(_module, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    model.get_submodule(find_blocks(model))[0].register_forward_pre_hook(record, with_kwargs=True)
    model(IDS, use_cache=False)
    states = Stream(open_checkpoint(folder), IDS).states
    assert states.dtype == torch.bfloat16
    # The same values rounded once more, and by embeddings that are multiplied or added in bfloat16.
    assert (states - seen[0]).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * seen[0].abs().max()


def test_advancing_replaces_the_states_by_what_the_block_makes_of_them(source):
    flow = Stream(open_checkpoint(source("llama")), IDS)
    flow.fast_dtype = None
    block, before = flow.load(0), flow.states.clone()
    expected = flow.run_all(0, block, before)
    flow.advance(0, block, range(len(flow.states)), flow.states)
    assert torch.equal(flow.states, expected.bfloat16())
    assert not torch.equal(flow.states, before)


def test_products_in_bfloat16_are_off_by_their_rounding_only(source):
    flow = Stream(open_checkpoint(source("llama")), IDS)
    block = flow.load(0)
    exact = flow.run(0, block, flow.states)
    flow.fast_dtype = torch.bfloat16
    assert torch.equal(flow.run(0, block, flow.states), exact)
    with flow.in_fast_dtype(0, block):
        assert {p.dtype for p in block.parameters()} == {torch.bfloat16}
        fast = flow.run(0, block, flow.states)
    assert torch.equal(flow.run(0, block, flow.states), exact)
    assert fast.dtype == torch.float32
    error = (fast - exact).abs().max() / exact.abs().max()
    assert 0 < error < 4 * torch.finfo(torch.bfloat16).eps


def test_a_state_does_not_depend_on_other_samples(source):
    flow = Stream(open_checkpoint(source("llama")), IDS)
    block = flow.load(1)
    both = flow.run_all(1, block, flow.states[:2])
    other = torch.cat([flow.states[:1], flow.states[3:]])
    assert torch.equal(flow.run_all(1, block, other)[0], both[0])


# -- containers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "qwen3"])
@pytest.mark.parametrize("kind", ["sharded", "torch"])
def test_other_containers_of_the_same_weights_give_the_same(source, tmp_path, model_type, kind):
    folder = source(model_type)
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    if kind == "sharded":
        shutil.rmtree(other)
        torch.manual_seed(0)
        tiny_checkpoint(other, model_type, max_shard_size="30KB")
        assert len(list(other.glob("*.safetensors"))) > 3
    else:
        (other / "model.safetensors").unlink()
        torch.save(load_file(folder / "model.safetensors"), other / "pytorch_model.bin")
    assert torch.equal(streamed(other), streamed(folder))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text"])
def test_states_in_a_file_are_those_in_memory(source, tmp_path, model_type):
    path = tmp_path / "states"

    def allocate(size):
        path.write_bytes(bytes(size))
        return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)

    assert torch.equal(streamed(source(model_type), allocate=allocate), streamed(source(model_type)))
    assert path.stat().st_size == 2 * IDS.numel() * 64
    flow = Stream(open_checkpoint(source(model_type)), IDS, allocate=allocate)
    plain = Stream(open_checkpoint(source(model_type)), IDS)
    for number in range(flow.count):
        flow.advance(number, flow.load(number), range(len(flow.states)), flow.states)
        plain.advance(number, plain.load(number), range(len(plain.states)), plain.states)
    assert torch.equal(flow.states, plain.states)
    stored = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.bfloat16)
    assert torch.equal(stored.view(plain.states.shape), plain.states)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "cohere", "gpt2", "opt", "granite"])
@pytest.mark.parametrize("every", [3, 24, 100])
def test_logits_are_computed_at_every_so_manieth_position(source, model_type, every):
    expected = whole(source(model_type))[:, ::every]
    found = streamed(source(model_type), every=every)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("rows", [64, 64 * 7])
def test_a_head_that_is_multiplied_in_slices_gives_the_same(source, monkeypatch, rows):
    expected = streamed(source("llama"))
    monkeypatch.setattr(stream, "_HEAD_ROWS", rows)
    found = streamed(source("llama"))
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


# -- what the source is ------------------------------------------------------------------------------


def in_dtypes(folder, other, dtype, pattern=""):
    """A copy whose tensors of matching names have another dtype."""
    shutil.copytree(folder, other)
    tensors = load_file(folder / "model.safetensors")
    changed = {n: t.to(dtype) if pattern in n else t for n, t in tensors.items()}
    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
    return other


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_a_float32_source_is_never_written_to(source, tmp_path, model_type, kind):
    folder = in_dtypes(source(model_type), tmp_path / "float32", torch.float32)
    if kind == "torch":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    before, checkpoint = contents(folder), open_checkpoint(folder)
    flow = Stream(checkpoint, IDS)
    block = flow.load(0)
    expected = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    sources = {name: checkpoint.read(name).clone() for name in checkpoint.tensors}
    for parameter in block.parameters():
        parameter.data.add_(1)
    assert contents(folder) == before
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in sources.items())
    again = flow.load(0).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
@pytest.mark.parametrize("pattern", ["q_proj", "norm", "down_proj", ""])
def test_a_source_of_several_dtypes_is_read_as_it_is(source, tmp_path, pattern, method):
    folder = in_dtypes(source("llama"), tmp_path / "mixed", torch.float32, pattern)
    before = contents(folder)
    scheme = QuantScheme(4, "group", 32)
    result = quantize(folder, tmp_path / "out", method=method, scheme=scheme, calibration=IDS)
    assert contents(folder) == before
    assert verify(tmp_path / "out", folder).problems == []
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        if name in result.ledger.tensors:
            assert str(tensor.dtype) == f"torch.{result.ledger.tensors[name].dtype}"


def test_a_mixed_source_is_never_written_to(source, tmp_path):
    folder = in_dtypes(source("llama"), tmp_path / "mixed", torch.float32, "q_proj")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.dtype == torch.bfloat16
    flow, name = Stream(checkpoint, IDS), "model.layers.0.self_attn.q_proj.weight"
    block, expected = flow.load(0), checkpoint.read(name).clone()
    block.self_attn.q_proj.weight.data.add_(1)
    assert torch.equal(checkpoint.read(name), expected)
    assert torch.equal(flow.load(0).self_attn.q_proj.weight, expected)


# -- stubs -------------------------------------------------------------------------------------------


def test_what_models_ask_their_blocks_is_answered_where_blocks_were(source):
    flow = Stream(open_checkpoint(source("gemma3_text")), IDS)
    first, second = flow.shell.get_submodule(flow.path)
    kinds = [layer.config.layer_types[layer.layer_idx] for layer in (first.self_attn, second.self_attn)]
    assert kinds == ["sliding_attention", "full_attention"]
    assert first.hidden_size == 64
    with pytest.raises(AttributeError, match="nothing"):
        first.nothing  # noqa: B018


def test_blocks_get_what_is_their_own(source):
    """Sliding and full attention differ in their masks; longer than the window, so that it shows."""
    flow = Stream(open_checkpoint(source("gemma3_text")), IDS)
    one, other = (flow.load(i) for i in range(2))
    other.load_state_dict(one.state_dict())
    states = flow.states.float()
    assert not torch.equal(flow.run(0, one, states), flow.run(1, one, states))


def test_a_model_whose_blocks_are_given_something_of_the_tokens_is_refused(source, monkeypatch):
    def forward(self, x, position_ids, original=LlamaRotaryEmbedding.forward):
        cos, sin = original(self, x, position_ids)
        return cos + x.mean(), sin

    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", forward)
    with pytest.raises(
        InputError, match=r"block 0 is given inputs that depend on the tokens"
    ) as refused:
        Stream(open_checkpoint(source("llama")), IDS)
    assert "\n" not in str(refused.value)


def test_tokens_that_all_are_the_same_hide_no_dependence(source, monkeypatch):
    def forward(self, x, position_ids, original=LlamaRotaryEmbedding.forward):
        cos, sin = original(self, x, position_ids)
        return cos + x.mean(), sin

    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", forward)
    with pytest.raises(InputError, match="depend on the tokens"):
        Stream(open_checkpoint(source("llama")), torch.full((3, 8), 7))


def test_a_block_that_is_never_called_is_named(source, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaModel

    monkeypatch.setattr(LlamaModel, "forward", _skipping(LlamaModel.forward))
    with pytest.raises(InputError, match=r"block 1 of model\.layers is never called"):
        Stream(open_checkpoint(source("llama")), IDS)


def _skipping(original):
    def forward(self, *args, **kwargs):
        self.config.num_hidden_layers = 1
        return original(self, *args, **kwargs)

    return forward
