"""llama.cpp quantizes a llama.  python golden_llamacpp.py MODEL OUT KIND    (KIND like Q4_0)

Its GGUF in float32 is written here by the gguf package alone, so that nothing of ours is in it.
"""

import ctypes
import json
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
from llama_cpp import llama_cpp as native

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTER = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def read_bfloat16(file: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file, as float32."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            assert entry["dtype"] == "BF16", entry
            first, last = entry["data_offsets"]
            halves = np.frombuffer(data[start + first : start + last], np.uint16).astype(np.uint32)
            found[name] = (halves << 16).view(np.float32).reshape(entry["shape"])
    return found


def write_float(model: Path, file: Path) -> None:
    """The GGUF of a llama in float32."""
    config = json.loads((model / "config.json").read_text())
    tokenizer = json.loads((model / "tokenizer.json").read_text())["model"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(0)
    words = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)[: config["vocab_size"]]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([1] * len(words))
    writer.add_token_merges([m for m in merges if set(m.split(" ")) <= set(words)])
    for name, tensor in read_bfloat16(model / "model.safetensors").items():
        parts = name.split(".")
        if name in OUTER:
            writer.add_tensor(OUTER[name], np.ascontiguousarray(tensor))
            continue
        kind = ".".join(parts[3:-1])
        if kind in ("self_attn.q_proj", "self_attn.k_proj"):  # pairs of a rotation stand side by side
            count = heads if "q_proj" in kind else kv_heads
            halves = tensor.reshape(count, 2, tensor.shape[0] // count // 2, tensor.shape[1])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"blk.{parts[2]}.{NAMES[kind]}.weight", np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Write OUT/model.gguf and what stands beside it."""
    model, out, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    out.mkdir(parents=True)
    plain = out / "float.gguf"
    write_float(model, plain)
    how = native.llama_model_quantize_default_params()
    how.nthread = 1
    how.ftype = getattr(native, f"LLAMA_FTYPE_MOSTLY_{kind}")
    done = native.llama_model_quantize(
        str(plain).encode(), str(out / "model.gguf").encode(), ctypes.byref(how)
    )
    assert done == 0, done
    plain.unlink()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, out / name)


if __name__ == "__main__":
    main()
