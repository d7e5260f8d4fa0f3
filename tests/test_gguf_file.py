import json
import random
import shutil
import struct
import weakref
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoConfig, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import fewbits
from checks import assert_same, random_weight
from fewbits.checkpoint import TensorInfo, open_checkpoint
from fewbits.errors import InputError
from fewbits.evaluate import load_tokenizer
from fewbits.formats import Placement
from fewbits.formats.gguf import BLOCKS, GgufLayout
from fewbits.formats.gguf_k import LABEL
from fewbits.gguf_file import open_gguf, unsupported, write_gguf
from fewbits.gguf_models import rotary
from fewbits.scheme import QuantScheme
from fewbits.structure import find_matrices, skeleton
from fewbits.tensor import quantize_tensor
from models import tiny_checkpoint

LAYOUT = GgufLayout()
ALONE = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gpt2",
)  # read without config.json
KINDS = (*ALONE, "gemma2", "gemma3_text")
REFERENCE = Path(__file__).parent.parent / "reference" / "model"
SPECIAL = {
    "qwen3_moe": {"norm_topk_prob": True},
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3_text": {"query_pre_attn_scalar": 32, "layer_types": ["sliding_attention"] * 2},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder of each architecture."""
    made = {}

    def source(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("source") / kind
            made[kind] = tiny_checkpoint(folder, kind, **SPECIAL.get(kind, {}))
        return made[kind]

    return source


def quantized(folder, scheme):
    """The config and tensors of a checkpoint with its matrices rounded to nearest, and those."""
    source = open_checkpoint(folder)
    shapes = {name: info.shape for name, info in source.tensors.items()}
    matrices = find_matrices(skeleton(source.config), shapes)[0] if scheme else {}
    tensors, weights, places = {}, {}, {}
    for name in source.tensors:
        found = matrices.get(name)
        if found is None or found.head or found.rows_columns[1] % 32:
            tensors[name] = source.read(name)
            continue
        [weight] = found.slices(source.read(name))
        weights[name] = quantize_tensor(weight.contiguous(), scheme, torch.float16)
        tensors |= LAYOUT.write(name, weights[name])
        places[name] = Placement(found.module, scheme, expert=found.expert is not None)
    config = dict(source.config)
    if weights:
        config["quantization_config"] = LAYOUT.config(places, [])
    return config, tensors, weights


def write(path, folder, config, tensors):
    infos = [TensorInfo(name, t.dtype, tuple(t.shape), "") for name, t in tensors.items()]
    return write_gguf(path, folder, config, infos, tensors.__getitem__)


# -- there and back --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_transformers_takes_for_another_model_is_remarked(kind, sources, tmp_path):
    config, tensors, _ = quantized(sources(kind), QuantScheme(4, "group", 32))
    notes = write(tmp_path / "model.gguf", sources(kind), config, tensors)
    found = AutoConfig.from_pretrained(tmp_path, gguf_file="model.gguf").model_type
    same = found == kind or {found, kind} == {"llama", "mistral"}  # one computation, two names
    assert same != any("plain transformers (5.23)" in note.what for note in notes)


@pytest.mark.parametrize("label", [None, *(block.label for block in BLOCKS[:3])])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_comes_back_bit_for_bit(kind, label, sources, tmp_path):
    folder, scheme = sources(kind), label and QuantScheme.parse(label)
    config, tensors, weights = quantized(folder, scheme)
    assert label is None or weights
    notes = write(tmp_path / "model.gguf", folder, config, tensors)
    assert any("without a vocabulary" in note.what for note in notes)
    first = (tmp_path / "model.gguf").read_bytes()
    write(tmp_path / "model.gguf", folder, config, tensors)
    assert (tmp_path / "model.gguf").read_bytes() == first
    for beside in (False, True):  # a config.json
        if beside:
            (tmp_path / "config.json").write_text(json.dumps(config))
        elif kind not in ALONE:
            with pytest.raises(InputError, match=r"config\.json beside"):
                open_gguf(tmp_path / "model.gguf")
            continue
        checkpoint = open_gguf(tmp_path / "model.gguf")
        assert not checkpoint.notes
        assert checkpoint.dtype == torch.bfloat16
        assert set(checkpoint.tensors) == set(tensors)
        for name, tensor in tensors.items():
            info, found = checkpoint.tensors[name], checkpoint.read(name)
            assert (info.dtype, info.shape) == (tensor.dtype, tuple(tensor.shape)), name
            assert found.dtype == tensor.dtype, name
            assert torch.equal(found, tensor), name
        named = checkpoint.config.get("quantization_config", {})
        assert named == config.get("quantization_config", {})
        for name, weight in weights.items():
            assert LAYOUT.shape(named, name, checkpoint) == weight.shape
            blocks = {f"{name}_blocks": checkpoint.read(f"{name}_blocks")}
            assert_same(LAYOUT.read(name, blocks, scheme), LAYOUT.held(weight))
        checkpoint.close()


@pytest.mark.parametrize("kind", ALONE)
def test_a_config_is_made_of_the_keys_of_the_file(kind, sources, tmp_path):
    config, tensors, _ = quantized(sources(kind), None)
    write(tmp_path / "model.gguf", sources(kind), config, tensors)
    made = open_gguf(tmp_path / "model.gguf").config
    wanted = "llama" if kind == "mistral" else kind  # nothing in the file tells these two apart
    assert made["model_type"] == wanted
    ours, theirs = (AutoConfig.for_model(**c | {"model_type": wanted}).to_dict() for c in (made, config))
    apart = {key for key in ours | theirs if ours.get(key) != theirs.get(key)}
    told = {"transformers_version", "architectures", "bos_token_id", "eos_token_id", "pad_token_id"}
    # They are not in a file without a vocabulary; the others have no part in what is computed here.
    assert apart <= told | {"norm_topk_prob", "sliding_window", "head_dim"}
    if "head_dim" in apart:
        assert theirs.get("head_dim") is None
    assert skeleton(made)


def test_biases_of_rotary_heads_are_reordered_as_their_rows_are(tmp_path):
    folder = tiny_checkpoint(tmp_path / "source", "llama", attention_bias=True, mlp_bias=True)
    config, tensors, _ = quantized(folder, None)
    write(tmp_path / "model.gguf", folder, config, tensors)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    [found] = [torch.tensor(t.data) for t in reader.tensors if t.name == "blk.0.attn_k.bias"]
    ours = tensors["model.layers.0.self_attn.k_proj.bias"].float()
    assert torch.equal(found[0:32:2], ours[:16])
    assert torch.equal(found[33:64:2], ours[48:])
    checkpoint = open_gguf(tmp_path / "model.gguf")
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())


def test_tensors_are_read_one_at_a_time(sources, tmp_path):
    config, tensors, _ = quantized(sources("qwen3_moe"), QuantScheme(4, "group", 32))
    infos = [TensorInfo(name, t.dtype, tuple(t.shape), "") for name, t in tensors.items()]
    given, most = [], 0

    def read(name):
        nonlocal most
        most = max(most, sum(there() is not None for there in given))
        tensor = tensors[name].clone()
        given.append(weakref.ref(tensor))
        return tensor

    write_gguf(tmp_path / "model.gguf", sources("qwen3_moe"), config, infos, read)
    assert len(given) == len(tensors)
    assert most <= 2, "the one that is written, and what it was made of"


def test_names_of_a_source_without_its_prefix_come_back(sources, tmp_path):
    config, tensors, _ = quantized(sources("gpt2"), QuantScheme(4, "group", 32))
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    names = config["quantization_config"]["weights"]
    config["quantization_config"]["weights"] = {
        n.removeprefix("transformer."): x for n, x in names.items()
    }
    notes = write(tmp_path / "model.gguf", sources("gpt2"), config, bare)
    assert [note.where for note in notes if note.kind == "skip"][:1] == ["h.0.attn.bias"]
    checkpoint = open_gguf(tmp_path / "model.gguf")
    assert set(checkpoint.tensors) == set(bare) - {"h.0.attn.bias"}
    assert torch.equal(checkpoint.read("wpe.weight"), bare["wpe.weight"])


def test_blocks_of_q4_k_are_written_and_read_as_they_are(tmp_path):
    config, tensors, _ = quantized(REFERENCE, None)
    names = [name for name in tensors if name.endswith("q_proj.weight")]
    config["quantization_config"] = {"weights": dict.fromkeys(names, LABEL)}
    mixed = {name: tensor for name, tensor in tensors.items() if name not in names}
    for name in names:
        mixed |= LAYOUT.write(name, random_weight(QuantScheme.parse(LABEL), tuple(tensors[name].shape)))
    assert not write(tmp_path / "model.gguf", REFERENCE, config, mixed)
    shutil.copy(REFERENCE / "config.json", tmp_path / "config.json")
    checkpoint = open_gguf(tmp_path / "model.gguf")
    assert not checkpoint.notes
    assert checkpoint.config["quantization_config"]["weights"] == dict.fromkeys(names, LABEL)
    assert set(checkpoint.tensors) == set(mixed)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in mixed.items())


