"""A GGUF file of Qwen3-30B-A3B's full shape with random weights in Q4_K (about 17.3 GB): what a machine of 24 GiB must load and run.

    make_large.py OUT.gguf [--layers 48]

48 layers of 128 experts, 8 a token, H 2048, I 768, 32 heads on 4 of keys and values, vocabulary 151,936; experts, attention and embeddings in Q4_K, the head in
Q6_K, routers and norms in F32. The tokenizer has the 256 bytes and next to nothing else.
"""

import argparse
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from tqdm import tqdm

HIDDEN, INNER, HEADS, KV_HEADS, HEAD, EXPERTS, TOP_K, VOCAB = 2048, 768, 32, 4, 128, 128, 8, 151_936
DEVIATION = 0.02


def bytes_as_letters():
    """The letter that stands for each byte in a byte-level BPE."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def blocks(random, kind, count):
    """Random blocks of 256 weights about 0. A prime number of them repeats, so that no two experts are the same."""
    some = min(count, 4093)
    if kind == Type.Q4_K:
        # d · 32 · q - dmin · 32, with q from 0 to 15: all eight scales and minima are 32.
        data = np.empty((some, 144), np.uint8)
        d = DEVIATION / 32 / np.sqrt((16**2 - 1) / 12)
        data[:, 0:4] = np.array([d, 7.5 * d], np.float16).view(np.uint8)
        data[:, 4:12], data[:, 12:16] = 0xA0, 0
        data[:, 16:] = random.integers(0, 256, (some, 128), np.uint8)
    else:
        # d · 16 · (q - 32), with q from 0 to 63.
        data = np.empty((some, 210), np.uint8)
        data[:, :192] = random.integers(0, 256, (some, 192), np.uint8)
        data[:, 192:208] = 16
        data[:, 208:] = np.array([DEVIATION / 16 / np.sqrt((64**2 - 1) / 12)], np.float16).view(np.uint8)
    return np.resize(data, (count, data.shape[1]))


def tensors(layers):
    """Name, shape and type of all, in the order of the file."""
    yield "token_embd.weight", (VOCAB, HIDDEN), Type.Q4_K
    for layer in range(layers):
        at = f"blk.{layer}."
        yield at + "attn_norm.weight", (HIDDEN,), Type.F32
        yield at + "attn_q.weight", (HEADS * HEAD, HIDDEN), Type.Q4_K
        yield at + "attn_k.weight", (KV_HEADS * HEAD, HIDDEN), Type.Q4_K
        yield at + "attn_v.weight", (KV_HEADS * HEAD, HIDDEN), Type.Q4_K
        yield at + "attn_output.weight", (HIDDEN, HEADS * HEAD), Type.Q4_K
        yield at + "attn_q_norm.weight", (HEAD,), Type.F32
        yield at + "attn_k_norm.weight", (HEAD,), Type.F32
        yield at + "ffn_norm.weight", (HIDDEN,), Type.F32
        yield at + "ffn_gate_inp.weight", (EXPERTS, HIDDEN), Type.F32
        yield at + "ffn_gate_exps.weight", (EXPERTS, INNER, HIDDEN), Type.Q4_K
        yield at + "ffn_up_exps.weight", (EXPERTS, INNER, HIDDEN), Type.Q4_K
        yield at + "ffn_down_exps.weight", (EXPERTS, HIDDEN, INNER), Type.Q4_K
    yield "output_norm.weight", (HIDDEN,), Type.F32
    yield "output.weight", (VOCAB, HIDDEN), Type.Q6_K


def data(random, shape, kind):
    """The elements as they are stored."""
    count = int(np.prod(shape))
    if kind == Type.F32:
        one = np.ones(shape, np.float32)
        return one if len(shape) == 1 else random.normal(0, DEVIATION, shape).astype(np.float32)
    return blocks(random, kind, count // 256).reshape(*shape[:-1], -1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=48)
    args = parser.parse_args()
    writer = GGUFWriter(args.out, "qwen3moe")
    writer.add_block_count(args.layers)
    writer.add_context_length(32_768)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(6144)
    writer.add_expert_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(TOP_K)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    letters = bytes_as_letters()
    # A merge there must be.
    joined = (letters[ord(" ")], letters[ord("t")])
    writer.add_token_list([*letters, "".join(joined), *(f"<unused{i}>" for i in range(VOCAB - 257))])
    writer.add_token_types([*([1] * 257), *([5] * (VOCAB - 257))])
    writer.add_token_merges([" ".join(joined)])
    writer.add_bos_token_id(VOCAB - 2)
    writer.add_eos_token_id(VOCAB - 1)
    random = np.random.default_rng(1)
    sizes = {Type.F32: (1, 4), Type.Q4_K: (256, 144), Type.Q6_K: (256, 210)}
    for name, shape, kind in tensors(args.layers):
        block, size = sizes[kind]
        nbytes = int(np.prod(shape)) // block * size
        stored = shape if kind == Type.F32 else (*shape[:-1], shape[-1] // block * size)
        dtype = np.dtype(np.float32 if kind == Type.F32 else np.uint8)
        writer.add_tensor_info(name, stored, dtype, nbytes, None if kind == Type.F32 else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, shape, kind in tqdm(list(tensors(args.layers))):
        writer.write_tensor_data(data(random, shape, kind))
    writer.close()


if __name__ == "__main__":
    main()
