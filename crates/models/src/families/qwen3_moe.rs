//! `qwen3_moe` (Qwen3-30B-A3B, 2505.09388): norms of each query and key head, weights normalised or not; every
//! `decoder_sparse_step`-th layer is MoE, but not those of `mlp_only_layers`.

use super::common::{
    Biases, Defaults, Json, Words, dense_layers, expect_decoder, moe_and_dense, no_shared,
    softmax_normalized, with, write_decoder,
};
use crate::error::Result;
use crate::spec::{ModelSpec, MoeSpec, QkNorm};
use senmon_moe::RouterConfig;
use serde_json::{Value, json};

pub(super) fn read(json: &Json) -> Result<ModelSpec> {
    let window = match json.bool_or("use_sliding_window", false)? {
        true => Some(json.usize("sliding_window")?),
        false => None,
    };
    let spec = json.decoder(QkNorm::Head, window, Defaults { kv_heads: Some(4), ..Defaults::default() })?;
    let experts = json.usize_as(["num_experts", "num_local_experts"])?;
    let moe = MoeSpec {
        router: RouterConfig { normalize: json.bool_or("norm_topk_prob", false)?, ..RouterConfig::default() },
        ..MoeSpec::plain(experts, json.usize("num_experts_per_tok")?, json.mlp("moe_intermediate_size")?)
    };
    let is_moe = json.sparse_steps()?;
    json.finish_mixed(spec, &moe, |l| is_moe[l])
}

pub(super) fn write(spec: &ModelSpec) -> std::result::Result<Value, String> {
    expect_decoder(spec, QkNorm::Head, Words { biases: Biases::All, window: true, ..Words::default() })?;
    let (moe, dense) = moe_and_dense(spec)?;
    let normalized = softmax_normalized(moe)?;
    no_shared(moe)?;
    Ok(with(
        write_decoder(spec, moe.expert.activation),
        json!({
            "intermediate_size": dense.map_or(moe.expert.intermediate * moe.top_k, |dense| dense.intermediate),
            "moe_intermediate_size": moe.expert.intermediate,
            "num_experts": moe.experts,
            "num_experts_per_tok": moe.top_k,
            "norm_topk_prob": normalized,
            "decoder_sparse_step": 1,
            "mlp_only_layers": dense_layers(spec),
            "attention_bias": spec.attention.qkv_bias,
            "use_sliding_window": spec.attention.window.is_some(),
            "sliding_window": spec.attention.window,
            "max_window_layers": 0,
            "router_aux_loss_coef": 0.001,
            "output_router_logits": false,
        }),
    ))
}