# -- what is in the file ---------------------------------------------------------------------------


def test_the_gguf_library_reads_the_same_values_and_rotary_pairs_are_neighbours(sources, tmp_path):
    config, tensors, _ = quantized(sources("llama"), None)
    write(tmp_path / "model.gguf", sources("llama"), config, tensors)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert reader.fields["llama.attention.head_count_kv"].contents() == 2
    assert reader.fields["llama.rope.dimension_count"].contents() == 32
    norm = found["output_norm.weight"]
    assert norm.tensor_type == Kind.F32
    assert torch.equal(torch.tensor(norm.data), tensors["model.norm.weight"].float())
    query = found["blk.1.attn_q.weight"]
    assert query.tensor_type == Kind.BF16
    values = torch.tensor(query.data.view(np.uint8)).view(torch.bfloat16).reshape(128, 64)
    ours = tensors["model.layers.1.self_attn.q_proj.weight"]
    for head in range(4):
        rows = values[32 * head : 32 * head + 32]
        assert torch.equal(rows[0::2], ours[32 * head : 32 * head + 16])
        assert torch.equal(rows[1::2], ours[32 * head + 16 : 32 * head + 32])
    assert torch.equal(
        torch.tensor(found["blk.1.attn_v.weight"].data.view(np.uint8))
        .view(torch.bfloat16)
        .reshape(64, 64),
        tensors["model.layers.1.self_attn.v_proj.weight"],
    )


