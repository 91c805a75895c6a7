//! `dots1` (dots.llm1, 2506.05767): sigmoid scores with a bias for the selection, groups, shared experts, the first layers
//! dense, norms of each query and key head.

use super::common::{
    Biases, Defaults, Json, Words, expect_decoder, first_dense, layer_types, moe_and_dense, shared_experts,
    with, write_decoder,
};
use crate::error::Result;
use crate::spec::{ModelSpec, MoeSpec, QkNorm};
use senmon_moe::RouterConfig;
use serde_json::{Value, json};

pub(super) fn read(json: &Json) -> Result<ModelSpec> {
    let (window, layers) = json.windows(Some(4096), 62)?;
    let mut spec =
        json.decoder(QkNorm::Head, window, Defaults { kv_heads: Some(32), ..Defaults::default() })?;
    spec.attention.window_layers = layers;
    let expert = json.mlp("moe_intermediate_size")?;
    let shared = json.maybe_usize("n_shared_experts")?.unwrap_or(0);
    let experts = json.usize_as(["n_routed_experts", "num_local_experts"])?;
    let moe = MoeSpec {
        shared_intermediate: shared.saturating_mul(expert.intermediate),
        router: RouterConfig {
            kind: "sigmoid_bias".into(),
            normalize: json.bool_or("norm_topk_prob", false)?,
            scale: json.f64_or("routed_scaling_factor", 1.0)?,
            groups: json.maybe_usize("n_group")?.unwrap_or(1),
            top_groups: json.maybe_usize("topk_group")?.unwrap_or(1),
            ..RouterConfig::default()
        },
        ..MoeSpec::plain(experts, json.usize("num_experts_per_tok")?, expert)
    };
    let first = json.maybe_usize("first_k_dense_replace")?.unwrap_or(0);
    json.finish_mixed(spec, &moe, |l| l >= first)
}

pub(super) fn write(spec: &ModelSpec) -> std::result::Result<Value, String> {
    expect_decoder(
        spec,
        QkNorm::Head,
        Words { biases: Biases::All, layer_windows: true, ..Words::default() },
    )?;
    let (moe, dense) = moe_and_dense(spec)?;
    let first = first_dense(spec)?;
    let r = &moe.router;
    if r.kind != "sigmoid_bias" {
        return Err(format!("router.kind = {}", r.kind));
    }
    let shared = shared_experts(moe)?;
    if shared == 0 {
        return Err("no shared experts".into());
    }
    if moe.experts / r.groups < 2 {
        return Err("groups of one expert".into());
    }
    Ok(with(
        write_decoder(spec, moe.expert.activation),
        json!({
            "intermediate_size": dense.map_or(moe.expert.intermediate * moe.top_k, |dense| dense.intermediate),
            "moe_intermediate_size": moe.expert.intermediate,
            "n_routed_experts": moe.experts,
            "n_shared_experts": shared,
            "num_experts_per_tok": moe.top_k,
            "norm_topk_prob": r.normalize,
            "routed_scaling_factor": r.scale,
            "n_group": r.groups,
            "topk_group": r.top_groups,
            "first_k_dense_replace": first,
            "attention_bias": spec.attention.qkv_bias,
            "sliding_window": spec.attention.window,
            "max_window_layers": 0,
            "layer_types": layer_types(spec),
        }),
    ))
}
