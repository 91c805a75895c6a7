//! `mixtral` (Mixtral 8x7B, 2401.04088): every layer MoE, softmax over the picked logits.

use super::common::{
    Defaults, Json, expect_decoder, same_dense, same_moe, softmax_normalized, with, write_decoder,
};
use crate::error::Result;
use crate::params::MoeNames;
use crate::spec::{FfnSpec, ModelSpec, MoeSpec, QkNorm};
use senmon_moe::RouterConfig;
use serde_json::{Value, json};

pub(super) const NAMES: MoeNames = MoeNames { block: "block_sparse_moe", expert: ["w1", "w3", "w2"] };

const DEFAULTS: Defaults = Defaults { rope_theta: 1e6, kv_heads: Some(8), head_dim: None };

pub(super) fn read(json: &Json) -> Result<ModelSpec> {
    let spec = json.decoder(QkNorm::None, json.maybe_usize("sliding_window")?, DEFAULTS)?;
    let moe = MoeSpec {
        experts: json.usize_as(["num_local_experts", "num_experts"])?,
        top_k: json.usize("num_experts_per_tok")?,
        expert: json.mlp("intermediate_size")?,
        shared_intermediate: 0,
        router: RouterConfig { kind: "topk_post".into(), ..RouterConfig::default() },
    };
    json.finish(spec, |_| FfnSpec::Moe(moe.clone()))
}

pub(super) fn write(spec: &ModelSpec) -> std::result::Result<Value, String> {
    expect_decoder(spec, QkNorm::None, false, true)?;
    if same_dense(&spec.layers)?.is_some() {
        return Err("a dense layer".into());
    }
    let moe = same_moe(&spec.layers)?.ok_or("no MoE layer")?;
    if !softmax_normalized(moe)? {
        return Err("weights that are not normalised over the picked experts".into());
    }
    if moe.shared_intermediate > 0 {
        return Err("shared experts".into());
    }
    Ok(with(
        write_decoder(spec, moe.expert.activation),
        json!({
            "intermediate_size": moe.expert.intermediate,
            "num_local_experts": moe.experts,
            "num_experts_per_tok": moe.top_k,
            "router_jitter_noise": 0.0,
            "router_aux_loss_coef": 0.001,
            "output_router_logits": false,
            "sliding_window": spec.attention.window,
        }),
    ))
}