def test_experts_lie_one_after_the_other_and_routers_are_float32(sources, tmp_path):
    config, tensors, _ = quantized(sources("qwen3_moe"), None)
    write(tmp_path / "model.gguf", sources("qwen3_moe"), config, tensors)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    stack = found["blk.0.ffn_down_exps.weight"]
    assert stack.shape.tolist() == [32, 64, 4]
    values = torch.tensor(stack.data.view(np.uint8)).view(torch.bfloat16).reshape(4, 64, 32)
    for i in range(4):
        name = f"model.layers.0.mlp.experts.{i}.down_proj.weight"
        assert torch.equal(values[i], tensors[name])
    assert found["blk.0.ffn_gate_inp.weight"].tensor_type == Kind.F32
    del tensors["model.layers.0.mlp.experts.2.up_proj.weight"]
    with pytest.raises(InputError, match=r"blk\.0\.ffn_up_exps\.weight is made of 4 tensors, and 3"):
        write(tmp_path / "model.gguf", sources("qwen3_moe"), config, tensors)


def test_the_tokenizer_of_the_reference_model_is_written(tmp_path):
    config, tensors, _ = quantized(REFERENCE, None)
    assert not write(tmp_path / "model.gguf", REFERENCE, config, tensors)
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert fields["tokenizer.ggml.token_type"].contents()[0] == 3
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.move(tmp_path / "model.gguf", alone / "model.gguf")
    again = AutoTokenizer.from_pretrained(alone, gguf_file="model.gguf")
    text = "def f(x):\n    return it's 12345 déjà vu\n\n"
    assert again(text)["input_ids"][-9:] == tokenizer(text)["input_ids"][-9:]


