//! A configuration of every family, as transformers writes it.

#![allow(dead_code)]

pub mod golden;

use senmon_models::Result;
use senmon_models::families::{FAMILIES, Json, family};
use senmon_models::spec::ModelSpec;
use serde_json::{Value, json};
use std::path::Path;

/// Keys that every family needs.
pub fn base(name: &str) -> Value {
    let mut config = json!({
        "model_type": name, "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "intermediate_size": 48,
        "hidden_act": "silu", "rope_theta": 20000.0, "torch_dtype": "bfloat16", "transformers_version": "4.57.0",
        "use_cache": true, "attention_dropout": 0.0, "initializer_range": 0.02, "tie_word_embeddings": false,
        "architectures": ["X"], "bos_token_id": 1, "eos_token_id": 2, "attention_bias": false,
    });
    let more = match name {
        "mixtral" => json!({ "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": null }),
        "olmoe" => {
            json!({ "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": false, "clip_qkv": null })
        }
        "qwen3_moe" => json!({
            "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": true, "moe_intermediate_size": 8,
            "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": false, "sliding_window": 4096,
            "max_window_layers": 2, "head_dim": 16,
        }),
        "dots1" => json!({
            "n_routed_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": true, "moe_intermediate_size": 8,
            "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
            "routed_scaling_factor": 2.5, "sliding_window": null, "max_window_layers": 62,
        }),
        "flex_olmo" => json!({ "num_experts": 4, "num_experts_per_tok": 2 }),
        "qwen2_moe" => json!({
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12,
        }),
        "deepseek_v2" => json!({
            "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_shared_experts": 2,
            "first_k_dense_replace": 1, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
            "q_lora_rank": null, "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5,
        }),
        "deepseek_v3" => json!({
            "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_shared_experts": 1,
            "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "q_lora_rank": 10, "kv_lora_rank": 12,
            "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "num_nextn_predict_layers": 1,
        }),
        "gpt_oss" => {
            json!({ "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, "head_dim": 8 })
        }
        "granitemoe" | "granitemoeshared" => json!({
            "num_local_experts": 4, "num_experts_per_tok": 2, "embedding_multiplier": 12.0, "logits_scaling": 8.0,
            "residual_multiplier": 0.5, "attention_multiplier": 0.25, "shared_intermediate_size": 8,
        }),
        "phimoe" => json!({ "num_local_experts": 4, "num_experts_per_tok": 2, "lm_head_bias": true }),
        "ernie4_5_moe" => json!({
            "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 8, "moe_num_shared_experts": 1,
            "moe_layer_interval": 2, "moe_layer_start_index": 1, "moe_layer_end_index": -1,
        }),
        "glm4_moe" => json!({
            "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_shared_experts": 1,
            "first_k_dense_replace": 1, "use_qk_norm": true, "partial_rotary_factor": 0.5,
        }),
        "hunyuan_v1_moe" => json!({ "num_experts": 4, "moe_topk": 2 }),
        "minimax_m2" => {
            json!({ "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 4, "head_dim": 8 })
        }
        "mistral" => json!({ "sliding_window": 16 }),
        "qwen3" => json!({ "use_sliding_window": false, "sliding_window": null, "head_dim": 16 }),
        _ => json!({ "mlp_bias": false }),
    };
    for (key, value) in more.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

/// The specification of a configuration.
pub fn read(config: &Value) -> Result<ModelSpec> {
    let name = config["model_type"].as_str().unwrap();
    (family(name).unwrap().read)(&Json::new(Path::new("config.json"), config.clone()).unwrap())
}

/// All families but our own.
pub fn known() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|family| family.name).filter(|name| *name != "senmon")
}
