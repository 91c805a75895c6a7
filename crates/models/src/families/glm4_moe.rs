//! `glm4_moe` (GLM-4.5, 2508.06471): half of each head turns, biases on queries, keys and values, sigmoid scores with a bias for
//! the selection, shared experts, the first layers dense.

use super::common::{
    Biases, Defaults, Json, Words, expect_decoder, first_dense, moe_and_dense, shared_experts, with,
    write_decoder,
};
use crate::error::Result;
use crate::spec::{ModelSpec, MoeSpec, QkNorm};
use senmon_moe::RouterConfig;
use serde_json::{Value, json};

pub(super) fn read(json: &Json) -> Result<ModelSpec> {
    let qk_norm = if json.bool_or("use_qk_norm", false)? { QkNorm::Head } else { QkNorm::None };
    let defaults = Defaults { kv_heads: Some(8), partial: Some(0.5), ..Defaults::default() };
    let mut spec = json.decoder(qk_norm, None, defaults)?;
    spec.attention.out_bias = false;
    let expert = json.mlp("moe_intermediate_size")?;
    let shared = json.maybe_usize("n_shared_experts")?.unwrap_or(1);
    let experts = json.usize_as(["n_routed_experts", "num_local_experts"])?;
    let moe = MoeSpec {
        shared_intermediate: shared.saturating_mul(expert.intermediate),
        router: RouterConfig {
            kind: "sigmoid_bias".into(),
            normalize: json.bool_or("norm_topk_prob", true)?,
            scale: json.f64_or("routed_scaling_factor", 1.0)?,
            groups: json.maybe_usize("n_group")?.unwrap_or(1),
            top_groups: json.maybe_usize("topk_group")?.unwrap_or(1),
            ..RouterConfig::default()
        },
        ..MoeSpec::plain(experts, json.usize("num_experts_per_tok")?, expert)
    };
    let first = json.maybe_usize("first_k_dense_replace")?.unwrap_or(1);
    json.finish_mixed(spec, &moe, |l| l >= first)
}

pub(super) fn write(spec: &ModelSpec) -> std::result::Result<Value, String> {
    let a = &spec.attention;
    let normed = match a.qk_norm {
        QkNorm::Head => QkNorm::Head,
        _ => QkNorm::None,
    };
    expect_decoder(spec, normed, Words { biases: Biases::Qkv, partial: true, ..Words::default() })?;
    let (moe, dense) = moe_and_dense(spec)?;
    let r = &moe.router;
    if r.kind != "sigmoid_bias" || moe.experts / r.groups < 2 {
        return Err(format!("router.kind = {}, or groups of one expert", r.kind));
    }
    let shared = shared_experts(moe)?;
    if shared == 0 {
        return Err("no shared experts".into());
    }
    let part = a.rope.dims.map_or(1.0, |dims| dims as f64 / a.head_dim as f64);
    let mut value = with(
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
            "first_k_dense_replace": first_dense(spec)?,
            "attention_bias": a.qkv_bias,
            "use_qk_norm": a.qk_norm == QkNorm::Head,
            "partial_rotary_factor": part,
        }),
    );
    value["rope_parameters"]["partial_rotary_factor"] = part.into();
    Ok(value)
}
