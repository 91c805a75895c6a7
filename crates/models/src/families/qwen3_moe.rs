//! `qwen3_moe` (Qwen3-30B-A3B, 2505.09388): norms of each query and key head, weights normalised or not; every
//! `decoder_sparse_step`-th layer is MoE, but not those of `mlp_only_layers`.

use super::common::{
    Defaults, Json, expect_decoder, same_dense, same_moe, softmax_normalized, with, write_decoder,
};
use crate::error::Result;
use crate::spec::{FfnSpec, ModelSpec, MoeSpec, QkNorm};
use senmon_moe::RouterConfig;
use serde_json::{Value, json};
use std::collections::BTreeSet;

pub(super) fn read(json: &Json) -> Result<ModelSpec> {
    let window = match json.bool_or("use_sliding_window", false)? {
        true => Some(json.usize("sliding_window")?),
        false => None,
    };
    let spec = json.decoder(QkNorm::Head, window, Defaults { kv_heads: Some(4), ..Defaults::default() })?;
    let moe = MoeSpec {
        experts: json.usize_as(["num_experts", "num_local_experts"])?,
        top_k: json.usize("num_experts_per_tok")?,
        expert: json.mlp("moe_intermediate_size")?,
        shared_intermediate: 0,
        router: RouterConfig { normalize: json.bool_or("norm_topk_prob", false)?, ..RouterConfig::default() },
    };
    let step = json.maybe_usize("decoder_sparse_step")?.unwrap_or(1);
    if step == 0 {
        return Err(json.error("decoder_sparse_step = 0 must be 1 or more"));
    }
    let only: BTreeSet<u64> = match json.get("mlp_only_layers") {
        None => BTreeSet::new(),
        Some(layers) => {
            let numbers = layers.as_array().and_then(|all| all.iter().map(Value::as_u64).collect());
            numbers
                .ok_or_else(|| json.error(format!("mlp_only_layers = {layers} is not a list of layers")))?
        }
    };
    let is_moe = |l: usize| !only.contains(&(l as u64)) && moe.experts > 0 && (l + 1).is_multiple_of(step);
    let layers = json.usize("num_hidden_layers")?;
    let dense = if (0..layers).all(is_moe) { None } else { Some(json.mlp("intermediate_size")?) };
    json.finish(spec, |l| match &dense {
        Some(dense) if !is_moe(l) => FfnSpec::Dense(dense.clone()),
        _ => FfnSpec::Moe(moe.clone()),
    })
}

pub(super) fn write(spec: &ModelSpec) -> std::result::Result<Value, String> {
    expect_decoder(spec, QkNorm::Head, true, true)?;
    let moe = same_moe(&spec.layers)?.ok_or("no MoE layer")?;
    let dense = same_dense(&spec.layers)?;
    if dense.is_some_and(|dense| dense.activation != moe.expert.activation) {
        return Err("dense layers with another activation than the experts'".into());
    }
    let normalized = softmax_normalized(moe)?;
    if moe.shared_intermediate > 0 {
        return Err("shared experts".into());
    }
    let only: Vec<usize> =
        (0..spec.layers.len()).filter(|l| matches!(spec.layers[*l], FfnSpec::Dense(_))).collect();
    Ok(with(
        write_decoder(spec, moe.expert.activation),
        json!({
            "intermediate_size": dense.map_or(moe.expert.intermediate * moe.top_k, |dense| dense.intermediate),
            "moe_intermediate_size": moe.expert.intermediate,
            "num_experts": moe.experts,
            "num_experts_per_tok": moe.top_k,
            "norm_topk_prob": normalized,
            "decoder_sparse_step": 1,
            "mlp_only_layers": only,
            "attention_bias": spec.attention.qkv_bias,
            "use_sliding_window": spec.attention.window.is_some(),
            "sliding_window": spec.attention.window,
            "max_window_layers": 0,
            "router_aux_loss_coef": 0.001,
            "output_router_logits": false,
        }),
    ))
}
