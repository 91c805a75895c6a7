//! `mixtral` (Mixtral 8x7B, 2401.04088): every layer MoE, softmax over the picked logits.

use super::common::{
    Defaults, Json, Words, Written, expect_decoder, no_shared, only_moe, softmax_normalized, with,
    write_decoder,
};
use crate::error::Result;
use crate::names::{Experts, Names, PLAIN};
use crate::spec::{FfnSpec, ModelSpec, MoeSpec, QkNorm};
use senmon_moe::RouterConfig;
use serde_json::json;

pub(super) const NAMES: Names =
    Names { block: "block_sparse_moe", experts: Experts::Each(["w1", "w3", "w2"]), ..PLAIN };

pub(super) fn read(json: &Json) -> Result<ModelSpec> {
    let defaults = Defaults { rope_theta: 1e6, kv_heads: Some(8), ..Defaults::default() };
    let spec = json.decoder(QkNorm::None, json.maybe_usize("sliding_window")?, defaults)?;
    let experts = json.usize_as(["num_local_experts", "num_experts"])?;
    let moe = MoeSpec {
        router: RouterConfig { kind: "topk_post".into(), ..RouterConfig::default() },
        ..MoeSpec::plain(experts, json.usize("num_experts_per_tok")?, json.mlp("intermediate_size")?)
    };
    json.finish(spec, |_| FfnSpec::Moe(moe.clone()))
}

pub(super) fn write(spec: &ModelSpec) -> Written {
    expect_decoder(spec, QkNorm::None, Words { window: true, ..Words::default() })?;
    let moe = only_moe(spec)?;
    if !softmax_normalized(moe)? {
        return Err("weights that are not normalised over the picked experts".into());
    }
    no_shared(moe)?;
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