def tokenizer_json(**changes):
    found = json.loads((REFERENCE / "tokenizer.json").read_text())
    return found | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "its way to split text"),
        ({"model": {"type": "Unigram", "vocab": []}}, "tokenizers of type 'Unigram'"),
        ({"pre_tokenizer": None}, "its way to split text"),
        ({"normalizer": {"type": "Lowercase"}}, "its normalizer"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_follow_otherwise_is_left_out_with_a_note(
    changes, message, tmp_path
):
    config, tensors, _ = quantized(REFERENCE, None)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json(**changes)))
    [note] = write(tmp_path / "model.gguf", tmp_path, config, tensors)
    assert message in note.what
    assert "numbers of tokens" in note.what
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "no_vocab"


def test_byte_fallback_is_written_with_scores_in_the_order_of_merges(tmp_path):
    vocabulary = {"<unk>": 0, "<s>": 1, "<0x41>": 2, "a": 3, "b": 4, "▁": 5, "ab": 6, "▁ab": 7}
    model = {
        "type": "BPE", "byte_fallback": True, "vocab": vocabulary, "unk_token": "<unk>",
        "merges": [["a", "b"], ["▁", "ab"]],
    }  # fmt: skip
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = [{"type": "Prepend", "prepend": "▁"}, replace]
    added = [{"id": 1, "content": "<s>", "special": True}, {"id": 8, "content": "<x>", "special": False}]
    text = {"model": model, "pre_tokenizer": None, "added_tokens": added}
    text["normalizer"] = {"type": "Sequence", "normalizers": steps}
    (tmp_path / "tokenizer.json").write_text(json.dumps(text))
    config, tensors, _ = quantized(REFERENCE, None)
    config["vocab_size"] = 10
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:10]
    assert not write(tmp_path / "model.gguf", tmp_path, config, tensors)
    fields = {k: f.contents() for k, f in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"] is True
    assert fields["tokenizer.ggml.token_type"] == [2, 3, 6, 1, 1, 1, 1, 1, 4, 5]
    scores = fields["tokenizer.ggml.scores"]
    assert scores[6] > scores[7] > scores[3] == scores[4]


def test_half_a_character_in_a_token_is_refused(tmp_path):
    text = tokenizer_json()
    text["added_tokens"][0]["content"] = "\ud800"
    (tmp_path / "tokenizer.json").write_text(json.dumps(text))
    config, tensors, _ = quantized(REFERENCE, None)
    with pytest.raises(InputError, match=r"tokenizer\.json is not understood"):
        write(tmp_path / "model.gguf", tmp_path, config, tensors)


def test_more_tokens_than_the_embedding_has_are_refused(tmp_path):
    config, tensors, _ = quantized(REFERENCE, None)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    config["vocab_size"] = 100
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:100]
    with pytest.raises(InputError, match=r"token 4095, but config\.json a vocabulary of 100"):
        write(tmp_path / "model.gguf", tmp_path, config, tensors)


# -- what cannot be written ------------------------------------------------------------------------


def test_models_and_settings_that_llama_cpp_does_not_compute_are_refused(sources):
    for kind in KINDS:
        assert unsupported(open_checkpoint(sources(kind)).config) is None
    assert "'opt': llama.cpp does not know" in unsupported({"model_type": "opt"})
    assert "'bloom'" in unsupported({"model_type": "bloom"})
    assert "None" in unsupported({})
    assert "[]" in unsupported({"model_type": []})
    moe = open_checkpoint(sources("qwen3_moe")).config
    assert "norm_topk_prob is False" in unsupported(moe | {"norm_topk_prob": False})
    llama = open_checkpoint(sources("llama")).config
    assert "hidden_act is 'gelu'" in unsupported(llama | {"hidden_act": "gelu"})
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert "rope_type 'dynamic'" in unsupported(llama | {"rope_parameters": dynamic})


