//! `dots1` (dots.llm1, 2506.05767): sigmoid scores with a bias for the selection, groups, shared experts, the first layers
//! dense, norms of each query and key head.

use super::common::{Defaults, Json, expect_decoder, same_dense, same_moe, with, write_decoder};
use crate::error::Result;
use crate::spec::{FfnSpec, ModelSpec, MoeSpec, QkNorm};
use senmon_moe::RouterConfig;
use serde_json::{Value, json};

pub(super) fn read(json: &Json) -> Result<ModelSpec> {
    let window = json.uniform_window(4096, 62)?;
    let spec = json.decoder(QkNorm::Head, window, Defaults { kv_heads: Some(32), ..Defaults::default() })?;
    let expert = json.mlp("moe_intermediate_size")?;
    let shared = json.maybe_usize("n_shared_experts")?.unwrap_or(0);
    let moe = MoeSpec {
        experts: json.usize_as(["n_routed_experts", "num_local_experts"])?,
        top_k: json.usize("num_experts_per_tok")?,
        shared_intermediate: shared.saturating_mul(expert.intermediate),
        expert,
        router: RouterConfig {
            kind: "sigmoid_bias".into(),
            normalize: json.bool_or("norm_topk_prob", false)?,
            scale: json.f64_or("routed_scaling_factor", 1.0)?,
            groups: json.maybe_usize("n_group")?.unwrap_or(1),
            top_groups: json.maybe_usize("topk_group")?.unwrap_or(1),
            ..RouterConfig::default()
        },
    };
    let first = json.maybe_usize("first_k_dense_replace")?.unwrap_or(0);
    let dense = if first > 0 { Some(json.mlp("intermediate_size")?) } else { None };
    json.finish(spec, |l| match &dense {
        Some(dense) if l < first => FfnSpec::Dense(dense.clone()),
        _ => FfnSpec::Moe(moe.clone()),
    })
}

pub(super) fn write(spec: &ModelSpec) -> std::result::Result<Value, String> {
    expect_decoder(spec, QkNorm::Head, true, true)?;
    let moe = same_moe(&spec.layers)?.ok_or("no MoE layer")?;
    let dense = same_dense(&spec.layers)?;
    let first = spec.layers.iter().take_while(|layer| matches!(layer, FfnSpec::Dense(_))).count();
    if spec.layers[first..].iter().any(|layer| matches!(layer, FfnSpec::Dense(_))) {
        return Err("a dense layer above an MoE layer".into());
    }
    if dense.is_some_and(|dense| dense.activation != moe.expert.activation) {
        return Err("dense layers with another activation than the experts'".into());
    }
    let r = &moe.router;
    if r.kind != "sigmoid_bias" {
        return Err(format!("router.kind = {}", r.kind));
    }
    let shared = moe.shared_intermediate;
    if shared == 0 || !shared.is_multiple_of(moe.expert.intermediate) {
        return Err(format!(
            "shared experts of {shared} in all beside experts of {}",
            moe.expert.intermediate
        ));
    }
    if moe.experts / r.groups < 2 {
        return Err("groups of one expert".into());
    }
    let kind = if spec.attention.window.is_some() { "sliding_attention" } else { "full_attention" };
    Ok(with(
        write_decoder(spec, moe.expert.activation),
        json!({
            "intermediate_size": dense.map_or(moe.expert.intermediate * moe.top_k, |dense| dense.intermediate),
            "moe_intermediate_size": moe.expert.intermediate,
            "n_routed_experts": moe.experts,
            "n_shared_experts": shared / moe.expert.intermediate,
            "num_experts_per_tok": moe.top_k,
            "norm_topk_prob": r.normalize,
            "routed_scaling_factor": r.scale,
            "n_group": r.groups,
            "topk_group": r.top_groups,
            "first_k_dense_replace": first,
            "attention_bias": spec.attention.qkv_bias,
            "sliding_window": spec.attention.window,
            "max_window_layers": 0,
            "layer_types": vec![kind; spec.layers.len()],
        }),
    ))
}
