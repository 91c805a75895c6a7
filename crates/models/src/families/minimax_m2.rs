//! `minimax_m2` (MiniMax-M2): part of each head turns, norms of all query and key heads together, sigmoid scores with a bias for
//! the selection.

use super::common::{
    Defaults, Json, Words, Written, expect_decoder, no_shared, only_moe, with, write_decoder,
};
use crate::error::Result;
use crate::names::{Experts, Names, PLAIN};
use crate::spec::{FfnSpec, ModelSpec, MoeSpec, QkNorm};
use senmon_moe::RouterConfig;
use serde_json::json;

pub(super) const NAMES: Names = Names {
    block: "block_sparse_moe",
    experts: Experts::Each(["w1", "w3", "w2"]),
    selection_bias: "e_score_correction_bias",
    ..PLAIN
};

pub(super) fn read(json: &Json) -> Result<ModelSpec> {
    json.expect_text("scoring_func", &["sigmoid"])?;
    json.expect_text("qk_norm_type", &["per_layer"])?;
    json.refuse_unless("use_qk_norm", |v| v.as_bool() == Some(true))?;
    json.refuse_unless("shared_intermediate_size", |v| v.as_u64() == Some(0))?;
    let head_dim = json.maybe_usize("head_dim")?.unwrap_or(128);
    let part = match json.maybe_usize("rotary_dim")? {
        Some(dims) if head_dim > 0 => dims as f64 / head_dim as f64,
        _ => 1.0,
    };
    let defaults = Defaults {
        rope_theta: 5e6,
        kv_heads: Some(8),
        head_dim: Some(128),
        partial: Some(part),
        ..Defaults::default()
    };
    let mut spec = json.decoder(QkNorm::Full, None, defaults)?;
    (spec.attention.qkv_bias, spec.attention.out_bias) = (false, false);
    let experts = json.usize_as(["num_local_experts", "num_experts"])?;
    let moe = MoeSpec {
        router: RouterConfig { kind: "sigmoid_bias".into(), ..RouterConfig::default() },
        ..MoeSpec::plain(experts, json.usize("num_experts_per_tok")?, json.mlp("intermediate_size")?)
    };
    json.finish(spec, |_| FfnSpec::Moe(moe.clone()))
}

pub(super) fn write(spec: &ModelSpec) -> Written {
    expect_decoder(spec, QkNorm::Full, Words { partial: true, ..Words::default() })?;
    let moe = only_moe(spec)?;
    no_shared(moe)?;
    let r = &moe.router;
    if r.kind != "sigmoid_bias" || !r.normalize || r.scale != 1.0 || r.top_groups != r.groups {
        return Err(format!("router.kind = {}, or not normalised, scaled or in groups", r.kind));
    }
    let a = &spec.attention;
    let mut value = with(
        write_decoder(spec, moe.expert.activation),
        json!({
            "intermediate_size": moe.expert.intermediate,
            "num_local_experts": moe.experts,
            "num_experts_per_tok": moe.top_k,
            "rotary_dim": a.rope.rotated(a.head_dim),
            "scoring_func": "sigmoid",
            "use_qk_norm": true,
            "router_jitter_noise": 0.0,
            "router_aux_loss_coef": 0.001,
            "output_router_logits": false,
        }),
    );
    value["rope_parameters"]["partial_rotary_factor"] =
        (a.rope.rotated(a.head_dim) as f64 / a.head_dim as f64).into();
    Ok(value)
}