def test_windows_and_scales_of_attention_that_llama_cpp_does_not_have_are_refused(sources):
    config = open_checkpoint(sources("gemma2")).config
    full = ["full_attention", "sliding_attention"]
    assert "one block in 2 in" in unsupported(config | {"layer_types": full})
    assert "query_pre_attn_scalar is 256" in unsupported(config | {"query_pre_attn_scalar": 256})
    assert "use_bidirectional" in unsupported(config | {"use_bidirectional_attention": True})
    twice = open_checkpoint(sources("gemma3_text")).config
    rope = twice["rope_parameters"] | {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}
    assert "rope_type 'linear' of windows" in unsupported(twice | {"rope_parameters": rope})


def test_norms_that_add_1_are_stored_with_it_or_refused(sources, tmp_path):
    config, tensors, _ = quantized(sources("gemma3_text"), None)
    write(tmp_path / "model.gguf", sources("gemma3_text"), config, tensors)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    found = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    for ours, theirs in (("norm", "output_norm"), ("layers.1.self_attn.q_norm", "blk.1.attn_q_norm")):
        assert torch.equal(found[f"{theirs}.weight"], tensors[f"model.{ours}.weight"].float() + 1)
    assert reader.fields["gemma3.rope.freq_base_swa"].contents() == 10000
    assert reader.fields["gemma3.attention.sliding_window"].contents() == 4
    tensors["model.norm.weight"] = torch.full((64,), 1e-9, dtype=torch.bfloat16)
    with pytest.raises(InputError, match=r"model\.norm\.weight has values that are lost beside the 1"):
        write(tmp_path / "model.gguf", sources("gemma3_text"), config, tensors)


def test_llama_3_s_frequencies_are_those_of_transformers():
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = AutoConfig.for_model("llama", head_dim=128, rope_parameters=rope)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(torch.arange(0, 128, 2).float() / 128)
    _, factors = rotary({"rope_parameters": rope, "head_dim": 128})
    assert torch.allclose(plain / factors, theirs, rtol=1e-5, atol=0)
    assert factors.min() == 1
    assert factors.max() == 8


def test_stretched_rotary_embeddings_are_written_and_read(sources, tmp_path):
    config, tensors, _ = quantized(sources("llama"), None)
    base = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    llama3 = base | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for rope in (llama3, base | {"rope_type": "yarn"}):
        config["rope_parameters"] = rope
        write(tmp_path / "model.gguf", sources("llama"), config, tensors)
        reader = gguf.GGUFReader(tmp_path / "model.gguf")
        if rope is llama3:
            [found] = [t for t in reader.tensors if t.name == "rope_freqs.weight"]
            assert found.shape.tolist() == [16]
        else:
            assert reader.fields["llama.rope.scaling.type"].contents() == "yarn"
        with pytest.raises(InputError, match="stretches its rotary embedding"):
            open_gguf(tmp_path / "model.gguf")
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert set(open_gguf(tmp_path / "model.gguf").tensors) == set(tensors)
        (tmp_path / "config.json").unlink()


def test_tensors_without_a_place_and_of_other_dtypes_are_refused(sources, tmp_path):
    config, tensors, _ = quantized(sources("llama"), None)
    for name, tensor, message in (
        ("model.layers.0.mlp.extra.weight", torch.ones(2, 2), "extra.weight has no place"),
        ("model.layers.7.mlp.up_proj.weight", torch.ones(2, 2), "layers.7.* has no place"),
        ("model.norm.weight", torch.ones(64, dtype=torch.int32), "norm.weight is torch.int32"),
        ("model.norm.weight_blocks", torch.ones(2, 18, dtype=torch.uint8), "has no scheme"),
    ):
        with pytest.raises(InputError, match=message):
            write(tmp_path / "model.gguf", sources("llama"), config, tensors | {name: tensor})


# -- files of others -------------------------------------------------------------------------------


