//! `ernie4_5_moe` (ERNIE 4.5): neighbours turn together, softmax scores with a bias for the selection, shared experts, MoE layers
//! from one to another at an interval.

use super::common::{
    Biases, Defaults, Json, Words, Written, dense_layers, expect_decoder, moe_and_dense, shared_experts,
    with, write_decoder,
};
use crate::error::Result;
use crate::names::{Names, PLAIN};
use crate::spec::{ModelSpec, MoeSpec, QkNorm};
use senmon_moe::RouterConfig;
use serde_json::{Value, json};

pub(super) const NAMES: Names =
    Names { selection_bias: "moe_statics.e_score_correction_bias", selection_bias_rows: true, ..PLAIN };

pub(super) fn read(json: &Json) -> Result<ModelSpec> {
    let bias = json.bool_or("use_bias", false)?;
    let defaults = Defaults { rope_theta: 500_000.0, kv_heads: Some(4), ..Defaults::default() };
    let mut spec = json.decoder(QkNorm::None, None, defaults)?;
    spec.attention.rope.neighbours = true;
    (spec.attention.qkv_bias, spec.attention.out_bias, spec.head_bias) = (bias, bias, bias);
    if json.get("tie_word_embeddings").is_none() {
        spec.tie_embeddings = true;
    }
    let expert = json.mlp("moe_intermediate_size")?;
    let shared = json.maybe_usize("moe_num_shared_experts")?.unwrap_or(2);
    let experts = json.usize_as(["moe_num_experts", "num_experts"])?;
    let moe = MoeSpec {
        shared_intermediate: shared.saturating_mul(expert.intermediate),
        shared_bias: bias && shared > 0,
        router: RouterConfig {
            kind: "softmax_bias".into(),
            least_sum: json.f64_or("moe_norm_min", 1e-12)?,
            ..RouterConfig::default()
        },
        ..MoeSpec::plain(experts, json.usize_as(["moe_k", "num_experts_per_tok"])?, expert)
    };
    let first = json.maybe_usize("moe_layer_start_index")?.unwrap_or(1);
    let step = json.maybe_usize("moe_layer_interval")?.unwrap_or(1);
    if step == 0 {
        return Err(json.error("moe_layer_interval = 0 must be 1 or more"));
    }
    let last = match json.typed("moe_layer_end_index", "a layer, or -1", Value::as_i64)? {
        None | Some(-1) => usize::MAX,
        Some(last) => usize::try_from(last)
            .map_err(|_| json.error(format!("moe_layer_end_index = {last} is no layer")))?,
    };
    json.finish_biased(spec, &moe, bias, |l| (l + 1).is_multiple_of(step) && l >= first && l <= last)
}

pub(super) fn write(spec: &ModelSpec) -> Written {
    expect_decoder(
        spec,
        QkNorm::None,
        Words { biases: Biases::All, neighbours: true, head_bias: true, mlp_bias: true, ..Words::default() },
    )?;
    let bias = spec.head_bias;
    let (moe, dense) = moe_and_dense(spec)?;
    let biases = dense.is_none_or(|dense| dense.bias == bias)
        && (moe.shared_intermediate == 0 || moe.shared_bias == bias)
        && spec.attention.qkv_bias == bias;
    if !biases {
        return Err("biases in some places and not in others".into());
    }
    let r = &moe.router;
    if r.kind != "softmax_bias" || !r.normalize || r.scale != 1.0 || r.groups != 1 {
        return Err(format!("router.kind = {}, or not normalised, scaled or in groups", r.kind));
    }
    // MoE layers: from `first` to `last`, every `step`-th.
    let dense_at = dense_layers(spec);
    let sparse: Vec<usize> = (0..spec.layers.len()).filter(|l| !dense_at.contains(l)).collect();
    let (first, last) = (sparse[0], sparse[sparse.len() - 1]);
    let step = sparse.get(1).map_or(1, |second| second - first);
    let all: Vec<usize> = (first..=last).filter(|l| (l + 1).is_multiple_of(step)).collect();
    if all != sparse {
        return Err("dense layers among the MoE layers".into());
    }
    Ok(with(
        write_decoder(spec, moe.expert.activation),
        json!({
            "intermediate_size": dense.map_or(moe.expert.intermediate * moe.top_k, |dense| dense.intermediate),
            "moe_intermediate_size": moe.expert.intermediate,
            "moe_num_experts": moe.experts,
            "moe_num_shared_experts": shared_experts(moe)?,
            "moe_k": moe.top_k,
            "moe_layer_start_index": first,
            "moe_layer_end_index": last,
            "moe_layer_interval": step,
            "moe_norm_min": r.least_sum,
            "use_bias": bias,
            "router_aux_loss_coef": 0.001,
            "output_router_logits": false,
        }),
    ))
}
