"""Random models of every family that Senmon reads and writes, in two sizes, and the odd configurations of each.

A case is a family and what is odd about its configuration. `config(case, size)` gives the transformers configuration,
`build(config, seed)` the model with weights that hide nothing: matrices of standard deviation 0.2 or more, norm weights
around one, biases, sinks and score corrections away from zero.
"""

import re
from contextlib import contextmanager

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, logging

logging.disable_progress_bar()

# Keys of the configuration, by size. "golden" fits a repository, "import" is what check_import.py compares.
# `wide` and `narrow` are the widths of a dense MLP and of an expert.
SIZES = {
    "golden": {"vocab": 96, "hidden": 24, "layers": 2, "heads": 4, "kv": 2, "head_dim": 10, "wide": 20, "narrow": 8},
    "import": {"vocab": 512, "hidden": 128, "layers": 3, "heads": 8, "kv": 4, "head_dim": 24, "wide": 192, "narrow": 64},
}


def _base(z):
    return {
        "vocab_size": z["vocab"], "hidden_size": z["hidden"], "num_hidden_layers": z["layers"],
        "num_attention_heads": z["heads"], "max_position_embeddings": 512,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
    }


def _rope(theta):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def _scaled(kind, theta=10000.0, **keys):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **keys}}


def _yarn(theta=100.0, **keys):
    """Yarn for four times 16 positions; theta is low so that some frequencies are kept, some mixed and some divided."""
    return _scaled("yarn", theta, factor=4.0, original_max_position_embeddings=16, beta_fast=2.0, beta_slow=0.25, **keys)


