"""Random models of every architecture of GGUF that Senmon reads, and how the package `gguf` writes them.

A case is an architecture, a transformers configuration that it can say, and the types its matrices are written in. Names of tensors
come from the package's own map; keys are set through its writer. What llama.cpp's converter does to tensors (heads of queries and
keys turned, experts stacked, the latent matrices of DeepSeek in two) is done here again.
"""

import gguf
import numpy as np
import torch
from transformers import AutoConfig

import families

Q = gguf.GGMLQuantizationType
BASE = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}


def _rope(theta, **keys):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **keys}}


def _yarn(theta, **keys):
    """What llama.cpp fixes of YaRN: 32 and 1 turns."""
    return {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": theta, "factor": 4.0, "original_max_position_embeddings": 32,
        "beta_fast": 32.0, "beta_slow": 1.0, **keys}}


_LATENT = {
    "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 8, "v_head_dim": 32, "num_key_value_heads": 4,
    "moe_intermediate_size": 32, "intermediate_size": 64, "n_routed_experts": 8, "num_experts_per_tok": 3,
    "first_k_dense_replace": 1, "n_shared_experts": 1, "rms_norm_eps": 1e-6,
}
_SIGMOID = {
    "moe_intermediate_size": 32, "intermediate_size": 64, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5, "norm_topk_prob": True, "head_dim": 8,
}
# name -> (architecture, family, configuration, types of the matrices by turns)
CASES = {
    "llama-dense-llama3": ("llama", "llama", {"intermediate_size": 64, "tie_word_embeddings": True, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0}}, [Q.F32]),
    "llama-mixtral-q8_0": ("llama", "mixtral", {
        "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None, **_rope(100.0)}, [Q.Q8_0]),
    "olmoe-bf16": ("olmoe", "olmoe", {
        "intermediate_size": 32, "num_experts": 6, "num_experts_per_tok": 3, "num_key_value_heads": 4, "norm_topk_prob": False,
        **_rope(100.0)}, [Q.BF16]),
    "qwen2moe-legacy-mix": ("qwen2moe", "qwen2_moe", {
        "intermediate_size": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64, "num_experts": 6,
        "num_experts_per_tok": 2, "norm_topk_prob": False, **_rope(1000.0)}, [Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0, Q.F16]),
    "qwen3moe-split-f16": ("qwen3moe", "qwen3_moe", {
        "intermediate_size": 64, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 4, "head_dim": 16,
        "norm_topk_prob": True, "mlp_only_layers": [], **_rope(1000.0)}, [Q.F16]),
    "qwen3-dense": ("qwen3", "qwen3", {
        "intermediate_size": 64, "head_dim": 16, "tie_word_embeddings": True, **_rope(1000.0)}, [Q.BF16]),
    "deepseek2-v3-yarn": ("deepseek2", "deepseek_v3", {
        **_LATENT, "q_lora_rank": 32, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
        **_yarn(100.0, mscale=1.0, mscale_all_dim=1.0)}, [Q.F16]),
    "deepseek2-v2-q8_0": ("deepseek2", "deepseek_v2", {
        **_LATENT, "q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
        "norm_topk_prob": False, **_rope(100.0)}, [Q.Q8_0]),
    "gpt-oss-mxfp4": ("gpt-oss", "gpt_oss", {
        "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 6,
        **_yarn(150.0, truncate=False)}, [Q.F32]),
    "granitemoe-shared": ("granitemoe", "granitemoeshared", {
        "intermediate_size": 32, "num_local_experts": 6, "num_experts_per_tok": 3, "shared_intermediate_size": 64, "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 2.0, "tie_word_embeddings": True, **_rope(100.0)},
        [Q.BF16]),
    "phimoe-longrope": ("phimoe", "phimoe", {
        "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True,
        "sliding_window": None, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 64, "factor": 2.0,
            "short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.0, 2.0, 3.0, 4.0], "short_mscale": 1.2, "long_mscale": 1.2}}, [Q.F16]),
    "glm4moe-f16": ("glm4moe", "glm4_moe", {
        **_SIGMOID, "head_dim": 16, "use_qk_norm": True, "attention_bias": True, **_rope(100.0, partial_rotary_factor=0.5)}, [Q.F16]),
    "dots1-q8_0": ("dots1", "dots1", {**_SIGMOID, "num_key_value_heads": 4, **_rope(100.0)}, [Q.Q8_0]),
    "ernie4_5-moe-bf16": ("ernie4_5-moe", "ernie4_5_moe", {
        "intermediate_size": 64, "moe_intermediate_size": 32, "moe_num_experts": 6, "moe_k": 2, "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1, "moe_layer_end_index": 1, "moe_layer_interval": 1, "use_bias": False, "tie_word_embeddings": True, **_rope(500.0)},
        [Q.BF16]),
    "hunyuan-moe-f16": ("hunyuan-moe", "hunyuan_v1_moe", {
        "intermediate_size": 32, "num_experts": 6, "moe_topk": 3, "head_dim": 8, "tie_word_embeddings": True, **_rope(100.0)}, [Q.F16]),
    "minimax-m2-q8_0": ("minimax-m2", "minimax_m2", {
        "intermediate_size": 32, "num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 16, "rotary_dim": 8, **_rope(100.0)}, [Q.Q8_0]),
    "qwen3moe-k-mix": ("qwen3moe", "qwen3_moe", {
        "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256, "num_experts": 2, "num_experts_per_tok": 1, "head_dim": 64,
        "num_hidden_layers": 1, "num_key_value_heads": 1, "norm_topk_prob": True, "mlp_only_layers": [], **_rope(1000.0)},
        [Q.Q4_K, Q.Q6_K, Q.Q5_K, Q.Q2_K, Q.Q3_K, Q.IQ4_XS, Q.IQ4_NL]),
}


def config(name):
    """The transformers configuration of a case."""
    _, family, keys, _ = CASES[name]
    return AutoConfig.for_model(family, **{**BASE, **keys})


def build(name, seed):
    """Its model."""
    return families.build(config(name), seed)


def as_llama_cpp(name, model):
    """The model as llama.cpp computes it where that is known to be otherwise, and what it is; else the model and nothing."""
    if CASES[name][0] != "gpt-oss":
        return model, None
    model.config.rope_parameters["truncate"] = True
    other = families.build(model.config, 0)
    other.load_state_dict(model.state_dict())
    model.config.rope_parameters["truncate"] = False
    return other, "with the ends of YaRN's ramp rounded to whole elements, as llama.cpp does"


def _experts(model, layer):
    """gate, up [E, I, H] and down [E, H, I] of a layer's experts, and their biases if there are."""
    found = dict(layer.named_parameters())
    both = next(v for n, v in found.items() if n.endswith(("gate_up_proj", "input_linear.weight")) and v.dim() == 3)
    down = next(v for n, v in found.items() if n.endswith(("down_proj", "output_linear.weight")) and v.dim() == 3)
    biases = [v for n, v in found.items() if n.endswith(("gate_up_proj_bias", "down_proj_bias"))]
    if model.config.model_type == "gpt_oss":  # [E, H, 2I] by turns, [E, I, H]
        both, down = both.transpose(1, 2), down.transpose(1, 2)
        gate, up = both[:, 0::2], both[:, 1::2]
        return gate, up, down, (biases[0][:, 0::2], biases[0][:, 1::2], biases[1])
    half = both.shape[1] // 2
    return both[:, :half], both[:, half:], down, None


def _turn(w, heads):
    """Rows of heads: halves by turns."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def tensors(name, model):
    """(name in GGUF, values) of all tensors."""
    arch, family, _, _ = CASES[name]
    cfg = model.config
    number = next(n for n, a in gguf.MODEL_ARCH_NAMES.items() if a == arch)
    names = gguf.get_tensor_name_map(number, cfg.num_hidden_layers)
    out, state = {}, dict(model.state_dict())
    layers = model.model.layers
    for l, layer in enumerate(layers):
        if any(p.dim() == 3 for p in layer.parameters()):
            gate, up, down, biases = _experts(model, layer)
            for part, w in zip(("gate", "up", "down"), (gate, up, down)):
                out[f"blk.{l}.ffn_{part}_exps.weight"] = w
            for part, b in zip(("gate", "up", "down"), biases or ()):
                out[f"blk.{l}.ffn_{part}_exps.bias"] = b
    for key, w in state.items():
        if w.dim() == 3 or key.endswith(("gate_up_proj_bias", "down_proj_bias")) or "inv_freq" in key:
            continue
        if key == "lm_head.weight" and cfg.tie_word_embeddings:
            continue
        if key.endswith("shared_mlp.input_linear.weight"):
            layer = key.split(".")[2]
            gate, up = w.chunk(2)
            out[f"blk.{layer}.ffn_gate_shexp.weight"], out[f"blk.{layer}.ffn_up_shexp.weight"] = gate, up
            continue
        if key.endswith("kv_b_proj.weight"):
            layer, heads = key.split(".")[2], cfg.num_attention_heads
            both = w.view(heads, cfg.qk_nope_head_dim + cfg.v_head_dim, w.shape[-1])
            out[f"blk.{layer}.attn_k_b.weight"] = both[:, : cfg.qk_nope_head_dim].transpose(1, 2)
            out[f"blk.{layer}.attn_v_b.weight"] = both[:, cfg.qk_nope_head_dim :]
            continue
        if arch in ("llama", "granitemoe") and ".q_proj." in key:
            w = _turn(w, cfg.num_attention_heads)
        if arch in ("llama", "granitemoe") and ".k_proj." in key:
            w = _turn(w, cfg.num_key_value_heads)
        if key.endswith("shared_expert_gate.weight"):
            w = w.reshape(-1)
        if "e_score_correction_bias" in key:
            out[f"blk.{key.split('.')[2]}.exp_probs_b.bias"] = w.reshape(-1)
            continue
        stem, end = (key, "") if key.endswith("sinks") else key.rsplit(".", 1)
        if arch == "granitemoe":  # as the published checkpoints have it
            stem = stem.replace("moe.router", "moe.router.layer")
        mapped = names.get_name(stem, try_suffixes=())
        if mapped is None:
            raise SystemExit(f"{name}: the package gguf has no name for {key}")
        out[f"{mapped}.{end or 'weight'}"] = w
    rope = getattr(cfg, "rope_parameters", None) or {}
    if rope.get("rope_type") == "llama3":
        inv = 1.0 / rope["rope_theta"] ** (torch.arange(0, 8, 2, dtype=torch.float32) / 8)
        bent = model.model.rotary_emb.inv_freq
        out["rope_freqs.weight"] = inv / bent
    if rope.get("rope_type") == "longrope":
        out["rope_factors_short.weight"] = torch.tensor(rope["short_factor"])
        out["rope_factors_long.weight"] = torch.tensor(rope["long_factor"])
    return out


def _keys(w, name, model):
    """Sets the metadata, as llama.cpp's converter does."""
    arch, family, _, _ = CASES[name]
    c = model.config
    get = lambda *keys: next((getattr(c, k) for k in keys if getattr(c, k, None) is not None), None)
    w.add_block_count(c.num_hidden_layers)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    latent = arch == "deepseek2"
    w.add_head_count_kv(1 if latent else c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_vocab_size(c.vocab_size)
    w.add_file_type(0)
    if not latent and get("head_dim") and arch not in ("granitemoe",):
        w.add_key_length(c.head_dim)
        w.add_value_length(c.head_dim)
    rope = c.rope_parameters
    w.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "yarn":
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(rope["factor"])
        w.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if latent:
            w.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
    if kind == "longrope":
        w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        w.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        w.add_rope_scaling_attn_factors(rope["short_mscale"])
    if latent:
        w.add_rope_dimension_count(c.qk_rope_head_dim)
    elif arch == "glm4moe":
        w.add_rope_dimension_count(int(c.head_dim * rope["partial_rotary_factor"]))
    elif arch == "minimax-m2":
        w.add_rope_dimension_count(c.rotary_dim)
    experts = get("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
    if experts and arch != "qwen3" and family != "llama":
        w.add_expert_count(experts)
        w.add_expert_used_count(get("moe_topk", "moe_k", "num_experts_per_tok"))
        width = get("moe_intermediate_size")
        if arch in ("gpt-oss", "hunyuan-moe", "minimax-m2"):
            width = c.intermediate_size
        if width:
            w.add_expert_feed_forward_length(width)
    if latent:
        if c.q_lora_rank:
            w.add_q_lora_rank(c.q_lora_rank)
        w.add_kv_lora_rank(c.kv_lora_rank)
        w.add_key_length(c.kv_lora_rank + c.qk_rope_head_dim)
        w.add_value_length(c.kv_lora_rank)
        w.add_key_length_mla(c.qk_nope_head_dim + c.qk_rope_head_dim)
        w.add_value_length_mla(c.v_head_dim)
    if arch in ("deepseek2", "dots1", "glm4moe"):
        w.add_leading_dense_block_count(c.first_k_dense_replace)
        w.add_expert_shared_count(c.n_shared_experts)
        w.add_expert_weights_scale(c.routed_scaling_factor)
        if c.norm_topk_prob:
            w.add_expert_weights_norm(True)
        w.add_expert_group_count(c.n_group)
        w.add_expert_group_used_count(c.topk_group)
        softmax = family == "deepseek_v2"
        w.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX if softmax else gguf.ExpertGatingFuncType.SIGMOID)
    if arch == "minimax-m2":
        w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if arch == "qwen2moe":
        w.add_expert_shared_feed_forward_length(c.shared_expert_intermediate_size)
    if arch == "granitemoe":
        w.add_expert_shared_feed_forward_length(c.shared_intermediate_size)
        w.add_attention_scale(c.attention_multiplier)
        w.add_embedding_scale(c.embedding_multiplier)
        w.add_residual_scale(c.residual_multiplier)
        w.add_logit_scale(c.logits_scaling)
        w.add_rope_dimension_count(c.hidden_size // c.num_attention_heads)
    if arch == "ernie4_5-moe":
        w.add_interleave_moe_layer_step(c.moe_layer_interval)
        w.add_leading_dense_block_count(c.moe_layer_start_index)
        w.add_expert_shared_count(c.moe_num_shared_experts)
        w.add_expert_shared_feed_forward_length(c.moe_num_shared_experts * c.moe_intermediate_size)
    if arch == "hunyuan-moe":
        w.add_expert_shared_count(1)
        w.add_expert_shared_feed_forward_length(c.intermediate_size)
    if arch == "gpt-oss":
        w.add_sliding_window(c.sliding_window)
    w.add_tokenizer_model("no_vocab")
    w.add_bos_token_id(0)
    w.add_eos_token_id(1)


def quantized(name, model):
    """(name in GGUF, type, bytes or values) of all tensors, and puts the values that the types hold into the model."""
    kinds = CASES[name][3]
    out, turn = [], 0
    for tensor, w in tensors(name, model).items():
        values = np.ascontiguousarray(w.detach().float().numpy())
        kind = Q.F32
        small = values.ndim < 2 or "ffn_gate_inp" in tensor
        if name.startswith("gpt-oss") and "_exps.weight" in tensor:
            kind = Q.MXFP4
        elif not small:
            kind = kinds[turn % len(kinds)]
            turn += 1
        out.append((tensor, kind, values if kind == Q.F32 else encode(values, kind)))
    return out


def encode(values, kind):
    """Values as blocks, by the package; the kinds it only reads get random blocks of sane scales."""
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        pass
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(values.size + int(kind))
    blocks = rng.integers(0, 256, (*values.shape[:-1], values.shape[-1] // block, size), dtype=np.uint8)
    # Where the scales of a block are, as halves.
    places = {Q.Q2_K: (80, 82), Q.Q3_K: (108,), Q.Q4_K: (0, 2), Q.Q5_K: (0, 2), Q.Q6_K: (208,), Q.IQ4_NL: (0,), Q.IQ4_XS: (0,)}
    large = {Q.Q2_K: 0.02, Q.Q3_K: 0.004, Q.Q4_K: 0.0008, Q.Q5_K: 0.0004, Q.Q6_K: 0.0001, Q.IQ4_NL: 0.003, Q.IQ4_XS: 0.0002}[kind]
    for place in places[kind]:
        scale = (large * (0.5 + rng.random(blocks.shape[:-1]))).astype(np.float16)
        blocks[..., place : place + 2] = scale[..., None].view(np.uint8).reshape(*scale.shape, 2)
    return blocks.reshape(*values.shape[:-1], -1)


def decode(data, kind):
    """The values of blocks, by the package."""
    return data if kind == Q.F32 else gguf.quants.dequantize(data, kind)


def put_back(name, model, written):
    """Gives the model the values that were written, so that it computes what the file says."""
    state = tensors(name, model)
    with torch.no_grad():
        for tensor, kind, data in written:
            values = torch.from_numpy(np.array(decode(data, kind), dtype=np.float32)).reshape(state[tensor].shape)
            target = state[tensor]
            if tensor.startswith("rope_f"):
                continue
            if CASES[name][0] in ("llama", "granitemoe") and (".attn_q." in tensor or ".attn_k." in tensor):
                heads = model.config.num_attention_heads if ".attn_q." in tensor else model.config.num_key_value_heads
                part = "q_proj" if ".attn_q." in tensor else "k_proj"
                attention = model.model.layers[int(tensor.split(".")[1])].self_attn
                own = getattr(getattr(attention, part), tensor.rsplit(".", 1)[1])
                rows = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:]).swapaxes(1, 2)
                own.copy_(rows.reshape(values.shape))
            else:
                target.copy_(values)  # a view of the parameter


def write(name, model, path, split=None):
    """Writes a case; returns what was written."""
    written = quantized(name, model)
    arch = CASES[name][0]
    extra = {"split_max_tensors": split} if split else {}
    w = gguf.GGUFWriter(str(path), arch, **extra)
    _keys(w, name, model)
    for tensor, kind, data in written:
        w.add_tensor(tensor, data, raw_dtype=None if kind == Q.F32 else kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return written