def foreign(path, folder, kind, **changes):
    """A llama in another tool's types: every matrix in `kind`, the embedding too."""
    source = open_checkpoint(folder)
    config = source.config
    writer = gguf.GGUFWriter(path, "llama")
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["q_proj"])
    writer.add_head_count_kv(heads["k_proj"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(1e4)
    for key, value in changes.items():
        writer.add_uint32(key.replace("__", "."), value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    values = {}
    for name in source.tensors:
        weight = source.read(name).float().numpy()
        count = next((heads[part] for part in heads if part in name), 0)
        stored = weight
        if count:
            stored = weight.reshape(count, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        new = names.get_name(name, try_suffixes=(".weight",))
        if weight.ndim == 1:
            writer.add_tensor(new, stored)
            values[name] = weight
        else:
            data = gguf.quants.quantize(stored, kind)
            writer.add_tensor(new, data, raw_dtype=kind)
            found = gguf.quants.dequantize(data, kind)
            if count:
                found = found.reshape(count, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
            values[name] = found
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: torch.tensor(value) for name, value in values.items()}


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q8_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.F16])
def test_another_tool_s_blocks_are_read(kind, sources, tmp_path):
    values = foreign(tmp_path / "x.gguf", sources("llama"), kind)
    checkpoint = open_gguf(tmp_path / "x.gguf")
    named = checkpoint.config.get("quantization_config", {"weights": {}})
    held = kind in (Kind.Q4_0, Kind.Q8_0)  # Q4_1 has any m
    assert len(named["weights"]) == (16 if held else 0)  # 7 in each block, embedding and head
    for name, value in values.items():
        if name in named["weights"]:
            scheme = LAYOUT.scheme_of(named, name, name)
            blocks = {f"{name}_blocks": checkpoint.read(f"{name}_blocks")}
            assert torch.equal(LAYOUT.read(name, blocks, scheme).dequantize(torch.float32), value)
        else:
            found = checkpoint.read(name)
            assert found.dtype == (torch.float32 if value.ndim == 1 else torch.float16)
            assert torch.equal(found, value.to(found.dtype)), name
    notes = [note.what for note in checkpoint.notes]
    if held or kind == Kind.F16:
        assert not notes
    else:
        [note] = notes
        assert note.endswith(f"16 of {kind.name}"), note
        assert "given as torch.float16" in note


def test_a_config_beside_a_file_of_another_architecture_is_refused(sources, tmp_path):
    foreign(tmp_path / "x.gguf", sources("llama"), Kind.Q8_0)
    shutil.copy(sources("gpt2") / "config.json", tmp_path / "config.json")
    with pytest.raises(InputError, match=r"architecture 'llama', but config\.json .* 'gpt2'"):
        open_gguf(tmp_path / "x.gguf")


# -- files of enemies ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory, sources):
    path = tmp_path_factory.mktemp("small") / "x.gguf"
    foreign(path, sources("llama"), Kind.Q8_0)
    return path


def try_to_read(path):
    """Either an error of ours, or all of it is read."""
    try:
        checkpoint = open_gguf(path)
        for name in checkpoint.tensors:
            checkpoint.read(name)
    except InputError as error:
        return str(error)
    return None


def test_a_file_cut_anywhere_is_refused_in_one_line(small, tmp_path):
    data = small.read_bytes()
    path = tmp_path / "x.gguf"
    for length in [*range(0, 2200, 13), len(data) - 1, len(data) // 2]:
        path.write_bytes(data[:length])
        assert try_to_read(path) is not None, length


@pytest.mark.parametrize("seed", range(4))
def test_a_file_changed_anywhere_is_read_or_refused(seed, small, tmp_path):
    chance, data, path = random.Random(seed), small.read_bytes(), tmp_path / "x.gguf"
    refused = 0
    for _ in range(60):
        changed = bytearray(data)
        for _ in range(chance.choice((1, 1, 2, 8))):
            place = chance.randrange(2400)
            changed[place] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        path.write_bytes(changed)
        refused += try_to_read(path) is not None
    assert refused


def craft(path, keys=(), tensors=(), version=3, counts=None, tail=b""):
    """A file of raw parts; tensors are (name, shape, type, offset)."""

    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    raw = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(keys))))
    for key, kind, value in keys:
        raw += text(key) + struct.pack("<I", kind) + (text(value) if isinstance(value, str) else value)
    for name, shape, kind, offset in tensors:
        raw += text(name) + struct.pack("<I", len(shape))
        raw += b"".join(struct.pack("<Q", n) for n in shape) + struct.pack("<IQ", kind, offset)
    path.write_bytes(raw + bytes(-len(raw) % 32) + tail)
    return path


