"""llama.cpp's K-quants with an importance matrix, of a llama. Started by ../tools.py; see job.py.

Its own mixture: embeddings in 6 bits, some matrices a step wider. Matrices whose rows are no multiple of
256 long get its other types. The vocabulary is left out of its files, as it is of other tools' weights.
Judged are the weights, in float32: that its products round their inputs to 8 bits is left out.
"""

import ctypes

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from job import CHECKED_SAMPLES, Clock, Job, Storage, load_tensors, read_job, report
from llama_cpp import GGML_TYPE_F32, Llama
from llama_cpp import llama_cpp as native
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

BATCH = 8
_usual_params = native.llama_model_default_params
OUTER = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
         "output.weight": "lm_head.weight"}  # fmt: skip
INNER = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


def names(blocks: int) -> dict[str, str]:
    """llama.cpp's name of each tensor -> that of the checkpoint."""
    inner = {
        f"blk.{block}.{theirs}.weight": f"model.layers.{block}.{ours}.weight"
        for block in range(blocks)
        for theirs, ours in INNER.items()
    }
    return OUTER | inner


def heads(config: AutoConfig, name: str) -> int | None:
    """Heads of a matrix whose rows llama.cpp wants in pairs of a rotation; None of others."""
    if ".attn_q." in name:
        return config.num_attention_heads
    return config.num_key_value_heads if ".attn_k." in name else None


def paired(weight: Tensor, count: int, back: bool = False) -> Tensor:
    """Rows of each head: halves of a rotation one after the other -> in pairs; or back."""
    half = len(weight) // count // 2
    parts = (count, half, 2) if back else (count, 2, half)
    return weight.reshape(*parts, -1).transpose(1, 2).reshape(weight.shape)


def write_float(job: Job, config: AutoConfig, file: str) -> None:
    """The checkpoint in GGUF, in float32."""
    writer = GGUFWriter(file, "llama")
    width = config.head_dim
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(width)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    tensors = load_tensors(job.model)
    for theirs, ours in names(config.num_hidden_layers).items():
        if ours in tensors:
            tensor, count = tensors[ours].float(), heads(config, theirs)
            tensor = paired(tensor, count) if count else tensor
            writer.add_tensor(theirs, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def importance(job: Job, config: AutoConfig) -> dict[str, np.ndarray]:
    """Mean square of each input of each matrix in the blocks, as llama-imatrix takes it."""
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).eval()
    sums: dict[str, Tensor] = {}

    def collect(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        sums[called[module]] = sums.get(called[module], 0) + args[0].flatten(0, -2).square().sum(0)

    called = {}
    for theirs, ours in names(config.num_hidden_layers).items():
        if theirs.startswith("blk.") and "norm" not in theirs:
            module = model.get_submodule(ours.removesuffix(".weight"))
            called[module] = theirs
            module.register_forward_pre_hook(collect)
    for ids in job.ids.split(BATCH):
        model(ids, use_cache=False)
    return {name: (total / job.ids.numel()).numpy() for name, total in sums.items()}


def quantize(source: str, out: str, kind: str, means: dict[str, np.ndarray]) -> None:
    how = native.llama_model_quantize_default_params()
    how.nthread = 1
    how.ftype = getattr(native, f"LLAMA_FTYPE_MOSTLY_{kind}")
    matrix = (native.llama_model_imatrix_data * (len(means) + 1))()  # ends with one that has no name
    for entry, (name, mean) in zip(matrix, means.items(), strict=False):
        entry.name, entry.size = name.encode(), mean.size
        entry.data = mean.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    how.imatrix = matrix
    if native.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(how)):
        raise SystemExit("llama_model_quantize failed")


def plain_layout() -> native.llama_model_params:
    """Weights as they lie in the file: laid out for AMX, matrices of these widths crash it (0.3.36)."""
    params = _usual_params()
    params.use_extra_bufts = False
    return params


def own_logits(job: Job, file: str) -> Tensor:
    """Of llama.cpp, its cache in float32."""
    length = job.ids.shape[1]
    native.llama_model_default_params = plain_layout
    model = Llama(
        file, n_ctx=length, n_batch=length, n_threads=1, n_threads_batch=1, logits_all=True,
        type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32, verbose=False,
    )  # fmt: skip
    found = []
    for row in job.ids[:CHECKED_SAMPLES].tolist():
        model.reset()
        model.eval(row)
        found.append(torch.tensor(np.array(model.scores[:length], dtype=np.float32)))
    return torch.stack(found)


def main() -> None:
    job, clock, storage = read_job(("k_m",)), Clock(), Storage()
    config = AutoConfig.from_pretrained(job.model)
    job.packed.mkdir()
    source, out = str(job.out / "float.gguf"), str(job.packed / "model.gguf")
    write_float(job, config, source)
    with clock.phase("quantize"):
        quantize(source, out, f"Q{job.bits}_K_M", importance(job, config))
    state, types, called = {}, {}, names(config.num_hidden_layers)
    for tensor in GGUFReader(out).tensors:
        values = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        count = heads(config, tensor.name)
        state[called[tensor.name]] = paired(values, count, back=True) if count else values
        types[called[tensor.name]] = GGMLQuantizationType(tensor.tensor_type).name
        if values.ndim == 2 and tensor.name.startswith("blk."):
            storage.bits += 8 * int(tensor.n_bytes)
            storage.weights += values.numel()
    more = {"types": types}
    report(job, clock, storage, own_logits(job, out), state, ("llama-cpp-python",), more)


if __name__ == "__main__":
    main()