def _factors(dim, first, step):
    """A longrope list: one factor for each of dim / 2 frequencies."""
    return [first + step * i for i in range(dim // 2)]


def _latent(z):
    """Latent attention: the widths of heads and latents, none of them hidden / heads; the rest as in dots1."""
    return {
        "kv_lora_rank": 14, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 5,
        "num_key_value_heads": z["heads"], "moe_intermediate_size": z["narrow"], "intermediate_size": z["wide"]}


def _stacks(z):
    """The sizes of an encoder and a decoder; 8 buckets up to distance 12, so that a prompt has them all."""
    return {
        "d_model": z["hidden"], "num_heads": z["heads"], "d_kv": 5, "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 12}


# case -> keys by size. The case's name begins with its family. New ones come last: a case's seeds go by its place.
CASES = {
    "mixtral-top2": lambda z: {
        "intermediate_size": z["narrow"], "num_local_experts": 8, "num_experts_per_tok": 2,
        "num_key_value_heads": z["kv"], **_rope(20000.0)},
    "mixtral-top1-head-dim": lambda z: {
        "intermediate_size": 2 * z["narrow"], "num_local_experts": 4, "num_experts_per_tok": 1,
        "num_key_value_heads": 1, "head_dim": z["head_dim"], "rms_norm_eps": 1e-3},
    "mixtral-window-tied": lambda z: {
        "intermediate_size": z["narrow"], "num_local_experts": 5, "num_experts_per_tok": 3,
        "num_key_value_heads": z["heads"], "sliding_window": 7, "tie_word_embeddings": True},
    "olmoe-raw": lambda z: {
        "intermediate_size": z["narrow"], "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": False,
        "num_key_value_heads": z["kv"]},
    "olmoe-normalised-tied": lambda z: {
        "intermediate_size": z["narrow"], "num_experts": 8, "num_experts_per_tok": 4, "norm_topk_prob": True,
        "num_key_value_heads": z["heads"], "tie_word_embeddings": True, **_rope(500.0)},
    "olmoe-bias": lambda z: {
        "intermediate_size": z["narrow"], "num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": False,
        "num_key_value_heads": z["kv"], "attention_bias": True},
    "qwen3_moe-normalised": lambda z: {
        "moe_intermediate_size": z["narrow"], "intermediate_size": z["wide"], "num_experts": 8,
        "num_experts_per_tok": 4, "norm_topk_prob": True, "num_key_value_heads": z["kv"],
        "head_dim": z["head_dim"], **_rope(1000000.0)},
    "qwen3_moe-raw-dense-first": lambda z: {
        "moe_intermediate_size": z["narrow"], "intermediate_size": z["wide"], "num_experts": 8,
        "num_experts_per_tok": 3, "norm_topk_prob": False, "num_key_value_heads": z["heads"],
        "mlp_only_layers": [0]},
    "qwen3_moe-sparse-step-tied-bias": lambda z: {
        "moe_intermediate_size": z["narrow"], "intermediate_size": z["wide"], "num_experts": 7,
        "num_experts_per_tok": 1, "norm_topk_prob": False, "num_key_value_heads": 1, "head_dim": z["head_dim"],
        "decoder_sparse_step": 2, "tie_word_embeddings": True, "attention_bias": True},
    "dots1-groups": lambda z: {
        "moe_intermediate_size": z["narrow"], "intermediate_size": z["wide"], "n_routed_experts": 8,
        "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5, "norm_topk_prob": True, "num_key_value_heads": z["kv"],
        "sliding_window": None, "head_dim": z["head_dim"]},
    "dots1-raw-shared2": lambda z: {
        "moe_intermediate_size": z["narrow"], "intermediate_size": z["wide"], "n_routed_experts": 6,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 2, "first_k_dense_replace": 0,
        "routed_scaling_factor": 0.7, "norm_topk_prob": False, "num_key_value_heads": z["heads"],
        "sliding_window": None, "attention_bias": True, "tie_word_embeddings": True},
    "dots1-half-groups": lambda z: {
        "moe_intermediate_size": z["narrow"], "intermediate_size": z["wide"], "n_routed_experts": 8,
        "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.0, "norm_topk_prob": True, "num_key_value_heads": 1, "sliding_window": None},
    "llama-plain": lambda z: {
        "intermediate_size": z["wide"], "num_key_value_heads": z["heads"]},
    "llama-bias-tied-head-dim": lambda z: {
        "intermediate_size": z["wide"], "num_key_value_heads": z["kv"], "head_dim": z["head_dim"],
        "attention_bias": True, "tie_word_embeddings": True, **_rope(500000.0)},
    "qwen3-plain": lambda z: {
        "intermediate_size": z["wide"], "num_key_value_heads": z["kv"], "head_dim": z["hidden"] // z["heads"]},
    "qwen3-bias-tied-head-dim": lambda z: {
        "intermediate_size": z["wide"], "num_key_value_heads": 1, "head_dim": z["head_dim"],
        "attention_bias": True, "tie_word_embeddings": True, **_rope(50.0)},
    "mistral-window-llama3": lambda z: {
        "rms_norm_eps": 0.03, "intermediate_size": z["wide"], "num_key_value_heads": z["kv"],
        "head_dim": z["head_dim"], "sliding_window": 7,
        **_scaled("llama3", 100.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=3.0, original_max_position_embeddings=20)},
    "mistral-longrope-tied": lambda z: {
        "intermediate_size": z["wide"], "num_key_value_heads": z["heads"], "sliding_window": None,
        "tie_word_embeddings": True, "max_position_embeddings": 64,
        **_scaled("longrope", 1000.0, short_factor=_factors(z["hidden"] // z["heads"], 1.0, 0.2),
                  long_factor=_factors(z["hidden"] // z["heads"], 1.5, 1.1), original_max_position_embeddings=16)},
    "mistral-dynamic": lambda z: {
        "intermediate_size": z["wide"], "num_key_value_heads": 1, "sliding_window": None,
        "max_position_embeddings": 16, **_scaled("dynamic", 100.0, factor=3.0)},
    "flex_olmo-raw-top1-bias-linear": lambda z: {
        "rms_norm_eps": 0.03, "intermediate_size": z["narrow"], "num_experts": 3, "num_experts_per_tok": 1,
        "norm_topk_prob": False,
        "num_key_value_heads": z["kv"], "attention_bias": True, **_scaled("linear", 1000.0, factor=3.0)},
    "flex_olmo-normalised-tied-head-dim-yarn": lambda z: {
        "rms_norm_eps": 0.03, "intermediate_size": z["narrow"], "num_experts": 6, "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "num_key_value_heads": z["heads"], "head_dim": z["head_dim"], "tie_word_embeddings": True, **_yarn()},
    "qwen2_moe-window-normalised-tied": lambda z: {
        "rms_norm_eps": 0.03, "moe_intermediate_size": z["narrow"], "intermediate_size": z["wide"],
        "shared_expert_intermediate_size": 6,
        "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True, "num_key_value_heads": z["kv"],
        "use_sliding_window": True, "sliding_window": 7, "num_hidden_layers": 3, "max_window_layers": 2,
        "tie_word_embeddings": True},
    "qwen2_moe-raw-top1-step-yarn": lambda z: {
        "moe_intermediate_size": z["narrow"], "intermediate_size": z["wide"], "shared_expert_intermediate_size": 6,
        "num_experts": 4, "num_experts_per_tok": 1, "norm_topk_prob": False, "num_key_value_heads": 1,
        "decoder_sparse_step": 2, "head_dim": z["head_dim"], **_yarn(attention_factor=1.3)},
    "qwen2_moe-no-bias-dense-last": lambda z: {
        "moe_intermediate_size": z["narrow"], "intermediate_size": z["wide"], "shared_expert_intermediate_size": 10,
        "num_experts": 4, "num_experts_per_tok": 3, "norm_topk_prob": False, "num_key_value_heads": 1,
        "mlp_only_layers": [1], "qkv_bias": False},
    "deepseek_v2-greedy-yarn-mlp-bias": lambda z: {
        **_latent(z), "q_lora_rank": None, "n_routed_experts": 6, "num_experts_per_tok": 3, "n_shared_experts": 2,
        "first_k_dense_replace": 1, "topk_method": "greedy", "routed_scaling_factor": 1.0, "mlp_bias": True,
        **_yarn(mscale=0.9, mscale_all_dim=0.5)},
    "deepseek_v2-groups-scaled-bias-tied": lambda z: {
        **_latent(z), "q_lora_rank": 12, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 1,
        "first_k_dense_replace": 0, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
        "routed_scaling_factor": 2.5, "attention_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 0.03},
    "deepseek_v3-groups-yarn": lambda z: {
        "rms_norm_eps": 0.03, **_latent(z), "q_lora_rank": 12, "n_routed_experts": 8, "num_experts_per_tok": 3,
        "n_group": 4, "topk_group": 2,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
        **_yarn(mscale=1.0, mscale_all_dim=1.0)},
    "deepseek_v3-raw-top1-half-bias-tied": lambda z: {
        **_latent(z), "q_lora_rank": None, "n_routed_experts": 4, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1,
        "n_shared_experts": 2, "first_k_dense_replace": 0, "routed_scaling_factor": 0.7, "norm_topk_prob": False,
        "rope_interleave": False, "attention_bias": True, "tie_word_embeddings": True},
    "gpt_oss-sinks-window-yarn": lambda z: {
        "rms_norm_eps": 0.03, "intermediate_size": z["narrow"], "num_local_experts": 6, "num_experts_per_tok": 2,
        "num_key_value_heads": z["kv"],
        "head_dim": z["head_dim"], "sliding_window": 7, "swiglu_limit": 0.7, **_yarn(truncate=False)},
    "gpt_oss-top1-full-first-tied": lambda z: {
        "intermediate_size": z["narrow"], "num_local_experts": 4, "num_experts_per_tok": 1, "num_key_value_heads": 1,
        "head_dim": z["hidden"] // z["heads"], "sliding_window": 5, "swiglu_limit": 0.5, "swiglu_alpha": 1.1,
        "layer_types": ["full_attention", "sliding_attention"] * (z["layers"] // 2) + ["full_attention"] * (z["layers"] % 2),
        "attention_bias": False, "tie_word_embeddings": True, **_rope(1000.0)},
    "gpt_oss-mxfp4": lambda z: {
        "hidden_size": 32, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2,
        "num_key_value_heads": 2, "head_dim": 6, "sliding_window": 7, "tie_word_embeddings": True, **_yarn(truncate=False)},
    "granitemoe-multipliers-dynamic": lambda z: {
        "intermediate_size": z["narrow"], "num_local_experts": 6, "num_experts_per_tok": 2, "num_key_value_heads": z["kv"],
        "embedding_multiplier": 2.5, "residual_multiplier": 0.4, "attention_multiplier": 0.3, "logits_scaling": 3.0,
        "max_position_embeddings": 16, **_scaled("dynamic", 100.0, factor=2.0)},
    "granitemoe-bias-tied-head-dim": lambda z: {
        "rms_norm_eps": 0.03, "intermediate_size": z["narrow"], "num_local_experts": 5, "num_experts_per_tok": 3,
        "num_key_value_heads": 1,
        "head_dim": z["head_dim"], "attention_bias": True, "tie_word_embeddings": True, "logits_scaling": 0.5,
        # Scores of wide models that nothing scales leave f32 no digits to compare.
        **({} if z is SIZES["golden"] else {"attention_multiplier": 0.2})},
    "granitemoeshared-multipliers": lambda z: {
        "rms_norm_eps": 0.03, "intermediate_size": z["narrow"], "num_local_experts": 6, "num_experts_per_tok": 2,
        "num_key_value_heads": z["kv"],
        "shared_intermediate_size": 10, "embedding_multiplier": 1.7, "residual_multiplier": 0.6,
        "attention_multiplier": 0.2, "logits_scaling": 2.0},
    "granitemoeshared-no-shared-top1-tied": lambda z: {
        "intermediate_size": z["narrow"], "num_local_experts": 4, "num_experts_per_tok": 1, "num_key_value_heads": z["heads"],
        "shared_intermediate_size": 0, "residual_multiplier": 0.8, "attention_multiplier": 0.5, "tie_word_embeddings": True},
    "phimoe-biases-window": lambda z: {
        "rms_norm_eps": 0.03, "intermediate_size": z["narrow"], "num_local_experts": 5, "num_key_value_heads": z["kv"],
        "sliding_window": 7,
        "attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.3, **_rope(100.0)},
    "phimoe-longrope-beyond-tied": lambda z: {  # with short factors = long factors, see the README
        "intermediate_size": z["narrow"], "num_local_experts": 4, "num_key_value_heads": 1, "tie_word_embeddings": True,
        **_scaled("longrope", 1000.0, short_factor=_factors(z["hidden"] // z["heads"], 1.0, 0.7),
                  long_factor=_factors(z["hidden"] // z["heads"], 1.0, 0.7), short_mscale=1.1, long_mscale=1.4,
                  original_max_position_embeddings=16)},
    "phimoe-longrope-within-head-dim": lambda z: {
        "intermediate_size": z["narrow"], "num_local_experts": 4, "num_key_value_heads": z["heads"],
        "head_dim": z["head_dim"], "router_jitter_noise": 0.15,
        **_scaled("longrope", 1000.0, short_factor=_factors(z["head_dim"], 1.0, 0.3),
                  long_factor=_factors(z["head_dim"], 2.0, 1.3), short_mscale=1.2, long_mscale=1.5,
                  original_max_position_embeddings=256)},
    "ernie4_5_moe-biases-interval": lambda z: {
        "rms_norm_eps": 0.03, "moe_intermediate_size": z["narrow"], "intermediate_size": z["wide"],
        "moe_num_experts": 6, "moe_k": 2,
        "moe_num_shared_experts": 2, "moe_layer_start_index": 0, "moe_layer_interval": 2, "use_bias": True,
        "num_key_value_heads": z["kv"], **_rope(100.0)},
    "ernie4_5_moe-untied-norm-min-end": lambda z: {
        "moe_intermediate_size": z["narrow"], "intermediate_size": z["wide"], "moe_num_experts": 6, "moe_k": 3,
        "moe_num_shared_experts": 0, "moe_layer_start_index": 0, "moe_layer_end_index": z["layers"] - 2,
        "moe_norm_min": 0.9, "tie_word_embeddings": False, "num_key_value_heads": 1, "head_dim": z["head_dim"]},
    "glm4_moe-qk-norm-groups-bias": lambda z: {
        "rms_norm_eps": 0.03, "moe_intermediate_size": z["narrow"], "intermediate_size": z["wide"], "n_routed_experts": 8,
        "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5, "norm_topk_prob": True, "num_key_value_heads": z["kv"], "head_dim": 12,
        "use_qk_norm": True, "attention_bias": True},
    "glm4_moe-raw-top1-quarter-yarn-tied": lambda z: {
        "moe_intermediate_size": z["narrow"], "intermediate_size": z["wide"], "n_routed_experts": 4,
        "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 2, "first_k_dense_replace": 0,
        "routed_scaling_factor": 0.7, "norm_topk_prob": False, "num_key_value_heads": 1, "head_dim": 16,
        "tie_word_embeddings": True, **_yarn(20.0, partial_rotary_factor=0.25)},
    "hunyuan_v1_moe-alpha-topk-by-layer": lambda z: {
        "rms_norm_eps": 0.03, "intermediate_size": z["narrow"], "num_experts": 6,
        "moe_topk": [2, 3] * (z["layers"] // 2) + [1] * (z["layers"] % 2),
        "num_key_value_heads": z["kv"], "head_dim": z["head_dim"], **_scaled("dynamic", 100.0, alpha=50.0, factor=1.0)},
    "hunyuan_v1_moe-bias-tied": lambda z: {
        "intermediate_size": z["narrow"], "num_experts": 5, "moe_topk": 3, "num_key_value_heads": 1,
        "head_dim": z["hidden"] // z["heads"], "attention_bias": True, "tie_word_embeddings": True},
    "minimax_m2-rotary-dim": lambda z: {
        "rms_norm_eps": 0.03, "intermediate_size": z["narrow"], "num_local_experts": 6, "num_experts_per_tok": 2,
        "num_key_value_heads": z["kv"],
        "head_dim": 12, "rotary_dim": 8, **_rope(100.0)},
    "minimax_m2-linear-half-tied": lambda z: {
        "intermediate_size": z["narrow"], "num_local_experts": 6, "num_experts_per_tok": 4, "num_key_value_heads": 1,
        "head_dim": 8, "tie_word_embeddings": True, **_scaled("linear", 1000.0, factor=2.0, partial_rotary_factor=0.5)},
    "t5-relu-tied-decoder2": lambda z: {**_stacks(z), "d_ff": z["wide"], "num_layers": 1, "num_decoder_layers": 2},
    "t5-gated-head": lambda z: {
        "layer_norm_epsilon": 0.03, **_stacks(z), "d_ff": z["wide"], "num_layers": 2,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "switch_transformers-within-capacity": lambda z: {
        "layer_norm_epsilon": 0.03, **_stacks(z), "d_ff": z["narrow"], "num_layers": 2, "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 3, "expert_capacity": 64, "router_bias": True},
    "switch_transformers-drops-head": lambda z: {
        **_stacks(z), "d_ff": z["narrow"], "num_layers": 1, "num_decoder_layers": 3, "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1, "num_experts": 3, "expert_capacity": 5, "dense_act_fn": "gelu_new",
        "tie_word_embeddings": False},
}


# Cases whose config.json is rewritten with the keys of published checkpoints, see make_families.py.
PUBLISHED_KEYS = {
    "mistral-longrope-tied", "qwen2_moe-window-normalised-tied", "deepseek_v3-groups-yarn", "gpt_oss-sinks-window-yarn",
    "granitemoe-multipliers-dynamic", "phimoe-longrope-within-head-dim", "glm4_moe-qk-norm-groups-bias",
    "hunyuan_v1_moe-alpha-topk-by-layer", "minimax_m2-rotary-dim", "t5-gated-head",
}


def family(case):
    """The `model_type` of a case."""
    return case.split("-")[0]


def two_stacks(case):
    """Whether a case is an encoder and a decoder."""
    return family(case) in ("t5", "switch_transformers")


def config(case, size):
    """The transformers configuration of a case in one of the SIZES."""
    z = SIZES[size]
    if size == "golden" and list(CASES).index(case) >= list(CASES).index("mistral-window-llama3"):
        z = {**z, "vocab": 64}  # there are many by now
    base = {"vocab_size": z["vocab"]} if two_stacks(case) else _base(z)
    cfg = AutoConfig.for_model(family(case), **{**base, **CASES[case](z)})
    if CASES[case](z).get("tie_word_embeddings") is False:
        cfg.tie_word_embeddings = False  # T5's own is always true, but its published checkpoints have a head
    return cfg


def build(cfg, seed, std=0.2):
    """A model in f32 with eager attention and experts, its weights drawn anew from `seed`."""
    tied = cfg.tie_word_embeddings
    cfg = type(cfg).from_dict(cfg.to_dict())
    cfg.tie_word_embeddings = tied
    auto = AutoModelForSeq2SeqLM if cfg.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(cfg, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager")
    randomize(model, seed, std)
    if cfg.is_encoder_decoder:
        model.generation_config.decoder_start_token_id = cfg.pad_token_id
    return model.eval()


# The last part of a parameter's or buffer's path -> its standard deviation, where it is not as in `randomize`:
# a sink weighs against whole scores, Ernie's correction against probabilities; T5 scales neither its scores nor its embedding.
DEVIATIONS = {
    "sinks": 1.0, "moe_statics.e_score_correction_bias": 0.1, "relative_attention_bias.weight": 0.5, "shared.weight": 1.0}


@torch.no_grad()
def randomize(model, seed, std=0.2):
    """Matrices ~ N(0, std), biases and score corrections ~ N(0, 0.2), norm weights ~ N(1, 0.2)."""
    g = torch.Generator().manual_seed(seed)
    seen = set()
    named = list(model.named_parameters()) + [
        (name, b) for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
    for name, tensor in named:
        if id(tensor) in seen:  # tied
            continue
        seen.add(id(tensor))
        noise = torch.randn(tensor.shape, generator=g)
        own = next((value for end, value in DEVIATIONS.items() if name.endswith(end)), None)
        if own:
            tensor.copy_(noise * own)
        elif tensor.dim() >= 2:
            tensor.copy_(noise * std)
        elif name.endswith("bias"):
            tensor.copy_(noise * 0.2)
        else:
            assert "norm" in name, name
            tensor.copy_(1 + noise * 0.2)


def routers(model):
    """[(layer, router module)] of the MoE layers, bottom to top. A layer is a number, or encoder.N or decoder.N."""
    found = []
    for name, module in model.named_modules():
        if re.search(r"Router$|MoEV1Gate$", type(module).__name__):
            stack, layer = re.search(r"(\w+)\.(?:layers|block)\.(\d+)\.", name).groups()
            found.append((int(layer) if stack == "model" else f"{stack}.{layer}", module))
    return found


def decision(out):
    """(logits [T, E], weights [T, K], experts [T, K]) of what a router returns. A token that Switch drops has weight 0."""
    first, second, third = (t.detach() for t in out)
    if third.dim() == 3:  # Switch: what is dispatched, one-hot; the largest probability; logits
        kept = first[0].sum(-1, keepdim=True)
        return third[0], second[0] * kept, third[0].argmax(-1, keepdim=True)
    return first, second, third


@contextmanager
def recorded(model):
    """Records, for each MoE layer, (logits [T, E], weights [T, K], experts [T, K]) of every forward pass inside."""
    seen, hooks = {}, []
    for layer, module in routers(model):
        hook = lambda _m, _i, out, layer=layer: seen.__setitem__(layer, decision(out))
        hooks.append(module.register_forward_hook(hook))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def forget_lengths(model):
    """Dynamic frequencies remember the longest sequence; this brings back those of a fresh model."""
    for module in model.modules():
        if hasattr(module, "original_inv_freq"):
            module.inv_freq = module.original_inv_freq.clone()
            module.max_seq_len_cached = module.original_max_seq_len


@torch.no_grad()
def forward(model, tokens, decoder_tokens=None):
    """Logits [S, V] of one sequence (of the decoder's, if there are two) and the routing by layer (see `recorded`)."""
    forget_lengths(model)
    inputs = {"input_ids": tokens[None].long()}
    if decoder_tokens is not None:
        inputs["decoder_input_ids"] = decoder_tokens[None].long()
    with recorded(model) as seen:
        logits = model(**inputs, use_cache=False).logits[0]
    return logits, dict(seen)


def _gap(ranked, place):
    """The smallest difference between places `place` - 1 and `place` of rows in falling order, where there are both."""
    if place >= ranked.shape[-1]:
        return float("inf")
    gap = ranked[:, place - 1] - ranked[:, place]
    return gap[gap.isfinite()].min().item() if gap.isfinite().any() else float("inf")


def _sparse_mixer_gap(logits, noise):
    """How near phimoe's two cuts are to any expert: (largest - own) / max(|own|, largest) against twice the noise."""
    smallest, rest = float("inf"), logits.clone()
    for _ in range(2):
        largest, expert = rest.max(-1, keepdim=True)
        ratio = (largest - logits) / torch.maximum(logits.abs(), largest)
        smallest = min(smallest, (ratio - 2 * noise)[rest.isfinite()].abs().min().item())
        rest.scatter_(1, expert, float("-inf"))
    return smallest


def margins(model, routing, large=False):
    """The smallest gap by which any token's selection, and the order of its picks, was decided.

    Where probabilities decide, it is their gap; in a `large` model most are so near 0 that a tenth of the logits' gap says
    better what rounding may turn around.
    """
    pick, order = float("inf"), float("inf")
    kind, cfg = model.config.model_type, model.config
    for layer, module in routers(model):
        logits, weights, experts = routing[layer]
        k, e = experts.shape[-1], logits.shape[-1]
        groups, best, top = 1, 1, 2
        if kind in ("dots1", "deepseek_v3", "glm4_moe"):  # sigmoid scores, picked with a bias within the best groups
            choice = logits.sigmoid() + module.e_score_correction_bias
            groups, best = module.num_group, module.topk_group
        elif kind == "minimax_m2":
            choice = logits.sigmoid() + model.model.layers[layer].mlp.e_score_correction_bias
        elif kind == "ernie4_5_moe":
            choice = logits.softmax(-1) + module.moe_statics.e_score_correction_bias
        elif large and not (kind == "deepseek_v2" and module.topk_method != "greedy"):
            choice = logits / 10
        else:
            choice = logits.softmax(-1)
        if kind == "deepseek_v2" and module.topk_method != "greedy":
            groups, best, top = module.num_group, module.topk_group, 1
        if best < groups:
            by_group = choice.view(-1, groups, e // groups)
            ranked = by_group.topk(top, dim=-1)[0].sum(-1).sort(descending=True)
            pick = min(pick, _gap(ranked[0], best))
            mask = torch.zeros_like(by_group[..., 0]).scatter_(1, ranked[1][:, :best], 1.0)
            choice = by_group.masked_fill(mask[..., None] == 0, float("-inf")).view(-1, e)
        ranked = choice.sort(descending=True)[0]
        pick = min(pick, _gap(ranked, k))
        if kind == "phimoe":  # picks one after the other, their weights are often both 1
            pick = min(pick, _gap(ranked, 1), _sparse_mixer_gap(logits, cfg.router_jitter_noise))
        elif k > 1:
            ordered = weights.sort(descending=True)[0]
            order = min(order, (ordered[:, :-1] - ordered[:, 1:]).min().item())
    return pick, order


def unused(routing):
    """How many experts no token went to, over all layers."""
    return sum(logits.shape[-1] - experts.unique().numel() for logits, _, experts in routing.values())