ARCH = ("general.architecture", 8, "llama")
BIG = struct.pack("<Q", 2**62)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"version": 1}, "version 1"),
        ({"counts": (2**60, 1), "keys": [ARCH]}, "names 1152921504606846976 tensors"),
        ({"counts": (0, 2**60)}, "keys"),
        ({"keys": [("a" * 3, 8, BIG)]}, "ends before 4611686018427387904 bytes"),
        ({"keys": [("a", 9, struct.pack("<IQ", 4, 2**62))]}, "ends before"),
        ({"keys": [("a", 9, struct.pack("<IQ", 8, 2**40))]}, "strings"),
        ({"keys": [("a", 9, struct.pack("<IQ", 8, 2**20))]}, "ends before"),
        ({"keys": [("a", 9, struct.pack("<IQ", 9, 2))]}, "list of type 9"),
        ({"keys": [("a", 77, b"")]}, "value of type 77"),
        ({"keys": [ARCH, ARCH]}, "twice"),
        ({"keys": [("general.alignment", 4, struct.pack("<I", 0))]}, "alignment is 0"),
        ({"keys": [("split.count", 2, struct.pack("<H", 3))]}, "one part of several"),
        ({"keys": [ARCH], "tensors": [("x", (32,), 0, 0)]}, "do not lie"),
        ({"tensors": [("x", (8,), 0, 0), ("y", (8,), 0, 0)], "tail": bytes(64)}, "do not lie"),
        ({"tensors": [("x", (8,), 0, 0), ("x", (8,), 0, 32)], "tail": bytes(64)}, "tensor x twice"),
        ({"tensors": [("x", (8,), 0, 4)], "tail": bytes(64)}, "do not lie at 4"),
        ({"tensors": [("x", (8,), 999, 0)], "tail": bytes(64)}, "type 999"),
        ({"tensors": [("x", (8,), 8, 0)], "tail": bytes(64)}, "multiple of 32"),
        ({"tensors": [("x", (2**47, 2**47), 0, 0)], "tail": bytes(64)}, "do not lie"),
        ({"tensors": [("x", (0, 8), 0, 0)], "tail": bytes(64)}, "accepted are rows"),
        ({"tensors": [("x", (1,) * 5, 0, 0)], "tail": bytes(64)}, "5 dimensions"),
        ({"tensors": [("x\n", (8,), 0, 0)], "tail": bytes(64)}, "is no name"),
        ({"keys": [("general.architecture", 8, "evil\n")]}, r"architecture 'evil\\n'"),
        ({}, "architecture None"),
        ({"keys": [ARCH, ("fewbits.prefix", 8, "../")]}, "fewbits.prefix is '../'"),
        ({"keys": [ARCH, ("llama.block_count", 8, "x")]}, "block_count is 'x'"),
        ({"keys": [ARCH, ("llama.block_count", 4, struct.pack("<I", 2**30))]}, "accepted is at most"),
        ({"keys": [ARCH, ("llama.expert_count", 4, struct.pack("<I", 2**27))]}, "experts"),
        (
            {"keys": [ARCH, ("llama.attention.head_count", 4, bytes(4))]},
            "num_attention_heads|config.json",
        ),
    ],
)
def test_a_header_that_is_not_wholly_as_it_should_be_is_refused(parts, message, tmp_path):
    with pytest.raises(InputError, match=message):
        open_gguf(craft(tmp_path / "x.gguf", **parts))


def test_what_is_no_file_of_this_kind_is_refused(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"PK\3\4" + bytes(100))
    with pytest.raises(InputError, match="begins with"):
        open_gguf(tmp_path / "x.gguf")
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(InputError, match="0 bytes"):
        open_gguf(tmp_path / "empty.gguf")
    with pytest.raises(InputError, match="cannot be read"):
        open_gguf(tmp_path / "none.gguf")
    with pytest.raises(InputError, match="is a folder"):
        open_gguf(tmp_path)


def test_floats_made_from_blocks_are_given_in_the_dtype_that_the_model_runs_in(tmp_path):
    source = tiny_checkpoint(tmp_path / "source", "llama")
    fewbits.quantize(source, tmp_path / "out", scheme=QuantScheme(8, "group", 32), format="gguf")
    opened = open_gguf(tmp_path / "out" / "model.gguf")
    name = "model.embed_tokens.weight"
    stored, place, part = opened.stored[name]
    opened.stored[name] = replace(stored, kind="Q8_0"), place, part  # as llama.cpp's quantizer has it
    assert opened.tensors[name].dtype == opened.given == torch.bfloat16
    opened.give(torch.float32)
    assert opened.tensors[name].dtype == torch.float32
    others = {info.dtype for n, info in opened.tensors.items() if n != name}
    assert others == {torch.bfloat16, torch.uint8}


def written_and_run(folder, model_type, label="w4-g32", **changes):
    """A GGUF folder of ours, and its model's logits."""
    source = tiny_checkpoint(folder / "source", model_type, **changes)
    out = folder / "out"
    fewbits.quantize(source, out, scheme=QuantScheme.parse(label), format="gguf")
    return out, logits_of(out)


def logits_of(path):
    with torch.no_grad():
        return fewbits.load(path, dtype=torch.float32)(torch.arange(2, 34).view(2, 16)).logits


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3_moe", {"norm_topk_prob": True}),
        ("mixtral", {}),
    ],
    ids=["llama", "biases", "qwen3_moe", "mixtral"],
)
def test_a_file_alone_gives_the_model_that_it_gives_beside_its_config(tmp_path, model_type, changes):
    out, expected = written_and_run(tmp_path, model_type, **changes)
    (tmp_path / "alone").mkdir()
    shutil.copy(out / "model.gguf", tmp_path / "alone" / "any.gguf")
    assert torch.equal(logits_of(tmp_path / "alone" / "any.gguf"), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": 1e-3},
        {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 2.0,
                             "original_max_position_embeddings": 32, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0}},
        {"hidden_act": "gelu"},
        {"model_type": "qwen3"},
    ],
)  # fmt: skip
def test_the_config_of_another_model_beside_a_file_is_refused(tmp_path, changes):
    out, _ = written_and_run(tmp_path, "llama")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(
        InputError, match=r"config\.json (is not of model\.gguf: |beside it of model_type)"
    ):
        fewbits.load(out)


def test_tensors_that_the_config_beside_has_no_place_for_are_refused(tmp_path):
    out, _ = written_and_run(tmp_path, "llama", attention_bias=True)
    config = json.loads((out / "config.json").read_text()) | {"attention_bias": False}
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"k_proj\.bias has no place in the model"):
        fewbits.load(out)


def test_what_takes_a_float_model_says_that_a_file_is_none(tmp_path):
    out, _ = written_and_run(tmp_path, "llama")
    for source in (out, out / "model.gguf"):
        with pytest.raises(InputError, match=r"model\.gguf is GGUF, to be loaded or converted; accep"):
            fewbits.quantize(source, tmp_path / "again")


def test_a_file_that_is_named_has_its_own_tokenizer(tmp_path):
    fewbits.quantize("reference/model", tmp_path / "out", format="gguf")
    (tmp_path / "mixed").mkdir()
    shutil.copy(tmp_path / "out" / "model.gguf", tmp_path / "mixed" / "any.gguf")
    tokenizer = json.loads(Path("reference/model/tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["e"], words["t"] = words["t"], words["e"]
    (tmp_path / "mixed" / "tokenizer.json").write_text(json.dumps(tokenizer))
    text = "def read_file(path):"
    ids = load_tokenizer("reference/model")(text)["input_ids"]
    assert load_tokenizer(tmp_path / "mixed" / "any.gguf")(text)["input_ids"] == ids
    assert load_tokenizer(tmp_path / "out" / "model.gguf")(text)["input_ids"] == ids
